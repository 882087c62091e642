"""vLLM alone, with kvxfer's own connector: a decoder reads a prompt's blocks out of the prefiller's cache.

What a proxy of vLLM's pull flow does, the tests do: the prefiller is asked with `do_remote_decode`, the decoder gets what it answered.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
from asking import GENERATED, SOON, ask, gauge, prompt, until
from stack import MODEL_NAME, Stack, free_ports

HOLD_S = 6
READ = "kvxfer: request"


@pytest.fixture(scope="module")
def stack():
    flags = ["--enable-prefix-caching", "--max-num-batched-tokens", 256]
    connector = {"hold": HOLD_S, "read_timeout": 5}
    with Stack("vllm", vllm=flags, connector=connector) as running:
        yield running


def prefill(stack, tokens, **change):
    """The prefiller's part: what it answers for the decoder."""
    body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "temperature": 0, "stream": False}
    body["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = httpx.post(stack.prefiller + "/v1/completions", json=body | change, timeout=300, trust_env=False)
    answer.raise_for_status()
    return answer.json()["kv_transfer_params"]


def decode(stack, tokens, params, **change):
    return ask(stack.decoder, tokens, kv_transfer_params=params, **change)


def reads(stack):
    """Lines of the decoder that say that a cache was read."""
    return [line for line in stack.log("decoder").read_text().splitlines() if " blocks, " in line and READ in line]


def expected(stack, tokens):
    """What one instance says: the prefiller by itself."""
    return ask(stack.prefiller, tokens)


def blocks_are_free(stack):
    for base in (stack.prefiller, stack.decoder):
        until(
            lambda base=base: gauge(base, "vllm:kv_cache_usage_perc") == 0, f"{base} has all its blocks", HOLD_S + SOON
        )


def test_tokens_are_those_of_one_instance_and_the_blocks_come_back(stack):
    for n in (1, 15, 16, 17, 200, 256, 257, 1000, 1900):
        tokens = prompt(n, f"pull {n}")
        before = len(reads(stack))
        assert decode(stack, tokens, prefill(stack, tokens)) == expected(stack, tokens), n
        assert len(reads(stack)) == before + 1, "the cache was read, not computed"
    blocks_are_free(stack)


def test_only_what_the_decoder_lacks_is_read(stack):
    tokens = prompt(512, "prefix")
    wanted = expected(stack, tokens)
    assert decode(stack, tokens, prefill(stack, tokens)) == wanted
    longer = tokens + prompt(256, "suffix")
    assert decode(stack, longer, prefill(stack, longer)) == expected(stack, longer)
    full, part = (int(line.split(" blocks, ")[0].rsplit(" ", 1)[1]) for line in reads(stack)[-2:])
    assert part == full // 2, "256 new tokens behind 512 that are there"
    # All of it is there already: nothing to read, and the prefiller's blocks are given back all the same.
    assert decode(stack, tokens, prefill(stack, tokens)) == wanted
    blocks_are_free(stack)


def test_a_cache_that_nobody_reads_is_given_back_and_one_read_too_late_is_not_used(stack):
    tokens = prompt(400, "late")
    params = prefill(stack, tokens)
    blocks_are_free(stack)
    assert "nobody has read the cache" in stack.log("prefiller").read_text()
    before = len(reads(stack))
    assert decode(stack, tokens, params) == expected(stack, tokens)
    assert len(reads(stack)) == before and "it is computed here" in stack.log("decoder").read_text()


def test_a_request_that_is_given_up_leaves_no_blocks_behind(stack):
    for i in range(3):
        tokens = prompt(600, f"gone {i}")
        params, began = prefill(stack, tokens), time.monotonic()
        with contextlib.suppress(httpx.TimeoutException):
            answer = decode(stack, tokens, params, patience=0.05, max_tokens=7000)
            pytest.fail(f"{len(answer)} tokens were answered after {time.monotonic() - began:.3f} s: {answer[:20]}")
    blocks_are_free(stack)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"remote_block_ids": "all"}, "remote_block_ids"),
        ({"remote_block_ids": [-1]}, "remote_block_ids"),
        ({"remote_block_ids": [10**9]}, "computed here"),
        ({"remote_num_tokens": 0}, "remote_num_tokens"),
        ({"remote_block_ids": [0]}, "do not hold"),
        # As many as there should be, but not its own: block 0 is nobody's.
        ({"remote_block_ids": [0, 0, 0]}, "did not hold"),
        ({"kvxfer": {"addresses": ["http://127.0.0.1:1"]}}, "kvxfer.addresses"),
        ({"kvxfer": {"addresses": ["tcp://127.0.0.1:1"]}}, "cannot be reached"),
        ({"remote_request_id": "another"}, "did not hold"),
    ],
)
def test_parameters_that_are_wrong_are_named_and_the_answer_is_right(stack, wrong, word):
    tokens = prompt(300, f"wrong {wrong}")
    params = prefill(stack, tokens)
    if list(wrong.get("kvxfer", ())) == ["addresses"]:
        wrong = {"kvxfer": params["kvxfer"] | wrong["kvxfer"]}
    said = stack.log("decoder").read_text().count(word)
    assert decode(stack, tokens, params | wrong) == expected(stack, tokens)
    assert stack.log("decoder").read_text().count(word) > said


