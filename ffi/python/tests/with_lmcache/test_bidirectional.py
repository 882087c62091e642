"""`pd_bidirectional`: a prefiller asks a decoder in another process what it still has, and reads it back."""

import inspect
import multiprocessing
import os
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from test_pd import SOON, Decoder, put

import far_side
import kvxfer
from far_side import CHUNK, PAGES, content, empty_pages, free_ports, key


@pytest.fixture
def port():
    return free_ports(1)[0]


@pytest.fixture
def decoder(port):
    far = Decoder(port)
    yield far
    far.kill()


@pytest.fixture(params=["both", "sender"])
def prefiller(request):
    backend = far_side.pd_backend(
        request.param, pd_skip_proxy_notification=True, pd_bidirectional=True, pd={"query_timeout": 5}
    )
    yield backend
    backend.close()


@pytest.fixture
def lmcaches():
    """A prefiller and a decoder of LMCache's own sync backend, over kvxfer's channel, and the decoder's ports."""
    init, alloc, query = free_ports(3)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    far = spawn.Process(target=far_side.serve, args=(theirs, "backend", ("sync", init, alloc, query)), daemon=True)
    far.start()
    ports = dict(pd_peer_init_port=[init], pd_peer_alloc_port=[alloc], pd_peer_query_port=[query])
    try:
        assert pipe.poll(SOON) and pipe.recv() == "up"
        backend = far_side.backend("sync", "both", pd_skip_proxy_notification=True, pd_peer_host="127.0.0.1", **ports)
        yield backend, (init, alloc, query)
        backend.transfer_channel.close()
    finally:
        far.kill()
        far.join(SOON)


def spec(port, name="a"):
    """As LMCache's adapter makes it; the query port is one that nobody listens on."""
    return types.SimpleNamespace(
        receiver_host="127.0.0.1",
        receiver_init_port=[port],
        receiver_alloc_port=[port],
        receiver_query_port=[1],
        req_id=name,
        is_last_prefill=True,
        num_transferred_tokens=0,
        total_chunks=0,
    )


def probe(backend, port, seeds, alloc=1, query=1):
    """LMCache's probe: `_probe_decoder_cache` of its adapter for vLLM."""
    name = "127.0.0.1" + str(port)
    backend._ensure_peer_connection(
        receiver_id=name, receiver_host="127.0.0.1", receiver_init_port=port, receiver_alloc_port=alloc
    )
    backend._ensure_cache_query_connection(receiver_id=name, receiver_host="127.0.0.1", receiver_query_port=query)
    assert name in backend.cache_query_sockets
    return backend.query_remote_cache(name, [key(s) for s in seeds])


def fresh(backend, tokens):
    """Memory objects that hold something else."""
    objects = [backend.allocate(torch.Size(content(0, n).shape), torch.bfloat16) for n in tokens]
    for memory_object in objects:
        memory_object.tensor.view(torch.int16).fill_(-1)
    return objects


@pytest.fixture
def places(prefiller):
    """Such objects of the prefiller, given back at the end."""
    made = []

    def make(tokens):
        objects = fresh(prefiller, tokens)
        made.extend(objects)
        return objects

    yield make
    for memory_object in made:
        memory_object.ref_count_down()


def same(memory_object, seed, tokens=CHUNK):
    wanted = content(seed, tokens)
    return torch.equal(memory_object.tensor.view(torch.int16).view(wanted.shape), wanted)


def untouched(memory_object):
    return bool((memory_object.tensor.view(torch.int16) == -1).all())


def found_by(backend, port, seeds, lease=20.0):
    """The step between the question and the bytes, which the backend does not let one see."""
    return backend._side._reading.query(f"tcp://127.0.0.1:{port}", [key(s).to_string() for s in seeds], lease)


