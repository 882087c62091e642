"""The channel by LMCache's contract, on LMCache's own memory, between two processes."""

import asyncio
import multiprocessing
import os
import socket
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import far_side
import kvxfer
from far_side import CHUNK, PAGE_BYTES, PAGES, chunk_of, content, fill, key
from kvxfer.lmcache import channel as lmcache_channel

DEADLINE_S = 60


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Far:
    def __init__(self, what, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=far_side.serve, args=(theirs, what, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def ask(self, *command):
        self._pipe.send(command)
        return self._answer()

    def _answer(self):
        assert self._pipe.poll(DEADLINE_S), "the other process does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.process.kill()
        self.process.join(DEADLINE_S)

    def stop(self):
        if self.process.is_alive():
            self._pipe.send(("stop",))
            self.process.join(DEADLINE_S)
        if self.process.is_alive():
            self.kill()


@pytest.fixture(scope="module")
def far():
    """One process for all tests that leave it alive: importing LMCache takes seconds."""
    url = f"127.0.0.1:{free_port()}"
    far = Far("channel", url, "127.0.0.1:1234")
    far.url = url
    yield far
    far.stop()


@pytest.fixture
def url(far):
    return far.url


@pytest.fixture
def own_url():
    """An address for a process of the test's own."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def memory():
    return far_side.memory()


@pytest.fixture
def near(memory):
    channel = far_side.channel(memory, role="sender")
    yield channel
    channel.close()


def expected(seed, tokens=CHUNK):
    return content(seed, tokens).numpy().tobytes()


def test_pages_arrive_where_they_should(far, near, memory, url):
    near.lazy_init_peer_connection("me", "them", url)
    assert near.remote_xfer_handler_exists("them")
    objects = [chunk_of(memory) for _ in range(3)]
    for seed, memory_object in enumerate(objects):
        fill(memory_object, seed)
    assert near.batched_write(objects, {"receiver_id": "them", "remote_indexes": [6, 0, 3]}) == 3
    for seed, page in enumerate([6, 0, 3]):
        assert far.ask("bytes", page, PAGE_BYTES) == expected(seed)


def test_a_partial_chunk_moves_its_valid_bytes_only(far, near, memory, url):
    near.lazy_init_peer_connection("me", "them", url)
    far.ask("sentinel", 0xA5)
    memory_object = chunk_of(memory, tokens=3)
    fill(memory_object, 1, tokens=3)
    valid = PAGE_BYTES * 3 // CHUNK
    assert memory_object.meta.get_size() == valid < memory_object.get_physical_size()
    near.batched_write([memory_object], {"receiver_id": "them", "remote_indexes": [PAGES - 1]})
    assert far.ask("bytes", PAGES - 1, PAGE_BYTES) == expected(1, 3) + b"\xa5" * (PAGE_BYTES - valid)
    # What the metrics count is what moved (and the description that was read when connecting).
    assert f"{valid}" in near.metrics


def test_reading_pages(far, near, memory, url):
    near.lazy_init_peer_connection("me", "them", url)
    page = far.ask("fill", 9)
    memory_object = chunk_of(memory)
    assert near.batched_read([memory_object], {"sender_id": "them", "remote_indexes": [page]}) == 1
    assert memory_object.byte_array[:PAGE_BYTES] == expected(9) or bytes(memory_object.byte_array) == expected(9)


def test_async_writes_never_block_the_loop(far, memory, url):
    async def main():
        near = far_side.channel(memory, role="sender", loop=asyncio.get_running_loop())
        try:
            await near.async_lazy_init_peer_connection("me", "them", url)
            objects = [chunk_of(memory) for _ in range(PAGES)]
            for seed, memory_object in enumerate(objects):
                fill(memory_object, seed)

            async def write(i):
                return await near.async_batched_write(
                    [objects[i]], {"receiver_id": "them", "remote_indexes": [PAGES - 1 - i]}
                )

            assert await asyncio.gather(*map(write, range(PAGES))) == [1] * PAGES
            back = objects[0]
            assert await near.async_batched_read([back], {"sender_id": "them", "remote_indexes": [0]}) == 1
        finally:
            near.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    for seed in range(PAGES):
        assert far.ask("bytes", PAGES - 1 - seed, PAGE_BYTES) == expected(seed)


def test_p2p_side_messages_and_writing_back_over_the_same_connection(far, memory, url):
    from lmcache.v1.transfer_channel.transfer_utils import P2PInitSideMsg

    mine = f"127.0.0.1:{free_port()}"
    near = far_side.channel(memory, mine, role="both", peer_lookup_url="127.0.0.1:4321")
    try:
        assert not far.ask("knows", mine)
        answer = near.lazy_init_peer_connection(mine, url, url, init_side_msg=P2PInitSideMsg())
        assert answer.peer_lookup_url == "127.0.0.1:1234"
        # The other side never connected, and knows us by the address we listen on.
        assert far.ask("knows", mine)
        assert far.ask("write back", mine, 5, 2) == 1
        start = 2 * PAGE_BYTES
        assert far_side.raw(memory)[start : start + PAGE_BYTES].tobytes() == expected(5)
    finally:
        near.close()


def test_another_page_size_is_refused_with_both_values(far, url):
    other_memory = far_side.memory(chunk=2 * CHUNK)
    near = far_side.channel(other_memory, role="sender")
    try:
        with pytest.raises(kvxfer.Mismatch) as failure:
            near.lazy_init_peer_connection("me", "them", url)
        assert str(PAGE_BYTES) in str(failure.value) and str(2 * PAGE_BYTES) in str(failure.value)
    finally:
        near.close()


def test_another_rank_is_refused(far, memory, url):
    near = far_side.channel(memory, role="sender", tp_rank=1)
    try:
        with pytest.raises(kvxfer.Mismatch, match="rank"):
            near.lazy_init_peer_connection("me", "them", url)
    finally:
        near.close()


@pytest.mark.parametrize("page", [-1, PAGES, 1 << 40])
def test_pages_that_do_not_exist(far, near, memory, url, page):
    near.lazy_init_peer_connection("me", "them", url)
    with pytest.raises(kvxfer.OutOfRange, match=str(page)):
        near.batched_write([chunk_of(memory)], {"receiver_id": "them", "remote_indexes": [page]})


def test_calls_that_make_no_sense(near, memory):
    memory_object = chunk_of(memory)
    with pytest.raises(kvxfer.PeerGone, match="nobody"):
        near.batched_write([memory_object], {"receiver_id": "nobody", "remote_indexes": [0]})
    with pytest.raises(kvxfer.InvalidArgument):
        near.batched_write([memory_object], None)
    with pytest.raises(kvxfer.InvalidArgument):
        near.batched_write([memory_object], {"remote_indexes": [0]})
    with pytest.raises(NotImplementedError):
        near.batched_send([memory_object])
    with pytest.raises(NotImplementedError):
        near.get_local_mem_indices([b"raw"])
    assert not near.remote_xfer_handler_exists("nobody")


def test_lists_of_different_length(far, near, memory, url):
    near.lazy_init_peer_connection("me", "them", url)
    with pytest.raises(kvxfer.InvalidArgument, match="2 remote pages"):
        near.batched_write([chunk_of(memory)], {"receiver_id": "them", "remote_indexes": [0, 1]})


def test_ids_that_stand_for_two_addresses(far, near, url):
    near.lazy_init_peer_connection("me", "host17300", url)
    with pytest.raises(kvxfer.Mismatch, match="host17300"):
        near.lazy_init_peer_connection("me", "host17300", "127.0.0.1:1")


def test_a_receiver_that_is_not_there(near, memory, monkeypatch, own_url):
    from lmcache.v1.transfer_channel.transfer_utils import P2PInitSideMsg

    monkeypatch.setattr(lmcache_channel, "_CONNECT_S", 0.5)
    # LMCache asks on the engine's thread, which must survive that; the write, on a thread of its own, fails.
    assert near.lazy_init_peer_connection("me", "them", own_url) is None
    with pytest.raises(kvxfer.Unreachable):
        near.batched_write([chunk_of(memory)], {"receiver_id": "them", "remote_indexes": [0]})
    # P2P can handle the exception and wants it.
    with pytest.raises(kvxfer.Unreachable):
        near.lazy_init_peer_connection("me", "them", own_url, init_side_msg=P2PInitSideMsg())


def test_a_receiver_that_comes_later_is_written_to(memory, monkeypatch, own_url):
    monkeypatch.setattr(lmcache_channel, "_CONNECT_S", 0.5)
    spec = {"receiver_id": "them", "remote_indexes": [2]}

    async def main():
        near = far_side.channel(memory, role="sender", loop=asyncio.get_running_loop())
        try:
            assert await near.async_lazy_init_peer_connection("me", "them", own_url) is None
            memory_object = chunk_of(memory)
            fill(memory_object, 4)
            with pytest.raises(kvxfer.Unreachable):
                await near.async_batched_write([memory_object], spec)
            far = await asyncio.get_running_loop().run_in_executor(None, Far, "channel", own_url, None)
            try:
                assert await near.async_batched_write([memory_object], spec) == 1
                assert far.ask("bytes", 2, PAGE_BYTES) == expected(4)
            finally:
                far.stop()
        finally:
            near.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_a_restarted_receiver_is_reached_without_a_new_handshake(near, memory, own_url):
    far = Far("channel", own_url, None)
    near.lazy_init_peer_connection("me", "them", own_url)
    memory_object = chunk_of(memory)
    fill(memory_object, 1)
    spec = {"receiver_id": "them", "remote_indexes": [1]}
    near.batched_write([memory_object], spec)
    far.kill()
    with pytest.raises(kvxfer.KvxferError):
        for _ in range(1000):
            near.batched_write([memory_object], spec)
    successor = Far("channel", own_url, None)
    try:
        assert near.batched_write([memory_object], spec) == 1
        assert successor.ask("bytes", 1, PAGE_BYTES) == expected(1)
    finally:
        successor.stop()


def test_closing_twice_and_using_it_afterwards(far, memory, url):
    near = far_side.channel(memory, role="sender")
    near.lazy_init_peer_connection("me", "them", url)
    near.close()
    near.close()
    with pytest.raises(kvxfer.Closed):
        near.batched_write([chunk_of(memory)], {"receiver_id": "them", "remote_indexes": [0]})
    # The other side still serves.
    again = far_side.channel(memory, role="sender")
    again.lazy_init_peer_connection("me", "them", url)
    again.close()


def test_a_key_in_the_environment_is_asked_for(memory, monkeypatch, own_url):
    monkeypatch.setenv("KVXFER_AUTH_KEY", "the key")
    far = Far("channel", own_url, None)
    try:
        friend = far_side.channel(memory, role="sender")
        friend.lazy_init_peer_connection("me", "them", own_url)
        friend.close()
        monkeypatch.delenv("KVXFER_AUTH_KEY")
        stranger = far_side.channel(memory, role="sender")
        with pytest.raises(kvxfer.Unauthenticated):
            stranger.lazy_init_peer_connection("me", "them", own_url)
        stranger.close()
    finally:
        far.stop()


def test_other_memory_is_refused_by_name(memory):
    with pytest.raises(kvxfer.Unsupported, match="xpu:0"):
        far_side.channel(memory, device="xpu:0")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_lmcaches_own_pd_backend(mode):
    """Sender and receiver are LMCache's classes; its proxy notification arrives after the bytes."""
    import msgspec
    import zmq
    from lmcache.v1.memory_management import MemoryFormat

    init, alloc = free_port(), free_port()
    proxy = zmq.Context.instance().socket(zmq.PULL)
    notify = proxy.bind_to_random_port("tcp://127.0.0.1")
    receiver = Far("backend", mode, init, alloc)
    try:
        backend = far_side.backend(mode, "sender", pd_proxy_host="127.0.0.1", pd_proxy_port=notify)
        lengths = [CHUNK, CHUNK, 5]
        for request in range(4):
            objects = []
            for i, tokens in enumerate(lengths):
                shape = far_side.torch.Size((2, far_side.LAYERS, tokens, far_side.HEADS * far_side.HEAD_SIZE))
                memory_object = backend.allocate(shape, far_side.torch.bfloat16, MemoryFormat.KV_2LTD)
                fill(memory_object, 100 * request + i, tokens)
                objects.append(memory_object)
            spec = types.SimpleNamespace(
                req_id=f"request-{os.getpid()}-{request}",
                receiver_host="127.0.0.1",
                receiver_init_port=[init],
                receiver_alloc_port=[alloc],
                is_last_prefill=True,
                total_chunks=len(lengths),
                num_transferred_tokens=0,
            )
            keys = [key(100 * request + i) for i in range(len(lengths))]
            backend.batched_submit_put_task(keys, objects, transfer_spec=spec)
            assert proxy.poll(1000 * DEADLINE_S), "the proxy was never told"
            assert msgspec.msgpack.decode(proxy.recv()) == {"type": "ProxyNotif", "req_id": spec.req_id}
            for i, tokens in enumerate(lengths):
                assert receiver.ask("take", 100 * request + i, tokens), f"chunk {i} of request {request} differs"
            for memory_object in objects:
                memory_object.ref_count_down()
        backend.transfer_channel.close()
    finally:
        receiver.stop()
        proxy.close(0)
