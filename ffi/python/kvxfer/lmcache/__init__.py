"""kvxfer under LMCache: what its wheel adds to an installed LMCache, and nothing to one that does not name kvxfer.

    from kvxfer.lmcache import register
    register()

vLLM calls `register` by itself, in each of its processes. Nothing of LMCache, torch or vLLM is imported by that: each addition
waits for the module of LMCache that it belongs to.
"""

from kvxfer.lmcache.hook import register

__all__ = ["register"]
