"""The demonstration behind `make demo-vllm`: does a real engine's cache arrive, did kvxfer carry it, and how fast?

    python demo.py [--own | --sync | --async] [--keep] [--skip-bench] [--reps 5]

1. One prefiller, one decoder, `kvxfer proxy`. For each prompt: greedy tokens through the proxy must equal the decoder's own,
   and kvxfer's counters must show exactly the bytes of that prompt's cache. The same with LMCache's stock NIXL channel behind
   the same proxy, which has no counters.
2. The negative control: with the received cache zeroed the tokens of longer prompts must differ, so equality above means
   something.
3. LMCache's PD backend with its NIXL channel and with kvxfer's, in one run: kvxfer must be at least twice as fast.

The exit status is 0 when all of it held.
"""

import argparse
import json
import pathlib
import random
import re
import signal
import sys
import time

import httpx
from stack import MODEL_NAME, Stack, home

import channel_bench

PROMPT_TOKENS = [100, 256, 257, 1000, 3000, 5000]
GENERATED = 24
CHUNK = 256
# The tiny model: 4 layers, keys and values, 4 heads of 32, two bytes an element.
CACHE_BYTES_PER_TOKEN = 4 * 2 * 4 * 32 * 2
BAR = 2.0
WROTE = re.compile(r"kvxfer: (?:wrote|request \S+ has arrived:) (\d+) (?:objects?|chunks), (\d+) bytes over (\w+)")
PHASE = re.compile(r"(\w+);dur=([0-9.]+)")
LOG_PATIENCE_S = 10


def prompt(tokens):
    draw = random.Random(tokens)
    return [draw.randrange(3, 512) for _ in range(tokens)]


