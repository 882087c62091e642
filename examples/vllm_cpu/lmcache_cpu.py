"""Lets LMCache's in-process connector run on vLLM's CPU backend.

LMCache 0.5.6 brings connectors for GPUs only and refuses a CPU with "No supported cpu connector found.". This module adds the
one missing piece, the copy between vLLM's paged cache and LMCache's memory objects. Cache engine, PD backend, keys, lookup
and the vLLM adapter stay LMCache's own. Nothing installed is edited: name the module in `--kv-transfer-config`,

    {"kv_connector": "LMCacheConnectorCPU", "kv_connector_module_path": "lmcache_cpu", ...}

with this folder on PYTHONPATH.

`KVXFER_DEMO_CORRUPT=FILE` is the demo's negative control: while FILE exists, received cache is zeroed before it is used.
"""

import functools
import os

import lmcache.v1.gpu_connector as gpu_connector
import torch
from lmcache.utils import EngineType
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.memory_management import MemoryFormat
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa


class CpuPagedConnector(GPUConnectorInterface):
    """Copies between vLLM's CPU cache and memory objects of the form `KV_2LTD`: [2, layers, tokens, heads * head_size].

    vLLM's CPU attention keeps a layer as [blocks, heads, block_size, 2 * head_size]. In its `vec` kernels the bytes of one
    (block, head) are K transposed, [head_size, block_size], and then V, [block_size, head_size]. AMX kernels interleave
    pairs of elements instead: such a layout is refused, not guessed.
    """

    def __init__(self, layers, heads, head_size):
        self.layers, self.heads, self.head_size = layers, heads, head_size
        self.kvcaches = None

    def get_shape(self, num_tokens):
        return torch.Size([2, self.layers, num_tokens, self.heads * self.head_size])

    def initialize_kvcaches_ptr(self, **kwargs):
        caches = kwargs.get("kvcaches")
        if caches is not None and caches is not self.kvcaches:
            for cache in caches:
                self._check_layout(cache)
            self.kvcaches = caches

    def from_gpu(self, memory_obj, start, end, **kwargs):
        keys, values = memory_obj.tensor
        shape = (end - start, self.heads * self.head_size)
        for layer, (k, v, block, slot) in enumerate(self._paged(start, end, kwargs)):
            keys[layer] = k[block, :, :, slot].reshape(shape)
            values[layer] = v[block, :, slot].reshape(shape)

    def to_gpu(self, memory_obj, start, end, **kwargs):
        if memory_obj.metadata.fmt != MemoryFormat.KV_2LTD:
            raise ValueError(f"memory object has format {memory_obj.metadata.fmt}, this connector reads KV_2LTD only")
        if _corrupting():
            memory_obj.tensor.zero_()
        keys, values = memory_obj.tensor
        # What vLLM's own prefix cache already holds must not be written again: other requests may be reading it.
        cached = min(end - start, max(0, kwargs.get("vllm_cached_tokens", 0) - start))
        shape = (end - start - cached, self.heads, self.head_size)
        for layer, (k, v, block, slot) in enumerate(self._paged(start + cached, end, kwargs)):
            k[block, :, :, slot] = keys[layer, cached:].reshape(shape)
            v[block, :, slot] = values[layer, cached:].reshape(shape)

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs, starts, ends, **kwargs):
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def _paged(self, start, end, kwargs):
        """Per layer: K as [blocks, heads, head_size, block_size], V as [blocks, heads, block_size, head_size], and for each
        token its block and its place in the block."""
        self.initialize_kvcaches_ptr(**kwargs)
        slots = kwargs["slot_mapping"][start:end].to(torch.long)
        for cache in self.kvcaches:
            blocks, heads, block_size, _ = cache.shape
            halves = cache.view(blocks, heads, 2, block_size * self.head_size)
            k = halves[:, :, 0].unflatten(2, (self.head_size, block_size))
            v = halves[:, :, 1].unflatten(2, (block_size, self.head_size))
            yield k, v, slots // block_size, slots % block_size

    def _check_layout(self, cache):
        if (
            cache.dim() != 4
            or cache.shape[1] != self.heads
            or cache.shape[3] != 2 * self.head_size
            or not cache.is_contiguous()
        ):
            raise ValueError(
                f"vLLM's cache has shape {tuple(cache.shape)} and strides {cache.stride()}; expected a contiguous "
                f"[blocks, {self.heads} heads, block size, {2 * self.head_size}]"
            )
        kernels = _get_attn_isa(cache.dtype, cache.shape[2], self.head_size)
        if kernels != "vec":
            raise ValueError(
                f"vLLM's CPU attention uses its {kernels!r} kernels for {cache.dtype} here, and their cache layout is not known "
                "to this connector (it knows 'vec'). AMX kernels exist for bfloat16 only: start vLLM with --dtype float16"
            )


class LMCacheConnectorCPU(LMCacheConnectorV1):
    """LMCache's connector; its class must live in the module that vLLM is told to load."""


def _corrupting():
    marker = os.environ.get("KVXFER_DEMO_CORRUPT")
    return bool(marker) and os.path.exists(marker)


def _with_cpu(create):
    @functools.wraps(create)
    def create_connector(config, metadata, engine, layout_hints=None):
        if engine != EngineType.VLLM or gpu_connector.torch_device_type != "cpu":
            return create(config, metadata, engine, layout_hints=layout_hints)
        layers, two, _, heads, head_size = metadata.kv_shape
        if two != 2 or config.use_layerwise:
            raise ValueError(
                "the CPU connector moves whole layers of separate keys and values: no MLA, use_layerwise: False"
            )
        return CpuPagedConnector(layers, heads, head_size)

    create_connector.kvxfer_demo = True
    return create_connector


if not getattr(gpu_connector.CreateGPUConnector, "kvxfer_demo", False):
    gpu_connector.CreateGPUConnector = _with_cpu(gpu_connector.CreateGPUConnector)
