"""The prefiller's whole side: requests in steps, to any number of receivers, with word to the proxy.

outbox = kvxfer.Outbox(agent, geometry, proxy="tcp://127.0.0.1:7500")
batch = outbox.put("request-1", "tcp://decoder:7300", [("key", region, [(0, 4096)])], first=True, last=True)
while (event := outbox.next_event(1.0)) is None or event.batch != batch:
    ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvxfer._call import INTEGRITY, TRANSPORTS, c_text, choice, handle, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.agent import Agent
from kvxfer.channel import DeliveryReport, Geometry
from kvxfer.errors import KvxferError, check, error
from kvxfer.gpu import Fence, fence_of
from kvxfer.region import Region

_BATCH_SIZE = ffi.sizeof("kvxfer_batch_t")
_EVENT_SIZE = ffi.sizeof("kvxfer_outbox_event_t")
_TRANSPORT_NAMES = {number: name for name, number in TRANSPORTS.items() if name}


@dataclass(frozen=True)
class Released:
    """Nothing reads the batch's bytes any more."""

    batch: int


@dataclass(frozen=True)
class Ended:
    """A request has ended: `report` says how it went, or `failure` why it did not."""

    request: str
    report: DeliveryReport | None
    failure: KvxferError | None
    took_seconds: float
    """From its first batch to its end."""
    after_last_seconds: float
    """From its last batch to its end; 0 where that had not come."""


class Place(NamedTuple):
    """Where a chunk's bytes are to be produced."""

    address: int
    length: int


