"""The worker's side: an agent beside the paged cache, which others read from, and which reads others'.

A prefiller's worker holds blocks for decoders that will read them. A decoder reads, and then says so; it takes the bytes for good
only when the prefiller answers that the blocks were held until then. What was not is read again by nobody: vLLM computes it.

    decoder                                prefiller
    read blocks of every layer      ->     (one-sided: nothing of it takes part)
    "done" request                  ->     held: the blocks are vLLM's again, answer "held"
                                           not held (any more): answer "gone"
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from kvxfer.agent import Agent, Peer, RemoteRegion
from kvxfer.errors import KvxferError
from kvxfer.region import Region
from kvxfer.vllm import plan

logger = init_logger("vllm.kvxfer")

_DESCRIPTION = "vllm.kv.description"
_LAYER = "vllm.kv.{}"
_MAX_DESCRIPTION = 1 << 20
_MAX_MESSAGE = 4096
# A prefiller hears from its scheduler in its next step what it is to hold; a decoder may well be faster.
_HEAR_S = 10.0
_TICK_S = 0.25
_FORGET_S = 600.0
_READERS = 8
_MAX_LAYERS = 1 << 16


@dataclass(frozen=True)
class Load:
    """Blocks of a request to be read: the prefiller's request, and (local, remote) numbers."""

    request: str
    handover: plan.Handover
    blocks: tuple[tuple[int, int], ...]


@dataclass
class Work:
    """What the scheduler asks of the workers in a step."""

    loads: list[Load] = field(default_factory=list)
    hold: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Requests whose blocks stay for a decoder: for how many seconds at most, and what shows that they were read."""
    drop: list[plan.Handover] = field(default_factory=list)
    """Hand-overs that this decoder does not need (any more)."""


@dataclass(frozen=True)
class _Remote:
    peer: Peer
    layers: list[RemoteRegion]


class _Answer:
    """What a prefiller says of a request."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.held = False


