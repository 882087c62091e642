"""A store whose chunks are gathered straight into the decoder's pages.

Where the decoder's pool is mapped in this process (shared memory on a host, CUDA IPC between GPUs' processes), the pages are asked for
before LMCache's connector gathers, and LMCache's memory objects lie in them. The gather is then the transfer, whatever the layout of
the engine's cache and whichever kernel gathers. A chunk that gets no page in time, or is at the decoder already, gets a staging page and
is copied as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat, MemoryObj, MemoryObjMetadata, TensorMemoryObj

from kvxfer.lmcache.buffer import GivenMemory, tensor_over
from kvxfer.outbox import Place


class KnownChunks:
    """In the place of a cache engine's token database for one store: the chunks, which it has named already."""

    def __init__(self, database: Any, chunks: Iterable[tuple[int, int, Any]]):
        self._database, self._chunks = database, list(chunks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def process_tokens(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, int, Any]]:
        return iter(self._chunks)

    @property
    def chunks(self) -> list[tuple[Any, int]]:
        """Key and tokens of each chunk, in the order in which LMCache allocates them."""
        return [(key, end - start) for start, end, key in self._chunks if end > start]


class Places(GivenMemory):
    """The places of one store, and the parent of the memory objects in them: letting go of one does nothing, the page is the decoder's."""

    def __init__(self, step: Any, chunks: Sequence[tuple[Any, int]], places: Sequence[Place | None], device: str):
        self.step, self.keys, self.tokens = step, [key for key, _ in chunks], sum(tokens for _, tokens in chunks)
        self._places = [place and (place, _tensor(place, device)) for place in places]
        self._given: list[MemoryObj | None] = []
        self.put = False

    def next(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
        """The memory object of the next chunk; None where it has no place."""
        at = len(self._given)
        given = self._places[at] if at < len(self._places) else None
        placed = None if given is None else self._placed(*given, _as_lists(shapes, dtypes), fmt)
        self._given.append(placed)
        return placed

    def _placed(self, place: Place, tensor: torch.Tensor, of: tuple[list, list], fmt: MemoryFormat) -> MemoryObj:
        shapes, dtypes = of
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        if size != place.length:
            raise ValueError(
                f"LMCache allocates {size} bytes for chunk {len(self._given)} of a store, which was named with {place.length}"
            )
        metadata = MemoryObjMetadata(shapes[0], dtypes[0], place.address, size, 1, 0, fmt, shapes=shapes, dtypes=dtypes)
        placed = TensorMemoryObj(tensor, metadata, self)
        placed.kvxfer_placed = True
        return placed

    def are(self, memory_objs: list[MemoryObj]) -> bool:
        """Whether these are the chunks of the store, each in its place."""
        return len(self._given) == len(self._places) and self._given == memory_objs

    @property
    def bytes(self) -> int:
        return sum(place.length for place, _ in filter(None, self._places))

    def free(self, memory_obj: MemoryObj, allocator_type: str | None = None) -> None:
        memory_obj.invalidate()


def is_placed(memory_obj: MemoryObj) -> bool:
    return getattr(memory_obj, "kvxfer_placed", False)


class _OnDevice:
    """Device memory as torch takes it."""

    def __init__(self, place: Place):
        self.__cuda_array_interface__ = {
            "data": (place.address, False),
            "shape": (place.length,),
            "typestr": "|u1",
            "version": 3,
        }


@lru_cache(maxsize=4096)
def _tensor(place: Place, device: str) -> torch.Tensor:
    """Bytes at an address of this process; the pages of a decoder's pool come again and again."""
    if device == "cpu":
        return tensor_over(place.address, place.length)
    tensor = torch.as_tensor(_OnDevice(place), device=device)
    if tensor.data_ptr() != place.address:
        raise RuntimeError(f"torch made a copy of {place} on {tensor.device}: bytes would not get to the decoder")
    return tensor


def _as_lists(shapes: Any, dtypes: Any) -> tuple[list[torch.Size], list[torch.dtype]]:
    if isinstance(shapes, torch.Size):
        shapes = [shapes]
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes]
    return list(shapes), list(dtypes)
