//! `kvxfer bench`: every transport beside the thing it stands on, in one run.
//!
//! Two processes: this one submits, a child (or another host) owns the far memory. Subjects and baselines take turns
//! over the same pieces in the same memory, so that a noisy machine disturbs both alike; the result is the median of
//! the pairwise ratios.

pub(crate) mod cases;
mod charts;
pub(crate) mod client;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
#[cfg(not(feature = "cuda"))]
pub(crate) mod gpu {
    //! In a build without CUDA.
    use crate::args::BenchArgs;
    use crate::{Failure, Verdict};
    pub(crate) fn run(_: &BenchArgs) -> Result<Verdict, Failure> {
        Err(Failure::new("this build has no CUDA: build with the feature `cuda`"))
    }
    pub(crate) fn run_child() -> Result<(), Failure> {
        Err(Failure::new("this build has no CUDA"))
    }
}
mod html;
mod measure;
pub(crate) mod nixl;
mod output;
mod raw;
mod rows;
pub(crate) mod server;
pub(crate) mod wire;

use crate::agents::Manner;
use crate::args::BenchArgs;
use crate::machine::Machine;
use crate::{Failure, Verdict};
use cases::Plan;
use client::Session;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvxfer_core::{ErrorCode, TransferReport, TransportKind};
use measure::Bench;
use rows::{Header, Run};
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &BenchArgs) -> Result<Verdict, Failure> {
    if args.gpu {
        return gpu::run(args);
    }
    if let Some(address) = &args.server {
        server::run_host(address)?;
        return Ok(Verdict::Held);
    }
    let start = Instant::now();
    let machine = Machine::detect();
    let plan = Plan::new(args, &machine)?;
    // A file that cannot be written is found out before minutes of measuring.
    for file in [&args.json, &args.html].into_iter().flatten().filter(|f| f.as_os_str() != "-") {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .map_err(|e| Failure::usage(format!("{} cannot be written: {e}", file.display())))?;
    }
    let mut sittings = sittings(&plan, args.client.is_some()).into_iter();
    let open = |sitting: &Sitting| match &args.client {
        Some(address) => Session::with_host(plan.bytes, address),
        None => Session::with_child(plan.bytes, Manner { nixl: sitting.nixl, no_spin: false }),
    };
    let mut sitting = sittings.next().unwrap_or_default();
    let session = open(&sitting)?;
    let mut header = Header {
        kvxfer: env!("CARGO_PKG_VERSION").into(),
        machine,
        nixl: nixl::version(),
        unix_time: 0,
        date: String::new(),
        command: std::env::args().skip(1).fold("kvxfer".into(), |line, word| line + " " + &word),
        working_set_bytes: plan.bytes,
        repetitions: plan.reps,
        quick: plan.quick,
        peer: if session.local { "a second process on this host".into() } else { session.address.clone() },
        paths: session.peer.paths(),
        seconds: 0.0,
    };
    let mut bench = Bench::new(&plan, session, progress(args));
    bench.run(&sitting.kinds, true);
    for next in sittings {
        sitting = next;
        std::mem::replace(&mut bench.session, open(&sitting)?).close();
        header
            .paths
            .extend(bench.session.peer.paths().into_iter().filter(|(k, _)| sitting.kinds.contains(k)));
        bench.run(&sitting.kinds, false);
    }
    bench.bar.finish_and_clear();
    let Bench { session, rows, notes, .. } = bench;
    session.close();
    if rows.is_empty() {
        return Err(Failure::new(notes.join("; ")));
    }

    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    (header.unix_time, header.date, header.seconds) = (now, date(now), start.elapsed().as_secs_f64());
    let run = Run { bars: rows::bars(&rows), header, rows, notes };

    let json = format!("{:#}", serde_json::to_value(&run).map_err(|e| Failure::new(e.to_string()))?);
    match &args.json {
        Some(file) if file.as_os_str() == "-" => println!("{json}"),
        other => {
            if let Some(file) = other {
                write(file, &(json + "\n"))?;
            }
            print!("{}", if args.markdown { output::markdown(&run) } else { output::terminal(&run) });
        }
    }
    if let Some(file) = &args.html {
        write(file, &html::report(&run)?)?;
    }
    // Rates are for people to judge; what failed to move bytes is not.
    let broken = run.rows.is_empty() || run.notes.iter().any(|n| n.contains("did not arrive"));
    Ok(if broken { Verdict::Broken } else { Verdict::Held })
}

/// A part of the run with agents of its own.
#[derive(Default)]
struct Sitting {
    /// Only these transports; empty: all that connect.
    kinds: Vec<TransportKind>,
    /// The agents have NIXL.
    nixl: bool,
}

/// NIXL runs threads of its own, so the other transports are measured between agents that do without it.
fn sittings(plan: &Plan, hosts: bool) -> Vec<Sitting> {
    let (nixl, kinds): (Vec<_>, Vec<_>) = plan.kinds.iter().copied().partition(|k| *k == TransportKind::Nixl);
    let own = Sitting { kinds: vec![TransportKind::Nixl], nixl: true };
    match (hosts, kinds.is_empty(), nixl.is_empty()) {
        (true, ..) => vec![Sitting { kinds: plan.kinds.clone(), nixl: false }],
        (false, true, true) => vec![Sitting::default(), own],
        (false, true, false) => vec![own],
        (false, false, true) => vec![Sitting { kinds, nixl: false }],
        (false, false, false) => vec![Sitting { kinds, nixl: false }, own],
    }
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(file, text).map_err(|e| Failure::new(format!("{}: {e}", file.display())))
}

fn progress(args: &BenchArgs) -> ProgressBar {
    let show = !args.no_progress && std::io::stderr().is_terminal();
    let target = if show { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {eta:>4} {msg}") {
        bar.set_style(style);
    }
    bar
}

/// Seconds since 1970 as `2025-01-31 12:00 UTC`.
fn date(unix: u64) -> String {
    let (days, secs) = ((unix / 86_400) as i64, unix % 86_400);
    // Civil date from days, after Howard Hinnant: eras of 400 years beginning in March.
    let z = days + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let y = yoe + era * 400 + i64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02} {:02}:{:02} UTC", secs / 3600, secs / 60 % 60)
}

/// What a transfer that failed with `code` says.
fn failed(kind: TransportKind, code: ErrorCode, report: &TransferReport) -> Failure {
    let detail = report.detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default();
    Failure::new(format!("{kind}: {} of {} pieces failed: {code}{detail}", report.failed, report.pieces))
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        assert_eq!(super::date(0), "1970-01-01 00:00 UTC");
        assert_eq!(super::date(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(super::date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(super::date(1_735_689_599), "2024-12-31 23:59 UTC");
    }
}
