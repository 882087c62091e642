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
    "lmcache.v1.transfer_channel": "kvxfer.lmcache.hook:add_channel",
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
