"""Agents and peers: one endpoint of this process, and the remote ones it is connected to."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvxfer import gpu
from kvxfer._call import INTEGRITY, TRANSPORTS, c_text, c_texts, choice, handle, milliseconds, text_of
from kvxfer._native import ffi, lib
from kvxfer.errors import NotFound, check
from kvxfer.events import Events
from kvxfer.gpu import Fence, fence_of
from kvxfer.region import Region, keep_until_free
from kvxfer.transfer import Pieces, Transfer, pack

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Notification:
    """A notification that arrived: who sent it, and what it says."""

    peer: str
    payload: bytes


class Agent:
    """One endpoint of this process: its regions, its peers and one progress thread.

    `name` stays the same over restarts (default: host and pid). `listen` names addresses, `tcp://host:port` (port 0 picks one) or
    `unix:///path`. With `auth_key` every peer must prove that it holds the same key. `allow`, `forbid` and `require` steer the
    choice of transport. `environment=True` lets `KVXFER_*` variables overrule the arguments. Time-outs are seconds.

    A context manager; `close()` ends transfers and tells the peers.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        listen: str | Iterable[str] = (),
        auth_key: str | bytes | None = None,
        allow: Iterable[str] = (),
        forbid: Iterable[str] = (),
        require: Iterable[str] = (),
        integrity: str | None = None,
        connect_timeout: float | None = None,
        transfer_timeout: float | None = None,
        peer_timeout: float | None = None,
        environment: bool = False,
    ):
        config = ffi.new("kvxfer_config_t *")
        config.struct_size = ffi.sizeof("kvxfer_config_t")
        alive = []
        if name is not None:
            alive.append(ffi.new("char[]", c_text(name)))
            config.name = alive[-1]
        if auth_key is not None:
            key = c_text(auth_key)
            alive.append(ffi.new("uint8_t[]", key))
            config.auth_key, config.auth_key_length = alive[-1], len(key)
        for field, words in (("listen", listen), ("allow", allow), ("forbid", forbid), ("require", require)):
            (array, kept), count = c_texts(words)
            alive += [array, kept]
            # ffi.NULL for an empty list; the cast adds the const that the struct wants.
            setattr(config, field, ffi.cast("char const * const *", array))
            setattr(config, f"{field}_count", count)
        config.integrity = choice("integrity", INTEGRITY, integrity)
        config.flags = lib.KVXFER_CONFIG_ENVIRONMENT if environment else 0
        config.connect_timeout_ms = milliseconds("connect_timeout", connect_timeout)
        config.transfer_timeout_ms = milliseconds("transfer_timeout", transfer_timeout)
        config.peer_timeout_ms = milliseconds("peer_timeout", peer_timeout)
        self._own(lib.kvxfer_agent_new, config)
        del alive

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str, *, environment: bool = False) -> Agent:
        """An agent from a mapping, or from YAML text, in which every setting can be stated; unknown keys are errors."""
        self = cls.__new__(cls)
        flags = lib.KVXFER_CONFIG_ENVIRONMENT if environment else 0
        if isinstance(config, str):
            self._own(lib.kvxfer_agent_new_from_yaml, c_text(config), flags)
        else:
            self._own(lib.kvxfer_agent_new_from_json, c_text(json.dumps(dict(config))), flags)
        return self

    def _own(self, new: Callable[..., int], *arguments: Any) -> None:
        out = ffi.new("kvxfer_agent_t **")
        check(new(*arguments, out))
        self._handle = out[0]
        # Also at the interpreter's exit, so that peers are told.
        self._finalizer = weakref.finalize(self, lib.kvxfer_agent_free, self._handle)
        self._events = Events(self._handle)

    def close(self) -> None:
        """Ends everything in order: transfers are cancelled, peers told, threads joined. What was made from the agent then
        fails with `Closed`. Closing twice is fine."""
        if self._finalizer.alive:
            self._events.close()
            self._finalizer()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kvxfer.Agent {self.name!r}>" if self._finalizer.alive else "<kvxfer.Agent, closed>"

    @property
    def name(self) -> str:
        return text_of(lib.kvxfer_agent_name, self._handle)

    @property
    def epoch(self) -> int:
        """New at each start, and larger than the one before."""
        out = ffi.new("uint64_t *")
        check(lib.kvxfer_agent_epoch(self._handle, out))
        return int(out[0])

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the real port where 0 was asked for."""
        found: list[str] = []
        while True:
            try:
                found.append(text_of(lib.kvxfer_agent_address, self._handle, len(found)))
            except NotFound:
                return found

    @property
    def peers(self) -> list[str]:
        """Names of the connected peers."""
        return text_of(lib.kvxfer_agent_peers, self._handle).split("\n") if self._has_peers() else []

    def _has_peers(self) -> bool:
        length = ffi.new("size_t *")
        check(lib.kvxfer_agent_peers(self._handle, ffi.NULL, 0, length))
        return bool(length[0] > 0)

    def allocate(self, length: int) -> Region:
        """Shareable, zeroed memory, registered. Peers on the same host reach such memory fastest."""
        return Region(
            self,
            handle("kvxfer_region_t", keep_until_free(None), lib.kvxfer_region_allocate, self._handle, length),
            None,
        )

    def allocate_device(self, length: int, device: int = 0, *, shareable: bool = False) -> Region:
        """Zeroed memory of a CUDA device (its number among the visible ones), registered. `shareable` memory comes in pages of 2 MiB
        and also reaches peers that no CUDA IPC handle reaches."""
        free = keep_until_free(None)
        new = lib.kvxfer_region_allocate_device
        return Region(self, handle("kvxfer_region_t", free, new, self._handle, device, length, shareable), None)

    def register(self, buffer: Any) -> Region:
        """Registers memory that something else owns: a writable, contiguous buffer (bytearray, memoryview, numpy array, mmap, …), a
        torch tensor on the CPU or on a CUDA device, or anything else of a CUDA device that has `__cuda_array_interface__` or speaks
        DLPack (CuPy, JAX). It is kept alive as long as the region or a transfer uses it."""
        address, length, keep = memory_of(buffer)
        return self.register_memory(address, length, keep)

    def register_memory(self, address: int, length: int, keep: Any = None) -> Region:
        """Registers `length` bytes from `address` on. The caller promises that they stay mapped, readable and writable until the
        region is closed and its transfers have ended; `keep` is held until then."""
        base = ffi.cast("void *", address)
        region = handle(
            "kvxfer_region_t", keep_until_free(keep), lib.kvxfer_region_register, self._handle, base, length
        )
        return Region(self, region, keep)

    def connect(self, address: str, timeout: float = CONNECT_TIMEOUT_S) -> Peer:
        """Connects to a listening agent. One that is connected already under this address and still up is returned as it is."""
        deadline = milliseconds("timeout", timeout)
        return Peer(
            self,
            handle(
                "kvxfer_peer_t", lib.kvxfer_peer_free, lib.kvxfer_agent_connect, self._handle, c_text(address), deadline
            ),
        )

    def peer(self, name: str) -> Peer:
        """The connected peer of that name, whichever side opened the connection."""
        return Peer(
            self, handle("kvxfer_peer_t", lib.kvxfer_peer_free, lib.kvxfer_agent_peer, self._handle, c_text(name))
        )

    def unexport(self, name: str) -> None:
        """Takes the export of a region back; peers' later transfers on it fail."""
        check(lib.kvxfer_agent_unexport(self._handle, c_text(name)))

    def try_notification(self) -> Notification | None:
        """The next notification, if one is there."""
        return self._notification(lib.kvxfer_agent_try_notification, self._handle)

    def wait_notification(self, timeout: float) -> Notification | None:
        """Waits for the next notification; None when the time is over."""
        return self._notification(lib.kvxfer_agent_wait_notification, self._handle, milliseconds("timeout", timeout))

    async def notification(self) -> Notification:
        """Awaits the next notification. With several waiting at once each notification goes to one of them."""
        return await self._events.wait_for(self.try_notification)

    @staticmethod
    def _notification(take: Callable[..., int], *arguments: Any) -> Notification | None:
        name = ffi.new("char[]", lib.KVXFER_MAX_NAME + 1)
        payload = ffi.new("char[]", lib.KVXFER_MAX_NOTIFICATION)
        length = ffi.new("size_t *")
        code = take(*arguments, name, lib.KVXFER_MAX_NAME + 1, payload, lib.KVXFER_MAX_NOTIFICATION, length)
        if code in (lib.KVXFER_NOT_FOUND, lib.KVXFER_TIMED_OUT):
            return None
        check(code)
        return Notification(ffi.string(name).decode(), bytes(ffi.buffer(payload, length[0])))

    @property
    def metrics(self) -> str:
        """Counters and histograms in Prometheus text format."""
        return text_of(lib.kvxfer_agent_metrics, self._handle)


