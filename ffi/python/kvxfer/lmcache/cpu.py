"""LMCache's connector to vLLM's paged cache on CPUs, which LMCache itself does not have.

LMCache 0.5.6 answers "No supported cpu connector found." where vLLM runs on its CPU backend. This is the missing piece: it copies
between vLLM's cache and LMCache's memory objects of the form `KV_2LTD`, all chunks of a request in one call, on several threads.

In which order vLLM keeps the elements of a block depends on its attention kernels; `docs/cpu_connector.md` has what was seen. A cache
whose order is not known is refused with its name before anything is copied.

Settings, below `extra_config: kvxfer:` in LMCache's YAML: `cpu: {threads: N}`; by default one for each processor that vLLM computes on,
eight at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from kvxfer.lmcache.settings import cpu_threads
from kvxfer.paged import PagedCache, PagedChunk

logger = init_logger(__name__)

# Names that vLLM gives its attention kernels, and the order in which they keep a block. The others (neon, rvv, vsx, vxe) were not seen.
_LAYOUTS = {"vec": "vec", "vec16": "vec", "amx": "amx"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CpuConnector(GPUConnectorInterface):
    """One for each worker; its calls come from the worker's own thread."""

    def __init__(self, config: Any, metadata: Any):
        if config.use_layerwise:
            raise ValueError("use_layerwise: True; kvxfer's CPU connector copies whole requests: set it to False")
        if getattr(metadata, "use_mla", False) or metadata.kv_shape[1] != 2:
            raise ValueError(
                f"the model keeps one latent vector a token (MLA, KV shape {tuple(metadata.kv_shape)}); kvxfer's CPU connector knows "
                "separate keys and values only"
            )
        self.layers, _, _, self.heads, self.head_size = (int(n) for n in metadata.kv_shape)
        self.kvcaches: list[torch.Tensor] = []
        self._threads = cpu_threads(config)
        self._known: tuple[Any, ...] = ()
        self._cache: PagedCache | None = None
        self._processors: set[int] = set()

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, self.layers, num_tokens, self.heads * self.head_size])

    def initialize_kvcaches_ptr(self, **kwargs: Any) -> None:
        """Looks at vLLM's cache; again only when it is another one."""
        caches = kwargs.get("kvcaches")
        if caches is None:
            return
        known = tuple((cache.data_ptr(), cache.shape, cache.stride(), cache.dtype) for cache in caches)
        if known != self._known:
            self._cache, self._processors = self._describe(caches), _pinned()
            self.kvcaches, self._known = list(caches), known

    def from_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        self.batched_from_gpu([memory_obj], [start], [end], **kwargs)

    def to_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        self.batched_to_gpu([memory_obj], [start], [end], **kwargs)

    def batched_from_gpu(
        self, memory_objs: Sequence[MemoryObj], starts: Sequence[int], ends: Sequence[int], **kwargs: Any
    ) -> None:
        cache, slots = self._paged(kwargs)
        chunks = [self._chunk(*one, slots) for one in zip(memory_objs, starts, ends, strict=True)]
        with _also_on(self._processors):
            cache.gather(chunks)

    def batched_to_gpu(
        self, memory_objs: Sequence[MemoryObj], starts: Sequence[int], ends: Sequence[int], **kwargs: Any
    ) -> None:
        cache, slots = self._paged(kwargs)
        # What vLLM's own prefix cache already holds must not be written again: other requests may be reading it.
        held = kwargs.get("vllm_cached_tokens", 0)
        chunks = [self._chunk(*one, slots, held) for one in zip(memory_objs, starts, ends, strict=True)]
        with _also_on(self._processors):
            cache.scatter(chunks)

    def _paged(self, kwargs: dict[str, Any]) -> tuple[PagedCache, torch.Tensor]:
        """The cache, and the slots of the whole token sequence."""
        self.initialize_kvcaches_ptr(**kwargs)
        if self._cache is None:
            raise ValueError("kvcaches is missing: vLLM's cache is not known yet")
        if "slot_mapping" not in kwargs:
            raise ValueError("slot_mapping is missing: where the tokens are in vLLM's cache")
        return self._cache, kwargs["slot_mapping"].to("cpu", torch.int64).contiguous()

    def _chunk(self, memory_obj: MemoryObj, start: int, end: int, slots: torch.Tensor, held: int = 0) -> PagedChunk:
        if memory_obj.metadata.fmt != MemoryFormat.KV_2LTD:
            raise ValueError(f"a memory object of format {memory_obj.metadata.fmt}; the CPU connector knows KV_2LTD")
        tensor, shape, dtype = memory_obj.tensor, self.get_shape(end - start), self.kvcaches[0].dtype
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            found = None if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"a memory object of shape {found}; {end - start} tokens are {tuple(shape)} of {dtype}")
        if not 0 <= start <= end <= len(slots):
            raise ValueError(f"tokens {start} to {end}, but slot_mapping has {len(slots)}")
        return PagedChunk(
            slots.data_ptr() + start * slots.element_size(),
            end - start,
            tensor.data_ptr(),
            tensor.numel() * tensor.element_size(),
            min(end - start, max(0, held - start)),
        )

    def _describe(self, caches: Sequence[torch.Tensor]) -> PagedCache:
        if len(caches) != self.layers:
            raise ValueError(f"vLLM's cache has {len(caches)} layers, LMCache was told of {self.layers}")
        first = caches[0]
        for i, cache in enumerate(caches):
            if cache.device.type != "cpu" or cache.dtype not in _DTYPES:
                raise ValueError(
                    f"vLLM's cache has {cache.dtype} on {cache.device} in layer {i}; kvxfer's CPU connector knows float16, bfloat16 and "
                    "float32 on cpu (no --kv-cache-dtype fp8)"
                )
            shaped = cache.dim() == 4 and cache.shape[1] == self.heads and cache.shape[3] == 2 * self.head_size
            if not shaped or not cache.is_contiguous() or cache.shape != first.shape or cache.dtype != first.dtype:
                raise ValueError(
                    f"vLLM's cache has shape {tuple(cache.shape)} and strides {cache.stride()} in layer {i}; kvxfer's CPU connector knows "
                    f"[blocks, {self.heads} heads, block size, {2 * self.head_size}], contiguous and the same in all layers"
                )
        blocks, _, block_size, _ = first.shape
        kernels = attention_kernels(first.dtype, block_size, self.head_size)
        layout = _LAYOUTS.get(kernels)
        if layout is None:
            raise ValueError(
                f"vLLM's CPU attention uses its {kernels!r} kernels for {first.dtype} here, and how these keep a block is not known to "
                f"kvxfer; known are {', '.join(_LAYOUTS)}"
            )
        cache = PagedCache(
            [cache.data_ptr() for cache in caches],
            first.numel() * first.element_size(),
            blocks=blocks,
            heads=self.heads,
            block_size=block_size,
            head_size=self.head_size,
            element_bytes=first.element_size(),
            layout=layout,
            threads=self._threads,
        )
        logger.info(
            "kvxfer: CPU connector, %d layers of %d blocks of %d tokens, %d heads of %d, %s, %s kernels",
            self.layers,
            blocks,
            block_size,
            self.heads,
            self.head_size,
            first.dtype,
            kernels,
        )
        return cache


