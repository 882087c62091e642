"""kvxfer's PD backend under LMCache's own configuration, keys and memory objects, between real processes."""

import multiprocessing
import os
import signal
import time
import types

import pytest
import torch

import far_side
from far_side import CHUNK, PAGES, content, empty_pages, fill, free_ports, key
from kvxfer.errors import KvxferError

SOON = 30


class Decoder:
    """A receiver in a process of its own."""

    what = "pd"

    def __init__(self, init, environment=None, **changes):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        before = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        arguments = (theirs, self.what, self.arguments(init, changes))
        self.process = spawn.Process(target=far_side.serve, args=arguments, daemon=True)
        self.process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        assert self.ask() == "up"

    def arguments(self, init, changes):
        return (init, changes)

    def ask(self, *command):
        if command:
            self.pipe.send(command)
        assert self.pipe.poll(SOON), f"no answer to {command}"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.process.kill()
        self.process.join(SOON)

    def until(self, wanted, what):
        deadline = time.monotonic() + SOON
        while not wanted(stats := self.ask("stats")):
            assert time.monotonic() < deadline, f"{what}: {stats}"
            time.sleep(0.02)


@pytest.fixture
def ports():
    return free_ports(1)


@pytest.fixture
def decoder(ports):
    far = Decoder(ports[0])
    yield far
    far.kill()


@pytest.fixture
def prefiller():
    made = []

    def make(**changes):
        made.append(far_side.pd_backend("sender", pd_skip_proxy_notification=True, **changes))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def spec(port, name, last=True, before=0, total=0):
    return types.SimpleNamespace(
        receiver_host="127.0.0.1",
        receiver_init_port=[port],
        receiver_alloc_port=[port],
        req_id=name,
        is_last_prefill=last,
        num_transferred_tokens=before,
        total_chunks=total,
    )


def chunks(backend, seeds, last_tokens=CHUNK):
    made = []
    for i, seed in enumerate(seeds):
        tokens = last_tokens if i == len(seeds) - 1 else CHUNK
        memory_object = backend.allocate(torch.Size(content(seed, tokens).shape), torch.bfloat16)
        assert memory_object is not None
        fill(memory_object, seed, tokens)
        made.append(memory_object)
    return made


def put(backend, seeds, to, last_tokens=CHUNK):
    """As LMCache's storage manager does it: the reference of the allocation is given back right after."""
    objects = chunks(backend, seeds, last_tokens)
    (future,) = backend.batched_submit_put_task([key(s) for s in seeds], objects, transfer_spec=to)
    for memory_object in objects:
        memory_object.ref_count_down()
    return future


def test_it_is_the_default_and_lmcaches_own_are_a_word_away(ports):
    from lmcache.v1.config import LMCacheEngineConfig

    from kvxfer.lmcache.hook import takes_pd

    common = {"enable_pd": True, "pd_role": "sender", "pd_buffer_size": 1, "pd_buffer_device": "cpu"}
    config = LMCacheEngineConfig.from_defaults(transfer_channel="kvxfer", **common)
    metadata = far_side.metadata()
    assert takes_pd(config, metadata)
    metadata.kv_connector_extra_config = {"lmcache.pd_backend_mode": "async"}
    assert not takes_pd(config, metadata)
    for change in ({"pd_backend_mode": "async"}, {"pd_backend_mode": "sync"}, {"transfer_channel": "nixl"}):
        config = LMCacheEngineConfig.from_defaults(**({"transfer_channel": "kvxfer"} | common | change))
        assert not takes_pd(config, far_side.metadata()), change


def staging_is_free(backend):
    """The last release may follow the request's end by a moment."""
    deadline = time.monotonic() + SOON
    while len(backend.memory_allocator.cpu_allocator.free_blocks) != PAGES:
        assert time.monotonic() < deadline, "staging pages come back"
        time.sleep(0.01)


def test_a_request_arrives_whole_and_goes_with_its_taker(decoder, prefiller, ports):
    backend = prefiller()
    assert put(backend, [1, 2, 3], spec(ports[0], "a"), last_tokens=5).result(SOON) == 3
    assert decoder.ask("contains", [1, 2, 3, 4]) == 3
    assert [decoder.ask("take", 1, CHUNK), decoder.ask("take", 2, CHUNK), decoder.ask("take", 3, 5)] == [True] * 3
    assert empty_pages(decoder.ask("stats")) == PAGES
    staging_is_free(backend)


