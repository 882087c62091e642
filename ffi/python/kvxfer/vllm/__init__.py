"""A KV connector for vLLM without LMCache: a decoder reads a prompt's blocks straight out of the prefiller's paged cache.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvxferConnector", "kv_connector_module_path": "kvxfer.vllm",
        "kv_role": "kv_producer", "kv_load_failure_policy": "recompute"}'

and the same with `kv_consumer` on the decoder, or `kv_both`. Requests come through a proxy that speaks the flow of vLLM's own pull
connectors (`do_remote_decode`, then `do_remote_prefill` with what the prefiller answered). See docs/vllm_connector.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvxfer.vllm.connector import KvxferConnector

__all__ = ["KvxferConnector"]


def __getattr__(name: str) -> Any:
    # vLLM asks for the class; nothing of vLLM is imported before.
    if name == "KvxferConnector":
        from kvxfer.vllm.connector import KvxferConnector

        return KvxferConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
