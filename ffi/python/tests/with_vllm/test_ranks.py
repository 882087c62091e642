"""Two tensor-parallel ranks on each side: each rank's cache goes to the same rank of the decoder."""

from asking import ask, dtype, gauge, prompt
from stack import Stack

CHUNK = 64


def test_two_ranks_hand_over_their_halves():
    with Stack("kvxfer", dtype=dtype(), lmcache={"chunk_size": CHUNK}, ranks=2) as stack:
        prompts = [prompt(n, f"ranks {n}") for n in (64, 300, 1000)]
        assert [ask(stack.proxy, p) for p in prompts] == [ask(stack.decoder, p) for p in prompts]
        chunks = sum(-(-len(p) // CHUNK) for p in prompts)
        loaded = gauge(stack.decoder, "kvxfer_pd_loaded_chunks_total")
        assert loaded >= 2 * (chunks - len(prompts)), "both ranks have loaded"
        log = stack.log("prefiller").read_text()
        assert "rank 0 of 2" in log and "rank 1 of 2" in log
