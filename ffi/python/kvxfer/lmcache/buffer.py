"""Memory objects of LMCache over memory of kvxfer: the prefiller's staging pages, and the decoder's received chunks."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lmcache.v1.memory_allocators.paged_cpu_gpu_memory_allocator import PagedCpuGpuMemoryAllocator
from lmcache.v1.memory_allocators.paged_tensor_memory_allocator import PagedTensorMemoryAllocator
from lmcache.v1.memory_management import (
    MemoryAllocatorInterface,
    MemoryFormat,
    MemoryObj,
    MemoryObjMetadata,
    TensorMemoryObj,
)

from kvxfer.agent import Agent
from kvxfer.channel import Chunk
from kvxfer.lmcache import settings
from kvxfer.region import Region

# A page that is being sent comes back within this, unless its request waits for the decoder.
_MOMENT_S = 0.05


def tensor_over(address: int, length: int) -> torch.Tensor:
    """The bytes as a flat tensor; whoever owns the memory outlives it."""
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)


def gpu_buffer(c: settings.PdConfig) -> torch.Tensor:
    """The buffer on a GPU: LMCache's own way of allocating it, so that its kernels and torch know it."""
    return torch.empty(c.buffer_bytes, dtype=torch.uint8, device=c.device)


def buffer_of(agent: Agent, c: settings.PdConfig) -> tuple[Region, torch.Tensor]:
    """The prefiller's pages: shareable host memory, or a GPU's."""
    if c.device != "cpu":
        tensor = gpu_buffer(c)
        return agent.register(tensor), tensor
    region = agent.allocate(c.buffer_bytes)
    return region, tensor_over(region.address, c.buffer_bytes)


def valid_bytes(memory_object: MemoryObj) -> int:
    """Bytes of the object that mean something; they are a prefix of its page.

    `get_size()` is what a caller has narrowed the object to, but for a partial chunk on a reused page it still tells the whole
    page; the metadata's own size knows better.
    """
    return min(memory_object.get_size(), memory_object.meta.get_size())


class Staging(PagedCpuGpuMemoryAllocator):
    """LMCache's paged allocator over a buffer of kvxfer, which can wait for a page, and tells when waiting is of no use."""

    def __init__(self, buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, fmt: MemoryFormat):
        super().__init__()
        self.cpu_allocator = PagedTensorMemoryAllocator(buffer, [torch.Size(shape)], [dtype], fmt)
        self.align_bytes = self.cpu_allocator.align_bytes
        self.pages = len(self.cpu_allocator.paged_buffers)
        self._freed = threading.Condition()

    def wait_allocate(
        self,
        shapes: Any,
        dtypes: Any,
        fmt: MemoryFormat,
        timeout: float,
        may_come: Callable[[], bool],
        make_room: Callable[[], bool],
    ) -> MemoryObj | None:
        """A page, waited for as long as `may_come` says that one will be given back; None otherwise. `make_room` is asked for one
        when none has come for a moment."""
        deadline = time.monotonic() + timeout
        while True:
            page = self.cpu_allocator.allocate(shapes, dtypes, fmt)
            if page is not None:
                return page
            with self._freed:
                if self.cpu_allocator.free_blocks:
                    continue
                left = deadline - time.monotonic()
                if left <= 0 or not may_come():
                    return None
                came = self._freed.wait(min(left, _MOMENT_S))
            # Outside the lock: what makes room gives pages back on another thread.
            if not came:
                make_room()

    def close(self) -> None:
        """The buffer is kvxfer's and goes with its region; objects that are not in use must not come back to it."""
        for page in self.cpu_allocator.free_blocks:
            page.invalidate()

    def page_freed(self) -> None:
        """Wakes who waits for a page, or for the news that none will come."""
        with self._freed:
            self._freed.notify_all()


class GivenMemory(MemoryAllocatorInterface):
    """The parent of memory objects whose memory others allocate and fill: it has none to give."""

    def allocate(
        self, shapes: Any, dtypes: Any, fmt: Any = None, allocator_type: str | None = None
    ) -> MemoryObj | None:
        return None

    def batched_allocate(
        self, shapes: Any, dtypes: Any, batch_size: int, fmt: Any = None, allocator_type: str | None = None
    ) -> list[MemoryObj] | None:
        return None

    def batched_free(
        self, memory_objs: list[MemoryObj], allocator_type: str | None = None, update_stats: bool = True
    ) -> None:
        for memory_obj in memory_objs:
            self.free(memory_obj)


class ReceivedChunks(GivenMemory):
    """The parent of memory objects that lie in the receiver's pool: freeing one lets go of its chunk."""

    def __init__(
        self, pool: torch.Tensor, page_bytes: int, shape: tuple[int, ...], dtype: torch.dtype, fmt: MemoryFormat
    ):
        self._pool, self._page_bytes = pool, page_bytes
        self._shape, self._dtype, self._fmt = tuple(shape), dtype, fmt
        self._token_dim = fmt.token_dim()
        self._token_bytes = page_bytes // shape[self._token_dim]

    def wrap(self, chunk: Chunk) -> MemoryObj:
        """A pinned chunk as a memory object with one reference."""
        length, page = len(chunk), chunk.page
        tokens, rest = divmod(length, self._token_bytes)
        if rest or not tokens:
            raise ValueError(f"a chunk of {length} bytes; one token has {self._token_bytes}")
        shape = list(self._shape)
        shape[self._token_dim] = tokens
        size = torch.Size(shape)
        begin = page * self._page_bytes
        metadata = MemoryObjMetadata(
            size, self._dtype, page, self._page_bytes, 1, 0, self._fmt, shapes=[size], dtypes=[self._dtype]
        )
        received = TensorMemoryObj(self._pool[begin : begin + length], metadata, self)
        received.kvxfer_chunk = chunk
        return received

    def free(self, memory_obj: MemoryObj, allocator_type: str | None = None) -> None:
        chunk = getattr(memory_obj, "kvxfer_chunk", None)
        if chunk is not None:
            memory_obj.invalidate()
            memory_obj.kvxfer_chunk = None
            chunk.release()
