//! Which transports connect two agents, which one would be chosen and why, and how fast each is beside its roofline.

use super::{Check, Standing};
use crate::Failure;
use crate::agents::{self, Manner};
use crate::bench::cases::{Case, Pattern};
use crate::bench::client::{Baseline, Session};
use crate::machine::Machine;
use crate::stats::median;
use crate::table::{Table, number, text};
use crate::units::gbps;
use kvxfer_core::{Agent, Integrity, Op, TransportKind};
use serde::Serialize;
use std::time::{Duration, Instant};

const PIECE: u64 = 1 << 20;

/// One transport's rate beside what it stands on.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rate {
    pub peer: String,
    pub transport: String,
    pub gbps: f64,
    pub roofline: Option<&'static str>,
    pub roofline_gbps: Option<f64>,
    pub ratio: Option<f64>,
}

/// A second process on this host: paths, choice, rates.
pub(super) fn this_host(
    checks: &mut Vec<Check>,
    rates: &mut Vec<Rate>,
    budget: Duration,
    machine: &Machine,
) -> Result<(), Failure> {
    const AREA: &str = "paths to a process on this host";
    let bytes =
        if budget > Duration::ZERO { (2 * machine.l3_bytes).clamp(32 << 20, 256 << 20) } else { PIECE };
    let bytes = bytes.next_multiple_of(PIECE).min((machine.available_bytes / 10).max(PIECE) / PIECE * PIECE);
    let mut session = Session::with_child(bytes, Manner { nixl: true, no_spin: false })?;
    let here = session.agent.transports();
    let paths = session.peer.paths();
    for kind in TransportKind::ALL {
        let path = paths.iter().find(|(k, _)| *k == kind);
        checks.push(match path {
            Some((_, how)) => Check::new(kind.as_str(), AREA, Standing::Ok, how.clone()),
            None => {
                absent(kind, here.iter().find(|s| s.kind == kind).and_then(|s| s.reason.as_deref()), AREA)
            }
        });
    }
    checks.push(chosen(&paths, AREA));
    if budget > Duration::ZERO {
        measure(&mut session, "this host", bytes, rates, budget);
    }
    session.close();
    Ok(())
}

fn absent(kind: TransportKind, reason: Option<&str>, area: &'static str) -> Check {
    let id = kind.as_str();
    if kind == TransportKind::Inproc {
        return Check::new(id, area, Standing::Info, "for two agents of one process");
    }
    let found = reason.unwrap_or("available here, but did not connect to a second process");
    let check = Check::new(id, area, Standing::Missing, found);
    check.fix(match kind {
        TransportKind::CudaIpc => {
            "carries device memory between two processes on GPUs; host memory does not need it"
        }
        TransportKind::Shm => {
            "see memfd above; the processes also need a Unix socket between them (one network namespace)"
        }
        TransportKind::Cma => "see cma-syscall above",
        TransportKind::Nixl => "see nixl-library above",
        _ => "check KVXFER_TRANSPORTS and KVXFER_FORBID; -vv shows the handshake",
    })
}

fn chosen(paths: &[(TransportKind, String)], area: &'static str) -> Check {
    let order = "the built-in order is inproc, cuda_ipc, shm, cma, nixl, tcp; KVXFER_TRANSPORTS or transports.allow changes it";
    match paths.first() {
        Some((kind, _)) => {
            let others: Vec<&str> = paths[1..].iter().map(|(k, _)| k.as_str()).collect();
            let rest = if others.is_empty() {
                "nothing else connects".into()
            } else {
                format!("then {}", others.join(", "))
            };
            let memory = match kind {
                TransportKind::Shm => " for memory of kvxfer's own; foreign memory takes the next one",
                TransportKind::CudaIpc => " for GPU memory; host memory takes the next one",
                _ => "",
            };
            Check::new(
                "chosen",
                area,
                Standing::Ok,
                format!("{kind}{memory}, {rest}: first of what both sides offer ({order})"),
            )
        }
        None => Check::new("chosen", area, Standing::Missing, format!("nothing connects ({order})"))
            .fix("see the lines above; at least tcp should connect"),
    }
}

