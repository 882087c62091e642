"""The other process of the channel tests: real LMCache memory with a kvxfer channel on it, or a whole PD backend."""

import asyncio
import socket
import threading
import time

import torch

LAYERS, HEADS, HEAD_SIZE, CHUNK = 2, 2, 8, 16
SHAPE = (2, LAYERS, CHUNK, HEADS * HEAD_SIZE)
PAGE_BYTES = 2 * LAYERS * CHUNK * HEADS * HEAD_SIZE * 2
PAGES = 8


def memory(pages=PAGES, chunk=CHUNK):
    """LMCache's paged CPU allocator."""
    from lmcache.v1.memory_allocators.paged_cpu_gpu_memory_allocator import PagedCpuGpuMemoryAllocator
    from lmcache.v1.memory_management import MemoryFormat

    shape = torch.Size((2, LAYERS, chunk, HEADS * HEAD_SIZE))
    allocator = PagedCpuGpuMemoryAllocator()
    allocator.init_cpu_memory_allocator(
        pages * PAGE_BYTES * chunk // CHUNK, [shape], [torch.bfloat16], MemoryFormat.KV_2LTD
    )
    return allocator


def chunk_of(allocator, tokens=CHUNK):
    from lmcache.v1.memory_management import MemoryFormat

    found = allocator.allocate(
        torch.Size((2, LAYERS, tokens, HEADS * HEAD_SIZE)), torch.bfloat16, MemoryFormat.KV_2LTD, "cpu"
    )
    assert found is not None
    return found


def channel(allocator, url=None, role="receiver", loop=None, **kwargs):
    """A channel made by LMCache's own factory."""
    from kvxfer.lmcache import register

    register()
    from lmcache.v1.transfer_channel import CreateTransferChannel

    cpu = allocator.cpu_allocator
    settings = dict(buffer_ptr=cpu.buffer_ptr, buffer_size=cpu.buffer_size, align_bytes=cpu.align_bytes, tp_rank=0)
    settings |= dict(device="cpu", backends=["UCX"], async_mode=loop is not None, event_loop=loop) | kwargs
    return CreateTransferChannel(channel_type="kvxfer", role=role, peer_init_url=url, **settings)


def raw(allocator):
    return allocator.cpu_allocator.buffer.numpy()


def content(seed, tokens=CHUNK):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -(2**15), 2**15, (2, LAYERS, tokens, HEADS * HEAD_SIZE), generator=generator, dtype=torch.int16
    )


def fill(memory_object, seed, tokens=CHUNK):
    memory_object.tensor.view(torch.int16).copy_(content(seed, tokens))


# ---- the process ----


def serve(pipe, what, arguments):
    try:
        {"channel": _serve_channel, "backend": _serve_backend, "pd": _serve_pd, "l1": _serve_l1, "p2p": _serve_p2p}[
            what
        ](pipe, *arguments)
    except Exception as e:
        pipe.send(e)


def _serve_channel(pipe, url, peer_lookup_url):
    allocator = memory()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    ours = channel(allocator, url, role="both", loop=loop, peer_lookup_url=peer_lookup_url)
    pipe.send(url)
    while True:
        command, *arguments = pipe.recv()
        if command == "stop":
            ours.close()
            return
        if command == "sentinel":
            raw(allocator)[:] = arguments[0]
            pipe.send(None)
        elif command == "bytes":
            pipe.send(raw(allocator)[arguments[0] * PAGE_BYTES :][: arguments[1]].tobytes())
        elif command == "fill":
            memory_object = chunk_of(allocator)
            fill(memory_object, arguments[0])
            pipe.send(memory_object.meta.address)
        elif command == "knows":
            pipe.send(ours.remote_xfer_handler_exists(arguments[0]))
        elif command == "write back":
            receiver, seed, page = arguments
            memory_object = chunk_of(allocator)
            fill(memory_object, seed)
            spec = {"receiver_id": receiver, "remote_indexes": [page]}
            writing = asyncio.run_coroutine_threadsafe(ours.async_batched_write([memory_object], spec), loop)
            pipe.send(writing.result(20))


def empty_pages(stats):
    """Pages of a decoder that hold nothing: free ones, and those that a prefiller has in advance."""
    return stats.free_pages + stats.advanced


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def pd_backend(role, metadata=None, pd=None, **changes):
    """kvxfer's PD backend, made where LMCache makes its default one."""
    from kvxfer.lmcache import register

    register()
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync

    stated = dict(chunk_size=CHUNK, local_cpu=False, save_unfull_chunk=True, enable_pd=True, transfer_channel="kvxfer")
    stated |= dict(pd_role=role, pd_buffer_size=PAGES * PAGE_BYTES, pd_buffer_device="cpu")
    if pd is not None:
        stated["extra_config"] = {"kvxfer": {"pd": pd}}
    config = LMCacheEngineConfig.from_defaults(**(stated | changes))
    about = globals()["metadata"]()
    for name, value in (metadata or {}).items():
        setattr(about, name, value)
    return PDBackendAsync(config, about)


def _serve_pd(pipe, init, changes):
    ours = pd_backend("receiver", pd_peer_host="127.0.0.1", pd_peer_init_port=[init], **changes)
    pipe.send("up")
    while True:
        command, *arguments = pipe.recv()
        if command == "stop":
            ours.close()
            return
        if command == "stats":
            pipe.send(ours.pool_stats)
        elif command == "contains":
            pipe.send(ours.batched_contains([key(n) for n in arguments[0]]))
        elif command == "unpin":
            pipe.send(ours.unpin(key(arguments[0])))
        elif command == "take":
            seed, tokens = arguments
            received = ours.get_blocking(key(seed))
            if received is None:
                pipe.send(None)
                continue
            wanted = content(seed, tokens)
            same = torch.equal(received.tensor.view(torch.int16).view(wanted.shape), wanted)
            ours.remove(key(seed))
            pipe.send(same)


