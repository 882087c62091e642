//! `shm`: both agents run on this host and the remote side is a memfd, mapped here; a transfer is one copy.
//!
//! The ticket of a pool is its descriptor (passed by the agent over the side socket) and its length; whoever imports
//! it checks seals and size before mapping, so that a peer that lies or dies cannot make an access here fatal. The
//! peer's pages stay valid while they are mapped, also after its death: a copy under way ends in memory nobody reads.
//!
//! Integrity of one-sided transfers is checked by the side that copies, through the very mapping the peer shares:
//! sampled lines for `Bound`, every byte, block by block while in the cache, for `Full`. What that cannot prove is
//! that the peer still reads those pages; channels check on arrival besides.

use super::mover::{Carrier, Lane, Mover, Report, Slice};
use super::process::{Card, PeerProcess};
use super::{
    Capabilities, Job, Link, LocalTicket, Mapping, PeerInfo, RemoteKey, RemoteTicket, Transport,
    TransportKind,
};
use crate::config::AgentConfig;
use crate::memory::{MemoryKind, Paging};
use crate::{Error, Memory, Result, copy};
use kvxfer_proto::{ErrorCode, Integrity, RegionId, TransferId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// The transport over shared memory.
pub struct ShmTransport {
    mover: Arc<Mover>,
}

struct ShmLink {
    process: PeerProcess,
    lane: Lane,
    imports: Mutex<Imports>,
}

#[derive(Default)]
struct Imports {
    next: u64,
    mapped: HashMap<RemoteKey, Import>,
    /// A region is mapped once, however often it is imported.
    keys: HashMap<RegionId, RemoteKey>,
}

struct Import {
    region: RegionId,
    users: usize,
    file: (u64, u64),
    carrier: Arc<Mapped>,
}

struct Mapped(Arc<Memory>);

const VERSION: u8 = 1;

impl ShmTransport {
    /// For one agent; `mover` moves the bytes.
    pub fn new(_config: &AgentConfig, mover: &Arc<Mover>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { mover: Arc::clone(mover) }))
    }
}

