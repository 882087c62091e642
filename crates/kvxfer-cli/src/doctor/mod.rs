//! `kvxfer doctor`: what this machine can do, what would be chosen and why, how fast it is beside its roofline, and how
//! to fix what is missing. One verdict per line.

pub(crate) mod cma;
#[cfg(feature = "cuda")]
mod gpu;
mod libraries;
mod paths;
mod python;
mod system;

use crate::args::DoctorArgs;
use crate::machine::Machine;
use crate::table::{Paint, Table, Tone, text};
use crate::{Failure, Verdict};
use serde::Serialize;
use serde_json::json;
use std::time::Duration;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Standing {
    /// As good as it gets.
    Ok,
    /// It works, slower or with a limit.
    Degraded,
    /// It is not there.
    Missing,
    /// A fact without a judgement.
    Info,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    /// Short name, for `--require`.
    pub id: String,
    /// Group of lines.
    pub area: &'static str,
    /// What was found.
    pub found: String,
    pub verdict: Standing,
    /// What to do about it; empty when nothing.
    pub fix: String,
}

impl Check {
    pub(crate) fn new(
        id: impl Into<String>,
        area: &'static str,
        verdict: Standing,
        found: impl Into<String>,
    ) -> Self {
        Self { id: id.into(), area, found: found.into(), verdict, fix: String::new() }
    }

    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<Verdict, Failure> {
    let budget = Duration::from_secs(args.secs);
    let machine = Machine::detect();
    let mut checks = system::checks(&machine, &args.port);
    checks.push(cma::check());
    checks.extend(libraries::checks());
    #[cfg(feature = "cuda")]
    checks.extend(gpu::checks());
    checks.extend(python::checks());
    let mut rates = Vec::new();
    let local = paths::this_host(&mut checks, &mut rates, budget, &machine);
    if let Some(address) = &args.peer {
        paths::peer(address, &mut checks, &mut rates, budget);
    }
    if let Err(why) = local {
        checks.push(
            Check::new("agent", "paths", Standing::Missing, format!("two agents on this host do not connect: {why}"))
                .fix("run with -vv to see the handshake; check that loopback is up and KVXFER_* variables are right"),
        );
    }

    let unmet = unmet(&args.require, &checks)?;
    if args.json {
        let value = json!({
            "kvxfer": env!("CARGO_PKG_VERSION"),
            "machine": machine,
            "peer": args.peer,
            "checks": checks,
            "rates": rates,
            "required": args.require,
            "unmet": unmet,
            "healthy": unmet.is_empty(),
        });
        println!("{value:#}");
    } else {
        print!("{}", render(&checks, &rates, Paint::stdout()));
        for id in &unmet {
            println!("required, but not ok: {id}");
        }
    }
    Ok(if unmet.is_empty() { Verdict::Held } else { Verdict::Broken })
}

/// What was required and is not ok. A name that no line has is a mistake of the caller.
fn unmet(required: &[String], checks: &[Check]) -> Result<Vec<String>, Failure> {
    let mut unmet = Vec::new();
    for name in required {
        let mut lines = checks.iter().filter(|c| c.id == *name).peekable();
        if lines.peek().is_none() {
            let mut known: Vec<&str> = checks.iter().map(|c| c.id.as_str()).collect();
            known.dedup();
            return Err(Failure::usage(format!(
                "--require {name}: no such check; there are {}",
                known.join(", ")
            )));
        }
        if lines.any(|c| c.verdict != Standing::Ok) {
            unmet.push(name.clone());
        }
    }
    Ok(unmet)
}

fn render(checks: &[Check], rates: &[paths::Rate], paint: Paint) -> String {
    let mut out = String::new();
    let mut area = "";
    let mut table = Table::new(["", "verdict", "what was found"]);
    let mut fixes = Vec::new();
    let mut flush = |area: &str, table: &Table| {
        if !area.is_empty() {
            out += &(paint.paint(Tone::Strong, area) + "\n" + &body(table, paint) + "\n");
        }
    };
    for c in checks {
        if c.area != area {
            flush(area, &table);
            area = c.area;
            table = Table::new(["", "verdict", "what was found"]);
        }
        let (word, tone) = match c.verdict {
            Standing::Ok => ("ok", Tone::Good),
            Standing::Degraded => ("degraded", Tone::Warn),
            Standing::Missing => ("missing", Tone::Bad),
            Standing::Info => ("info", Tone::Dim),
        };
        table.row([text(format!("  {}", c.id)), text(word).tone(tone), text(c.found.clone())]);
        if !c.fix.is_empty() {
            fixes.push(format!("  {}: {}\n", c.id, c.fix));
        }
    }
    flush(area, &table);
    if !rates.is_empty() {
        let title = paint.paint(Tone::Strong, "rates, 1 MiB pieces at random");
        out += &(title + "\n" + &paths::table(rates).render(paint) + "\n");
    }
    if !fixes.is_empty() {
        out += &(paint.paint(Tone::Strong, "how to fix it") + "\n" + &fixes.concat());
    }
    out
}

/// Without the line of headings: an area's title stands there.
fn body(table: &Table, paint: Paint) -> String {
    table.render(paint).split_once('\n').map_or_else(String::new, |(_, rest)| rest.to_owned())
}
