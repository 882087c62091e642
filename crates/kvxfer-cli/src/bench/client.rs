//! The benchmark's near side: connects, owns the local memory, and runs single passes of a subject or a baseline.

use super::cases::{Case, Pattern};
use super::failed;
use super::raw::RawClient;
use super::server::{Start, Started, touch};
use super::wire::{Answer, Ask, Control, PLAIN, PONG, SHARED};
use crate::Failure;
use crate::agents::{self, Manner};
use crate::child::Child;
use kvxfer_core::agent::Access;
use kvxfer_core::baseline::{self, ProcessMemory};
use kvxfer_core::{
    Agent, AgentConfig, Integrity, Memory, Op, Peer, Piece, Region, RemoteRegion, TransferOptions,
    TransportKind,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Upper bound of one pass or one answer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A connected pair of processes with their memory.
pub(crate) struct Session {
    pub agent: Agent,
    pub peer: Peer,
    pub control: Control,
    pub address: String,
    pub key: Option<String>,
    pub local: bool,
    shared: Region,
    plain: Region,
    /// What the memcpy baseline writes to; only for a local server.
    copy_target: Option<Arc<Memory>>,
    remote_shared: RemoteRegion,
    remote_plain: RemoteRegion,
    process: Option<ProcessMemory>,
    raw: Option<RawClient>,
    nixl: Option<super::nixl::Bare>,
    /// Why NIXL is not among the baselines.
    pub no_nixl: Option<String>,
    child: Option<Child>,
}

/// What a subject is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Baseline {
    Memcpy,
    ProcessVm,
    Sockets,
    Nixl,
}

/// How long one pass took, and how much of that was the submitting call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    pub time: Duration,
    pub submit: Duration,
}

impl Baseline {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::ProcessVm => "process_vm",
            Self::Sockets => "sockets",
            Self::Nixl => "nixl",
        }
    }
}

impl Session {
    /// With a child process of our own; both agents as `manner` says.
    pub(crate) fn with_child(bytes: u64, manner: Manner) -> Result<Self, Failure> {
        let mut child = Child::start("benchmark server", &["internal-child", "bench-server"])?;
        let key = crate::secret()?;
        let start = Start { key: key.clone(), manner, parent: std::process::id() };
        let Started { address } = child.ask(&start, DEADLINE)?;
        super::server::permit(child.pid());
        let config = agents::settings_for(&key, manner)?;
        Self::open(bytes, &address, config, Some(key), Some(child))
    }

    /// With `kvxfer bench --server` somewhere.
    pub(crate) fn with_host(bytes: u64, address: &str) -> Result<Self, Failure> {
        Self::open(bytes, address, agents::settings()?, None, None)
    }

    fn open(
        bytes: u64,
        address: &str,
        config: AgentConfig,
        key: Option<String>,
        child: Option<Child>,
    ) -> Result<Self, Failure> {
        let name = format!("bench-client-{}", std::process::id());
        let agent = Agent::builder().config(config).name(name).build()?;
        let peer = agent.connect(address, DEADLINE)?;
        let mut control = Control::new(agent.clone(), peer.clone());
        let Answer::Prepared { pid, plain_address, bytes: far } =
            control.ask(Ask::Prepare { bytes }, DEADLINE)?
        else {
            return Err(Failure::new("the server did not prepare its memory"));
        };
        let shared = agent.allocate(bytes as usize)?;
        let plain = agent.register(Memory::anonymous(bytes as usize)?)?;
        touch(shared.memory())?;
        touch(plain.memory())?;
        agent.export(&shared, PONG, Access::ReadWrite)?;
        let local = child.is_some();
        let copy_target = if local {
            let target = Memory::shared(bytes as usize, agent.config().shm.huge_pages)?;
            touch(&target)?;
            Some(target)
        } else {
            None
        };
        let process = if local { Some(ProcessMemory::new(pid, plain_address, far)?) } else { None };
        Ok(Self {
            remote_shared: peer.region(SHARED, DEADLINE)?,
            remote_plain: peer.region(PLAIN, DEADLINE)?,
            agent,
            peer,
            control,
            address: address.to_owned(),
            key,
            local,
            shared,
            plain,
            copy_target,
            process,
            raw: None,
            nixl: None,
            no_nixl: None,
            child,
        })
    }