def complete(base, tokens):
    body = {
        "model": MODEL_NAME,
        "prompt": prompt(tokens),
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(base + "/v1/completions", json=body, timeout=600, trust_env=False)
    if response.is_error:
        raise RuntimeError(f"{base} answered {response.status_code}: {response.text[:500]}")
    # What the proxy says of the request's phases, in milliseconds.
    timing = {name: float(ms) for name, ms in PHASE.findall(response.headers.get("x-kvxfer-timing", ""))}
    timing["decode"] = timing.get("first_decode", 0) + timing.get("rest", 0)
    return response.json()["choices"][0]["token_ids"], timing


class Carried:
    """What the prefiller's log says kvxfer has carried since the last look."""

    def __init__(self, log):
        self.log, self.seen = log, 0

    def since_last(self, expected_bytes):
        deadline = time.monotonic() + LOG_PATIENCE_S
        while True:
            found = WROTE.findall(self.log.read_text(errors="replace"))
            new = found[self.seen :]
            total = sum(int(size) for _, size, _ in new)
            if total >= expected_bytes or time.monotonic() > deadline:
                self.seen = len(found)
                return total, sorted({transport for _, _, transport in new})
            time.sleep(0.05)


def check_tokens(stack):
    """Part 1 and 2 for one stack. Returns the failures, as sentences."""
    failures = []
    carried = Carried(stack.log("prefiller")) if stack.channel == "kvxfer" else None
    name = f"{stack.channel}, {stack.mode}"
    alone_tokens = {}
    print(
        f"\n{'prompt':>8} {'tokens':<16}{'carried by kvxfer':>26}{'prefill ms':>12}{'handover ms':>13}{'decode ms':>11}"
    )
    for tokens in PROMPT_TOKENS:
        alone_tokens[tokens], _ = complete(stack.decoder, tokens)
        through, timing = complete(stack.proxy, tokens)
        size = tokens * CACHE_BYTES_PER_TOKEN
        total, transports = carried.since_last(size) if carried else (0, [])
        same = through == alone_tokens[tokens]
        if not same:
            failures.append(
                f"{tokens} tokens ({name}): {through} through the proxy, {alone_tokens[tokens]} from one instance"
            )
        if carried and total != size:
            failures.append(f"{tokens} tokens ({name}): kvxfer carried {total} bytes, the cache has {size}")
        ms = "".join(f"{timing.get(k, 0):>{w}.1f}" for k, w in (("prefill", 12), ("kv_wait", 13), ("decode", 11)))
        verdict = f"{len(through)} equal" if same else "DIFFERENT"
        by = f"{total:,} B over {'+'.join(transports)}" if carried else "-"
        print(f"{tokens:>8} {verdict:<16}{by:>26}{ms}", flush=True)

    stack.corrupt_marker.touch()
    # Where the first token is half a character the proxy asks the decoder the whole question, and LMCache then finds full
    # chunks only: a prompt within one chunk may have been computed there.
    controlled = [n for n in PROMPT_TOKENS if n > CHUNK]
    insensitive = [n for n in controlled if complete(stack.proxy, n)[0] == alone_tokens[n]]
    stack.corrupt_marker.unlink()
    if insensitive:
        failures.append(
            f"negative control ({name}): zeroed cache changed nothing for prompts of {insensitive} tokens"
        )
    print(
        f"negative control: received cache zeroed, tokens differ for {len(controlled) - len(insensitive)} of {len(controlled)} prompts longer than a chunk"
    )
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--own", dest="modes", action="store_const", const=["kvxfer"], help="only kvxfer's PD backend")
    which.add_argument("--sync", dest="modes", action="store_const", const=["sync"], help="only pd_backend_mode: sync")
    which.add_argument(
        "--async", dest="modes", action="store_const", const=["async"], help="only pd_backend_mode: async"
    )
    parser.add_argument("--keep", action="store_true", help="leave the last stack running until Ctrl-C")
    parser.add_argument("--skip-bench", action="store_true", help="only the tokens")
    parser.add_argument("--reps", type=int, default=5, help="timed repetitions of the benchmark for each channel")
    parser.add_argument("--json", help="write the benchmark's numbers to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    failures = []
    stacks = [("kvxfer", mode) for mode in options.modes or ["kvxfer", "async", "sync"]]
    if not options.keep and not options.modes:
        stacks.append(("nixl", "async"))
    for channel, mode in stacks:
        started = time.monotonic()
        print(
            f'\n== vLLM + LMCache, transfer_channel: "{channel}", PD backend {mode}: starting prefiller, decoder and proxy',
            flush=True,
        )
        with Stack(mode, channel, control=True) as stack:
            print(f"up after {time.monotonic() - started:.0f} s; logs in {stack.logs}", flush=True)
            failures += check_tokens(stack)
            if options.keep and (channel, mode) == stacks[-1]:
                print(
                    f"\nproxy {stack.proxy}\nprefiller {stack.prefiller}\ndecoder {stack.decoder}\nCtrl-C ends it",
                    flush=True,
                )
                try:
                    signal.pause()
                except KeyboardInterrupt:
                    pass

    if not options.skip_bench:
        print(
            f"\n== LMCache's PD backend alone: {channel_bench.TOKENS} tokens of Llama-3-8B, {channel_bench.VALID_BYTES / 1e6:.0f} MB, every chunk bit-checked",
            flush=True,
        )
        seconds = channel_bench.measure(["nixl", "kvxfer"], options.reps, home() / "logs")
        lines, ratio = channel_bench.table(seconds)
        print("\n".join(lines))
        print(f"kvxfer is {ratio:.2f} times as fast as LMCache's NIXL channel (bar: {BAR:.1f})")
        if ratio < BAR:
            failures.append(f"benchmark: {ratio:.2f} times NIXL's rate, the bar is {BAR:.1f}")
        if options.json:
            pathlib.Path(options.json).write_text(
                json.dumps({"seconds": seconds, "ratio": ratio, "valid_bytes": channel_bench.VALID_BYTES})
            )

    print()
    for failure in failures:
        print(f"FAILED {failure}")
    print("FAILED" if failures else "OK: everything held")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; everything it started has been ended")
        sys.exit(130)
