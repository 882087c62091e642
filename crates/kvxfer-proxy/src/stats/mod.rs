//! What the proxy remembers of its requests: how long each prefiller takes to the first token, how the time of a
//! request divides into phases, and which requests are under way.
//!
//! [`Stats`] holds it all and is shared by every request; time is an argument. [`Timeline`] belongs to one request and
//! is written to its access log and its `x-kvxfer-timing` header. [`Stats::report`] gives the table that the guides
//! show in `proxy.log`, [`Stats::snapshot`] the body of `/stats`, which the dashboard draws.

mod board;
#[cfg(test)]
mod tests;
mod timeline;
mod ttft;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvxfer_proto::Time;
use parking_lot::Mutex;
use serde::Serialize;

pub use board::{Board, Row};
pub use timeline::{Mark, PHASES, TIMING_HEADER, Timeline};
pub use ttft::{Quantiles, Ttft};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The client got its answer.
    Ok,
    /// The request itself was at fault (4xx).
    Refused,
    /// Too much to do (503 with `Retry-After`).
    Busy,
    /// An engine or the proxy failed (5xx, or an error inside a stream).
    Failed,
    /// The client went away.
    Cancelled,
}

impl Outcome {
    /// All of them, in the order of `Totals`.
    pub const ALL: [Self; 5] = [Self::Ok, Self::Refused, Self::Busy, Self::Failed, Self::Cancelled];

    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Busy => "busy",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The outcome that a status stands for.
    pub fn of_status(status: u16) -> Self {
        match status {
            503 => Self::Busy,
            500.. => Self::Failed,
            400.. => Self::Refused,
            _ => Self::Ok,
        }
    }
}

/// Everything the proxy remembers. Cheap to share; every method takes `&self`.
#[derive(Debug)]
pub struct Stats {
    started: Time,
    interval: Duration,
    outcomes: [AtomicU64; 5],
    output_tokens: AtomicU64,
    board: Board,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Prefillers by name, in the order they first answered.
    prefillers: Vec<(String, Ttft)>,
    phases: BTreeMap<&'static str, Ttft>,
    last_report: Option<Time>,
    /// Prefills counted at the last report.
    reported: u64,
}

impl Stats {
    /// Statistics from `now` on. Reports come at most once per `interval`; the guides' proxy takes 5 seconds.
    pub fn new(now: Time, interval: Duration) -> Self {
        Self {
            started: now,
            interval,
            outcomes: Default::default(),
            output_tokens: AtomicU64::new(0),
            board: Board::default(),
            inner: Mutex::default(),
        }
    }

    /// The requests under way.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Names a prefiller before its first answer, so that it has its place in reports. Places follow the order of
    /// the calls: the first name is `Prefiller 1`.
    pub fn add_prefiller(&self, name: &str) {
        self.inner.lock().prefiller(name);
    }

    /// A prefiller has answered: `took` is the time from the client's request to the prefiller's answer.
    pub fn prefilled(&self, now: Time, prefiller: &str, took: Duration) {
        self.inner.lock().prefiller(prefiller).record(now, took);
    }

    /// A request has ended.
    pub fn finished(&self, now: Time, outcome: Outcome, timeline: &Timeline, output_tokens: u64) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
        self.output_tokens.fetch_add(output_tokens, Ordering::Relaxed);
        if outcome == Outcome::Ok {
            let mut inner = self.inner.lock();
            for (phase, took) in timeline.phases() {
                inner.phases.entry(phase).or_default().record(now, took);
            }
        }
    }

    /// The table for the log, when something has changed since the last one and the interval is over.
    pub fn report(&self, now: Time) -> Option<String> {
        let mut inner = self.inner.lock();
        let count = inner.count();
        let early = inner.last_report.is_some_and(|last| now.since(last) < self.interval);
        if early || count == inner.reported {
            return None;
        }
        inner.last_report = Some(now);
        inner.reported = count;
        Some(inner.table())
    }

    /// The table for the log, whatever has changed; for the end of the program. `None` when there was no prefill.
    pub fn last_report(&self) -> Option<String> {
        let inner = self.inner.lock();
        (inner.count() > 0).then(|| inner.table())
    }

    /// All of it as JSON. `router` adds what it knows at the top level (instances, queue); `unix_ms` is the time of
    /// day.
    pub fn snapshot(&self, now: Time, unix_ms: u64, router: &impl Serialize) -> Vec<u8> {
        let inner = self.inner.lock();
        let outcome = |outcome: Outcome| self.outcomes[outcome as usize].load(Ordering::Relaxed);
        let body = Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            unix_ms,
            uptime_s: now.since(self.started).as_secs(),
            requests: Outcome::ALL.iter().map(|o| (o.name(), outcome(*o))).collect(),
            output_tokens: self.output_tokens.load(Ordering::Relaxed),
            ttft: inner.prefillers.iter().map(|(name, ttft)| PrefillerStats::new(name, ttft, now)).collect(),
            phases: inner.phases.iter().map(|(name, ttft)| (*name, ttft.quantiles())).collect(),
            in_flight: self.board.rows(now),
            router,
        };
        serde_json::to_vec(&body).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}").into_bytes())
    }
}

impl Inner {
    fn prefiller(&mut self, name: &str) -> &mut Ttft {
        let at = self.prefillers.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            self.prefillers.push((name.to_owned(), Ttft::default()));
            self.prefillers.len() - 1
        });
        &mut self.prefillers[at].1
    }

    fn count(&self) -> u64 {
        self.prefillers.iter().map(|(_, ttft)| ttft.count()).sum()
    }

    /// The guides' table.
    fn table(&self) -> String {
        use std::fmt::Write as _;
        const RULE: &str = "===============================";
        let mut out = format!("{RULE}\nNum requests: {}\n", self.count());
        for (i, (_, ttft)) in self.prefillers.iter().enumerate() {
            let Some(q) = ttft.quantiles() else { continue };
            // Writing to a string cannot fail.
            let _ = write!(
                out,
                "Prefiller {} TTFT stats:\n - Average (ms): {:.1}\n - Median (ms): {:.1}\n - 99th Percentile (ms): {:.1}\n",
                i + 1,
                q.mean_ms,
                q.p50_ms,
                q.p99_ms
            );
        }
        out.push_str(RULE);
        out
    }
}

#[derive(Serialize)]
struct Snapshot<'a, R> {
    version: &'static str,
    unix_ms: u64,
    uptime_s: u64,
    requests: BTreeMap<&'static str, u64>,
    output_tokens: u64,
    ttft: Vec<PrefillerStats<'a>>,
    phases: BTreeMap<&'static str, Option<Quantiles>>,
    in_flight: Vec<board::RowView>,
    #[serde(flatten)]
    router: &'a R,
}

#[derive(Serialize)]
struct PrefillerStats<'a> {
    name: &'a str,
    #[serde(flatten)]
    quantiles: Option<Quantiles>,
    /// `[age in seconds, prefills, mean ms, worst ms]`, oldest first.
    recent: Vec<(u64, u64, f64, f64)>,
}

impl<'a> PrefillerStats<'a> {
    fn new(name: &'a str, ttft: &Ttft, now: Time) -> Self {
        Self { name, quantiles: ttft.quantiles(), recent: ttft.recent(now) }
    }
}
