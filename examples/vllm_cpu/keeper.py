"""Runs a server and makes sure that nothing of it outlives whoever started it.

    python keeper.py COMMAND… < PIPE

vLLM's engine processes go on when their server is killed. So each server runs below a keeper, in a process group of its own. When
the other end of the keeper's standard input is closed (on purpose, or because its owner died, however that happened), or when
the server ends by itself, the keeper ends the whole group: politely first, then for good.
"""

import os
import select
import signal
import subprocess
import sys
import time

PATIENCE_S = 10


def main():
    # The group's signals are for the others; Ctrl-C in the terminal reaches the owner, who closes the pipe.
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, restore_signals=True, preexec_fn=default_signals)
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], 0.5)
        if readable and not os.read(0, 1):
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_S
            while server.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            break
    # Says how the server ended to whoever reads the log; the keeper's own status is lost with the group.
    print(f"keeper: the server's status is {server.poll()}", flush=True)
    os.killpg(0, signal.SIGKILL)


def default_signals():
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, signal.SIG_DFL)


if __name__ == "__main__":
    main()
