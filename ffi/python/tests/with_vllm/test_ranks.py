"""Two tensor-parallel ranks on each side: each rank's cache goes to the same rank of the decoder."""

from asking import ask, gauge, prompt
from stack import Stack
from test_connector import decode, expected, prefill, reads

CHUNK = 64


def test_two_ranks_hand_over_their_halves():
    with Stack("kvxfer", lmcache={"chunk_size": CHUNK}, ranks=2) as stack:
        prompts = [prompt(n, f"ranks {n}") for n in (64, 300, 1000)]
        assert [ask(stack.proxy, p) for p in prompts] == [ask(stack.decoder, p) for p in prompts]
        chunks = sum(-(-len(p) // CHUNK) for p in prompts)
        loaded = gauge(stack.decoder, "kvxfer_pd_loaded_chunks_total")
        assert loaded >= 2 * (chunks - len(prompts)), "both ranks have loaded"
        log = stack.log("prefiller").read_text()
        assert "rank 0 of 2" in log and "rank 1 of 2" in log


def test_two_ranks_are_read_by_their_like():
    """vLLM alone, with kvxfer's own connector."""
    with Stack("vllm", ranks=2) as stack:
        for n in (64, 1000):
            tokens = prompt(n, f"pull ranks {n}")
            before = len(reads(stack))
            assert decode(stack, tokens, prefill(stack, tokens)) == expected(stack, tokens)
            assert len(reads(stack)) == before + 2, "each rank has read its half"