def test_a_prefiller_that_is_killed_before_the_read_and_comes_back(stack):
    tokens = prompt(300, "killed")
    wanted = expected(stack, tokens)
    params = prefill(stack, tokens)
    stack.kill("prefiller")
    began = time.monotonic()
    assert decode(stack, tokens, params) == wanted
    assert time.monotonic() - began < SOON
    stack.restart("prefiller")
    fresh = prompt(300, "after")
    before = len(reads(stack))
    assert decode(stack, fresh, prefill(stack, fresh)) == expected(stack, fresh)
    assert len(reads(stack)) == before + 1, "the new one is read from"
    blocks_are_free(stack)


def test_a_stopped_prefiller_is_waited_for_no_longer_than_its_time(stack):
    tokens = prompt(300, "stopped")
    wanted = expected(stack, tokens)
    params = prefill(stack, tokens)
    group = os.getpgid(stack.servers[0].keeper.pid)
    os.killpg(group, signal.SIGSTOP)
    try:
        assert decode(stack, tokens, params) == wanted
    finally:
        os.killpg(group, signal.SIGCONT)
    blocks_are_free(stack)


def waiting(stack):
    """Requests at the decoder that wait for their blocks, among others."""
    return gauge(stack.decoder, "vllm:num_requests_waiting{")


def test_a_decoder_that_is_killed_in_the_middle_of_a_read_and_comes_back(stack):
    tokens = prompt(600, "cut off")
    wanted = expected(stack, tokens)
    # Over `tcp` the prefiller takes part in a read, so that one ends in no case while it is stopped.
    stack.environment["decoder"] = {"KVXFER_TRANSPORTS": "tcp"}
    try:
        stack.kill("decoder")
        stack.restart("decoder")
        first = prompt(300, "connects")
        assert decode(stack, first, prefill(stack, first)) == expected(stack, first)
        assert " over tcp" in reads(stack)[-1]
        params, before = prefill(stack, tokens), len(reads(stack))
        group = os.getpgid(stack.servers[0].keeper.pid)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            os.killpg(group, signal.SIGSTOP)
            try:
                asked = pool.submit(decode, stack, tokens, params)
                until(lambda: waiting(stack) == 1, "the decoder reads")
                stack.kill("decoder")
            finally:
                os.killpg(group, signal.SIGCONT)
            with pytest.raises(httpx.HTTPError):
                asked.result()
        assert len(reads(stack)) == before
        # The prefiller still holds the blocks for whoever comes with the parameters, and gives them back when the time is over.
        assert gauge(stack.prefiller, "vllm:kv_cache_usage_perc") > 0
        assert expected(stack, tokens) == wanted, "the prefiller serves on"
        until(lambda: gauge(stack.prefiller, "vllm:kv_cache_usage_perc") == 0, "the blocks are back", HOLD_S + SOON)
    finally:
        del stack.environment["decoder"]
    stack.restart("decoder")
    assert decode(stack, tokens, prefill(stack, tokens)) == wanted
    assert len(reads(stack)) == before + 1, "the new one reads"
    blocks_are_free(stack)


