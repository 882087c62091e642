"""LMCache's own PD backend over two transfer channels, and kvxfer's PD backend, side by side, without an engine.

    python channel_bench.py [--reps 5] [--channels nixl,kvxfer,kvxfer-pd] [--small | --lookup] [--json FILE]

`nixl` and `kvxfer` are LMCache's `sync` backend over that channel, `nixl-async` and `kvxfer-async` its `async` one (LMCache's default,
timed until its word to the proxy), `kvxfer-pd` is kvxfer's own with chunks that lie in
the prefiller's pages already, as all the others have them, and `kvxfer-pd-place` the same where the engine fills the decoder's pages: timed
is all but the filling, which every other channel has behind it, too. With kvxfer's own, one thread's memcpy of the same bytes is timed in
the same process. `--small` sends requests of one chunk of 1 MiB instead, one after another. `--lookup`
sends one chunk of one token (128 KiB) and times from its submission to the moment the decoder's lookup, asked all the time, finds it;
what passes between the last byte's arrival and that hit is a part of it.

Two processes exchange the KV cache of a 5000-token prompt in Llama-3-8B's geometry (32 layers, 8 KV heads of 128, bfloat16:
20 chunks, 655 MB valid, 671 MB in whole pages). Sender and receiver have a core each. Each channel runs in blocks that take
turns, so that a change of the machine's mood meets both; the first transfer of a block (connections, first touch of the
pages) is not timed. The receiver compares every chunk bit by bit.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types

LAYERS, HEADS, HEAD_SIZE, CHUNK, TOKENS = 32, 8, 128, 256, 5000
BUFFER_BYTES = 1 << 30
if "--small" in sys.argv:
    CHUNK = TOKENS = 8
LOOKUP = "--lookup" in sys.argv
if LOOKUP:
    CHUNK = TOKENS = 1
LENGTHS = [CHUNK] * (TOKENS // CHUNK) + ([TOKENS % CHUNK] if TOKENS % CHUNK else [])
PAGE_BYTES = 2 * LAYERS * CHUNK * HEADS * HEAD_SIZE * 2
VALID_BYTES = PAGE_BYTES * TOKENS // CHUNK
BUFFER_BYTES = min(BUFFER_BYTES, 64 * PAGE_BYTES)
BLOCK_TIMEOUT_S = 120


MEMCPY = []
"""Seconds that one thread's memcpy of the same bytes took, beside kvxfer's own backend."""


def measure(channels, reps, log_folder):
    """channel -> list of seconds, each from submission to LMCache's future being done."""
    blocks = [(reps + 1) // 2, reps // 2]
    seconds = {channel: [] for channel in channels}
    for timed in filter(None, blocks):
        for channel in channels:
            seconds[channel] += run_block(channel, timed, log_folder)
    return seconds


def run_block(channel, timed, log_folder):
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "socket")
        ports = free_ports(3)
        children = []
        try:
            for i, role in enumerate(("receiver", "sender")):
                log = pathlib.Path(log_folder, f"bench-{channel}-{role}.log")
                command = [sys.executable, __file__, "--child", role, "--channels", channel, "--reps", str(timed)]
                command += ["--rendezvous", rendezvous, "--ports", ",".join(map(str, ports))]
                command += [flag for flag in ("--small", "--lookup") if flag in sys.argv]
                core = available[(1 - i) % len(available)]
                with open(log, "wb") as errors:
                    child = subprocess.Popen(
                        command,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        env=os.environ
                        | {
                            "LMCACHE_LOG_LEVEL": "WARNING",
                            "LMCACHE_TRACK_USAGE": "false",
                            # As vLLM's configuration would say: LMCache's buffers are then kvxfer's memory.
                            "LMCACHE_TRANSFER_CHANNEL": channel.partition("-")[0],
                            "PYTHONHASHSEED": "0",
                            "UCX_NET_DEVICES": os.environ.get("UCX_NET_DEVICES", "lo"),
                        },
                        preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),
                    )
                children.append((child, log))
            results = []
            for child, log in children:
                output, _ = child.communicate(timeout=BLOCK_TIMEOUT_S)
                lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"kvxfer_bench"')]
                if child.returncode or not lines:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                    raise RuntimeError(
                        f"the {channel} channel's block ended with status {child.returncode}; {log} ends:\n{tail}"
                    )
                results.append(lines[-1]["kvxfer_bench"])
        finally:
            for child, _ in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
    identical, seconds = results[0]["identical"], results[1]["seconds"]
    if "memcpy" in results[1]:
        MEMCPY.extend(results[1]["memcpy"])
    expected = (timed + 1) * len(LENGTHS)
    if identical != expected:
        raise RuntimeError(f"{channel}: {identical} of {expected} chunks arrived bit-identical")
    return results[0]["found"] if LOOKUP else seconds


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def table(seconds):
    """Lines for people, and the ratio of the first channel's typical time to the last's."""
    lines = [
        f"{'channel':<13}{'reps':>5}{'best ms':>10}{'median ms':>11}{'mean ms':>10}{'worst ms':>10}"
        f"{'a second':>10}{'GB/s (median, valid bytes)':>28}"
    ]
    for channel, values in seconds.items():
        ms = sorted(1e3 * v for v in values)
        median = statistics.median(ms)
        lines.append(
            f"{channel:<13}{len(ms):>5}{ms[0]:>10.3f}{median:>11.3f}{statistics.mean(ms):>10.3f}{ms[-1]:>10.3f}"
            f"{1e3 / statistics.mean(ms):>10.1f}{VALID_BYTES / median / 1e6:>28.2f}"
        )
    # One after another: what counts there is how many a second, waits included.
    typical = statistics.mean if "--small" in sys.argv else statistics.median
    values = [typical(v) for v in seconds.values()]
    return lines, values[0] / values[-1]


