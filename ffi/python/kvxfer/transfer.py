"""Transfers: batches of pieces moved in one direction."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from kvxfer._call import TRANSPORTS, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.errors import InvalidArgument, TimedOut, check

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvxfer.agent import Agent
    from kvxfer.region import Region

# (local offset, remote offset, length), or a buffer of unsigned 64-bit numbers, three a piece.
Pieces = Union[Iterable[tuple[int, int, int]], "Buffer"]

# A blocking wait comes back this often so that Ctrl-C is heard.
_SLICE_S = 0.25
_NAMES = {number: name for name, number in TRANSPORTS.items() if name}


@dataclass(frozen=True)
class TransferReport:
    """How a transfer went."""

    transport: str
    """What carried the bytes."""
    bytes: int
    """Bytes moved."""
    pieces: int
    """Pieces in all."""
    failed: int
    """Pieces that failed."""
    seconds: float
    """From submission to the last outcome."""
    code: int
    """0, or the code of the first failure."""


class Transfer:
    """A transfer under way or finished. Can be waited for, polled, awaited and cancelled. Dropping it does not cancel it."""

    def __init__(self, agent: Agent, transfer: Any, count: int, local: Region):
        self._agent, self._handle, self._count = agent, transfer, count
        # The local memory stays while bytes may still move.
        self._local = local

    @property
    def id(self) -> int:
        """Unique within the agent, as logs show it."""
        out = ffi.new("uint64_t *")
        check(lib.kvxfer_transfer_id(self._handle, out))
        return int(out[0])

    @property
    def done(self) -> bool:
        """True once it has ended, well or not: no byte changes any more."""
        return bool(lib.kvxfer_transfer_poll(self._handle) != lib.KVXFER_IN_PROGRESS)

    def poll(self) -> TransferReport | None:
        """None while under way; then the report, or the exception that says why it failed."""
        code = lib.kvxfer_transfer_poll(self._handle)
        if code == lib.KVXFER_IN_PROGRESS:
            return None
        check(code)
        return self.report

    def wait(self, timeout: float | None = None) -> TransferReport:
        """Blocks until it has ended, without the interpreter's lock. `TimedOut` when `timeout` seconds pass first: the transfer then
        goes on until its own deadline, which is also what ends a wait without time-out."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE_S if end is None else min(_SLICE_S, max(0.0, end - time.monotonic()))
            code = lib.kvxfer_transfer_wait(self._handle, milliseconds("timeout", left))
            if code != lib.KVXFER_IN_PROGRESS:
                check(code)
                return self._report()
            if end is not None and time.monotonic() >= end:
                raise TimedOut(f"the transfer did not end within {timeout} s; it goes on", lib.KVXFER_TIMED_OUT)

    def __await__(self) -> Generator[Any, None, TransferReport]:
        return self._agent._events.wait_for(self.poll).__await__()

    def cancel(self) -> bool:
        """Asks it to end. True: it has ended and no byte changes any more. False: not yet; wait for it."""
        code = lib.kvxfer_transfer_cancel(self._handle)
        if code == lib.KVXFER_IN_PROGRESS:
            return False
        check(code)
        return True

    @property
    def report(self) -> TransferReport | None:
        """How it went, once it has ended, also when it failed."""
        return self._report() if self.done else None

    def _report(self) -> TransferReport:
        out = ffi.new("kvxfer_transfer_report_t *")
        out.struct_size = ffi.sizeof("kvxfer_transfer_report_t")
        check(lib.kvxfer_transfer_report(self._handle, out))
        transport = _NAMES.get(out.transport, "unknown")
        return TransferReport(transport, out.bytes, out.pieces, out.failed, out.duration_ns / 1e9, out.result)

    @property
    def outcomes(self) -> list[int]:
        """Per piece: 0, `KVXFER_IN_PROGRESS` (23), or the code of its failure."""
        out = ffi.new("kvxfer_result_t[]", self._count)
        check(lib.kvxfer_transfer_outcomes(self._handle, 0, self._count, out))
        return list(ffi.unpack(out, self._count))

    def __repr__(self) -> str:
        return f"<kvxfer.Transfer {self.id}, {self.report if self.done else 'under way'}>"


def pack(pieces: Pieces) -> tuple[Any, int]:
    """Pieces as the C interface takes them: copied from tuples, or a buffer as it is."""
    try:
        view = memoryview(pieces)  # type: ignore[arg-type]
    except TypeError:
        packed = ffi.new("kvxfer_piece_t[]", [tuple(p) for p in pieces])  # type: ignore[union-attr]
        return packed, len(packed)
    size = ffi.sizeof("kvxfer_piece_t")
    if view.itemsize != 8 or view.format not in ("Q", "L", "=Q", "<Q") or view.nbytes % size:
        raise InvalidArgument(
            f"pieces: a buffer of format {view.format!r} and {view.nbytes} bytes; expected unsigned 64-bit numbers, 3 a piece",
            lib.KVXFER_INVALID_ARGUMENT,
        )
    return ffi.from_buffer("kvxfer_piece_t[]", pieces), view.nbytes // size
