"""The PD backend of a decoder: a pool of pages that prefillers fill, and chunks on loan to the engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from kvxfer.agent import Agent
from kvxfer.channel import Chunk, Receiver
from kvxfer.errors import NoCapacity
from kvxfer.lmcache import settings
from kvxfer.lmcache.buffer import ReceivedChunks, gpu_buffer, tensor_over
from kvxfer.lmcache.metrics import PdMetrics
from kvxfer.lmcache.reading import CacheQueryResponse

logger = init_logger(__name__)

# How long a chunk that a lookup has found is kept pinned for the load that follows it.
_HELD_S = 30.0
# How long it is remembered that a chunk was taken, for an `unpin` that usually follows at once.
_FORGET_S = 600.0


class Decoder:
    """The receiving side: a pool of pages, and chunks on loan to the engine."""

    def __init__(self, agent: Agent, c: settings.PdConfig, dtype: torch.dtype, fmt: MemoryFormat, metrics: PdMetrics):
        self._metrics = metrics
        memory = None if c.device == "cpu" else gpu_buffer(c)
        self._receiver = Receiver(
            agent,
            c.geometry,
            c.buffer_bytes // c.geometry.page_bytes,
            memory=memory,
            max_queue=c.pd.max_queue,
            lease=c.pd.lease,
            admission_timeout=c.allocation_timeout,
            retention=c.pd.retention,
        )
        pool = tensor_over(self._receiver.address, c.buffer_bytes) if memory is None else memory
        self.allocator = ReceivedChunks(pool, c.geometry.page_bytes, c.chunk_shape, dtype, fmt)
        self._lock = threading.Lock()
        # Found by a lookup, kept for its load: the chunk, and until when.
        self._held: dict[str, tuple[Chunk, float]] = {}
        # Given to the engine and not removed.
        self._lent: dict[str, list[MemoryObj]] = {}
        # Taken by the engine since the lookups of them: their `unpin` has nothing left to do. How often, and when last.
        self._taken: dict[str, tuple[int, float]] = {}

    def find(self, key: str) -> bool:
        now = time.monotonic()
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held[key] = (held[0], now + _HELD_S)
                return True
            chunk = self._receiver.acquire(key)
            if chunk is not None:
                self._held[key] = (chunk, now + _HELD_S)
        self._metrics.looked_up(chunk is not None)
        return chunk is not None

    def take(self, key: str) -> MemoryObj | None:
        with self._lock:
            held = self._held.pop(key, None)
            chunk = held[0] if held is not None else self._receiver.acquire(key)
            if chunk is None:
                return None
            memory_obj = self.allocator.wrap(chunk)
            self._lent.setdefault(key, []).append(memory_obj)
        self._metrics.loaded(len(chunk))
        return memory_obj

    def remove(self, key: str) -> bool:
        with self._lock:
            lent = self._lent.get(key)
            memory_obj = lent.pop() if lent else None
            if lent is not None and not lent:
                del self._lent[key]
            if memory_obj is not None:
                self._taken[key] = (self._taken.get(key, (0, 0.0))[0] + 1, time.monotonic())
        if memory_obj is not None:
            memory_obj.ref_count_down()
        return self._give_up(key) or memory_obj is not None

    def unpin(self, key: str) -> None:
        with self._lock:
            taken, when = self._taken.get(key, (0, 0.0))
            if taken:
                if taken == 1:
                    del self._taken[key]
                else:
                    self._taken[key] = (taken - 1, when)
                return
            # Looked up and not loaded: vLLM has it in its own prefix cache, or the request was aborted.
            self._held.pop(key, None)
        self._give_up(key)

    def _give_up(self, key: str) -> bool:
        try:
            self._receiver.remove(key)
        except LookupError:
            return False
        return True

    def allocate(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
        return None

    def put(self, keys: Any, memory_objs: Any, spec: Any, on_complete: Any) -> None:
        if spec is not None:
            raise NoCapacity("a PD receiver sends nothing: pd_role is 'receiver'", 0)

    # A decoder is asked, and asks nobody.

    @property
    def decoders(self) -> dict[str, str]:
        return {}

    def name_decoder(self, decoder: str, host: str, port: int) -> None:
        pass

    def ask(self, decoder: str, keys: Sequence[Any]) -> CacheQueryResponse:
        return CacheQueryResponse()

    def read_back(self, keys: Sequence[Any], memory_objs: list[MemoryObj], spec: Any) -> int:
        return 0

    def storing(self, *_: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def handed_over(self, request: str | None, transfer_spec: Any) -> int:
        return 0

    def spec_for(self, request: str | None, transfer_spec: Any) -> Any:
        return transfer_spec

    def vllm_finished(self, requests: set[str]) -> None:
        pass

    def work(self, timeout: float) -> None:
        event = self._receiver.next_event(timeout)
        while event is not None:
            self._metrics.received(event)
            if event.ready:
                logger.debug("kvxfer: request %s of %s has arrived", event.request, event.sender)
            else:
                logger.warning("kvxfer: request %s of %s will not arrive: %s", event.request, event.sender, event.text)
            event = self._receiver.next_event(0)
        now = time.monotonic()
        with self._lock:
            for key in [key for key, (_, until) in self._held.items() if until < now]:
                del self._held[key]
            # An engine that never says that it is done with a request must not fill memory.
            for key in [key for key, (_, when) in self._taken.items() if when + _FORGET_S < now]:
                del self._taken[key]

    def stats(self):
        return self._receiver.stats

    def close(self, timeout: float) -> None:
        with self._lock:
            self._held.clear()
            lent = [memory_obj for objects in self._lent.values() for memory_obj in objects]
            self._lent.clear()
        for memory_obj in lent:
            self.allocator.free(memory_obj)
        self._receiver.close(timeout)
