"""What the PD backend counts, in the process's Prometheus registry, where vLLM's and LMCache's endpoint shows it.

Names begin with `kvxfer_`; labels are the model and the rank. Gauges are per live process, so that a restarted worker does not
leave its old pages behind.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import prometheus_client as prometheus

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LABELS = ("model_name", "rank")
_STATES = ("free", "writing", "advanced", "published", "pinned", "quarantined")


@cache
def _families() -> dict[str, Any]:
    """Once per process: the registry refuses a name twice."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        os.makedirs(os.environ["PROMETHEUS_MULTIPROC_DIR"], exist_ok=True)

    def gauge(name: str, text: str, labels: tuple[str, ...] = _LABELS):
        return prometheus.Gauge(name, text, labels, multiprocess_mode="livemostrecent")

    return {
        "requests": prometheus.Counter(
            "kvxfer_pd_requests", "Requests of a prefiller that ended, by result", (*_LABELS, "result")
        ),
        "bytes": prometheus.Counter(
            "kvxfer_pd_bytes", "Bytes of chunks that a prefiller wrote, by transport", (*_LABELS, "transport")
        ),
        "present": prometheus.Counter(
            "kvxfer_pd_present_chunks", "Chunks that the decoder had already and that were not sent again", _LABELS
        ),
        "seconds": prometheus.Histogram(
            "kvxfer_pd_seconds",
            "From a request's first chunk to the decoder's word that all is there",
            _LABELS,
            buckets=_BUCKETS,
        ),
        "queued": prometheus.Histogram(
            "kvxfer_pd_admission_seconds", "Wait for pages at the decoder", _LABELS, buckets=_BUCKETS
        ),
        "received": prometheus.Counter(
            "kvxfer_pd_received_requests",
            "Requests that arrived at a decoder, or will not, by result",
            (*_LABELS, "result"),
        ),
        "lookups": prometheus.Counter(
            "kvxfer_pd_lookups", "Chunks looked up at a decoder, by result", (*_LABELS, "result")
        ),
        "loaded_chunks": prometheus.Counter(
            "kvxfer_pd_loaded_chunks", "Chunks that the decoder's engine took", _LABELS
        ),
        "loaded_bytes": prometheus.Counter("kvxfer_pd_loaded_bytes", "Bytes that the decoder's engine took", _LABELS),
        "pages": gauge("kvxfer_pool_pages", "Pages of a decoder's pool, by state", (*_LABELS, "state")),
        "queue": gauge("kvxfer_pool_queued_requests", "Requests that wait for pages"),
        "active": gauge("kvxfer_pool_active_requests", "Requests that are admitted and have not ended"),
    }


class PdMetrics:
    """The counters of one worker."""

    def __init__(self, config: Any, metadata: Any):
        families, labels = _families(), (str(metadata.model_name), str(config.tp_rank))
        # A family's metric with these labels; looking it up by its labels takes longer than counting.
        self._of = cache(lambda family, *more: families[family].labels(*labels, *more))

    def ended(self, event: Any) -> None:
        report = event.report
        result = "ok" if report is not None else event.failure.name
        self._of("requests", result).inc()
        if report is not None:
            self._of("bytes", report.transport).inc(report.bytes)
            self._of("present").inc(report.present)
            self._of("seconds").observe(event.took_seconds)
            self._of("queued").observe(report.queued_seconds)

    def received(self, event: Any) -> None:
        from kvxfer._native import ffi, lib

        result = "ok" if event.ready else ffi.string(lib.kvxfer_result_name(event.code)).decode()
        self._of("received", result).inc()

    def looked_up(self, found: bool) -> None:
        self._of("lookups", "hit" if found else "miss").inc()

    def loaded(self, length: int) -> None:
        self._of("loaded_chunks").inc()
        self._of("loaded_bytes").inc(length)

    def update(self, stats: Any) -> None:
        """The pool's pages; None on a prefiller."""
        if stats is None:
            return
        for state in _STATES:
            value = stats.free_pages if state == "free" else getattr(stats, state)
            self._of("pages", state).set(value)
        self._of("queue").set(stats.queued)
        self._of("active").set(stats.active)
