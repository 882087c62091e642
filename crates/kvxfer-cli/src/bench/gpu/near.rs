//! This process: its memory, the child, and single passes of subjects and baselines.

use super::Plan;
use super::far::{Answer, Ask, BACK, DEADLINE, DEVICE, POOL, Start, Started, digest, pattern};
use crate::bench::failed;
use crate::bench::nixl::Bare;
use crate::bench::server::{await_ping, ping_options};
use crate::child::Child;
use crate::{Failure, agents};
use kvxfer_core::agent::Access;
use kvxfer_core::cuda::Device;
use kvxfer_core::cuda::baseline::Copier;
use kvxfer_core::memory::HugePages;
use kvxfer_core::{Agent, Memory, Op, Peer, Piece, Region, RemoteRegion, TransferOptions, TransportKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a pass goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Far {
    Device,
    Pool,
}

/// From where.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Local {
    Device,
    Host,
}

pub(super) struct Near {
    pub(super) plan: Plan,
    agent: Agent,
    peer: Peer,
    device: Region,
    host: Region,
    far_device: RemoteRegion,
    far_pool: RemoteRegion,
    copier: Copier,
    /// What the driver's copies go to: on the other process's device, and in host memory.
    beside: Arc<Memory>,
    beside_host: Arc<Memory>,
    nixl: Option<Bare>,
    notes: Vec<String>,
    child: Child,
}

impl Near {
    /// With NIXL as a baseline where it is wanted and there.
    pub(super) fn open(plan: Plan, nixl: bool) -> Result<Self, Failure> {
        let scattered = plan.blocks * plan.block;
        let store = super::cases::store_pieces(plan.tokens).iter().map(|p| p.local_offset + p.len).max();
        let device_bytes = plan.bulk.max(scattered).max(store.unwrap_or(0));
        let mut child = Child::start("GPU benchmark server", &["internal-child", "bench-gpu"])?;
        let key = crate::secret()?;
        let start = Start { key: key.clone(), device: plan.devices.1, device_bytes, pool_bytes: plan.host };
        let Started { address } = child.ask(&start, DEADLINE)?;
        let manner = agents::Manner { nixl: false, no_spin: false };
        let agent = Agent::builder().config(agents::settings_for(&key, manner)?).name("gpu-near").build()?;
        let (ours, theirs) = (Device::get(plan.devices.0)?, Device::get(plan.devices.1)?);
        let device = Memory::device(&ours, device_bytes as usize)?;
        device.write_at(0, &pattern(device_bytes, 1))?;
        let pinned = || -> Result<Arc<Memory>, Failure> {
            let memory = Memory::shared(plan.host as usize, HugePages::Try)?;
            memory.pin()?;
            Ok(memory)
        };
        let host = pinned()?;
        host.write_at(0, &pattern(plan.host, 2))?;
        let peer = agent.connect(&address, DEADLINE)?;
        let device = agent.register(device)?;
        agent.export(&device, BACK, Access::ReadWrite)?;
        let mut notes = Vec::new();
        // On the subject's own devices: the child of the baseline takes the far one.
        let nixl =
            nixl.then(|| Bare::open(device.memory().clone(), Some(plan.devices.1))).and_then(|opened| {
                opened.map_err(|e| notes.push(format!("NIXL is not among the baselines: {e}"))).ok()
            });
        Ok(Self {
            far_device: peer.region(DEVICE, DEADLINE)?,
            far_pool: peer.region(POOL, DEADLINE)?,
            copier: Copier::new(&ours)?,
            beside: Memory::device(&theirs, device_bytes as usize)?,
            beside_host: pinned()?,
            host: agent.register(host)?,
            agent,
            peer,
            device,
            nixl,
            notes,
            child,
            plan,
        })
    }

    fn sides(&self, local: Local, far: Far) -> (&Region, &RemoteRegion) {
        let local = if local == Local::Device { &self.device } else { &self.host };
        (local, if far == Far::Device { &self.far_device } else { &self.far_pool })
    }

    /// One transfer; its time, and that of the submitting call.
    pub(super) fn pass(
        &self,
        kind: TransportKind,
        op: Op,
        (local, far): (Local, Far),
        pieces: &[Piece],
    ) -> Result<(Duration, Duration), Failure> {
        let (local, remote) = self.sides(local, far);
        let options =
            TransferOptions { timeout: Some(DEADLINE), transport: Some(kind), ..TransferOptions::default() };
        let start = Instant::now();
        let transfer = self.peer.submit(op, local, remote, pieces, options)?;
        let submit = start.elapsed();
        let report = transfer.wait(DEADLINE)?;
        let time = start.elapsed();
        match report.error {
            None => Ok((time, submit)),
            Some(code) => Err(failed(kind, code, &report)),
        }
    }

