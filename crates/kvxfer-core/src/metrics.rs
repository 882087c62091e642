//! What an agent counts, as a Prometheus registry of its own.
//!
//! Per peer and transport: bytes, transfers, latency, failures by code; per pool: pages by state and the queue. Handles
//! are looked up once per connection, so counting a transfer is a few atomic additions. Series of peers that are gone
//! stay for [`KEEP_GONE`] and then go, and no more than [`MAX_GONE`] of them are kept: cardinality is bounded.

use crate::channel::PoolStats;
use crate::transport::{Op, TransportKind};
use kvxfer_proto::{AgentName, ErrorCode};
use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long the series of a peer that is gone are kept.
pub const KEEP_GONE: Duration = Duration::from_secs(300);
/// Most peers that are gone and still shown.
pub const MAX_GONE: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    peer: String,
    transport: &'static str,
    op: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    peer: String,
    transport: &'static str,
    op: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    peer: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PageLabels {
    pool: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    pool: String,
}

type MakeHistogram = fn() -> Histogram;

/// An agent's metrics.
pub(crate) struct Metrics {
    registry: Registry,
    bytes: Family<PathLabels, Counter>,
    transfers: Family<PathLabels, Counter>,
    seconds: Family<PathLabels, Histogram, MakeHistogram>,
    failures: Family<FailureLabels, Counter>,
    notifications: Family<DirectionLabels, Counter>,
    peers_up: Gauge,
    connects: Family<PeerLabels, Counter>,
    refused: Counter,
    pages: Family<PageLabels, Gauge>,
    queue: Family<PoolLabels, Gauge>,
    active: Family<PoolLabels, Gauge>,
    gone: Mutex<VecDeque<(Instant, AgentName)>>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let seconds: MakeHistogram = || Histogram::new(exponential_buckets(1e-6, 4.0, 14));
        let mut m = Self {
            registry: Registry::with_prefix("kvxfer"),
            bytes: Family::default(),
            transfers: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            failures: Family::default(),
            notifications: Family::default(),
            peers_up: Gauge::default(),
            connects: Family::default(),
            refused: Counter::default(),
            pages: Family::default(),
            queue: Family::default(),
            active: Family::default(),
            gone: Mutex::default(),
        };
        let r = &mut m.registry;
        r.register_with_unit("transfer", "Bytes moved", Unit::Bytes, m.bytes.clone());
        r.register("transfers", "Transfers that ended", m.transfers.clone());
        r.register_with_unit("transfer_duration", "Submission to end", Unit::Seconds, m.seconds.clone());
        r.register("transfer_failures", "Transfers that failed, by code", m.failures.clone());
        r.register("notifications", "Notifications", m.notifications.clone());
        r.register("peers_up", "Peers connected now", m.peers_up.clone());
        r.register(
            "peer_connects",
            "Connections that came up; more than one is a reconnect",
            m.connects.clone(),
        );
        r.register("handshakes_refused", "Incoming connections that were refused", m.refused.clone());
        r.register("pool_pages", "Pages of a pool by state", m.pages.clone());
        r.register("pool_queue_length", "Requests that wait for pages", m.queue.clone());
        r.register("pool_active_requests", "Requests admitted and not ended", m.active.clone());
        m
    }

    /// Prometheus text.
    pub(crate) fn text(&self) -> String {
        self.forget_gone(Instant::now());
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }

    /// The handles of one peer on one transport.
    pub(crate) fn path(&self, peer: &AgentName, transport: TransportKind) -> PathMetrics {
        let one = |op: Op| {
            let labels = PathLabels { peer: peer.to_string(), transport: transport.as_str(), op: name(op) };
            OpMetrics {
                bytes: self.bytes.get_or_create_owned(&labels),
                transfers: self.transfers.get_or_create_owned(&labels),
                seconds: self.seconds.get_or_create_owned(&labels),
                failures: self.failures.clone(),
                labels,
                total: OpTotals::default(),
            }
        };
        PathMetrics { write: one(Op::Write), read: one(Op::Read) }
    }

    pub(crate) fn notifications(&self, peer: &AgentName) -> (Counter, Counter) {
        let one = |direction| {
            self.notifications.get_or_create_owned(&DirectionLabels { peer: peer.to_string(), direction })
        };
        (one("sent"), one("received"))
    }

    pub(crate) fn peer_up(&self, peer: &AgentName) {
        self.peers_up.inc();
        self.connects.get_or_create(&PeerLabels { peer: peer.to_string() }).inc();
        self.gone.lock().retain(|(_, name)| name != peer);
    }

    pub(crate) fn peer_gone(&self, peer: &AgentName) {
        self.peers_up.dec();
        let mut gone = self.gone.lock();
        gone.retain(|(_, name)| name != peer);
        gone.push_back((Instant::now(), peer.clone()));
        drop(gone);
        self.forget_gone(Instant::now());
    }

    pub(crate) fn refused(&self) {
        self.refused.inc();
    }

    fn forget_gone(&self, now: Instant) {
        loop {
            let name = {
                let mut gone = self.gone.lock();
                match gone.front() {
                    Some((since, _)) if gone.len() > MAX_GONE || now.duration_since(*since) > KEEP_GONE => {
                        gone.pop_front().map(|(_, name)| name)
                    }
                    _ => return,
                }
            };
            let Some(name) = name else { return };
            let peer = name.to_string();
            for transport in TransportKind::ALL {
                for op in [Op::Write, Op::Read] {
                    let labels =
                        PathLabels { peer: peer.clone(), transport: transport.as_str(), op: self::name(op) };
                    self.bytes.remove(&labels);
                    self.transfers.remove(&labels);
                    self.seconds.remove(&labels);
                    for code in ErrorCode::ALL {
                        self.failures.remove(&FailureLabels {
                            peer: peer.clone(),
                            transport: transport.as_str(),
                            op: self::name(op),
                            code: code.as_str(),
                        });
                    }
                }
            }
            for direction in ["sent", "received"] {
                self.notifications.remove(&DirectionLabels { peer: peer.clone(), direction });
            }
            self.connects.remove(&PeerLabels { peer });
        }
    }

    /// The gauges of one pool, for its channel to set.
    pub(crate) fn pool(&self, pool: &str) -> PoolGauges {
        PoolGauges {
            pool: pool.to_owned(),
            pages: self.pages.clone(),
            queue: self.queue.clone(),
            active: self.active.clone(),
        }
    }
}

