"""A prefiller's questions to its decoders: which chunks of a conversation they still have, and their bytes.

LMCache asks from its engine's thread (`pd_bidirectional: True`), through a socket of its own on `pd_peer_query_port`. Here the
question goes over the connection that the chunks travel on, so that port is not needed; and a page that is being read is not used
for another chunk meanwhile. A decoder that does not answer has nothing: whatever goes wrong, the prefiller computes the chunks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache.logging import init_logger

from kvxfer._native import lib
from kvxfer.agent import Agent
from kvxfer.channel import Sender
from kvxfer.errors import KvxferError, Unreachable
from kvxfer.lmcache import settings
from kvxfer.lmcache.buffer import valid_bytes
from kvxfer.region import Region

logger = init_logger(__name__)

# A decoder that has not answered is not asked again for this long: it would hold up every request.
_REST_S = 10.0


@dataclass
class CacheQueryResponse:
    """What a decoder has: as LMCache's message of that name."""

    cached_keys: list[str] = field(default_factory=list)
    cached_indexes: list[int] = field(default_factory=list)
    """Their pages."""


class Resting(Unreachable):
    """A decoder that has just not answered."""


class Reading:
    """One per prefiller. Any thread; calls block."""

    def __init__(self, agent: Agent, config: settings.PdConfig, region: Region):
        self._agent, self._config, self._region = agent, config, region
        self._lock = threading.Lock()
        # LMCache's name of a decoder to its address.
        self.decoders: dict[str, str] = {}
        self._senders: dict[str, Sender] = {}
        self._not_before: dict[str, float] = {}

    def name(self, decoder: str, host: str, port: int) -> None:
        """LMCache is going to ask the decoder of that name. It is connected by the first question."""
        self.decoders[decoder] = settings.address(host, int(port))

    def ask(self, decoder: str, keys: Sequence[Any]) -> CacheQueryResponse:
        """Which of these chunks a decoder has; none when it does not answer. Holds nothing."""
        address, names = self.decoders[decoder], [key.to_string() for key in keys]
        answer = CacheQueryResponse()
        try:
            for begin in range(0, len(names), lib.KVXFER_MAX_QUERY):
                part = names[begin : begin + lib.KVXFER_MAX_QUERY]
                for chunk in self.query(address, part, 0).chunks:
                    answer.cached_keys.append(part[chunk.index])
                    answer.cached_indexes.append(chunk.page)
        except KvxferError as e:
            logger.warning("kvxfer: asking decoder %s for %d chunks: %s", address, len(names), e)
        return answer

    def read(self, keys: Sequence[Any], memory_objs: Sequence[Any], spec: Any) -> int:
        """Reads the chunks that the decoder of a request has to where these memory objects are; how many, from 0 on failure. Those
        that were not read hold nothing of use."""
        if spec is None:
            return 0
        address = settings.address(spec.receiver_host, settings.port_of(spec.receiver_init_port, self._config.tp_rank))
        # What has no place is not asked for.
        count, step = min(len(keys), len(memory_objs)), lib.KVXFER_MAX_QUERY
        return sum(
            self._read_part(keys[i : min(i + step, count)], memory_objs[i : i + step], address)
            for i in range(0, count, step)
        )

    def _read_part(self, keys: Sequence[Any], memory_objs: Sequence[Any], address: str) -> int:
        c = self._config
        try:
            with self.query(address, [key.to_string() for key in keys], c.pd.lease) as found:
                targets = []
                for chunk in found.chunks:
                    to = memory_objs[chunk.index]
                    if chunk.length != valid_bytes(to):
                        logger.warning(
                            "kvxfer: decoder %s has %d bytes of chunk %s, the memory object %d: not read",
                            address,
                            chunk.length,
                            keys[chunk.index].to_string(),
                            valid_bytes(to),
                        )
                        continue
                    begin = to.meta.address * c.geometry.page_bytes
                    targets.append((chunk.index, self._region, [(begin, chunk.length)]))
                if not targets:
                    return 0
                report = found.read(targets, found.lease)
        except KvxferError as e:
            logger.warning(
                "kvxfer: reading %d chunks back from decoder %s: %s. They are computed", len(keys), address, e
            )
            return 0
        logger.info(
            "kvxfer: read %d of %d chunks back from decoder %s: %d bytes over %s in %.3f ms",
            report.chunks,
            len(keys),
            address,
            report.bytes,
            report.transport,
            1e3 * report.took_seconds,
        )
        return report.chunks

    def query(self, address: str, keys: list[str], lease: float):
        """The answer of the decoder there; raises why there is none."""
        try:
            return self._sender(address).query(keys, lease, self._config.pd.query_timeout)
        except KvxferError as e:
            if e.retryable and not isinstance(e, Resting):
                with self._lock:
                    self._not_before[address] = time.monotonic() + _REST_S
            raise

    def _sender(self, address: str) -> Sender:
        with self._lock:
            rest = self._not_before.get(address, 0.0) - time.monotonic()
            if rest > 0:
                raise Resting(f"it has not answered, and is asked again in {rest:.1f} s", lib.KVXFER_UNREACHABLE)
            known = self._senders.get(address)
        if known is not None:
            return known
        c = self._config
        made = Sender(self._agent, address, c.geometry, integrity=c.pd.integrity, timeout=c.pd.query_timeout)
        with self._lock:
            return self._senders.setdefault(address, made)

    def close(self) -> None:
        with self._lock:
            self._senders.clear()
