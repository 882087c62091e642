"""LMCache's configuration files with their older keys, read as they were meant.

LMCache reads a file in one class method. For a file that has older keys the text is translated by the library first; any other
file goes to LMCache untouched. Each key's fate is logged once per instance; two lines that contradict each other are an error.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import tempfile
import threading

from kvxfer._call import c_text, text_of
from kvxfer._native import lib
from kvxfer.errors import InvalidArgument, Mismatch

_said: set[str] = set()
_marks: list[socket.socket] = []
_lock = threading.Lock()


def translate(yaml: str) -> dict:
    """What a file comes to: `config`, `notices`, `problems`, `changed`. Raises `InvalidArgument` or `Mismatch`."""
    return json.loads(text_of(lib.kvxfer_lmcache_config_translate, c_text(yaml)))


def add_translation(module) -> None:
    """Wraps `LMCacheEngineConfig.from_file`."""
    config_class = module.LMCacheEngineConfig
    original = config_class.from_file.__func__
    logger = module.logger

    @functools.wraps(original)
    def from_file(cls, file_path):
        with open(file_path, encoding="utf-8") as file:
            text = file.read()
        try:
            found = translate(text)
        except Mismatch as e:
            raise ValueError(f"{file_path}: {e}") from None
        except InvalidArgument:
            # LMCache says in its own words what is wrong with it.
            return original(cls, file_path)
        config, changed = found["config"], found["changed"]
        notices = [n["text"] for n in found["notices"]] if config.get("enable_pd") in (True, "True", "true", 1) else []
        if config.get("enable_pd") and str(config.get("pd_buffer_device", "")).startswith("cuda") and not _have_cuda():
            notices.append(
                f"pd_buffer_device: {config['pd_buffer_device']!r}, but there is no CUDA device here: the buffer is in host memory, 'cpu'"
            )
            config["pd_buffer_device"], changed = "cpu", True
        _say(logger, file_path, notices)
        if not changed:
            return original(cls, file_path)
        # LMCache reads a file: it gets one.
        handle, path = tempfile.mkstemp(prefix="kvxfer-lmcache-", suffix=".yaml")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(config, file)
            return original(cls, path)
        finally:
            os.unlink(path)

    config_class.from_file = classmethod(from_file)


def _say(logger, file_path, notices) -> None:
    with _lock:
        fresh = [n for n in notices if n not in _said]
        _said.update(fresh)
        if not fresh or not _first_of_the_instance(file_path):
            return
    for notice in fresh:
        logger.warning("kvxfer: %s: %s", os.path.basename(file_path), notice)


def _first_of_the_instance(file_path) -> bool:
    """Whether no other process of this instance (vLLM's scheduler, its workers: one process group) has spoken of the file. The first
    one holds a name in Linux's abstract socket namespace, which goes away with the process."""
    file = hashlib.sha256(os.path.realpath(file_path).encode()).hexdigest()[:16]
    name = f"\0kvxfer-notices-{os.getuid()}-{os.getpgrp()}-{file}"
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        mark.bind(name)
    except OSError:
        mark.close()
        return False
    _marks.append(mark)
    return True


def _have_cuda() -> bool:
    import lmcache

    return getattr(lmcache, "torch_device_type", "cpu") == "cuda"
