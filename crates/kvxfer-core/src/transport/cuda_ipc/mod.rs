//! `cuda_ipc`: both agents run on this host and at least one side of a transfer is a GPU's memory.
//!
//! The remote side is mapped here: a CUDA IPC handle (with the region's offset in its allocation), a file descriptor of virtual
//! memory, the very memory when both agents live in this process, or the memfd of a host pool, which is pinned here before its first
//! copy. So a transfer is copies between two addresses of this process, whether they lie on one device, on two, or on a device and in
//! host memory; the bytes cross once.
//!
//! `submit` gives the copies to a device's engine and returns; the transfer's end is an event that the waiter and the progress thread
//! look at. What was submitted to a device cannot be called back: a cancelled job starts nothing more and ends when what is under way
//! has ended, a fraction of a millisecond later. Only then is it finished, so no byte changes afterwards.
//!
//! One-sided transfers are not checked below the channels: on a device that would read everything once more. Channels check on arrival.

mod active;
mod jobs;
mod link;
mod target;
mod ticket;

use self::jobs::Jobs;
use self::link::{CudaLink, Place};
use self::ticket::What;
use super::process::{Card, PeerProcess};
use super::{Capabilities, Link, LocalTicket, PeerInfo, Transport, TransportKind};
use crate::memory::MemoryKind;
use crate::{Error, Memory, Result, cuda};
use kvxfer_proto::{ErrorCode, Integrity, RegionId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Instant;

const VERSION: u8 = 1;

/// The transport between GPUs of one host.
pub struct CudaIpcTransport {
    /// Unique in this process.
    instance: u64,
    /// Jobs of all links, also of closed ones until they have ended.
    jobs: Mutex<Vec<Arc<Jobs>>>,
}

/// What the agents of this process know of one another.
#[derive(Default)]
struct Table {
    regions: HashMap<(u64, RegionId), Weak<Memory>>,
    /// Jobs by owner and session: the peer asks here whether ours can still write to its memory.
    jobs: HashMap<(u64, [u8; 16]), Weak<Jobs>>,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

impl CudaIpcTransport {
    /// For one agent. An error where the driver library is missing; the driver itself is not woken before device memory is used.
    pub fn new() -> Result<Arc<Self>> {
        cuda::library()?;
        let instance = NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { instance, jobs: Mutex::default() }))
    }
}

impl Transport for CudaIpcTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::CudaIpc
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: false,
            same_host: true,
            other_pid_namespace: true,
            verifies_arrival: false,
            fuses_digest: false,
            needs_poll: true,
            device_memory: true,
            follows_streams: true,
            default_integrity: Integrity::Bound,
        }
    }

    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        if !peer.same_kernel {
            return None;
        }
        let mut payload = vec![VERSION];
        Card::own().encode(&mut payload);
        payload.extend_from_slice(&self.instance.to_le_bytes());
        Some(payload)
    }

    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        let what = match (memory.block(), memory.kind(), memory.fd()) {
            (Some(block), ..) => What::Block(cuda::export(block, memory.len())?),
            (None, MemoryKind::Memfd, Some(fd)) => What::Pool(fd.try_clone_to_owned().map_err(|e| {
                Error::system("dup of a pool's memfd", e, "raise the limit of open files (ulimit -n)")
            })?),
            // Private host memory: agents of this process only.
            _ => What::Private,
        };
        let payload = what.encode(self.instance, region, memory.len() as u64);
        let fd = what.into_fd();
        Ok(Some(LocalTicket { payload, fd }))
    }

    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        TABLE.lock().regions.insert((self.instance, region), Arc::downgrade(memory));
        Ok(())
    }
    fn deregister(&self, region: RegionId) {
        TABLE.lock().regions.remove(&(self.instance, region));
    }

    fn connect(&self, peer: &PeerInfo, offer: &[u8], _deadline: Instant) -> Result<Arc<dyn Link>> {
        let parts = match offer {
            [VERSION, rest @ ..] if rest.len() == Card::LEN + 8 => {
                rest.split_first_chunk::<{ Card::LEN }>().zip(rest.last_chunk::<8>())
            }
            _ => None,
        };
        let Some(((card, _), instance)) = parts else {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!(
                    "cuda_ipc offer of {} bytes, version {:?}; this build speaks version {VERSION}",
                    offer.len(),
                    offer.first()
                ),
            ));
        };
        if !peer.same_kernel {
            return Err(Error::failed(
                ErrorCode::Unreachable,
                format!("{} is on another host; use nixl or tcp", peer.name),
            ));
        }
        let place = if peer.same_process {
            Place::Here
        } else if peer.same_host {
            Place::Process(PeerProcess::open(Card::decode(*card), peer.host.pid)?)
        } else {
            Place::OtherNamespace
        };
        let jobs = Arc::new(Jobs::default());
        self.jobs.lock().push(jobs.clone());
        let mut table = TABLE.lock();
        table.jobs.retain(|_, j| j.strong_count() > 0);
        table.jobs.insert((self.instance, peer.session), Arc::downgrade(&jobs));
        drop(table);
        Ok(Arc::new(CudaLink::new(peer, place, u64::from_le_bytes(*instance), jobs)))
    }

    fn poll(&self) -> bool {
        let jobs: Vec<_> = self.jobs.lock().clone();
        let mut busy = false;
        for jobs in &jobs {
            busy |= jobs.drive();
        }
        drop(jobs);
        // Links that are gone, with nothing left to end.
        self.jobs.lock().retain(|j| Arc::strong_count(j) > 1 || !j.is_quiet());
        busy
    }

    fn shutdown(&self) {
        let jobs: Vec<_> = std::mem::take(&mut *self.jobs.lock());
        for jobs in jobs {
            jobs.close(ErrorCode::Closed, "the agent was shut down");
            jobs.drain();
        }
    }
}

impl Drop for CudaIpcTransport {
    fn drop(&mut self) {
        TABLE.lock().regions.retain(|(owner, _), _| *owner != self.instance);
    }
}
