"""LMCache's multi-process mode over kvxfer: `lmcache server … --p2p-transfer-engine kvxfer`.

A cache server reads objects out of another server's L1 memory. Each server has one agent, which listens on its transfer-channel
address and exports its L1 memory to be read; a client is the way to one other server. An object is (offset, size) in bytes on both
sides, so a read of many objects is one one-sided transfer with a result for each.

Nothing here blocks LMCache's loading thread but the first connection to a server, which has a deadline. A server that went away
fails the reads that meet it and is connected again, on a thread of its own, by the next one.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.distributed.transfer_channel.abstract import (
    TransferChannelClient,
    TransferChannelContext,
    TransferChannelServer,
)
from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress, TransferChannelReadResult

from kvxfer import errors
from kvxfer._native import lib
from kvxfer.agent import Agent, Peer, RemoteRegion
from kvxfer.errors import KvxferError
from kvxfer.transfer import Transfer

__all__ = ["KvxferTransferChannelContext"]

logger = init_logger(__name__)

_L1 = "lmcache.l1"
# A first connection: the server that is to be read from has announced itself, so it is there or gone.
_CONNECT_S = 10.0
# A read that is not over by then is given up, and no byte of it arrives later. LMCache gives its objects' memory to others after
# `load_timeout_s`, 10 seconds at least unless configured.
_READ_S = 8.0
# LMCache asks no more for a read that it has given up; its result is kept this long.
_FORGET_S = 120.0
# How long a cancelled read may take to come to rest.
_CANCEL_S = 10.0


class _Read:
    """A read under way. `moving` are the objects that are being moved; the others were refused."""

    def __init__(self, count: int, moving: list[int]):
        self.count, self.moving = count, moving
        self.transfer: Transfer | None = None
        # Without a transfer: nothing to move, or not connected yet.
        self.over = not moving
        self.given_up = False
        self.since = time.monotonic()

    def result(self) -> list[bool] | None:
        if not self.over and (self.transfer is None or not self.transfer.done):
            return None
        mask = [False] * self.count
        if self.transfer is not None:
            for index, code in zip(self.moving, self.transfer.outcomes, strict=True):
                mask[index] = code == lib.KVXFER_OK
        return mask


class KvxferTransferChannelClient(TransferChannelClient):
    """The way to one other server. Any thread."""

    def __init__(self, context: KvxferTransferChannelContext, url: str):
        self._context, self.url = context, url
        self._lock = threading.Lock()
        self._tasks: dict[int, _Read] = {}
        self._ids = itertools.count()
        self._remote: tuple[Peer, RemoteRegion, int] | None = None
        # Connects again where the server has been away; made when needed.
        self._again: ThreadPoolExecutor | None = None
        self._closed = False

    def connect(self) -> None:
        """Blocks until the server is reached; raises when it is not."""
        peer = self._context.reach(self.url)
        remote = peer.region(_L1, _CONNECT_S)
        size = len(remote)
        with self._lock:
            self._remote = (peer, remote, size)
        logger.info(
            "kvxfer: connected to the cache server at %s, %d bytes reached over %s",
            self.url,
            size,
            ", ".join(remote.transports),
        )

    @property
    def is_up(self) -> bool:
        with self._lock:
            return self._remote is not None and self._remote[0].is_up

    def submit_read(
        self, local_addresses: list[TransferChannelAddress], remote_addresses: list[TransferChannelAddress]
    ) -> int:
        """Starts reading and returns the number to ask for. An object whose remote address cannot be right fails by itself."""
        if len(local_addresses) != len(remote_addresses):
            raise ValueError(
                f"{len(local_addresses)} local addresses, {len(remote_addresses)} remote ones: as many are needed"
            )
        for address in local_addresses:
            if not self._context.holds(address):
                raise ValueError(
                    f"local address {address.offset}+{address.size} is outside the L1 memory of {self._context.size} bytes"
                )
        with self._lock:
            if self._closed:
                raise errors.Closed(f"the client of {self.url} is closed", lib.KVXFER_CLOSED)
            remote = self._remote if self._remote is not None and self._remote[0].is_up else None
            task = next(self._ids)
            pairs = list(zip(local_addresses, remote_addresses, strict=True))
            forgotten = time.monotonic() - _FORGET_S
            for old in [n for n, read in self._tasks.items() if read.since < forgotten and read.result() is not None]:
                del self._tasks[old]
            if remote is not None:
                self._tasks[task] = self._start(pairs, remote)
            else:
                read = self._tasks[task] = _Read(len(pairs), list(range(len(pairs))))
                if self._again is None:
                    self._again = ThreadPoolExecutor(1, thread_name_prefix="kvxfer-mp-connect")
                self._again.submit(self._connect_and_start, read, pairs)
        return task

    def _start(self, pairs: list, remote: tuple[Peer, RemoteRegion, int]) -> _Read:
        peer, region, size = remote
        moving, pieces = [], []
        for index, (here, there) in enumerate(pairs):
            if there.is_valid() and there.offset + there.size <= size and there.size <= here.size:
                moving.append(index)
                pieces.append((here.offset, there.offset, there.size))
            else:
                logger.warning(
                    "kvxfer: object %d, %d+%d at %s, is not read: that server has %d bytes, and %d are waiting for it here",
                    index,
                    there.offset,
                    there.size,
                    self.url,
                    size,
                    here.size,
                )
        read = _Read(len(pairs), moving)
        if moving:
            try:
                read.transfer = peer.read(self._context.region, region, pieces, timeout=_READ_S)
            except KvxferError as e:
                logger.error("kvxfer: a read of %d objects from %s: %s", len(pairs), self.url, e)
                read.over = True
        return read

    def _connect_and_start(self, read: _Read, pairs: list) -> None:
        try:
            if not self.is_up:
                self.connect()
            with self._lock:
                if self._remote is None or read.given_up:
                    read.over = True
                    return
                started = self._start(pairs, self._remote)
                read.moving, read.transfer, read.over = started.moving, started.transfer, started.over
        except KvxferError as e:
            logger.error("kvxfer: the cache server at %s is not reachable: %s", self.url, e)
            read.over = True

    def query_read_status(self, task_id: int) -> TransferChannelReadResult:
        with self._lock:
            if task_id not in self._tasks:
                raise KeyError(f"no read number {task_id} (a finished one is forgotten once its result has been given)")
            mask = self._tasks[task_id].result()
            if mask is None:
                return TransferChannelReadResult(finished=False)
            read = self._tasks.pop(task_id)
        if read.transfer is not None and not all(mask):
            logger.error("kvxfer: %d of %d objects from %s have not arrived", mask.count(False), len(mask), self.url)
        return TransferChannelReadResult(finished=True, succeeded_mask=mask)

    def close(self) -> None:
        """Ends reads under way: when this returns, no byte of theirs arrives any more. Closing twice is fine."""
        with self._lock:
            self._closed = True
            reads = list(self._tasks.values())
            self._tasks.clear()
            again, self._again = self._again, None
            remote, self._remote = self._remote, None
            for read in reads:
                read.given_up = True
        for read in reads:
            if read.transfer is not None and not read.transfer.cancel():
                try:
                    read.transfer.wait(_CANCEL_S)
                except KvxferError:
                    pass
        if again is not None:
            again.shutdown(wait=False, cancel_futures=True)
        if remote is not None:
            try:
                remote[0].disconnect()
            except KvxferError:
                pass


class KvxferTransferChannelServer(TransferChannelServer):
    """What others connect to. The listening is the agent's."""

    def __init__(self, listen_url: str, advertise_url: str, l1_memory_desc: Any):
        self.listen_url, self.advertise_url, self.l1_memory_desc = listen_url, advertise_url, l1_memory_desc

    def close(self) -> None:
        """Nothing by itself: the context closes the agent."""


