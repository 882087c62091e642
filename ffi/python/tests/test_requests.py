"""Whole requests: reserve, write, commit; look up, acquire, release."""

import asyncio

import pytest

import kvxfer
from other_process import GEOMETRY, PAGE, pattern

WAIT_S = 20


@pytest.fixture
def sender(agent, receiver):
    return kvxfer.Sender(agent, receiver.listens_on, GEOMETRY)


def test_a_request_is_found_once_it_is_complete(agent, receiver, sender):
    region = agent.register(bytearray(pattern(PAGE + 1000, 1)))
    assert receiver.lookup("a") == "absent" and receiver.acquire("a") is None
    report = sender.send("request", [("a", region, [(0, PAGE)]), ("b", region, [(PAGE, 600), (PAGE + 600, 400)])]).wait(
        WAIT_S
    )
    assert (report.written, report.present, report.bytes) == (2, 0, PAGE + 1000)
    receiver.wait_request("request", WAIT_S)
    event = receiver.next_event(WAIT_S)
    assert event.ready and event.request == "request" and event.sender == "here" and event.code == 0

    with receiver.acquire("a") as chunk:
        assert len(chunk) == PAGE and chunk.data == pattern(PAGE + 1000, 1)[:PAGE]
        assert receiver.stats.pinned == 1
    with receiver.acquire("b") as chunk:
        assert chunk.data == pattern(PAGE + 1000, 1)[PAGE:]
    assert receiver.lookup("a") == "present"
    for key in "ab":
        receiver.remove(key)
    assert receiver.stats.free_pages == 8


def test_a_chunk_that_is_there_is_not_sent_again(agent, receiver, sender):
    region = agent.allocate(PAGE)
    sender.send("first", [("same", region, [(0, PAGE)])]).wait(WAIT_S)
    report = sender.send("second", [("same", region, [(0, PAGE)])]).wait(WAIT_S)
    assert (report.written, report.present, report.bytes) == (0, 1, 0)


def test_chunk_by_chunk_and_awaited(agent, receiver, sender):
    region = agent.register(bytearray(pattern(2 * PAGE, 2)))
    reservation = sender.reserve("streamed", [("x", PAGE), ("y", PAGE)])
    reservation.wait_admitted(WAIT_S)
    reservation.write(0, region, [(0, PAGE)])
    reservation.write(1, region, [(PAGE, PAGE)])
    delivery = reservation.finish()

    async def main():
        return await asyncio.wait_for(delivery, WAIT_S)

    assert asyncio.run(main()).written == 2
    with receiver.acquire("y") as chunk:
        assert chunk.data == pattern(2 * PAGE, 2)[PAGE:]


def test_larger_than_the_pool_is_refused_at_once(agent, receiver, sender):
    region = agent.allocate(PAGE)
    with pytest.raises(kvxfer.TooLarge) as failure:
        sender.send("huge", [(f"k{i}", region, [(0, PAGE)]) for i in range(9)]).wait(WAIT_S)
    assert not failure.value.retryable
    assert receiver.stats.free_pages == 8


def test_an_aborted_request_frees_its_pages(agent, receiver, sender):
    reservation = sender.reserve("given up", [("x", PAGE)])
    reservation.wait_admitted(WAIT_S)
    reservation.abort()
    with pytest.raises(kvxfer.Closed):
        reservation.finish()
    event = receiver.next_event(WAIT_S)
    assert not event.ready and event.request == "given up" and event.code != 0
    assert receiver.lookup("x") == "absent"


def test_another_geometry_is_refused_with_both_values(agent, receiver):
    with pytest.raises(kvxfer.Mismatch) as failure:
        kvxfer.Sender(
            agent,
            receiver.listens_on,
            kvxfer.Geometry(page_bytes=PAGE, model="tiny", dtype="float16", layout="KV_2LTD", chunk_tokens=256),
        )
    assert "float16" in str(failure.value) and "bfloat16" in str(failure.value)


def test_a_pool_in_memory_of_the_callers_own(agent):
    memory = bytearray(4 * PAGE)
    with kvxfer.Agent("own", listen="tcp://127.0.0.1:0") as decoder:
        with kvxfer.Receiver(decoder, GEOMETRY, pages=4, memory=memory) as receiver:
            sender = kvxfer.Sender(agent, decoder.addresses[0], GEOMETRY)
            region = agent.register(bytearray(pattern(PAGE, 3)))
            sender.send("r", [("k", region, [(0, PAGE)])]).wait(WAIT_S)
            chunk = receiver.acquire("k")
            assert memory[chunk.page * PAGE :][:PAGE] == pattern(PAGE, 3)
            chunk.release()


def test_chunks_are_read_back_from_the_receiver(agent, receiver, sender):
    data = pattern(PAGE + 1000, 5)
    region = agent.register(bytearray(data))
    sender.send("request", [("a", region, [(0, PAGE)]), ("b", region, [(PAGE, 1000)])]).wait(WAIT_S)
    back = agent.allocate(4 * PAGE)
    with sender.query(["x", "a", "b"], lease=10, timeout=WAIT_S) as found:
        assert [(c.index, c.length) for c in found.chunks] == [(1, PAGE), (2, 1000)] and found.lease == 10
        assert receiver.stats.pinned == 2
        report = found.read([(2, back, [(0, 400), (PAGE, 600)]), (1, back, [(2 * PAGE, PAGE)])], WAIT_S)
    assert (report.chunks, report.bytes, receiver.stats.pinned) == (2, PAGE + 1000, 0)
    memory = bytes(back.memory)
    assert memory[:400] + memory[PAGE : PAGE + 600] == data[PAGE:] and memory[2 * PAGE : 3 * PAGE] == data[:PAGE]
    with pytest.raises(kvxfer.KvxferError):
        found.read([(1, back, [(0, PAGE)])])


def test_asking_holds_nothing_without_a_lease(receiver, sender, agent):
    sender.send("request", [("a", agent.allocate(PAGE), [(0, PAGE)])]).wait(WAIT_S)
    found = sender.query(["a", "b"], lease=0)
    assert (len(found), found.lease, receiver.stats.pinned) == (1, 0, 0)
    with pytest.raises(kvxfer.InvalidArgument, match="nothing is held"):
        found.read([(0, agent.allocate(PAGE), [(0, PAGE)])])
    for keys in ([], [""], ["k" * 513]):
        with pytest.raises(kvxfer.InvalidArgument):
            sender.query(keys, lease=1)
