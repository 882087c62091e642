//! Results: rates, ratios, bars, and how they are shown.

use crate::table::{Paint, Table, Tone, number, text};
use serde::Serialize;
use std::time::Duration;

/// Facts about the run.
#[derive(Serialize)]
pub(super) struct Header {
    pub kvxfer: String,
    pub driver: String,
    pub devices: [String; 2],
    pub one_device: bool,
    /// Under the tests' stand-in driver: nothing of it is a measurement.
    pub standin: bool,
    pub repetitions: u32,
    pub quick: bool,
    pub command: String,
}

#[derive(Serialize)]
pub(super) struct Run {
    pub header: Header,
    pub rows: Vec<Row>,
    pub notes: Vec<String>,
}

/// One subject.
#[derive(Serialize)]
pub(super) struct Row {
    what: String,
    bytes: u64,
    pieces: usize,
    /// Seconds: median, least, most; and the 99th percentile where there are many.
    median_s: f64,
    min_s: f64,
    max_s: f64,
    p99_s: Option<f64>,
    /// Of the submitting call, median, microseconds.
    submit_us: f64,
    gb_per_s: f64,
    against: Vec<Against>,
    bars: Vec<Judged>,
}

/// A baseline beside it.
#[derive(Serialize)]
pub(super) struct Against {
    name: &'static str,
    median_s: f64,
    /// Median of the pairwise ratios of rates, subject to baseline.
    ratio: f64,
}

/// What a row must reach.
pub(super) struct Bar {
    what: What,
    limit: f64,
}

enum What {
    Ratio(&'static str),
    Submit,
    Millis,
    Micros,
}

#[derive(Serialize)]
struct Judged {
    what: String,
    limit: f64,
    /// `None`: there was nothing to compare with.
    found: Option<f64>,
    met: Option<bool>,
}

impl Bar {
    pub(super) fn ratio(baseline: &'static str, limit: f64) -> Self {
        Self { what: What::Ratio(baseline), limit }
    }
    pub(super) fn submit(limit: f64) -> Self {
        Self { what: What::Submit, limit }
    }
    pub(super) fn millis(limit: f64) -> Self {
        Self { what: What::Millis, limit }
    }
    pub(super) fn micros(limit: f64) -> Self {
        Self { what: What::Micros, limit }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

impl Against {
    pub(super) fn new(name: &'static str, own: &[(Duration, Duration)], times: &[Duration]) -> Self {
        let mut ratios: Vec<_> =
            own.iter().zip(times).map(|((o, _), t)| t.as_secs_f64() / o.as_secs_f64()).collect();
        let mut times: Vec<_> = times.iter().map(Duration::as_secs_f64).collect();
        Self { name, median_s: median(&mut times), ratio: median(&mut ratios) }
    }
}

impl Row {
    pub(super) fn new(what: String, bytes: u64, pieces: usize, times: &[(Duration, Duration)]) -> Self {
        let mut own: Vec<_> = times.iter().map(|t| t.0.as_secs_f64()).collect();
        let median_s = median(&mut own);
        let at = |q: f64| own.get(((own.len() - 1) as f64 * q).round() as usize).copied();
        Self {
            what,
            bytes,
            pieces,
            median_s,
            min_s: at(0.0).unwrap_or(f64::NAN),
            max_s: at(1.0).unwrap_or(f64::NAN),
            p99_s: if own.len() >= 100 { at(0.99) } else { None },
            submit_us: median(&mut times.iter().map(|t| t.1.as_secs_f64() * 1e6).collect::<Vec<_>>()),
            gb_per_s: bytes as f64 / median_s / 1e9,
            against: Vec::new(),
            bars: Vec::new(),
        }
    }

    pub(super) fn against(self, against: Vec<Against>) -> Self {
        Self { against, ..self }
    }

    pub(super) fn bar(mut self, bar: &Bar) -> Self {
        let least = |found: Option<f64>, what: String| Judged {
            what,
            limit: bar.limit,
            found,
            met: found.map(|f| f >= bar.limit),
        };
        let most = |found: f64, what: &str| Judged {
            what: what.into(),
            limit: bar.limit,
            found: Some(found),
            met: Some(found <= bar.limit),
        };
        let judged = match bar.what {
            What::Ratio(name) => {
                let found = self.against.iter().find(|a| a.name == name).map(|a| a.ratio);
                least(found, format!("of {name}, at least"))
            }
            What::Submit => most(self.submit_us, "us to submit, at most"),
            What::Millis => most(self.median_s * 1e3, "ms, at most"),
            What::Micros => most(self.median_s * 1e6, "us, at most"),
        };
        self.bars.push(judged);
        self
    }

    fn time(&self) -> String {
        let us = self.median_s * 1e6;
        let median = if us < 1000.0 { format!("{us:.1} us") } else { format!("{:.2} ms", us / 1e3) };
        self.p99_s.map_or(median.clone(), |p| format!("{median} (p99 {:.1} us)", p * 1e6))
    }
}

impl Run {
    fn table(&self) -> Table {
        let mut table = Table::new(["subject", "pieces", "time", "GB/s", "submit", "beside", "bars"]);
        for row in &self.rows {
            let beside: Vec<_> =
                row.against.iter().map(|a| format!("{:.2} of {}", a.ratio, a.name)).collect();
            let bars: Vec<_> = row
                .bars
                .iter()
                .map(|b| {
                    let verdict = match b.met {
                        None => "not compared",
                        Some(_) if self.header.standin => "not judged",
                        Some(true) => "met",
                        Some(false) => "MISSED",
                    };
                    format!("{} {}: {verdict}", b.what, b.limit)
                })
                .collect();
            let missed = !self.header.standin && row.bars.iter().any(|b| b.met == Some(false));
            table.row([
                text(&row.what),
                number(row.pieces.to_string()),
                number(row.time()),
                number(format!("{:.2}", row.gb_per_s)),
                number(if row.submit_us > 0.0 { format!("{:.1} us", row.submit_us) } else { String::new() }),
                text(beside.join(", ")),
                text(bars.join("; ")).tone(if missed { Tone::Bad } else { Tone::Plain }),
            ]);
        }
        table
    }

    fn words(&self) -> String {
        let h = &self.header;
        let place = if h.one_device {
            format!("two processes on one {}", h.devices[0])
        } else {
            format!("{} to {}", h.devices[0], h.devices[1])
        };
        let mut out = format!(
            "kvxfer {} on {place}, driver of CUDA {}; medians of {} rounds, in turns\n",
            h.kvxfer, h.driver, h.repetitions
        );
        if h.standin {
            out.push_str(
                "This is the tests' stand-in driver over host memory: the figures say nothing about a GPU.\n",
            );
        }
        out
    }

    pub(super) fn terminal(&self) -> String {
        let table = self.table().render(Paint::stdout());
        format!("{}\n{table}{}\n", self.words(), self.notes.join("\n"))
    }

    pub(super) fn markdown(&self) -> String {
        format!("{}\n{}\n{}\n", self.words(), self.table().markdown(), self.notes.join("\n\n"))
    }
}
