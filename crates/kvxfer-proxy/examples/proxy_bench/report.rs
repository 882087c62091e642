//! The figures, as a table and as JSON, with the bars next to them.

use std::fmt;
use std::time::Duration;

use serde_json::json;

use crate::Options;

/// Bars of the project: see docs/performance.md.
const RATIO: f64 = 8.0;
const ADDED_P50: f64 = 0.5;
const ADDED_P99: f64 = 3.0;
const BYTES_EACH: u64 = 64 << 10;
const IDLE: f64 = 0.005;

pub(crate) struct Report {
    setting: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) streams: Option<Streams>,
    pub(crate) their_streams: Option<Streams>,
}

/// One kind of request.
pub(crate) struct Row {
    name: &'static str,
    pub(crate) ours: Throughput,
    pub(crate) theirs: Option<Throughput>,
    pub(crate) added: Option<Added>,
    pub(crate) theirs_added: Option<Added>,
}

/// Good answers, and what they took.
#[derive(Clone, Copy, Default)]
pub(crate) struct Throughput {
    pub(crate) requests: usize,
    pub(crate) took: Duration,
    /// Processor time of the proxy.
    pub(crate) cpu: Duration,
}

impl Throughput {
    pub(crate) fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.took += other.took;
        self.cpu += other.cpu;
    }

    /// Requests a second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.took.as_secs_f64()
    }

    /// Cores used.
    fn core(&self) -> f64 {
        self.cpu.as_secs_f64() / self.took.as_secs_f64()
    }

    /// Processor time of a request, in milliseconds.
    fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e3 / self.requests as f64
    }
}

/// Times of many requests, in order of length.
pub(crate) struct Times(Vec<Duration>);

/// What a proxy adds, in milliseconds.
#[derive(Clone, Copy)]
pub(crate) struct Added {
    p50: f64,
    p99: f64,
}

pub(crate) struct Streams {
    pub(crate) number: usize,
    pub(crate) errors: usize,
    pub(crate) example: Option<String>,
    pub(crate) bytes_each: u64,
    pub(crate) idle_core: f64,
}

impl Times {
    pub(crate) fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    fn at(&self, quantile: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0
            .get((last as f64 * quantile).round() as usize)
            .map_or(f64::NAN, |took| took.as_secs_f64() * 1e3)
    }

    /// Percentile by percentile, over the same calls made directly.
    pub(crate) fn added(&self, direct: &Self) -> Added {
        let added = |quantile| self.at(quantile) - direct.at(quantile);
        Added { p50: added(0.5), p99: added(0.99) }
    }
}

