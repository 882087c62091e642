"""The guides' files, copied as they are, through LMCache's own loader."""

import pathlib
import subprocess
import sys

import pytest

GUIDES = pathlib.Path(__file__).resolve().parents[4] / "crates" / "kvxfer-lmcache" / "tests" / "guides"
SCRIPT = """
import sys
from kvxfer.lmcache import register
register()
from lmcache.v1.config import load_engine_config_with_overrides
for _ in range(2):
    c = load_engine_config_with_overrides(sys.argv[1])
print("RESULT", repr((c.enable_pd, c.pd_role, c.pd_peer_host, c.pd_peer_init_port, c.pd_proxy_host, c.pd_proxy_port,
    c.pd_buffer_size, c.pd_buffer_device, c.transfer_channel, c.remote_serde)))
"""


def load(path):
    command = [sys.executable, "-c", SCRIPT, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name, wanted, notices",
    [
        ("xpyd-prefiller", (True, "sender", "localhost", [55555], "localhost", 7500, 1 << 30, "cpu", "kvxfer"), 11),
        ("xpyd-decoder", (True, "receiver", "localhost", [55555], None, None, 1 << 30, "cpu", "kvxfer"), 10),
        ("1p1d-prefiller", (True, "sender", None, None, "localhost", 7500, 1 << 30, "cpu", "nixl"), 3),
        ("1p1d-decoder", (True, "receiver", "localhost", [7300], None, None, 1 << 30, "cpu", "nixl"), 2),
    ],
)
def test_the_guides_files_are_read_as_they_were_meant(name, wanted, notices):
    done = load(GUIDES / f"{name}.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    found = eval(line.removeprefix("RESULT "))
    assert found[:9] == wanted, "on a machine without CUDA the buffer is in host memory"
    said = [x for x in (done.stdout + done.stderr).splitlines() if f"kvxfer: {name}.yaml: " in x]
    assert len(said) == notices, "each once, though the file was read twice:\n" + "\n".join(said)


def test_lines_that_contradict_each_other_are_an_error(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("enable_pd: True\nnixl_role: sender\npd_role: receiver\n")
    done = load(file)
    assert done.returncode != 0 and "nixl_role" in done.stderr and "pd_role" in done.stderr


def test_other_files_are_lmcaches_own_business(tmp_path):
    file = tmp_path / "plain.yaml"
    file.write_text("chunk_size: 128\nlocal_cpu: True\n")
    done = load(file)
    assert done.returncode == 0 and "kvxfer: plain.yaml" not in done.stdout + done.stderr, done.stderr[-2000:]
