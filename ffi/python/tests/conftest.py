"""What the tests share: an agent, and a second process with one of its own."""

import multiprocessing
import sys
from pathlib import Path

import pytest

import kvxfer

sys.path.insert(0, str(Path(__file__).parent))
import other_process

DEADLINE_S = 30


class Other:
    """A process with an agent that listens and exports a region; `ask` makes it do something."""

    def __init__(self, **settings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=other_process.serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.address = self._answer()

    def ask(self, command, *arguments):
        self._pipe.send((command, arguments))
        return self._answer()

    def _answer(self):
        assert self._pipe.poll(DEADLINE_S), "the other process does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.process.kill()
        self.process.join(DEADLINE_S)

    def stop(self):
        if self.process.is_alive():
            self._pipe.send(("stop", ()))
            self.process.join(DEADLINE_S)
        if self.process.is_alive():
            self.kill()


@pytest.fixture
def other():
    process = Other()
    yield process
    process.stop()


@pytest.fixture
def start_other():
    started = []

    def start(**settings):
        started.append(Other(**settings))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def agent():
    with kvxfer.Agent("here") as agent:
        yield agent


@pytest.fixture
def receiver():
    with kvxfer.Agent("decoder", listen="tcp://127.0.0.1:0") as agent:
        with kvxfer.Receiver(agent, other_process.GEOMETRY, pages=8) as receiver:
            receiver.listens_on = agent.addresses[0]
            yield receiver