impl Row {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, ours: Throughput::default(), theirs: None, added: None, theirs_added: None }
    }

    fn ratio(&self) -> Option<f64> {
        self.theirs.map(|theirs| self.ours.rate() / theirs.rate())
    }
}

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        let setting = format!(
            "{} requests under way, prompts of {} tokens as text, answers of {} tokens; one core for the proxy, one for \
             the upstream and the load",
            options.concurrency, options.prompt_tokens, options.tokens
        );
        Self { setting, rows: Vec::new(), streams: None, their_streams: None }
    }

    /// What was measured against which bar, and whether it is met.
    fn bars(&self) -> Vec<(String, String, bool)> {
        let mut bars = Vec::new();
        for row in &self.rows {
            if let Some(ratio) = row.ratio() {
                bars.push((
                    format!("{}: {ratio:.1}x requests/s", row.name),
                    format!(">= {RATIO}x"),
                    ratio >= RATIO,
                ));
            }
            if let Some(Added { p50, p99 }) = row.added {
                bars.push((
                    format!("{}: adds {p50:.2} ms (median)", row.name),
                    format!("<= {ADDED_P50} ms"),
                    p50 <= ADDED_P50,
                ));
                bars.push((
                    format!("{}: adds {p99:.2} ms (99%)", row.name),
                    format!("<= {ADDED_P99} ms"),
                    p99 <= ADDED_P99,
                ));
            }
        }
        if let Some(streams) = &self.streams {
            let n = streams.number;
            bars.push((
                format!("{n} streams: {} errors, every token in order", streams.errors),
                "0".into(),
                streams.errors == 0,
            ));
            let kib = streams.bytes_each as f64 / 1024.0;
            bars.push((
                format!("{n} streams: {kib:.1} KiB each"),
                "<= 64 KiB".into(),
                streams.bytes_each <= BYTES_EACH,
            ));
            let idle = streams.idle_core;
            bars.push((format!("idle: {:.2} % of a core", idle * 100.0), "< 0.5 %".into(), idle < IDLE));
        }
        bars
    }

    pub(crate) fn all_met(&self) -> bool {
        self.bars().iter().all(|(_, _, met)| *met)
    }

    pub(crate) fn json(&self) -> String {
        let throughput = |t: &Throughput| json!({"requests_per_s": t.rate(), "core": t.core(), "cpu_ms_per_request": t.cost()});
        let added = |a: &Added| json!({"p50_ms": a.p50, "p99_ms": a.p99});
        let streams = |s: &Streams| json!({"streams": s.number, "errors": s.errors, "bytes_per_stream": s.bytes_each, "idle_core": s.idle_core});
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                json!({"requests": row.name, "ours": throughput(&row.ours), "python": row.theirs.as_ref().map(throughput),
                    "ratio": row.ratio(), "added": row.added.as_ref().map(added),
                    "python_added": row.theirs_added.as_ref().map(added)})
            })
            .collect();
        let bars: Vec<_> = self
            .bars()
            .into_iter()
            .map(|(what, bar, met)| json!({"what": what, "bar": bar, "met": met}))
            .collect();
        let body = json!({"setting": self.setting, "rows": rows, "streams": self.streams.as_ref().map(streams),
            "python_streams": self.their_streams.as_ref().map(streams), "bars": bars});
        format!("{body:#}\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.setting)?;
        writeln!(
            f,
            "| requests | proxy | requests/s | ratio | its core | CPU a request | adds, median | adds, 99% |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let ratio = row.ratio().map_or("–".into(), |ratio| format!("{ratio:.1}x"));
            line(f, row.name, "kvxfer", &row.ours, &ratio, row.added)?;
            if let Some(theirs) = &row.theirs {
                line(f, "", "Python", theirs, "1x", row.theirs_added)?;
            }
        }
        writeln!(
            f,
            "\n| streams at once | proxy | errors | memory each | idle, of a core |\n|---|---|---|---|---|"
        )?;
        for (name, streams) in [("kvxfer", &self.streams), ("Python", &self.their_streams)] {
            let Some(s) = streams else { continue };
            let kib = s.bytes_each as f64 / 1024.0;
            writeln!(
                f,
                "| {} | {name} | {} | {kib:.1} KiB | {:.2} % |",
                s.number,
                s.errors,
                s.idle_core * 100.0
            )?;
            if let Some(example) = &s.example {
                writeln!(f, "\n{name}, the first error: {example}\n")?;
            }
        }
        writeln!(f)?;
        for (what, bar, met) in self.bars() {
            writeln!(f, "{} {what} (bar: {bar})", if met { "met   " } else { "MISSED" })?;
        }
        Ok(())
    }
}

fn line(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    proxy: &str,
    throughput: &Throughput,
    ratio: &str,
    added: Option<Added>,
) -> fmt::Result {
    let (core, cost) = (throughput.core() * 100.0, throughput.cost());
    let (p50, p99) = added
        .map_or(("–".into(), "–".into()), |a| (format!("{:.2} ms", a.p50), format!("{:.2} ms", a.p99)));
    writeln!(
        f,
        "| {name} | {proxy} | {:.0} | {ratio} | {core:.0} % | {cost:.2} ms | {p50} | {p99} |",
        throughput.rate()
    )
}
