"""The CPU connector against what vLLM's own op writes into its cache, for every order of elements that the op knows here."""

import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from lmcache.v1.memory_management import MemoryFormat
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

import kvxfer
from kvxfer.lmcache import cpu, settings
from kvxfer.lmcache.cpu import CpuConnector

LAYERS, HEADS, BLOCKS = 3, 2, 7
# vLLM takes amx for bfloat16 only, and for blocks and heads in multiples of 32; its op writes that order wherever its build for the
# processor has it (AVX-512).
KINDS = [
    *[(dtype, "vec", *sizes) for dtype in cpu._DTYPES for sizes in ((32, 64), (128, 128), (96, 32))],
    *[(dtype, "vec16", *sizes) for dtype in cpu._DTYPES for sizes in ((16, 64), (48, 80), (16, 112))],
    *[(torch.bfloat16, "amx", *sizes) for sizes in ((32, 64), (128, 128), (96, 32), (64, 96))],
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    current_platform.import_kernels()


def connector(head_size, layers=LAYERS, **extra):
    metadata = types.SimpleNamespace(kv_shape=(layers, 2, 256, HEADS, head_size), use_mla=False)
    config = types.SimpleNamespace(use_layerwise=False, extra_config={"kvxfer": extra})
    return CpuConnector(config, metadata)


def noise(dtype, *shape):
    """Every bit pattern, NaNs too: bytes are compared, not numbers."""
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).squeeze(-1)


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def empty_caches(dtype, block_size, head_size):
    return [torch.zeros(BLOCKS, HEADS, block_size, 2 * head_size, dtype=dtype) for _ in range(LAYERS)]


def write_with_vllm(cache, keys, values, slots, isa):
    """What `CPUAttentionBackendImpl.do_kv_cache_update` does."""
    blocks, heads, block_size, _ = cache.shape
    key_cache, value_cache = cache.view(blocks, heads, block_size * 2, -1).chunk(2, dim=2)
    try:
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
    except RuntimeError as e:
        if "Unsupported CPU attention configuration" not in str(e):
            raise
        pytest.skip(f"vLLM's build for this processor has no {isa} kernels: {e}")


def memory_object(dtype, tokens, head_size):
    tensor = noise(dtype, 2, LAYERS, tokens, HEADS * head_size)
    return types.SimpleNamespace(tensor=tensor, metadata=types.SimpleNamespace(fmt=MemoryFormat.KV_2LTD))


@pytest.fixture
def written(request, monkeypatch):
    """Keys and values of a request, where its tokens are, and caches that vLLM's op has written them to."""
    dtype, isa, block_size, head_size = request.param
    monkeypatch.setattr(cpu, "attention_kernels", lambda *_: isa)
    torch.manual_seed(0)
    tokens = 4 * block_size + block_size // 2 + 3
    slots = torch.cat([torch.arange(b * block_size, (b + 1) * block_size) for b in (5, 0, 3, 6, 2)])[:tokens]
    keys, values = (noise(dtype, LAYERS, tokens, HEADS, head_size) for _ in range(2))
    caches = empty_caches(dtype, block_size, head_size)
    for layer, cache in enumerate(caches):
        write_with_vllm(cache, keys[layer], values[layer], slots, isa)
    return types.SimpleNamespace(
        dtype=dtype,
        isa=isa,
        block_size=block_size,
        head_size=head_size,
        tokens=tokens,
        slots=slots,
        both=torch.stack([keys, values]).view(2, LAYERS, tokens, HEADS * head_size),
        caches=caches,
        connector=connector(head_size),
    )


def cut(w, step):
    starts = list(range(0, w.tokens, step))
    ends = [min(s + step, w.tokens) for s in starts]
    return [memory_object(w.dtype, e - s, w.head_size) for s, e in zip(starts, ends, strict=True)], starts, ends


def names(kind):
    dtype, isa, block_size, head_size = kind
    return f"{isa}, {str(dtype)[6:]}, blocks of {block_size}, heads of {head_size}"


@pytest.mark.parametrize("written", KINDS, indirect=True, ids=names)
def test_what_vllm_wrote_is_gathered_and_scattered_bit_for_bit(written):
    w = written
    for step in (w.block_size, 29):
        objects, starts, ends = cut(w, step)
        w.connector.batched_from_gpu(objects, starts, ends, kvcaches=w.caches, slot_mapping=w.slots)
        for memory, start, end in zip(objects, starts, ends, strict=True):
            assert same(memory.tensor, w.both[:, :, start:end])
        fresh = empty_caches(w.dtype, w.block_size, w.head_size)
        w.connector.batched_to_gpu(objects, starts, ends, kvcaches=fresh, slot_mapping=w.slots)
        assert all(same(a, b) for a, b in zip(fresh, w.caches, strict=True))


