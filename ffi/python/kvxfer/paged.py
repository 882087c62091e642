"""Between an engine's paged cache and contiguous chunks, on the processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvxfer._call import choice
from kvxfer._native import ffi, lib
from kvxfer.errors import check

LAYOUTS = {"vec": lib.KVXFER_PAGED_VEC, "amx": lib.KVXFER_PAGED_AMX}


class PagedChunk(NamedTuple):
    """A contiguous chunk, `[2, layers, tokens, heads * head_size]`, by address; whoever owns the memory keeps it."""

    slots: int
    """Address of an int64 for each token: `block * block_size + place in the block`."""
    tokens: int
    data: int
    length: int
    """Bytes of the chunk."""
    skip: int = 0
    """So many tokens at its start are left alone."""


class PagedCache:
    """A paged cache in host memory, by the addresses of its layers; whoever owns the memory keeps it.

    Each layer is contiguous, `[blocks, heads, 2, block_size * head_size]` elements; `layout` names the order inside: `vec` or `amx`,
    after the kernels of vLLM that use it. `threads` of 0 takes as many as the calling thread has processors, eight at most.
    """

    def __init__(
        self,
        layers: Sequence[int],
        layer_bytes: int,
        *,
        blocks: int,
        heads: int,
        block_size: int,
        head_size: int,
        element_bytes: int,
        layout: str = "vec",
        threads: int = 0,
    ):
        self._layers = ffi.new("void *[]", [ffi.cast("void *", address) for address in layers])
        self._paged = ffi.new("kvxfer_paged_t *")
        self._paged.struct_size = ffi.sizeof("kvxfer_paged_t")
        self._paged.layers, self._paged.layer_count = self._layers, len(layers)
        self._paged.layer_bytes, self._paged.blocks = layer_bytes, blocks
        self._paged.heads, self._paged.block_size, self._paged.head_size = heads, block_size, head_size
        self._paged.element_bytes, self._paged.threads = element_bytes, threads
        self._paged.layout = choice("layout", LAYOUTS, layout)
        # Nothing to copy: only the sizes are checked.
        self.gather([])

    def gather(self, chunks: Sequence[PagedChunk]) -> None:
        """Fills each chunk from its slots. All or nothing where an argument is wrong."""
        check(lib.kvxfer_paged_gather(self._paged, _array(chunks), len(chunks)))

    def scatter(self, chunks: Sequence[PagedChunk]) -> None:
        """Puts each chunk's tokens into their slots; nothing else of the cache changes."""
        check(lib.kvxfer_paged_scatter(self._paged, _array(chunks), len(chunks)))


def _array(chunks: Sequence[PagedChunk]) -> Any:
    array = ffi.new("kvxfer_paged_chunk_t[]", max(1, len(chunks)))
    for i, chunk in enumerate(chunks):
        c = array[i]
        c.slots = ffi.cast("int64_t *", chunk.slots)
        c.tokens, c.skip = chunk.tokens, chunk.skip
        c.data, c.length = ffi.cast("void *", chunk.data), chunk.length
    return array
