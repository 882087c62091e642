"""Reading and writing another process's memory, with every kind of buffer and every failure that a caller can cause."""

import array
import gc
import mmap
import os
import pickle

import pytest

import kvxfer
from other_process import REGION_BYTES, pattern

WAIT_S = 20


def moved(transfer):
    report = transfer.wait(WAIT_S)
    assert report.failed == 0 and report.code == 0
    assert transfer.done and set(transfer.outcomes) == {0}
    return report


@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "foreign"])
@pytest.mark.parametrize("size", [100, 300_000, REGION_BYTES])
def test_write_and_read_back(agent, start_other, foreign, size):
    other = start_other(foreign=foreign)
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    assert len(remote) == REGION_BYTES
    assert remote.transports and peer.paths and peer.name == "there" and peer.is_up

    source = agent.register(bytearray(pattern(size, 1)))
    report = moved(peer.write(source, remote, [(0, REGION_BYTES - size, size)]))
    assert report.bytes == size and report.transport in remote.transports
    assert other.ask("bytes", REGION_BYTES - size, size) == pattern(size, 1)

    target = agent.allocate(size)
    moved(peer.read(target, remote, [(0, REGION_BYTES - size, size)]))
    assert target.memory == pattern(size, 1)


@pytest.mark.parametrize("transport", ["shm", "cma", "tcp"])
def test_every_transport_of_one_host_moves_the_same_bytes(agent, start_other, transport):
    other = start_other(foreign=transport != "shm")
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    if transport not in remote.transports:
        pytest.skip(f"SKIPPED: {transport} does not reach the other process here, only {remote.transports}")
    source = agent.register(bytearray(pattern(1 << 20, 2)))
    report = moved(peer.write(source, remote, [(0, 5, 1 << 20)], transport=transport, integrity="full"))
    assert report.transport == transport
    assert other.ask("bytes", 5, 1 << 20) == pattern(1 << 20, 2)


def test_a_peers_memory_as_memory_of_this_process(agent, start_other):
    other = start_other()
    peer = agent.connect(other.address)
    with peer.map(peer.region("pages")) as there:
        assert len(there) == REGION_BYTES and there.device is None
        there.memory[100:5100] = pattern(5000, 3)
    assert other.ask("bytes", 100, 5000) == pattern(5000, 3)
    with pytest.raises(kvxfer.NotAvailable, match="CUDA device 0"):
        peer.map(peer.region("pages"), device=0)
    apart = start_other(foreign=True)
    peer = agent.connect(apart.address)
    with pytest.raises(kvxfer.NotAvailable, match="not in this process's address space"):
        peer.map(peer.region("pages"))


def test_many_pieces_scattered_both_ways(agent, other):
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    other.ask("fill", 3)
    # Every third kilobyte, backwards.
    pieces = [(i * 1024, REGION_BYTES - (3 * i + 1) * 1024, 1024) for i in range(500)]
    target = agent.allocate(500 * 1024)
    moved(peer.read(target, remote, pieces))
    whole = pattern(REGION_BYTES, 3)
    for local, there, length in pieces:
        assert target.memory[local : local + length] == whole[there : there + length]

    # The same list as a packed buffer.
    packed = array.array("Q", [n for piece in pieces for n in piece])
    again = agent.allocate(500 * 1024)
    assert moved(peer.read(again, remote, packed)).pieces == 500
    assert again.memory == target.memory


def test_the_listening_side_uses_the_same_connection(agent, other):
    peer = agent.connect(other.address)
    mine = agent.register(bytearray(pattern(70_000, 4)))
    mine.export("mine", "r")
    assert other.ask("read back", agent.name, "mine", 70_000) == pattern(70_000, 4)
    assert agent.peers == ["there"] and agent.peer("there").epoch == peer.epoch


def test_buffers_of_all_kinds(agent, other):
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    mapped = mmap.mmap(-1, 8192)
    mapped[:] = pattern(8192, 5)
    kinds = {
        "bytearray": bytearray(pattern(8192, 5)),
        "memoryview": memoryview(bytearray(pattern(8192, 5))),
        "array": array.array("B", pattern(8192, 5)),
        "mmap": mapped,
    }
    try:
        import numpy

        kinds["numpy"] = numpy.frombuffer(bytearray(pattern(8192, 5)), dtype=numpy.int32)
    except ImportError:
        pass
    for i, (kind, buffer) in enumerate(kinds.items()):
        region = agent.register(buffer)
        assert len(region) == 8192, kind
        moved(peer.write(region, remote, [(0, i * 8192, 8192)]))
        assert other.ask("bytes", i * 8192, 8192) == pattern(8192, 5), kind
        region.close()


def test_memory_is_kept_as_long_as_it_is_registered(agent, other):
    buffer = bytearray(pattern(1 << 20, 6))
    region = agent.register(buffer)
    with pytest.raises(BufferError):
        buffer.append(0)
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    # Nobody holds the region or the buffer any more but the transfer.
    transfer = peer.write(region, remote, [(0, 0, 1 << 20)])
    del region, buffer
    gc.collect()
    moved(transfer)
    assert other.ask("bytes", 0, 1 << 20) == pattern(1 << 20, 6)


