"""The installed LMCache is one that kvxfer was tested with: every addition fits, and nothing is said about it."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib
from kvxfer.lmcache import register
from kvxfer.lmcache.hook import ADDITIONS, refusals

register()
for name in ADDITIONS:
    importlib.import_module(name)
assert refusals == {}, refusals
print(importlib.import_module("lmcache.v1.transfer_channel").CreateTransferChannel.kvxfer)
"""


@pytest.mark.parametrize("mode", ["warn", "strict"])
def test_the_real_lmcache_is_used_without_a_word(mode):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "KVXFER_COMPAT": mode},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "True"
    said = process.stdout + process.stderr
    assert "not among the versions" not in said and "nothing is added" not in said, said


def test_the_report_agrees():
    process = subprocess.run(
        [sys.executable, "-m", "kvxfer.compat"], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert any(line.startswith("LMCache  0.5.6, tested") for line in lines), lines
