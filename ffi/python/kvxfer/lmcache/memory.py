"""LMCache's host buffers in memory that peers on the same host can map: one copy between two processes instead of two.

LMCache allocates every host buffer (the PD buffers of its own backends, the local CPU pool) through one pair of functions. Where
the configuration names kvxfer as the channel, buffers come from `kvxfer.SharedMemory`, which the channel's agent recognises by its
address; they are pinned when CUDA is there. Buffers with demands of their own (a NUMA node, a name, explicit huge pages) stay
LMCache's.
"""

from __future__ import annotations

import functools
import os
import sys

from kvxfer.lmcache.hook import CHANNEL, replace

# Address of a buffer: the memory, and whether it is pinned.
_ours: dict[int, tuple] = {}


def add_allocation(module) -> None:
    """Puts our functions in place of LMCache's for the buffers described above."""
    allocate, free = module._allocate_cpu_memory, module._free_cpu_memory

    @functools.wraps(allocate)
    def allocate_cpu_memory(size, numa_mapping=None, shm_name=None, use_hugepages=False):
        if size == 0 or numa_mapping is not None or shm_name is not None or use_hugepages or not _wanted():
            return allocate(size, numa_mapping, shm_name, use_hugepages)
        import kvxfer
        from kvxfer.lmcache.buffer import tensor_over

        try:
            memory = kvxfer.SharedMemory(size)
        except kvxfer.KvxferError as e:
            module.logger.warning(
                "kvxfer: no shareable memory for a buffer of %d bytes, LMCache's own is used: %s", size, e
            )
            return allocate(size, numa_mapping, shm_name, use_hugepages)
        _ours[memory.address] = (memory, _pin(memory.address, size, module.logger))
        module.logger.info("kvxfer: a buffer of %d bytes that peers on this host can map", size)
        return tensor_over(memory.address, size)

    @functools.wraps(free)
    def free_cpu_memory(buffer, size=None, numa_mapping=None, shm_name=None, use_hugepages=False):
        ours = _ours.pop(buffer.data_ptr(), None)
        if ours is None:
            return free(buffer, size, numa_mapping, shm_name, use_hugepages)
        memory, pinned = ours
        if pinned:
            _cudart().cudaHostUnregister(memory.address)
        return None

    replace(module, "_allocate_cpu_memory", allocate_cpu_memory)
    replace(module, "_free_cpu_memory", free_cpu_memory)


def _wanted() -> bool:
    """Whether this process's LMCache moves its caches through kvxfer."""
    if os.environ.get("LMCACHE_TRANSFER_CHANNEL") == CHANNEL:
        return True
    integration = sys.modules.get("lmcache.integration.vllm.utils")
    config = getattr(integration, "_config_instance", None)
    return getattr(config, "transfer_channel", None) == CHANNEL


def _pin(address: int, size: int, logger) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    code = int(_cudart().cudaHostRegister(address, size, 0))
    if code != 0:
        logger.warning(
            "kvxfer: CUDA does not pin a buffer of %d bytes (code %d): copies to and from the GPU are slower",
            size,
            code,
        )
    return code == 0


def _cudart():
    import torch

    return torch.cuda.cudart()
