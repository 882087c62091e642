"""Versions that were tested, and what becomes of an LMCache that is another one.

The LMCache here is a folder with the modules that kvxfer adds to and the functions it relies on, under a version of its own: enough
to be loaded and compared. Its functions do nothing; what the additions do is tested with the real one.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from kvxfer import compat
from kvxfer.lmcache import hook

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODULES = {
    "lmcache/logging.py": """
import logging

logging.basicConfig(format="%(levelname)s %(message)s")


def init_logger(name):
    return logging.getLogger(name)
""",
    "lmcache/v1/config.py": """
from lmcache.logging import init_logger

logger = init_logger(__name__)


class LMCacheEngineConfig:
    @classmethod
    def from_file(cls, file_path):
        return file_path
""",
    "lmcache/v1/transfer_channel/__init__.py": """
import lmcache.logging


def CreateTransferChannel(
    channel_type, async_mode, role, buffer_ptr, buffer_size, align_bytes, tp_rank, peer_init_url, device=None, **kwargs
):
    assert channel_type in ["nixl", "mock_memory"], channel_type
    return channel_type
""",
    "lmcache/v1/gpu_connector/__init__.py": """
import enum

torch_device_type = "cpu"
EngineType = enum.Enum("EngineType", "VLLM")


def CreateGPUConnector(config, metadata, engine, layout_hints=None):
    pass
""",
    "lmcache/v1/distributed/transfer_channel/factory.py": """
def register_transfer_channel_factory(transfer_channel_type, factory):
    pass
""",
    "lmcache/v1/cache_engine.py": """
class LMCacheEngine:
    def store(self, tokens=None, hashes=None, offsets=None, mask=None, **kwargs):
        pass

    def lookup_unpin(self, lookup_id):
        pass

    def is_healthy(self):
        return True

    def is_frozen(self):
        return False

    def _is_passive(self):
        return False
""",
    "lmcache/v1/storage_backend/pd_backend_async.py": """
from lmcache.v1.transfer_channel import CreateTransferChannel


class PDBackendAsync:
    def __init__(self, config, metadata):
        CreateTransferChannel(config.transfer_channel, True, "sender", 0, 0, 0, 0, "")
""",
    "lmcache/v1/memory_management.py": """
from lmcache.logging import init_logger

logger = init_logger(__name__)


def _allocate_cpu_memory(size, numa_mapping=None, shm_name=None, use_hugepages=False):
    pass


def _free_cpu_memory(buffer, size=None, numa_mapping=None, shm_name=None, use_hugepages=False):
    pass
""",
    "lmcache/integration/vllm/vllm_v1_adapter.py": """
class LMCacheConnectorV1Impl:
    def get_finished(self, finished_req_ids):
        return None, None

    def request_finished(self, request, block_ids):
        return False, None
""",
}
USE = """
import importlib, json, sys, types
from kvxfer.lmcache import register
from kvxfer.lmcache.hook import refusals

register()
changed = []
for name in {modules}:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    for holder in (module, *(thing for thing in vars(module).values() if isinstance(thing, type))):
        changed += [key for key, thing in vars(holder).items() if hasattr(getattr(thing, "__func__", thing), "__wrapped__")]
refused = dict(refusals)
print("channels", file=sys.stderr)
create = sys.modules["lmcache.v1.transfer_channel"].CreateTransferChannel
pd = sys.modules.get("lmcache.v1.storage_backend.pd_backend_async")
arguments = [False, "sender", 0, 0, 0, 0, ""]
said = {{"nixl": create("nixl", *arguments)}}
for channel in ("kvxfer", "carrier pigeon"):
    try:
        create(channel, *arguments)
    except Exception as e:
        said[channel] = f"{{type(e).__name__}}: {{e}}"
if pd is not None:
    try:
        pd.PDBackendAsync(types.SimpleNamespace(transfer_channel="kvxfer"), None)
    except Exception as e:
        said["pd"] = f"{{type(e).__name__}}: {{e}}"
