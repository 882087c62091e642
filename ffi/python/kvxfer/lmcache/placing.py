"""A store whose chunks are gathered straight into the decoder's pages.

Where the decoder's pool is mapped in this process (shared memory on a host, CUDA IPC between GPUs' processes), the pages are asked for
before LMCache's connector gathers, and LMCache's memory objects lie in them. The gather is then the transfer, whatever the layout of
the engine's cache and whichever kernel gathers. A chunk that gets no page in time, or is at the decoder already, gets a staging page and
is copied as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    def keys(self) -> list[tuple[str, int]]:
        """Key and tokens of each chunk, in the order in which LMCache allocates them."""
        return [(key.to_string(), end - start) for start, end, key in self._chunks if end > start]


class Places(GivenMemory):
    """The places of one store, and the parent of the memory objects in them: letting go of one does nothing, the page is the decoder's."""

    def __init__(self, request: str, keys: Sequence[str], places: Sequence[Place | None], device: str):
        self.request, self.keys = request, list(keys)
        self._places = [place and (place, _tensor(place, device)) for place in places]
        self._next = 0
        self.put = False

    def next(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
        """The memory object of the next chunk; None where it has no place."""
        at, self._next = self._next, self._next + 1
        place = self._places[at] if at < len(self._places) else None
        if place is None:
            return None
        place, tensor = place
        shapes, dtypes = _as_lists(shapes, dtypes)
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        if size != place.length:
            raise ValueError(
                f"LMCache allocates {size} bytes for chunk {at} of a store, which was named with {place.length}"
            )
        metadata = MemoryObjMetadata(shapes[0], dtypes[0], place.address, size, 1, 0, fmt, shapes=shapes, dtypes=dtypes)
        placed = TensorMemoryObj(tensor, metadata, self)
        placed.kvxfer_placed = True
        return placed

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


def _tensor(place: Place, device: str) -> torch.Tensor:
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