impl Transport for ShmTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
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

    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        if !peer.same_host {
            return None;
        }
        let mut payload = vec![VERSION];
        Card::own().encode(&mut payload);
        Some(payload)
    }

    fn ticket(&self, _region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        let (MemoryKind::Memfd, Some(fd)) = (memory.kind(), memory.fd()) else { return Ok(None) };
        let fd = fd.try_clone_to_owned().map_err(|e| {
            Error::system("dup of a pool's memfd", e, "raise the limit of open files (ulimit -n)")
        })?;
        let mut payload = vec![VERSION];
        payload.extend_from_slice(&(memory.len() as u64).to_le_bytes());
        Ok(Some(LocalTicket { payload, fd: Some(fd) }))
    }

    fn register(&self, _region: RegionId, _memory: &Arc<Memory>) -> Result<()> {
        Ok(())
    }
    fn deregister(&self, _region: RegionId) {}

    fn connect(&self, peer: &PeerInfo, offer: &[u8], _deadline: Instant) -> Result<Arc<dyn Link>> {
        let card = match offer {
            [VERSION, card @ ..] => <[u8; Card::LEN]>::try_from(card).ok(),
            _ => None,
        };
        let card = card.ok_or_else(|| {
            Error::failed(
                ErrorCode::Protocol,
                format!(
                    "shm offer of {} bytes, version {:?}; this build speaks version {VERSION}",
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
        let process = PeerProcess::open(Card::decode(card), peer.host.pid)?;
        Ok(Arc::new(ShmLink { process, lane: self.mover.lane(), imports: Mutex::default() }))
    }

    fn shutdown(&self) {
        self.mover.shutdown();
    }
}

impl Link for ShmLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        let region = ticket.region;
        let refused = |problem: String| {
            Error::failed(ErrorCode::Protocol, format!("shm ticket of region {region}: {problem}"))
        };
        let stated = match ticket.payload.as_slice() {
            [VERSION, len @ ..] => <[u8; 8]>::try_from(len).ok().map(u64::from_le_bytes),
            _ => None,
        }
        .ok_or_else(|| refused(format!("{} bytes, or of another version", ticket.payload.len())))?;
        if stated != ticket.len {
            return Err(refused(format!("made for {stated} bytes, {} were announced", ticket.len)));
        }
        let fd = ticket.fd.ok_or_else(|| refused("no file descriptor came with it".into()))?;
        let stat = rustix::fs::fstat(&fd)
            .map_err(|e| Error::system("fstat of a received memfd", e, "the peer sent a bad descriptor"))?;
        let file = (stat.st_dev as u64, stat.st_ino as u64);
        let mut imports = self.imports.lock();
        if let Some(key) = imports.keys.get(&region).copied()
            && let Some(known) = imports.mapped.get_mut(&key)
            && known.file == file
            && known.carrier.0.len() as u64 == ticket.len
        {
            known.users += 1;
            return Ok(key);
        }
        let memory = Memory::from_fd(fd, usize::try_from(ticket.len).map_err(|e| refused(e.to_string()))?)?;
        imports.next += 1;
        let key = RemoteKey(imports.next);
        imports.keys.insert(region, key);
        imports.mapped.insert(key, Import { region, users: 1, file, carrier: Arc::new(Mapped(memory)) });
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        let mut imports = self.imports.lock();
        let Some(import) = imports.mapped.get_mut(&key) else { return };
        import.users -= 1;
        if import.users > 0 {
            return;
        }
        let gone = imports.mapped.remove(&key);
        if let Some(import) = &gone
            && imports.keys.get(&import.region) == Some(&key)
        {
            imports.keys.remove(&import.region);
        }
        drop(imports);
        // Unmapping a large pool takes time; not under the lock. Jobs under way hold the mapping.
        drop(gone);
    }

    /// The peer reuses nothing of it before this process has ended or has said that nothing is under way, so nobody need be held.
    fn map(&self, key: RemoteKey) -> Option<Mapping> {
        let memory = Arc::clone(&self.imports.lock().mapped.get(&key)?.carrier.0);
        Some(Mapping { memory, held: None })
    }

    fn submit(&self, job: Job) -> Result<()> {
        let carrier = self.imports.lock().mapped.get(&job.remote).map(|i| Arc::clone(&i.carrier));
        let Some(carrier) = carrier else {
            return Err(self.lane.closed_or(super::not_imported(job.remote)));
        };
        let len = carrier.0.len() as u64;
        self.lane.submit(job, carrier, len)
    }

    fn assist(&self, transfer: TransferId) -> bool {
        self.lane.assist(transfer)
    }
    fn cancel(&self, transfer: TransferId) {
        self.lane.cancel(transfer);
    }
    fn close(&self) {
        self.lane.close();
        let gone = std::mem::take(&mut *self.imports.lock());
        drop(gone);
    }

    /// The peer may write through its mapping of our pools until its process has ended.
    fn fenced(&self) -> bool {
        self.process.exited()
    }

    fn describe(&self) -> String {
        let imports = self.imports.lock();
        let bytes: usize = imports.mapped.values().map(|i| i.carrier.0.len()).sum();
        let huge = imports.mapped.values().filter(|i| i.carrier.0.paging() != Paging::Base).count();
        format!(
            "process {}, {} pools mapped, {bytes} bytes, {huge} on huge pages",
            self.process.pid,
            imports.mapped.len()
        )
    }
}

impl Carrier for Mapped {
    fn carry(&self, job: &Job, slice: &Slice) -> Report {
        // SAFETY: submit checked the ranges against this mapping's length, and `self` keeps it.
        unsafe { copy::carry(job, slice, self.0.as_ptr()) }
    }
}

#[cfg(test)]
mod tests;
