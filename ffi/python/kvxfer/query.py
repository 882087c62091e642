"""Reading back: which published chunks a receiver still has, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvxfer._call import TRANSPORTS, c_texts, handle, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.agent import Agent
from kvxfer.errors import check, error
from kvxfer.region import Region

_TRANSPORT_NAMES = {number: name for name, number in TRANSPORTS.items() if name}


@dataclass(frozen=True)
class FoundChunk:
    """A chunk that the receiver has."""

    index: int
    """Place of its key in the query."""
    length: int
    """Valid bytes."""
    page: int
    """Its page in the receiver's pool."""
    generation: int
    """Generation of that page."""


@dataclass(frozen=True)
class ReadReport:
    """How reading went."""

    chunks: int
    bytes: int
    took_seconds: float
    """From the call to the certainty that the bytes are good."""
    transport: str


class Found:
    """The answer to `Sender.query`: chunks whose pages the receiver holds, until they are read or this is released. A context
    manager."""

    def __init__(self, agent: Agent, found: Any):
        self._agent, self._handle = agent, found
        count, lease = ffi.new("size_t *"), ffi.new("uint64_t *")
        check(lib.kvxfer_found_count(found, count, lease))
        self.lease: float = lease[0] / 1e3
        """How long they are held, in seconds from the receiver's answer; 0 when nothing is."""
        self.chunks: list[FoundChunk] = []
        """What is there, in the order of the query."""
        chunk = ffi.new("kvxfer_found_chunk_t *")
        chunk.struct_size = ffi.sizeof("kvxfer_found_chunk_t")
        for i in range(count[0]):
            check(lib.kvxfer_found_chunk(found, i, chunk))
            self.chunks.append(FoundChunk(chunk.index, chunk.length, chunk.page, chunk.generation))

    def __len__(self) -> int:
        return len(self.chunks)

    def read(
        self, targets: Iterable[tuple[int, Region, Iterable[tuple[int, int]]]], timeout: float = 10.0
    ) -> ReadReport:
        """Reads chunks and gives everything back; blocks. Targets are (place in the query, region, runs), where runs are (offset,
        length) in the region, in the order of the chunk's bytes. When it returns, every byte is there and is the chunk's; when it
        raises, the targets may hold anything, and nothing changes them any more."""
        if self._handle is None:
            raise error(lib.KVXFER_CLOSED, "what was found has been given back already")
        wanted = [(index, region, list(runs)) for index, region, runs in targets]
        packed, kept = ffi.new("kvxfer_found_target_t[]", len(wanted)), []
        for target, (index, region, places) in zip(packed, wanted, strict=True):
            kept.append(ffi.new("kvxfer_run_t[]", places))
            target.index, target.region, target.runs, target.run_count = index, region._handle, kept[-1], len(places)
        report = ffi.new("kvxfer_read_report_t *")
        report.struct_size = ffi.sizeof("kvxfer_read_report_t")
        check(lib.kvxfer_found_read(self._handle, packed, len(wanted), milliseconds("timeout", timeout), report))
        transport = _TRANSPORT_NAMES.get(report.transport, "none")
        return ReadReport(report.chunks, report.bytes, report.took_ns / 1e9, transport)

    def release(self) -> None:
        """Gives back what is still held. Releasing twice is fine."""
        if self._handle is not None:
            check(lib.kvxfer_found_free(self._handle))
            ffi.gc(self._handle, None)
            self._handle = None

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def query(agent: Agent, sender: Any, keys: Iterable[str], lease: float, timeout: float) -> Found:
    """`Sender.query`, over its handle."""
    (names, kept), count = c_texts(keys)
    arguments = (sender, names, count, milliseconds("lease", lease), milliseconds("timeout", timeout))
    found = Found(agent, handle("kvxfer_found_t", lib.kvxfer_found_free, lib.kvxfer_sender_query, *arguments))
    del kept
    return found
