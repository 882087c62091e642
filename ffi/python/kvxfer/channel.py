"""Sender and receiver: whole requests, reserved, written, checked and published chunk by chunk.

The decoder's side opens a pool of pages; the prefiller's side attaches to it and sends a request's chunks. A chunk is found by
`Receiver.acquire` only once all its bytes have arrived.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from kvxfer._call import INTEGRITY, TRANSPORTS, c_text, choice, handle, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.agent import Agent, Peer, memory_of
from kvxfer.errors import TimedOut, check
from kvxfer.gpu import Fence, fence_of
from kvxfer.query import Found, query
from kvxfer.region import Region

_SLICE_S = 0.25
_TRANSPORT_NAMES = {number: name for name, number in TRANSPORTS.items() if name}
_STATES = {
    lib.KVXFER_LOOKUP_ABSENT: "absent",
    lib.KVXFER_LOOKUP_PENDING: "pending",
    lib.KVXFER_LOOKUP_PRESENT: "present",
}


@dataclass(frozen=True)
class Geometry:
    """What the two sides of a pool must agree on; compared field by field when a sender connects. Empty means "not stated" and is
    compared like any other value."""

    page_bytes: int
    """Bytes of one page: a full chunk's keys and values of this rank."""
    model: str = ""
    dtype: str = ""
    layout: str = ""
    hash_seed: str = ""
    chunk_tokens: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    tp_rank: int = 0
    tp_size: int = 0

    def _c(self) -> tuple[Any, list[Any]]:
        """The struct, and what it points at."""
        out = ffi.new("kvxfer_geometry_t *")
        out.struct_size = ffi.sizeof("kvxfer_geometry_t")
        kept = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                value = ffi.new("char[]", c_text(value))
                kept.append(value)
            setattr(out, field.name, value)
        return out, kept


@dataclass(frozen=True)
class PoolStats:
    """Pages by state, and the queue."""

    pages: int
    free_pages: int
    writing: int
    published: int
    pinned: int
    quarantined: int
    queued: int
    active: int
    advanced: int
    available: int


@dataclass(frozen=True)
class RequestEvent:
    """A request is ready (`code` 0), or it failed, and why."""

    ready: bool
    request: str
    sender: str
    code: int
    text: str


class DeliveryReport(NamedTuple):
    """How a request went."""

    bytes: int
    """Bytes that crossed; chunks already present do not."""
    queued_seconds: float
    """Wait for admission."""
    moved_seconds: float
    """From admission to the receiver's word that all is published."""
    written: int
    present: int
    transport: str