    /// Several requests at once, a transfer each; until the last has ended.
    pub(super) fn burst(&self, requests: &[Vec<Piece>]) -> Result<Duration, Failure> {
        let start = Instant::now();
        let transfers = requests
            .iter()
            .map(|pieces| self.peer.write(&self.device, &self.far_device, pieces, TransferOptions::default()))
            .collect::<Result<Vec<_>, _>>()?;
        for transfer in transfers {
            if let Some(code) = transfer.wait(DEADLINE)?.error {
                return Err(Failure::new(format!("a request of a burst failed: {code}")));
            }
        }
        Ok(start.elapsed())
    }

    /// The driver's copy of as many bytes in one piece.
    pub(super) fn copy(&self, local: Local, far: Far, op: Op, bytes: u64) -> Result<Duration, Failure> {
        let near = if local == Local::Device { self.device.memory() } else { self.host.memory() };
        let beside = if far == Far::Device { &self.beside } else { &self.beside_host };
        let (from, to) = if op == Op::Write { (near, beside) } else { (beside, near) };
        Ok(self.copier.copy(from, to, bytes)?)
    }

    /// The driver's copies, one per piece.
    pub(super) fn copy_each(&self, pieces: &[Piece]) -> Result<Duration, Failure> {
        Ok(self.copier.copy_each(self.device.memory(), &self.beside, pieces)?)
    }

    /// NIXL with the same descriptors; `None` where it is not there.
    pub(super) fn nixl(&mut self, pieces: &[Piece]) -> Option<Result<Duration, Failure>> {
        self.nixl.as_mut().map(|n| n.pass(Op::Write, pieces))
    }

    pub(super) fn give_up_nixl(&mut self, why: &Failure) {
        self.nixl = None;
        self.notes.push(format!("NIXL is not among the baselines any more: {why}"));
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer, Failure> {
        self.child.ask(ask, DEADLINE)
    }

    /// Moves pieces and compares what arrived with what left, byte for byte.
    pub(super) fn check(
        &mut self,
        kind: TransportKind,
        op: Op,
        sides: (Local, Far),
        pieces: &[Piece],
    ) -> Result<(), Failure> {
        let name = if sides.1 == Far::Device { DEVICE } else { POOL };
        let near = if sides.0 == Local::Device { &self.device } else { &self.host }.memory().clone();
        let bytes = pieces.iter().map(|p| p.remote_offset.max(p.local_offset) + p.len).max().unwrap_or(0);
        let seed = self.plan.blocks ^ pieces.len() as u64;
        self.ask(&Ask::Fill { region: name.into(), bytes, seed })?;
        let mut far = pattern(bytes, seed);
        let mut ours = vec![0; bytes as usize];
        near.read_at(0, &mut ours)?;
        self.pass(kind, op, sides, pieces)?;
        for p in pieces {
            let (a, b, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            match op {
                Op::Write => far[b..b + n].copy_from_slice(&ours[a..a + n]),
                Op::Read => ours[a..a + n].copy_from_slice(&far[b..b + n]),
            }
        }
        let expected =
            kvxfer_core::proto::integrity::segment_hash(if op == Op::Write { &far } else { &ours });
        let found = match op {
            Op::Read => digest(&near, bytes)?,
            Op::Write => match self.ask(&Ask::Digest { region: name.into(), bytes })? {
                Answer::Digest(d) => d,
                Answer::Done => return Err(Failure::new("the server did not digest")),
            },
        };
        if found != expected {
            return Err(Failure::new(format!("{kind}: the bytes did not arrive as they left")));
        }
        Ok(())
    }

    /// Half of each round trip of a write with a notification.
    pub(super) fn pings(&mut self, bytes: u64, count: u32) -> Result<Vec<Duration>, Failure> {
        self.child.ask::<Answer>(&Ask::Echo { bytes, count }, DEADLINE)?;
        let piece = [Piece { local_offset: 0, remote_offset: 0, len: bytes }];
        let mut halves = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let start = Instant::now();
            let options = ping_options(TransportKind::CudaIpc);
            self.peer.write(&self.device, &self.far_device, &piece, options)?.wait(DEADLINE)?;
            if await_ping(&self.agent, true, Duration::from_secs(10))?.is_none() {
                return Err(Failure::new("a ping was not answered"));
            }
            halves.push(start.elapsed() / 2);
        }
        // The echo's own last word.
        self.child.hear::<Answer>(DEADLINE)?;
        Ok(halves)
    }

    /// Ends both processes; what is to be said about the run.
    pub(super) fn close(self) -> Vec<String> {
        let Self { agent, peer, device, host, far_device, far_pool, nixl, child, notes, .. } = self;
        if let Some(nixl) = nixl {
            nixl.close();
        }
        drop((far_device, far_pool, peer, device, host));
        if let Err(e) = agent.shutdown(Duration::from_secs(5)) {
            eprintln!("kvxfer: {e}");
        }
        child.finish(Duration::from_secs(5));
        notes
    }
}
