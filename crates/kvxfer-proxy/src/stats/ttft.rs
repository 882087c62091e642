//! Durations of one kind: their exact mean, their percentiles, and the last minutes of them for a chart.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;
use kvxfer_proto::Time;
use serde::Serialize;

/// Seconds that one point of a chart stands for.
const STEP: u64 = 2;
/// Points kept: five minutes.
const POINTS: usize = 150;
/// The longest duration told apart from longer ones, in microseconds: an hour.
const LONGEST: u64 = 3_600_000_000;

/// What a distribution looks like, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// How many.
    pub count: u64,
    /// Exact mean.
    pub mean_ms: f64,
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// A collection of durations. Percentiles are right to three digits; a longer life takes no more memory.
#[derive(Debug)]
pub struct Ttft {
    histogram: Histogram<u32>,
    count: u64,
    total: Duration,
    points: VecDeque<Point>,
}

/// The durations recorded within [`STEP`] seconds.
#[derive(Debug)]
struct Point {
    step: u64,
    count: u64,
    total: Duration,
    worst: Duration,
}

impl Default for Ttft {
    fn default() -> Self {
        let histogram =
            Histogram::new_with_bounds(1, LONGEST, 3).expect("constant bounds that fit each other");
        Self { histogram, count: 0, total: Duration::ZERO, points: VecDeque::new() }
    }
}

impl Ttft {
    /// Adds a duration that ended at `now`.
    pub fn record(&mut self, now: Time, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.histogram.saturating_record(micros.clamp(1, LONGEST));
        self.count += 1;
        self.total += took;
        let step = step_of(now);
        match self.points.back_mut() {
            Some(point) if point.step == step => {
                point.count += 1;
                point.total += took;
                point.worst = point.worst.max(took);
            }
            _ => {
                if self.points.len() == POINTS {
                    self.points.pop_front();
                }
                self.points.push_back(Point { step, count: 1, total: took, worst: took });
            }
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The distribution; `None` while there is nothing.
    pub fn quantiles(&self) -> Option<Quantiles> {
        if self.count == 0 {
            return None;
        }
        let at = |quantile| self.histogram.value_at_quantile(quantile) as f64 / 1e3;
        Some(Quantiles {
            count: self.count,
            mean_ms: self.total.as_secs_f64() * 1e3 / self.count as f64,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: self.histogram.max() as f64 / 1e3,
        })
    }

    /// The last five minutes as `(age in seconds, how many, mean ms, worst ms)`, oldest first.
    pub fn recent(&self, now: Time) -> Vec<(u64, u64, f64, f64)> {
        let current = step_of(now);
        self.points
            .iter()
            .map(|point| (current.saturating_sub(point.step) * STEP, point))
            .filter(|(age, _)| *age < STEP * POINTS as u64)
            .map(|(age, point)| {
                let mean = point.total.as_secs_f64() * 1e3 / point.count as f64;
                (age, point.count, mean, point.worst.as_secs_f64() * 1e3)
            })
            .collect()
    }
}

fn step_of(now: Time) -> u64 {
    now.since(Time(0)).as_secs() / STEP
}
