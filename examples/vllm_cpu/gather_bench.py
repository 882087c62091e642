"""How long a store and a load take between vLLM's paged cache and LMCache's chunks: kvxfer's CPU connector beside a loop in torch.

    python gather_bench.py [--layout vec|amx] [--processors 1] [--tokens 5000] [--layers 16 --heads 8 --head-size 64] [--json FILE]

The loop is what one writes with torch alone: layer by layer, indexed by block and place, a chunk at a time. Both move the same
tokens in one process, in turns, and what they move is compared bit for bit. Before each turn is a pause: threads of torch go on
spinning for a while after they have worked, and would take a processor from whoever comes next. Both have one processor unless told
otherwise, as a server of `stack.py` has. Build the wheel in release mode.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
import types

import torch
from lmcache.v1.memory_management import MemoryFormat

from kvxfer.lmcache import cpu

CHUNK = 256
BAR = 5.0
SETTLED_S = 0.05


class TorchLoop:
    """Keys of `vec` kernels are transposed inside a (block, head); `amx` kernels keep pairs together, in groups of sixteen."""

    def __init__(self, caches, layout):
        self.parts = [self._halves(cache, layout) for cache in caches]

    @staticmethod
    def _halves(cache, layout):
        """Keys and values, each indexed by block and place: views, for the loop to index and to assign to."""
        blocks, heads, block_size, double = cache.shape
        head_size = double // 2
        keys, values = cache.view(blocks, heads, 2, block_size * head_size).unbind(2)
        if layout == "vec":
            keys = keys.unflatten(2, (head_size, block_size)).permute(0, 3, 1, 2)
            return keys, values.unflatten(2, (block_size, head_size)).transpose(1, 2)
        keys = keys.unflatten(2, (block_size // 16, head_size // 2, 16, 2)).permute(0, 2, 4, 1, 3, 5)
        values = values.unflatten(2, (head_size // 16, block_size // 2, 16, 2)).permute(0, 3, 5, 1, 2, 4)
        return keys, values

    @staticmethod
    def _index(half, slots, block_size):
        """Where the slots are in a half: block and place, or block, group and place in the group."""
        block, place = slots // block_size, slots % block_size
        return (block, place) if half.dim() == 4 else (block, place // half.shape[2], place % half.shape[2])

    def gather(self, chunks, slots, block_size):
        for chunk, part in zip(chunks, slots.split(CHUNK), strict=True):
            for layer, halves in enumerate(self.parts):
                for side, half in enumerate(halves):
                    chunk[side, layer] = half[self._index(half, part, block_size)].reshape(len(part), -1)

    def scatter(self, chunks, slots, block_size):
        for chunk, part in zip(chunks, slots.split(CHUNK), strict=True):
            for layer, halves in enumerate(self.parts):
                for side, half in enumerate(halves):
                    index = self._index(half, part, block_size)
                    half[index] = chunk[side, layer].reshape(len(part), *half.shape[len(index) :])


def seconds(reps, *ways):
    """Medians of the ways, which take turns."""
    times = [[] for _ in ways]
    for _ in range(reps + 1):
        for taken, way in zip(times, ways, strict=True):
            time.sleep(SETTLED_S)
            started = time.perf_counter()
            way()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in times]


def measure(options):
    dtype = getattr(torch, options.dtype)
    shape = (options.layers, options.heads, options.head_size)
    blocks = -(-options.tokens // options.block_size)
    torch.manual_seed(0)

    def caches():
        size = (blocks + 8, options.heads, options.block_size, 2 * options.head_size)
        return [torch.empty(size, dtype=dtype).normal_() for _ in range(options.layers)]

    def chunks():
        sizes = [min(CHUNK, options.tokens - at) for at in range(0, options.tokens, CHUNK)]
        row = options.heads * options.head_size
        return [torch.ones((2, options.layers, size, row), dtype=dtype) for size in sizes]

    # Blocks as an engine hands them out after a while: in no order.
    order = torch.randperm(blocks + 8)[:blocks]
    slots = (order[:, None] * options.block_size + torch.arange(options.block_size)).flatten()[: options.tokens]
    starts = list(range(0, options.tokens, CHUNK))
    ends = [min(at + CHUNK, options.tokens) for at in starts]

    cpu.attention_kernels = lambda *_: options.layout
    config = types.SimpleNamespace(use_layerwise=False, extra_config={"kvxfer": {"cpu": {"threads": options.threads}}})
    metadata = types.SimpleNamespace(kv_shape=(shape[0], 2, CHUNK, *shape[1:]), use_mla=False)
    connector = cpu.CpuConnector(config, metadata)

    def objects(tensors):
        form = types.SimpleNamespace(fmt=MemoryFormat.KV_2LTD)
        return [types.SimpleNamespace(tensor=tensor, metadata=form) for tensor in tensors]

    source, ours, theirs = caches(), chunks(), chunks()
    loop = TorchLoop(source, options.layout)
    asked = {"kvcaches": source, "slot_mapping": slots}
    result = {"store": {}, "load": {}}
    result["store"]["torch"], result["store"]["kvxfer"] = seconds(
        options.reps,
        lambda: loop.gather(theirs, slots, options.block_size),
        lambda: connector.batched_from_gpu(objects(ours), starts, ends, **asked),
    )
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    one, other = ([torch.zeros_like(cache) for cache in source] for _ in range(2))
    loop = TorchLoop(one, options.layout)
    asked = {"kvcaches": other, "slot_mapping": slots}
    result["load"]["torch"], result["load"]["kvxfer"] = seconds(
        options.reps,
        lambda: loop.scatter(ours, slots, options.block_size),
        lambda: connector.batched_to_gpu(objects(ours), starts, ends, **asked),
    )
    same = same and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    if not same:
        raise SystemExit("FAILED: the two differ")
    for row in result.values():
        row["ratio"] = row["torch"] / row["kvxfer"]
    return result | {"bytes": sum(chunk.numel() * chunk.element_size() for chunk in ours)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=["vec", "amx"], default="vec", help="order of vLLM's kernels")
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=16, help="the sizes are Llama-3.2-1B's, 32 KiB a token")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--processors", type=int, default=1, help="as many as both may use")
    parser.add_argument("--threads", type=int, default=0, help="of kvxfer; 0: one for each processor, eight at most")
    parser.add_argument("--reps", type=int, default=9, help="timed repetitions of each; the median counts")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()

    available = sorted(os.sched_getaffinity(0))
    if not 0 < options.processors <= len(available):
        parser.error(f"--processors {options.processors}: this process may run on {len(available)}")
    os.sched_setaffinity(0, available[: options.processors])
    torch.set_num_threads(options.processors)
    result = measure(options)
    size = result["bytes"]
    print(
        f"{options.tokens} tokens, {options.layers} layers, {options.heads} heads of {options.head_size}, {options.dtype}, "
        f"{options.layout}: {size / 1e6:.0f} MB on {options.processors} processors"
    )
    print(f"{'':<8}{'torch ms':>10}{'kvxfer ms':>11}{'kvxfer GB/s':>13}{'ratio':>8}")
    for name in ("store", "load"):
        row = result[name]
        print(
            f"{name:<8}{row['torch'] * 1e3:>10.1f}{row['kvxfer'] * 1e3:>11.1f}{size / row['kvxfer'] / 1e9:>13.1f}{row['ratio']:>8.1f}"
        )
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result | vars(options)))
    if result["store"]["ratio"] < BAR:
        print(f"FAILED: a store is {result['store']['ratio']:.1f} times as fast as the loop, the bar is {BAR:.0f}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