def test_a_prefill_in_steps_reserves_all_its_pages_at_once(decoder, prefiller, ports):
    a, b = prefiller(), prefiller()
    put(a, [1, 2], spec(ports[0], "a", last=False, total=6))
    decoder.until(lambda s: s.published == 2, "the first step")
    assert empty_pages(decoder.ask("stats")) == PAGES - 6
    # The other prompt does not fit beside it: it waits and holds nothing.
    other = put(b, [11, 12], spec(ports[0], "b", last=False, total=6))
    decoder.until(lambda s: s.queued == 1, "the second request")
    assert empty_pages(decoder.ask("stats")) == PAGES - 6
    whole = put(a, [3, 4, 5, 6], spec(ports[0], "a", before=2 * CHUNK))
    assert whole.result(SOON) == 6
    assert all(decoder.ask("take", n, CHUNK) for n in range(1, 7))
    put(b, [13, 14, 15, 16], spec(ports[0], "b", before=2 * CHUNK))
    assert other.result(SOON) == 6
    assert all(decoder.ask("take", n, CHUNK) for n in range(11, 17))
    assert empty_pages(decoder.ask("stats")) == PAGES


def test_steps_that_lmcache_counts_from_the_start_go_on_where_the_last_ended(decoder, prefiller, ports):
    """In a worker process LMCache's `num_transferred_tokens` is 0 in every step."""
    backend = prefiller()
    to = spec(ports[0], "a", last=False, total=4)
    assert backend.handed_over("vllm-a", to) == 0
    with backend.storing("vllm-a", to):
        put(backend, [1, 2], to)
    assert backend.handed_over("vllm-a", to) == 2 * CHUNK
    assert backend.handed_over("vllm-b", to) == 0, "another request that has the name"
    to = spec(ports[0], "a", total=4)
    with backend.storing("vllm-a", to):
        assert put(backend, [3, 4], to).result(SOON) == 4
    assert all(decoder.ask("take", n, CHUNK) for n in range(1, 5))


def test_two_requests_share_a_prefix(decoder, prefiller, ports):
    a, b = prefiller(), prefiller()
    futures = [put(a, [1, 2, 3], spec(ports[0], "a")), put(b, [1, 2, 4], spec(ports[0], "a"))]
    assert [f.result(SOON) for f in futures] == [3, 3]
    assert all(decoder.ask("take", n, CHUNK) for n in (1, 2, 3))
    assert all(decoder.ask("take", n, CHUNK) for n in (1, 2, 4)), "each consumer has its own claim"
    assert empty_pages(decoder.ask("stats")) == PAGES


def store(backend, seeds, to, last_tokens=CHUNK):
    """As LMCache's cache engine does it: the chunks are known, allocated, filled, put. Which of them lay at the decoder, and the future."""
    from kvxfer.lmcache.placing import KnownChunks, is_placed

    lengths = [CHUNK] * (len(seeds) - 1) + [last_tokens]
    known = KnownChunks(None, [(CHUNK * i, CHUNK * i + lengths[i], key(seed)) for i, seed in enumerate(seeds)])
    with backend.storing(None, to, None, known):
        objects = chunks(backend, seeds, last_tokens)
        placed = [is_placed(memory_object) for memory_object in objects]
        (future,) = backend.batched_submit_put_task([key(s) for s in seeds], objects, transfer_spec=to)
        for memory_object in objects:
            memory_object.ref_count_down()
    return placed, future


def test_chunks_are_gathered_into_the_decoders_own_pages(decoder, prefiller, ports):
    backend = prefiller(pd={"in_place_patience": SOON})
    placed, future = store(backend, [1, 2], spec(ports[0], "a"))
    assert (placed, future.result(SOON)) == ([False, False], 2), "nobody was connected"
    # In two steps, the last chunk a short one; what is there already is not gathered there again.
    first, _ = store(backend, [1, 3], spec(ports[0], "b", last=False, total=4))
    second, future = store(backend, [4, 5], spec(ports[0], "b", before=2 * CHUNK), last_tokens=5)
    assert (first, second) == ([False, True], [True, True])
    assert future.result(SOON) == 4
    assert all(decoder.ask("take", n, CHUNK) for n in (1, 2, 1, 3, 4)) and decoder.ask("take", 5, 5)
    decoder.until(lambda s: empty_pages(s) == PAGES, "all taken")
    staging_is_free(backend)


def test_a_store_that_ends_early_gives_its_pages_back(decoder, prefiller, ports):
    from kvxfer.lmcache.placing import KnownChunks

    backend = prefiller(pd={"in_place_patience": SOON})
    store(backend, [1], spec(ports[0], "a"))[1].result(SOON)
    to = spec(ports[0], "b")
    known = KnownChunks(None, [(CHUNK * i, CHUNK * i + CHUNK, key(i)) for i in range(2, 5)])
    with pytest.raises(RuntimeError, match="in the middle"), backend.storing("vllm-b", to, None, known):
        memory_object = backend.allocate(torch.Size(content(2).shape), torch.bfloat16)
        fill(memory_object, 2)
        raise RuntimeError("in the middle")
    decoder.until(lambda s: empty_pages(s) == PAGES - 1, "given up")
    assert decoder.ask("contains", [2]) == 0
    # One chunk fewer than was named.
    with backend.storing("vllm-b", to, None, known):
        objects = chunks(backend, [2, 3])
        assert backend.batched_submit_put_task([key(2), key(3)], objects, transfer_spec=to) is None
    decoder.until(lambda s: empty_pages(s) == PAGES - 1, "given up")
    placed, future = store(backend, [2, 3, 4], to)
    assert (placed, future.result(SOON)) == ([True] * 3, 3)
    assert all(decoder.ask("take", n, CHUNK) for n in (2, 3, 4))


