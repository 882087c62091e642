"""What belongs to a GPU: points in CUDA streams, and memory of other libraries."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from kvxfer._call import handle
from kvxfer._native import ffi, lib
from kvxfer.errors import check

DLPACK_CUDA = 2


class Fence:
    """The moment at which a CUDA stream has done everything given to it so far. A transfer or chunk that carries one is not read or
    written before; making one does not wait.

    `stream` is a torch stream (anything with `cuda_stream`), or the number of a `cudaStream_t`; 0 is the default stream. `device` is
    needed with a number only.
    """

    def __init__(self, stream: Any = 0, device: int | None = None):
        number = getattr(stream, "cuda_stream", stream)
        if device is None:
            device = getattr(getattr(stream, "device", None), "index", None) or 0
        self._handle = handle("kvxfer_fence_t", lib.kvxfer_fence_free, lib.kvxfer_fence_new, device, int(number))

    @property
    def passed(self) -> bool:
        """True once the stream has come so far."""
        code = lib.kvxfer_fence_poll(self._handle)
        if code == lib.KVXFER_IN_PROGRESS:
            return False
        check(code)
        return True


def fence_of(after: Fence | None) -> Any:
    """The handle to pass on; NULL for none."""
    return ffi.NULL if after is None else after._handle


def by_array_interface(array: Mapping[str, Any]) -> tuple[int, int]:
    """Address and length of what `__cuda_array_interface__` describes (versions 2 and 3)."""
    address, readonly = array["data"]
    item = int(array["typestr"][2:])
    length, step = item, item
    for n in array["shape"]:
        length *= n
    for n, stride in zip(reversed(array["shape"]), reversed(array.get("strides") or ()), strict=False):
        if n > 1 and stride != step:
            raise TypeError(
                f"an array of strides {tuple(array['strides'])} is not contiguous: register a contiguous copy"
            )
        step *= n
    if readonly:
        raise TypeError("an array that says it is read-only cannot be registered: peers may write to it")
    if array.get("mask") is not None:
        raise TypeError("a masked array cannot be registered")
    return int(address), length


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _Tensor(ctypes.Structure):
    """`DLTensor`, https://dmlc.github.io/dlpack/latest/c_api.html"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def by_dlpack(source: Any) -> tuple[int, int, Any]:
    """Address and length of a tensor that speaks DLPack, and what keeps it there. No stream is waited for: nothing is read yet."""
    # -1: the producer need not synchronise.
    capsule = source.__dlpack__(stream=-1)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # A managed tensor begins with the tensor. The capsule stays unconsumed, so it frees what it holds when it goes.
    tensor = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    step = 1
    for i in reversed(range(tensor.ndim)):
        if tensor.strides and shape[i] > 1 and tensor.strides[i] != step:
            raise TypeError("a tensor that is not contiguous cannot be registered: register a contiguous copy")
        step *= shape[i]
    length = step * tensor.bits * tensor.lanes // 8
    return int(tensor.data or 0) + int(tensor.byte_offset), length, (source, capsule)