@pytest.mark.parametrize("written", [KINDS[0], KINDS[-1]], indirect=True, ids=names)
def test_what_vllm_holds_already_is_not_written_again(written):
    w = written
    objects, starts, ends = cut(w, w.block_size)
    for memory, start, end in zip(objects, starts, ends, strict=True):
        memory.tensor.copy_(w.both[:, :, start:end])
    held = w.block_size + 11
    fresh, expected = (empty_caches(w.dtype, w.block_size, w.head_size) for _ in range(2))
    w.connector.batched_to_gpu(objects, starts, ends, kvcaches=fresh, slot_mapping=w.slots, vllm_cached_tokens=held)
    for layer, cache in enumerate(expected):
        keys, values = w.both[:, layer, held:].unflatten(2, (HEADS, w.head_size))
        write_with_vllm(cache, keys.contiguous(), values.contiguous(), w.slots[held:], w.isa)
    assert all(same(a, b) for a, b in zip(fresh, expected, strict=True))


@pytest.mark.parametrize("written", [KINDS[0]], indirect=True, ids=names)
def test_one_object_slots_of_32_bits_and_another_cache(written):
    w = written
    memory = memory_object(w.dtype, 20, w.head_size)
    w.connector.from_gpu(memory, 7, 27, kvcaches=w.caches, slot_mapping=w.slots.to(torch.int32))
    assert same(memory.tensor, w.both[:, :, 7:27])
    other = [cache.clone() for cache in w.caches]
    other[0].zero_()
    w.connector.from_gpu(memory, 7, 27, kvcaches=other, slot_mapping=w.slots)
    assert not memory.tensor[:, 0].any() and same(memory.tensor[:, 1:], w.both[:, 1:, 7:27])
    fresh = empty_caches(w.dtype, w.block_size, w.head_size)
    w.connector.to_gpu(memory, 7, 27, kvcaches=fresh, slot_mapping=w.slots)
    assert not fresh[0].any() and fresh[1].any()


@pytest.mark.parametrize("written", [KINDS[0]], indirect=True, ids=names)
def test_what_does_not_fit_is_refused_before_anything_moves(written):
    w = written
    memory = memory_object(w.dtype, 20, w.head_size)
    before = memory.tensor.clone()

    def refused(words, objects=memory, start=0, end=20, error=ValueError, **changes):
        with pytest.raises(error, match=words):
            w.connector.from_gpu(objects, start, end, **{"kvcaches": w.caches, "slot_mapping": w.slots} | changes)

    w.connector.initialize_kvcaches_ptr(kvcaches=w.caches)
    slots = w.slots.clone()
    slots[3] = BLOCKS * w.block_size
    refused("token 3: slot 224", slot_mapping=slots, error=kvxfer.InvalidArgument)
    refused("21 tokens are", end=21)
    refused("slot_mapping has 19", slot_mapping=w.slots[:19])
    refused("2 layers, LMCache was told of 3", kvcaches=w.caches[:2])
    refused("in layer 1.*float16, bfloat16 and", kvcaches=[w.caches[0], w.caches[1].to(torch.uint8), w.caches[2]])
    refused("strides", kvcaches=[cache.transpose(0, 2) for cache in w.caches])
    refused("KV_2LTD", types.SimpleNamespace(metadata=types.SimpleNamespace(fmt=MemoryFormat.KV_MLA_FMT)))
    with pytest.raises(ValueError, match="slot_mapping is missing"):
        w.connector.from_gpu(memory, 0, 20, kvcaches=w.caches)
    with pytest.raises(ValueError, match="kvcaches is missing"):
        connector(64).from_gpu(memory, 0, 20, slot_mapping=w.slots)
    assert same(memory.tensor, before)


def test_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setattr(cpu, "attention_kernels", lambda *_: "neon")
    with pytest.raises(ValueError, match=r"'neon' kernels for torch.float16.*known are vec, vec16, amx"):
        connector(64).initialize_kvcaches_ptr(kvcaches=empty_caches(torch.float16, 32, 64))