def test_a_torch_that_takes_no_places_gets_pages_of_its_own(decoder, prefiller, ports, monkeypatch):
    from kvxfer.lmcache import placing

    backend = prefiller(pd={"in_place_patience": SOON})
    store(backend, [1], spec(ports[0], "a"))[1].result(SOON)

    def refuse(place, device):
        raise RuntimeError("not this memory")

    monkeypatch.setattr(placing, "_tensor", refuse)
    placed, future = store(backend, [2, 3], spec(ports[0], "b"))
    assert (placed, future.result(SOON)) == ([False, False], 2)
    monkeypatch.undo()
    placed, future = store(backend, [4], spec(ports[0], "c"))
    assert (placed, future.result(SOON)) == ([False], 1), "not tried again"
    assert all(decoder.ask("take", n, CHUNK) for n in (1, 2, 3, 4))
    decoder.until(lambda s: empty_pages(s) == PAGES, "all taken")


def test_a_decoder_without_a_page_to_give_is_written_to_later(decoder, prefiller, ports):
    backend, other = prefiller(pd={"in_place_patience": 0.05}), prefiller(pd={"in_place_patience": 0.05})
    store(backend, [1], spec(ports[0], "a"))[1].result(SOON)
    whole, future = store(backend, list(range(10, 10 + PAGES - 1)), spec(ports[0], "b"))
    assert whole == [True] * (PAGES - 1)
    future.result(SOON)
    waits, future = store(backend, [30, 31], spec(ports[0], "c"))
    assert waits == [False, False]
    assert all(decoder.ask("take", n, CHUNK) for n in range(10, 10 + PAGES - 1))
    assert future.result(SOON) == 2
    assert all(decoder.ask("take", n, CHUNK) for n in (30, 31))
    off = prefiller(pd={"in_place": False})
    assert not off.places_chunks and backend.places_chunks and other.places_chunks


def test_what_vllm_had_already_is_given_back_by_unpin(decoder, prefiller, ports):
    put(prefiller(), [1, 2, 3], spec(ports[0], "a")).result(SOON)
    assert decoder.ask("contains", [1, 2, 3]) == 3
    assert decoder.ask("take", 3, CHUNK)
    for n in (1, 2, 3):
        decoder.ask("unpin", n)
    assert empty_pages(decoder.ask("stats")) == PAGES
    assert decoder.ask("contains", [1]) == 0


def test_a_request_aborted_between_two_steps_leaves_nothing(decoder, prefiller, ports):
    backend = prefiller()
    to = spec(ports[0], "proxy-7", last=False, total=5)
    with backend.storing("vllm-7", to):
        future = put(backend, [1, 2], to)
    decoder.until(lambda s: s.published == 2, "the first step")
    backend.vllm_finished({"vllm-7", "another"})
    with pytest.raises(Exception, match="given up"):
        future.result(SOON)
    decoder.until(lambda s: empty_pages(s) == PAGES, "the abort")
    staging_is_free(backend)


def test_requests_without_a_destination_cost_nothing(prefiller):
    backend = prefiller()
    objects = chunks(backend, [1])
    assert backend.batched_submit_put_task([key(1)], objects, transfer_spec=None) is None
    objects[0].ref_count_down()
    staging_is_free(backend)
    assert backend.spec_for("r", None) is None


def test_a_receiver_in_the_configuration_gets_requests_that_name_none(decoder, prefiller, ports):
    backend = prefiller(pd_peer_host="127.0.0.1", pd_peer_init_port=[ports[0]])
    to = backend.spec_for("vllm-1", None)
    put(backend, [1, 2], to)
    # It has waited: the prefiller's answer means that the cache is there.
    assert decoder.ask("contains", [1, 2]) == 2


def test_a_killed_decoder_fails_the_request_and_its_successor_gets_the_next(decoder, prefiller, ports):
    backend = prefiller(pd={"patience": 0.5})
    put(backend, [1], spec(ports[0], "a")).result(SOON)
    decoder.kill()
    with pytest.raises(Exception) as failure:
        put(backend, [2], spec(ports[0], "b")).result(SOON)
    assert failure.value.retryable
    again = Decoder(ports[0])
    try:
        assert put(backend, [3], spec(ports[0], "c")).result(SOON) == 1
        assert again.ask("take", 3, CHUNK)
    finally:
        again.kill()
    staging_is_free(backend)


