"""`transfer_channel: "kvxfer"` becomes known to the real LMCache, whatever is imported first."""

import subprocess
import sys

import pytest

BACKENDS = [
    "lmcache.v1.storage_backend.pd_backend",
    "lmcache.v1.storage_backend.pd_backend_async",
    "lmcache.v1.storage_backend.p2p_backend",
]
CHECK = """
import importlib, sys
import lmcache.v1.transfer_channel as package
ours = package.CreateTransferChannel
assert getattr(ours, "kvxfer", False)
for name in {backends}:
    assert importlib.import_module(name).CreateTransferChannel is ours, name
assert not getattr(ours.__wrapped__, "kvxfer", False), "wrapped twice"
try:
    ours("carrier pigeon", False, "both", 0, 0, 0, 0, "")
except AssertionError as e:
    assert "carrier pigeon" in str(e)
else:
    raise AssertionError("LMCache's own check is gone")
assert package.__spec__.loader is not None
"""


def run(script):
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("before", [False, True], ids=["registered before LMCache is loaded", "after"])
def test_every_backend_gets_the_channel(before):
    first = "".join(f"import {name}\n" for name in BACKENDS) if before else ""
    register = "from kvxfer.lmcache.hook import register\nregister()\nregister()\n"
    lazily = "" if before else "import sys\nassert 'lmcache' not in sys.modules and 'torch' not in sys.modules\n"
    run(first + register + lazily + CHECK.format(backends=BACKENDS))


def test_vllm_registers_it_through_the_entry_point():
    run(
        "from vllm.plugins import load_general_plugins\nload_general_plugins()\n" + CHECK.format(backends=BACKENDS),
    )


def test_the_documented_way_without_vllm():
    run("from kvxfer.lmcache import register\nregister()\n" + CHECK.format(backends=BACKENDS))