/// Another agent, wherever it runs.
pub(super) fn peer(address: &str, checks: &mut Vec<Check>, rates: &mut Vec<Rate>, budget: Duration) {
    const AREA: &str = "the peer";
    let missing = |why: String, fix: &str| Check::new("peer", AREA, Standing::Missing, why).fix(fix);
    let connected = agents::settings().and_then(|config| {
        let agent = Agent::builder().config(config).name(format!("doctor-{}", std::process::id())).build()?;
        let start = Instant::now();
        let peer = agent.connect(address, Duration::from_secs(5))?;
        Ok((agent, peer, start.elapsed()))
    });
    let (agent, peer, took) = match connected {
        Ok(all) => all,
        Err(why) => {
            checks.push(missing(
                format!("{address}: {why}"),
                "is the agent running and listening on this very address, is the port open, and is KVXFER_AUTH_KEY the same on both sides?",
            ));
            return;
        }
    };
    checks.push(Check::new(
        "peer",
        AREA,
        Standing::Ok,
        format!(
            "{} at {address}, epoch {}, connected in {:.1} ms",
            peer.name(),
            peer.epoch(),
            took.as_secs_f64() * 1e3
        ),
    ));
    let paths = peer.paths();
    for (kind, how) in &paths {
        checks.push(Check::new(format!("peer-{kind}"), AREA, Standing::Ok, how.clone()));
    }
    checks.push(Check { id: "peer-chosen".into(), ..chosen(&paths, AREA) });
    let is_server = peer.name().as_str() == "bench-server";
    if let Err(e) = agent.shutdown(Duration::from_secs(2)) {
        tracing::debug!("shutdown: {e}");
    }
    match budget {
        budget if is_server && budget > Duration::ZERO => match Session::with_host(64 << 20, address) {
            Ok(mut session) => {
                measure(&mut session, address, 64 << 20, rates, budget);
                session.close();
            }
            Err(why) => checks.push(missing(format!("rates: {why}"), "is another benchmark using the server?")),
        },
        _ => checks.push(Check::new(
            "peer-rates",
            AREA,
            Standing::Info,
            "rates are measured against `kvxfer bench --server` only: a working agent's memory is not ours to write to",
        )),
    }
}

/// Each transport in turns with its roofline, as many times as fit.
fn measure(session: &mut Session, name: &str, bytes: u64, rates: &mut Vec<Rate>, budget: Duration) {
    let (deadline, before) = (Instant::now() + budget, rates.len());
    for kind in session.kinds() {
        if rates.len() > before && Instant::now() >= deadline {
            break;
        }
        match rate(session, kind, bytes, deadline) {
            Ok(rate) => rates.push(Rate { peer: name.to_owned(), ..rate }),
            Err(why) => tracing::warn!("{kind}: {why}"),
        }
    }
}

fn rate(session: &mut Session, kind: TransportKind, bytes: u64, deadline: Instant) -> Result<Rate, Failure> {
    let integrity = match kind {
        TransportKind::Tcp | TransportKind::Nixl => Integrity::Full,
        _ => Integrity::Bound,
    };
    let case = Case { kind, op: Op::Write, piece: PIECE, pattern: Pattern::Random, integrity };
    let pieces = case.pattern.pieces(bytes, case.piece, 1);
    // NIXL's own roofline is the memory's here: what matters is what it costs to go through it.
    let roof = match kind {
        TransportKind::Tcp => Some(Baseline::Sockets),
        _ if session.local => Some(Baseline::Memcpy),
        _ => None,
    };
    session.pass(kind, case.op, integrity, &pieces)?;
    let (mut ours, mut roofs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for rep in 0..5 {
        if rep > 0 && Instant::now() >= deadline {
            break;
        }
        let here = gbps(bytes, session.pass(kind, case.op, integrity, &pieces)?.time);
        ours.push(here);
        if let Some(b) = roof {
            let there = gbps(bytes, session.baseline(b, case.op, case.pattern, 1, &pieces)?);
            roofs.push(there);
            ratios.push(here / there);
        }
    }
    Ok(Rate {
        peer: String::new(),
        transport: kind.to_string(),
        gbps: median(&ours),
        roofline: roof.map(Baseline::name),
        roofline_gbps: (!roofs.is_empty()).then(|| median(&roofs)),
        ratio: (!ratios.is_empty()).then(|| median(&ratios)),
    })
}

pub(super) fn table(rates: &[Rate]) -> Table {
    let mut t = Table::new(["  to", "transport", "GB/s", "roofline", "GB/s", "share"]);
    let value = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}"));
    for r in rates {
        t.row([
            text(format!("  {}", r.peer)),
            text(r.transport.clone()),
            number(format!("{:.2}", r.gbps)),
            text(r.roofline.unwrap_or("-")),
            number(value(r.roofline_gbps)),
            number(r.ratio.map_or("-".into(), |x| format!("{:.0} %", x * 100.0))),
        ]);
    }
    t
}
