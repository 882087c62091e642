"""LMCache's PD backend over kvxfer's outbox and receiver: `enable_pd: True` with `transfer_channel: "kvxfer"`.

Reservation, admission, writing, checking, publication, leases, sharing of prefixes, reconnection and word to the proxy are
the library's (`kvxfer.Outbox`, `kvxfer.Receiver`). What is here translates: LMCache's keys and memory objects into chunks, its
calls into requests, and what the library reports into references let go of, log lines and metrics.

On the prefiller, `batched_submit_put_task` hands a step of a request over and returns; the staging pages are let go of when
nothing reads them any more. On the decoder a chunk is found once it is complete and checked; it goes when the engine has taken it
(`remove`), or has said that it needs it no more (`unpin`, after vLLM's own prefix cache had it).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface

from kvxfer.agent import Agent
from kvxfer.channel import Chunk, Receiver
from kvxfer.errors import KvxferError, NoCapacity
from kvxfer.gpu import Fence
from kvxfer.lmcache import settings
from kvxfer.lmcache.buffer import ReceivedChunks, Staging, tensor_over, valid_bytes
from kvxfer.lmcache.metrics import PdMetrics
from kvxfer.lmcache.reading import CacheQueryResponse, Reading
from kvxfer.outbox import Ended, Outbox, Released
from kvxfer.region import Region

logger = init_logger(__name__)

# How long a chunk that a lookup has found is kept pinned for the load that follows it.
_HELD_S = 30.0
# How long it is remembered that a chunk was taken, for an `unpin` that usually follows at once.
_FORGET_S = 600.0
# How often the backend's thread looks at what has a time of its own.
_TICK_S = 1.0


class PdBackend(AllocatorBackendInterface):
    """One instance per worker. Any thread."""

    def __init__(self, config: Any, metadata: Any):
        # Checked before anything is opened.
        self.kvxfer_config = c = settings.read(config, metadata)
        super().__init__(dst_device=c.device)
        self.config, self.metadata = config, metadata
        # LMCache and its vLLM adapter look at these.
        self.pd_config, self.tp_rank, self.corrected_device = self.kvxfer_config, c.tp_rank, c.device
        self.running = True
        self._dtype = metadata.get_dtypes()[0]
        self._format = MemoryFormat.KV_MLA_FMT if getattr(metadata, "use_mla", False) else MemoryFormat.KV_2LTD
        self._metrics = PdMetrics(c, metadata)
        if "PYTHONHASHSEED is not set" in c.geometry.hash_seed:
            logger.error(
                "kvxfer: PYTHONHASHSEED is not set: every process makes other keys from the same tokens, so no decoder finds what a "
                "prefiller sends. Set it to the same number on all instances (PYTHONHASHSEED=0); until then every hand-over is refused"
            )
        agent = dict(c.agent)
        agent["listen"] = [c.listen] if c.listen else []
        agent["name"] = f"{(c.listen or c.role).removeprefix('tcp://')[:90]}#{uuid.uuid4().hex[:16]}"
        self._agent = Agent.from_config(agent, environment=True)
        try:
            if c.receives:
                self._side: _Decoder | _Prefiller = _Decoder(self, self._agent)
            else:
                self._side = _Prefiller(self, self._agent)
        except BaseException:
            self._agent.close()
            raise
        self.memory_allocator = self._side.allocator
        self._thread = threading.Thread(target=self._run, name="kvxfer-pd", daemon=True)
        self._thread.start()
        logger.info(
            "kvxfer: PD backend, %s, rank %d of %d, %d pages of %d bytes, %s",
            c.role,
            c.tp_rank,
            c.geometry.tp_size,
            c.buffer_bytes // c.geometry.page_bytes,
            c.geometry.page_bytes,
            f"listening on {', '.join(self._agent.addresses)}" if c.receives else f"proxy {c.proxy or 'not told'}",
        )

    def __str__(self) -> str:
        return "PDBackend"

    # ---- memory ----

    def initialize_allocator(self, config: Any, metadata: Any) -> Any:
        return self.memory_allocator

    def get_memory_allocator(self) -> Any:
        return self.memory_allocator

    def get_allocator_backend(self) -> PdBackend:
        return self

    def allocate(
        self,
        shapes: Any,
        dtypes: Any,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> MemoryObj | None:
        """A staging page of the prefiller; waits for one at most `pd_allocation_timeout_sec`. A decoder has none to give."""
        return self._side.allocate(shapes, dtypes, fmt or self._format)

    def batched_allocate(
        self,
        shapes: Any,
        dtypes: Any,
        batch_size: int,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> list[MemoryObj] | None:
        pages: list[MemoryObj] = []
        while len(pages) < batch_size:
            page = self.allocate(shapes, dtypes, fmt)
            if page is None:
                for taken in pages:
                    taken.ref_count_down()
                return None
            pages.append(page)
        return pages

    def calculate_chunk_budget(self) -> int:
        return self.kvxfer_config.buffer_bytes // self.kvxfer_config.geometry.page_bytes

    # ---- the prefiller ----

    def exists_in_put_tasks(self, key: Any) -> bool:
        return False

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        memory_objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Future] | None:
        """Hands a step of a request over and returns. The future is the number of chunks handed over, once the request has ended
        (at its last step) or the step's bytes are not read any more; its exception is why the request failed."""
        return self._side.put(keys, memory_objs, transfer_spec, on_complete_callback)

    def spec_for(self, request: str | None, transfer_spec: Any) -> Any:
        """Where a request of vLLM goes: to its own `disagg_spec`, to the receiver that the configuration names, or nowhere (None)."""
        return self._side.spec_for(request, transfer_spec)

    def storing(self, request: str | None, transfer_spec: Any, stream: Any = None) -> contextlib.AbstractContextManager:
        """Around a store of LMCache's cache engine: notes when it began, which request of vLLM is which of the proxy, and the CUDA stream
        that fills the pages."""
        return self._side.storing(request, transfer_spec, stream)

    def handed_over(self, request: str | None, transfer_spec: Any) -> int:
        """Tokens of a request of vLLM that earlier steps have handed over; whole chunks. LMCache counts them in an object of which
        worker processes have a copy for each step, so that every step would begin from the first token again."""
        return self._side.handed_over(request, transfer_spec)

    def vllm_finished(self, requests: set[str]) -> None:
        """vLLM is done with these requests, whether they ended well or were aborted."""
        self._side.vllm_finished(requests)

    def cancel_request(self, req_id: str) -> None:
        self._side.vllm_finished({req_id})

    # ---- the prefiller asks and reads back: `pd_bidirectional` ----

    @property
    def cache_query_sockets(self) -> dict[str, str]:
        """The decoders that LMCache has named, each with its address. LMCache asks only a backend that has this."""
        return self._side.decoders

    def _ensure_peer_connection(
        self, receiver_id: str, receiver_host: str, receiver_init_port: int, receiver_alloc_port: int
    ) -> None:
        """LMCache names a decoder before it asks it. It is connected by the first question."""
        self._side.name_decoder(receiver_id, receiver_host, receiver_init_port)

    def _ensure_cache_query_connection(self, receiver_id: str, receiver_host: str, receiver_query_port: int) -> None:
        """Questions go over the same connection as chunks: there is no other port to connect to."""

    def query_remote_cache(self, receiver_id: str, keys: Sequence[Any]) -> CacheQueryResponse:
        """Which of these chunks the decoder has: keys and pages. Empty when it does not answer in time."""
        return self._side.ask(receiver_id, keys)

    def batched_submit_read_task(
        self, keys: Sequence[Any], local_memory_objs: list[MemoryObj], transfer_spec: Any = None
    ) -> int:
        """Reads the chunks that the decoder has into memory objects of this backend, each byte checked or none counted. Returns how
        many; blocks."""
        return self._side.read_back(keys, local_memory_objs, transfer_spec)

    # ---- the decoder ----

    def contains(self, key: Any, pin: bool = False) -> bool:
        """True once every byte of the chunk has arrived and been checked. It is kept for the load that follows."""
        return self._side.find(key.to_string())

    def batched_contains(self, keys: Sequence[Any], pin: bool = False) -> int:
        """How many keys from the first on are there."""
        for count, key in enumerate(keys):
            if not self._side.find(key.to_string()):
                return count
        return len(keys)

    def get_blocking(self, key: Any) -> MemoryObj | None:
        return self._side.take(key.to_string())

    def remove(self, key: Any, force: bool = True) -> bool:
        """The engine has taken the chunk: its memory object is let go of, and its page is free when nobody else waits for it."""
        return self._side.remove(key.to_string())

    def pin(self, key: Any) -> bool:
        return True

    def unpin(self, key: Any) -> bool:
        """The request that looked the chunk up is over with it, whether it was loaded or vLLM had it already."""
        self._side.unpin(key.to_string())
        return True

    # ---- the rest ----

    @property
    def pool_stats(self):
        """Pages by state on a decoder, None on a prefiller."""
        return self._side.stats()

    def _run(self) -> None:
        while self.running:
            try:
                self._side.work(_TICK_S)
                self._metrics.update(self._side.stats())
            except KvxferError as e:
                if self.running:
                    logger.error("kvxfer: %s", e)
                    time.sleep(_TICK_S)
            except Exception:
                logger.exception("kvxfer: the PD backend's thread stumbled; it goes on")
                time.sleep(_TICK_S)

    def close(self) -> None:
        """Ends what is under way within `pd_shutdown_timeout_sec`. Closing twice is fine."""
        if not self.running:
            return
        self.running = False
        try:
            self._side.close(self.kvxfer_config.shutdown_timeout)
        except KvxferError as e:
            logger.warning("kvxfer: closing the PD backend: %s", e)
        self._thread.join(self.kvxfer_config.shutdown_timeout + _TICK_S)
        self._agent.close()


