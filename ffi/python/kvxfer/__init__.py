"""kvxfer moves LLM key/value caches between inference engines, over shared memory, CMA, TCP or NIXL/UCX.

    import kvxfer

    with kvxfer.Agent("receiver", listen="tcp://127.0.0.1:0") as receiver, kvxfer.Agent("sender") as sender:
        pages = receiver.allocate(1 << 20)
        pages.export("pages")

        source = sender.register(bytearray(b"cache" * 1000))
        peer = sender.connect(receiver.addresses[0])
        peer.write(source, peer.region("pages"), [(0, 4096, 5000)]).wait()

        assert bytes(pages.memory[4096:4101]) == b"cache"

Everything may be used from any thread, and waiting releases the interpreter's lock. `await transfer` works in any asyncio loop.
Handles do not survive `fork()`: in the child every call fails with `Closed`; start agents after forking, or use spawn.
"""

from kvxfer import errors
from kvxfer._native import ffi as _ffi
from kvxfer._native import lib as _lib
from kvxfer.agent import Agent, Notification, Peer, RemoteRegion
from kvxfer.channel import (
    Chunk,
    Delivery,
    DeliveryReport,
    Geometry,
    PoolStats,
    Receiver,
    RequestEvent,
    Reservation,
    Sender,
)
from kvxfer.errors import (
    AddressInUse,
    Busy,
    Cancelled,
    Closed,
    Corrupt,
    InvalidArgument,
    KvxferError,
    Mismatch,
    NoCapacity,
    NotAvailable,
    NotFound,
    OutOfRange,
    PeerGone,
    RequirementNotMet,
    Stale,
    TimedOut,
    TooLarge,
    TransportFailed,
    Unauthenticated,
    Unreachable,
    Unsupported,
)
from kvxfer.gather import Gather, Layout, View
from kvxfer.gpu import Fence
from kvxfer.memory import SharedMemory
from kvxfer.outbox import Ended, Outbox, Place, Released
from kvxfer.paged import PagedCache, PagedChunk
from kvxfer.query import Found, FoundChunk, ReadReport
from kvxfer.region import Region
from kvxfer.transfer import Transfer, TransferReport

__version__: str = _ffi.string(_lib.kvxfer_version()).decode()


def has_feature(name: str) -> bool:
    """True when the library was built with that feature: `nixl` or `cuda`."""
    return bool(_lib.kvxfer_has_feature(name.encode()))


__all__ = [
    "AddressInUse",
    "Agent",
    "Busy",
    "Cancelled",
    "Chunk",
    "Closed",
    "Corrupt",
    "Delivery",
    "DeliveryReport",
    "Ended",
    "Fence",
    "Found",
    "FoundChunk",
    "Gather",
    "Geometry",
    "InvalidArgument",
    "KvxferError",
    "Layout",
    "Mismatch",
    "NoCapacity",
    "NotAvailable",
    "NotFound",
    "Notification",
    "OutOfRange",
    "Outbox",
    "PagedCache",
    "PagedChunk",
    "Peer",
    "PeerGone",
    "Place",
    "PoolStats",
    "ReadReport",
    "Receiver",
    "Region",
    "Released",
    "RemoteRegion",
    "RequestEvent",
    "RequirementNotMet",
    "Reservation",
    "Sender",
    "SharedMemory",
    "Stale",
    "TimedOut",
    "TooLarge",
    "Transfer",
    "TransferReport",
    "TransportFailed",
    "Unauthenticated",
    "Unreachable",
    "Unsupported",
    "View",
    "__version__",
    "errors",
    "has_feature",
]