class Outbox:
    """Sends requests; connects to receivers by itself. Any thread. A context manager.

    `request_timeout` counts from a request's first batch, `patience` is how long a receiver that cannot be reached is waited for.
    A proxy that is not kvxfer's hears of successes only, in LMCache's words.
    """

    def __init__(
        self,
        agent: Agent,
        geometry: Geometry,
        *,
        pool: str = "kv",
        proxy: str | None = None,
        request_timeout: float | None = None,
        patience: float | None = None,
        integrity: str | None = None,
    ):
        sender = ffi.new("kvxfer_sender_config_t *")
        sender.struct_size = ffi.sizeof("kvxfer_sender_config_t")
        name = ffi.new("char[]", c_text(pool))
        shape, kept = geometry._c()
        sender.pool, sender.geometry = name, shape
        sender.request_timeout_ms = milliseconds("request_timeout", request_timeout)
        sender.integrity = choice("integrity", INTEGRITY, integrity)
        config = ffi.new("kvxfer_outbox_config_t *")
        config.struct_size = ffi.sizeof("kvxfer_outbox_config_t")
        config.sender = sender
        where = ffi.NULL if proxy is None else ffi.new("char[]", c_text(proxy))
        config.proxy = where
        config.patience_ms = milliseconds("patience", patience)
        self._handle = handle("kvxfer_outbox_t", lib.kvxfer_outbox_free, lib.kvxfer_outbox_new, agent._handle, config)
        self._agent = agent
        del kept, where

    def put(
        self,
        request: str,
        receiver: str,
        chunks: Iterable[tuple[str, Region | None, Iterable[tuple[int, int]]]],
        *,
        total: int = 0,
        first: bool = False,
        last: bool = False,
        after: Fence | None = None,
    ) -> int:
        """Takes part of a request: chunks of (key, region, runs). Never waits. Returns the number of the batch; its bytes must not
        change until `Released` names it. 0: nothing of it is read, and no `Released` follows. `total` in the first batch is how many
        chunks the whole request will have. `after` is a point in a CUDA stream before which the bytes are not complete. A region of None:
        the chunk is in the place that `place` gave, and its runs are [(0, length)]. No chunks at all, where `place` gave places: all of those."""
        batch, kept = _batch(request, receiver, chunks, total, first, last)
        batch.after = fence_of(after)
        number = ffi.new("uint64_t *")
        check(lib.kvxfer_outbox_put(self._handle, batch, number))
        del kept
        return int(number[0])

    def place(
        self,
        request: str,
        receiver: str,
        chunks: Iterable[tuple[str, int]],
        *,
        total: int = 0,
        first: bool = False,
        last: bool = False,
        device: int | None = None,
        patience: float = 0.005,
    ) -> list[Place | None]:
        """Asks for chunks of (key, length) to be produced where they are to be: the receiver's pages, as addresses of this process (or
        of the CUDA device `device`). Fill them, then `put` the same chunks; one that has None here, or was not filled
        there, is put from a region.

        Waits for admission at most `patience` seconds; whatever prevents places gives None and loses nothing. Until the `put`, or
        `give_up`, the places are the caller's, whatever becomes of the request; afterwards nothing may be written there."""
        batch, kept = _batch(request, receiver, [(key, None, [(0, n)]) for key, n in chunks], total, first, last)
        places = ffi.new("kvxfer_place_t[]", max(1, batch.count))
        wait = milliseconds("patience", patience)
        check(lib.kvxfer_outbox_place(self._handle, batch, -1 if device is None else device, wait, places))
        del kept
        found = ((int(ffi.cast("uintptr_t", p.address)), int(p.length)) for p in places[0 : batch.count])
        return [Place(address, length) if address else None for address, length in found]

    def give_up(self, request: str, after: Fence | None = None) -> bool:
        """Gives up the places of chunks that are not put after all, and their request, once a CUDA stream has passed `after`. False when
        it has none."""
        code = lib.kvxfer_outbox_give_up(self._handle, c_text(request), fence_of(after))
        if code == lib.KVXFER_NOT_FOUND:
            return False
        check(code)
        return True

    def abort(self, request: str, why: int = lib.KVXFER_CANCELLED) -> bool:
        """Gives a request up; False when none of that name is under way."""
        code = lib.kvxfer_outbox_abort(self._handle, c_text(request), why)
        if code == lib.KVXFER_NOT_FOUND:
            return False
        check(code)
        return True

    def shed(self) -> bool:
        """Gives up the youngest request that has not been admitted, to have the memory of its batches back; False when all are."""
        code = lib.kvxfer_outbox_shed(self._handle)
        if code == lib.KVXFER_NOT_FOUND:
            return False
        check(code)
        return True

    def next_event(self, timeout: float) -> Released | Ended | None:
        """The next event; None when the time is over. Of several threads that wait here the one that came last is woken first."""
        event = self._event()
        return _read(event) if self._take(timeout, event) else None

    def events(self, timeout: float) -> Iterator[Released | Ended]:
        """The next event, and those that are there already when it comes; none when the time is over."""
        event = self._event()
        while self._take(timeout, event):
            more = event.more
            yield _read(event)
            if not more:
                return
            timeout = 0.0

    @staticmethod
    def _event() -> Any:
        event = ffi.new("kvxfer_outbox_event_t *")
        event.struct_size = _EVENT_SIZE
        return event

    def _take(self, timeout: float, event: Any) -> bool:
        code = lib.kvxfer_outbox_next_event(self._handle, milliseconds("timeout", timeout), event)
        if code == lib.KVXFER_TIMED_OUT:
            return False
        check(code)
        return True

    def attend(self, at_most: float) -> bool:
        """For a thread that has nothing to do but wait for what comes next: looks after the receivers' answers itself, at most so many
        seconds, which spares the time until other threads have been woken for them. True when there is an event. No other thread is woken
        for those that come meanwhile: take them with `next_event(0)` until there are none."""
        code = lib.kvxfer_outbox_attend(self._handle, int(at_most * 1e6))
        if code == lib.KVXFER_TIMED_OUT:
            return False
        check(code)
        return True

    def close(self, timeout: float = 5.0) -> None:
        """Gives everything up and waits until no bytes are read any more and the proxy has been told. Closing twice is fine."""
        if self._handle is None:
            return
        check(lib.kvxfer_outbox_close(self._handle, milliseconds("timeout", timeout)))

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(event: Any) -> Released | Ended:
    if event.kind == lib.KVXFER_OUTBOX_RELEASED:
        return Released(event.batch)
    request = ffi.string(event.request).decode("utf-8", "replace")
    report, failure = None, None
    if event.result == lib.KVXFER_OK:
        transport = _TRANSPORT_NAMES.get(event.transport, "none")
        queued, moved = event.queued_ns / 1e9, event.moved_ns / 1e9
        report = DeliveryReport(event.bytes, queued, moved, event.written, event.present, transport)
    else:
        failure = error(event.result, ffi.string(event.text).decode("utf-8", "replace"))
    return Ended(request, report, failure, event.took_ns / 1e9, event.after_last_ns / 1e9)


def _batch(
    request: str,
    receiver: str,
    chunks: Iterable[tuple[str, Region | None, Iterable[tuple[int, int]]]],
    total: int,
    first: bool,
    last: bool,
) -> tuple[Any, list[Any]]:
    """The struct, and what must live as long as it is in use."""
    parts = list(chunks)
    sources = ffi.new("kvxfer_chunk_source_t[]", len(parts))
    kept: list[Any] = [sources]
    for i, (key, region, runs) in enumerate(parts):
        source, text, packed = sources[i], ffi.new("char[]", c_text(key)), ffi.new("kvxfer_run_t[]", list(runs))
        kept += (text, packed)
        source.key, source.runs, source.run_count = text, packed, len(packed)
        if region is not None:
            source.region = region._handle
    batch = ffi.new("kvxfer_batch_t *")
    batch.struct_size = _BATCH_SIZE
    name, where = ffi.new("char[]", c_text(request)), ffi.new("char[]", c_text(receiver))
    kept += [name, where]
    batch.request, batch.receiver, batch.chunks, batch.count = name, where, sources, len(parts)
    batch.total, batch.first, batch.last = total, first, last
    return batch, kept
