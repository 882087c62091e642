//! Where the time of one request went.

use std::fmt;
use std::time::Duration;

use kvxfer_proto::Time;

/// The header that carries a timeline, in the form of `Server-Timing`.
pub const TIMING_HEADER: &str = "x-kvxfer-timing";

/// The end of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// It got its turn.
    Admitted = 0,
    /// Its tokens are known, and so are its instances.
    Routed = 1,
    /// The prefiller has answered.
    Prefilled = 2,
    /// The decoder has the cache, or it was given up.
    KvReady = 3,
    /// The decoder's first token has arrived (all of them, when the answer is not streamed).
    FirstDecoded = 4,
    /// The answer is complete.
    Finished = 5,
}

/// Names of the phases that the marks end, in order; `total` follows them.
pub const PHASES: [&str; 6] = ["queue", "route", "prefill", "kv_wait", "first_decode", "rest"];

/// The moments of one request. Marks that never came leave their phase out; the first time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeline {
    start: Time,
    marks: [Option<Time>; PHASES.len()],
}

impl Timeline {
    /// A request that came in at `now`.
    pub fn new(now: Time) -> Self {
        Self { start: now, marks: [None; PHASES.len()] }
    }

    /// A phase has ended.
    pub fn mark(&mut self, mark: Mark, now: Time) {
        self.marks[mark as usize].get_or_insert(now);
    }

    /// When it came in.
    pub fn start(&self) -> Time {
        self.start
    }

    /// Time from the start to a mark.
    pub fn until(&self, mark: Mark) -> Option<Duration> {
        self.marks[mark as usize].map(|time| time.since(self.start))
    }

    /// The phases that took place with their lengths, then `total` once it is finished.
    pub fn phases(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let mut before = self.start;
        let total = self.until(Mark::Finished).map(|took| ("total", took));
        PHASES
            .into_iter()
            .zip(self.marks)
            .filter_map(move |(name, mark)| {
                let mark = mark?;
                let took = mark.since(before);
                before = before.max(mark);
                Some((name, took))
            })
            .chain(total)
    }

    /// The value of [`TIMING_HEADER`]: `queue;dur=0.1, prefill;dur=42.3`, in milliseconds. A stream's header goes out
    /// before its end, so it has the phases up to then.
    pub fn header(&self) -> String {
        let parts: Vec<String> =
            self.phases().map(|(name, took)| format!("{name};dur={:.3}", took.as_secs_f64() * 1e3)).collect();
        parts.join(", ")
    }
}

/// For the access log: `queue=0.1ms prefill=42.3ms … total=97.0ms`.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, took)) in self.phases().enumerate() {
            let gap = if i > 0 { " " } else { "" };
            write!(f, "{gap}{name}={:.1}ms", took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}
