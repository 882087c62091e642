//! A run as one self-contained page: no scripts, nothing loaded from elsewhere, light and dark.

use super::charts;
use super::rows::{Bar, Row, Run};
use crate::Failure;
use crate::units::{micros, size};
use std::fmt::Write;

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2430;--soft:#5b6675;--grid:#d9dee5;--card:#f6f8fa;--good:#14713d;--bad:#b42318;
--s0:#0b62d6;--s1:#b25000;--s2:#147a4b;--s3:#8a3ffc;--s4:#c2187a;--s5:#5b6675;--s6:#8c6d1f;--s7:#12767e}
@media(prefers-color-scheme:dark){:root{--bg:#11161d;--ink:#e4e9f0;--soft:#9aa7b8;--grid:#2e3947;--card:#19212b;--good:#5fd08d;--bad:#ff8a7d;
--s0:#6ea8ff;--s1:#ffa657;--s2:#56d391;--s3:#c59bff;--s4:#ff85c0;--s5:#a9b4c2;--s6:#dcb95b;--s7:#62d2dc}}
*{box-sizing:border-box}body{margin:0 auto;max-width:76rem;padding:1.5rem;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}p{margin:.3rem 0}.soft{color:var(--soft)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(30rem,100%),1fr))}figure{margin:0;padding:.75rem;background:var(--card);border-radius:8px}
figcaption{font-weight:600}figure svg{width:100%;height:auto;display:block}.legend{font-size:13px;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.legend span::before{content:'';display:inline-block;width:1.4rem;margin-right:.35rem;vertical-align:middle;border-top:3px solid var(--c)}.legend .dash::before{border-top-style:dashed}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;width:100%}th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.pass{color:var(--good);font-weight:600}.short{color:var(--bad);font-weight:600}code{font-size:.9em}
";

