"""What a hand-over says and which bytes it moves: no vLLM, no sockets, no clock.

A prefiller's answer carries `kv_transfer_params`; they travel through clients and proxies, so a decoder checks every one of them
before it uses it. The names are those of vLLM's own connectors, what is kvxfer's lies below `kvxfer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BLOCKS = 1 << 20
MAX_RANKS = 1024
MAX_ID = 1024


@dataclass(frozen=True)
class Handover:
    """A prompt's blocks at a prefiller."""

    request: str
    """The prefiller's name of the request."""
    engine: str
    blocks: tuple[int, ...]
    """Its blocks, in the order of the tokens."""
    tokens: int
    """Tokens whose keys and values are in them."""
    addresses: tuple[str, ...]
    """Where each tensor-parallel rank's worker listens, `tcp://host:port`."""
    lease: str
    """New for each hold: a name that comes again is another one."""

    def proof(self) -> str:
        """What a decoder shows to have read these blocks of this hold, and no others."""
        text = json.dumps([self.request, self.lease, self.tokens, list(self.blocks)])
        return hashlib.sha256(text.encode()).hexdigest()

    def params(self) -> dict[str, Any]:
        """As `kv_transfer_params` for the decoder."""
        host, _, port = self.addresses[0].removeprefix("tcp://").rpartition(":")
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine,
            "remote_request_id": self.request,
            "remote_block_ids": list(self.blocks),
            "remote_num_tokens": self.tokens,
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": len(self.addresses),
            "kvxfer": {"addresses": list(self.addresses), "lease": self.lease},
        }


def handover_of(params: Mapping[str, Any]) -> Handover:
    """Reads a prefiller's parameters; `ValueError` names what is wrong with them."""
    ours = params.get("kvxfer")
    addresses: Any = ours.get("addresses") if isinstance(ours, Mapping) else None
    if not _is_list(addresses, str, MAX_RANKS) or not all(a.startswith("tcp://") for a in addresses or ()):
        raise ValueError(
            f"kvxfer.addresses: {_short(addresses)} are no addresses of kvxfer's workers; does the prefiller run KvxferConnector?"
        )
    blocks: Any = params.get("remote_block_ids")
    tokens = params.get("remote_num_tokens")
    # vLLM's own connectors have a list per group of layers; here there is one group.
    if isinstance(blocks, (list, tuple)) and len(blocks) == 1 and isinstance(blocks[0], (list, tuple)):
        blocks = blocks[0]
    if not _is_list(blocks, int, MAX_BLOCKS) or min(blocks) < 0:
        raise ValueError(f"remote_block_ids: {_short(blocks)} is no list of block numbers")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= 0:
        raise ValueError(f"remote_num_tokens: {_short(tokens)} is no number of tokens")
    names = []
    for key in ("remote_request_id", "remote_engine_id"):
        name = params.get(key)
        if not isinstance(name, str) or not 0 < len(name) <= MAX_ID:
            raise ValueError(f"{key}: {_short(name)} is no name")
        names.append(name)
    lease = ours.get("lease") if isinstance(ours, Mapping) else None
    if not isinstance(lease, str) or not 0 < len(lease) <= MAX_ID:
        raise ValueError(f"kvxfer.lease: {_short(lease)} is no lease")
    return Handover(names[0], names[1], tuple(blocks), tokens, tuple(addresses), lease)


def _is_list(value: Any, kind: type, most: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= most
        and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_length(handover: Handover, block_size: int) -> None:
    """`ValueError` where the blocks cannot hold the tokens that they are said to: what is missing would pass as loaded."""
    if len(handover.blocks) * block_size < handover.tokens:
        raise ValueError(
            f"remote_block_ids: {len(handover.blocks)} blocks of {block_size} tokens do not hold {handover.tokens} (remote_num_tokens)"
        )


def pairs(local: Sequence[int], computed: int, remote: Sequence[int]) -> list[tuple[int, int]]:
    """Which remote block goes into which local one: `local` are the blocks to fill, `computed` those of the prompt that the decoder
    has already, at its beginning."""
    return list(zip(local, remote[computed:], strict=False))


def pieces(blocks: Sequence[tuple[int, int]], block_bytes: int) -> list[tuple[int, int, int]]:
    """(local offset, remote offset, length) of one layer; blocks that follow each other on both sides are one piece."""
    found: list[tuple[int, int, int]] = []
    for here, there in blocks:
        a, b = here * block_bytes, there * block_bytes
        if found and found[-1][0] + found[-1][2] == a and found[-1][1] + found[-1][2] == b:
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + block_bytes)
        else:
            found.append((a, b, block_bytes))
    return found


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first thing in which two caches differ, with both values."""
    for key, mine in ours.items():
        if theirs.get(key) != mine:
            return f"{key} differs: here {mine!r}, there {theirs.get(key)!r}"
    return None
