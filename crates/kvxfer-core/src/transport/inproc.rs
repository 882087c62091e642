//! `inproc`: both agents live in this process, so a transfer is a copy between two ranges of its memory.
//!
//! Also the documented test double: everything above the transports behaves here as on `shm`, without sockets, file
//! descriptors or a second process. Agents find each other's regions in a table of this process that holds them
//! weakly: a region that its owner has dropped is an error for later transfers, never a dangling pointer.

use super::mover::{Carrier, Lane, Mover, Report, Slice};
use super::{
    Capabilities, Job, Link, LocalTicket, Mapping, PeerInfo, RemoteKey, RemoteTicket, Transport,
    TransportKind,
};
use crate::config::AgentConfig;
use crate::{Error, Memory, Result, copy};
use kvxfer_proto::{ErrorCode, Integrity, RegionId, TransferId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Instant;

/// The transport inside one process.
pub struct InprocTransport {
    /// Unique in this process.
    instance: u64,
    mover: Arc<Mover>,
}

/// What the agents of this process know of one another.
#[derive(Default)]
struct Table {
    regions: HashMap<(u64, RegionId), Weak<Memory>>,
    /// Links by owner and session: the peer asks here whether ours can still write to its memory.
    links: HashMap<(u64, [u8; 16]), Weak<InprocLink>>,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

struct InprocLink {
    owner: u64,
    peer: u64,
    session: [u8; 16],
    lane: Lane,
    imports: Mutex<Imports>,
}

#[derive(Default)]
struct Imports {
    next: u64,
    /// The peer's region, and the length of its advert.
    regions: HashMap<RemoteKey, (RegionId, u64)>,
}

struct Mapped(Arc<Memory>);

impl InprocTransport {
    /// For one agent; `mover` moves the bytes.
    pub fn new(_config: &AgentConfig, mover: &Arc<Mover>) -> Result<Arc<Self>> {
        let instance = NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { instance, mover: Arc::clone(mover) }))
    }
}

impl Transport for InprocTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Inproc
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: true,
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
        peer.same_process.then(|| self.instance.to_le_bytes().to_vec())
    }
    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        self.register(region, memory)?;
        Ok(Some(LocalTicket { payload: self.instance.to_le_bytes().to_vec(), fd: None }))
    }
    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        TABLE.lock().regions.insert((self.instance, region), Arc::downgrade(memory));
        Ok(())
    }
    fn deregister(&self, region: RegionId) {
        TABLE.lock().regions.remove(&(self.instance, region));
    }
    fn connect(&self, peer: &PeerInfo, offer: &[u8], _deadline: Instant) -> Result<Arc<dyn Link>> {
        let peer_instance = instance(offer, "offer")?;
        if !peer.same_process {
            return Err(Error::failed(
                ErrorCode::Unreachable,
                format!("{} lives in another process; inproc reaches this one only", peer.name),
            ));
        }
        let link = Arc::new(InprocLink {
            owner: self.instance,
            peer: peer_instance,
            session: peer.session,
            lane: self.mover.lane(),
            imports: Mutex::default(),
        });
        TABLE.lock().links.insert((self.instance, peer.session), Arc::downgrade(&link));
        Ok(link)
    }
    fn shutdown(&self) {
        self.mover.shutdown();
    }
}

impl Drop for InprocTransport {
    fn drop(&mut self) {
        TABLE.lock().regions.retain(|(owner, _), _| *owner != self.instance);
    }
}

impl InprocLink {
    fn memory(&self, region: RegionId) -> Result<Arc<Memory>> {
        TABLE.lock().regions.get(&(self.peer, region)).and_then(Weak::upgrade).ok_or_else(|| {
            Error::failed(
                ErrorCode::NotFound,
                format!("region {region} is not registered at the peer any more; look it up again"),
            )
        })
    }
}

impl Link for InprocLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        if instance(&ticket.payload, "ticket")? != self.peer {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!("the ticket of region {} was made by another agent", ticket.region),
            ));
        }
        let memory = self.memory(ticket.region)?;
        if memory.len() as u64 != ticket.len {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!("region {} has {} bytes, {} were announced", ticket.region, memory.len(), ticket.len),
            ));
        }
        let mut imports = self.imports.lock();
        imports.next += 1;
        let key = RemoteKey(imports.next);
        imports.regions.insert(key, (ticket.region, ticket.len));
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        self.imports.lock().regions.remove(&key);
    }

    fn map(&self, key: RemoteKey) -> Option<Mapping> {
        let held = self.lane.hold()?;
        let (region, len) = self.imports.lock().regions.get(&key).copied()?;
        let memory = self.memory(region).ok().filter(|m| m.len() as u64 == len && !m.is_device())?;
        Some(Mapping { memory, held: Some(Arc::new(held)) })
    }

    fn submit(&self, job: Job) -> Result<()> {
        let found = self.imports.lock().regions.get(&job.remote).copied();
        let (region, len) = found.ok_or_else(|| self.lane.closed_or(super::not_imported(job.remote)))?;
        let memory = self.memory(region)?;
        let len = len.min(memory.len() as u64);
        self.lane.submit(job, Arc::new(Mapped(memory)), len)
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

    /// The peer's end of this session is closed (or was never opened, or is gone) and moves nothing any more.
    fn fenced(&self) -> bool {
        let far_end = TABLE.lock().links.get(&(self.peer, self.session)).and_then(Weak::upgrade);
        far_end.is_none_or(|link| link.lane.is_quiet())
    }

    fn describe(&self) -> String {
        "copies within this process".into()
    }
}

impl Drop for InprocLink {
    fn drop(&mut self) {
        let mut table = TABLE.lock();
        let key = (self.owner, self.session);
        // A newer link of the same session may have taken the place.
        if table.links.get(&key).is_some_and(|link| link.strong_count() == 0) {
            table.links.remove(&key);
        }
    }
}

impl Carrier for Mapped {
    fn carry(&self, job: &Job, slice: &Slice) -> Report {
        // SAFETY: submit checked the ranges against this memory's length, and `self` keeps it alive.
        unsafe { copy::carry(job, slice, self.0.as_ptr()) }
    }
}

fn instance(bytes: &[u8], what: &str) -> Result<u64> {
    bytes.try_into().map(u64::from_le_bytes).map_err(|_| {
        Error::failed(ErrorCode::Protocol, format!("inproc {what} of {} bytes; 8 were expected", bytes.len()))
    })
}

#[cfg(test)]
mod tests;