/// The page.
pub(super) fn report(run: &Run) -> Result<String, Failure> {
    let mut page = String::new();
    let h = &run.header;
    let facts = format!(
        "{} ({} cores, {}), L3 {}, {} of memory, Linux {}{}",
        h.machine.cpu,
        h.machine.cores,
        h.machine.simd.join(" "),
        size(h.machine.l3_bytes),
        size(h.machine.memory_bytes),
        h.machine.kernel,
        h.nixl.as_ref().map(|v| format!(", NIXL {v}")).unwrap_or_default()
    );
    push(
        &mut page,
        format_args!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>kvxfer bench, {date}</title><style>{STYLE}</style></head><body><h1>kvxfer {version} bench</h1><p>{facts}</p><p class=\"soft\">{date}, {peer}; working set {bytes}, {reps} repetitions in turns with the baseline, {secs:.0} s. <code>{command}</code></p>",
            date = escape(&h.date),
            version = escape(&h.kvxfer),
            facts = escape(&facts),
            peer = escape(&h.peer),
            bytes = size(h.working_set_bytes),
            reps = h.repetitions,
            secs = h.seconds,
            command = escape(&h.command),
        ),
    );
    bars(&mut page, &run.bars);
    let charts = charts::throughput(run)?;
    if !charts.is_empty() {
        page.push_str("<h2>Throughput by piece size</h2><div class=\"charts\">");
        for chart in charts {
            push(
                &mut page,
                format_args!(
                    "<figure><figcaption>{}</figcaption>{}<div class=\"legend\">",
                    escape(&chart.title),
                    chart.svg
                ),
            );
            for (name, colour, dashed) in chart.legend {
                let class = if dashed { " class=\"dash\"" } else { "" };
                push(
                    &mut page,
                    format_args!("<span{class} style=\"--c:var(--s{colour})\">{}</span>", escape(&name)),
                );
            }
            page.push_str("</div></figure>");
        }
        page.push_str("</div>");
    }
    rows(&mut page, &run.rows);
    if !run.notes.is_empty() {
        page.push_str("<h2>Notes</h2><ul>");
        for note in &run.notes {
            push(&mut page, format_args!("<li>{}</li>", escape(note)));
        }
        page.push_str("</ul>");
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

fn bars(page: &mut String, bars: &[Bar]) {
    if bars.iter().all(|b| b.measured.is_none()) {
        return;
    }
    page.push_str("<h2>Bars</h2><div class=\"wide\"><table><tr><th>bar<th class=\"n\">required<th class=\"n\">measured<th><th>worst case</tr>");
    for b in bars.iter().filter(|b| b.measured.is_some()) {
        let (class, mark) = if b.pass == Some(true) { ("pass", "PASS") } else { ("short", "short") };
        push(
            page,
            format_args!(
                "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{:.2}{}<td class=\"{class}\">{mark}<td class=\"soft\">{}</tr>",
                escape(&b.name),
                escape(&b.required),
                b.measured.unwrap_or(0.0),
                b.unit,
                escape(&b.note)
            ),
        );
    }
    page.push_str("</table></div>");
}

fn rows(page: &mut String, rows: &[Row]) {
    page.push_str("<h2>All rows</h2><div class=\"wide\"><table><tr><th>case<th>op<th>order<th class=\"n\">piece<th class=\"n\">GB/s<th>baseline<th class=\"n\">GB/s<th class=\"n\">ratio<th class=\"n\">p50 &micro;s<th class=\"n\">p99 &micro;s<th class=\"n\">submit ns/desc</tr>");
    let value = |v: Option<f64>, digits: usize| v.map_or("-".into(), |v| format!("{v:.digits$}"));
    for r in rows {
        push(
            page,
            format_args!(
                "<tr><td>{}<td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}</tr>",
                escape(&r.case),
                escape(&r.op),
                escape(&r.pattern),
                if r.piece_bytes == 0 { "-".into() } else { size(r.piece_bytes) },
                value(r.gbps, 2),
                escape(r.baseline.as_deref().unwrap_or("-")),
                value(r.baseline_gbps, 2),
                value(r.ratio, 3),
                r.p50_us.map_or("-".into(), micros),
                r.p99_us.map_or("-".into(), micros),
                value(r.submit_ns_per_desc, 1),
            ),
        );
    }
    page.push_str("</table></div>");
}

fn push(page: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = page.write_fmt(text);
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cases::{Case, Pattern};
    use crate::bench::rows::{Header, bars};
    use kvxfer_core::{Integrity, Op, TransportKind};

    fn run() -> Run {
        let mut rows = Vec::new();
        for (kind, base, scale) in [
            (TransportKind::Shm, "memcpy", 9.0),
            (TransportKind::Cma, "process_vm", 5.0),
            (TransportKind::Tcp, "sockets", 2.5),
            (TransportKind::Nixl, "nixl", 6.0),
        ] {
            for (i, piece) in [4 << 10, 16 << 10, 1 << 20, 32 << 20].into_iter().enumerate() {
                let integrity = Integrity::Bound;
                let case = Case { kind, op: Op::Write, piece, pattern: Pattern::Random, integrity };
                rows.push(Row {
                    gbps: Some(scale * (0.6 + 0.1 * i as f64)),
                    baseline: Some(base.into()),
                    baseline_gbps: Some(scale * (0.62 + 0.1 * i as f64)),
                    ratio: Some(0.97),
                    ..Row::of(case, 1 << 28)
                });
            }
        }
        let header = Header {
            kvxfer: "0".into(),
            machine: crate::machine::Machine::detect(),
            nixl: None,
            unix_time: 0,
            date: "today".into(),
            command: "kvxfer bench <&>".into(),
            working_set_bytes: 1 << 28,
            repetitions: 3,
            quick: true,
            peer: "here".into(),
            paths: Vec::new(),
            seconds: 1.0,
        };
        Run { header, bars: bars(&rows), rows, notes: vec!["a <note>".into()] }
    }

    #[test]
    fn the_page_stands_alone_and_takes_its_colours_from_the_sheet() {
        let page = report(&run()).expect("page");
        if let Ok(file) = std::env::var("KVXFER_TEST_PAGE") {
            std::fs::write(file, &page).expect("written");
        }
        assert!(page.contains("<svg") && page.contains("var(--s0)") && page.contains("var(--ink)"), "{page}");
        assert!(!page.contains("#0304") && !page.contains("#010203"), "a role's colour was left in");
        let outside = page.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !outside.contains("http") && !outside.contains("<script"),
            "something is loaded from elsewhere"
        );
        assert!(
            page.contains("kvxfer bench &lt;&amp;&gt;") && page.contains("a &lt;note&gt;"),
            "text is escaped"
        );
        assert!(page.contains("PASS"), "bars are shown");
    }
}