/// The gauges of one pool; its series go when this is dropped.
pub(crate) struct PoolGauges {
    pool: String,
    pages: Family<PageLabels, Gauge>,
    queue: Family<PoolLabels, Gauge>,
    active: Family<PoolLabels, Gauge>,
}

impl PoolGauges {
    /// Shows the pool as it is now.
    pub(crate) fn set(&self, s: &PoolStats) {
        for (state, pages) in self.states(s) {
            self.pages.get_or_create(&self.labels(state)).set(i64::from(pages));
        }
        let labels = PoolLabels { pool: self.pool.clone() };
        self.queue.get_or_create(&labels).set(i64::from(s.queued));
        self.active.get_or_create(&labels).set(i64::from(s.active));
    }

    #[expect(clippy::unused_self, reason = "keeps the list beside the labels it is used with")]
    fn states(&self, s: &PoolStats) -> [(&'static str, u32); 6] {
        [
            ("free", s.free),
            ("writing", s.writing),
            ("advanced", s.advanced),
            ("published", s.published),
            ("pinned", s.pinned),
            ("quarantined", s.quarantined),
        ]
    }

    fn labels(&self, state: &'static str) -> PageLabels {
        PageLabels { pool: self.pool.clone(), state }
    }
}

impl Drop for PoolGauges {
    fn drop(&mut self) {
        for (state, _) in self.states(&PoolStats::default()) {
            self.pages.remove(&self.labels(state));
        }
        let labels = PoolLabels { pool: self.pool.clone() };
        self.queue.remove(&labels);
        self.active.remove(&labels);
    }
}

fn name(op: Op) -> &'static str {
    match op {
        Op::Write => "write",
        Op::Read => "read",
    }
}

/// Handles of one peer on one transport.
pub(crate) struct PathMetrics {
    write: OpMetrics,
    read: OpMetrics,
}

struct OpMetrics {
    bytes: Counter,
    transfers: Counter,
    seconds: Histogram,
    failures: Family<FailureLabels, Counter>,
    labels: PathLabels,
    total: OpTotals,
}

#[derive(Default)]
struct OpTotals {
    bytes: AtomicU64,
    transfers: AtomicU64,
    failed: AtomicU64,
    busy_ns: AtomicU64,
}

impl PathMetrics {
    /// A transfer has ended.
    pub(crate) fn ended(&self, op: Op, bytes: u64, took: Duration, error: Option<ErrorCode>) {
        let m = match op {
            Op::Write => &self.write,
            Op::Read => &self.read,
        };
        m.bytes.inc_by(bytes);
        m.transfers.inc();
        m.seconds.observe(took.as_secs_f64());
        m.total.bytes.fetch_add(bytes, Ordering::Relaxed);
        m.total.transfers.fetch_add(1, Ordering::Relaxed);
        m.total.busy_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        if let Some(code) = error {
            m.total.failed.fetch_add(1, Ordering::Relaxed);
            m.failures
                .get_or_create(&FailureLabels {
                    peer: m.labels.peer.clone(),
                    transport: m.labels.transport,
                    op: m.labels.op,
                    code: code.as_str(),
                })
                .inc();
        }
    }

