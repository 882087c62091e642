"""`python -m kvxfer.lmcache …`: LMCache's own command with kvxfer registered, for processes that vLLM does not start.

    python -m kvxfer.lmcache server … --p2p-advertise-url 10.0.0.1:7600 --p2p-transfer-engine kvxfer

Every argument is LMCache's (`lmcache --help`). With `--shm-name ""` the server's L1 memory is kvxfer's, which other servers on the
same host map; otherwise they read it through the kernel.
"""

import os
import sys

from kvxfer.lmcache import register

if __name__ == "__main__":
    register()
    if "kvxfer" in (argument.rpartition("=")[2] for argument in sys.argv):
        # As the configuration of an engine would say.
        os.environ.setdefault("LMCACHE_TRANSFER_CHANNEL", "kvxfer")
    try:
        from lmcache.cli.main import main
    except ImportError as e:
        sys.exit(
            f"kvxfer: LMCache's command cannot be loaded ({e}); install lmcache in this environment: pip install lmcache"
        )
    sys.argv[0] = "lmcache"
    sys.exit(main())