def test_a_decoder_that_is_killed_with_many_reads_under_way(stack):
    prompts = [prompt(1500, f"many {i}") for i in range(8)]
    wanted = [expected(stack, tokens) for tokens in prompts]
    handed = [prefill(stack, tokens) for tokens in prompts]
    before = len(reads(stack))
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        asked = [
            pool.submit(decode, stack, tokens, params, max_tokens=2000)
            for tokens, params in zip(prompts, handed, strict=True)
        ]
        until(lambda: len(reads(stack)) > before, "the first has been read")
        stack.kill("decoder")
        assert all(isinstance(one.exception(), httpx.HTTPError) for one in asked)
    stack.restart("decoder")
    blocks_are_free(stack)
    handed = [prefill(stack, tokens) for tokens in prompts]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda one: decode(stack, *one), zip(prompts, handed, strict=True))) == wanted
    blocks_are_free(stack)


def test_a_client_that_leaves_during_the_prefill_leaves_no_blocks_behind(stack):
    def counts():
        return gauge(stack.prefiller, "vllm:prompt_tokens_total"), stack.log("prefiller").read_text().count(
            "nobody has read"
        )

    before = counts()
    host, port = stack.prefiller.removeprefix("http://").split(":")
    clients = []
    for i in range(3):
        body = {"model": MODEL_NAME, "prompt": prompt(8000, f"leaves {i}"), "max_tokens": 1}
        body["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
        clients.append(http.client.HTTPConnection(host, int(port)))
        clients[-1].request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: gauge(stack.prefiller, "vllm:kv_cache_usage_perc") > 0, "a prefill is under way")
    for client in clients:
        client.close()
    blocks_are_free(stack)
    assert counts() == before, "not one was computed to its end, and nothing was held"


def test_another_model_is_refused_by_name(stack, tmp_path):
    """One whose cache looks the same: the same layers of the same size, other weights."""
    from transformers import LlamaForCausalLM

    tokens = prompt(300, "model")
    wanted, model = expected(stack, tokens), stack.model
    other = tmp_path / "another-llama"
    shutil.copytree(model, other)
    weights = LlamaForCausalLM.from_pretrained(model)
    for name, weight in weights.named_parameters():
        if "proj" in name:
            weight.data.neg_()
    weights.save_pretrained(other)
    stack.model = other
    try:
        stack.kill("prefiller")
        stack.restart("prefiller")
        assert expected(stack, tokens) != wanted
        before = len(reads(stack))
        assert decode(stack, tokens, prefill(stack, tokens)) == wanted, "computed by its own model"
        assert len(reads(stack)) == before
        assert f"model differs: here '{model}', there '{other}'" in stack.log("decoder").read_text()
        blocks_are_free(stack)
    finally:
        stack.model = model


def test_another_dtype_is_refused_by_name(stack):
    flags = stack.vllm
    stack.vllm = [*flags, "--dtype", "float32"]
    try:
        stack.kill("prefiller")
        stack.restart("prefiller")
        tokens = prompt(300, "dtype")
        answer = decode(stack, tokens, prefill(stack, tokens))
        assert len(answer) == GENERATED
        assert "dtype differs: here 'bfloat16', there 'float32'" in stack.log("decoder").read_text()
    finally:
        stack.vllm = flags


def test_through_the_example_proxy_whole_and_streamed(stack):
    port = free_ports(1)[0]
    script = pathlib.Path(__file__).resolve().parents[4] / "examples" / "vllm_pull" / "proxy.py"
    stack.kill("prefiller")
    stack.restart("prefiller")
    command = [sys.executable, script, "--port", port, "--prefiller", stack.prefiller, "--decoder", stack.decoder]
    proxy = subprocess.Popen([str(word) for word in command])
    try:
        base = f"http://127.0.0.1:{port}"
        until(lambda: _answers(base), "the proxy is up")
        tokens = prompt(300, "through a proxy")
        wanted, before = expected(stack, tokens), len(reads(stack))
        assert ask(base, tokens) == wanted
        assert len(reads(stack)) == before + 1
        body = {
            "model": MODEL_NAME,
            "prompt": prompt(300, "streamed"),
            "max_tokens": 5,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", base + "/v1/completions", json=body, timeout=60, trust_env=False) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert len(lines) >= 6 and lines[-1] == "data: [DONE]"
        wrong = httpx.post(base + "/v1/completions", json={"model": MODEL_NAME}, timeout=60, trust_env=False)
        assert wrong.status_code == 400 or wrong.status_code == 422
        # Without a prefiller the decoder computes.
        stack.kill("prefiller")
        assert ask(base, tokens) == wanted
    finally:
        proxy.kill()
        proxy.wait()
        stack.restart("prefiller")


def _answers(base):
    try:
        return httpx.get(base + "/health", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False
