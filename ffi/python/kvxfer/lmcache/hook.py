"""Adds kvxfer to LMCache, module by module, at the moment each module is loaded.

LMCache has few extension points for what lies below its cache engine, so a module of LMCache is changed right after it has been
executed, by a function of ours that is named in `ADDITIONS`. Nothing is imported for that: a module that is loaded already
is changed now, one that is never loaded is never changed. vLLM calls `register` in each of its processes, through the
`vllm.general_plugins` entry point that comes with the wheel.

Before a module is changed it is compared with what its addition relies on (`kvxfer.compat`). Where that is not all there, the module
stays as it is, and whoever asks for `transfer_channel: "kvxfer"` is told why instead of getting half of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import threading

from kvxfer import compat
from kvxfer._native import lib
from kvxfer.errors import Unsupported

ADDITIONS = {
    # Module of LMCache: module and function of ours that changes it. The function is called once, with the module.
    "lmcache.v1.config": "kvxfer.lmcache.config:add_translation",
    "lmcache.v1.transfer_channel": "kvxfer.lmcache.hook:add_channel",
    "lmcache.v1.storage_backend.pd_backend_async": "kvxfer.lmcache.hook:add_pd_backend",
    "lmcache.v1.cache_engine": "kvxfer.lmcache.hook:add_to_store",
    "lmcache.integration.vllm.vllm_v1_adapter": "kvxfer.lmcache.hook:add_to_adapter",
    "lmcache.v1.gpu_connector": "kvxfer.lmcache.hook:add_cpu_connector",
    "lmcache.v1.memory_management": "kvxfer.lmcache.memory:add_allocation",
    "lmcache.v1.distributed.transfer_channel.factory": "kvxfer.lmcache.hook:add_factory",
}
CHANNEL = "kvxfer"
_FACTORY = "CreateTransferChannel"
_DONE = "__kvxfer__"
_lock = threading.RLock()
# Module of LMCache, or product: why kvxfer does not work with it here.
refusals: dict[str, str] = {}
_compared: set[str] = set()


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
    name = module.__name__
    _compare_versions()
    why = compat.misfit(module)
    if why is None and not refusals:
        where, function = ADDITIONS[name].split(":")
        getattr(importlib.import_module(where), function)(module)
        return
    if why is not None:
        _refuse(name, why)
    if hasattr(module, _FACTORY):
        _say_why(module)


def _compare_versions() -> None:
    """Says once per process what was not tested, and refuses it where that is wanted."""
    for product in compat.PRODUCTS:
        sentence = None if product.name in _compared else compat.untested(product)
        if sentence is None:
            continue
        _compared.add(product.name)
        try:
            mode = compat.mode()
        except ValueError as e:
            _refuse(compat.VARIABLE, str(e))
            continue
        if mode == "strict":
            _refuse(product.name, f"{sentence}, and {compat.VARIABLE} is strict")
        elif mode == "warn":
            _logger().warning(
                "kvxfer: %s: it is used as it is; what does not fit is refused. Set %s=ignore to be quiet, strict to refuse",
                sentence,
                compat.VARIABLE,
            )


def _refuse(what: str, why: str) -> None:
    refusals[what] = why
    _logger().warning("kvxfer: nothing is added to this LMCache from here on: %s", why)


def check_fit() -> None:
    """Raises where anything was refused: a part of the additions is worse than none."""
    if refusals:
        lmcache = next(p for p in compat.PRODUCTS if p.module == "lmcache")
        raise Unsupported(
            f"transfer_channel: {CHANNEL!r} does not fit this LMCache ({lmcache.installed() or 'of unknown version'}): "
            f"{'; '.join(refusals.values())}. kvxfer was tested with LMCache {', '.join(lmcache.tested)}",
            lib.KVXFER_UNSUPPORTED,
        )


def _ours(module: str, name: str):
    """Something of ours that builds on LMCache's classes."""
    for theirs in ADDITIONS:
        # One that is gone is never loaded, and so was never compared.
        if theirs not in sys.modules and not _exists(theirs):
            _refuse(theirs, f"there is no module {theirs}")
    check_fit()
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as e:
        _refuse(module, f"LMCache lacks what {module} builds on: {e}")
        check_fit()


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _say_why(package) -> None:
    """Leaves the factory of channels as it is, but for those who ask it for ours."""
    original = getattr(package, _FACTORY)

    @functools.wraps(original)
    def create_transfer_channel(*args, **kwargs):
        if CHANNEL in (*args[:1], kwargs.get("channel_type")):
            check_fit()
        return original(*args, **kwargs)

    replace(package, _FACTORY, create_transfer_channel)


def _logger() -> logging.Logger:
    """LMCache's way of logging, where it has been loaded."""
    theirs = getattr(sys.modules.get("lmcache.logging"), "init_logger", logging.getLogger)
    return theirs("kvxfer.lmcache")


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
        return _ours("kvxfer.lmcache.channel", "KvxferChannel")(*args, **kwargs)

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
            return _ours("kvxfer.lmcache.pd", "PdBackend")(config, metadata)

    PDBackendAsync.__doc__ = original.__doc__
    PDBackendAsync.__qualname__ = original.__qualname__
    PDBackendAsync.__module__ = original.__module__
    replace(module, "PDBackendAsync", PDBackendAsync)


def add_factory(module) -> None:
    """Multi-process mode: a transfer engine of our name. What it is made of is loaded when one is made."""

    def factory(**arguments):
        from kvxfer.lmcache.mp import KvxferTransferChannelContext

        return KvxferTransferChannelContext(**arguments)

    module.register_transfer_channel_factory(CHANNEL, factory)


def _our_backend(engine):
    """The PD backend of a cache engine, if it is ours."""
    pd = sys.modules.get("kvxfer.lmcache.pd")
    backend = getattr(getattr(engine, "storage_manager", None), "allocator_backend", None)
    return backend if pd is not None and isinstance(backend, pd.PdBackend) else None


def add_to_store(module) -> None:
    """A store that goes nowhere is not begun (no pages, no copy); one that does is timed, so that what is logged is true, and its
    chunks are known to our backend before LMCache allocates memory for them."""
    original = module.LMCacheEngine.store
    signature = inspect.signature(original)

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
        # On a GPU the pages are filled on this stream, and nobody waits for it.
        stream = getattr(getattr(self, "gpu_connector", None), "store_stream", None)
        database, known = self.token_database, None
        if backend.places_chunks and self.is_healthy() and not self._is_passive() and not self.is_frozen():
            from kvxfer.lmcache.placing import KnownChunks

            named = signature.bind(self, *args, **kwargs).arguments
            of = [named.get(name) for name in ("tokens", "hashes", "offsets", "mask")]
            settings = kwargs.get("request_configs")
            known = KnownChunks(database, database.process_tokens(*of, request_configs=settings))
            self.token_database = known
        try:
            with backend.storing(request, spec, stream, known):
                return original(self, *args, **kwargs)
        finally:
            self.token_database = database

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
    module.LMCacheConnectorV1Impl.request_finished = _without_first_token(
        module.LMCacheConnectorV1Impl.request_finished
    )


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