def test_closing_a_region_releases_the_buffer(agent):
    buffer = bytearray(100)
    region = agent.register(buffer)
    region.close()
    region.close()
    buffer.append(0)
    assert "closed" in repr(region)


def test_a_view_keeps_a_region_open(agent):
    region = agent.allocate(4096)
    view = region.memory[10:20]
    with pytest.raises(kvxfer.Busy) as failure:
        region.close()
    assert isinstance(failure.value, BufferError)
    view.release()
    region.close()


def test_read_only_buffers_and_odd_objects_are_refused(agent):
    with pytest.raises((BufferError, ValueError, TypeError)):
        agent.register(b"read-only")
    with pytest.raises(TypeError):
        agent.register(42)
    with pytest.raises((BufferError, ValueError, TypeError)):
        agent.register(memoryview(bytearray(100))[::2])


@pytest.mark.parametrize(
    "piece",
    [(0, REGION_BYTES - 10, 11), (90, 0, 11), (0, 1 << 63, 1), (1 << 63, 0, 1), (0, (1 << 64) - 1, 2)],
    ids=["remote end", "local end", "far remote", "far local", "overflow"],
)
def test_out_of_range_names_the_values_and_moves_nothing(agent, other, piece):
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    local = agent.allocate(100)
    other.ask("fill", 7)
    for submit in (peer.write, peer.read):
        with pytest.raises(kvxfer.OutOfRange) as failure:
            submit(local, remote, [(0, 0, 10), piece])
        assert isinstance(failure.value, IndexError)
        assert failure.value.name == "out_of_range" and not failure.value.retryable
        assert str(piece[2]) in str(failure.value)
    assert other.ask("bytes", 0, 10) == pattern(10, 7)


def test_empty_and_malformed_pieces(agent, other):
    peer = agent.connect(other.address)
    remote, local = peer.region("pages"), agent.allocate(100)
    with pytest.raises(kvxfer.InvalidArgument):
        peer.write(local, remote, [])
    with pytest.raises((kvxfer.InvalidArgument, kvxfer.OutOfRange)):
        peer.write(local, remote, [(0, 0, 0)])
    with pytest.raises((TypeError, ValueError)):
        peer.write(local, remote, [(0, 0)] * 2 + [("a", 0, 0)])
    with pytest.raises(OverflowError):
        peer.write(local, remote, [(-1, 0, 1)])
    with pytest.raises(kvxfer.InvalidArgument, match="3 a piece"):
        peer.write(local, remote, array.array("Q", [1, 2]))
    with pytest.raises(kvxfer.InvalidArgument, match="'telepathy'"):
        peer.write(local, remote, [(0, 0, 1)], transport="telepathy")
    with pytest.raises(kvxfer.InvalidArgument, match="timeout"):
        peer.write(local, remote, [(0, 0, 1)], timeout=-1)


def test_unknown_names_and_addresses(agent, other):
    peer = agent.connect(other.address)
    with pytest.raises(kvxfer.NotFound) as failure:
        peer.region("no such region", 5)
    assert isinstance(failure.value, LookupError) and "no such region" in str(failure.value)
    with pytest.raises(kvxfer.NotFound):
        agent.peer("nobody")
    with pytest.raises(kvxfer.Unreachable) as failure:
        agent.connect("tcp://127.0.0.1:1", 5)
    assert isinstance(failure.value, ConnectionError) and failure.value.retryable
    with pytest.raises(kvxfer.InvalidArgument):
        agent.connect("carrier-pigeon://home", 5)


def test_a_busy_address_is_said_to_be_busy(other):
    with pytest.raises(kvxfer.AddressInUse) as failure, kvxfer.Agent(listen=other.address):
        pass
    assert other.address.rpartition(":")[2] in str(failure.value)


def test_keys_must_match(start_other):
    other = start_other(auth_key=b"one key")
    with kvxfer.Agent("stranger", auth_key="another key") as stranger:
        with pytest.raises(kvxfer.Unauthenticated):
            stranger.connect(other.address, 10)
    with kvxfer.Agent("friend", auth_key="one key") as friend:
        assert friend.connect(other.address, 10).is_up


def test_forbidden_and_required_transports(other):
    with kvxfer.Agent("tcp only", allow=["tcp"]) as agent:
        peer = agent.connect(other.address)
        assert peer.region("pages").transports == ["tcp"]
    with kvxfer.Agent("demanding", forbid=["shm", "cma"], require=["same_host"]) as agent:
        with pytest.raises(kvxfer.RequirementNotMet):
            agent.connect(other.address)
    with pytest.raises(kvxfer.KvxferError, match="telepathy"):
        kvxfer.Agent("wrong", allow=["telepathy"])


def test_a_killed_peer_ends_what_was_under_way(agent, other):
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    local = agent.allocate(1 << 20)
    other.kill()
    # Whatever was noticed when: from the kill on there is an error, never a hang.
    with pytest.raises(kvxfer.KvxferError) as failure:
        for _ in range(1000):
            peer.write(local, remote, [(0, 0, 1 << 20)], timeout=5).wait(WAIT_S)
    assert failure.value.retryable
    with pytest.raises(kvxfer.KvxferError):
        for _ in range(1000):
            peer.notify(b"anyone?")