    /// Transports that reach the server's memory, best first.
    pub(crate) fn kinds(&self) -> Vec<TransportKind> {
        let mut kinds = self.remote_shared.transports();
        for kind in self.remote_plain.transports() {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// Why a transport that was asked for is not there.
    pub(crate) fn why_not(&self, kind: TransportKind) -> String {
        let paths: Vec<String> = self.peer.paths().iter().map(|(k, _)| k.to_string()).collect();
        format!(
            "{kind} does not reach the server (connected: {}); `kvxfer doctor` says what is missing",
            if paths.is_empty() { "nothing".into() } else { paths.join(", ") }
        )
    }

    /// `shm` and `tcp` run on kvxfer's own memory, `cma` and `nixl` on memory as any program has it.
    pub(crate) fn sides(&self, kind: TransportKind) -> (&Region, &RemoteRegion, &'static str) {
        match kind {
            TransportKind::Cma | TransportKind::Nixl => (&self.plain, &self.remote_plain, PLAIN),
            _ => (&self.shared, &self.remote_shared, SHARED),
        }
    }

    /// One pass of the subject over all pieces, as one transfer.
    pub(crate) fn pass(
        &self,
        kind: TransportKind,
        op: Op,
        integrity: Integrity,
        pieces: &[Piece],
    ) -> Result<Pass, Failure> {
        let (local, remote, _) = self.sides(kind);
        let options = TransferOptions {
            timeout: Some(DEADLINE),
            integrity: Some(integrity),
            transport: Some(kind),
            ..TransferOptions::default()
        };
        let start = Instant::now();
        let transfer = self.peer.submit(op, local, remote, pieces, options)?;
        let submit = start.elapsed();
        let report = transfer.wait(DEADLINE)?;
        let time = start.elapsed();
        match report.error {
            None => Ok(Pass { time, submit }),
            Some(code) => Err(failed(kind, code, &report)),
        }
    }

    /// The baselines of a case, the one its ratio is about first.
    pub(crate) fn baselines(&mut self, case: &Case) -> Vec<Baseline> {
        if !matches!(case.kind, TransportKind::Shm | TransportKind::Nixl) {
            self.rest_nixl();
        }
        match case.kind {
            TransportKind::Shm if self.local && self.bare_nixl() => vec![Baseline::Memcpy, Baseline::Nixl],
            TransportKind::Shm | TransportKind::Inproc if self.local => vec![Baseline::Memcpy],
            TransportKind::Cma if self.local => vec![Baseline::ProcessVm],
            TransportKind::Tcp => vec![Baseline::Sockets],
            TransportKind::Nixl if self.bare_nixl() => vec![Baseline::Nixl],
            _ => Vec::new(),
        }
    }

    /// Sets NIXL up as a baseline at the first call; true when it is one.
    pub(crate) fn bare_nixl(&mut self) -> bool {
        if self.nixl.is_none() && self.no_nixl.is_none() {
            let opened = if self.local {
                super::nixl::Bare::open(self.plain.memory().clone(), None)
            } else {
                Err(Failure::new("measured between processes of one host only"))
            };
            match opened {
                Ok(bare) => self.nixl = Some(bare),
                Err(why) => self.no_nixl = Some(why.text),
            }
        }
        self.nixl.is_some()
    }

    /// Ends the NIXL baseline for now, whose threads and child would be in the way of what has nothing to do with it.
    pub(crate) fn rest_nixl(&mut self) {
        if let Some(bare) = self.nixl.take() {
            bare.close();
        }
    }

    pub(crate) fn nixl(&mut self) -> Option<&mut super::nixl::Bare> {
        self.nixl.as_mut()
    }

    /// One pass of a baseline over the same pieces; `None` where it cannot be had.
    pub(crate) fn baseline(
        &mut self,
        which: Baseline,
        op: Op,
        pattern: Pattern,
        seed: u64,
        pieces: &[Piece],
    ) -> Result<Duration, Failure> {
        let bytes: u64 = pieces.iter().map(|p| p.len).sum();
        let start = Instant::now();
        match (which, op) {
            (Baseline::Memcpy, op) => {
                let target = self.copy_target.as_ref().ok_or_else(|| Failure::new("memcpy has no target"))?;
                let source = self.shared.memory();
                match op {
                    Op::Write => baseline::copy(source, target, pieces)?,
                    Op::Read => {
                        // Copies run from the first memory to the second: a read is a write seen from the other end.
                        let back: Vec<Piece> = pieces
                            .iter()
                            .map(|p| Piece {
                                local_offset: p.remote_offset,
                                remote_offset: p.local_offset,
                                ..*p
                            })
                            .collect();
                        let start = Instant::now();
                        baseline::copy(target, source, &back)?;
                        return Ok(start.elapsed());
                    }
                }
            }
            (Baseline::ProcessVm, op) => {
                let process = self.process.ok_or_else(|| Failure::new("the server is not on this host"))?;
                match op {
                    Op::Write => process.write(self.plain.memory(), pieces)?,
                    Op::Read => process.read(self.plain.memory(), pieces)?,
                }
            }
            (Baseline::Sockets, op) => {
                if self.raw.is_none() {
                    let streams = self.agent.config().tcp.streams;
                    let Answer::Raw { address, token } = self.control.ask(Ask::Raw { streams }, DEADLINE)?
                    else {
                        return Err(Failure::new("the server opened no raw sockets"));
                    };
                    self.raw = Some(RawClient::connect(&address, &token, streams)?);
                }
                let raw = self.raw.as_ref().ok_or_else(|| Failure::new("no raw sockets"))?;
                let piece = pieces.first().map_or(0, |p| p.len);
                return raw.pass(self.shared.memory(), op, pattern, bytes, piece, seed);
            }
            (Baseline::Nixl, op) => {
                let nixl = self.nixl.as_mut().ok_or_else(|| Failure::new("NIXL is not set up"))?;
                return nixl.pass(op, pieces);
            }
        }
        Ok(start.elapsed())
    }

    /// Processor time of both processes so far, nanoseconds: here, there.
    pub(crate) fn cpu(&mut self) -> Result<(u64, u64), Failure> {
        match self.control.ask(Ask::Cpu, DEADLINE)? {
            Answer::Cpu { ns } => Ok((crate::machine::cpu_time_ns(), ns)),
            _ => Err(Failure::new("the server did not tell its processor time")),
        }
    }

    /// Ends both sides.
    pub(crate) fn close(self) {
        drop(self.raw);
        if let Some(nixl) = self.nixl {
            nixl.close();
        }
        if let Err(e) = self.agent.shutdown(Duration::from_secs(2)) {
            tracing::warn!("shutdown: {e}");
        }
        if let Some(child) = self.child {
            child.finish(Duration::from_secs(3));
        }
    }
}
