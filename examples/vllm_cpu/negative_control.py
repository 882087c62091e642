"""The demo's negative control: while the file named by `KVXFER_DEMO_CORRUPT` exists, received cache is zeroed before it is used.

A comparison of tokens means something only where wrong cache changes them. Name the module in `--kv-transfer-config`,

    {"kv_connector": "SpoiltConnector", "kv_connector_module_path": "negative_control", ...}

with this folder on PYTHONPATH. Without the file it is LMCache's connector and nothing else.
"""

import functools
import os

from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

from kvxfer.lmcache.cpu import CpuConnector


class SpoiltConnector(LMCacheConnectorV1):
    """LMCache's connector; its class must live in the module that vLLM is told to load."""


def _spoiling(to_gpu):
    @functools.wraps(to_gpu)
    def batched_to_gpu(self, memory_objs, *args, **kwargs):
        marker = os.environ.get("KVXFER_DEMO_CORRUPT")
        if marker and os.path.exists(marker):
            for memory_obj in memory_objs:
                memory_obj.tensor.zero_()
        return to_gpu(self, memory_objs, *args, **kwargs)

    return batched_to_gpu


CpuConnector.batched_to_gpu = _spoiling(CpuConnector.batched_to_gpu)
