"""The scheduler's side: which requests wait for a prefiller's blocks, and which blocks wait for a decoder."""

from __future__ import annotations

import uuid
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from kvxfer.vllm import plan
from kvxfer.vllm.worker import Load, Work

logger = init_logger("vllm.kvxfer")


class Scheduler:
    """One per engine. vLLM calls it from its scheduling loop."""

    def __init__(self, engine: str, block_size: int, hold: float):
        self._engine, self._block_size, self._hold = engine, block_size, hold
        self._addresses: tuple[str, ...] = ()
        self._work = Work()

    def set_addresses(self, addresses: dict[int, str]) -> None:
        self._addresses = tuple(addresses[rank] for rank in sorted(addresses))

    def matched(self, request: Any, computed: int) -> tuple[int, bool]:
        """Tokens that a prefiller has beyond those that are here, loaded beside the engine's steps."""
        handover = self._handover(request)
        if handover is None:
            return 0, False
        count = min(handover.tokens, request.num_prompt_tokens) - computed
        return (count, True) if count > 0 else (0, False)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Blocks have been allocated for a request: those without content are read."""
        handover = self._handover(request)
        if handover is None:
            return
        # Once per request: what fails is computed.
        request.kv_transfer_params["do_remote_prefill"] = False
        if external_tokens <= 0:
            self._work.drop.append(handover)
            return
        (group,) = blocks.blocks
        fresh = [block.block_id for block in group if block.block_hash is None and not block.is_null]
        needed = -(-min(handover.tokens, request.num_prompt_tokens) // self._block_size)
        chosen = plan.pairs(fresh, len(group) - len(fresh), handover.blocks[:needed])
        self._work.loads.append(Load(request.request_id, handover, tuple(chosen)))

    def take(self) -> Work:
        """What has come together since the last step."""
        work, self._work = self._work, Work()
        return work

    def finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. A prefiller's blocks stay until a decoder has read them."""
        params = request.kv_transfer_params
        if not params:
            return False, None
        handover = self._handover(request)
        if handover is not None:
            # Over before it was scheduled: its blocks at the prefiller are not needed.
            params["do_remote_prefill"] = False
            self._work.drop.append(handover)
            return False, None
        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if not params.get("do_remote_decode") or not done or not block_ids or not self._addresses:
            return False, None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        blocks = tuple(block_ids[: -(-tokens // self._block_size)])
        if not blocks:
            return False, None
        lease = uuid.uuid4().hex
        handover = plan.Handover(request.request_id, self._engine, blocks, tokens, self._addresses, lease)
        self._work.hold[request.request_id] = (self._hold, handover.proof())
        return True, handover.params()

    def _handover(self, request: Any) -> plan.Handover | None:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        try:
            handover = plan.handover_of(params)
            plan.check_length(handover, self._block_size)
            return handover
        except ValueError as e:
            logger.warning("kvxfer: request %s: it is computed here: %s", request.request_id, e)
            params["do_remote_prefill"] = False
            return None
