//! A run as tables on the terminal or in Markdown.

use super::rows::{Bar, Row, Run};
use crate::table::{Paint, Table, Tone, number, text};
use crate::units::{micros, size};

/// For a terminal.
pub(crate) fn terminal(run: &Run) -> String {
    let paint = Paint::stdout();
    let mut out = String::new();
    for (title, table) in sections(run) {
        out += &(paint.paint(Tone::Strong, title) + "\n" + &table.render(paint) + "\n");
    }
    out.push_str(&notes(run));
    format!("{}\n\n{out}", headline(run))
}

/// For a document.
pub(crate) fn markdown(run: &Run) -> String {
    let mut out = format!("{}\n\n", headline(run));
    for (title, table) in sections(run) {
        out += &["### ", title, "\n\n", &table.markdown(), "\n"].concat();
    }
    out + &notes(run)
}

pub(super) fn headline(run: &Run) -> String {
    let h = &run.header;
    format!(
        "kvxfer {} on {} ({} cores, L3 {}), Linux {}{}, {}; working set {}, {} repetitions, {:.0} s: `{}`",
        h.kvxfer,
        h.machine.cpu,
        h.machine.cores,
        size(h.machine.l3_bytes),
        h.machine.kernel,
        h.nixl.as_ref().map(|v| format!(", NIXL {v}")).unwrap_or_default(),
        h.date,
        size(h.working_set_bytes),
        h.repetitions,
        h.seconds,
        h.command
    )
}

fn notes(run: &Run) -> String {
    run.notes.iter().flat_map(|n| ["note: ", n, "\n"]).collect()
}

fn sections(run: &Run) -> Vec<(&'static str, Table)> {
    let of = |what: &dyn Fn(&Row) -> bool| run.rows.iter().filter(|r| what(r)).cloned().collect::<Vec<_>>();
    let mut out = Vec::new();
    let throughput = of(&|r| r.source.is_some());
    if !throughput.is_empty() {
        out.push(("Throughput", throughput_table(&throughput)));
    }
    let latency = of(&|r| r.case.starts_with("latency."));
    if !latency.is_empty() {
        out.push(("64 bytes and a notification, one way", latency_table(&latency)));
    }
    let submit = of(&|r| r.case.starts_with("submit."));
    if !submit.is_empty() {
        out.push(("Submitting 16,384 descriptors", submit_table(&submit)));
    }
    let integrity = of(&|r| r.case.starts_with("integrity."));
    if !integrity.is_empty() {
        out.push(("Cost of checking, 32 MiB chunks from sender to receiver", integrity_table(&integrity)));
    }
    let bars: Vec<Bar> = run.bars.iter().filter(|b| b.measured.is_some()).cloned().collect();
    if !bars.is_empty() {
        out.push(("Bars", bars_table(&bars)));
    }
    out
}

fn value(v: Option<f64>, digits: usize) -> String {
    v.map_or("-".into(), |v| format!("{v:.digits$}"))
}

fn throughput_table(rows: &[Row]) -> Table {
    let mut t = Table::new([
        "transport",
        "op",
        "pieces",
        "order",
        "check",
        "GB/s",
        "baseline",
        "GB/s",
        "ratio",
        "one piece p50 us",
        "p99 us",
        "submit ns/desc",
    ]);
    for r in rows {
        let level = r.source.map_or("-", |c| super::cases::level_name(c.integrity));
        t.row([
            text(r.transport.clone()),
            text(r.op.clone()),
            number(size(r.piece_bytes)),
            text(r.pattern.clone()),
            text(level),
            number(value(r.gbps, 2)).tone(Tone::Strong),
            text(r.baseline.clone().unwrap_or("-".into())),
            number(value(r.baseline_gbps, 2)),
            number(value(r.ratio, 2)),
            number(r.p50_us.map_or("-".into(), micros)),
            number(r.p99_us.map_or("-".into(), micros)),
            number(value(r.submit_ns_per_desc, 1)),
        ]);
    }
    t
}

fn latency_table(rows: &[Row]) -> Table {
    let mut t = Table::new(["transport", "what", "how", "p50 us", "p99 us", "baseline", "ratio"]);
    for r in rows {
        t.row([
            text(r.transport.clone()),
            text(r.op.clone()),
            text(r.pattern.clone()),
            number(r.p50_us.map_or("-".into(), micros)),
            number(r.p99_us.map_or("-".into(), micros)),
            text(r.baseline.clone().unwrap_or("-".into())),
            number(value(r.ratio, 2)),
        ]);
    }
    t
}

fn submit_table(rows: &[Row]) -> Table {
    let mut t =
        Table::new(["transport", "pieces", "ns per descriptor", "call p50 us", "whole transfer GB/s"]);
    for r in rows {
        t.row([
            text(r.transport.clone()),
            number(size(r.piece_bytes)),
            number(value(r.submit_ns_per_desc, 1)),
            number(r.p50_us.map_or("-".into(), micros)),
            number(value(r.gbps, 2)),
        ]);
    }
    t
}

fn integrity_table(rows: &[Row]) -> Table {
    let mut t = Table::new(["transport", "level", "GB/s", "cost"]);
    for r in rows {
        t.row([
            text(r.transport.clone()),
            text(r.case.rsplit('.').next().unwrap_or("-")),
            number(value(r.gbps, 2)),
            number(r.ratio.map_or("-".into(), |x| format!("{:.1} %", (1.0 - x) * 100.0))),
        ]);
    }
    t
}

fn bars_table(bars: &[Bar]) -> Table {
    let mut t = Table::new(["bar", "required", "measured", "", "worst case"]);
    for b in bars {
        let (mark, tone) = match b.pass {
            Some(true) => ("PASS", Tone::Good),
            Some(false) => ("short", Tone::Bad),
            None => ("-", Tone::Dim),
        };
        t.row([
            text(b.name.clone()),
            number(b.required.clone()),
            number(b.measured.map_or("-".into(), |v| format!("{v:.2}{}", b.unit))),
            text(mark).tone(tone),
            text(b.note.clone()).tone(Tone::Dim),
        ]);
    }
    t
}
