"""Chunks that are produced in the receiver's own pages, between processes."""

import ctypes
import multiprocessing
import time

import pytest

import kvxfer
from other_process import GEOMETRY, PAGE, pattern

WAIT_S = 20


def prefill(pipe, address):
    """A prefiller: connects, then does as it is told."""
    with kvxfer.Agent("prefiller") as agent, kvxfer.Outbox(agent, GEOMETRY) as outbox:
        region = agent.register(bytearray(pattern(PAGE)))
        outbox.put("warm", address, [("warm", region, [(0, PAGE)])], first=True, last=True)
        while not isinstance(outbox.next_event(WAIT_S), kvxfer.Ended):
            pass
        pipe.send("connected")
        while True:
            command, *arguments = pipe.recv()
            if command == "place":
                request, keys, last = arguments
                first = request not in prefill.known
                prefill.known.add(request)
                places = outbox.place(
                    request,
                    address,
                    [(key, PAGE) for key in keys],
                    total=len(keys),
                    first=first,
                    last=last,
                    patience=WAIT_S,
                )
                for place, key in zip(places, keys, strict=True):
                    ctypes.memmove(place.address, pattern(PAGE, ord(key)), place.length)
                pipe.send(len(places))
            elif command == "put":
                request, keys, last = arguments
                outbox.put(request, address, [(key, None, [(0, PAGE)]) for key in keys], first=True, last=last)
                while not isinstance(event := outbox.next_event(WAIT_S), kvxfer.Ended):
                    pass
                pipe.send((event.request, event.report and event.report.transport))
            elif command == "put placed":
                (request,) = arguments
                outbox.put_placed(request)
                ends, deadline = [], time.monotonic() + WAIT_S
                while not ends and time.monotonic() < deadline:
                    ends += [event.request for event in outbox.attend(0.001)]
                pipe.send(ends)


prefill.known = set()


@pytest.fixture
def prefiller(receiver):
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=prefill, args=(theirs, receiver.listens_on), daemon=True)
    process.start()
    assert pipe.poll(WAIT_S) and pipe.recv() == "connected"

    def ask(*command):
        pipe.send(command)
        assert pipe.poll(WAIT_S), command
        return pipe.recv()

    ask.process = process
    yield ask
    process.kill()
    process.join()


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_bytes_produced_there_are_found_once_they_are_put(receiver, prefiller):
    assert prefiller("place", "r", "ab", True) == 2
    assert receiver.lookup("a") == "pending", "it is filled, and not put"
    assert prefiller("put", "r", "ab", True) == ("r", "shm")
    for key in "ab":
        with receiver.acquire(key) as chunk:
            assert chunk.data == pattern(PAGE, ord(key))


def test_all_that_has_its_place_is_put_without_being_named_again(receiver, prefiller):
    assert prefiller("place", "r", "abc", True) == 3
    assert prefiller("put placed", "r") == ["r"], "nothing of it is read, and only its end is told"
    for key in "abc":
        with receiver.acquire(key) as chunk:
            assert chunk.data == pattern(PAGE, ord(key))


def test_a_prefiller_that_is_killed_with_places_leaves_no_pages_and_no_chunks(receiver, prefiller):
    assert prefiller("place", "r", "abc", True) == 3
    stats = receiver.stats
    assert (stats.writing, stats.free_pages + stats.advanced) == (3, 4)
    prefiller.process.kill()
    until(lambda: receiver.stats.free_pages == 7)
    assert receiver.lookup("a") == "absent"
    event = receiver.next_event(WAIT_S)
    while event.ready:
        event = receiver.next_event(WAIT_S)
    assert event.request == "r"


def test_a_page_that_a_prefiller_has_in_advance_is_its_own_until_it_is_gone(receiver, prefiller):
    until(lambda: receiver.stats.advanced == 1)
    assert prefiller("place", "r", "a", True) == 1, "there is one for each chunk, and nobody waits"
    until(lambda: receiver.stats.writing == 1)
    assert prefiller("put placed", "r") == ["r"]
    until(lambda: receiver.stats.advanced == 1)
    with receiver.acquire("a") as chunk:
        assert chunk.data == pattern(PAGE, ord("a"))
    prefiller.process.kill()
    until(lambda: receiver.stats.advanced == receiver.stats.quarantined == 0)
    assert receiver.stats.free_pages == 6
