"""Where LMCache is not installed, registering the channel costs nothing and changes nothing."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

needs_no_lmcache = pytest.mark.skipif(
    importlib.util.find_spec("lmcache") is not None, reason="LMCache is installed here"
)


def entry_point():
    (found,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "kvxfer")
    return found


def test_the_wheel_brings_the_entry_point_that_vllm_loads():
    assert entry_point().value == "kvxfer.lmcache.hook:register"


@needs_no_lmcache
def test_registering_imports_nothing_and_breaks_nothing():
    script = """
import sys
from importlib.metadata import entry_points
(entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "kvxfer")
register = entry.load()
register(); register()
heavy = {"lmcache", "vllm", "torch"} & set(sys.modules)
assert not heavy, heavy
try:
    import lmcache.v1.transfer_channel
except ModuleNotFoundError as e:
    assert e.name == "lmcache", e
else:
    raise AssertionError("LMCache appeared from nowhere")
import json, kvxfer
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@needs_no_lmcache
def test_the_channel_says_that_lmcache_is_missing():
    with pytest.raises(ModuleNotFoundError, match="lmcache"):
        import kvxfer.lmcache.channel  # noqa: F401
