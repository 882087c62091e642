//! What a run leaves behind: rows, the machine they were measured on, and the bars they are held against.

use super::cases::{Case, Pattern, op_name};
use crate::machine::Machine;
use kvxfer_core::{Integrity, TransportKind};
use serde::Serialize;

/// One line of the result; a field that does not apply is null.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub case: String,
    pub transport: String,
    pub op: String,
    pub pattern: String,
    pub piece_bytes: u64,
    pub total_bytes: u64,
    pub gbps: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub submit_ns_per_desc: Option<f64>,
    pub baseline: Option<String>,
    pub baseline_gbps: Option<f64>,
    pub ratio: Option<f64>,
    /// The case itself, where the row is one of the throughput table.
    #[serde(skip)]
    pub source: Option<Case>,
}

/// One of the project's bars with what was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Bar {
    #[serde(rename = "bar")]
    pub name: String,
    pub required: String,
    /// `None`: not measured in this run.
    pub measured: Option<f64>,
    pub unit: &'static str,
    pub pass: Option<bool>,
    pub note: String,
}

/// Where, when and how.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Header {
    pub kvxfer: String,
    pub machine: Machine,
    pub nixl: Option<String>,
    /// Unix time in seconds.
    pub unix_time: u64,
    pub date: String,
    pub command: String,
    pub working_set_bytes: u64,
    pub repetitions: u32,
    pub quick: bool,
    pub peer: String,
    pub paths: Vec<(TransportKind, String)>,
    pub seconds: f64,
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Run {
    pub header: Header,
    pub rows: Vec<Row>,
    pub bars: Vec<Bar>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
}

impl Row {
    /// Of a throughput case.
    pub(crate) fn of(case: Case, total: u64) -> Self {
        Self {
            case: case.name(),
            transport: case.kind.to_string(),
            op: op_name(case.op).into(),
            pattern: case.pattern.as_str().into(),
            piece_bytes: case.piece,
            total_bytes: total,
            source: Some(case),
            ..Self::named(String::new(), case.kind)
        }
    }

    /// Of something else.
    pub(crate) fn named(case: String, kind: TransportKind) -> Self {
        Self {
            case,
            transport: kind.to_string(),
            op: "-".into(),
            pattern: "-".into(),
            piece_bytes: 0,
            total_bytes: 0,
            gbps: None,
            p50_us: None,
            p99_us: None,
            submit_ns_per_desc: None,
            baseline: None,
            baseline_gbps: None,
            ratio: None,
            source: None,
        }
    }
}

/// The lowest (or highest) of the values that belong to a bar.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Worst {
    Lowest,
    Highest,
}