class Peer:
    """A connected remote agent of one epoch. Once it is gone, calls fail with `PeerGone`; connect again to reach its successor."""

    def __init__(self, agent: Agent, peer: Any):
        self._agent, self._handle = agent, peer

    def __repr__(self) -> str:
        return f"<kvxfer.Peer {self.name!r}>"

    @property
    def name(self) -> str:
        return text_of(lib.kvxfer_peer_name, self._handle)

    @property
    def epoch(self) -> int:
        out = ffi.new("uint64_t *")
        check(lib.kvxfer_peer_epoch(self._handle, out))
        return int(out[0])

    @property
    def is_up(self) -> bool:
        """False once the peer is gone, and on a closed agent."""
        out = ffi.new("kvxfer_result_t *")
        return bool(lib.kvxfer_peer_state(self._handle, out) == lib.KVXFER_OK and out[0] == lib.KVXFER_OK)

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Connected transports, best first, each with a description."""
        text = text_of(lib.kvxfer_peer_paths, self._handle)
        return [(kind, what) for kind, _, what in (line.partition("\t") for line in text.splitlines())]

    def region(self, name: str, timeout: float = CONNECT_TIMEOUT_S) -> RemoteRegion:
        """A region that the peer exports."""
        deadline = milliseconds("timeout", timeout)
        free = lib.kvxfer_remote_region_free
        return RemoteRegion(
            handle("kvxfer_remote_region_t", free, lib.kvxfer_peer_region, self._handle, c_text(name), deadline)
        )

    def write(
        self,
        local: Region,
        remote: RemoteRegion,
        pieces: Pieces,
        *,
        timeout: float | None = None,
        notify: bytes | None = None,
        integrity: str | None = None,
        transport: str | None = None,
        after: Fence | None = None,
    ) -> Transfer:
        """Starts moving local bytes to the peer; does not block.

        `pieces` are (local offset, remote offset, length) in bytes, or the same as a buffer of unsigned 64-bit numbers. Options:
        `timeout` in seconds; `notify`, bytes that the peer is sent once every byte has landed; `integrity` (`off`, `bound`,
        `full`); `transport`, the one to use; `after`, a point in a CUDA stream before which nothing is read or written. Ranges are
        checked before anything moves.
        """
        return self._submit(lib.kvxfer_peer_write, local, remote, pieces, timeout, notify, integrity, transport, after)

    def read(
        self,
        local: Region,
        remote: RemoteRegion,
        pieces: Pieces,
        *,
        timeout: float | None = None,
        notify: bytes | None = None,
        integrity: str | None = None,
        transport: str | None = None,
        after: Fence | None = None,
    ) -> Transfer:
        """Starts moving the peer's bytes here; otherwise as `write`."""
        return self._submit(lib.kvxfer_peer_read, local, remote, pieces, timeout, notify, integrity, transport, after)

    def _submit(
        self,
        call: Callable[..., int],
        local: Region,
        remote: RemoteRegion,
        pieces: Pieces,
        timeout: float | None,
        notify: bytes | None,
        integrity: str | None,
        transport: str | None,
        after: Fence | None,
    ) -> Transfer:
        packed, count = pack(pieces)
        options = ffi.new("kvxfer_transfer_options_t *")
        options.struct_size = ffi.sizeof("kvxfer_transfer_options_t")
        options.timeout_ms = milliseconds("timeout", timeout)
        options.integrity = choice("integrity", INTEGRITY, integrity)
        options.transport = choice("transport", TRANSPORTS, transport)
        options.after = fence_of(after)
        payload = ffi.from_buffer(notify) if notify else ffi.new("char[1]")
        if notify is not None:
            options.notify, options.notify_length = payload, len(notify)
        transfer = handle(
            "kvxfer_transfer_t",
            lib.kvxfer_transfer_free,
            call,
            self._handle,
            local._handle,
            remote._handle,
            packed,
            count,
            options,
        )
        return Transfer(self._agent, transfer, count, local)

    def map(self, remote: RemoteRegion, device: int | None = None) -> Region:
        """The peer's region as a region of this agent, where it lies in this process's address space (`shm`, `cuda_ipc`): host memory,
        or that of a CUDA device. A `Gather` to it is a gather and a write in one pass. Nobody tells the peer when that has ended:
        notify it then, and stop before it takes its export back. `NotAvailable` when it is not there."""
        region = handle(
            "kvxfer_region_t",
            keep_until_free(None),
            lib.kvxfer_region_map,
            self._agent._handle,
            self._handle,
            remote._handle,
            -1 if device is None else device,
        )
        return Region(self._agent, region, None)

    def notify(self, payload: bytes) -> None:
        """Sends a notification without data; does not block."""
        check(lib.kvxfer_peer_notify(self._handle, ffi.from_buffer(payload) if payload else ffi.NULL, len(payload)))

    def disconnect(self) -> None:
        """Closes the connection; transfers under way end with `PeerGone`."""
        check(lib.kvxfer_peer_disconnect(self._handle))


