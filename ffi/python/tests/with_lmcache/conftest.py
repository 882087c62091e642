"""These tests use the real LMCache; without it they say so and are skipped."""

import importlib.util

HAVE_LMCACHE = importlib.util.find_spec("lmcache") is not None and importlib.util.find_spec("torch") is not None
collect_ignore_glob = [] if HAVE_LMCACHE else ["test_*.py"]


def pytest_report_header(config):
    return None if HAVE_LMCACHE else "SKIPPED: tests/with_lmcache: LMCache is not installed in this environment"
