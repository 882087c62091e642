//! Medians and quantiles of what was measured.

use hdrhistogram::Histogram;
use std::time::Duration;

/// The middle value (the mean of the two middle ones for an even count); zero for none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Durations, kept to three significant digits.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    /// Empty. Durations above a minute count as a minute.
    pub(crate) fn new() -> Self {
        Self(
            Histogram::new_with_bounds(1, 60_000_000_000, 3)
                .unwrap_or_else(|_| unreachable!("constant bounds")),
        )
    }

    /// Adds one.
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1));
    }

    /// The quantile in microseconds; `None` when nothing was recorded.
    pub(crate) fn micros(&self, quantile: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(quantile) as f64 / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middle_values() {
        let same = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} instead of {b}");
        same(median(&[]), 0.0);
        same(median(&[3.0, 1.0, 2.0]), 2.0);
        same(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        let mut l = Latencies::new();
        assert!(l.micros(0.5).is_none());
        for us in 1..=100 {
            l.add(Duration::from_micros(us));
        }
        let p50 = l.micros(0.5).unwrap();
        assert!((49.5..=50.6).contains(&p50), "{p50}");
        assert!(l.micros(0.99).unwrap() >= 98.5);
    }
}
