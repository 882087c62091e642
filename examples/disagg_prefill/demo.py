#!/usr/bin/env python3
"""demo.py: asks the example that is running a few questions and compares its answers with those of one server alone.

Run by `demo.sh`, which starts two prefillers, a decoder and the proxy first. Streams several prompts at the same time through
the proxy, then puts the same prompts to a single instance of the same model, which computes everything itself. Prints what
came when, that the texts are equal, what was transferred, and the proxy's statistics. Exit code 0: all equal, and the decoder
got its caches from the prefillers.

Environment: URL (proxy), MODEL, ENGINE_BINARY (the engine, for the single instance), LOGS (folder of the servers' logs).
Standard library only.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

OUTPUT_TOKENS = 24
DEADLINE = 60.0
STORY = "The prefiller computes the keys and values of a prompt once; the decoder needs them before its first step. "
PROMPTS = [
    "The future of AI is",
    "Disaggregated prefill " + STORY,
    "Question: what crosses from one GPU to the other? " + STORY * 4,
    "The future of AI is",
    "A long document. " + STORY * 9,
    "Summarize: " + STORY * 14,
]


class Answer:
    """One completion: its text, when its first token came, and how it ended."""

    def __init__(self) -> None:
        self.text = ""
        self.first = self.total = 0.0
        self.finish = None
        self.usage = None
        self.error = None

    def same(self, other: "Answer") -> bool:
        return (self.text, self.finish, self.usage) == (other.text, other.finish, other.usage)


def complete(url: str, model: str, prompt: str, shown) -> Answer:
    """Streams one greedy completion; `shown` is called with each piece of text."""
    parts, answer = urlsplit(url), Answer()
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    start = time.monotonic()
    try:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=DEADLINE)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read(2000).decode(errors='replace')}")
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if not line.startswith(b"data: ") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                answer.first = answer.first or time.monotonic() - start
                answer.text += choice["text"]
                answer.finish = choice["finish_reason"] or answer.finish
                shown(choice["text"])
        connection.close()
    except (OSError, RuntimeError, ValueError, KeyError) as problem:
        answer.error = str(problem)
    answer.total = time.monotonic() - start
    return answer


class Single:
    """One server that prefills and decodes by itself, on a port the system chooses."""

    def __init__(self, binary: str, model: str, log: str) -> None:
        with open(log, "wb") as out:
            command = [binary, "--role", "both", "--host", "localhost", "--port", "0", "--served-model-name", model]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        end = time.monotonic() + DEADLINE
        while True:
            with open(log, encoding="utf-8", errors="replace") as lines:
                text = lines.read()
            found = re.search(r"https?://[^\s\"/]+:(\d+)", text)
            if found:
                self.url = f"http://localhost:{found.group(1)}"
                return
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise SystemExit(f"the single instance did not start; {log} ends with:\n{text[-1500:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def visible(text: str, width: int = 44) -> str:
    """A random model writes random bytes: what cannot be shown becomes a dot."""
    shown = "".join(c if c.isprintable() and c != "\ufffd" else "." for c in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def stream_all(url: str, model: str) -> list[Answer]:
    answers: list[Answer] = [Answer()] * len(PROMPTS)
    live = sys.stdout.isatty()
    lock = threading.Lock()

    def ask(i: int) -> None:
        def shown(text: str) -> None:
            if live:
                with lock:
                    sys.stdout.write(visible(text))
                    sys.stdout.flush()

        answers[i] = complete(url, model, PROMPTS[i], shown)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if live:
        print()
    return answers


def log_lines(folder: str, pattern: str) -> list[str]:
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".log"):
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as lines:
                found += [f"{name.removesuffix('.log'):<11} {m.group(0)}" for m in map(re.compile(pattern).search, lines) if m]
    return found


def statistics(log: str, requests: int) -> str | None:
    """The guide's block, which the proxy prints at most every five seconds."""
    end = time.monotonic() + 12
    block = re.compile(rf"(=+\nNum requests: {requests}\n.*?\n=+)", re.DOTALL)
    while time.monotonic() < end:
        with open(log, encoding="utf-8", errors="replace") as lines:
            found = block.findall(lines.read())
        if found:
            return found[-1]
        time.sleep(0.2)
    return None


def main() -> int:
    url, model, logs = os.environ["URL"], os.environ["MODEL"], os.environ["LOGS"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    single = Single(os.environ["ENGINE_BINARY"], model, os.path.join(logs, "single.log"))
    try:
        print(f"\n{len(PROMPTS)} prompts at the same time through the proxy, streamed, {OUTPUT_TOKENS} tokens each:")
        answers = stream_all(url, model)
        print("\n     prompt tokens   first token, ms   all, ms   answer                                         one server says")
        held = True
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers), 1):
            alone = complete(single.url, model, prompt, lambda _: None)
            equal = answer.error is None and answer.same(alone)
            held &= equal
            verdict = "the same" if equal else f"SOMETHING ELSE: {visible(alone.error or alone.text)}"
            tokens = (answer.usage or {}).get("prompt_tokens", "-")
            print(f"  {i}  {tokens:>13}   {answer.first * 1e3:>15.1f}   {answer.total * 1e3:>7.1f}   "
                  f"{visible(answer.error or answer.text):<44}   {verdict}")
    finally:
        single.stop()

    stored = log_lines(logs, r"Store \d+ tokens takes: .*")
    hits = log_lines(logs, r"Retrieved \d+ of \d+ tokens")
    print("\nWhat crossed from the prefillers to the decoder:")
    for line in stored + hits:
        print(f"  {line}")
    if not stored or not hits:
        print("  nothing: the decoder computed the prompts itself")
        held = False

    block = statistics(os.path.join(logs, "proxy.log"), len(PROMPTS))
    print("\nThe proxy's statistics (proxy.log):")
    print(block or "  not printed within 12 s")
    held &= block is not None
    print(f"\n{'All answers are those of one server alone.' if held else 'NOT all held; see above.'}  "
          f"Logs: {os.path.relpath(logs)}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
