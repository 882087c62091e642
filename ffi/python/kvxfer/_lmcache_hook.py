"""Makes `transfer_channel: "kvxfer"` known to LMCache.

LMCache creates its channels in one function that knows two names. `register` puts a function in its place that knows a third.
Nothing is imported for that: where LMCache is loaded already it is changed now, otherwise at the moment it is loaded, and
where it is never loaded nothing happens. vLLM calls `register` in each of its processes, through the `vllm.general_plugins`
entry point that comes with the wheel.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import threading

CHANNEL = "kvxfer"
_PACKAGE = "lmcache.v1.transfer_channel"
_FACTORY = "CreateTransferChannel"
_lock = threading.Lock()


def register() -> None:
    """Registers the channel in this process. Once, however often it is called."""
    with _lock:
        if _PACKAGE in sys.modules and hasattr(sys.modules[_PACKAGE], _FACTORY):
            _patch(sys.modules[_PACKAGE])
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def _patch(package) -> None:
    """Puts our factory into LMCache's package and into modules that hold LMCache's by name (`from … import …`)."""
    original = getattr(package, _FACTORY, None)
    if original is None or getattr(original, "kvxfer", False):
        return
    ours = _knowing_kvxfer(original)
    setattr(package, _FACTORY, ours)
    for name, module in list(sys.modules.items()):
        if name.startswith("lmcache.") and vars(module).get(_FACTORY) is original:
            setattr(module, _FACTORY, ours)


def _knowing_kvxfer(original):
    @functools.wraps(original)
    def create_transfer_channel(channel_type, *args, **kwargs):
        if channel_type != CHANNEL:
            return original(channel_type, *args, **kwargs)
        from kvxfer.lmcache_channel import KvxferChannel

        return KvxferChannel(*args, **kwargs)

    create_transfer_channel.kvxfer = True
    return create_transfer_channel


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself; sees LMCache's package being loaded and patches it right after."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _PACKAGE:
            return None
        # One package, once: from here on the import system is as it was.
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    """The package's own loader, and then the patch."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        with _lock:
            _patch(module)