    /// What this path has carried since the connection came up.
    pub(crate) fn stats(&self, transport: TransportKind) -> PathStats {
        let of = |m: &OpMetrics| OpStats {
            bytes: m.total.bytes.load(Ordering::Relaxed),
            transfers: m.total.transfers.load(Ordering::Relaxed),
            failed: m.total.failed.load(Ordering::Relaxed),
            busy: Duration::from_nanos(m.total.busy_ns.load(Ordering::Relaxed)),
        };
        PathStats { transport, write: of(&self.write), read: of(&self.read) }
    }
}

/// What one transport has carried between this agent and one peer (Contract line 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathStats {
    /// The transport.
    pub transport: TransportKind,
    /// To the peer.
    pub write: OpStats,
    /// From the peer.
    pub read: OpStats,
}

/// One direction of a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Bytes moved.
    pub bytes: u64,
    /// Transfers that ended, failed ones included.
    pub transfers: u64,
    /// Transfers that failed.
    pub failed: u64,
    /// Sum of the transfers' durations; those that overlapped count twice.
    pub busy: Duration,
}

impl OpStats {
    /// Mean rate of the transfers, in bytes per second; zero when nothing was moved.
    pub fn rate(&self) -> f64 {
        if self.busy.is_zero() { 0.0 } else { self.bytes as f64 / self.busy.as_secs_f64() }
    }
}

/// A shared handle for the parts that count.
pub(crate) type SharedMetrics = Arc<Metrics>;

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(i: usize) -> AgentName {
        AgentName::new(format!("peer-{i}")).unwrap()
    }

    #[test]
    fn transfers_are_counted_by_peer_transport_and_code() {
        let m = Metrics::new();
        m.peer_up(&peer(1));
        let path = m.path(&peer(1), TransportKind::Shm);
        path.ended(Op::Write, 4096, Duration::from_micros(3), None);
        path.ended(Op::Write, 0, Duration::from_micros(3), Some(ErrorCode::TimedOut));
        let text = m.text();
        for line in [
            r#"kvxfer_transfer_bytes_total{peer="peer-1",transport="shm",op="write"} 4096"#,
            r#"kvxfer_transfers_total{peer="peer-1",transport="shm",op="write"} 2"#,
            r#"kvxfer_transfer_failures_total{peer="peer-1",transport="shm",op="write",code="timed_out"} 1"#,
            r#"kvxfer_transfer_duration_seconds_count{peer="peer-1",transport="shm",op="write"} 2"#,
            "kvxfer_peers_up 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert_eq!(path.stats(TransportKind::Shm).write.bytes, 4096);
        assert_eq!(path.stats(TransportKind::Shm).write.failed, 1);
    }

    #[test]
    fn cardinality_stays_bounded_over_many_peers() {
        let m = Metrics::new();
        for i in 0..3 * MAX_GONE {
            m.peer_up(&peer(i));
            m.path(&peer(i), TransportKind::Tcp).ended(
                Op::Read,
                1,
                Duration::from_micros(1),
                Some(ErrorCode::PeerGone),
            );
            m.peer_gone(&peer(i));
        }
        let series = |name: &str| m.text().lines().filter(|l| l.starts_with(name)).count();
        assert_eq!(series("kvxfer_transfer_bytes_total{"), 2 * MAX_GONE);
        assert_eq!(series("kvxfer_transfer_failures_total{"), MAX_GONE);
        m.forget_gone(Instant::now() + 2 * KEEP_GONE);
        for name in
            ["kvxfer_transfer_bytes_total{", "kvxfer_transfer_failures_total{", "kvxfer_peer_connects_total{"]
        {
            assert_eq!(series(name), 0, "{name}");
        }
        assert!(m.text().contains("kvxfer_peers_up 0"));
    }

    #[test]
    fn a_pool_is_shown_and_goes() {
        let m = Metrics::new();
        let g = m.pool("kv");
        g.set(&PoolStats { pages: 8, free: 5, writing: 3, queued: 2, ..PoolStats::default() });
        let text = m.text();
        assert!(text.contains(r#"kvxfer_pool_pages{pool="kv",state="free"} 5"#), "{text}");
        assert!(text.contains(r#"kvxfer_pool_queue_length{pool="kv"} 2"#), "{text}");
        drop(g);
        assert!(!m.text().contains("kv\""));
    }
}
