"""Awaiting transfers and notifications: in one loop, in several loops on threads, and when things end early."""

import asyncio
import threading

import pytest

import kvxfer
from other_process import REGION_BYTES, pattern

DEADLINE_S = 30


def run(coroutine):
    async def with_deadline():
        return await asyncio.wait_for(coroutine, DEADLINE_S)

    return asyncio.run(with_deadline())


def test_awaiting_many_transfers_at_once(agent, other):
    peer = agent.connect(other.address)
    remote = peer.region("pages")
    count, size = 64, REGION_BYTES // 64
    source = agent.register(bytearray(pattern(REGION_BYTES, 1)))

    async def main():
        transfers = [peer.write(source, remote, [(i * size, i * size, size)]) for i in range(count)]
        return await asyncio.gather(*transfers)

    reports = run(main())
    assert sum(report.bytes for report in reports) == REGION_BYTES
    assert other.ask("bytes", 0, REGION_BYTES) == pattern(REGION_BYTES, 1)


def test_the_loop_goes_on_while_a_transfer_is_awaited(agent, other):
    peer = agent.connect(other.address)
    remote, source = peer.region("pages"), agent.allocate(REGION_BYTES)

    async def main():
        turns = 0
        task = asyncio.ensure_future(_all(peer, source, remote, 20))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        await task
        return turns

    assert run(main()) > 1


async def _all(peer, source, remote, times):
    for _ in range(times):
        await peer.write(source, remote, [(0, 0, REGION_BYTES)])


def test_loops_on_several_threads_share_one_agent(agent, other):
    peer = agent.connect(other.address)
    remote, source = peer.region("pages"), agent.allocate(REGION_BYTES)
    failures = []

    def thread():
        try:
            run(_all(peer, source, remote, 30))
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(DEADLINE_S)
    assert not failures and not any(t.is_alive() for t in threads)


def test_failures_are_raised_where_they_are_awaited(agent, other):
    peer = agent.connect(other.address)
    remote, source = peer.region("pages"), agent.allocate(REGION_BYTES)

    async def main():
        other.kill()
        while True:
            await peer.write(source, remote, [(0, 0, REGION_BYTES)], timeout=5)

    with pytest.raises(kvxfer.KvxferError) as failure:
        run(main())
    assert failure.value.retryable


def test_awaiting_a_finished_transfer_again(agent, other):
    peer = agent.connect(other.address)
    transfer = peer.write(agent.allocate(10), peer.region("pages"), [(0, 0, 10)])
    transfer.wait(DEADLINE_S)

    async def main():
        assert (await transfer) == (await transfer) == transfer.report

    run(main())


def test_notifications_are_awaited(agent, other):
    agent.connect(other.address)

    async def main():
        waiting = asyncio.ensure_future(agent.notification())
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, other.ask, "notify", "here", b"now")
        return await waiting

    assert run(main()) == kvxfer.Notification("there", b"now")


def test_closing_the_agent_wakes_who_waits(other):
    agent = kvxfer.Agent("closing")
    agent.connect(other.address)

    async def main():
        waiting = asyncio.ensure_future(agent.notification())
        await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, agent.close)
        with pytest.raises(kvxfer.Closed):
            await waiting
        with pytest.raises(kvxfer.Closed):
            await agent.notification()

    run(main())


def test_giving_up_leaves_no_reader_behind(agent, other):
    peer = agent.connect(other.address)
    remote, source = peer.region("pages"), agent.allocate(REGION_BYTES)

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(agent.notification(), 0.05)
        assert not agent._events._watching and not agent._events._waiters
        await peer.write(source, remote, [(0, 0, REGION_BYTES)])
        assert not agent._events._watching and not agent._events._waiters

    run(main())