def test_the_kernels_are_those_that_vllm_takes():
    assert cpu.attention_kernels(torch.float16, 16, 64) == "vec16"
    assert cpu.attention_kernels(torch.float16, 128, 64) in ("vec", "neon", "rvv", "vsx", "vxe")
    bfloat16 = cpu.attention_kernels(torch.bfloat16, 128, 64)
    assert (bfloat16 == "amx") == torch.cpu._is_amx_tile_supported()


def test_what_the_connector_cannot_do_is_refused_when_it_is_made():
    good = dict(use_layerwise=False, extra_config=None), dict(kv_shape=(3, 2, 256, 2, 64), use_mla=False)

    def made(config=(), metadata=()):
        return CpuConnector(
            *(types.SimpleNamespace(**(a | dict(b))) for a, b in zip(good, (config, metadata), strict=True))
        )

    assert made().get_shape(5) == torch.Size([2, 3, 5, 128])
    for words, changes in {
        "use_layerwise": {"config": {"use_layerwise": True}},
        "MLA": {"metadata": {"kv_shape": (3, 1, 256, 1, 576)}},
        "cpu: threads: -1": {"config": {"extra_config": {"kvxfer": {"cpu": {"threads": -1}}}}},
        "cpu: {'thread': 2}": {"config": {"extra_config": {"kvxfer": {"cpu": {"thread": 2}}}}},
    }.items():
        with pytest.raises(ValueError, match=words):
            made(**changes)


def test_a_pinned_caller_borrows_the_processors_of_its_siblings():
    every = sorted(os.sched_getaffinity(0))
    if len(every) < 2:
        pytest.skip("one processor")
    stop, ready = threading.Event(), threading.Event()

    def pinned(processor, body):
        os.sched_setaffinity(0, {processor})
        body()

    sibling = threading.Thread(target=pinned, args=(every[1], lambda: (ready.set(), stop.wait())))
    sibling.start()
    ready.wait()
    seen = []

    def caller():
        with cpu._also_on(cpu._pinned()):
            seen.append(os.sched_getaffinity(0))
        seen.append(os.sched_getaffinity(0))
        with cpu._also_on({4095}):
            seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pinned, args=(every[0], caller))
    thread.start()
    thread.join()
    stop.set()
    sibling.join()
    assert seen == [{every[0], every[1]}, {every[0]}, {every[0]}]
    with cpu._also_on({every[0]}):
        assert os.sched_getaffinity(0) == set(every)


def test_its_setting_is_not_taken_for_one_of_the_agents():
    config = types.SimpleNamespace(extra_config={"kvxfer": {"cpu": {"threads": 3}, "transfer_timeout": "5s"}})
    assert settings.cpu_threads(config) == 3
    assert settings._extra(config)[1] == {"transfer_timeout": "5s"}


MAKE = """
import types
{first}
import lmcache.v1.gpu_connector as package
from lmcache.utils import EngineType
from lmcache.v1.config import LMCacheEngineConfig
config = LMCacheEngineConfig.from_defaults()
metadata = types.SimpleNamespace(kv_shape=(2, 2, 256, 2, 64), use_mla=False, local_worker_id=0, worker_id=0)
made = lambda engine: package.CreateGPUConnector(config, metadata, engine, layout_hints=None)
{then}
"""
REGISTER = "from kvxfer.lmcache.hook import register\nregister()"
OURS = """
assert type(made(EngineType.VLLM)).__module__ == "kvxfer.lmcache.cpu"
assert type(made(EngineType.MOCK)).__module__.startswith("lmcache.")
config.enable_blending = True
try:
    made(EngineType.VLLM)
except ValueError as e:
    assert "enable_blending" in str(e)
else:
    raise AssertionError("LMCache's own check is gone")
"""
THEIRS = """
try:
    made(EngineType.VLLM)
except RuntimeError as e:
    assert str(e) == "No supported cpu connector found."
else:
    raise AssertionError("LMCache has a connector of its own now; ours must not be needed")
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (REGISTER, OURS),
        ("import lmcache.v1.gpu_connector\n" + REGISTER, OURS),
        ("", THEIRS),
        ("from vllm.plugins import load_general_plugins\nload_general_plugins()", OURS),
    ],
    ids=["registered first", "registered later", "not registered", "by vLLM"],
)
def test_lmcache_gets_the_connector_that_it_does_not_find(first, then):
    script = MAKE.format(first=first, then=then)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
