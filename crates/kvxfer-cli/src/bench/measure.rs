//! The sections: which passes are run in which order, and the rows that come of them.

use super::cases::{Case, Pattern, Plan, Section, level_name};
use super::client::{DEADLINE, Session};
use super::rows::Row;
use super::server::{await_ping, count_unstamped, ping_options, stamp_pieces};
use super::wire::{Answer, Ask, POOL, chunk_key};
use crate::Failure;
use crate::agents::{self, Manner};
use crate::content::mix;
use crate::stats::{Latencies, median};
use crate::units::{gbps, micros};
use indicatif::ProgressBar;
use kvxfer_core::channel::ChunkSource;
use kvxfer_core::proto::wire::ChunkSpec;
use kvxfer_core::{
    Agent, ChunkKey, Geometry, Integrity, Op, Piece, RequestId, Sender, SenderConfig, TransportKind,
};
use std::time::{Duration, Instant};

const PAGE: u64 = 32 << 20;

/// What is measured so far.
pub(crate) struct Bench<'a> {
    pub plan: &'a Plan,
    pub session: Session,
    pub bar: ProgressBar,
    pub rows: Vec<Row>,
    pub notes: Vec<String>,
    /// Agents that do not spin, for the blocking half of the latency section.
    sleepers: Option<Session>,
    counter: u64,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(plan: &'a Plan, session: Session, bar: ProgressBar) -> Self {
        Self { plan, session, bar, rows: Vec::new(), notes: Vec::new(), sleepers: None, counter: 0 }
    }

    /// Every section that was asked for, over these transports (all that connect where none is named). A case that
    /// fails leaves a note and the others go on.
    pub(crate) fn run(&mut self, wanted: &[TransportKind], idle: bool) {
        let reachable = self.session.kinds();
        let wanted = if wanted.is_empty() { &reachable } else { wanted };
        let kinds: Vec<TransportKind> = wanted.iter().copied().filter(|k| reachable.contains(k)).collect();
        for &kind in wanted.iter().filter(|k| !kinds.contains(k)) {
            self.notes.push(self.session.why_not(kind));
        }
        if kinds.is_empty() {
            return;
        }
        let cases = if self.plan.has(Section::Throughput) { self.plan.cases(&kinds) } else { Vec::new() };
        let latency = if self.plan.has(Section::Latency) { kinds.len() * 2 } else { 0 };
        let submit = if self.plan.has(Section::Submit) { kinds.len() } else { 0 };
        let levels: Vec<TransportKind> = if self.plan.has(Section::Integrity) {
            kinds.iter().copied().filter(|k| matches!(k, TransportKind::Shm | TransportKind::Tcp)).collect()
        } else {
            Vec::new()
        };
        let idle = usize::from(idle && self.plan.has(Section::Idle));
        self.bar.inc_length((cases.len() + latency + submit + levels.len() + idle) as u64);

        for case in &cases {
            self.step(&case.name(), |b| b.throughput(case));
        }
        if latency > 0 {
            self.session.rest_nixl();
            for poll in [true, false] {
                let how = if poll { "poll" } else { "block" };
                for &kind in &kinds {
                    self.step(&format!("latency.{kind}.{how}"), |b| b.latency(kind, poll));
                }
            }
            if let Some(sleepers) = self.sleepers.take() {
                sleepers.close();
            }
            if kinds.contains(&TransportKind::Nixl) {
                self.step("latency.nixl.write64", Self::nixl_small_write);
                self.session.rest_nixl();
            }
        }
        if submit > 0 {
            for &kind in &kinds {
                self.step(&format!("submit.{kind}"), |b| b.submit(kind));
            }
        }
        for kind in levels {
            self.step(&format!("integrity.{kind}"), |b| b.integrity(kind));
        }
        if idle > 0 {
            self.step("idle", Self::idle);
        }
        if let Some(why) = &self.session.no_nixl {
            self.notes.push(format!("NIXL is not among the baselines: {why}"));
        }
    }

    fn step(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<(), Failure>) {
        self.bar.set_message(name.to_owned());
        // Drawn now and not from another thread: nothing of ours may run while the clock does.
        self.bar.tick();
        if let Err(why) = work(self) {
            self.notes.push(format!("{name}: {why}"));
        }
        self.bar.inc(1);
    }

    fn fresh(&mut self) -> u64 {
        self.counter += 1;
        mix(self.counter)
    }

    /// Subject and baselines in turns; then that the bytes are really there; then single pieces for the percentiles.
    fn throughput(&mut self, case: &Case) -> Result<(), Failure> {
        let seed = self.fresh();
        let bytes = self.plan.bytes / case.piece * case.piece;
        let pieces = case.pattern.pieces(bytes, case.piece, seed);
        let baselines = self.session.baselines(case);

        let stamp = self.stamp_source(case, &pieces, seed)?;
        self.session.pass(case.kind, case.op, case.integrity, &pieces)?;
        self.verify_arrival(case, &pieces, seed, stamp)?;
        for &b in &baselines {
            self.session.baseline(b, case.op, case.pattern, seed, &pieces)?;
        }
        let (mut times, mut submits) = (Vec::new(), Vec::new());
        let mut others: Vec<Vec<f64>> = vec![Vec::new(); baselines.len()];
        let start = Instant::now();
        for rep in 0..self.plan.reps {
            if rep >= 3 && start.elapsed() > self.plan.budget {
                break;
            }
            let pass = self.session.pass(case.kind, case.op, case.integrity, &pieces)?;
            times.push(gbps(bytes, pass.time));
            submits.push(pass.submit.as_nanos() as f64 / pieces.len() as f64);
            for (&b, rates) in baselines.iter().zip(&mut others) {
                let time = self.session.baseline(b, case.op, case.pattern, seed, &pieces)?;
                rates.push(gbps(bytes, time));
            }
        }
        let mut single = Latencies::new();
        let limit = Instant::now() + self.plan.budget / 10;
        for piece in pieces.iter().cycle().take(1000) {
            single.add(self.session.pass(case.kind, case.op, case.integrity, &[*piece])?.time);
            if Instant::now() > limit {
                break;
            }
        }
        let row = Row {
            gbps: Some(median(&times)),
            p50_us: single.micros(0.5),
            p99_us: single.micros(0.99),
            submit_ns_per_desc: Some(median(&submits)),
            ..Row::of(*case, bytes)
        };
        if baselines.is_empty() {
            self.rows.push(row.clone());
        }
        for (b, rates) in baselines.iter().zip(&others) {
            // Pairs that ran one after the other share the machine's mood; the median of their ratios is steadier than
            // the ratio of two medians.
            let ratios: Vec<f64> = times.iter().zip(rates).map(|(s, b)| s / b).collect();
            self.rows.push(Row {
                baseline: Some(b.name().into()),
                baseline_gbps: Some(median(rates)),
                ratio: Some(median(&ratios)),
                ..row.clone()
            });
        }
        Ok(())
    }

    /// Marks the source of a pass, piece by piece.
    fn stamp_source(&mut self, case: &Case, pieces: &[Piece], seed: u64) -> Result<u64, Failure> {
        let stamp = mix(seed);
        let (local, _, region) = self.session.sides(case.kind);
        match case.op {
            Op::Write => stamp_pieces(local.memory(), pieces, stamp)?,
            Op::Read => {
                let (region, bytes) = (region.to_owned(), self.plan.bytes / case.piece * case.piece);
                let ask = Ask::Stamp { region, pattern: case.pattern, piece: case.piece, bytes, seed, stamp };
                self.session.control.ask(ask, DEADLINE)?;
            }
        }
        Ok(stamp)
    }

    /// Looks for every mark where it should have arrived.
    fn verify_arrival(
        &mut self,
        case: &Case,
        pieces: &[Piece],
        seed: u64,
        stamp: u64,
    ) -> Result<(), Failure> {
        let (local, _, region) = self.session.sides(case.kind);
        let bad = match case.op {
            Op::Read => count_unstamped(local.memory(), pieces, stamp)?,
            Op::Write => {
                let (region, bytes) = (region.to_owned(), self.plan.bytes / case.piece * case.piece);
                let ask =
                    Ask::Inspect { region, pattern: case.pattern, piece: case.piece, bytes, seed, stamp };
                match self.session.control.ask(ask, DEADLINE)? {
                    Answer::Bad(n) => n,
                    _ => return Err(Failure::new("the server did not look at what arrived")),
                }
            }
        };
        if bad == 0 {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{bad} of {} pieces did not arrive although success was reported",
            pieces.len()
        )))
    }

    /// Half of the time there and back, with the same operation both ways.
    ///
    /// A receiver that polls looks all the time. One that blocks sleeps in the kernel: both agents of that pair are told
    /// not to spin first, or a quick answer would find them still looking.
    fn latency(&mut self, kind: TransportKind, poll: bool) -> Result<(), Failure> {
        let (how, session) = if poll {
            ("poll", &mut self.session)
        } else if self.session.local {
            if self.sleepers.is_none() {
                self.sleepers = Some(Session::with_child(
                    1 << 20,
                    Manner { no_spin: true, nixl: kind == TransportKind::Nixl },
                )?);
            }
            ("block", self.sleepers.as_mut().unwrap_or(&mut self.session))
        } else {
            return Err(Failure::new(
                "the server's spinning cannot be set from here; measured on one host only",
            ));
        };
        let count: u32 = if self.plan.quick { 500 } else { 5000 };
        // A few settle how many the time allows.
        let probe = ping_pong(session, kind, poll, 5, 0)?;
        let each = Duration::from_nanos((probe.micros(0.5).unwrap_or(1.0) * 2000.0) as u64);
        let affordable = (self.plan.budget.as_nanos() / each.as_nanos().max(1)) as u32;
        let count = count.min(affordable).max(20);
        let times = ping_pong(session, kind, poll, count, count / 10)?;
        self.rows.push(Row {
            op: "write+notify".into(),
            pattern: if poll { "receiver polls" } else { "receiver blocks" }.into(),
            piece_bytes: 64,
            total_bytes: 64,
            p50_us: times.micros(0.5),
            p99_us: times.micros(0.99),
            ..Row::named(format!("latency.{kind}.{how}"), kind)
        });
        Ok(())
    }

    /// A 64-byte write to its end, ours beside the bare library's.
    fn nixl_small_write(&mut self) -> Result<(), Failure> {
        if !self.session.bare_nixl() {
            return Ok(());
        }
        let piece = [Piece { local_offset: 0, remote_offset: 0, len: 64 }];
        let (mut ours, mut theirs) = (Latencies::new(), Latencies::new());
        let limit = Instant::now() + self.plan.budget;
        for i in 0..2000 {
            let pass = self.session.pass(TransportKind::Nixl, Op::Write, Integrity::Off, &piece)?;
            let Some(bare) = self.session.nixl() else { return Ok(()) };
            let time = bare.pass(Op::Write, &piece)?;
            if i >= 20 {
                ours.add(pass.time);
                theirs.add(time);
            }
            if Instant::now() > limit && i > 50 {
                break;
            }
        }
        let ratio = ours.micros(0.5).zip(theirs.micros(0.5)).map(|(a, b)| a / b);
        let bare = theirs.micros(0.5).map_or_else(String::new, micros);
        self.rows.push(Row {
            op: "write".into(),
            piece_bytes: 64,
            total_bytes: 64,
            p50_us: ours.micros(0.5),
            p99_us: ours.micros(0.99),
            baseline: Some(format!("nixl ({bare} us)")),
            ratio,
            ..Row::named("latency.nixl.write64".into(), TransportKind::Nixl)
        });
        Ok(())
    }

    /// The submitting call alone, for 16,384 descriptors of 16 KiB (fewer bytes where the working set is smaller).
    fn submit(&mut self, kind: TransportKind) -> Result<(), Failure> {
        const DESCRIPTORS: u64 = 16_384;
        let piece = (self.plan.bytes / DESCRIPTORS).clamp(64, 16 << 10);
        let bytes = piece * DESCRIPTORS;
        let pieces = Pattern::Random.pieces(bytes, piece, self.fresh());
        let level = if matches!(kind, TransportKind::Tcp | TransportKind::Nixl) {
            Integrity::Full
        } else {
            Integrity::Bound
        };
        self.session.pass(kind, Op::Write, level, &pieces)?;
        let (mut per, mut rates, mut calls) = (Vec::new(), Vec::new(), Latencies::new());
        let start = Instant::now();
        for i in 0..self.plan.reps * 3 {
            let pass = self.session.pass(kind, Op::Write, level, &pieces)?;
            per.push(pass.submit.as_nanos() as f64 / DESCRIPTORS as f64);
            rates.push(gbps(bytes, pass.time));
            calls.add(pass.submit);
            if i >= 3 && start.elapsed() > self.plan.budget {
                break;
            }
        }
        self.rows.push(Row {
            op: "write".into(),
            pattern: "random".into(),
            piece_bytes: piece,
            total_bytes: bytes,
            gbps: Some(median(&rates)),
            p50_us: calls.micros(0.5),
            p99_us: calls.micros(0.99),
            submit_ns_per_desc: Some(median(&per)),
            ..Row::named(format!("submit.{kind}"), kind)
        });
        Ok(())
    }

    /// A request of 32 MiB chunks from sender to receiver at each level, in turns.
    fn integrity(&mut self, kind: TransportKind) -> Result<(), Failure> {
        let chunks = (self.plan.bytes / PAGE) as u32;
        let open = Ask::Pool { pages: chunks, page_bytes: PAGE };
        self.session.control.ask(open, DEADLINE)?;
        let config =
            self.session.key.as_ref().map_or_else(agents::settings, |k| agents::settings_with_key(k))?;
        let name = format!("bench-{kind}-{}", std::process::id());
        let agent = Agent::builder().config(config).name(name).allow([kind]).build()?;
        let buffer = agent.allocate((u64::from(chunks) * PAGE) as usize)?;
        super::server::touch(buffer.memory())?;
        let levels = [Integrity::Off, Integrity::Bound, Integrity::Full];
        let mut senders = Vec::new();
        for level in levels {
            let config = SenderConfig {
                pool: POOL.into(),
                geometry: Geometry { page_bytes: PAGE, ..Geometry::default() },
                integrity: Some(level),
                request_timeout: DEADLINE,
            };
            senders.push(Sender::connect(&agent, &self.session.address, config, DEADLINE)?);
        }
        let mut rates: [Vec<f64>; 3] = Default::default();
        let start = Instant::now();
        for rep in 0..=self.plan.reps {
            if rep > 3 && start.elapsed() > self.plan.budget * 2 {
                break;
            }
            // Another level goes first in each round: what ran before leaves its traces in the caches.
            for level in (0..levels.len()).map(|i| (i + rep as usize) % levels.len()) {
                let (sender, rates) = (&senders[level], &mut rates[level]);
                let run = self.fresh();
                let mut request = Vec::new();
                for i in 0..chunks {
                    let key = ChunkKey::new(chunk_key(run, i))?;
                    let source = ChunkSource::new(buffer.clone(), vec![(u64::from(i) * PAGE, PAGE)]);
                    request.push((ChunkSpec { key, len: PAGE }, source));
                }
                let begin = Instant::now();
                let delivery =
                    sender.send(RequestId::new(format!("bench-{run:016x}"))?, request, Some(DEADLINE))?;
                let report = delivery.wait(DEADLINE)?;
                let time = begin.elapsed();
                if report.transport != kind || report.bytes != u64::from(chunks) * PAGE {
                    return Err(Failure::new(format!("{} carried {} bytes", report.transport, report.bytes)));
                }
                if !matches!(self.session.control.ask(Ask::Forget { run, chunks }, DEADLINE)?, Answer::Bad(0))
                {
                    return Err(Failure::new("chunks that were delivered are not there"));
                }
                // The first round touches every page.
                if rep > 0 {
                    rates.push(gbps(report.bytes, time));
                }
            }
        }
        let [off, ..] = rates.clone();
        for (level, rates) in levels.into_iter().zip(&rates) {
            let ratios: Vec<f64> = rates.iter().zip(&off).map(|(l, o)| l / o).collect();
            self.rows.push(Row {
                op: "send".into(),
                pattern: "chunks".into(),
                piece_bytes: PAGE,
                total_bytes: u64::from(chunks) * PAGE,
                gbps: Some(median(rates)),
                baseline: Some("integrity off".into()),
                baseline_gbps: Some(median(&off)),
                ratio: Some(median(&ratios)),
                ..Row::named(format!("integrity.{kind}.{}", level_name(level)), kind)
            });
        }
        drop(senders);
        agent.shutdown(Duration::from_secs(2))?;
        Ok(())
    }

    /// Processor time of two connected agents that have nothing to do.
    fn idle(&mut self) -> Result<(), Failure> {
        let rest = Duration::from_millis(if self.plan.quick { 1500 } else { 5000 });
        // What the last section left behind (workers going to sleep) is not idleness.
        std::thread::sleep(Duration::from_millis(100));
        let before = self.session.cpu()?;
        let start = Instant::now();
        std::thread::sleep(rest);
        let after = self.session.cpu()?;
        let wall = start.elapsed().as_nanos() as f64;
        let share = |a: u64, b: u64| a.saturating_sub(b) as f64 / wall;
        let worst = share(after.0, before.0).max(share(after.1, before.1));
        self.rows.push(Row {
            op: "none".into(),
            pattern: "share of a core".into(),
            baseline: Some("one core".into()),
            ratio: Some(worst),
            ..Row::named(
                "idle.connected".into(),
                self.session.kinds().first().copied().unwrap_or(TransportKind::Tcp),
            )
        });
        Ok(())
    }
}

/// `count` round trips after `warm` unmeasured ones; the times are those of one way.
fn ping_pong(
    session: &mut Session,
    kind: TransportKind,
    poll: bool,
    count: u32,
    warm: u32,
) -> Result<Latencies, Failure> {
    let ask = Ask::PingPong { kind, count: count + warm, poll };
    session.control.ask(ask, DEADLINE)?;
    let (local, remote, _) = session.sides(kind);
    let piece = [Piece { local_offset: 64, remote_offset: 64, len: 64 }];
    let mut times = Latencies::new();
    for i in 0..count + warm {
        let start = Instant::now();
        session.peer.write(local, remote, &piece, ping_options(kind))?;
        if await_ping(&session.agent, poll, Duration::from_secs(5))?.is_none() {
            return Err(Failure::new(format!("no answer to ping {i} within 5 s")));
        }
        if i >= warm {
            times.add(start.elapsed() / 2);
        }
    }
    Ok(times)
}
