"""Gather and scatter by address, as an engine without torch would call them."""

import array

import pytest

import kvxfer

BLOCKS, HEADS, BLOCK, SIZE = 3, 2, 4, 6
SLOTS = array.array("q", [9, 10, 11, 2, 0])
LAYER_BYTES = BLOCKS * HEADS * 2 * BLOCK * SIZE * 2


def address(a):
    return a.buffer_info()[0]


def cache(layers, **changes):
    sizes = {"blocks": BLOCKS, "heads": HEADS, "block_size": BLOCK, "head_size": SIZE, "element_bytes": 2}
    return kvxfer.PagedCache([address(layer) for layer in layers], LAYER_BYTES, **sizes | changes)


def expected(layers):
    """`[2, layers, tokens, heads * size]`, element by element."""
    for values in (0, 1):
        for layer in layers:
            for slot in SLOTS:
                block, place = divmod(slot, BLOCK)
                for head in range(HEADS):
                    half = ((block * HEADS + head) * 2 + values) * BLOCK * SIZE
                    for i in range(SIZE):
                        yield layer[half + (place * SIZE + i if values else i * BLOCK + place)]


def test_tokens_go_out_and_come_back():
    count = LAYER_BYTES // 2
    layers = [array.array("H", range(start, start + count)) for start in (1, 20_000)]
    data = array.array("H", bytes(2 * 2 * len(layers) * len(SLOTS) * HEADS * SIZE))
    chunk = kvxfer.PagedChunk(address(SLOTS), len(SLOTS), address(data), 2 * len(data))
    cache(layers, threads=2).gather([chunk])
    assert list(data) == list(expected(layers))

    empty = [array.array("H", bytes(LAYER_BYTES)) for _ in layers]
    cache(empty).scatter([chunk])
    assert list(expected(empty)) == list(data)
    assert sum(map(bool, empty[0])) == len(SLOTS) * HEADS * 2 * SIZE, "nothing beside these tokens"
    empty = [array.array("H", bytes(LAYER_BYTES)) for _ in layers]
    cache(empty).scatter([chunk._replace(skip=3)])
    assert sum(map(bool, empty[1])) == 2 * HEADS * 2 * SIZE
    cache(empty).gather([])


def test_what_is_wrong_is_said_when_the_cache_is_described_or_used():
    layers = [array.array("H", bytes(LAYER_BYTES))]
    for words, changes in {
        "'neon' is none of 'vec', 'amx'": {"layout": "neon"},
        "element_bytes: is 3": {"element_bytes": 3},
        "amx.*multiples of 32": {"layout": "amx"},
        "layer_bytes": {"blocks": 4},
    }.items():
        with pytest.raises(kvxfer.InvalidArgument, match=words):
            cache(layers, **changes)
    data = array.array("H", bytes(2 * 2 * len(SLOTS) * HEADS * SIZE))
    wrong = array.array("q", [0, 1, 2, 3, BLOCKS * BLOCK])
    with pytest.raises(kvxfer.InvalidArgument, match="chunk 0, token 4: slot 12"):
        cache(layers).gather([kvxfer.PagedChunk(address(wrong), len(wrong), address(data), 2 * len(data))])