print(json.dumps({{"said": said, "refusals": refused, "changed": changed}}))
"""


class Answer:
    def __init__(self, process):
        # What loading logs, and not what making channels does.
        self.log = process.stderr.partition("channels\n")[0]
        answer = json.loads(process.stdout)
        self.said, self.refusals, self.changed = answer["said"], answer["refusals"], answer["changed"]


@pytest.fixture
def lmcache(tmp_path):
    """Makes such a folder, and loads it in a process of its own."""

    def run(version="0.9.0", without=("", ""), gone="", **environment):
        for file, text in MODULES.items():
            if file == gone:
                continue
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(*without))
            for folder in path.relative_to(tmp_path).parents:
                if folder.name:
                    (tmp_path / folder / "__init__.py").touch()
        metadata = tmp_path / f"lmcache-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: lmcache\nVersion: {version}\n")
        names = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in MODULES]
        inherited = {k: v for k, v in os.environ.items() if k != compat.VARIABLE}
        path = os.pathsep.join(filter(None, [str(tmp_path), inherited.pop("PYTHONPATH", "")]))
        process = subprocess.run(
            [sys.executable, "-c", USE.format(modules=names)],
            env={**inherited, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return Answer(process)

    return run


def test_a_tested_version_is_used_without_a_word(lmcache):
    answer = lmcache("0.5.6+local")
    assert answer.log == "" and answer.refusals == {}
    assert {"from_file", "CreateTransferChannel", "store", "get_finished", "request_finished"} <= set(answer.changed)


def test_what_is_found_missing_later_is_said_as_well(lmcache):
    # Classes that kvxfer's own build on; nothing to compare before one is made.
    said = lmcache("0.5.6").said["kvxfer"]
    assert said.startswith(
        "Unsupported: transfer_channel: 'kvxfer' does not fit this LMCache (0.5.6): LMCache lacks what"
    )
    assert "No module named 'lmcache.v1.transfer_channel.abstract'" in said or "No module named 'torch'" in said


def test_another_version_is_used_with_one_warning(lmcache):
    answer = lmcache("0.9.0")
    assert answer.log.count("kvxfer:") == 1, answer.log
    assert answer.log.startswith(
        "WARNING kvxfer: LMCache 0.9.0 is not among the versions this kvxfer was tested with (0.5.6): "
    )
    assert "KVXFER_COMPAT=ignore" in answer.log and "strict" in answer.log
    assert answer.refusals == {} and "store" in answer.changed


def test_ignore_is_quiet(lmcache):
    answer = lmcache("0.9.0", KVXFER_COMPAT="ignore")
    assert answer.log == "" and answer.refusals == {} and "store" in answer.changed


def test_strict_refuses_another_version(lmcache):
    answer = lmcache("0.9.0", KVXFER_COMPAT="strict")
    assert list(answer.refusals) == ["LMCache"]
    # All as it was, but for the function that says why.
    assert set(answer.changed) == {"CreateTransferChannel"}
    assert answer.said["nixl"] == "nixl"
    assert answer.said["carrier pigeon"].startswith("AssertionError")
    assert answer.said["kvxfer"].startswith(
        "Unsupported: transfer_channel: 'kvxfer' does not fit this LMCache (0.9.0): "
    )
    assert "KVXFER_COMPAT is strict" in answer.said["kvxfer"]
    assert answer.said["pd"] == answer.said["kvxfer"]


def test_strict_takes_a_tested_version(lmcache):
    answer = lmcache("0.5.6", KVXFER_COMPAT="strict")
    assert answer.log == "" and answer.refusals == {}


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (("def store", "def put"), "lmcache.v1.cache_engine has no LMCacheEngine.store"),
        (("def get_finished(self, finished_req_ids)", "def get_finished(self)"), "LMCacheConnectorV1Impl.get_finished takes other arguments than (self, finished_req_ids"),
        (("class LMCacheEngineConfig", "class Config"), "lmcache.v1.config has no LMCacheEngineConfig.from_file"),
        (("async_mode, role", "role"), "CreateTransferChannel takes other arguments than (channel_type, async_mode"),
    ],
    ids=["a method is gone", "its arguments differ", "a class is gone", "the factory differs"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["warn", "ignore"])
def test_what_lacks_something_is_refused_as_a_whole(lmcache, without, sentence, mode):
    answer = lmcache("0.9.0", without, KVXFER_COMPAT=mode)
    assert [why for why in answer.refusals.values() if sentence in why], answer.refusals
    assert sentence in answer.log
    assert answer.said["nixl"] == "nixl"
    assert answer.said["kvxfer"].startswith("Unsupported: transfer_channel: 'kvxfer' does not fit this LMCache (0.9.0)")
    assert sentence in answer.said["kvxfer"] and "tested with LMCache 0.5.6" in answer.said["kvxfer"]
    assert answer.said["pd"] == answer.said["kvxfer"]


def test_a_module_that_does_not_fit_stays_as_it_is(lmcache):
    answer = lmcache("0.9.0", ("def request_finished", "def ended"))
    assert "get_finished" not in answer.changed


@pytest.mark.parametrize("gone", [file for file in MODULES if "logging" not in file and "channel" not in file])
def test_a_module_that_is_gone_is_missed_when_a_channel_is_made(lmcache, gone):
    answer = lmcache("0.9.0", gone=gone)
    name = gone.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert f"there is no module {name}" in answer.said["kvxfer"]
    assert answer.said["nixl"] == "nixl"


def test_an_unknown_word_in_the_variable_is_an_error(lmcache):
    answer = lmcache("0.9.0", KVXFER_COMPAT="whatever")
    assert "KVXFER_COMPAT: 'whatever' is none of warn, ignore, strict" in answer.said["kvxfer"]


def test_every_addition_states_what_it_relies_on():
    assert set(hook.ADDITIONS) == set(compat.NEEDS)


def test_the_report_names_what_is_installed():
    process = subprocess.run(
        [sys.executable, "-m", "kvxfer.compat", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    found = {line["name"]: line for line in json.loads(process.stdout)["found"]}
    assert found["Python"]["installed"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["LMCache"]["installed"] is None) == (importlib.util.find_spec("lmcache") is None)
    assert process.returncode == (not all(line["ok"] for line in found.values())), process.stderr


def test_the_document_shows_the_table():
    document = (ROOT / "docs" / "compatibility.md").read_text()
    rows = {
        name.strip(): re.findall(r"\d+(?:\.\d+)+", versions)
        for name, versions in re.findall(r"^\| ([A-Za-z]+) \| ([^|]*) \|", document, re.M)
    }
    assert {p.name: list(p.tested) for p in compat.PRODUCTS} == {k: v for k, v in rows.items() if k != "Python"}
    assert rows["Python"] == [compat.PYTHON]


def test_what_the_tests_install_is_in_the_table():
    text = (ROOT / "examples" / "vllm_cpu" / "install.sh").read_text()
    for product in compat.PRODUCTS:
        (version,) = re.findall(rf"\b{product.module}=(\d[\d.]*)", text)
        assert version in product.tested


def test_the_wheel_asks_for_the_same_python():
    text = (ROOT / "ffi" / "python" / "pyproject.toml").read_text()
    assert f'requires-python = ">={compat.PYTHON}"' in text
