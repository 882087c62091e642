"""The connector's list of prefillers does not grow with every one that is restarted."""

import threading
import types

from kvxfer.vllm.worker import Worker, _Remote


def test_prefillers_that_are_gone_are_let_go_of():
    worker = types.SimpleNamespace(_lock=threading.Lock(), _remotes={})
    for i in range(100):
        for remote in worker._remotes.values():
            remote.peer.is_up = False
        Worker._remember(worker, f"tcp://10.0.0.1:{i}", _Remote(types.SimpleNamespace(is_up=True), []))
    assert list(worker._remotes) == ["tcp://10.0.0.1:99"]
    Worker._remember(worker, "tcp://10.0.0.1:100", _Remote(types.SimpleNamespace(is_up=True), []))
    assert len(worker._remotes) == 2
