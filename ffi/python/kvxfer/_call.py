"""Small helpers around the C interface: text out, milliseconds in, handles that free themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvxfer._native import ffi, lib
from kvxfer.errors import InvalidArgument, check

INTEGRITY = {
    None: lib.KVXFER_INTEGRITY_DEFAULT,
    "off": lib.KVXFER_INTEGRITY_OFF,
    "bound": lib.KVXFER_INTEGRITY_BOUND,
    "full": lib.KVXFER_INTEGRITY_FULL,
}
TRANSPORTS = {
    None: lib.KVXFER_TRANSPORT_ANY,
    "inproc": lib.KVXFER_TRANSPORT_INPROC,
    "shm": lib.KVXFER_TRANSPORT_SHM,
    "cma": lib.KVXFER_TRANSPORT_CMA,
    "tcp": lib.KVXFER_TRANSPORT_TCP,
    "nixl": lib.KVXFER_TRANSPORT_NIXL,
    "cuda_ipc": lib.KVXFER_TRANSPORT_CUDA_IPC,
}


def choice(argument: str, table: Mapping[Any, int], value: str | None) -> int:
    """A number of the C interface for a word."""
    try:
        return table[value]
    except (KeyError, TypeError):
        words = ", ".join(repr(word) for word in table)
        raise InvalidArgument(f"{argument}: {value!r} is none of {words}", lib.KVXFER_INVALID_ARGUMENT) from None


def milliseconds(argument: str, seconds: float | None) -> int:
    """Milliseconds, rounded up so that a short wait is not none; None is 0, "as configured"."""
    if seconds is None:
        return 0
    if not 0 <= seconds <= lib.KVXFER_MAX_TIMEOUT_MS / 1000:
        raise InvalidArgument(
            f"{argument}: {seconds!r} s; between 0 and one year is possible, and everything ends: wait again instead",
            lib.KVXFER_INVALID_ARGUMENT,
        )
    return int(-(-seconds * 1000 // 1))


def c_text(value: str | bytes) -> bytes:
    """NUL-terminated text."""
    return value.encode() if isinstance(value, str) else value


def c_texts(values: str | Iterable[str]) -> tuple[tuple[Any, Any], int]:
    """An array of texts with what keeps them alive, and its length."""
    kept = [ffi.new("char[]", c_text(v)) for v in ([values] if isinstance(values, str) else values)]
    return (ffi.new("char *[]", kept), kept) if kept else (ffi.NULL, kept), len(kept)


def text_of(call: Callable[..., int], *arguments: Any) -> str:
    """Text from a function that fills a buffer: asked again with more room while the text grows."""
    length = ffi.new("size_t *")
    capacity = 256
    while True:
        buffer = ffi.new("char[]", capacity)
        code = call(*arguments, buffer, capacity, length)
        if code == lib.KVXFER_TOO_LARGE:
            capacity = max(2 * capacity, length[0] + 1024)
            continue
        check(code)
        return bytes(ffi.unpack(buffer, length[0])).decode("utf-8", "replace")


def handle(kind: str, free: Callable[[Any], None], call: Callable[..., int], *arguments: Any) -> Any:
    """A new handle from a function whose last argument is where it goes; freed when the object is."""
    out = ffi.new(f"{kind} **")
    check(call(*arguments, out))
    return ffi.gc(out[0], free)
