"""vLLM's paged cache as memory: where its layers lie, and what two caches must have in common so that blocks can be copied."""

from __future__ import annotations

from typing import Any


def layers_of(kv_caches: dict[str, Any]) -> list[tuple[str, int, int, int, Any]]:
    """Per layer: name, address, length, bytes of a block, the tensor. Layers that share a tensor come once. Where keys and values lie apart
    (`[2, blocks, …]`, as most of vLLM's GPU backends keep them) a layer has two entries."""
    found: list[tuple[str, int, int, int, Any]] = []
    blocks = None
    for name, tensor in kv_caches.items():
        if not hasattr(tensor, "data_ptr"):
            raise ValueError(f"KvxferConnector: the cache of layer {name} is a {type(tensor).__name__}, not one tensor")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"KvxferConnector: the cache of layer {name} is on {tensor.device}; host and CUDA memory are supported"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"KvxferConnector: the cache of layer {name} is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
            )
        if any(address == tensor.data_ptr() for _, address, *_ in found):
            continue
        planes = [(name, tensor)]
        if tensor.device.type == "cuda" and tensor.dim() == 5 and tensor.shape[0] == 2:
            planes = [(f"{name}.k", tensor[0]), (f"{name}.v", tensor[1])]
        for part, plane in planes:
            if blocks is not None and plane.shape[0] != blocks:
                raise ValueError(
                    f"KvxferConnector: layer {part} has {plane.shape[0]} blocks, others {blocks}: blocks must come first in its shape"
                )
            blocks = plane.shape[0]
            found.append((part, plane.data_ptr(), plane.nbytes, plane.nbytes // blocks, tensor))
    if not found:
        raise ValueError("KvxferConnector: the model has no cache")
    return found


def description_of(config: Any, version: str) -> dict[str, Any]:
    """What must be equal on both sides, since blocks are copied as they are."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    dtype = model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    return {
        "vllm": version,
        "model": str(model.model),
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": int(cache.block_size),
        "tp_size": int(parallel.tensor_parallel_size),
        "attention": _attention(model, cache),
    }


def _attention(model: Any, cache: Any) -> str:
    """vLLM's CPU attention keeps keys in an order of its own, by what the processor can do."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return str(current_platform.device_type)
    from vllm.v1.attention.backends import cpu_attn

    choose = getattr(cpu_attn, "_get_attn_isa", None)
    if choose is None:
        return "cpu"
    return f"cpu, {choose(model.dtype, cache.block_size, model.get_head_size())}"