def stop(pid):
    """SIGSTOP, and waits until every thread has stopped: the signal is delivered in its own time."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SOON
    while not all(
        (task / "stat").read_text().rsplit(") ", 1)[1].startswith("T") for task in Path(f"/proc/{pid}/task").iterdir()
    ):
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.01)


def targets(backend, objects):
    page = backend.kvxfer_config.geometry.page_bytes
    return [(i, backend._side._region, [(o.meta.address * page, page)]) for i, o in enumerate(objects)]


def test_the_backend_has_what_lmcache_calls():
    """Names and parameters as in LMCache's own sync backend."""
    from lmcache.v1.storage_backend.pd_backend import PDBackend

    from kvxfer.lmcache.pd import PdBackend

    for name in (
        "_ensure_peer_connection",
        "_ensure_cache_query_connection",
        "query_remote_cache",
        "batched_submit_read_task",
    ):
        theirs, ours = (inspect.signature(getattr(backend, name)) for backend in (PDBackend, PdBackend))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_what_the_decoder_has_is_found_and_read_back_byte_for_byte(decoder, prefiller, port, places):
    put(prefiller, [1, 2, 3], spec(port), last_tokens=5).result(SOON)
    answer = probe(prefiller, port, [1, 2, 3])
    assert answer.cached_keys == [key(n).to_string() for n in (1, 2, 3)]
    assert len(set(answer.cached_indexes)) == 3 and all(0 <= page < PAGES for page in answer.cached_indexes)
    assert decoder.ask("stats").pinned == 0, "asking holds nothing"
    objects = places([CHUNK, CHUNK, 5])
    assert prefiller.batched_submit_read_task([key(n) for n in (1, 2, 3)], objects, spec(port)) == 3
    assert same(objects[0], 1) and same(objects[1], 2) and same(objects[2], 3, 5)
    # The decoder's engine finds all of it as before: being read is not being taken.
    assert decoder.ask("stats").pinned == 0
    assert [decoder.ask("take", 1, CHUNK), decoder.ask("take", 2, CHUNK), decoder.ask("take", 3, 5)] == [True] * 3
    assert empty_pages(decoder.ask("stats")) == PAGES


def test_lmcaches_own_backend_answers_the_same(decoder, prefiller, port, places, lmcaches):
    """The same calls on LMCache's sync backend and on ours."""

    def run(backend, objects, init, alloc, query):
        to = spec(init)
        to.receiver_alloc_port, to.receiver_query_port = [alloc], [query]
        answers = [probe(backend, init, [1, 2, 3], alloc, query).cached_keys]
        put(backend, [1, 3], to).result(SOON)
        answers.append(probe(backend, init, [1, 2, 3], alloc, query).cached_keys)
        answers.append(probe(backend, init, [4], alloc, query).cached_keys)
        answers.append(backend.batched_submit_read_task([key(n) for n in (1, 2, 3)], objects, to))
        answers.append(backend.batched_submit_read_task([key(4)], objects[:1], to))
        answers.append(backend.batched_submit_read_task([key(1)], objects[:1], None))
        return [*answers, same(objects[0], 1), untouched(objects[1]), same(objects[2], 3)]

    theirs, ports = lmcaches
    their_objects = fresh(theirs, [CHUNK] * 3)
    expected = run(theirs, their_objects, *ports)
    for memory_object in their_objects:
        memory_object.ref_count_down()
    assert expected[3] == 2 and all(expected[-3:])
    assert run(prefiller, places([CHUNK] * 3), port, port, 1) == expected


def test_more_keys_than_a_query_may_have(decoder, prefiller, port):
    put(prefiller, [1], spec(port)).result(SOON)
    answer = probe(prefiller, port, [*range(2, 9000), 1])
    assert answer.cached_keys == [key(1).to_string()] and len(answer.cached_indexes) == 1


def test_what_the_decoder_does_not_have_is_not_found(decoder, prefiller, port, places):
    answer = probe(prefiller, port, [1, 2])
    assert (answer.cached_keys, answer.cached_indexes) == ([], [])
    objects = places([CHUNK])
    assert prefiller.batched_submit_read_task([key(1)], objects, spec(port)) == 0
    assert untouched(objects[0])
    assert prefiller.batched_submit_read_task([key(1)], objects, None) == 0, "a request for this instance alone"
    # Taken by the decoder's engine means gone from the decoder.
    put(prefiller, [1], spec(port)).result(SOON)
    assert probe(prefiller, port, [1]).cached_keys == [key(1).to_string()]
    assert decoder.ask("take", 1, CHUNK)
    assert probe(prefiller, port, [1]).cached_keys == []


def test_a_part_is_found_and_the_rest_left_alone(decoder, prefiller, port, places):
    put(prefiller, [2, 4], spec(port)).result(SOON)
    assert probe(prefiller, port, [1, 2, 3, 4]).cached_keys == [key(2).to_string(), key(4).to_string()]
    objects = places([CHUNK] * 3)
    # Four keys, three places: what has none is not read.
    assert prefiller.batched_submit_read_task([key(n) for n in (1, 2, 3, 4)], objects, spec(port)) == 1
    assert untouched(objects[0]) and same(objects[1], 2) and untouched(objects[2])
    # A place of another size cannot be that chunk.
    small = places([5])
    assert prefiller.batched_submit_read_task([key(4)], small, spec(port)) == 0
    assert untouched(small[0])
    decoder.until(lambda s: s.pinned == 0, "what was found and not read")


