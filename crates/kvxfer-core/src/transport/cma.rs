//! `cma`: the peer's process runs on this host and the kernel copies between the two address spaces
//! (`process_vm_writev`, `process_vm_readv`).
//!
//! It reaches any host memory of the peer, also memory kvxfer did not allocate: the ticket is an address and a length.
//! The kernel asks for the same permission as a debugger: same user, no `prctl(PR_SET_DUMPABLE, 0)`, and where Yama
//! restricts it the peer's consent, which [`CmaTransport::offer`] gives (`PR_SET_PTRACER`). Whether it works is tried
//! at connect by reading a secret the peer has put at an address it names: a wrong process, a reused id and a
//! forbidden access are found there, and the next transport is chosen.
//!
//! Integrity of one-sided transfers: sampled lines (`Bound`) or everything (`Full`) are read back from the remote side
//! and compared with the local one.

mod vm;

use super::mover::{Carrier, Lane, Mover, Report, Slice};
use super::process::{Card, PeerProcess};
use super::{
    Capabilities, Job, Link, LocalTicket, PeerInfo, RemoteKey, RemoteTicket, Transport, TransportKind,
};
use crate::config::AgentConfig;
use crate::{Error, Memory, Result};
use kvxfer_proto::{ErrorCode, Integrity, RegionId, TransferId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// The transport over cross-memory attach.
pub struct CmaTransport {
    mover: Arc<Mover>,
    /// Read by peers at connect; never moves.
    probe: Box<Probe>,
}

#[repr(C)]
struct Probe {
    nonce: [u8; NONCE],
}

struct CmaLink {
    process: Arc<PeerProcess>,
    lane: Lane,
    imports: Mutex<Imports>,
}

#[derive(Default)]
struct Imports {
    next: u64,
    regions: HashMap<RemoteKey, Arc<Remote>>,
}

/// A region of the peer.
struct Remote {
    process: Arc<PeerProcess>,
    address: u64,
    len: u64,
}

const VERSION: u8 = 1;
const NONCE: usize = 32;
/// No user address lies beyond (57-bit page tables).
const USER_LIMIT: u64 = 1 << 56;

impl CmaTransport {
    /// For one agent; `mover` moves the bytes.
    pub fn new(_config: &AgentConfig, mover: &Arc<Mover>) -> Result<Arc<Self>> {
        let mut probe = Box::new(Probe { nonce: [0; NONCE] });
        getrandom::fill(&mut probe.nonce).map_err(|e| {
            Error::failed(ErrorCode::System, format!("no random bytes for the cma probe: {e}"))
        })?;
        Ok(Arc::new(Self { mover: Arc::clone(mover), probe }))
    }
}

impl Transport for CmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Cma
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: false,
            same_host: true,
            other_pid_namespace: false,
            verifies_arrival: false,
            fuses_digest: true,
            needs_poll: false,
            device_memory: false,
            follows_streams: false,
            default_integrity: Integrity::Bound,
        }
    }

    /// Also permits the peer's process to reach this one, where Yama asks for that.
    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        if !peer.same_host {
            return None;
        }
        vm::permit(peer.host.pid);
        let mut payload = vec![VERSION];
        Card::own().encode(&mut payload);
        payload.extend_from_slice(&(self.probe.nonce.as_ptr() as u64).to_le_bytes());
        payload.extend_from_slice(&self.probe.nonce);
        Some(payload)
    }

    fn ticket(&self, _region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        let mut payload = vec![VERSION];
        payload.extend_from_slice(&(memory.as_ptr() as u64).to_le_bytes());
        payload.extend_from_slice(&(memory.len() as u64).to_le_bytes());
        Ok(Some(LocalTicket { payload, fd: None }))
    }

    fn register(&self, _region: RegionId, _memory: &Arc<Memory>) -> Result<()> {
        Ok(())
    }
    fn deregister(&self, _region: RegionId) {}

    fn connect(&self, peer: &PeerInfo, offer: &[u8], _deadline: Instant) -> Result<Arc<dyn Link>> {
        let (card, address, nonce) = parse_offer(offer).ok_or_else(|| {
            Error::failed(
                ErrorCode::Protocol,
                format!(
                    "cma offer of {} bytes, version {:?}; this build speaks version {VERSION}",
                    offer.len(),
                    offer.first()
                ),
            )
        })?;
        if !peer.same_host {
            return Err(Error::failed(
                ErrorCode::Unreachable,
                format!("{} does not share this host and PID namespace; use tcp or nixl", peer.name),
            ));
        }
        let process = PeerProcess::open(card, peer.host.pid)?;
        vm::probe(process.pid, address, &nonce)?;
        if process.exited() {
            return Err(Error::failed(ErrorCode::PeerGone, format!("process {} has ended", process.pid)));
        }
        Ok(Arc::new(CmaLink {
            process: Arc::new(process),
            lane: self.mover.lane(),
            imports: Mutex::default(),
        }))
    }

    fn shutdown(&self) {
        self.mover.shutdown();
    }
}