# ---- the two processes ----


def child(role, channel, timed, rendezvous, ports):
    import torch
    import zmq

    torch.set_num_threads(1)
    if channel != "nixl":
        from kvxfer.lmcache import register

        register()
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.pd_backend import PDBackend
    from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync

    notify, init, alloc = ports
    settings = dict(
        chunk_size=CHUNK,
        local_cpu=False,
        save_unfull_chunk=True,
        enable_pd=True,
        transfer_channel=channel.partition("-")[0],
        nixl_backends=["UCX"],
        pd_role=role,
        pd_buffer_size=BUFFER_BYTES,
        pd_buffer_device="cpu",
    )
    if role == "sender":
        settings |= dict(pd_proxy_host="127.0.0.1", pd_proxy_port=notify)
    else:
        settings |= dict(pd_peer_host="127.0.0.1", pd_peer_init_port=[init], pd_peer_alloc_port=[alloc])
    metadata = LMCacheMetadata(
        model_name="bench",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, HEAD_SIZE),
    )
    own, in_place = channel.startswith("kvxfer-pd"), channel == "kvxfer-pd-place"
    asynchronous = own or channel.endswith("-async")
    if not own:
        settings["pd_backend_mode"] = "async" if asynchronous else "sync"
    backend = (PDBackendAsync if asynchronous else PDBackend)(LMCacheEngineConfig.from_defaults(**settings), metadata)

    def key(rep, i):
        return CacheEngineKey(
            model_name="bench", world_size=1, worker_id=0, chunk_hash=rep * 1000 + i, dtype=torch.bfloat16
        )

    noise = torch.randint(
        -(2**15), 2**15, (PAGE_BYTES // 2,), generator=torch.Generator().manual_seed(7), dtype=torch.int16
    )
    scratch = torch.empty_like(noise)

    def content(rep, i, n):
        """Different for every repetition and chunk, the same in both processes."""
        elements = 2 * LAYERS * n * HEADS * HEAD_SIZE
        return torch.add(noise[:elements], rep * 101 + i, out=scratch[:elements])

    def raw(memory_object, n):
        return memory_object.tensor.view(torch.int16).flatten()[: 2 * LAYERS * n * HEADS * HEAD_SIZE]

    if role == "receiver":
        server = socket.socket(socket.AF_UNIX)
        server.bind(rendezvous)
        server.listen()
        peer = server.accept()[0].makefile("rw")
        identical, found = 0, []
        for rep in range(timed + 1):
            deadline = time.monotonic() + BLOCK_TIMEOUT_S
            while LOOKUP and not backend.contains(key(rep, 0)):
                if time.monotonic() > deadline:
                    raise RuntimeError("the chunk was not found")
                # The receiving thread has the same core.
                os.sched_yield()
            hit = time.perf_counter()
            word, number, began = (peer.readline() or "end 0 0").split()
            if (word, number) != ("sent", str(rep)):
                raise RuntimeError("the sender ended early")
            # Both processes read the same clock.
            found.append(hit - float(began))
            for i, n in enumerate(LENGTHS):
                received = backend.get_blocking(key(rep, i))
                identical += torch.equal(raw(received, n), content(rep, i, n))
                backend.remove(key(rep, i))
                if not own:
                    received.ref_count_down()
            print(f"checked {rep}", file=peer, flush=True)
        result = {"identical": identical, "found": found[1:]}
    else:
        link = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + BLOCK_TIMEOUT_S
        while link.connect_ex(rendezvous):
            if time.monotonic() > deadline:
                raise RuntimeError("the receiver did not come up")
            time.sleep(0.05)
        peer = link.makefile("rw")
        told = None
        if asynchronous and not own:
            # LMCache's own asynchronous backend has no future: it tells the proxy that a cache has arrived.
            told = zmq.Context.instance().socket(zmq.PULL)
            told.bind(f"tcp://127.0.0.1:{notify}")
        spec = types.SimpleNamespace(
            receiver_host="127.0.0.1",
            receiver_init_port=[init],
            receiver_alloc_port=[alloc],
            req_id="bench",
            is_last_prefill=asynchronous,
            num_transferred_tokens=0,
            total_chunks=len(LENGTHS),
        )
        seconds = []
        for rep in range(timed + 1):
            spec.req_id = f"bench-{rep}"
            keys = [key(rep, i) for i in range(len(LENGTHS))]
            storing, before = contextlib.ExitStack(), 0.0
            if in_place:
                from kvxfer.lmcache.placing import KnownChunks, is_placed

                ends = list(itertools.accumulate(LENGTHS))
                known = KnownChunks(None, zip([0, *ends], ends, keys, strict=False))
                started = time.perf_counter()
                storing.enter_context(backend.storing(None, spec, None, known))
                before = time.perf_counter() - started
            objects = []
            for i, n in enumerate(LENGTHS):
                memory_object = backend.allocate(
                    torch.Size((2, LAYERS, n, HEADS * HEAD_SIZE)), torch.bfloat16, MemoryFormat.KV_2LTD
                )
                if memory_object is None:
                    raise RuntimeError(f"the sender's buffer is full at chunk {i} of repetition {rep}")
                raw(memory_object, n).copy_(content(rep, i, n))
                objects.append(memory_object)
            # The first request finds nobody connected.
            if in_place and rep and not all(map(is_placed, objects)):
                raise RuntimeError(f"repetition {rep}: a chunk has no place at the decoder")
            started = time.perf_counter() - before
            done = backend.batched_submit_put_task(keys, objects, transfer_spec=spec)
            if told is None:
                done[0].result(timeout=BLOCK_TIMEOUT_S)
            elif not told.poll(1000 * BLOCK_TIMEOUT_S) or spec.req_id.encode() not in told.recv():
                raise RuntimeError("no word that the cache has arrived")
            if rep > 0:
                seconds.append(time.perf_counter() - started)
            storing.close()
            for memory_object in objects:
                memory_object.ref_count_down()
            print(f"sent {rep} {started!r}", file=peer, flush=True)
            if peer.readline() != f"checked {rep}\n":
                raise RuntimeError("the receiver ended early")
        result = {"seconds": seconds}
        if own:
            a, b = (torch.full((VALID_BYTES,), v, dtype=torch.uint8) for v in (1, 2))
            result["memcpy"] = []
            for _ in range(len(seconds) + 1):
                started = time.perf_counter()
                b.copy_(a)
                result["memcpy"].append(time.perf_counter() - started)
            del result["memcpy"][0]
    print(json.dumps({"kvxfer_bench": result}), flush=True)
    # LMCache's shutdown waits for sockets that nobody answers any more; the measurement is over.
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--channels", default="nixl,kvxfer,kvxfer-pd")
    parser.add_argument("--small", action="store_true", help="requests of one chunk of 1 MiB")
    parser.add_argument("--lookup", action="store_true", help="until the decoder's lookup finds a small chunk")
    parser.add_argument("--json", help="write the times to this file")
    parser.add_argument("--child", choices=["sender", "receiver"], help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(
            options.child,
            options.channels,
            options.reps,
            options.rendezvous,
            [int(p) for p in options.ports.split(",")],
        )
        return
    with tempfile.TemporaryDirectory() as logs:
        seconds = measure(options.channels.split(","), options.reps, logs)
    lines, ratio = table(seconds)
    print("\n".join(lines))
    if MEMCPY and "kvxfer-pd" in seconds and not LOOKUP and "--small" not in sys.argv:
        ours = statistics.median(seconds["kvxfer-pd"])
        print(f"kvxfer-pd moves {statistics.median(MEMCPY) / ours:.2f} of what one thread's memcpy does")
    if len(seconds) > 1:
        print(f"{' : '.join(seconds)} = {ratio:.2f}")
    if options.json:
        pathlib.Path(options.json).write_text(
            json.dumps({"seconds": seconds, "memcpy": MEMCPY, "valid_bytes": VALID_BYTES, "ratio": ratio})
        )


if __name__ == "__main__":
    main()
