"""Pairs that do not fit, bytes that change on the way, vLLM's own prefix cache: the tokens are right, and the log says what was wrong.

One decoder; the prefiller is started anew for each case. Both keep their prefix caches, as vLLM does unless told otherwise.
"""

import pytest
from asking import ask, ask_many, empty_pages, gauge, prompt, until
from stack import Stack

CHUNK = 64
LOADED = "kvxfer_pd_loaded_chunks_total"
RETENTION_S = 10


@pytest.fixture(scope="module")
def stack():
    lmcache = {
        "chunk_size": CHUNK,
        "extra_config": {"kvxfer": {"pd": {"retention": RETENTION_S, "request_timeout": 20, "patience": 3}}},
    }
    with Stack("kvxfer", lmcache=lmcache, vllm=["--enable-prefix-caching"]) as running:
        yield running


@pytest.fixture
def prefiller(stack):
    """Starts the prefiller anew with what a test changes, and at its end as it was."""
    before = stack.lmcache, stack.environment, stack.vllm, stack.model

    def again(lmcache=None, environment=None, vllm=(), model=None):
        stack.lmcache = before[0] | (lmcache or {})
        stack.environment = {"prefiller": environment or {}}
        stack.vllm, stack.model = [*before[2], *vllm], model or before[3]
        stack.kill("prefiller")
        stack.restart("prefiller")

    yield again
    stack.lmcache, stack.environment, stack.vllm, stack.model = before


def refused(stack, seed, *words):
    """A prompt is answered with the decoder's own tokens, nothing was loaded, and the prefiller's log has the reason."""
    before = gauge(stack.decoder, LOADED)
    tokens = prompt(300, seed)
    answer = ask(stack.proxy, tokens)
    assert gauge(stack.decoder, LOADED) == before, "nothing of this prefiller is used"
    log = stack.log("prefiller").read_text()
    for word in words:
        assert word in log, f"{word!r} is not in the prefiller's log"
    return answer, tokens


def test_prompts_that_the_decoder_has_in_its_own_prefix_cache_leave_no_page_behind(stack):
    tokens = prompt(500, "prefix")
    first, before = ask(stack.proxy, tokens), gauge(stack.decoder, LOADED)
    assert before > 0
    # The same again, and one that goes on where it ended: both engines have the beginning.
    assert ask(stack.proxy, tokens) == first
    longer = tokens + prompt(300, "on")
    answer = ask(stack.proxy, longer)
    assert gauge(stack.decoder, LOADED) > before, "what is new was loaded"
    assert answer == ask(stack.decoder, longer)
    pages = gauge(stack.decoder, "kvxfer_pool_pages")
    until(lambda: empty_pages(stack.decoder) == pages, "all pages empty", RETENTION_S + 60)


def test_bytes_that_change_on_the_way_are_never_used(stack, prefiller):
    # Every second write has one byte flipped, behind the sender's back.
    faults = {"corrupt_every": 2}
    pd = stack.lmcache["extra_config"]["kvxfer"]["pd"] | {"integrity": "full"}
    prefiller({"extra_config": {"kvxfer": {"faults": faults, "pd": pd}}})
    prompts = [prompt(400, f"flipped {i}") for i in range(6)]
    answers = ask_many(stack.proxy, prompts, 2)
    assert answers == [ask(stack.decoder, p) for p in prompts]
    assert "arrived damaged" in stack.log("prefiller").read_text()


def test_another_hash_seed_is_reported_as_what_it_is(stack, prefiller):
    prefiller(environment={"PYTHONHASHSEED": "7"})
    answer, tokens = refused(
        stack,
        "seed",
        "hash_seed differs",
        "PYTHONHASHSEED must be the same number on all instances",
        "PYTHONHASHSEED=7",
    )
    assert answer == ask(stack.decoder, tokens)


def test_a_missing_hash_seed_is_reported_as_what_it_is(stack, prefiller):
    prefiller(environment={"PYTHONHASHSEED": "random"})
    answer, tokens = refused(stack, "no seed", "PYTHONHASHSEED is not set")
    assert answer == ask(stack.decoder, tokens)


def test_another_model_is_refused_by_name(stack, prefiller):
    other = stack.home / "run" / "another-model"
    other.unlink(missing_ok=True)
    other.symlink_to(stack.home / "model")
    prefiller(model=other)
    answer, tokens = refused(stack, "model", "model differs", "another-model")
    assert answer == ask(stack.decoder, tokens)


def test_another_dtype_is_refused_by_name(stack, prefiller):
    prefiller(vllm=["--dtype", "float32"])
    refused(stack, "dtype", "dtype differs", "float32", "bfloat16")


def test_a_prefiller_that_fits_is_taken_again(stack, prefiller):
    prefiller()
    before = gauge(stack.decoder, LOADED)
    tokens = prompt(300, "fits")
    answer = ask(stack.proxy, tokens)
    assert gauge(stack.decoder, LOADED) > before
    assert answer == ask(stack.decoder, tokens)