class RemoteRegion:
    """A region that a peer exports."""

    def __init__(self, remote: Any):
        self._handle = remote

    def __len__(self) -> int:
        out = ffi.new("uint64_t *")
        check(lib.kvxfer_remote_region_length(self._handle, out))
        return int(out[0])

    @property
    def transports(self) -> list[str]:
        """Transports that reach it, best first."""
        return text_of(lib.kvxfer_remote_region_transports, self._handle).split("\n")


def memory_of(buffer: Any) -> tuple[int, int, Any]:
    """Address and length of something's memory, and what keeps it there."""
    if isinstance(buffer, Region):
        return buffer.address, len(buffer), buffer
    if hasattr(buffer, "data_ptr") and hasattr(buffer, "is_contiguous"):
        if buffer.device.type not in ("cpu", "cuda"):
            raise TypeError(f"a tensor on {buffer.device}: tensors on the CPU and on CUDA devices can be registered")
        if not buffer.is_contiguous():
            raise TypeError(
                f"a tensor of strides {tuple(buffer.stride())} is not contiguous: register tensor.contiguous()"
            )
        return buffer.data_ptr(), buffer.nbytes, buffer
    if hasattr(buffer, "__cuda_array_interface__"):
        return (*gpu.by_array_interface(buffer.__cuda_array_interface__), buffer)
    if hasattr(buffer, "__dlpack_device__") and buffer.__dlpack_device__()[0] == gpu.DLPACK_CUDA:
        return gpu.by_dlpack(buffer)
    # Holds the buffer: a bytearray cannot be resized, an mmap not be closed, while it is registered.
    view = ffi.from_buffer("char[]", buffer, require_writable=True)
    return int(ffi.cast("uintptr_t", view)), len(view), (buffer, view)
