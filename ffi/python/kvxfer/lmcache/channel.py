"""LMCache's transfer channel over kvxfer: `transfer_channel: "kvxfer"`.

LMCache's PD and P2P backends own a buffer of equal pages on each side, agree on page numbers by themselves, and ask the channel
to connect and to copy pages. Here every channel is an agent. One with a `peer_init_url` listens there; each exports its buffer
and a small description of it. A transfer is one one-sided write or read: page i begins at byte i * align_bytes, and only the valid
bytes of a memory object move.

With vLLM nothing but the wheel is needed. Elsewhere:

    from kvxfer.lmcache import register
    register()

Settings: `KVXFER_*` environment variables, and below `kvxfer` in LMCache's `extra_config` every setting of an agent, e.g.
`extra_config: {kvxfer: {auth_key: …, transports: {forbid: [tcp]}}}`; the environment wins.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.transfer_channel.abstract import BaseTransferChannel
from lmcache.v1.transfer_channel.transfer_utils import P2PInitSideMsg, P2PInitSideRetMsg

from kvxfer import errors
from kvxfer._native import lib
from kvxfer.agent import Agent, Peer, RemoteRegion
from kvxfer.errors import Closed, KvxferError, Mismatch, OutOfRange, PeerGone, Unreachable
from kvxfer.lmcache.buffer import valid_bytes
from kvxfer.transfer import Transfer, TransferReport

__all__ = ["KvxferChannel"]

logger = init_logger(__name__)

_BUFFER, _DESCRIPTION = "lmcache.buffer", "lmcache.description"
_DESCRIPTION_VERSION = 1
_MAX_DESCRIPTION = 64 << 10
# A receiver may start later than its sender: refused connections are tried again this long, this often.
_CONNECT_S, _RETRY_S = 10.0, 0.2
# What a handshake may take where the receiver must be there already.
_HANDSHAKE_S = 5.0
# How long a cancelled transfer may take to come to rest.
_CANCEL_S = 10.0


@dataclass(frozen=True)
class _Remote:
    """A connected peer with its buffer."""

    url: str
    peer: Peer
    buffer: RemoteRegion
    size: int
    description: dict[str, Any]


class KvxferChannel(BaseTransferChannel):
    """One agent beside LMCache's buffer. Methods without `async` may be called from any thread and block; those with it run on any
    event loop and never block it."""

    def __init__(
        self,
        async_mode: bool = False,
        role: str = "both",
        buffer_ptr: int = 0,
        buffer_size: int = 0,
        align_bytes: int = 0,
        tp_rank: int = 0,
        peer_init_url: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ):
        kind = str(device or "cpu").partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise errors.Unsupported(
                f"transfer_channel: kvxfer moves host and CUDA memory; pd_buffer_device is {device!r}",
                lib.KVXFER_UNSUPPORTED,
            )
        if align_bytes <= 0 or buffer_size <= 0 or buffer_size % align_bytes:
            raise errors.InvalidArgument(
                f"buffer_size {buffer_size} is not a positive multiple of align_bytes {align_bytes}",
                lib.KVXFER_INVALID_ARGUMENT,
            )
        self.role, self.async_mode, self.peer_init_url = role, async_mode, peer_init_url
        # Read by the base class, which answers P2P's side messages.
        self.peer_lookup_url = kwargs.get("peer_lookup_url")
        self._page, self._size = align_bytes, buffer_size
        self._remotes: dict[str, _Remote] = {}
        self._urls: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False

        # Names are unique: two hosts may well listen on the same 127.0.0.1:7300 or 0.0.0.0:7300.
        where = peer_init_url or f"{role}@{socket.gethostname()}"
        settings = _extra_config()
        settings["listen"] = [f"tcp://{peer_init_url}"] if peer_init_url else []
        settings["name"] = f"{where[:90]}#{uuid.uuid4().hex[:16]}"
        for variable in ("KVXFER_NAME", "KVXFER_LISTEN", "KVXFER_CONFIG"):
            if os.environ.get(variable):
                raise errors.InvalidArgument(
                    f"{variable} is set, but the channel's name and address come from LMCache's configuration (pd_peer_host, "
                    "pd_peer_init_port): unset it, and put other settings below extra_config: kvxfer",
                    lib.KVXFER_INVALID_ARGUMENT,
                )
        if kind == "cpu":
            _prefer_huge_pages(buffer_ptr, buffer_size)
        self._agent = Agent.from_config(settings, environment=True)
        try:
            self._buffer = self._agent.register_memory(buffer_ptr, buffer_size)
            self._buffer.export(_BUFFER, "rw")
            self._ours = self._description(tp_rank)
            self._described = self._agent.register(bytearray(json.dumps(self._ours).encode()))
            self._described.export(_DESCRIPTION, "r")
        except BaseException:
            self._agent.close()
            raise
        logger.info(
            "kvxfer: %s channel %s, %d pages of %d bytes, listening on %s",
            "async" if async_mode else "sync",
            self._agent.name,
            buffer_size // align_bytes,
            align_bytes,
            ", ".join(self._agent.addresses) or "nothing (it connects)",
        )

    def _description(self, tp_rank: int) -> dict[str, Any]:
        return {
            "version": _DESCRIPTION_VERSION,
            "align_bytes": self._page,
            "buffer_size": self._size,
            "tp_rank": tp_rank,
            "hash_seed": os.environ.get("PYTHONHASHSEED", ""),
            "peer_lookup_url": self.peer_lookup_url,
        }

    # ---- connecting ----

    def lazy_init_peer_connection(self, local_id, peer_id, peer_init_url, init_side_msg=None):
        # The PD backends call this on the engine's thread, where an exception ends the engine. A decoder that is away for a while
        # is no reason for that: nothing can be allocated there either, and the first transfer connects once it is back. What
        # no waiting cures (another page size, a wrong key) is raised, and so is everything to P2P, which can handle it.
        try:
            remote = self._connect(peer_id, peer_init_url)
        except KvxferError as e:
            if init_side_msg is not None or not e.retryable:
                raise
            logger.error("kvxfer: %s is not reachable yet (%s); the next transfer to it tries again", peer_init_url, e)
            return None
        return self._side_answer(remote, init_side_msg)

    async def async_lazy_init_peer_connection(self, local_id, peer_id, peer_init_url, init_side_msg=None):
        # Blocking, so on another thread; a handshake is rare.
        connect, arguments = self.lazy_init_peer_connection, (local_id, peer_id, peer_init_url, init_side_msg)
        return await asyncio.get_running_loop().run_in_executor(None, connect, *arguments)

    @staticmethod
    def _side_answer(remote: _Remote, message):
        if message is None:
            return None
        if not isinstance(message, P2PInitSideMsg):
            raise TypeError(f"side message {type(message).__name__}: this channel answers P2PInitSideMsg")
        return P2PInitSideRetMsg(peer_lookup_url=remote.description["peer_lookup_url"])

    def remote_xfer_handler_exists(self, receiver_or_sender_id: str) -> bool:
        with self._lock:
            remote = self._remotes.get(receiver_or_sender_id)
        return (remote is not None and remote.peer.is_up) or self._name_of(receiver_or_sender_id) is not None

    def _name_of(self, url: str) -> str | None:
        """The connected agent that listens on `url`, whichever side connected."""
        return next((name for name in self._agent.peers if name.rpartition("#")[0] == url), None)

    def _connect(self, peer_id: str, url: str, patience: float | None = None) -> _Remote:
        with self._lock:
            known = self._urls.setdefault(peer_id, url)
            remote = self._remotes.get(peer_id)
        if known != url:
            raise Mismatch(
                f"id {peer_id!r} stands for {known!r} and for {url!r}; LMCache joins host and port without a separator: "
                "give one of the receivers another port",
                lib.KVXFER_MISMATCH,
            )
        if remote is not None and remote.peer.is_up:
            return remote
        deadline = time.monotonic() + (_CONNECT_S if patience is None else patience)
        while True:
            try:
                peer = self._agent.connect(f"tcp://{url}", max(_HANDSHAKE_S, deadline - time.monotonic()))
                return self._admit(peer_id, url, peer)
            except Unreachable:
                if time.monotonic() + _RETRY_S > deadline:
                    raise
            time.sleep(_RETRY_S)

    def _admit(self, peer_id: str, url: str, peer: Peer) -> _Remote:
        """Reads the peer's description, compares it with ours, and keeps the peer."""
        place = peer.region(_DESCRIPTION)
        if len(place) > _MAX_DESCRIPTION:
            raise errors.TooLarge(
                f"{url}: a description of {len(place)} bytes, at most {_MAX_DESCRIPTION} are read", lib.KVXFER_TOO_LARGE
            )
        text = bytearray(len(place))
        with self._agent.register(text) as scratch:
            peer.read(scratch, place, [(0, 0, len(text))]).wait()
        try:
            description = json.loads(text)
            theirs = {key: description[key] for key in ("version", "align_bytes", "tp_rank", "buffer_size")}
        except (ValueError, KeyError, TypeError) as e:
            raise errors.error(lib.KVXFER_PROTOCOL, f"{url}: not the description of an LMCache buffer: {e}") from None
        ours = self._ours
        for key, what in (
            ("version", "version of the channel"),
            ("align_bytes", "page size in bytes (align_bytes)"),
            ("tp_rank", "tensor-parallel rank"),
        ):
            if theirs[key] != ours[key]:
                raise Mismatch(f"{what} differs: here {ours[key]!r}, at {url} {theirs[key]!r}", lib.KVXFER_MISMATCH)
        if description.get("hash_seed") != ours["hash_seed"]:
            logger.warning(
                "kvxfer: PYTHONHASHSEED differs: here %r, at %s %r. LMCache's keys will not match unless its hash is another one than Python's",
                ours["hash_seed"],
                url,
                description.get("hash_seed"),
            )
        buffer = peer.region(_BUFFER)
        remote = _Remote(url, peer, buffer, len(buffer), description)
        with self._lock:
            self._remotes[peer_id] = remote
            self._urls[peer_id] = url
        logger.info("kvxfer: connected to %s (%s), reached over %s", url, peer.name, ", ".join(buffer.transports))
        return remote

    def _known(self, peer_id: str) -> _Remote | None:
        """The peer if it is connected; does not block."""
        if self._closed:
            raise Closed("the transfer channel is closed", lib.KVXFER_CLOSED)
        with self._lock:
            remote = self._remotes.get(peer_id)
        return remote if remote is not None and remote.peer.is_up else None

    def _reach(self, peer_id: str) -> _Remote:
        """Connects again where the peer was restarted, or takes the connection that it opened. Blocks."""
        with self._lock:
            url = self._urls.get(peer_id)
        if url is not None:
            # The pages were allocated by whoever listens there now. No patience: nobody there means nothing to write to.
            return self._connect(peer_id, url, patience=0)
        name = self._name_of(peer_id)
        if name is None:
            raise PeerGone(f"no connection to {peer_id!r}", lib.KVXFER_PEER_GONE)
        return self._admit(peer_id, peer_id, self._agent.peer(name))

    # ---- moving pages ----

    def get_local_mem_indices(self, objects) -> list[int]:
        indices = []
        for memory_object in objects:
            if isinstance(memory_object, (bytes, bytearray, memoryview)):
                raise NotImplementedError(
                    "raw bytes do not lie in the registered buffer; only memory objects can be transferred"
                )
            indices.append(memory_object.meta.address)
        return indices

    def _pieces(self, objects, remote: _Remote, remote_indexes) -> list[tuple[int, int, int]]:
        if len(objects) != len(remote_indexes):
            raise errors.InvalidArgument(
                f"{len(objects)} memory objects, {len(remote_indexes)} remote pages", lib.KVXFER_INVALID_ARGUMENT
            )
        pieces = []
        for memory_object, here, there in zip(
            objects, self.get_local_mem_indices(objects), remote_indexes, strict=True
        ):
            length = valid_bytes(memory_object)
            if length > self._page:
                raise errors.TooLarge(
                    f"a memory object of {length} bytes does not fit a page of {self._page}", lib.KVXFER_TOO_LARGE
                )
            for side, index, size in (("here", here, self._size), (f"at {remote.url}", there, remote.size)):
                if not 0 <= index < size // self._page:
                    raise OutOfRange(f"page {index} {side}: there are {size // self._page}", lib.KVXFER_OUT_OF_RANGE)
            if length:
                pieces.append((here * self._page, there * self._page, length))
        return pieces

    def _start(self, verb: str, objects, remote: _Remote, remote_indexes) -> Transfer | None:
        pieces = self._pieces(objects, remote, remote_indexes)
        if not pieces:
            return None
        move = remote.peer.write if verb == "wrote" else remote.peer.read
        return move(self._buffer, remote.buffer, pieces)

    def _finished(self, verb: str, count: int, remote: _Remote, report: TransferReport) -> int:
        direction = "to" if verb == "wrote" else "from"
        gbps = report.bytes / report.seconds / 1e9 if report.seconds else 0.0
        logger.info(
            "kvxfer: %s %d object%s, %d bytes over %s %s %s in %.2f ms (%.2f GB/s)",
            verb,
            count,
            "" if count == 1 else "s",
            report.bytes,
            report.transport,
            direction,
            remote.url,
            1e3 * report.seconds,
            gbps,
        )
        return count

    def _move(self, verb: str, objects, peer_id: str, remote_indexes) -> int:
        remote = self._known(peer_id) or self._reach(peer_id)
        transfer = self._start(verb, objects, remote, remote_indexes)
        if transfer is None:
            return len(objects)
        return self._finished(verb, len(objects), remote, transfer.wait())

    async def _async_move(self, verb: str, objects, peer_id: str, remote_indexes) -> int:
        remote = self._known(peer_id)
        if remote is None:
            remote = await asyncio.get_running_loop().run_in_executor(None, self._reach, peer_id)
        transfer = self._start(verb, objects, remote, remote_indexes)
        if transfer is None:
            return len(objects)
        try:
            report = await transfer
        except asyncio.CancelledError:
            # LMCache gives the pages to others as soon as this returns, so nothing may move any more.
            if not transfer.cancel():
                await asyncio.shield(_come_to_rest(transfer))
            raise
        return self._finished(verb, len(objects), remote, report)

    def batched_write(self, objects, transfer_spec=None) -> int:
        return self._move("wrote", objects, *_spec(transfer_spec, "receiver_id"))

    def batched_read(self, buffers, transfer_spec=None) -> int:
        return self._move("read", buffers, *_spec(transfer_spec, "sender_id"))

    async def async_batched_write(self, objects, transfer_spec=None) -> int:
        return await self._async_move("wrote", objects, *_spec(transfer_spec, "receiver_id"))

    async def async_batched_read(self, buffers, transfer_spec=None) -> int:
        return await self._async_move("read", buffers, *_spec(transfer_spec, "sender_id"))

    # LMCache declares a two-sided form as well, which none of its backends calls.

    def batched_send(self, objects, transfer_spec=None) -> int:
        raise NotImplementedError("kvxfer's channel is one-sided: use batched_write")

    def batched_recv(self, buffers, transfer_spec=None) -> int:
        raise NotImplementedError("kvxfer's channel is one-sided: use batched_read")

    async def async_batched_send(self, objects, transfer_spec=None) -> int:
        raise NotImplementedError("kvxfer's channel is one-sided: use async_batched_write")

    async def async_batched_recv(self, buffers, transfer_spec=None) -> int:
        raise NotImplementedError("kvxfer's channel is one-sided: use async_batched_read")

    # ---- the rest ----

    @property
    def metrics(self) -> str:
        """The agent's counters in Prometheus text format."""
        return self._agent.metrics

    def close(self) -> None:
        """Ends transfers, tells the peers and lets go of LMCache's buffer. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._remotes.clear()
        # Ends every transfer, so that the regions are free afterwards.
        self._agent.close()
        for region in (self._buffer, self._described):
            try:
                region.close()
            except KvxferError as e:
                logger.warning("kvxfer: %s", e)


async def _come_to_rest(transfer: Transfer) -> None:
    try:
        await asyncio.wait_for(transfer, _CANCEL_S)
    except (KvxferError, asyncio.TimeoutError):
        pass


def _spec(transfer_spec, key: str) -> tuple[str, list[int]]:
    if not transfer_spec or key not in transfer_spec or "remote_indexes" not in transfer_spec:
        raise errors.InvalidArgument(
            f"transfer_spec: {transfer_spec!r} lacks {key!r} or 'remote_indexes'", lib.KVXFER_INVALID_ARGUMENT
        )
    return transfer_spec[key], transfer_spec["remote_indexes"]


def _extra_config() -> dict[str, Any]:
    """What LMCache's configuration says below `extra_config: kvxfer`, where vLLM's integration has loaded one."""
    integration = sys.modules.get("lmcache.integration.vllm.utils")
    config = getattr(integration, "_config_instance", None)
    extra = (getattr(config, "extra_config", None) or {}).get("kvxfer", {})
    if not isinstance(extra, dict):
        raise errors.InvalidArgument(
            f"extra_config: kvxfer: {extra!r} is not a mapping of settings", lib.KVXFER_INVALID_ARGUMENT
        )
    # What lies below `cpu` is the CPU connector's.
    return {name: value for name, value in extra.items() if name != "cpu"}


def _prefer_huge_pages(address: int, size: int) -> None:
    """Asks the kernel for huge pages under LMCache's buffer.

    `process_vm_writev` walks the other side's pages one by one; with huge pages there a large copy takes about half the time.
    Advice only: memory that cannot have them (shared, pinned by a driver, or the kernel says never) stays as it is.
    """
    huge = 2 << 20
    start = -(-address // huge) * huge
    length = (address + size) // huge * huge - start
    if length <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madv_collapse = 25
    if madvise(start, length, mmap.MADV_HUGEPAGE) == 0:
        # For what has been touched already; older kernels do not know it.
        madvise(start, length, madv_collapse)