/// The table of bars over these rows.
pub(crate) fn bars(rows: &[Row]) -> Vec<Bar> {
    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;
    use TransportKind::{Cma, Nixl, Shm, Tcp};
    let case = |r: &Row| r.source;
    let ratio = |r: &Row| r.ratio;
    let of = |kind, level, baseline: &'static str, fits: fn(&Case) -> bool| {
        move |r: &Row| {
            case(r).is_some_and(|c| c.kind == kind && c.integrity == level && fits(&c))
                && r.baseline.as_deref() == Some(baseline)
        }
    };
    let named = |name: &'static str| move |r: &Row| r.case == name;
    let mut out = Vec::new();
    let mut bar = |text: &str, worst, limit: f64, unit, found: Vec<(f64, String)>| {
        let pick =
            found.into_iter().reduce(|a, b| if (a.0 < b.0) == (worst == Worst::Lowest) { a } else { b });
        let pass = pick.as_ref().map(|(v, _)| if worst == Worst::Lowest { *v >= limit } else { *v <= limit });
        let sign = if worst == Worst::Lowest { ">=" } else { "<=" };
        out.push(Bar {
            name: text.into(),
            required: format!("{sign} {limit}{unit}"),
            measured: pick.as_ref().map(|(v, _)| *v),
            unit,
            pass,
            note: pick.map(|(_, n)| n).unwrap_or_default(),
        });
    };
    let pick = |fits: &dyn Fn(&Row) -> bool, value: &dyn Fn(&Row) -> Option<f64>| -> Vec<(f64, String)> {
        rows.iter().filter(|r| fits(r)).filter_map(|r| Some((value(r)?, r.case.clone()))).collect()
    };
    let (low, high) = (Worst::Lowest, Worst::Highest);

    let f = of(Shm, Integrity::Bound, "memcpy", |c| c.piece >= 64 * K);
    bar("shm against one-thread memcpy, pieces of 64 KiB and more", low, 0.95, "x", pick(&f, &ratio));
    let f = of(Shm, Integrity::Bound, "memcpy", |c| c.piece == 16 * K && c.pattern == Pattern::Random);
    bar("shm against one-thread memcpy, 16 KiB random", low, 0.90, "x", pick(&f, &ratio));
    let f = of(Shm, Integrity::Bound, "nixl", |c| c.piece == 16 * K && c.pattern == Pattern::Random);
    bar("shm against NIXL, 16 KiB random", low, 2.2, "x", pick(&f, &ratio));
    let f = of(Shm, Integrity::Bound, "nixl", |c| c.piece == M);
    bar("shm against NIXL, 1 MiB", low, 1.3, "x", pick(&f, &ratio));
    let f = of(Cma, Integrity::Bound, "process_vm", |_| true);
    bar("cma against raw process_vm_writev/readv", low, 0.95, "x", pick(&f, &ratio));
    let cost = |r: &Row| r.ratio.map(|x| (1.0 - x) * 100.0);
    bar("cost of integrity bound on shm", high, 2.0, " %", pick(&named("integrity.shm.bound"), &cost));
    bar("cost of integrity full on shm", high, 40.0, " %", pick(&named("integrity.shm.full"), &cost));
    bar("cost of integrity full on tcp", high, 10.0, " %", pick(&named("integrity.tcp.full"), &cost));
    let f = of(Tcp, Integrity::Off, "sockets", |c| c.piece >= M);
    bar("tcp against raw sockets, 1 MiB and more, integrity off", low, 0.90, "x", pick(&f, &ratio));
    let f = of(Tcp, Integrity::Full, "sockets", |c| c.piece >= M);
    bar("tcp against raw sockets, 1 MiB and more, integrity full", low, 0.90, "x", pick(&f, &ratio));
    let f = of(Tcp, Integrity::Off, "sockets", |c| c.piece == 16 * K && c.pattern == Pattern::Random);
    bar("tcp against raw sockets, 16 KiB random, integrity off", low, 0.60, "x", pick(&f, &ratio));
    let f = of(Tcp, Integrity::Full, "sockets", |c| c.piece == 16 * K && c.pattern == Pattern::Random);
    bar("tcp against raw sockets, 16 KiB random, integrity full", low, 0.60, "x", pick(&f, &ratio));
    let p50 = |r: &Row| r.p50_us;
    bar(
        "64 B write + notification on shm, receiver polls, p50",
        high,
        15.0,
        " us",
        pick(&named("latency.shm.poll"), &p50),
    );
    bar(
        "64 B write + notification on shm, receiver blocks, p50",
        high,
        60.0,
        " us",
        pick(&named("latency.shm.block"), &p50),
    );
    let ns = |r: &Row| r.submit_ns_per_desc;
    let f = |r: &Row| r.case.starts_with("submit.");
    bar("submit, per descriptor of 16,384", high, 500.0, " ns", pick(&f, &ns));
    let idle = |r: &Row| r.ratio.map(|x| x * 100.0);
    bar("idle agent, share of a core", high, 0.5, " %", pick(&named("idle.connected"), &idle));
    let f = of(Nixl, Integrity::Off, "nixl", |_| true);
    bar("nixl against the bare library", low, 0.97, "x", pick(&f, &ratio));
    bar(
        "nixl 64 B write against the bare library",
        high,
        1.2,
        "x",
        pick(&named("latency.nixl.write64"), &ratio),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvxfer_core::Op;

    fn shm(piece: u64, ratio: f64) -> Row {
        let case = Case {
            kind: TransportKind::Shm,
            op: Op::Write,
            piece,
            pattern: Pattern::Random,
            integrity: Integrity::Bound,
        };
        Row { baseline: Some("memcpy".into()), ratio: Some(ratio), ..Row::of(case, 1 << 28) }
    }

    #[test]
    fn a_bar_takes_its_worst_row_and_unmeasured_ones_stay_open() {
        let rows = [shm(1 << 16, 1.2), shm(1 << 20, 0.94), shm(1 << 14, 0.91)];
        let bars = bars(&rows);
        assert_eq!((bars[0].measured, bars[0].pass), (Some(0.94), Some(false)), "{:?}", bars[0]);
        assert!(bars[0].note.contains("1MiB"), "{:?}", bars[0]);
        assert_eq!((bars[1].measured, bars[1].pass), (Some(0.91), Some(true)));
        assert!(bars[2..].iter().all(|b| b.pass.is_none()));
    }

    #[test]
    fn rows_have_exactly_the_fields_readers_rely_on() {
        let value = serde_json::to_value(shm(4096, 1.0)).expect("json");
        let mut keys: Vec<&str> = value.as_object().expect("object").keys().map(String::as_str).collect();
        keys.sort_unstable();
        let mut want = vec![
            "case",
            "transport",
            "op",
            "pattern",
            "piece_bytes",
            "total_bytes",
            "gbps",
            "p50_us",
            "p99_us",
            "submit_ns_per_desc",
            "baseline",
            "baseline_gbps",
            "ratio",
        ];
        want.sort_unstable();
        assert_eq!(keys, want);
    }
}
