"""Requests on their way: the futures of those who wait for them, and what is said of their ends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from lmcache.logging import init_logger

from kvxfer.outbox import Ended

logger = init_logger(__name__)


class Arrival(Future):
    """The end of a request. Who waits for it looks after the outbox for a moment (`attend`): most requests end in less time than it
    takes to wake the backend's thread for them."""

    def __init__(self, attend: Callable[[Future], None]):
        super().__init__()
        self._attend = attend

    def result(self, timeout: float | None = None) -> int:
        self._attend(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._attend(self)
        return super().exception(timeout)


@dataclass(slots=True)
class Request:
    """A request on its way, as far as log lines and futures need it."""

    name: str
    future: Arrival
    vllm: str | None = None
    tokens: int = 0
    size: int = 0
    offload: float = 0.0
    chunks: int = 0
    placed: int = 0
    last: bool = False

    def ended(self, failure: Exception | None) -> None:
        """Tells who waits. An end that has been told stays as it is."""
        if self.future.done():
            return
        if failure is None:
            self.future.set_result(self.chunks)
        else:
            self.future.set_exception(failure)

    def tell(self, event: Ended) -> None:
        """Says in the log how it ended."""
        report, failure = event.report, event.failure
        if report is not None:
            took = self.offload + event.after_last_seconds
            logger.info(
                "Store %d tokens takes: %.4f ms, throughput: %.4f GB/s; offload_time: %.4f ms, put_time: %.4f ms",
                self.tokens,
                1e3 * took,
                self.size / took / 1024**3 if took else 0.0,
                1e3 * self.offload,
                1e3 * event.after_last_seconds,
            )
            logger.info(
                "kvxfer: request %s has arrived: %d chunks, %d bytes over %s, %d chunks were gathered in place, %d were there already, "
                "admitted after %.3f ms",
                event.request,
                report.written,
                report.bytes,
                report.transport,
                self.placed,
                report.present,
                1e3 * report.queued_seconds,
            )
            return
        hint = (
            " (PYTHONHASHSEED must be the same number on all instances)" if "hash_seed differs" in str(failure) else ""
        )
        logger.error(
            "kvxfer: request %s has not arrived (%s%s): %s%s. The decoder computes it",
            event.request,
            failure.name,
            "" if failure.retryable else ", will not get better by itself",
            failure,
            hint,
        )