class Receiver:
    """A pool of pages open to senders. A context manager.

    `memory` is the caller's own for the pages (a buffer, or a CPU tensor); otherwise kvxfer allocates it, which peers on the same host
    reach fastest. Zero for a limit means its default.
    """

    def __init__(
        self,
        agent: Agent,
        geometry: Geometry,
        pages: int,
        *,
        pool: str = "kv",
        memory: Any = None,
        max_queue: int = 0,
        lease: float | None = None,
        admission_timeout: float | None = None,
        retention: float | None = None,
    ):
        config = ffi.new("kvxfer_receiver_config_t *")
        config.struct_size = ffi.sizeof("kvxfer_receiver_config_t")
        name = ffi.new("char[]", c_text(pool))
        shape, kept = geometry._c()
        config.pool, config.geometry, config.pages, config.max_queue = name, shape, pages, max_queue
        config.lease_ms = milliseconds("lease", lease)
        config.admission_timeout_ms = milliseconds("admission_timeout", admission_timeout)
        config.retention_ms = milliseconds("retention", retention)
        self._memory = None
        if memory is not None:
            address, length, self._memory = memory_of(memory)
            config.memory, config.memory_length = ffi.cast("void *", address), length
        out = ffi.new("kvxfer_receiver_t **")
        check(lib.kvxfer_receiver_new(agent._handle, config, out))
        self._handle = ffi.gc(out[0], _freeing(self._memory))
        self._agent = agent
        del kept

    def close(self, timeout: float = 5.0) -> None:
        """Refuses new requests, ends the ones under way and waits until the pages are quiet. Closing twice is fine."""
        if self._handle is None:
            return
        check(lib.kvxfer_receiver_close(self._handle, milliseconds("timeout", timeout)))
        check(lib.kvxfer_receiver_free(self._handle))
        ffi.gc(self._handle, None)
        self._handle = self._memory = None

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> int:
        """Address of the first byte of page 0; page i begins `i * page_bytes` after it. Read a page only while its chunk is held."""
        base = ffi.new("void **")
        check(lib.kvxfer_receiver_memory(self._handle, base, ffi.NULL))
        return int(ffi.cast("uintptr_t", base[0]))

    def lookup(self, key: str) -> str:
        """`absent`, `pending` (on its way) or `present` (complete and checked)."""
        state = ffi.new("uint32_t *")
        check(lib.kvxfer_receiver_lookup(self._handle, c_text(key), state, ffi.NULL))
        return _STATES.get(state[0], "absent")

    def acquire(self, key: str) -> Chunk | None:
        """Pins a published chunk; None when there is none of that key (yet)."""
        out = ffi.new("kvxfer_chunk_t **")
        code = lib.kvxfer_receiver_acquire(self._handle, c_text(key), out)
        if code in (lib.KVXFER_IN_PROGRESS, lib.KVXFER_NOT_FOUND):
            return None
        check(code)
        return Chunk(ffi.gc(out[0], lib.kvxfer_chunk_free))

    def remove(self, key: str) -> None:
        """Drops a published chunk; its page is free once nobody has it pinned."""
        check(lib.kvxfer_receiver_remove(self._handle, c_text(key)))

    def wait_request(self, request: str, timeout: float) -> None:
        """Waits until every chunk of the request is published; raises why it failed, or `TimedOut`."""
        check(lib.kvxfer_receiver_wait_request(self._handle, c_text(request), milliseconds("timeout", timeout)))

    def next_event(self, timeout: float) -> RequestEvent | None:
        """The next request that got ready or failed; None when the time is over."""
        event = ffi.new("kvxfer_receiver_event_t *")
        event.struct_size = ffi.sizeof("kvxfer_receiver_event_t")
        code = lib.kvxfer_receiver_next_event(self._handle, milliseconds("timeout", timeout), event)
        if code in (lib.KVXFER_TIMED_OUT, lib.KVXFER_IN_PROGRESS, lib.KVXFER_NOT_FOUND):
            return None
        check(code)
        sender, request, text = (
            ffi.string(field).decode("utf-8", "replace") for field in (event.sender, event.request, event.text)
        )
        return RequestEvent(event.kind == lib.KVXFER_EVENT_READY, request, sender, event.result, text)

    @property
    def stats(self) -> PoolStats:
        out = ffi.new("kvxfer_pool_stats_t *")
        out.struct_size = ffi.sizeof("kvxfer_pool_stats_t")
        check(lib.kvxfer_receiver_stats(self._handle, out))
        return PoolStats(*(getattr(out, field.name) for field in fields(PoolStats)))


def _freeing(memory: Any) -> Callable[[Any], None]:
    def free(receiver: Any) -> None:
        lib.kvxfer_receiver_free(receiver)
        # Held until here: the pool may lie in it.
        _ = memory

    return free


