"""LMCache's own cache servers and coordinator, started with `python -m kvxfer.lmcache`, find and connect each other over kvxfer."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from far_side import free_ports

PATIENCE = 120


class Fleet:
    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.coordinator, *ports = free_ports(7)
        self.ports = {1: ports[:3], 2: ports[3:]}

    def start(self, name, *arguments):
        environment = os.environ | {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false"}
        with open(self.log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "kvxfer.lmcache", *map(str, arguments)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def start_coordinator(self):
        self.start("coordinator", "coordinator", "--host", "127.0.0.1", "--port", self.coordinator)

    def start_server(self, number):
        mq, http, p2p = self.ports[number]
        where = ["--host", "127.0.0.1", "--port", mq, "--http-port", http, "--coordinator-advertise-ip", "127.0.0.1"]
        memory = ["--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--shm-name", "", "--no-l1-use-lazy"]
        fleet = ["--coordinator-url", f"http://127.0.0.1:{self.coordinator}", "--coordinator-heartbeat-interval", "1"]
        p2p = ["--p2p-advertise-url", f"127.0.0.1:{p2p}", "--p2p-transfer-engine", "kvxfer"]
        self.start(number, "server", *where, *memory, *fleet, *p2p)

    def log(self, name):
        return self.folder / f"{name}.log"

    def peers(self, number):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[number][1]}/status", timeout=5) as answer:
                return json.load(answer)["p2p_peer_count"]
        except (urllib.error.URLError, OSError):
            return None

    def until(self, wanted, what):
        deadline = time.monotonic() + PATIENCE
        while not wanted():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name).read_text()[-3000:]}"
            assert time.monotonic() < deadline, what
            time.sleep(0.3)

    def kill(self, name):
        os.killpg(self.processes.pop(name).pid, signal.SIGKILL)

    def close(self):
        for name in list(self.processes):
            self.kill(name)


@pytest.fixture
def fleet(tmp_path):
    running = Fleet(tmp_path)
    yield running
    running.close()


def test_two_servers_read_each_others_memory_and_find_each_other_again_after_a_kill(fleet):
    fleet.start_coordinator()
    for number in (1, 2):
        fleet.start_server(number)
    fleet.until(lambda: fleet.peers(1) == fleet.peers(2) == 1, "both servers are connected")
    logs = fleet.log(1).read_text() + fleet.log(2).read_text()
    assert logs.count("that peers on this host can map") == 2, "their L1 memory is kvxfer's"
    assert "bytes reached over shm" in logs

    before = logs.count("connected to the cache server at")
    fleet.kill(2)
    fleet.start_server(2)
    said = lambda: (fleet.log(1).read_text() + fleet.log(2).read_text()).count("connected to the cache server at")  # noqa: E731
    fleet.until(lambda: said() > before and fleet.peers(2), "the restarted one is connected")