class Worker:
    """One per worker process. `description` is what both sides must have in common."""

    def __init__(self, settings: Mapping[str, Any], host: str, port: int, name: str, read_timeout: float):
        config = dict(settings) | {"listen": [f"tcp://{host}:{port}"], "name": f"{name[:90]}#{uuid.uuid4().hex[:16]}"}
        self._agent = Agent.from_config(config, environment=True)
        self._read_timeout = read_timeout
        self._lock = threading.Lock()
        self._layers: list[Region] = []
        self._block_bytes: list[int] = []
        self._description: dict[str, Any] = {}
        self._described: Region | None = None
        # Held for decoders, until when; decoders' questions that came before the scheduler's word; what is over.
        self._held: dict[str, tuple[float, str]] = {}
        # By proof, as is what is over: a name may come again.
        self._early: dict[str, tuple[str, int, bool, float]] = {}
        self._over: dict[str, float] = {}
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._remotes: dict[str, _Remote] = {}
        self._answers: dict[int, _Answer] = {}
        self._numbers = itertools.count(1)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kvxfer-read")
        self._running = True
        self._thread = threading.Thread(target=self._run, name="kvxfer-vllm", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return self._agent.addresses[0]

    def register(self, layers: list[tuple[str, int, int, int, Any]], description: Mapping[str, Any]) -> None:
        """Makes the cache reachable: per layer its name, address, length, bytes of a block, and what keeps it alive."""
        for index, (_, address, length, block_bytes, keep) in enumerate(layers):
            region = self._agent.register_memory(address, length, keep)
            region.export(_LAYER.format(index), "r")
            self._layers.append(region)
            self._block_bytes.append(block_bytes)
        self._description = dict(description) | {
            "layers": [name for name, *_ in layers],
            "block_bytes": self._block_bytes,
        }
        self._described = self._agent.register(bytearray(json.dumps(self._description).encode()))
        self._described.export(_DESCRIPTION, "r")
        logger.info(
            "kvxfer: %d layers, %d bytes of cache can be read at %s",
            len(layers),
            sum(length for _, _, length, _, _ in layers),
            self.address,
        )

    # ---- the scheduler's orders ----

    def start(self, work: Work, rank: int) -> None:
        """Takes what a step brings; never waits."""
        now = time.monotonic()
        answers = []
        with self._lock:
            for request, (seconds, proof) in work.hold.items():
                early = self._early.pop(proof, None)
                if early is None:
                    self._held[request] = (now + seconds, proof)
                else:
                    peer, number, wants_answer, _ = early
                    self._sent.add(request)
                    self._over[proof] = now
                    answers.append((peer, number, wants_answer))
        for peer, number, wants_answer in answers:
            if wants_answer:
                self._reply(peer, number, True)
        for load in work.loads:
            self._readers.submit(self._load, load, rank)
        for handover in work.drop:
            self._readers.submit(self._drop, handover, rank)

    def results(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose blocks are vLLM's again, those that have been received, and which of those have failed."""
        with self._lock:
            found = self._sent, self._received, self._failed
            self._sent, self._received, self._failed = set(), set(), set()
        return found

    # ---- the decoder ----

    def _load(self, load: Load, rank: int) -> None:
        began = time.perf_counter()
        try:
            remote = self._reach(load.handover, rank)
            moved = 0
            transfers = []
            try:
                for local, there, size in zip(self._layers, remote.layers, self._block_bytes, strict=True):
                    pieces = plan.pieces(load.blocks, size)
                    moved += sum(length for _, _, length in pieces)
                    transfers.append(remote.peer.read(local, there, pieces, timeout=self._read_timeout))
            finally:
                # Each has ended before anybody hears of it: nothing writes into blocks that are somebody else's.
                reports = [_ended(transfer) for transfer in transfers]
            for report in reports:
                if isinstance(report, KvxferError):
                    raise report
            if not self._was_held(remote.peer, load.handover):
                raise LookupError(
                    f"the prefiller did not hold these blocks for {load.handover.request} until they had been read: too late, restarted, or not its blocks"
                )
        except Exception as e:
            logger.error("kvxfer: request %s: its cache was not loaded, it is computed here: %s", load.request, e)
            with self._lock:
                self._received.add(load.request)
                self._failed.add(load.request)
            return
        took = time.perf_counter() - began
        transport = reports[0].transport if reports else "nothing"
        logger.info(
            "kvxfer: request %s: %d blocks, %d bytes over %s in %.2f ms (%.2f GB/s)",
            load.request,
            len(load.blocks),
            moved,
            transport,
            1e3 * took,
            moved / took / 1e9,
        )
        with self._lock:
            self._received.add(load.request)

    def _drop(self, handover: plan.Handover, rank: int) -> None:
        try:
            self._reach(handover, rank).peer.notify(_message("drop", handover, 0))
        except Exception as e:
            # The prefiller's own deadline gives the blocks back.
            logger.debug(
                "kvxfer: the prefiller of %s was not told that its blocks are not needed: %s", handover.request, e
            )

    def _was_held(self, peer: Peer, handover: plan.Handover) -> bool:
        number, answer = next(self._numbers), _Answer()
        with self._lock:
            self._answers[number] = answer
        try:
            peer.notify(_message("done", handover, number))
            deadline = time.monotonic() + _HEAR_S + self._read_timeout
            while not answer.came.wait(_TICK_S):
                if time.monotonic() > deadline or not peer.is_up:
                    return False
            return answer.held
        finally:
            with self._lock:
                self._answers.pop(number, None)

    def _reach(self, handover: plan.Handover, rank: int) -> _Remote:
        """The prefiller's worker of the same rank, once it is known to have the same kind of cache."""
        ranks = self._description["tp_size"]
        if len(handover.addresses) != ranks:
            raise ValueError(f"tp_size differs: here {ranks}, there {len(handover.addresses)}")
        address = handover.addresses[rank]
        with self._lock:
            remote = self._remotes.get(address)
        if remote is not None and remote.peer.is_up:
            return remote
        peer = self._agent.connect(address)
        place = peer.region(_DESCRIPTION)
        if len(place) > _MAX_DESCRIPTION:
            raise ValueError(f"{address}: a description of {len(place)} bytes")
        text = bytearray(len(place))
        with self._agent.register(text) as scratch:
            peer.read(scratch, place, [(0, 0, len(text))]).wait()
        theirs = json.loads(text)
        differs = plan.difference(self._description, theirs) if isinstance(theirs, dict) else "it describes nothing"
        if differs:
            raise ValueError(f"the cache at {address} is another one: {differs}")
        remote = _Remote(peer, [peer.region(_LAYER.format(i)) for i in range(len(self._layers))])
        self._remember(address, remote)
        logger.info("kvxfer: connected to the prefiller at %s over %s", address, ", ".join(remote.layers[0].transports))
        return remote

    def _remember(self, address: str, remote: _Remote) -> None:
        """Keeps a prefiller, and lets go of those that are gone: a new one has another address, and comes for ever."""
        with self._lock:
            self._remotes = {a: r for a, r in self._remotes.items() if r.peer.is_up}
            self._remotes[address] = remote

    # ---- the prefiller, and answers ----

    def _run(self) -> None:
        while self._running:
            try:
                message = self._agent.wait_notification(_TICK_S)
                if message is not None:
                    self._heard(message.peer, message.payload)
                self._tick()
            except KvxferError as e:
                if self._running:
                    logger.error("kvxfer: %s", e)
                    time.sleep(_TICK_S)
            except Exception:
                logger.exception("kvxfer: the connector's thread stumbled; it goes on")
                time.sleep(_TICK_S)

    def _heard(self, peer: str, payload: bytes) -> None:
        said = _parsed(payload)
        if said is None:
            logger.warning("kvxfer: a notification of %s that is none of a vLLM connector's", peer)
            return
        what, request, number, proof = said
        if what in ("held", "gone"):
            with self._lock:
                answer = self._answers.get(number)
            if answer is not None:
                answer.held = what == "held"
                answer.came.set()
            return
        now, held = time.monotonic(), None
        with self._lock:
            if self._held.get(request, (0.0, None))[1] == proof:
                del self._held[request]
                self._sent.add(request)
                self._over[proof] = now
                held = True
            elif proof in self._over or request in self._held:
                # Too late, or other blocks than those that are held: whoever is meant by them still has the hold.
                held = False
            else:
                self._early[proof] = (peer, number, what == "done", now + _HEAR_S)
        if held is not None and what == "done":
            self._reply(peer, number, held)

    def _tick(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [request for request, (until, _) in self._held.items() if until < now]
            for request in late:
                _, proof = self._held.pop(request)
                self._sent.add(request)
                self._over[proof] = now
            unheard = [(request, *early[:3]) for request, early in self._early.items() if early[3] < now]
            for request, *_ in unheard:
                del self._early[request]
            for request in [r for r, since in self._over.items() if since + _FORGET_S < now]:
                del self._over[request]
        for request in late:
            logger.warning("kvxfer: nobody has read the cache of request %s; its blocks are given back", request)
        for _, peer, number, wants_answer in unheard:
            if wants_answer:
                self._reply(peer, number, False)

    def _reply(self, peer: str, number: int, held: bool) -> None:
        try:
            self._agent.peer(peer).notify(json.dumps(["held" if held else "gone", "", number, ""]).encode())
        except KvxferError as e:
            logger.warning("kvxfer: %s was not told whether its blocks were held: %s", peer, e)

    def close(self) -> None:
        if not self._running:
            return
        self._running = False
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._agent.close()
        self._thread.join(5)
        for region in [*self._layers, *filter(None, [self._described])]:
            try:
                region.close()
            except KvxferError:
                pass


def _ended(transfer: Any) -> Any:
    """Its report or its error; not before no byte of it moves any more."""
    try:
        return transfer.wait()
    except KvxferError as e:
        return e


def _message(what: str, handover: plan.Handover, number: int) -> bytes:
    return json.dumps([what, handover.request, number, handover.proof()]).encode()


def _parsed(payload: bytes) -> tuple[str, str, int, str] | None:
    if len(payload) > _MAX_MESSAGE:
        return None
    try:
        what, request, number, proof = json.loads(payload)
    except (ValueError, TypeError):
        return None
    if what not in ("done", "drop", "held", "gone") or not isinstance(request, str) or not isinstance(number, int):
        return None
    if not isinstance(proof, str):
        return None
    return what, request, number, proof


def settings_of(extra: Mapping[str, Any]) -> tuple[dict[str, Any], str, int, float, float]:
    """`kv_connector_extra_config`: the agent's settings below `kvxfer`, `host`, `port`, `hold` and `read_timeout` in seconds."""
    known = {"kvxfer", "host", "port", "hold", "read_timeout"}
    for key in extra:
        if key not in known:
            raise ValueError(
                f"kv_connector_extra_config: {key!r} is not a setting; known are {', '.join(sorted(known))}"
            )
    agent = extra.get("kvxfer", {})
    if not isinstance(agent, Mapping):
        raise ValueError(f"kv_connector_extra_config: kvxfer: {agent!r} is not a mapping of settings")
    port = extra.get("port", 0)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
        raise ValueError(f"kv_connector_extra_config: port: {port!r} is not between 0 and 65535")
    numbers = []
    for key, default in (("hold", 120.0), ("read_timeout", 30.0)):
        value = extra.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
            raise ValueError(f"kv_connector_extra_config: {key}: {value!r} is no number of seconds")
        numbers.append(float(value))
    for variable in ("KVXFER_NAME", "KVXFER_LISTEN", "KVXFER_CONFIG"):
        if os.environ.get(variable):
            raise ValueError(
                f"{variable} is set, but name and address come from kv_connector_extra_config (host, port): unset it"
            )
    return dict(agent), str(extra.get("host", "")), port, numbers[0], numbers[1]