class KvxferTransferChannelContext(TransferChannelContext):
    """One agent beside the L1 memory. `listen_url` and `advertise_url` are `host:port`."""

    def __init__(self, l1_memory_desc: Any, listen_url: str, advertise_url: str, **_: Any):
        self.listen_url, self.advertise_url = _host_and_port(listen_url), _host_and_port(advertise_url)
        self.size = l1_memory_desc.size
        for variable in ("KVXFER_NAME", "KVXFER_LISTEN", "KVXFER_CONFIG"):
            if os.environ.get(variable):
                raise errors.InvalidArgument(
                    f"{variable} is set, but name and address come from --p2p-advertise-url and --p2p-listen-url: unset it",
                    lib.KVXFER_INVALID_ARGUMENT,
                )
        # Others find a connection that this server has opened by the address in its name.
        name = f"{self.advertise_url[:90]}#{uuid.uuid4().hex[:16]}"
        self._agent = Agent.from_config({"name": name, "listen": [f"tcp://{self.listen_url}"]}, environment=True)
        try:
            self.region = self._agent.register_memory(l1_memory_desc.ptr, l1_memory_desc.size)
            self.region.export(_L1, "r")
        except BaseException:
            self._agent.close()
            raise
        self._lock = threading.Lock()
        self._clients: dict[str, TransferChannelClient] = {}
        self._server = KvxferTransferChannelServer(listen_url, advertise_url, l1_memory_desc)
        logger.info(
            "kvxfer: %d bytes of L1 memory can be read at %s (%s)",
            self.size,
            self.advertise_url,
            ", ".join(self._agent.addresses),
        )

    def holds(self, address: TransferChannelAddress) -> bool:
        return address.offset >= 0 and address.size >= 0 and address.offset + address.size <= self.size

    def get_transfer_channel_address(self, lmcache_addresses: list[tuple[int, int]]) -> list[TransferChannelAddress]:
        addresses = [TransferChannelAddress(offset=offset, size=size) for offset, size in lmcache_addresses]
        for address in addresses:
            if not self.holds(address):
                raise ValueError(f"{address.offset}+{address.size} is outside the L1 memory of {self.size} bytes")
        return addresses

    def get_transfer_channel_server(self) -> TransferChannelServer:
        return self._server

    def get_transfer_channel_client(self, peer_advertise_url: str) -> TransferChannelClient:
        """Connects where there is no client yet, for ten seconds at most, and raises when nobody is there."""
        with self._lock:
            client = self._clients.get(peer_advertise_url)
        if client is not None:
            return client
        client = KvxferTransferChannelClient(self, _host_and_port(peer_advertise_url))
        client.connect()
        return self.register_client(peer_advertise_url, client)

    def register_client(self, key: str, client: TransferChannelClient) -> TransferChannelClient:
        """Keeps the client, or the one that is there already: `client` is closed then."""
        with self._lock:
            kept = self._clients.setdefault(key, client)
        # The connection is one and the same, and goes on.
        if kept is not client and not isinstance(client, KvxferTransferChannelClient):
            client.close()
        return kept

    def remove_transfer_channel_client(self, peer_advertise_url: str) -> None:
        with self._lock:
            client = self._clients.pop(peer_advertise_url, None)
        if client is not None:
            client.close()

    def get_num_connected_clients(self) -> int:
        """Servers that are connected, whichever side has opened the connection."""
        with self._lock:
            known = {_host_and_port(url) for url in self._clients}
        return len(known | {name.rpartition("#")[0] for name in self._agent.peers})

    def reach(self, url: str) -> Peer:
        """The agent that listens on `url`: by the connection that it has opened, or by one of ours. Blocks."""
        name = next((name for name in self._agent.peers if name.rpartition("#")[0] == url), None)
        if name is not None:
            peer = self._agent.peer(name)
            if peer.is_up:
                return peer
        return self._agent.connect(f"tcp://{url}", _CONNECT_S)

    def close(self) -> None:
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()
        self._server.close()
        self._agent.close()
        try:
            self.region.close()
        except KvxferError as e:
            logger.warning("kvxfer: %s", e)


def _host_and_port(url: str) -> str:
    """`host:port`, also from `tcp://host:port`."""
    stripped = url.split("://", 1)[-1]
    host, _, port = stripped.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{url!r} is not host:port")
    return stripped
