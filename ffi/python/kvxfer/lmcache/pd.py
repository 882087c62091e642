"""LMCache's PD backend over kvxfer's outbox and receiver: `enable_pd: True` with `transfer_channel: "kvxfer"`.

Reservation, admission, writing, checking, publication, leases, sharing of prefixes, reconnection and word to the proxy are
the library's (`kvxfer.Outbox`, `kvxfer.Receiver`). What is here translates: LMCache's keys and memory objects into chunks, its
calls into requests, and what the library reports into references let go of, log lines and metrics.

On the prefiller (`prefiller.py`), `batched_submit_put_task` hands a step of a request over and returns; the staging pages are let go
of when nothing reads them any more. Where the decoder's pool is mapped in this process, LMCache's connector gathers into the decoder's
pages to begin with (`placing.py`), and handing over is all that is left. On the decoder (`decoder.py`) a chunk is found once it is
complete and checked; it goes when the engine has taken it (`remove`), or has said that it needs it no more (`unpin`, after vLLM's own prefix cache had it).
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface

from kvxfer.agent import Agent
from kvxfer.errors import KvxferError
from kvxfer.lmcache import settings
from kvxfer.lmcache.decoder import Decoder
from kvxfer.lmcache.metrics import PdMetrics
from kvxfer.lmcache.placing import KnownChunks
from kvxfer.lmcache.prefiller import Prefiller
from kvxfer.lmcache.reading import CacheQueryResponse

logger = init_logger(__name__)

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
        side = (self._agent, c, self._dtype, self._format, self._metrics)
        try:
            if c.receives:
                self._side: Decoder | Prefiller = Decoder(*side)
            else:
                self._side = Prefiller(*side)
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

    def storing(
        self, request: str | None, transfer_spec: Any, stream: Any = None, chunks: KnownChunks | None = None
    ) -> contextlib.AbstractContextManager:
        """Around a store of LMCache's cache engine: notes when it began, which request of vLLM is which of the proxy, and the CUDA stream
        that fills the pages; the chunks that are to be allocated in it, where they are known, get places at the decoder."""
        return self._side.storing(request, transfer_spec, stream, chunks)

    @property
    def places_chunks(self) -> bool:
        """Whether `storing` has a use for the chunks of a store."""
        return self.kvxfer_config.sends and self.kvxfer_config.pd.in_place

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
