"""Between paged caches and chunks on a GPU, of any two layouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvxfer._call import handle, milliseconds
from kvxfer._native import ffi, lib
from kvxfer.errors import TooLarge, check
from kvxfer.gpu import Fence, fence_of
from kvxfer.region import Region


@dataclass(frozen=True)
class Layout:
    """One layer of a cache in memory. Strides and `head_bytes` are bytes; `docs/kernels.md` has the shapes of engines."""

    planes: int
    """2: keys and values; 1: one of something (multi-head latent attention)."""
    plane: int
    blocks: int
    block_tokens: int
    block: int
    token: int
    heads: int
    head: int
    head_bytes: int

    @classmethod
    def paged(
        cls,
        blocks: int,
        block_tokens: int,
        heads: int,
        head_bytes: int,
        *,
        kv_first: bool = True,
        heads_first: bool = False,
    ) -> Layout:
        """`[2, blocks, block, heads, head]`, or `[blocks, 2, …]` without `kv_first`; with `heads_first` heads come before tokens."""
        half = block_tokens * heads * head_bytes
        plane, block = (blocks * half, half) if kv_first else (half, 2 * half)
        token, head = (head_bytes, block_tokens * head_bytes) if heads_first else (heads * head_bytes, head_bytes)
        return cls(2, plane, blocks, block_tokens, block, token, heads, head, head_bytes)

    @classmethod
    def chunk(cls, layers: int, tokens: int, heads: int, head_bytes: int) -> Layout:
        """A layer of a chunk `[2, layers, tokens, heads * head]` (LMCache's `KV_2LTD`); layer i begins `i * tokens * heads * head_bytes`
        after the chunk."""
        row = heads * head_bytes
        return cls(2, layers * tokens * row, 1, tokens, 0, row, heads, head_bytes, head_bytes)


@dataclass(frozen=True)
class View:
    """Layers in a region, by their offsets, and which of their tokens: of a table of blocks (from token `first` of the first on), by
    slots, or one after the other from `first` on."""

    region: Region
    layout: Layout
    layers: Sequence[int]
    table: Sequence[int] | None = None
    slots: Sequence[int] | None = None
    first: int = 0

    @classmethod
    def chunk(cls, region: Region, layers: int, tokens: int, heads: int, head_bytes: int, offset: int = 0) -> View:
        """All tokens of a chunk `[2, layers, tokens, heads * head]` at `offset`."""
        step = tokens * heads * head_bytes
        at = [offset + i * step for i in range(layers)]
        return cls(region, Layout.chunk(layers, tokens, heads, head_bytes), at)

    def _c(self) -> tuple[Any, list[Any]]:
        view = ffi.new("kvxfer_view_t *")
        view.struct_size = ffi.sizeof("kvxfer_view_t")
        kept = [ffi.new("uint64_t[]", list(self.layers))]
        view.region, view.layers, view.layer_count = self.region._handle, kept[0], len(self.layers)
        for name in ("plane", "block", "token", "head", "head_bytes", "planes", "blocks", "block_tokens", "heads"):
            setattr(view, name, getattr(self.layout, name))
        if self.table is not None:
            kept.append(ffi.new("uint32_t[]", list(self.table)))
            view.table, view.table_count = kept[-1], len(self.table)
        if self.slots is not None:
            kept.append(ffi.new("int64_t[]", list(self.slots)))
            view.slots, view.slot_count = kept[-1], len(self.slots)
        view.first = self.first
        return view, kept


class Gather:
    """`tokens` tokens from one view to another, checked when it is made, started as often as wanted."""

    def __init__(self, source: View, target: View, tokens: int):
        one, kept = source._c()
        other, also_kept = target._c()
        free, new = lib.kvxfer_gather_free, lib.kvxfer_gather_new
        self._handle = handle("kvxfer_gather_t", free, new, one, other, tokens)
        self._regions = (source.region, target.region)
        del kept, also_kept

    def start(self, *, after: Fence | None = None, digest: bool = False) -> None:
        """Starts it on the GPU, once a CUDA stream has passed `after`. Does not wait."""
        check(lib.kvxfer_gather_start(self._handle, fence_of(after), digest))

    def wait(self, timeout: float = 10.0) -> tuple[int, int]:
        """Waits for the end: bytes moved, and the digest (0 where none was asked for)."""
        moved, digest = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.kvxfer_gather_wait(self._handle, max(1, milliseconds("timeout", timeout)), moved, digest))
        return int(moved[0]), int(digest[0])

    def pieces(self) -> Iterable[tuple[int, int, int]]:
        """The same as pieces for `Peer.write`, from the source's region to the target's."""
        count = ffi.new("size_t *")
        try:
            check(lib.kvxfer_gather_pieces(self._handle, ffi.NULL, 0, count))
        except TooLarge:
            pass
        pieces = ffi.new("kvxfer_piece_t[]", count[0])
        check(lib.kvxfer_gather_pieces(self._handle, pieces, count[0], count))
        return [(p.local_offset, p.remote_offset, p.length) for p in pieces]