@dataclass
class _Spec:
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
    last: bool = False
    future: Future = field(default_factory=Future)


def gpu_buffer(c: settings.PdConfig) -> torch.Tensor:
    """The buffer on a GPU: LMCache's own way of allocating it, so that its kernels and torch know it."""
    return torch.empty(c.buffer_bytes, dtype=torch.uint8, device=c.device)


def buffer_of(agent: Agent, c: settings.PdConfig) -> tuple[Region, torch.Tensor]:
    """The prefiller's pages: shareable host memory, or a GPU's."""
    if c.device != "cpu":
        tensor = gpu_buffer(c)
        return agent.register(tensor), tensor
    region = agent.allocate(c.buffer_bytes)
    return region, tensor_over(region.address, c.buffer_bytes)


class _Prefiller:
    """The sending side: staging pages, requests under way, what became of them."""

    def __init__(self, backend: PdBackend, agent: Agent):
        c = backend.kvxfer_config
        self._config, self._metrics = c, backend._metrics
        self._region, buffer = buffer_of(agent, c)
        self.allocator = Staging(buffer, c.chunk_shape, backend._dtype, backend._format)
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
        self._closed = False

    def allocate(self, shapes: Any, dtypes: Any, fmt: MemoryFormat) -> MemoryObj | None:
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
        return _Spec(f"{request or 'request'}#{next(self._steps)}", host, ports)

    def handed_over(self, request: str | None, transfer_spec: Any) -> int:
        with self._lock:
            known = self._requests.get(str(transfer_spec.req_id))
            return known.tokens if known is not None and request is not None and known.vllm == request else 0

    @contextlib.contextmanager
    def storing(self, request: str | None, transfer_spec: Any, stream: Any = None) -> Iterator[None]:
        self._local.began, self._local.vllm, self._local.stream = time.perf_counter(), request, stream
        if request is not None and not isinstance(transfer_spec, _Spec):
            with self._lock:
                self._names[request] = str(transfer_spec.req_id)
        try:
            yield
        finally:
            self._local.began = self._local.vllm = self._local.stream = None

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
        receiver = settings.address(spec.receiver_host, settings.port_of(spec.receiver_init_port, c.tp_rank))
        name, last = str(spec.req_id), bool(spec.is_last_prefill)
        page = c.geometry.page_bytes
        chunks = [
            (key.to_string(), self._region, [(m.meta.address * page, valid_bytes(m))])
            for key, m in zip(keys, memory_objs, strict=True)
        ]
        began, vllm = getattr(self._local, "began", None), getattr(self._local, "vllm", None)
        for memory_obj in memory_objs:
            memory_obj.ref_count_up()
        with self._lock:
            request = self._requests.get(name)
            goes_on = request is not None and vllm is not None and request.vllm == vllm and request.tokens > 0
            first = not goes_on and not getattr(spec, "num_transferred_tokens", 0)
            if request is None or first:
                request = self._requests[name] = _Request(name, vllm)
            request.chunks += len(chunks)
            request.size += sum(runs[0][1] for _, _, runs in chunks)
            request.last = last
            request.tokens += sum(m.get_num_tokens() for m in memory_objs)
            if began is not None:
                request.offload += time.perf_counter() - began
        try:
            total = int(getattr(spec, "total_chunks", 0) or 0)
            number = self._outbox.put(
                name, receiver, chunks, total=total, first=first, last=last, after=self._complete_at()
            )
        except BaseException:
            for memory_obj in memory_objs:
                memory_obj.ref_count_down()
            with self._lock:
                self._requests.pop(name, None)
            raise
        with self._lock:
            released = number in self._early
            self._early.discard(number)
            if not released:
                self._batches[number] = (list(memory_objs), list(keys), on_complete)
        if released:
            self._let_go(memory_objs, keys, on_complete)
        if last and (c.pd.wait_for_arrival or isinstance(spec, _Spec)):
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
                "kvxfer: request %s has arrived: %d chunks, %d bytes over %s, %d chunks were there already, admitted after %.3f ms",
                event.request,
                report.written,
                report.bytes,
                report.transport,
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


class _Decoder:
    """The receiving side: a pool of pages, and chunks on loan to the engine."""

    def __init__(self, backend: PdBackend, agent: Agent):
        c = backend.kvxfer_config
        self._metrics = backend._metrics
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
        self.allocator = ReceivedChunks(pool, c.geometry.page_bytes, c.chunk_shape, backend._dtype, backend._format)
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

    def storing(self, request: str | None, transfer_spec: Any, stream: Any = None) -> contextlib.AbstractContextManager:
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