def test_a_page_that_is_read_is_not_given_to_another(decoder, prefiller, port, places):
    put(prefiller, range(1, PAGES + 1), spec(port)).result(SOON)
    found = found_by(prefiller, port, range(1, PAGES + 1))
    assert decoder.ask("stats").pinned == PAGES
    assert all(decoder.ask("take", n, CHUNK) for n in range(1, PAGES + 1))
    assert decoder.ask("stats").free_pages == 0, "taken, and still being read"
    other = put(prefiller, [21, 22], spec(port, "b"))
    decoder.until(lambda s: s.queued == 1, "the next request")
    objects = places([CHUNK] * 4)
    report = found.read(targets(prefiller, objects), SOON)
    assert report.chunks == 4 and all(same(o, n) for n, o in enumerate(objects, 1))
    assert other.result(SOON) == 2
    assert decoder.ask("take", 21, CHUNK) and decoder.ask("take", 22, CHUNK)
    assert empty_pages(decoder.ask("stats")) == PAGES


def test_a_lease_that_ends_gives_the_pages_back_and_the_read_says_so(prefiller, port, places):
    far = Decoder(port, pd={"lease": 0.3})
    try:
        put(prefiller, [1, 2], spec(port)).result(SOON)
        found = found_by(prefiller, port, [1, 2])
        assert found.lease == 0.3, "the decoder's own is the longest"
        assert far.ask("stats").pinned == 2
        far.until(lambda s: s.pinned == 0, "the end of the lease")
        assert far.ask("take", 1, CHUNK) and far.ask("take", 2, CHUNK)
        with pytest.raises(kvxfer.Stale):
            found.read(targets(prefiller, places([CHUNK, CHUNK])), SOON)
    finally:
        far.kill()


def test_a_decoder_that_is_killed_between_question_and_bytes(decoder, prefiller, port, places):
    put(prefiller, [1, 2], spec(port)).result(SOON)
    found = found_by(prefiller, port, [1, 2])
    objects = places([CHUNK, CHUNK])
    decoder.kill()
    with pytest.raises(kvxfer.KvxferError) as failure:
        found.read(targets(prefiller, objects), SOON)
    assert failure.value.retryable, failure.value
    # LMCache's calls answer that nothing is there, and the prefiller goes on.
    assert prefiller.batched_submit_read_task([key(1), key(2)], objects, spec(port)) == 0
    assert probe(prefiller, port, [1, 2]).cached_keys == []
    # A restarted one is asked again.
    far = Decoder(port)
    try:
        put(prefiller, [3], spec(port, "b")).result(SOON)
        deadline = time.monotonic() + SOON
        while not probe(prefiller, port, [1, 3]).cached_keys:
            assert time.monotonic() < deadline, "the restarted decoder is not asked"
            time.sleep(0.2)
        assert probe(prefiller, port, [1, 3]).cached_keys == [key(3).to_string()]
        assert prefiller.batched_submit_read_task([key(1), key(3)], objects, spec(port)) == 1 and same(objects[1], 3)
    finally:
        far.kill()


def test_a_stopped_decoder_confirms_nothing(decoder, prefiller, port, places):
    put(prefiller, [1], spec(port)).result(SOON)
    found = found_by(prefiller, port, [1])
    stop(decoder.process.pid)
    try:
        with pytest.raises(kvxfer.KvxferError) as failure:
            found.read(targets(prefiller, places([CHUNK])), 1.0)
        assert failure.value.retryable, failure.value
    finally:
        os.kill(decoder.process.pid, signal.SIGCONT)
    decoder.until(lambda s: s.pinned == 0, "the pins of a reader that gave up")


def test_a_prefiller_that_leaves_holds_nothing(decoder, port):
    backend = far_side.pd_backend("both", pd_skip_proxy_notification=True)
    put(backend, [1, 2], spec(port)).result(SOON)
    found = found_by(backend, port, [1, 2])
    assert decoder.ask("stats").pinned == 2
    backend.close()
    decoder.until(lambda s: s.pinned == 0, "the pins of a reader that has gone")
    assert decoder.ask("take", 1, CHUNK) and decoder.ask("take", 2, CHUNK)
    assert empty_pages(decoder.ask("stats")) == PAGES
    found.release()


def test_a_decoder_nobody_listens_at_has_nothing(prefiller, port, places):
    assert probe(prefiller, port, [1]).cached_keys == []
    assert prefiller.batched_submit_read_task([key(1)], places([CHUNK]), spec(port)) == 0
