"""LMCache's own P2P backend over the channel: two instances, its controller between them, all real processes."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from test_pd import Decoder

import far_side
from far_side import P2P_CHUNK, content, free_ports, key
from kvxfer.errors import Unreachable

SOON = 30


class Instance(Decoder):
    """The instance that has the chunks, in a process of its own."""

    what = "p2p"

    def arguments(self, ports, changes):
        return tuple(ports)


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    http, pull, reply = free_ports(3)
    log = tmp_path_factory.mktemp("controller") / "log"
    command = [sys.executable, "-m", "lmcache.v1.api_server", "--host", "127.0.0.1", "--port", str(http)]
    command += ["--monitor-ports", json.dumps({"pull": pull, "reply": reply})]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"LMCACHE_TRACK_USAGE": "false"}
        )
    try:
        yield pull, reply
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def pair(controller):
    """The asking instance, in this process, and the other one."""
    other = Instance(("other", *free_ports(3), *controller))
    loop, _, backend = far_side.p2p_backend("asking", *free_ports(3), *controller)
    yield other, loop, backend
    backend.running.clear()
    other.kill()


def fetch(loop, backend, name, numbers, patience=SOON):
    """As LMCache's storage manager does: how many are there, and then those."""

    async def get():
        keys = [key(n) for n in numbers]
        hits = await backend.batched_async_contains(name, keys)
        if not hits:
            return []
        lengths = [P2P_CHUNK * i for i in range(hits + 1)]
        return await backend.batched_get_non_blocking(name, keys[:hits], {"cum_chunk_lengths": lengths})

    return asyncio.run_coroutine_threadsafe(get(), loop).result(patience)


def fetched(loop, backend, name, numbers, count):
    """Asks until the controller knows of the chunks."""
    deadline = time.monotonic() + SOON
    while True:
        time.sleep(0.5)
        found = fetch(loop, backend, f"{name} {time.monotonic()}", numbers)
        if len(found) == count:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {count} chunks"


def test_chunks_of_another_instance_arrive_byte_for_byte(pair):
    other, loop, backend = pair
    other.ask("keep", list(range(1, 6)))
    found = fetched(loop, backend, "all", range(1, 6), 5)
    for n, memory_object in zip(range(1, 6), found, strict=True):
        assert torch.equal(memory_object.tensor.view(torch.int16), content(n, P2P_CHUNK))
        memory_object.ref_count_down()


def test_what_nobody_has_is_not_found(pair):
    _, loop, backend = pair
    assert fetch(loop, backend, "nobody", range(100, 104)) == []


def test_only_the_chunks_that_are_there_come(pair):
    other, loop, backend = pair
    other.ask("keep", [20, 21])
    found = fetched(loop, backend, "some", [20, 21, 22], 2)
    assert len(found) == 2
    for memory_object in found:
        memory_object.ref_count_down()


def test_an_instance_that_is_killed_is_an_error_or_an_empty_answer_and_no_hang(pair):
    other, loop, backend = pair
    other.ask("keep", [30])
    for memory_object in fetched(loop, backend, "before", [30], 1):
        memory_object.ref_count_down()
    other.kill()
    # LMCache catches what its sockets say, and hands on what connecting says.
    try:
        assert fetch(loop, backend, "after", [30], 60) == []
    except Unreachable as e:
        assert "cannot be reached" in str(e)
