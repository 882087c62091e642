"""The prefiller's whole side: requests in steps, to any number of receivers, with word to the proxy.

outbox = kvxfer.Outbox(agent, geometry, proxy="tcp://127.0.0.1:7500")
batch = outbox.put("request-1", "tcp://decoder:7300", [("key", region, [(0, 4096)])], first=True, last=True)
while (event := outbox.next_event(1.0)) is None or event.batch != batch:
    ...
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from kvxfer._call import INTEGRITY, TRANSPORTS, c_text, choice, handle, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.agent import Agent
from kvxfer.channel import DeliveryReport, Geometry
from kvxfer.errors import KvxferError, check, error
from kvxfer.gpu import Fence, fence_of
from kvxfer.region import Region

_BATCH_SIZE = ffi.sizeof("kvxfer_batch_t")
_SOURCES, _RUNS = "kvxfer_chunk_source_t[]", "kvxfer_run_t[]"
_PLACE = struct.Struct("PQ")
_EVENT_SIZE = ffi.sizeof("kvxfer_outbox_event_t")
_TRANSPORT_NAMES = {number: name for name, number in TRANSPORTS.items() if name}


class Released(NamedTuple):
    """Nothing reads the batch's bytes any more."""

    batch: int


class Ended(NamedTuple):
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


class _Scratch(threading.local):
    """What a thread's calls are made with, used again and again."""

    def __init__(self) -> None:
        self.event = ffi.new("kvxfer_outbox_event_t *", {"struct_size": _EVENT_SIZE})
        self._batch = ffi.new("kvxfer_batch_t *", {"struct_size": _BATCH_SIZE})
        self._make_room(8)

    def _make_room(self, room: int) -> None:
        self._room, self.places = room, ffi.new("kvxfer_place_t[]", room)
        self._sources, self._runs = ffi.new(_SOURCES, room), ffi.new(_RUNS, room)
        for i in range(room):
            self._sources[i].runs, self._sources[i].run_count = self._runs + i, 1
        self._batch.chunks = self._sources

    def named(
        self, request: str, receiver: str, chunks: Sequence[tuple[str, int]], total: int, first: bool, last: bool
    ) -> tuple[Any, list[Any]]:
        """A batch of chunks of (key, length) that lie nowhere yet, good until the next one, and what must live as long as it is in use.
        There is room for their `places`."""
        if len(chunks) > self._room:
            self._make_room(max(len(chunks), 2 * self._room))
        batch, sources, runs = self._batch, self._sources, self._runs
        kept = [_text(request), _text(receiver)]
        batch.request, batch.receiver = kept
        batch.count, batch.total, batch.first, batch.last = len(chunks), total, first, last
        for i, (key, length) in enumerate(chunks):
            text = _text(key)
            kept.append(text)
            sources[i].key, runs[i].length = text, length
        return batch, kept


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
        self._agent, self._scratch = agent, _Scratch()
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
        the chunk is in the place that `place` gave, and its runs are [(0, length)]."""
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
        chunks: Sequence[tuple[str, int]],
        *,
        total: int = 0,
        first: bool = False,
        last: bool = False,
        device: int | None = None,
        patience: float = 0.005,
    ) -> list[Place | None]:
        """Asks for chunks of (key, length) to be produced where they are to be: the receiver's pages, as addresses of this process (or
        of the CUDA device `device`). Fill them, then `put_placed`, or `put` the same chunks; one that has None here, or was
        not filled there, is put from a region.

        Waits for admission at most `patience` seconds; whatever prevents places gives None and loses nothing. Until the `put`, or
        `give_up`, the places are the caller's, whatever becomes of the request; afterwards nothing may be written there."""
        scratch, wait = self._scratch, milliseconds("patience", patience)
        batch, kept = scratch.named(request, receiver, chunks, total, first, last)
        check(lib.kvxfer_outbox_place(self._handle, batch, -1 if device is None else device, wait, scratch.places))
        del kept
        found = _PLACE.iter_unpack(ffi.buffer(scratch.places, len(chunks) * _PLACE.size))
        return [Place(address, length) if address else None for address, length in found]

    def put_placed(self, request: str, after: Fence | None = None) -> None:
        """Puts the chunks that `place` has named, where it gave each one a place: their bytes are there, or will be when a CUDA stream has
        passed `after`. Never waits; nothing of them is read, and no `Released` follows."""
        check(lib.kvxfer_outbox_put_placed(self._handle, c_text(request), fence_of(after)))

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
        return self._taken(
            lib.kvxfer_outbox_next_event(self._handle, milliseconds("timeout", timeout), self._scratch.event)
        )

    def events(self, timeout: float) -> Iterator[Released | Ended]:
        """The next event, and those that are there already when it comes; none when the time is over."""
        while (event := self.next_event(timeout)) is not None:
            more = self._scratch.event.more
            yield event
            if not more:
                return
            timeout = 0.0

    def _taken(self, code: int) -> Released | Ended | None:
        if code == lib.KVXFER_TIMED_OUT:
            return None
        check(code)
        return _read(self._scratch.event)

    def attend(self, at_most: float) -> list[Released | Ended]:
        """The next events for a thread that has nothing to do but wait for them: it looks after the receivers' answers itself, at most so
        many seconds, which spares the time until other threads have been woken for them; and none is for events that come meanwhile.
        Empty when there are none yet."""
        event = self._taken(lib.kvxfer_outbox_attend(self._handle, int(at_most * 1e6), self._scratch.event))
        if event is None:
            return []
        return [event, *self.events(0)] if self._scratch.event.more else [event]

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
    sources = ffi.new(_SOURCES, len(parts))
    kept: list[Any] = [sources]
    for i, (key, region, runs) in enumerate(parts):
        source, text, packed = sources[i], _text(key), ffi.new(_RUNS, list(runs))
        kept += (text, packed)
        source.key, source.runs, source.run_count = text, packed, len(packed)
        if region is not None:
            source.region = region._handle
    batch = ffi.new("kvxfer_batch_t *")
    batch.struct_size = _BATCH_SIZE
    name, where = _text(request), _text(receiver)
    kept += (name, where)
    batch.request, batch.receiver, batch.chunks, batch.count = name, where, sources, len(parts)
    batch.total, batch.first, batch.last = total, first, last
    return batch, kept


def _text(value: str | bytes) -> Any:
    """The bytes as C sees them; Python keeps a NUL behind them."""
    return ffi.from_buffer(c_text(value))
