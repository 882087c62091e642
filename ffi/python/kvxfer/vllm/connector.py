"""The class that vLLM loads: one object in its scheduler, one in each worker."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvxfer.vllm.cache import description_of, layers_of
from kvxfer.vllm.scheduler import Scheduler
from kvxfer.vllm.worker import Work, Worker, settings_of

__all__ = ["KvxferConnector"]


@dataclass
class KvxferMetadata(KVConnectorMetadata):
    """What the scheduler asks of the workers in a step."""

    work: Work = field(default_factory=Work)


@dataclass
class KvxferHandshake(KVConnectorHandshakeMetadata):
    """Where a worker listens."""

    address: str


class KvxferConnector(KVConnectorBase_V1):
    """vLLM makes one in its scheduler and one in each worker; each half forwards to what it is made of."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ValueError(
                f"KvxferConnector: the model's cache has {groups} groups of layers; one is supported (--disable-hybrid-kv-cache-manager)"
            )
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size != 1:
            raise ValueError(
                f"KvxferConnector: pipeline_parallel_size is {parallel.pipeline_parallel_size}; 1 is supported"
            )
        transfer = vllm_config.kv_transfer_config
        settings, host, port, hold, read_timeout = settings_of(transfer.kv_connector_extra_config or {})
        self._engine = str(transfer.engine_id)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._rank = 0
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(self._engine, vllm_config.cache_config.block_size, hold)
        else:
            self._rank = get_tensor_model_parallel_rank()
            host = host or os.environ.get("VLLM_HOST_IP") or socket.gethostbyname(socket.gethostname())
            name = f"vllm-{self._engine}-{self._rank}"
            self._worker = Worker(settings, host, port + self._rank if port else 0, name, read_timeout)

    # ---- the scheduler's half ----

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._half(self._scheduler).matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half(self._scheduler).allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KvxferMetadata(self._half(self._scheduler).take())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._half(self._scheduler).finished(request, block_ids)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._half(self._scheduler).set_addresses({rank: said.address for rank, said in metadata.items()})

    # ---- the worker's half ----

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return KvxferHandshake(self._half(self._worker).address)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        layers = layers_of(kv_caches)
        self._half(self._worker).register(layers, description_of(self._vllm_config, vllm.__version__))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvxferMetadata)
        self._half(self._worker).start(metadata.work, self._rank)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received, failed = self._half(self._worker).results()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: blocks are read between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are read where they are."""

    def wait_for_save(self) -> None:
        """Nothing, as above."""

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    @staticmethod
    def _half(half: Any) -> Any:
        assert half is not None, "vLLM calls the other half of the connector"
        return half
