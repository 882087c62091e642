"""What a hand-over between two vLLM servers says, and which bytes it moves."""

import dataclasses
import random

import pytest

from kvxfer.vllm import plan

HANDOVER = plan.Handover("cmpl-1", "engine", (3, 4, 9), 40, ("tcp://10.0.0.1:7100", "tcp://10.0.0.1:7101"), "lease-1")


def test_parameters_survive_their_way_through_clients():
    params = HANDOVER.params()
    assert params["do_remote_prefill"] is True and params["remote_host"] == "10.0.0.1" and params["remote_port"] == 7100
    assert plan.handover_of(params) == HANDOVER
    # As vLLM's own connectors write them, a list per group.
    assert plan.handover_of(params | {"remote_block_ids": [[3, 4, 9]]}) == HANDOVER


@pytest.mark.parametrize(
    "change",
    [
        {"kvxfer": None},
        {"kvxfer": {"addresses": []}},
        {"kvxfer": {"addresses": ["10.0.0.1:7100"], "lease": "x"}},
        {"kvxfer": {"addresses": ["tcp://a:1"] * (plan.MAX_RANKS + 1)}},
        {"remote_block_ids": []},
        {"remote_block_ids": [True]},
        {"remote_block_ids": [-1]},
        {"remote_block_ids": [[1], [2]]},
        {"remote_block_ids": [0] * (plan.MAX_BLOCKS + 1)},
        {"remote_num_tokens": -5},
        {"remote_num_tokens": True},
        {"remote_request_id": ""},
        {"remote_request_id": "x" * (plan.MAX_ID + 1)},
        {"remote_engine_id": 7},
    ],
)
def test_what_is_wrong_is_named(change):
    (key,) = change
    with pytest.raises(ValueError, match=key):
        plan.handover_of(HANDOVER.params() | change)


def test_blocks_that_follow_each_other_on_both_sides_are_one_piece():
    assert plan.pieces([(0, 5), (1, 6), (2, 8), (3, 9), (7, 10)], 100) == [
        (0, 500, 200),
        (200, 800, 200),
        (700, 1000, 100),
    ]
    assert plan.pieces([], 100) == []


def test_pieces_are_the_blocks_whatever_their_order():
    for seed in range(200):
        draw = random.Random(seed)
        count, size = draw.randrange(1, 40), draw.choice([1, 7, 4096])
        blocks = list(zip(draw.sample(range(60), count), draw.sample(range(60), count), strict=True))
        if draw.random() < 0.5:
            blocks = [(here, here + 3) for here in sorted(h for h, _ in blocks)]
        moved = [
            (local + i, remote + i)
            for local, remote, length in plan.pieces(blocks, size)
            for i in range(0, length, size)
        ]
        assert moved == [(here * size, there * size) for here, there in blocks]


def test_what_the_decoder_has_is_not_read():
    assert plan.pairs([20, 21], 3, [1, 2, 3, 4, 5]) == [(20, 4), (21, 5)]
    # More room than the prompt needs, and less.
    assert plan.pairs([20, 21, 22], 3, [1, 2, 3, 4, 5]) == [(20, 4), (21, 5)]
    assert plan.pairs([20], 3, [1, 2, 3, 4, 5]) == [(20, 4)]


def test_the_first_difference_is_said_with_both_values():
    ours = {"dtype": "bfloat16", "block_size": 16}
    assert plan.difference(ours, dict(ours)) is None
    assert plan.difference(ours, ours | {"block_size": 32}) == "block_size differs: here 16, there 32"
    assert plan.difference(ours, {"dtype": "bfloat16"}) == "block_size differs: here 16, there None"


def test_the_proof_stands_for_these_blocks_of_this_hold():
    others = [{"blocks": (3, 4, 8)}, {"blocks": (4, 3, 9)}, {"tokens": 39}, {"lease": "lease-2"}, {"request": "cmpl-2"}]
    proofs = {dataclasses.replace(HANDOVER, **change).proof() for change in others}
    assert len(proofs) == len(others) and HANDOVER.proof() not in proofs
    assert plan.handover_of(HANDOVER.params()).proof() == HANDOVER.proof()
    with pytest.raises(ValueError, match=r"kvxfer\.lease"):
        plan.handover_of(HANDOVER.params() | {"kvxfer": {"addresses": ["tcp://a:1"]}})


def test_blocks_that_cannot_hold_the_tokens_are_refused():
    plan.check_length(HANDOVER, 16)  # 3 blocks of 16 hold 40 tokens
    with pytest.raises(ValueError, match="remote_block_ids: 3 blocks of 13 tokens do not hold 40"):
        plan.check_length(HANDOVER, 13)