fn parse_offer(offer: &[u8]) -> Option<(Card, u64, [u8; NONCE])> {
    let [VERSION, rest @ ..] = offer else { return None };
    let (card, rest) = rest.split_first_chunk::<{ Card::LEN }>()?;
    let (address, nonce) = rest.split_first_chunk::<8>()?;
    Some((Card::decode(*card), u64::from_le_bytes(*address), nonce.try_into().ok()?))
}

impl Link for CmaLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        let refused = |problem: String| {
            Error::failed(ErrorCode::Protocol, format!("cma ticket of region {}: {problem}", ticket.region))
        };
        let (address, len) = match ticket.payload.as_slice() {
            [VERSION, rest @ ..] => rest.split_first_chunk::<8>().and_then(|(address, len)| {
                Some((u64::from_le_bytes(*address), u64::from_le_bytes(len.try_into().ok()?)))
            }),
            _ => None,
        }
        .ok_or_else(|| refused(format!("{} bytes, or of another version", ticket.payload.len())))?;
        if len != ticket.len || len == 0 {
            return Err(refused(format!("made for {len} bytes, {} were announced", ticket.len)));
        }
        if address == 0 || address.checked_add(len).is_none_or(|end| end > USER_LIMIT) {
            return Err(refused(format!("{len} bytes from {address:#x} are no memory of a process")));
        }
        let mut imports = self.imports.lock();
        imports.next += 1;
        let key = RemoteKey(imports.next);
        let remote = Remote { process: Arc::clone(&self.process), address, len };
        imports.regions.insert(key, Arc::new(remote));
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        self.imports.lock().regions.remove(&key);
    }

    fn submit(&self, job: Job) -> Result<()> {
        let remote = self.imports.lock().regions.get(&job.remote).cloned();
        match remote {
            Some(remote) => {
                let len = remote.len;
                self.lane.submit(job, remote, len)
            }
            None => Err(self.lane.closed_or(super::not_imported(job.remote))),
        }
    }

    fn assist(&self, transfer: TransferId) -> bool {
        self.lane.assist(transfer)
    }
    fn cancel(&self, transfer: TransferId) {
        self.lane.cancel(transfer);
    }
    fn close(&self) {
        self.lane.close();
        self.imports.lock().regions.clear();
    }

    /// The peer may ask its kernel to write here until its process has ended.
    fn fenced(&self) -> bool {
        self.process.exited()
    }

    fn describe(&self) -> String {
        format!("process {}, process_vm_writev/readv", self.process.pid)
    }
}

impl Carrier for Remote {
    fn carry(&self, job: &Job, slice: &Slice) -> Report {
        let mut report = Report::default();
        if self.process.exited() {
            report.stop(slice.first, ErrorCode::PeerGone, format!("process {} has ended", self.process.pid));
        } else {
            vm::carry(job, slice, self.process.pid, self.address, &mut report);
        }
        report
    }
}

#[cfg(test)]
mod tests;
