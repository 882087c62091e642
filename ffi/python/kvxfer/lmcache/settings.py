"""What LMCache's configuration says to the PD backend: checked once, turned into values that the rest of the backend uses."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from kvxfer.channel import Geometry

# LMCache's default for `pd_allocation_timeout_sec` is infinite; nothing here waits for ever.
ALLOCATION_TIMEOUT_S = 30.0
_PROXY_HOST = "localhost"
_MAX_THREADS = 1024


@dataclass(frozen=True)
class PdSettings:
    """`extra_config: kvxfer: pd:` in LMCache's YAML; seconds."""

    request_timeout: float = 120.0
    """From a request's first chunk to the decoder's word that all is there."""
    patience: float = 10.0
    """How long a decoder that cannot be reached is waited for."""
    retention: float = 120.0
    """How long a cache is kept that no request comes for."""
    lease: float = 30.0
    """A prefiller that is silent for this long loses its pages."""
    max_queue: int = 1024
    """Requests that wait for pages at most."""
    integrity: str | None = None
    """`off`, `bound` or `full`; by transport when not stated."""
    query_timeout: float = 2.0
    """How long a decoder's answer to what it has is waited for, connecting included: the engine waits meanwhile."""
    in_place: bool = True
    """Chunks are gathered straight into the decoder's pages where its pool is mapped in the prefiller's process."""
    in_place_patience: float = 0.005
    """How long a store waits for such pages before it gathers into its own; the engine waits meanwhile."""
    wait_for_arrival: bool = False
    """A store returns when the cache has arrived, for proxies that take the prefiller's answer as that."""


@dataclass(frozen=True)
class PdConfig:
    """Everything the backend needs to know, from LMCache's `config` and `metadata`."""

    role: str
    tp_rank: int
    geometry: Geometry
    chunk_shape: tuple[int, ...]
    device: str
    """Where the buffer lies: `cpu`, `cuda` (the worker's own device) or `cuda:N`."""
    buffer_bytes: int
    listen: str | None
    receiver: tuple[str, list[int]] | None
    """Where requests without a `disagg_spec` go, if anywhere: host and ports, one per rank."""
    proxy: str | None
    allocation_timeout: float
    shutdown_timeout: float
    pd: PdSettings
    agent: dict[str, Any] = field(repr=False)

    @property
    def sends(self) -> bool:
        return self.role in ("sender", "both")

    @property
    def receives(self) -> bool:
        return self.role == "receiver"


def port_of(ports: Any, rank: int) -> int:
    """The port of a rank: a list has one for each, a single one is the first rank's and the others follow."""
    ports = list(ports) if isinstance(ports, (list, tuple)) else [ports]
    port = int(ports[rank]) if rank < len(ports) else int(ports[-1]) + rank - len(ports) + 1
    if not 0 < port < 65536:
        raise ValueError(f"port {port} (rank {rank} of {ports}) is not between 1 and 65535")
    return port