def test_a_stopped_decoder_holds_nobody_up_longer_than_the_deadline(decoder, prefiller, ports):
    backend = prefiller(pd={"request_timeout": 1.0, "patience": 0.5}, pd_allocation_timeout_sec=5.0)
    put(backend, [1], spec(ports[0], "a")).result(SOON)
    os.kill(decoder.process.pid, signal.SIGSTOP)
    try:
        future = put(backend, list(range(2, 2 + PAGES)), spec(ports[0], "b"))
        # All staging pages are on their way; the next request waits for one, not for ever.
        assert chunks(backend, [50])[0].ref_count_down() is None
        with pytest.raises(KvxferError):
            future.result(SOON)
    finally:
        os.kill(decoder.process.pid, signal.SIGCONT)
    assert put(backend, [60], spec(ports[0], "c")).result(SOON) == 1
    assert decoder.ask("take", 60, CHUNK)
    decoder.until(lambda s: s.quarantined == 0 and s.writing == 0, "quiet")


def test_more_chunks_than_staging_pages_do_not_wait_for_themselves(decoder, prefiller, ports):
    backend = prefiller(pd_allocation_timeout_sec=SOON)
    objects = chunks(backend, list(range(PAGES)))
    assert backend.allocate(torch.Size(content(1).shape), torch.bfloat16) is None, "at once: nothing is on its way"
    for memory_object in objects:
        memory_object.ref_count_down()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_name": "another-model"}, ["model", "another-model"]),
        ({"kv_dtype": torch.float16}, ["dtype", "float16"]),
    ],
)
def test_another_model_or_dtype_is_refused_by_name(decoder, prefiller, ports, change, words):
    backend = prefiller(metadata=change)
    tokens = content(1).shape
    dtype = change.get("kv_dtype", torch.bfloat16)
    memory_object = backend.allocate(torch.Size(tokens), dtype)
    (future,) = backend.batched_submit_put_task([key(1)], [memory_object], transfer_spec=spec(ports[0], "a"))
    memory_object.ref_count_down()
    with pytest.raises(Exception) as failure:
        future.result(SOON)
    assert failure.value.name == "mismatch" and all(word in str(failure.value) for word in words), failure.value


@pytest.mark.parametrize("theirs", ["1", "random"])
def test_another_hash_seed_is_reported_as_what_it_is(prefiller, ports, theirs):
    far = Decoder(ports[0], environment={"PYTHONHASHSEED": theirs})
    try:
        with pytest.raises(Exception, match="PYTHONHASHSEED") as failure:
            put(prefiller(), [1], spec(ports[0], "a")).result(SOON)
        assert failure.value.name == "mismatch"
    finally:
        far.kill()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pd_role": "boss"}, "pd_role"),
        ({"pd_buffer_size": 10}, "pd_buffer_size"),
        ({"pd_buffer_device": "xpu"}, "pd_buffer_device"),
        ({"pd_max_prefill_len": PAGES * CHUNK + 1}, "pd_max_prefill_len"),
        ({"extra_config": {"kvxfer": {"pd": {"patience": -1}}}}, "patience"),
        ({"extra_config": {"kvxfer": {"pd": {"patients": 1}}}}, "patients"),
        ({"extra_config": {"kvxfer": {"pd": {"in_place": 1}}}}, "in_place"),
        ({"extra_config": {"kvxfer": []}}, "not a mapping"),
        ({"pd_skip_proxy_notification": False}, "pd_proxy_host"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said(change, words):
    changes = {"pd_skip_proxy_notification": True} | change
    with pytest.raises(ValueError, match=words):
        far_side.pd_backend(changes.pop("pd_role", "sender"), **changes)


def test_lmcaches_buffers_lie_in_memory_that_peers_can_map(monkeypatch):
    from kvxfer.lmcache import register

    register()
    from lmcache.v1 import memory_management

    monkeypatch.setenv("LMCACHE_TRANSFER_CHANNEL", "kvxfer")
    buffer = memory_management._allocate_cpu_memory(1 << 20)
    with open("/proc/self/maps") as maps:
        (line,) = [m for m in maps if m.startswith(f"{buffer.data_ptr():x}-")]
    assert "memfd:kvxfer-pool" in line
    buffer[:4] = 7
    memory_management._free_cpu_memory(buffer, 1 << 20)
    monkeypatch.delenv("LMCACHE_TRANSFER_CHANNEL")
    buffer = memory_management._allocate_cpu_memory(1 << 20)
    with open("/proc/self/maps") as maps:
        assert not any("memfd:kvxfer-pool" in m and m.startswith(f"{buffer.data_ptr():x}-") for m in maps)
    memory_management._free_cpu_memory(buffer, 1 << 20)
