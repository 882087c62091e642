"""What the tests with real vLLM servers share: prompts, questions, metrics, waiting."""

import concurrent.futures
import random
import time

import httpx
from stack import MODEL_NAME

GENERATED = 12
SOON = 60


def prompt(tokens, seed, shared=0):
    draw, common = random.Random(seed), random.Random("shared")
    return [common.randrange(3, 512) for _ in range(shared)] + [draw.randrange(3, 512) for _ in range(tokens - shared)]


def ask(base, tokens, patience=300, **change):
    body = {
        "model": MODEL_NAME,
        "prompt": tokens,
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(base + "/v1/completions", json=body | change, timeout=patience, trust_env=False)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


def ask_many(base, prompts, width, patience=300):
    """Each answer, or the error in its place."""

    def one(tokens):
        try:
            return ask(base, tokens, patience)
        except httpx.HTTPError as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(width) as pool:
        return list(pool.map(one, prompts))


def gauge(base, name, **labels):
    """The sum of a metric's series that have these labels."""
    total = 0.0
    for line in httpx.get(base + "/metrics", timeout=20, trust_env=False).text.splitlines():
        if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def empty_pages(base):
    """Pages of a decoder that hold nothing: free ones, and those that prefillers have in advance."""
    return sum(gauge(base, "kvxfer_pool_pages", state=state) for state in ("free", "advanced"))


def until(wanted, what, patience=SOON):
    deadline = time.monotonic() + patience
    while not wanted():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
