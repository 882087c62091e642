"""Brings the agent's event descriptor into asyncio loops.

The descriptor is one for the whole agent and says only "something has happened". Whichever loop sees it first clears it, so
that loop looks after everybody's waiters: their conditions are tried, and those fulfilled are woken in their own loops.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from kvxfer._native import ffi, lib
from kvxfer.errors import Closed, check

T = TypeVar("T")


class _Waiter:
    __slots__ = ("attempt", "future", "loop", "settled")

    def __init__(self, loop: asyncio.AbstractEventLoop, attempt: Callable[[], Any]):
        self.loop, self.attempt = loop, attempt
        self.future: asyncio.Future[Any] = loop.create_future()
        self.settled = False


class Events:
    """The waiters of one agent. Any thread, any number of loops."""

    def __init__(self, agent: Any):
        self._agent = agent
        out = ffi.new("int *")
        check(lib.kvxfer_agent_event_fd(agent, out))
        self._fd = out[0]
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._watching: dict[asyncio.AbstractEventLoop, int] = {}
        self._closed = False

    async def wait_for(self, attempt: Callable[[], T | None]) -> T:
        """Awaits the first result of `attempt` that is not None; it is tried now and after each event. What it raises is raised."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, attempt)
        with self._lock:
            if self._closed:
                raise Closed("the agent is closed", lib.KVXFER_CLOSED)
            self._waiters.append(waiter)
            if loop not in self._watching:
                loop.add_reader(self._fd, self._on_event)
            self._watching[loop] = self._watching.get(loop, 0) + 1
        try:
            # After entering the list, so that no event is missed in between.
            self._try(waiter)
            result: T = await waiter.future
            return result
        finally:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                if loop in self._watching:
                    self._watching[loop] -= 1
                    if not self._watching[loop]:
                        del self._watching[loop]
                        loop.remove_reader(self._fd)

    def close(self) -> None:
        """Wakes every waiter with `Closed` and takes the descriptor out of the loops."""
        with self._lock:
            self._closed = True
            waiters, self._waiters = self._waiters, []
            loops, self._watching = list(self._watching), {}
        for waiter in waiters:
            self._settle(waiter, None, Closed("the agent was closed while this was awaited", lib.KVXFER_CLOSED))
        for loop in loops:
            removed = threading.Event()

            def remove(loop: asyncio.AbstractEventLoop = loop, removed: threading.Event = removed) -> None:
                loop.remove_reader(self._fd)
                removed.set()

            try:
                running = asyncio._get_running_loop()
                if running is loop or not loop.is_running():
                    remove()
                else:
                    loop.call_soon_threadsafe(remove)
                    # The descriptor goes with the agent; a loop that does not come round must not hold that up for ever.
                    removed.wait(1.0)
            except RuntimeError:
                pass  # That loop is closed already.

    def _on_event(self) -> None:
        # First clear, then look: an event in between makes the descriptor readable again.
        lib.kvxfer_agent_clear_event(self._agent)
        with self._lock:
            waiters = list(self._waiters)
        for waiter in waiters:
            self._try(waiter)

    def _try(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.settled:
                return
            try:
                result, failure = waiter.attempt(), None
            except Exception as e:
                result, failure = None, e
            if result is None and failure is None:
                return
            waiter.settled = True
        self._settle(waiter, result, failure)

    @staticmethod
    def _settle(waiter: _Waiter, result: Any, failure: BaseException | None) -> None:
        def settle() -> None:
            if waiter.future.done():
                return
            if failure is not None:
                waiter.future.set_exception(failure)
            else:
                waiter.future.set_result(result)

        try:
            waiter.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            pass  # That loop is closed: nobody waits there any more.
