"""The PD backend of a prefiller: pages to gather into, steps of requests handed to the outbox, and what became of them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lmcache.logging import init_logger
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from kvxfer.agent import Agent
from kvxfer.gpu import Fence
from kvxfer.lmcache import settings
from kvxfer.lmcache.buffer import Staging, buffer_of, valid_bytes
from kvxfer.lmcache.metrics import PdMetrics
from kvxfer.lmcache.placing import KnownChunks, Places, is_placed
from kvxfer.lmcache.reading import CacheQueryResponse, Reading
from kvxfer.outbox import Ended, Outbox, Released

logger = init_logger(__name__)


@dataclass
class Spec:
    """A `disagg_spec` of our own: a whole step to the receiver that the configuration names, for a request that brings none."""

    req_id: str
    receiver_host: str
    receiver_init_port: list[int]
    is_last_prefill: bool = True
    num_transferred_tokens: int = 0
    total_chunks: int = 0


@dataclass
class _Request:
    """A request on its way, as far as log lines and futures need it."""

    name: str
    vllm: str | None = None
    tokens: int = 0
    size: int = 0
    offload: float = 0.0
    chunks: int = 0
    placed: int = 0
    last: bool = False
    future: Future = field(default_factory=Future)


class _Step(NamedTuple):
    """A part of a request that is stored at once."""

    name: str
    receiver: str
    first: bool
    last: bool
    total: int


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
        self._local = threading.local()
        # Memory objects of the batches that are not released, and what else waits for that.
        self._batches: dict[int, tuple[list[MemoryObj], list[Any], Callable | None]] = {}
        self._early: set[int] = set()
        self._requests: dict[str, _Request] = {}
        # vLLM's name of a request to the proxy's.
        self._names: dict[str, str] = {}
        self._steps = itertools.count(1)
        self._in_place = c.pd.in_place
        self._closed = False

    def allocate(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
        places = getattr(self._local, "places", None)
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

    @contextlib.contextmanager
    def storing(
        self, request: str | None, transfer_spec: Any, stream: Any = None, chunks: KnownChunks | None = None
    ) -> Iterator[None]:
        local = self._local
        local.began, local.vllm, local.stream = time.perf_counter(), request, stream
        if request is not None and not isinstance(transfer_spec, Spec):
            with self._lock:
                self._names[request] = str(transfer_spec.req_id)
        try:
            local.places = None if chunks is None or not self._in_place else self._place(chunks.keys, transfer_spec)
            yield
        finally:
            places = local.places
            if places is not None and not places.put:
                # The store ended early: nobody will ever fill them.
                self._outbox.give_up(places.request, self._complete_at())
            local.began = local.vllm = local.stream = local.places = None

    def _place(self, keys: Sequence[tuple[str, int]], spec: Any) -> Places | None:
        """Asks for pages at the decoder for the chunks of a step."""
        c = self._config
        step = self._step(spec)
        token = c.geometry.page_bytes // c.geometry.chunk_tokens
        places = self._outbox.place(
            step.name,
            step.receiver,
            [(key, tokens * token) for key, tokens in keys],
            total=step.total,
            first=step.first,
            last=step.last,
            device=self._region.device,
            patience=c.pd.in_place_patience,
        )
        try:
            return Places(step.name, [key for key, _ in keys], places, c.device)
        except Exception:
            # A torch that does not take such memory: the places are not used, now and later.
            logger.exception("kvxfer: chunks cannot be gathered in place here; they are copied from now on")
            self._in_place = False
            return Places(step.name, [key for key, _ in keys], [None] * len(places), c.device)

    def _step(self, spec: Any) -> _Step:
        """What a `disagg_spec` says of the step that this thread is storing."""
        vllm, name = getattr(self._local, "vllm", None), str(spec.req_id)
        with self._lock:
            request = self._requests.get(name)
            goes_on = request is not None and vllm is not None and request.vllm == vllm and request.tokens > 0
        return _Step(
            name=name,
            receiver=settings.address(
                spec.receiver_host, settings.port_of(spec.receiver_init_port, self._config.tp_rank)
            ),
            first=not goes_on and not getattr(spec, "num_transferred_tokens", 0),
            last=bool(spec.is_last_prefill),
            total=int(getattr(spec, "total_chunks", 0) or 0),
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
        c = self._config
        step = self._step(spec)
        page = c.geometry.page_bytes
        chunks = [
            (key.to_string(), None, [(0, valid_bytes(m))])
            if is_placed(m)
            else (key.to_string(), self._region, [(m.meta.address * page, valid_bytes(m))])
            for key, m in zip(keys, memory_objs, strict=True)
        ]
        local = self._local
        began, vllm, places = (getattr(local, name, None) for name in ("began", "vllm", "places"))
        if places is not None and places.request == step.name:
            places.put = True
            if places.keys != [key for key, _, _ in chunks]:
                # Fewer than were named, because there was no staging page for one: the decoder waits for it in vain.
                self._outbox.give_up(step.name, self._complete_at())
                logger.error(
                    "kvxfer: request %s: only %d of %d chunks were stored; the decoder computes it",
                    step.name,
                    len(chunks),
                    len(places.keys),
                )
                return None
        for memory_obj in memory_objs:
            memory_obj.ref_count_up()
        with self._lock:
            request = self._requests.get(step.name)
            if request is None or step.first:
                request = self._requests[step.name] = _Request(step.name, vllm)
            request.chunks += len(chunks)
            request.placed += sum(is_placed(m) for m in memory_objs)
            request.size += sum(runs[0][1] for _, _, runs in chunks)
            request.last = step.last
            request.tokens += sum(m.get_num_tokens() for m in memory_objs)
            if began is not None:
                request.offload += time.perf_counter() - began
        try:
            number = self._outbox.put(
                step.name,
                step.receiver,
                chunks,
                total=step.total,
                first=step.first,
                last=step.last,
                after=self._complete_at(),
            )
        except BaseException:
            for memory_obj in memory_objs:
                memory_obj.ref_count_down()
            with self._lock:
                self._requests.pop(step.name, None)
            raise
        with self._lock:
            released = number in self._early
            self._early.discard(number)
            if not released:
                self._batches[number] = (list(memory_objs), list(keys), on_complete)
        if released:
            self._let_go(memory_objs, keys, on_complete)
        if step.last and (c.pd.wait_for_arrival or isinstance(spec, Spec)):
            self._wait_for(request)
        return [request.future]

    def _complete_at(self) -> Fence | None:
        """When the pages of this step are full: LMCache waits for its copies where pages are host memory, on a GPU they go on."""
        if self._region.device is None:
            return None
        stream = getattr(self._local, "stream", None)
        return Fence(torch.cuda.current_stream() if stream is None else stream, self._region.device)

    def _wait_for(self, request: _Request) -> None:
        try:
            request.future.result(self._config.pd.request_timeout + self._config.pd.patience)
        except Exception as e:
            logger.error("kvxfer: the cache of request %s has not arrived: %s", request.name, e)

    def work(self, timeout: float) -> None:
        event = self._outbox.next_event(timeout)
        while event is not None:
            if isinstance(event, Released):
                with self._lock:
                    batch = self._batches.pop(event.batch, None)
                    if batch is None:
                        self._early.add(event.batch)
                if batch is not None:
                    self._let_go(*batch)
            else:
                self._ended(event)
            event = self._outbox.next_event(0)

    def _let_go(self, memory_objs: list[MemoryObj], keys: Sequence[Any], on_complete: Callable | None) -> None:
        for memory_obj in memory_objs:
            memory_obj.ref_count_down()
        self.allocator.page_freed()
        if on_complete is not None:
            for key in keys:
                try:
                    on_complete(key)
                except Exception as e:
                    logger.warning("kvxfer: the completion callback for %s failed: %s", key, e)

    def _ended(self, event: Ended) -> None:
        with self._lock:
            request = self._requests.pop(event.request, None) or _Request(event.request)
        self._metrics.ended(event)
        report, failure = event.report, event.failure
        if report is not None:
            took = request.offload + event.after_last_seconds
            logger.info(
                "Store %d tokens takes: %.4f ms, throughput: %.4f GB/s; offload_time: %.4f ms, put_time: %.4f ms",
                request.tokens,
                1e3 * took,
                request.size / took / 1024**3 if took else 0.0,
                1e3 * request.offload,
                1e3 * event.after_last_seconds,
            )
            logger.info(
                "kvxfer: request %s has arrived: %d chunks, %d bytes over %s, %d chunks were gathered in place, %d were there already, "
                "admitted after %.3f ms",
                event.request,
                report.written,
                report.bytes,
                report.transport,
                request.placed,
                report.present,
                1e3 * report.queued_seconds,
            )
            if not request.future.done():
                request.future.set_result(request.chunks)
            return
        hint = (
            " (PYTHONHASHSEED must be the same number on all instances)" if "hash_seed differs" in str(failure) else ""
        )
        logger.error(
            "kvxfer: request %s has not arrived (%s%s): %s%s. The decoder computes it",
            event.request,
            failure.name,
            "" if failure.retryable else ", will not get better by itself",
            failure,
            hint,
        )
        if not request.future.done():
            request.future.set_exception(failure)

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
