"""The PD backend of a prefiller: pages to gather into, steps of requests handed to the outbox, and what became of them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lmcache.logging import init_logger
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from kvxfer.agent import Agent
from kvxfer.gpu import Fence
from kvxfer.lmcache import settings
from kvxfer.lmcache.arrivals import Arrival, Request
from kvxfer.lmcache.buffer import Staging, buffer_of, valid_bytes
from kvxfer.lmcache.metrics import PdMetrics
from kvxfer.lmcache.placing import KnownChunks, Places, is_placed
from kvxfer.lmcache.reading import CacheQueryResponse, Reading
from kvxfer.outbox import Ended, Outbox, Released
from kvxfer.region import Region

logger = init_logger(__name__)

# How long a thread that waits for a request looks after the outbox itself.
_MOMENT_S = 0.0002


@dataclass
class Spec:
    """A `disagg_spec` of our own: a whole step to the receiver that the configuration names, for a request that brings none."""

    req_id: str
    receiver_host: str
    receiver_init_port: list[int]
    is_last_prefill: bool = True
    num_transferred_tokens: int = 0
    total_chunks: int = 0


class _Store:
    """A store of a cache engine, on the thread that is at it: a context manager, once."""

    __slots__ = ("_chunks", "_of", "_spec", "began", "places", "stream", "vllm")

    def __init__(
        self,
        of: Prefiller | None = None,
        vllm: str | None = None,
        spec: Any = None,
        stream: Any = None,
        chunks: KnownChunks | None = None,
    ):
        self.began: float | None = None
        self.places: Places | None = None
        self.stream, self.vllm = stream, vllm
        self._of, self._spec, self._chunks = of, spec, chunks

    def __enter__(self) -> None:
        self.began = time.perf_counter()
        self._of.begin(self, self._spec, self._chunks)

    def __exit__(self, *_: object) -> None:
        self._of.end(self)


class _Local(threading.local):
    """The store that a thread is at; one that has not begun when it is at none."""

    store = _Store()


class _Step(NamedTuple):
    """A part of a request that is stored at once."""

    name: str
    receiver: str
    first: bool
    last: bool
    total: int
    own: bool
    """Of a request that brought no `disagg_spec`."""


class Prefiller:
    """The sending side: staging pages, requests under way, what became of them."""

    def __init__(self, agent: Agent, c: settings.PdConfig, dtype: torch.dtype, fmt: MemoryFormat, metrics: PdMetrics):
        self._config, self._metrics = c, metrics
        self._region, buffer = buffer_of(agent, c)
        self.allocator = Staging(buffer, c.chunk_shape, dtype, fmt)
        self._outbox = Outbox(
            agent,
            c.geometry,
            proxy=c.proxy,
            request_timeout=c.pd.request_timeout,
            patience=c.pd.patience,
            integrity=c.pd.integrity,
        )
        self._reading = Reading(agent, c, self._region)
        self._lock = threading.Lock()
        self._local = _Local()
        self._device = self._region.device
        # Memory objects of the batches that are not released, and what else waits for that.
        self._batches: dict[int, tuple[list[MemoryObj], list[Any], Callable | None]] = {}
        self._early: set[int] = set()
        self._requests: dict[str, Request] = {}
        self._spare: Arrival | None = None
        # vLLM's name of a request to the proxy's.
        self._names: dict[str, str] = {}
        # Requests that have ended and are still to be counted and told of.
        self._ends: list[tuple[Ended, Request]] = []
        self._steps = itertools.count(1)
        self._in_place = c.pd.in_place
        self._closed = False

    def allocate(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
        places = self._local.store.places
        placed = places.next(shapes, dtypes, fmt) if places is not None else None
        if placed is not None:
            return placed
        # Pages of requests that wait for the decoder would never come back if the decoder waits for the one that is stored now.
        timeout, may_come, make_room = self._config.allocation_timeout, self._page_may_come, self._outbox.shed
        page = self.allocator.wait_allocate(shapes, dtypes, fmt, timeout, may_come, make_room)
        if page is None:
            logger.warning(
                "kvxfer: no staging page for a chunk: all %d are in use and %s. What has one is sent, the rest is computed by the decoder; "
                "enlarge pd_buffer_size",
                self.allocator.pages,
                f"none came back within {self._config.allocation_timeout:g} s"
                if self._page_may_come()
                else "none is on its way",
            )
        return page

    def _page_may_come(self) -> bool:
        with self._lock:
            return bool(self._batches) and not self._closed

    def spec_for(self, request: str | None, transfer_spec: Any) -> Any:
        if transfer_spec is not None or self._config.receiver is None or self._config.role != "sender":
            return transfer_spec
        # Each step by itself: nobody says which is the last one.
        host, ports = self._config.receiver
        return Spec(f"{request or 'request'}#{next(self._steps)}", host, ports)

    def handed_over(self, request: str | None, transfer_spec: Any) -> int:
        with self._lock:
            known = self._requests.get(str(transfer_spec.req_id))
            return known.tokens if known is not None and request is not None and known.vllm == request else 0

    def storing(
        self, request: str | None, transfer_spec: Any, stream: Any = None, chunks: KnownChunks | None = None
    ) -> contextlib.AbstractContextManager:
        return _Store(self, request, transfer_spec, stream, chunks)

    def begin(self, store: _Store, spec: Any, chunks: KnownChunks | None) -> None:
        """The calling thread is at that store from now on."""
        if store.vllm is not None and not isinstance(spec, Spec):
            with self._lock:
                self._names[store.vllm] = str(spec.req_id)
        if chunks is not None and self._in_place:
            store.places = self._place(chunks.chunks, spec, store)
        self._local.store = store

    def end(self, store: _Store) -> None:
        """It is at none."""
        places = store.places
        self._local.store = _Local.store
        # What is under way needs nobody now: time for what the next one needs.
        if self._spare is None:
            self._spare = Arrival(self.attend)
        if places is not None and not places.put:
            # The store ended early: nobody will ever fill them.
            self._outbox.give_up(places.step.name, self._complete_at(store))

    def _place(self, chunks: Sequence[tuple[Any, int]], spec: Any, store: _Store) -> Places:
        """Asks for pages at the decoder for the chunks of a step."""
        c = self._config
        step = self._step(spec, store)
        token = c.geometry.page_bytes // c.geometry.chunk_tokens
        places = self._outbox.place(
            step.name,
            step.receiver,
            [(key.to_string(), tokens * token) for key, tokens in chunks],
            total=step.total,
            first=step.first,
            last=step.last,
            device=self._device,
            patience=c.pd.in_place_patience,
        )
        try:
            return Places(step, chunks, places, c.device)
        except Exception:
            # A torch that does not take such memory: the places are not used, now and later.
            logger.exception("kvxfer: chunks cannot be gathered in place here; they are copied from now on")
            self._in_place = False
            return Places(step, chunks, [None] * len(places), c.device)

    def _step(self, spec: Any, store: _Store) -> _Step:
        """What a `disagg_spec` says of the step that is stored."""
        vllm, name = store.vllm, str(spec.req_id)
        with self._lock:
            request = self._requests.get(name)
            goes_on = request is not None and vllm is not None and request.vllm == vllm and request.tokens > 0
        return _Step(
            name=name,
            receiver=settings.receiver(spec.receiver_host, spec.receiver_init_port, self._config.tp_rank),
            first=not goes_on and not getattr(spec, "num_transferred_tokens", 0),
            last=bool(spec.is_last_prefill),
            total=int(getattr(spec, "total_chunks", 0) or 0),
            own=isinstance(spec, Spec),
        )

    def put(
        self,
        keys: Sequence[Any],
        memory_objs: list[MemoryObj],
        spec: Any,
        on_complete: Callable[[Any], None] | None,
    ) -> list[Future] | None:
        if spec is None:
            # A request for this instance alone: there is nobody to send it to.
            return None
        store = self._local.store
        places = store.places
        if places is None or places.step.name != str(spec.req_id):
            return self._put(self._step(spec, store), keys, memory_objs, on_complete, store)
        places.put = True
        if places.keys != list(keys):
            # Fewer than were named, because there was no staging page for one: the decoder waits for it in vain.
            self._outbox.give_up(places.step.name, self._complete_at(store))
            logger.error(
                "kvxfer: request %s: only %d of %d chunks were stored; the decoder computes it",
                places.step.name,
                len(keys),
                len(places.keys),
            )
            return None
        if places.are(memory_objs):
            return self._put_placed(places, keys, on_complete, store)
        return self._put(places.step, keys, memory_objs, on_complete, store)

    def _put_placed(
        self, places: Places, keys: Sequence[Any], on_complete: Callable | None, store: _Store
    ) -> list[Future]:
        """All of what was named lies where it is to be."""
        step, filled = places.step, time.perf_counter()
        # First of all it is on its way; who hears of its end waits here until it is known.
        with self._lock:
            try:
                self._outbox.put_placed(step.name, self._complete_at(store))
            except BaseException:
                self._requests.pop(step.name, None)
                raise
            count = len(places.keys)
            request = self._note(step, store, filled, (count, count), places.bytes, places.tokens)
        self._let_go([], keys, on_complete)
        return self._handed_over(step, request)

    def _put(
        self,
        step: _Step,
        keys: Sequence[Any],
        memory_objs: list[MemoryObj],
        on_complete: Callable | None,
        store: _Store,
    ) -> list[Future]:
        chunks = self._chunks(keys, memory_objs)
        size, tokens = sum(runs[0][1] for _, _, runs in chunks), sum(m.get_num_tokens() for m in memory_objs)
        for memory_obj in memory_objs:
            memory_obj.ref_count_up()
        counts = len(memory_objs), sum(map(is_placed, memory_objs))
        with self._lock:
            request = self._note(step, store, time.perf_counter(), counts, size, tokens)
        try:
            number = self._outbox.put(
                step.name,
                step.receiver,
                chunks,
                total=step.total,
                first=step.first,
                last=step.last,
                after=self._complete_at(store),
            )
        except BaseException:
            for memory_obj in memory_objs:
                memory_obj.ref_count_down()
            with self._lock:
                self._requests.pop(step.name, None)
            raise
        with self._lock:
            # Its bytes are all in their places, or its release was quicker than we are.
            released = not number or number in self._early
            self._early.discard(number)
            if not released:
                self._batches[number] = (list(memory_objs), list(keys), on_complete)
        if released:
            self._let_go(memory_objs, keys, on_complete)
        return self._handed_over(step, request)

    def _note(
        self, step: _Step, store: _Store, filled: float, counts: tuple[int, int], size: int, tokens: int
    ) -> Request:
        """Notes a step of a request that was handed over at `filled`: chunks, and how many of them in their places. The lock is held."""
        request = self._requests.get(step.name)
        if request is None or step.first:
            arrival, self._spare = self._spare or Arrival(self.attend), None
            request = self._requests[step.name] = Request(step.name, arrival, store.vllm)
        request.chunks += counts[0]
        request.placed += counts[1]
        request.size += size
        request.last = step.last
        request.tokens += tokens
        if store.began is not None:
            request.offload += filled - store.began
        return request

    def _handed_over(self, step: _Step, request: Request) -> list[Future]:
        # Of a request without a `disagg_spec` nobody is told when it has arrived.
        if step.last and (self._config.pd.wait_for_arrival or step.own):
            self._wait_for(request)
        return [request.future]

    def _chunks(self, keys: Sequence[Any], memory_objs: list[MemoryObj]) -> list[tuple[str, Region | None, list]]:
        """Chunks of a batch: from their places, or from pages of the staging buffer."""
        page = self._config.geometry.page_bytes
        return [
            (key.to_string(), None, [(0, valid_bytes(m))])
            if is_placed(m)
            else (key.to_string(), self._region, [(m.meta.address * page, valid_bytes(m))])
            for key, m in zip(keys, memory_objs, strict=True)
        ]

    def _complete_at(self, store: _Store) -> Fence | None:
        """When the pages of this step are full: LMCache waits for its copies where pages are host memory, on a GPU they go on."""
        if self._device is None:
            return None
        stream = store.stream
        return Fence(torch.cuda.current_stream() if stream is None else stream, self._device)

    def _wait_for(self, request: Request) -> None:
        try:
            request.future.result(self._config.pd.request_timeout + self._config.pd.patience)
        except Exception as e:
            logger.error("kvxfer: the cache of request %s has not arrived: %s", request.name, e)

    def work(self, timeout: float) -> None:
        for event in self._outbox.events(timeout):
            self._happened(event)
        with self._lock:
            ends, self._ends = self._ends, []
        for event, request in ends:
            self._metrics.ended(event)
            request.tell(event)
            # Lets go of the interpreter: many may have ended, and none of this is urgent.
            time.sleep(0)

    def attend(self, arrival: Future) -> None:
        """Does what cannot wait of the work of the backend's thread, for a moment and until a request has ended."""
        while not arrival.done() and (happened := self._outbox.attend(_MOMENT_S)):
            for event in happened:
                self._happened(event)

    def _happened(self, event: Released | Ended) -> None:
        if isinstance(event, Ended):
            self._ended(event)
            return
        with self._lock:
            batch = self._batches.pop(event.batch, None)
            if batch is None:
                self._early.add(event.batch)
        if batch is not None:
            self._let_go(*batch)

    def _let_go(self, memory_objs: list[MemoryObj], keys: Sequence[Any], on_complete: Callable | None) -> None:
        for memory_obj in memory_objs:
            memory_obj.ref_count_down()
        if memory_objs:
            self.allocator.page_freed()
        if on_complete is not None:
            for key in keys:
                try:
                    on_complete(key)
                except Exception as e:
                    logger.warning("kvxfer: the completion callback for %s failed: %s", key, e)

    def _ended(self, event: Ended) -> None:
        with self._lock:
            request = self._requests.pop(event.request, None) or Request(event.request, Arrival(self.attend))
            # Who waits for the request goes on; counting and telling is the backend's thread's.
            self._ends.append((event, request))
        request.ended(event.failure)

    def vllm_finished(self, requests: set[str]) -> None:
        """A request whose last step never came was aborted: its pages at the decoder are given back now."""
        for vllm_name in requests:
            with self._lock:
                name = self._names.pop(vllm_name, None)
                request = self._requests.get(name) if name is not None else None
                left = request is not None and not request.last
            if left and self._outbox.abort(name):
                logger.info("kvxfer: request %s was aborted between two steps of its prefill", name)

    @property
    def decoders(self) -> dict[str, str]:
        return self._reading.decoders

    def name_decoder(self, decoder: str, host: str, port: int) -> None:
        self._reading.name(decoder, host, port)

    def ask(self, decoder: str, keys: Sequence[Any]) -> CacheQueryResponse:
        return self._reading.ask(decoder, keys)

    def read_back(self, keys: Sequence[Any], memory_objs: list[MemoryObj], spec: Any) -> int:
        return self._reading.read(keys, memory_objs, spec)

    # A prefiller keeps nothing that could be found.

    def find(self, key: str) -> bool:
        return False

    def take(self, key: str) -> MemoryObj | None:
        return None

    def remove(self, key: str) -> bool:
        return False

    def unpin(self, key: str) -> None:
        pass

    def stats(self):
        return None

    def close(self, timeout: float) -> None:
        self._closed = True
        self._reading.close()
        self.allocator.page_freed()
        self._outbox.close(timeout)
        self.work(0)
        self.allocator.close()