def attention_kernels(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """The name of the kernels that vLLM's CPU attention takes; it decides by type, sizes and processor."""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError as e:
        raise ValueError(
            f"this vLLM does not tell which CPU attention kernels it uses ({e}), and the order of its cache depends on them; kvxfer knows "
            "vLLM 0.32"
        ) from e
    return _get_attn_isa(dtype, block_size, head_size)


@contextlib.contextmanager
def _also_on(processors: set[int]) -> Iterator[None]:
    """Lets the calling thread, and those that start meanwhile, run wherever vLLM computes.

    vLLM pins each of its compute threads to a processor of its own, the calling one too, and the others are idle while this one
    copies. A thread that is not pinned is left alone.
    """
    own = os.sched_getaffinity(0)
    wider = own
    if len(own) == 1 and not processors <= own:
        with contextlib.suppress(OSError):  # processors that have been taken away: one is enough
            os.sched_setaffinity(0, processors | own)
            wider = processors | own
    try:
        yield
    finally:
        if wider != own:
            os.sched_setaffinity(0, own)


def _pinned() -> set[int]:
    """The processors that have a thread of this process pinned to them."""
    pinned: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            processors = os.sched_getaffinity(int(thread))
        except OSError:
            continue  # it has ended
        if len(processors) == 1:
            pinned |= processors
    return pinned
