"""Exceptions: one class for all failures, subclasses for those that programs tell apart.

Each carries the stable number of the C interface (`code`), its name (`name`) and whether the same call may succeed later
(`retryable`). Where Python has a class of its own for the situation, ours is one of it: `except TimeoutError` works.
"""

from __future__ import annotations

from typing import Any

from kvxfer._native import ffi, lib


class KvxferError(Exception):
    """A call failed. The text names function, argument, value and remedy."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code

    @property
    def name(self) -> str:
        """Short name of the code, e.g. `timed_out`."""
        return _text(lib.kvxfer_result_name(self.code))

    @property
    def retryable(self) -> bool:
        """True when the same call may succeed later or with another peer."""
        return bool(lib.kvxfer_result_is_retryable(self.code))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self), self.code))


class InvalidArgument(KvxferError, ValueError):
    """An argument is malformed, or a handle freed."""


class NotFound(KvxferError, LookupError):
    """Nothing of that name exists (now)."""


class TimedOut(KvxferError, TimeoutError):
    """The deadline passed first."""


class Cancelled(KvxferError):
    """Cancelled by this side or the peer."""


class PeerGone(KvxferError, ConnectionError):
    """The peer ended, or was replaced by a newer start of itself."""


class Unreachable(KvxferError, ConnectionError):
    """The peer cannot be reached."""


class Mismatch(KvxferError):
    """Both sides differ in version, geometry, page size, model or dtype."""


class Unauthenticated(KvxferError, PermissionError):
    """The peer did not prove that it holds the pre-shared key."""


class OutOfRange(KvxferError, IndexError):
    """An offset and length do not lie inside the region."""


class NoCapacity(KvxferError):
    """Pool, queue or window is full now."""


class TooLarge(KvxferError, ValueError):
    """It can never fit."""


class Corrupt(KvxferError):
    """Bytes arrived damaged."""


class NotAvailable(KvxferError):
    """A library, driver or kernel feature is absent."""


class TransportFailed(KvxferError, ConnectionError):
    """The transport failed underneath."""


class AddressInUse(KvxferError, OSError):
    """The address or port is in use."""


class Closed(KvxferError):
    """The agent is shut down, or this process was forked from the one that made it."""


class Busy(KvxferError, BufferError):
    """In use, and cannot be freed or changed now."""


class Unsupported(KvxferError):
    """This transport, kind of memory or option cannot do that."""


class RequirementNotMet(KvxferError):
    """A configured transport requirement is not met."""


class Stale(KvxferError):
    """The lease, grant or page is of an earlier time."""


_CLASSES: dict[int, type[KvxferError]] = {
    lib.KVXFER_INVALID_ARGUMENT: InvalidArgument,
    lib.KVXFER_NOT_FOUND: NotFound,
    lib.KVXFER_TIMED_OUT: TimedOut,
    lib.KVXFER_CANCELLED: Cancelled,
    lib.KVXFER_PEER_GONE: PeerGone,
    lib.KVXFER_UNREACHABLE: Unreachable,
    lib.KVXFER_MISMATCH: Mismatch,
    lib.KVXFER_UNAUTHENTICATED: Unauthenticated,
    lib.KVXFER_OUT_OF_RANGE: OutOfRange,
    lib.KVXFER_NO_CAPACITY: NoCapacity,
    lib.KVXFER_TOO_LARGE: TooLarge,
    lib.KVXFER_CORRUPT: Corrupt,
    lib.KVXFER_NOT_AVAILABLE: NotAvailable,
    lib.KVXFER_TRANSPORT: TransportFailed,
    lib.KVXFER_ADDRESS_IN_USE: AddressInUse,
    lib.KVXFER_CLOSED: Closed,
    lib.KVXFER_BUSY: Busy,
    lib.KVXFER_UNSUPPORTED: Unsupported,
    lib.KVXFER_REQUIREMENT: RequirementNotMet,
    lib.KVXFER_STALE: Stale,
}


def error(code: int, text: str) -> KvxferError:
    """The exception for a code."""
    return _CLASSES.get(code, KvxferError)(text, code)


def check(code: int) -> None:
    """Raises what the last call on this thread answered, unless that was success."""
    if code != lib.KVXFER_OK:
        raise error(code, _text(lib.kvxfer_last_error()) or _text(lib.kvxfer_result_name(code)))


def _text(pointer: Any) -> str:
    return ffi.string(pointer).decode("utf-8", "replace")
