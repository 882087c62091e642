"""Real vLLM servers on this machine's CPU: `make test-vllm` asks for these tests, nothing else does."""

import importlib.util
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ASKED = os.environ.get("KVXFER_TEST_VLLM") == "1"
HAVE_VLLM = importlib.util.find_spec("vllm") is not None and importlib.util.find_spec("lmcache") is not None
collect_ignore_glob = [] if ASKED and HAVE_VLLM else ["test_*.py"]
sys.path[:0] = [str(HERE), str(HERE.parents[3] / "examples" / "vllm_cpu")]


def pytest_report_header(config):
    if ASKED and not HAVE_VLLM:
        return "SKIPPED: tests/with_vllm: vLLM and LMCache are not installed; examples/vllm_cpu/install.sh brings them"
    return None if ASKED else "SKIPPED: tests/with_vllm: `make test-vllm` runs them"
