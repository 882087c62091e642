"""Adds kvxfer to LMCache, module by module, at the moment each module is loaded.

LMCache has few extension points for what lies below its cache engine, so a module of LMCache is changed right after it has been
executed, by a function of ours that is named in `ADDITIONS`. Nothing is imported for that: a module that is loaded already
is changed now, one that is never loaded is never changed. vLLM calls `register` in each of its processes, through the
`vllm.general_plugins` entry point that comes with the wheel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import threading

ADDITIONS = {
    # Module of LMCache: module and function of ours that changes it. The function is called once, with the module.
    "lmcache.v1.config": "kvxfer.lmcache.config:add_translation",
    "lmcache.v1.transfer_channel": "kvxfer.lmcache.hook:add_channel",
    "lmcache.v1.storage_backend.pd_backend_async": "kvxfer.lmcache.hook:add_pd_backend",
    "lmcache.v1.cache_engine": "kvxfer.lmcache.hook:add_to_store",
    "lmcache.integration.vllm.vllm_v1_adapter": "kvxfer.lmcache.hook:add_to_adapter",
    "lmcache.v1.gpu_connector": "kvxfer.lmcache.hook:add_cpu_connector",
    "lmcache.v1.memory_management": "kvxfer.lmcache.memory:add_allocation",
}
CHANNEL = "kvxfer"
_FACTORY = "CreateTransferChannel"
_DONE = "__kvxfer__"
_lock = threading.RLock()


def register() -> None:
    """Registers kvxfer in this process. Once, however often it is called."""
    with _lock:
        for name in ADDITIONS:
            # One that is just being loaded is not there yet; the finder sees to it, or a later call.
            if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
                _add(sys.modules[name])
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def _add(module) -> None:
    """Applies the addition for a loaded module, once."""
    if vars(module).get(_DONE):
        return
    setattr(module, _DONE, True)
    where, function = ADDITIONS[module.__name__].split(":")
    getattr(importlib.import_module(where), function)(module)


def replace(module, name: str, ours) -> None:
    """Puts `ours` in place of an attribute of `module`, and of what other modules of LMCache took from it by name before."""
    original = getattr(module, name)
    setattr(module, name, ours)
    for other, loaded in list(sys.modules.items()):
        if other.startswith("lmcache.") and vars(loaded).get(name) is original:
            setattr(loaded, name, ours)


def add_channel(package) -> None:
    """`transfer_channel: "kvxfer"`: LMCache creates its channels in one function that knows two names; ours knows a third."""
    original = getattr(package, _FACTORY)

    @functools.wraps(original)
    def create_transfer_channel(channel_type, *args, **kwargs):
        if channel_type != CHANNEL:
            return original(channel_type, *args, **kwargs)
        from kvxfer.lmcache.channel import KvxferChannel

        return KvxferChannel(*args, **kwargs)

    create_transfer_channel.kvxfer = True
    replace(package, _FACTORY, create_transfer_channel)


def takes_pd(config, metadata) -> bool:
    """Whether the PD backend is ours: kvxfer is the channel, and nobody asks for one of LMCache's own by its mode."""
    overrides = getattr(metadata, "kv_connector_extra_config", None) or {}
    stated = "pd_backend_mode" in getattr(config, "_user_set_keys", ()) or "lmcache.pd_backend_mode" in overrides
    return config.transfer_channel == CHANNEL and not stated


def add_pd_backend(module) -> None:
    """The default PD backend: LMCache makes one of this class where `pd_backend_mode` is not "sync"."""
    original = module.PDBackendAsync

    class PDBackendAsync(original):
        def __new__(cls, config, metadata, *args, **kwargs):
            if not takes_pd(config, metadata):
                return super().__new__(cls)
            from kvxfer.lmcache.pd import PdBackend

            return PdBackend(config, metadata)

    PDBackendAsync.__doc__ = original.__doc__
    PDBackendAsync.__qualname__ = original.__qualname__
    PDBackendAsync.__module__ = original.__module__
    replace(module, "PDBackendAsync", PDBackendAsync)


def _our_backend(engine):
    """The PD backend of a cache engine, if it is ours."""
    pd = sys.modules.get("kvxfer.lmcache.pd")
    backend = getattr(getattr(engine, "storage_manager", None), "allocator_backend", None)
    return backend if pd is not None and isinstance(backend, pd.PdBackend) else None


def add_to_store(module) -> None:
    """A store that goes nowhere is not begun (no pages, no copy); one that does is timed, so that what is logged is true."""
    original = module.LMCacheEngine.store

    @functools.wraps(original)
    def store(self, *args, **kwargs):
        backend = _our_backend(self)
        if backend is None:
            return original(self, *args, **kwargs)
        request = kwargs.get("req_id")
        spec = backend.spec_for(request, kwargs.get("transfer_spec"))
        if spec is None:
            return None
        kwargs["transfer_spec"] = spec
        done, mask = backend.handed_over(request, spec), kwargs.get("mask")
        if done and mask is not None and done <= len(mask):
            kwargs["mask"] = mask = mask.clone()
            mask[:done] = False
            kwargs["offset"] = max(done, kwargs.get("offset") or 0)
        with backend.storing(request, spec):
            return original(self, *args, **kwargs)

    module.LMCacheEngine.store = store


def add_to_adapter(module) -> None:
    """Requests that vLLM has finished or aborted: what they still hold on either side is given back, and the engine survives."""
    original = module.LMCacheConnectorV1Impl.get_finished

    @functools.wraps(original)
    def get_finished(self, finished_req_ids):
        engine = self.lmcache_engine
        backend = _our_backend(engine)
        if backend is not None and finished_req_ids:
            for request in finished_req_ids:
                engine.lookup_unpin(request)
            backend.vllm_finished(finished_req_ids)
        return original(self, finished_req_ids)

    module.LMCacheConnectorV1Impl.get_finished = get_finished
    module.LMCacheConnectorV1Impl.request_finished = _without_first_token(module.LMCacheConnectorV1Impl.request_finished)


def _without_first_token(original):
    """A request that was aborted before its first token has none to hand over; asked for it, LMCache ends the whole engine."""

    @functools.wraps(original)
    def request_finished(self, request, block_ids):
        params = getattr(request, "kv_transfer_params", None)
        if isinstance(params, dict) and "ret_first_tok" in params and not request._output_token_ids:
            request.kv_transfer_params = {k: v for k, v in params.items() if k != "ret_first_tok"}
        return original(self, request, block_ids)

    return request_finished


def add_cpu_connector(package) -> None:
    """vLLM on CPUs: where LMCache finds no connector to its cache, it gets ours. One that it does find stays."""
    original = package.CreateGPUConnector

    @functools.wraps(original)
    def create_gpu_connector(config, metadata, engine, *args, **kwargs):
        try:
            return original(config, metadata, engine, *args, **kwargs)
        except RuntimeError as e:
            if package.torch_device_type != "cpu" or engine != package.EngineType.VLLM or "No supported" not in str(e):
                raise
        from kvxfer.lmcache.cpu import CpuConnector

        return CpuConnector(config, metadata)

    replace(package, "CreateGPUConnector", create_gpu_connector)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself; sees a module of LMCache being loaded and adds to it right after."""

    def __init__(self):
        self._searching = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in ADDITIONS or getattr(self._searching, "now", False):
            return None
        # The other finders find it; this one must not be asked again meanwhile.
        self._searching.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then the addition."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        with _lock:
            _add(module)