def metadata():
    from lmcache.v1.metadata import LMCacheMetadata

    return LMCacheMetadata(
        model_name="m",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, HEAD_SIZE),
    )


def backend(mode, role, **ports):
    """LMCache's own PD backend of that mode, with the kvxfer channel."""
    from kvxfer.lmcache import register

    register()
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.storage_backend.pd_backend import PDBackend
    from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync

    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=False,
        save_unfull_chunk=True,
        enable_pd=True,
        transfer_channel="kvxfer",
        pd_backend_mode=mode,
        pd_role=role,
        pd_buffer_size=PAGES * PAGE_BYTES,
        pd_buffer_device="cpu",
        **ports,
    )
    return {"sync": PDBackend, "async": PDBackendAsync}[mode](config, metadata())


def key(n):
    from lmcache.utils import CacheEngineKey

    return CacheEngineKey(model_name="m", world_size=1, worker_id=0, chunk_hash=n, dtype=torch.bfloat16)


def _serve_backend(pipe, mode, init, alloc, query=None):
    ports = dict(pd_peer_init_port=[init], pd_peer_alloc_port=[alloc], pd_peer_query_port=query and [query])
    ours = backend(mode, "receiver", pd_peer_host="127.0.0.1", **ports)
    pipe.send("up")
    while True:
        command, *arguments = pipe.recv()
        if command == "stop":
            # LMCache's own shutdown waits for its sockets; the process ends anyway.
            ours.transfer_channel.close()
            return
        if command == "take":
            seed, tokens = arguments
            received = ours.get_blocking(key(seed))
            same = torch.equal(
                received.tensor.view(torch.int16).view(content(seed, tokens).shape), content(seed, tokens)
            )
            # The async backend gives the reference back by itself; LMCache's engine does it for the sync one.
            ours.remove(key(seed))
            if mode == "sync":
                received.ref_count_down()
            pipe.send(same)


def _serve_l1(pipe, port):
    """A cache server's transfer channel over its L1 memory."""
    memory, context = l1_context(port)
    pipe.send("up")
    while True:
        command, *arguments = pipe.recv()
        if command == "fill":
            offset, data = arguments
            memory[offset : offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pipe.send(None)
        elif command == "bytes":
            offset, length = arguments
            pipe.send(bytes(memory[offset : offset + length].numpy()))
        elif command == "peers":
            pipe.send(context.get_num_connected_clients())
        elif command == "end":
            context.close()
            return pipe.send("ended")


L1_BYTES = 16 << 20


def l1_context(port):
    """L1 memory of LMCache's and the context that LMCache's own factory makes for it."""
    from kvxfer.lmcache import register

    register()
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.distributed.transfer_channel.factory import create_transfer_channel_context

    memory = torch.zeros(L1_BYTES, dtype=torch.uint8)
    described = L1MemoryDesc(ptr=memory.data_ptr(), size=L1_BYTES, align_bytes=4096)
    url = f"127.0.0.1:{port}"
    return memory, create_transfer_channel_context("kvxfer", described, listen_url=url, advertise_url=url)


# Chunks of LMCache's default size: its P2P backend takes no other for full ones.
P2P_CHUNK = 256


def p2p_backend(name, init, lookup, worker, pull, reply):
    """LMCache's P2P backend over its local CPU pool, known to LMCache's controller."""
    from kvxfer.lmcache import register

    register()
    from lmcache.v1.cache_controller.worker import LMCacheWorker
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.pin_monitor import PinMonitor
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
    from lmcache.v1.storage_backend.p2p_backend import P2PBackend

    config = LMCacheEngineConfig.from_defaults(
        chunk_size=P2P_CHUNK,
        local_cpu=True,
        max_local_cpu_size=64 / 1024,
        save_unfull_chunk=False,
        enable_p2p=True,
        p2p_host="127.0.0.1",
        p2p_init_ports=[init],
        p2p_lookup_ports=[lookup],
        transfer_channel="kvxfer",
        enable_controller=True,
        lmcache_instance_id=name,
        controller_pull_url=f"127.0.0.1:{pull}",
        controller_reply_url=f"127.0.0.1:{reply}",
        lmcache_worker_ports=[worker],
        extra_config={"p2p_max_retry_count": 1, "p2p_socket_recv_timeout_ms": 3000},
    )
    PinMonitor.GetOrCreate(config)
    known = LMCacheWorker(config, metadata(), None)
    # One event loop for both: they share a socket of LMCache's, which loses answers when two loops take turns at it. And no
    # lookup before the registration is over, for the same reason.
    loop = known.loop
    time.sleep(2)
    local = LocalCPUBackend(config, metadata(), "cpu", lmcache_worker=known)
    return loop, local, P2PBackend(config, metadata(), loop, local, known)


def keep(local, numbers):
    """Puts chunks into the local CPU pool, where their keys become known to the controller."""
    from lmcache.v1.memory_management import MemoryFormat

    for n in numbers:
        memory_object = local.allocate(
            torch.Size((2, LAYERS, P2P_CHUNK, HEADS * HEAD_SIZE)), torch.bfloat16, MemoryFormat.KV_2LTD
        )
        fill(memory_object, n, P2P_CHUNK)
        local.submit_put_task(key(n), memory_object)
        memory_object.ref_count_down()


def _serve_p2p(pipe, *arguments):
    _, local, _ = p2p_backend(*arguments)
    pipe.send("up")
    while True:
        command, *rest = pipe.recv()
        if command == "keep":
            keep(local, rest[0])
            pipe.send(None)
