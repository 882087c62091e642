"""LMCache's multi-process mode: objects read out of another process's L1 memory, each with a result of its own."""

import os
import signal
import time

import pytest
import torch
from test_pd import Decoder

import far_side
from far_side import L1_BYTES, free_ports
from kvxfer.errors import KvxferError

SOON = 30
MIB = 1 << 20


class Server(Decoder):
    """A cache server's L1 memory in a process of its own."""

    what = "l1"

    def arguments(self, port, changes):
        return (port,)


@pytest.fixture
def ports():
    return free_ports(2)


@pytest.fixture
def server(ports):
    far = Server(ports[0])
    yield far
    far.kill()


@pytest.fixture
def ours(ports):
    memory, context = far_side.l1_context(ports[1])
    yield memory, context
    context.close()


def finished(client, task, patience=SOON):
    deadline = time.monotonic() + patience
    while not (result := client.query_read_status(task)).is_finished():
        assert time.monotonic() < deadline, "the read does not end"
        time.sleep(0.002)
    return result.succeeded_mask


def addresses(*pairs):
    from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress

    return [TransferChannelAddress(offset, size) for offset, size in pairs]


def test_objects_arrive_byte_for_byte_wherever_they_lie(ports, server, ours):
    memory, context = ours
    data = os.urandom(3 * MIB)
    server.ask("fill", MIB, data)
    client = context.get_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    # Sizes that are no multiple of a page, in another order than they lie there.
    there = [(3 * MIB, 777), (MIB, MIB + 1), (2 * MIB + 1, MIB - 1)]
    here = [(0, 777), (4 * MIB, MIB + 1), (8 * MIB, MIB - 1)]
    task = client.submit_read(context.get_transfer_channel_address(here), addresses(*there))
    assert finished(client, task) == [True] * 3
    for (to, size), (start, _) in zip(here, there, strict=True):
        assert bytes(memory[to : to + size].numpy()) == data[start - MIB : start - MIB + size]
    assert not memory[777:4096].any(), "nothing beside them"
    with pytest.raises(KeyError):
        client.query_read_status(task)


def test_each_object_has_a_result_of_its_own(ports, server, ours):
    memory, context = ours
    server.ask("fill", 0, b"\7" * 4096)
    client = context.get_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    there = addresses((0, 4096), (L1_BYTES - 100, 4096), (-4096, 4096), (0, 0), (0, 8192), (L1_BYTES - 4096, 4096))
    here = context.get_transfer_channel_address([(n * 4096, 4096) for n in range(6)])
    assert finished(client, client.submit_read(here, there)) == [True, False, False, False, False, True]
    assert memory[:4096].eq(7).all() and not memory[4096 : 6 * 4096].any()
    # Nothing that can be read at all.
    assert finished(client, client.submit_read(here[:1], there[1:2])) == [False]
    with pytest.raises(ValueError, match="outside the L1 memory"):
        client.submit_read(addresses((L1_BYTES, 4096)), there[:1])


def test_many_reads_at_once_from_both_sides(ports, server, ours):
    memory, context = ours
    pattern = torch.arange(8 * MIB, dtype=torch.int64).remainder(251).to(torch.uint8)
    server.ask("fill", 0, bytes(pattern.numpy()))
    client = context.get_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    tasks = []
    for n in range(64):
        at = (n * 37 % 64) * 128 * 1024
        tasks.append(client.submit_read(addresses((at, 128 * 1024)), addresses((at, 128 * 1024))))
    assert all(finished(client, task) == [True] for task in reversed(tasks))
    assert torch.equal(memory[: 8 * MIB], pattern)
    # The other side sees the connection as one of its own.
    assert server.ask("peers") == 1 and context.get_num_connected_clients() == 1


def test_a_server_that_is_not_there_is_an_error_at_once(ports, ours):
    _, context = ours
    began = time.monotonic()
    with pytest.raises(KvxferError):
        context.get_transfer_channel_client(f"127.0.0.1:{free_ports(1)[0]}")
    assert time.monotonic() - began < SOON
    with pytest.raises(ValueError, match="host:port"):
        context.get_transfer_channel_client("nobody")


def test_a_killed_server_fails_its_reads_and_is_reached_again_once_it_is_back(ports, server, ours):
    memory, context = ours
    client = context.get_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    where = addresses((0, 8 * MIB))
    os.kill(server.process.pid, signal.SIGSTOP)
    tasks = [client.submit_read(where, where) for _ in range(4)]
    os.kill(server.process.pid, signal.SIGKILL)
    # Each ends: with bytes that had moved already, or without.
    for task in tasks:
        assert len(finished(client, task)) == 1
    server.process.join(SOON)
    deadline = time.monotonic() + SOON
    while client.is_up:
        assert time.monotonic() < deadline, "the death is noticed"
        time.sleep(0.02)
    assert finished(client, client.submit_read(where, where)) == [False]

    again = Server(ports[0])
    try:
        again.ask("fill", 0, b"\5" * 4096)
        small = addresses((0, 4096))
        while finished(client, client.submit_read(small, small)) != [True]:
            assert time.monotonic() < deadline + SOON, "reads succeed again"
            time.sleep(0.1)
        assert memory[:4096].eq(5).all()
    finally:
        again.kill()


def test_after_closing_no_byte_arrives_any_more(ports, server, ours):
    memory, context = ours
    server.ask("fill", 0, b"\1" * (8 * MIB))
    client = context.get_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    where = addresses((0, 8 * MIB))
    for _ in range(8):
        client.submit_read(where, where)
    context.remove_transfer_channel_client(f"127.0.0.1:{ports[0]}")
    assert context.get_num_connected_clients() == 0
    memory.zero_()
    time.sleep(0.3)
    assert not memory.any()
    with pytest.raises(KvxferError, match="closed"):
        client.submit_read(where, where)


def test_a_url_is_checked_and_settings_that_would_be_ignored_are_refused(ports, monkeypatch):
    monkeypatch.setenv("KVXFER_LISTEN", "tcp://127.0.0.1:1")
    with pytest.raises(KvxferError, match="--p2p-advertise-url"):
        far_side.l1_context(ports[0])
