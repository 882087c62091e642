//! Counters and histograms per peer and transport, as Prometheus text.