class Chunk:
    """A published chunk, pinned: its bytes stay as they are until it is released. A context manager."""

    def __init__(self, chunk: Any):
        self._handle = chunk

    def __len__(self) -> int:
        return int(self._data()[1])

    @property
    def page(self) -> int:
        """Number of its page."""
        out = ffi.new("uint32_t *")
        check(lib.kvxfer_chunk_page(self._handle, out, ffi.NULL))
        return int(out[0])

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """A copy of valid bytes, also where the pool is a GPU's memory."""
        out = ffi.new("char[]", len(self) - offset if length is None else length)
        check(lib.kvxfer_chunk_read(self._handle, offset, len(out), out))
        return bytes(ffi.buffer(out))

    @property
    def data(self) -> memoryview:
        """The valid bytes, of a pool in host memory. The chunk stays pinned as long as a view of them is in use."""
        address, length = self._data()
        owner = (ctypes.c_ubyte * length).from_address(int(ffi.cast("uintptr_t", address)))
        owner.kvxfer_chunk = self._handle  # type: ignore[attr-defined]
        return memoryview(owner).cast("B").toreadonly()

    def release(self) -> None:
        """Unpins it, as soon as no view of its bytes is in use. Releasing twice is fine."""
        self._handle = None

    def __enter__(self) -> Chunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _data(self) -> tuple[Any, int]:
        data, length = ffi.new("void const **"), ffi.new("uint64_t *")
        check(lib.kvxfer_chunk_data(self._handle, data, length))
        return data[0], length[0]


class Sender:
    """A channel to one receiver's pool; connects again by itself when the receiver was restarted."""

    def __init__(
        self,
        agent: Agent,
        address: str,
        geometry: Geometry,
        *,
        pool: str = "kv",
        request_timeout: float | None = None,
        integrity: str | None = None,
        timeout: float = 10.0,
    ):
        config = ffi.new("kvxfer_sender_config_t *")
        config.struct_size = ffi.sizeof("kvxfer_sender_config_t")
        name = ffi.new("char[]", c_text(pool))
        shape, kept = geometry._c()
        config.pool, config.geometry = name, shape
        config.request_timeout_ms = milliseconds("request_timeout", request_timeout)
        config.integrity = choice("integrity", INTEGRITY, integrity)
        deadline = milliseconds("timeout", timeout)
        free, call = lib.kvxfer_sender_free, lib.kvxfer_sender_connect
        self._handle = handle("kvxfer_sender_t", free, call, agent._handle, c_text(address), config, deadline)
        self._agent = agent
        del kept

    @property
    def peer(self) -> Peer:
        """The receiver's agent."""
        return Peer(self._agent, handle("kvxfer_peer_t", lib.kvxfer_peer_free, lib.kvxfer_sender_peer, self._handle))

    def send(
        self,
        request: str,
        chunks: Iterable[tuple[str, Region, Iterable[tuple[int, int]]]],
        timeout: float | None = None,
    ) -> Delivery:
        """Reserves, writes and commits a request: chunks of (key, region, runs), where runs are (offset, length) in the region, in
        the order of the chunk's bytes. Returns at once; the bytes must not change until the delivery has ended."""
        parts = [(key, region, list(runs)) for key, region, runs in chunks]
        sources, kept = ffi.new("kvxfer_chunk_source_t[]", len(parts)), []
        for source, (key, region, runs) in zip(sources, parts, strict=True):
            text, packed = ffi.new("char[]", c_text(key)), ffi.new("kvxfer_run_t[]", runs)
            kept += [text, packed]
            source.key, source.region, source.runs, source.run_count = text, region._handle, packed, len(runs)
        arguments = (self._handle, c_text(request), sources, len(parts), milliseconds("timeout", timeout))
        delivery = handle("kvxfer_delivery_t", lib.kvxfer_delivery_free, lib.kvxfer_sender_send, *arguments)
        return Delivery(self._agent, delivery, [region for _, region, _ in parts])

    def reserve(self, request: str, chunks: Iterable[tuple[str, int]], timeout: float | None = None) -> Reservation:
        """Declares a request: chunks of (key, valid bytes). Its pages are granted all at once."""
        chunks = list(chunks)
        specs, kept = ffi.new("kvxfer_chunk_spec_t[]", len(chunks)), []
        for spec, (key, length) in zip(specs, chunks, strict=True):
            kept.append(ffi.new("char[]", c_text(key)))
            spec.key, spec.length = kept[-1], length
        arguments = (self._handle, c_text(request), specs, len(chunks), milliseconds("timeout", timeout))
        return Reservation(
            self._agent,
            handle("kvxfer_reservation_t", lib.kvxfer_reservation_free, lib.kvxfer_sender_reserve, *arguments),
        )

    def query(self, keys: Iterable[str], lease: float, timeout: float = 10.0) -> Found:
        """Asks which of these chunks the receiver has published; blocks. Their pages are held for `lease` seconds (at most the
        receiver's own), so that `Found.read` can read them back; 0 only asks and holds nothing."""
        return query(self._agent, self._handle, keys, lease, timeout)