def test_a_disconnected_peer_is_gone_and_can_come_back(agent, other):
    peer = agent.connect(other.address)
    remote, local = peer.region("pages"), agent.allocate(10)
    peer.disconnect()
    with pytest.raises(kvxfer.PeerGone):
        peer.write(local, remote, [(0, 0, 10)]).wait(WAIT_S)
    assert not peer.is_up
    again = agent.connect(other.address)
    moved(again.write(local, again.region("pages"), [(0, 0, 10)]))


def test_a_closed_agent_answers_closed(other):
    agent = kvxfer.Agent("short-lived")
    region, peer = agent.allocate(10), agent.connect(other.address)
    remote = peer.region("pages")
    agent.close()
    agent.close()
    for call in (
        lambda: peer.write(region, remote, [(0, 0, 10)]),
        lambda: peer.region("pages", 1),
        lambda: peer.notify(b"x"),
    ):
        with pytest.raises((kvxfer.Closed, kvxfer.PeerGone)):
            call()
    # The agent's own handle is freed.
    with pytest.raises((kvxfer.Closed, kvxfer.InvalidArgument)):
        agent.allocate(10)
    assert "closed" in repr(agent)


def test_cancelling(agent, other):
    peer = agent.connect(other.address)
    remote, local = peer.region("pages"), agent.allocate(REGION_BYTES)
    transfer = peer.write(local, remote, [(0, 0, REGION_BYTES)])
    try:
        ended = transfer.cancel() or transfer.wait(WAIT_S)
    except kvxfer.Cancelled:
        ended = True
    # Either it had finished before, or it says that it was cancelled.
    assert ended and transfer.done and transfer.report.code in (0, kvxfer.errors.lib.KVXFER_CANCELLED)
    moved(peer.write(local, remote, [(0, 0, REGION_BYTES)]))


def test_notifications_with_and_without_data(agent, other):
    peer = agent.connect(other.address)
    remote, local = peer.region("pages"), agent.register(bytearray(pattern(5000, 8)))
    moved(peer.write(local, remote, [(0, 0, 5000)], notify=b"5000 bytes are there"))
    assert other.ask("notification", 10) == ("here", b"5000 bytes are there")
    assert other.ask("bytes", 0, 5000) == pattern(5000, 8)

    peer.notify(b"")
    assert other.ask("notification", 10) == ("here", b"")
    assert other.ask("notification", 0.01) is None

    assert agent.try_notification() is None
    other.ask("notify", "here", bytes(range(256)))
    got = agent.wait_notification(10)
    assert got == kvxfer.Notification("there", bytes(range(256)))
    with pytest.raises(kvxfer.KvxferError, match=r"(?i)4096|4097|notif"):
        peer.notify(bytes(4097))


def test_configuration_by_text_and_mapping():
    with kvxfer.Agent.from_config({"name": "mapped", "listen": ["tcp://127.0.0.1:0"]}) as agent:
        assert agent.name == "mapped" and len(agent.addresses) == 1 and agent.epoch > 0 and agent.peers == []
        assert ":0" not in agent.addresses[0]
    with kvxfer.Agent.from_config("name: from-yaml\nconnect_timeout: 3s\n") as agent:
        assert agent.name == "from-yaml"
    with pytest.raises(kvxfer.InvalidArgument, match="no_such_setting"):
        kvxfer.Agent.from_config({"no_such_setting": 1})


def test_metrics_count_what_moved(agent, other):
    peer = agent.connect(other.address)
    local = agent.allocate(100_000)
    moved(peer.write(local, peer.region("pages"), [(0, 0, 100_000)]))
    assert "100000" in agent.metrics and "# TYPE" in agent.metrics


def test_exceptions_survive_pickling():
    failure = kvxfer.errors.error(kvxfer.errors.lib.KVXFER_MISMATCH, "page size differs: here 1, there 2")
    again = pickle.loads(pickle.dumps(failure))
    assert type(again) is kvxfer.Mismatch and again.code == failure.code and str(again) == str(failure)


def test_no_handle_is_left_behind(other):
    gc.collect()
    before = kvxfer.errors.lib.kvxfer_live_handles()
    with kvxfer.Agent("tidy") as agent:
        peer = agent.connect(other.address)
        remote = peer.region("pages")
        for _ in range(20):
            with agent.register(bytearray(1000)) as local:
                peer.write(local, remote, [(0, 0, 1000)]).wait(WAIT_S)
        peer.write(agent.allocate(1000), remote, [(0, 0, 1000)]).wait(WAIT_S)
        del peer, remote, local
    del agent
    gc.collect()
    assert kvxfer.errors.lib.kvxfer_live_handles() == before


def test_a_forked_child_is_refused_and_does_no_harm(agent, other):
    peer = agent.connect(other.address)
    remote, local = peer.region("pages"), agent.allocate(1000)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            peer.write(local, remote, [(0, 0, 1000)])
        except kvxfer.Closed:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    moved(peer.write(local, remote, [(0, 0, 1000)]))
