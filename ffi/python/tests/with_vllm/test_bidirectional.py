"""`pd_bidirectional` with real vLLM servers: LMCache's adapter asks, and hears what the decoder has."""

import re
import time

import httpx
import pytest
from asking import SOON, ask, prompt
from stack import MODEL_NAME, Stack, free_ports
from test_pd import CHUNK, PAGE, PAGES


@pytest.fixture(scope="module")
def stack():
    lmcache = {
        "chunk_size": CHUNK,
        "pd_buffer_size": PAGES * PAGE,
        "pd_bidirectional": True,
        # LMCache's adapter wants one to ask at all; nobody listens on it.
        "pd_peer_query_port": free_ports(1),
    }
    with Stack("kvxfer", lmcache=lmcache) as running:
        yield running


def probes(stack):
    """(chunks asked for, chunks the decoder has) of every question so far, in order."""
    form = r"cache probe: req=\S+, queried (\d+) chunks, decoder has (\d+) cached"
    return [tuple(map(int, found)) for found in re.findall(form, stack.log("prefiller").read_text())]


def prefill(stack, name, tokens):
    """A prefill for the decoder, as a proxy asks for it; the decoder's engine is not told."""
    _, _, ports = stack._roles["decoder"]
    spec = {
        "req_id": name,
        "receiver_host": "127.0.0.1",
        "receiver_init_port": ports["pd_peer_init_port"],
        "receiver_alloc_port": ports["pd_peer_alloc_port"],
        "receiver_query_port": stack.lmcache["pd_peer_query_port"],
    }
    body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "kv_transfer_params": {"disagg_spec": spec}}
    httpx.post(stack.prefiller + "/v1/completions", json=body, timeout=300, trust_env=False).raise_for_status()


def test_the_prefiller_hears_what_the_decoder_has(stack):
    tokens = prompt(5 * CHUNK, "kept")
    assert ask(stack.proxy, tokens) == ask(stack.decoder, tokens)
    assert probes(stack) == [(5, 0)], "asked once, before the store: the proxy names no query port"
    other = prompt(4 * CHUNK, "asked for")
    prefill(stack, "first", other)
    assert probes(stack)[1] == (4, 0)
    arrived = time.monotonic() + SOON
    while "request first has arrived" not in stack.log("prefiller").read_text():
        assert time.monotonic() < arrived
        time.sleep(0.2)
    # The same again, and what begins alike: before its store the decoder has what it had from the first.
    before = len(probes(stack))
    prefill(stack, "second", other)
    assert probes(stack)[before:] == [(4, 4), (4, 4)], "before and after the store"
    before = len(probes(stack))
    prefill(stack, "third", other + prompt(2 * CHUNK, "longer"))
    assert probes(stack)[before] == (6, 4)
    log = stack.log("prefiller").read_text()
    assert "cache probe failed" not in log and "asking decoder" not in log
