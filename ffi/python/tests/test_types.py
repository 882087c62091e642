"""The installed package brings its types: a user's program is checked by mypy against them, and a wrong one is found out."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy", reason="mypy is not installed here")

RIGHT = """
import asyncio
from array import array

import kvxfer


def write(agent: kvxfer.Agent, cache: bytearray, address: str) -> int:
    source = agent.register(cache)
    peer = agent.connect(address, timeout=5)
    remote = peer.region("pages")
    pieces = array("Q", [0, 4096, 5000])
    transfer: kvxfer.Transfer = peer.write(source, remote, pieces, notify=b"done", transport="shm")
    report = transfer.wait(timeout=10.0)
    return report.bytes + sum(transfer.outcomes)


async def read(agent: kvxfer.Agent, peer: kvxfer.Peer, pages: kvxfer.Region) -> tuple[str, float]:
    note = await agent.notification()
    report = await peer.read(pages, peer.region(note.peer), [(0, 0, len(pages))])
    return report.transport, report.seconds


def send(agent: kvxfer.Agent, region: kvxfer.Region) -> str:
    geometry = kvxfer.Geometry(page_bytes=1 << 16, model="llama", chunk_tokens=256)
    with kvxfer.Receiver(agent, geometry, pages=8) as receiver:
        chunk = receiver.acquire("key")
        taken = bytes(chunk.data) if chunk is not None else b""
    sender = kvxfer.Sender(agent, "tcp://127.0.0.1:7300", geometry)
    delivery = sender.send("request", [("key", region, [(0, 4096)])])
    try:
        return f"{delivery.wait().transport} {len(taken)}"
    except kvxfer.KvxferError as e:
        return f"{e.name} {e.code + 1} {e.retryable}"


VERSION: str = kvxfer.__version__
HAVE_NIXL: bool = kvxfer.has_feature("nixl")
print(asyncio.iscoroutinefunction(read), VERSION, HAVE_NIXL)
"""

WRONG = """
import kvxfer


def wrong(agent: kvxfer.Agent, peer: kvxfer.Peer, pages: kvxfer.Region) -> None:
    agent.connect(7300)
    peer.write(pages, pages, [(0, 0, 1)])
    peer.write(pages, peer.region("pages"), [(0, 1)])
    peer.read(pages, peer.region("pages"), [(0, 0, 1)], timeout_s=3)
    number: int = agent.name
"""


def check(tmp_path, program):
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        "",
        "--cache-dir",
        str(tmp_path / "cache"),
        str(file),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)


def test_a_program_that_uses_the_package_type_checks(tmp_path):
    checked = check(tmp_path, RIGHT)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Success: no issues found" in checked.stdout


def test_mistakes_are_found_by_the_types(tmp_path):
    checked = check(tmp_path, WRONG)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    lines = [line for line in checked.stdout.splitlines() if ": error: " in line]
    found = {int(line.split(":")[1]) for line in lines}
    wrong = {n for n, line in enumerate(WRONG.splitlines(), 1) if line.startswith("    ")}
    assert found == wrong, checked.stdout
