"""Shareable memory that is allocated before anybody knows which agent will use it."""

from __future__ import annotations

from kvxfer._call import handle
from kvxfer._native import ffi, lib
from kvxfer.errors import check


class SharedMemory:
    """`length` zeroed bytes, on huge pages where there are any. An agent that registers exactly this range recognises it, and peers
    on the same host map it. It stays as long as this object, a region or a pool uses it."""

    def __init__(self, length: int):
        self._handle = handle("kvxfer_memory_t", lib.kvxfer_memory_free, lib.kvxfer_memory_new, length)
        self._length = length

    def __len__(self) -> int:
        return self._length

    @property
    def address(self) -> int:
        """Address of the first byte."""
        base = ffi.new("void **")
        check(lib.kvxfer_memory_base(self._handle, base))
        return int(ffi.cast("uintptr_t", base[0]))
