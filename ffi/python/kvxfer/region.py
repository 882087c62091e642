"""Regions: memory that transfers may use."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvxfer._call import c_text, choice
from kvxfer._native import ffi, lib
from kvxfer.errors import Busy, Unsupported, check

if TYPE_CHECKING:
    from kvxfer.agent import Agent

_ACCESS = {"r": lib.KVXFER_ACCESS_READ, "w": lib.KVXFER_ACCESS_WRITE, "rw": lib.KVXFER_ACCESS_READ_WRITE}

# Regions that nobody holds any more but a transfer still uses: their memory must stay. Looked through again whenever
# another region is given up.
_lingering: list[tuple[Any, Any]] = []
_lingering_lock = threading.Lock()


def keep_until_free(keep: Any) -> Callable[[Any], None]:
    """A destructor of a region's handle, which holds on to the memory until the library has let go of it."""

    def free(region: Any) -> None:
        with _lingering_lock:
            _lingering.append((region, keep))
            _lingering[:] = [(r, k) for r, k in _lingering if lib.kvxfer_region_free(r) == lib.KVXFER_BUSY]

    return free


class Region:
    """Registered memory of this process, from `Agent.allocate` or `Agent.register`. A context manager."""

    def __init__(self, agent: Agent, region: Any, keep: Any):
        self._agent, self._handle, self._keep = agent, region, keep
        self._view: weakref.ref[Any] | None = None

    def __len__(self) -> int:
        return int(self._base_and_length()[1])

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return int(ffi.cast("uintptr_t", self._base_and_length()[0]))

    @property
    def id(self) -> int:
        """Unique within the agent."""
        out = ffi.new("uint64_t *")
        check(lib.kvxfer_region_id(self._handle, out))
        return int(out[0])

    @property
    def device(self) -> int | None:
        """Number of the CUDA device whose memory it is; None for host memory."""
        out = ffi.new("int32_t *")
        check(lib.kvxfer_region_device(self._handle, out))
        return None if out[0] < 0 else int(out[0])

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """A copy of bytes, also of a GPU's memory. For looking at them, not for moving caches."""
        out = ffi.new("char[]", len(self) - offset if length is None else length)
        check(lib.kvxfer_region_read(self._handle, offset, len(out), out))
        return bytes(ffi.buffer(out))

    def write(self, offset: int, data: Any) -> None:
        """Copies a buffer's bytes in, also to a GPU's memory."""
        view = ffi.from_buffer("char[]", data)
        check(lib.kvxfer_region_write(self._handle, offset, view, len(view)))

    def pin(self) -> None:
        """Pins host memory for CUDA devices now, instead of at its first transfer from or to one."""
        check(lib.kvxfer_region_pin(self._handle))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """A GPU's memory as bytes for torch (`torch.as_tensor(region, device="cuda")`), CuPy or Numba, without a copy."""
        if self.device is None:
            raise AttributeError("__cuda_array_interface__: this region is host memory; see `memory`")
        return {"shape": (len(self),), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    @property
    def memory(self) -> memoryview:
        """The bytes of host memory, writable. The region cannot be closed while a view is in use."""
        if self.device is not None:
            raise Unsupported(
                "the host cannot touch a GPU's memory: use read() and write(), or __cuda_array_interface__",
                lib.KVXFER_UNSUPPORTED,
            )
        owner = self._view() if self._view else None
        if owner is None:
            owner = (ctypes.c_ubyte * len(self)).from_address(self.address)
            # A view may outlive this object, never the memory.
            owner.kvxfer_region = self._handle  # type: ignore[attr-defined]
            self._view = weakref.ref(owner)
        return memoryview(owner).cast("B")

    def export(self, name: str, access: str = "rw") -> None:
        """Makes the region reachable for every authenticated peer under `name`; `access` is `r`, `w` or `rw`."""
        check(lib.kvxfer_region_export(self._handle, c_text(name), choice("access", _ACCESS, access)))

    def close(self) -> None:
        """Takes exports back and deregisters. `Busy` while a transfer uses the memory or a view of it is in use; closing twice is
        fine. A region that is merely dropped is closed as soon as that is possible."""
        if self._handle is None:
            return
        if self._view and self._view() is not None:
            raise Busy("views of the region's memory are still in use: release them, then close again", lib.KVXFER_BUSY)
        check(lib.kvxfer_region_free(self._handle))
        # Freed: the destructor must not free again.
        ffi.gc(self._handle, None)
        self._handle = self._keep = None

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<kvxfer.Region, closed>" if self._handle is None else f"<kvxfer.Region of {len(self)} bytes>"

    def _base_and_length(self) -> tuple[Any, int]:
        base, length = ffi.new("void **"), ffi.new("uint64_t *")
        check(lib.kvxfer_region_memory(self._handle, base, length))
        return base[0], length[0]