class Reservation:
    """A request under way: declared, then admitted, then written chunk by chunk. One that is dropped before `finish` is aborted."""

    def __init__(self, agent: Agent, reservation: Any):
        self._agent, self._handle = agent, reservation
        self._regions: list[Region] = []

    def wait_admitted(self, timeout: float) -> None:
        """Waits for its pages; raises the refusal, or `TimedOut`: it then goes on waiting until its own deadline."""
        check(lib.kvxfer_reservation_wait_admitted(self._handle, milliseconds("timeout", timeout)))

    def write(self, index: int, region: Region, runs: Iterable[tuple[int, int]], *, after: Fence | None = None) -> None:
        """Writes and commits chunk number `index` from runs of a region, once a CUDA stream has passed `after`. Returns at once."""
        packed = ffi.new("kvxfer_run_t[]", list(runs))
        write = lib.kvxfer_reservation_write_after
        check(write(self._handle, index, region._handle, packed, len(packed), fence_of(after)))
        self._regions.append(region)

    def finish(self) -> Delivery:
        """States that every chunk has been written; the delivery is what remains to be waited for."""
        delivery = handle("kvxfer_delivery_t", lib.kvxfer_delivery_free, lib.kvxfer_reservation_finish, self._handle)
        return Delivery(self._agent, delivery, self._regions)

    def abort(self, why: int = lib.KVXFER_CANCELLED) -> None:
        """Gives the request up."""
        check(lib.kvxfer_reservation_abort(self._handle, why))


class Delivery:
    """A request whose chunks have all been handed over. Can be waited for, polled and awaited."""

    def __init__(self, agent: Agent, delivery: Any, regions: list[Region]):
        self._agent, self._handle, self._regions = agent, delivery, regions

    def poll(self) -> DeliveryReport | None:
        """None while under way; then the report, or the exception that says why it failed."""
        code = lib.kvxfer_delivery_poll(self._handle)
        if code == lib.KVXFER_IN_PROGRESS:
            return None
        check(code)
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> DeliveryReport:
        """Blocks until every chunk is published at the receiver, or raises why not. Without time-out the request's own
        deadline ends it."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE_S if end is None else min(_SLICE_S, max(0.0, end - time.monotonic()))
            report = self._wait(milliseconds("timeout", left))
            if report is not None:
                return report
            if end is not None and time.monotonic() >= end:
                raise TimedOut(f"the request did not end within {timeout} s; it goes on", lib.KVXFER_TIMED_OUT)

    def __await__(self) -> Generator[Any, None, DeliveryReport]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> DeliveryReport:
        # The agent's event descriptor tells of transfers and notifications, not of deliveries: a thread of the loop's pool waits.
        # It ends by the request's deadline, also when this await is cancelled.
        report = self.poll()
        return report if report is not None else await asyncio.get_running_loop().run_in_executor(None, self.wait)

    def _wait(self, timeout_ms: int) -> DeliveryReport | None:
        report = ffi.new("kvxfer_delivery_report_t *")
        report.struct_size = ffi.sizeof("kvxfer_delivery_report_t")
        code = lib.kvxfer_delivery_wait(self._handle, timeout_ms, report)
        if code == lib.KVXFER_IN_PROGRESS:
            return None
        check(code)
        transport = _TRANSPORT_NAMES.get(report.transport, "none")
        return DeliveryReport(
            report.bytes, report.queued_ns / 1e9, report.moved_ns / 1e9, report.written, report.present, transport
        )