def read(config: Any, metadata: Any) -> PdConfig:
    """Reads and checks; what is wrong raises `ValueError` with the key, the value and what to do."""
    role, rank = config.pd_role, metadata.worker_id
    if role not in ("sender", "receiver", "both"):
        raise ValueError(f"pd_role: {role!r}; 'sender', 'receiver' and 'both' are possible")
    if not config.pd_buffer_size:
        raise ValueError("pd_buffer_size is missing: bytes of the buffer that chunks travel through, e.g. 1073741824")
    device = str(config.pd_buffer_device or "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"pd_buffer_device: {device!r}; 'cpu' and 'cuda' are possible")
    pd, agent = _extra(config)

    shape = tuple(int(n) for n in metadata.get_shapes(config.chunk_size)[0])
    dtype = metadata.get_dtypes()[0]
    page = dtype.itemsize
    for n in shape:
        page *= n
    pages = config.pd_buffer_size // page
    if pages == 0:
        raise ValueError(
            f"pd_buffer_size: {config.pd_buffer_size} bytes hold no chunk: one of {config.chunk_size} tokens has {page} bytes here. "
            "Enlarge it, or lower chunk_size"
        )
    longest = int(getattr(config, "pd_max_prefill_len", 0) or 0)
    if longest > pages * config.chunk_size:
        raise ValueError(
            f"pd_max_prefill_len: {longest} tokens, but pd_buffer_size holds {pages * config.chunk_size} ({pages} chunks of "
            f"{config.chunk_size}): enlarge it to {-(-longest // config.chunk_size) * page} bytes"
        )
    listen = receiver = proxy = None
    if role == "receiver":
        if config.pd_peer_host is None or config.pd_peer_init_port is None:
            raise ValueError("pd_peer_host and pd_peer_init_port are missing: a receiver listens there")
        listen = address(config.pd_peer_host, port_of(config.pd_peer_init_port, rank))
    elif config.pd_peer_host is not None and config.pd_peer_init_port is not None:
        receiver = (config.pd_peer_host, list(config.pd_peer_init_port))
    if role != "receiver" and not config.pd_skip_proxy_notification and config.pd_proxy_port is not None:
        proxy = address(config.pd_proxy_host or _PROXY_HOST, config.pd_proxy_port)
    if role == "sender" and proxy is None and not config.pd_skip_proxy_notification and receiver is None:
        raise ValueError(
            "pd_proxy_host and pd_proxy_port are missing: a sender tells the proxy there when a cache has arrived. "
            "Where nobody is to be told, set pd_skip_proxy_notification: True"
        )
    wanted = float(config.pd_allocation_timeout_sec)
    return PdConfig(
        role=role,
        tp_rank=rank,
        geometry=_geometry(config, metadata, shape, dtype, page),
        chunk_shape=shape,
        device=device,
        buffer_bytes=pages * page,
        listen=listen,
        receiver=receiver,
        proxy=proxy,
        allocation_timeout=wanted if 0 < wanted < 365 * 86400 else ALLOCATION_TIMEOUT_S,
        shutdown_timeout=max(0.0, min(float(config.pd_shutdown_timeout_sec), 3600.0)),
        pd=pd,
        agent=agent,
    )


@lru_cache(maxsize=1024)
def address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"


def receiver(host: str, ports: Any, rank: int) -> str:
    """Where a rank's receiver listens."""
    return _receiver(host, tuple(ports) if isinstance(ports, list) else ports, rank)


@lru_cache(maxsize=4096)
def _receiver(host: str, ports: Any, rank: int) -> str:
    return address(host, port_of(ports, rank))


def hash_seed(config: Any) -> str:
    """What LMCache's keys depend on beside the tokens. Unequal on two sides, no key of one is found by the other."""
    seed = os.environ.get("PYTHONHASHSEED")
    algorithm = getattr(config, "pre_caching_hash_algorithm", None) or "builtin"
    if not seed or seed == "random":
        # Every process has its own then: equal to nothing.
        return f"PYTHONHASHSEED is not set in process {os.getpid()} on {socket.gethostname()} (set it to 0 on all instances)"
    return f"PYTHONHASHSEED={seed}, {algorithm}"


def _geometry(config: Any, metadata: Any, shape: tuple[int, ...], dtype: Any, page: int) -> Geometry:
    kv = metadata.kv_shape
    return Geometry(
        page_bytes=page,
        model=str(metadata.model_name),
        dtype=str(dtype).removeprefix("torch."),
        layout="KV_MLA_FMT" if getattr(metadata, "use_mla", False) else "KV_2LTD",
        hash_seed=hash_seed(config),
        chunk_tokens=int(config.chunk_size),
        layers=int(shape[1]),
        kv_heads=int(kv[3]),
        head_dim=int(kv[4]),
        tp_rank=metadata.worker_id,
        tp_size=metadata.world_size,
    )


def cpu_threads(config: Any) -> int:
    """`extra_config: kvxfer: cpu: threads`; 0 where nothing is said."""
    extra = (config.extra_config or {}).get("kvxfer", {})
    stated = extra.get("cpu", {}) if isinstance(extra, dict) else extra
    if not isinstance(stated, dict) or set(stated) - {"threads"}:
        raise ValueError(f"extra_config: kvxfer: cpu: {stated!r} is not a mapping with the one setting threads")
    threads = stated.get("threads", 0)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= _MAX_THREADS:
        raise ValueError(f"extra_config: kvxfer: cpu: threads: {threads!r} is not a number from 0 to {_MAX_THREADS}")
    return threads


def _extra(config: Any) -> tuple[PdSettings, dict[str, Any]]:
    """`extra_config: kvxfer:`: settings of the PD backend below `pd`, and the agent's."""
    extra = (config.extra_config or {}).get("kvxfer", {})
    if not isinstance(extra, dict):
        raise ValueError(f"extra_config: kvxfer: {extra!r} is not a mapping of settings")
    agent = dict(extra)
    agent.pop("cpu", None)  # the CPU connector's
    stated = agent.pop("pd", {})
    if not isinstance(stated, dict):
        raise ValueError(f"extra_config: kvxfer: pd: {stated!r} is not a mapping of settings")
    known = {f.name: f for f in fields(PdSettings)}
    for name, value in stated.items():
        where = f"extra_config: kvxfer: pd: {name}"
        if name not in known:
            raise ValueError(f"{where} is not a setting; known are {', '.join(sorted(known))}")
        default = known[name].default
        if name == "integrity":
            ok, form = value in (None, "off", "bound", "full"), "one of off, bound, full"
        elif isinstance(default, bool):
            ok, form = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            ok, form = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a positive number"
        else:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 365 * 86400
            form = "a number of seconds, more than 0"
        if not ok:
            raise ValueError(f"{where}: {value!r} is not {form}")
    for variable in ("KVXFER_NAME", "KVXFER_LISTEN", "KVXFER_CONFIG"):
        if os.environ.get(variable):
            raise ValueError(
                f"{variable} is set, but name and address come from LMCache's configuration (pd_peer_host, pd_peer_init_port): "
                "unset it, and put other settings below extra_config: kvxfer"
            )
    return PdSettings(**stated), agent
