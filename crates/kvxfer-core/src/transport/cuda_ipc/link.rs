//! A connected peer: its imported regions and the jobs on them.

use super::active::{Active, Ready};
use super::jobs::Jobs;
use super::target::{self, Held, Pool, Target};
use super::ticket::{Read, What};
use super::{PeerProcess, TABLE};
use crate::cuda::{Device, Export, Opened, Way};
use crate::transport::{Job, Link, Mapping, PeerInfo, RemoteKey, RemoteTicket, not_imported};
use crate::{Error, Memory, Result};
use kvxfer_proto::{ErrorCode, RegionId, TransferId};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock, Weak};

/// Openings kept after their last region was forgotten: an engine that registers per request would pay for a mapping each time.
const KEPT: usize = 16;

/// Where the peer lives.
pub(super) enum Place {
    /// In this process.
    Here,
    /// In another one that we see.
    Process(PeerProcess),
    /// In another PID namespace: handles do not open there, descriptors do. The agent watches its process.
    OtherNamespace,
}

pub(super) struct CudaLink {
    place: Place,
    peer: u64,
    session: [u8; 16],
    jobs: Arc<Jobs>,
    imports: Mutex<Imports>,
}

#[derive(Default)]
struct Imports {
    next: u64,
    regions: HashMap<RemoteKey, Arc<Target>>,
    kept: VecDeque<Arc<Opened>>,
}

impl CudaLink {
    pub(super) fn new(peer: &PeerInfo, place: Place, instance: u64, jobs: Arc<Jobs>) -> Self {
        Self { place, peer: instance, session: peer.session, jobs, imports: Mutex::default() }
    }

    fn target(&self, key: RemoteKey) -> Option<Arc<Target>> {
        self.imports.lock().regions.get(&key).cloned()
    }

    fn open(&self, ticket: RemoteTicket) -> Result<Target> {
        let len = ticket.len;
        let read = Read::new(&ticket.payload, len, ticket.fd)?;
        if read.instance != self.peer || read.region != ticket.region {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!(
                    "the cuda_ipc ticket of region {} was made for another region or agent",
                    ticket.region
                ),
            ));
        }
        if matches!(self.place, Place::Here) {
            let memory = target::here(self.peer, ticket.region)?;
            if memory.len() as u64 != len {
                return Err(Error::failed(
                    ErrorCode::Protocol,
                    format!("region {} has {} bytes, {len} were announced", ticket.region, memory.len()),
                ));
            }
            let device = memory.on_device().cloned();
            return Ok(Target::Here { owner: self.peer, region: ticket.region, device });
        }
        match read.what {
            What::Block(Export { way: Way::Handle(_), .. })
                if matches!(self.place, Place::OtherNamespace) =>
            {
                Err(Error::failed(
                    ErrorCode::Unsupported,
                    "CUDA IPC handles do not reach another PID namespace; the peer's memory must be shareable (kvxfer's own kind, \
                     or virtual memory that its owner made exportable)",
                ))
            }
            What::Block(export) => {
                let opened = Opened::open(&export)?;
                if export.offset > opened.size() || len > opened.size() - export.offset {
                    return Err(Error::failed(
                        ErrorCode::Protocol,
                        format!(
                            "region {} of {len} bytes at {} is larger than its allocation of {} bytes",
                            ticket.region,
                            export.offset,
                            opened.size()
                        ),
                    ));
                }
                Ok(Target::Opened { opened, offset: export.offset, len })
            }
            What::Private => Err(Error::failed(
                ErrorCode::Unsupported,
                "private host memory of another process; allocate it with kvxfer, and devices here reach it",
            )),
            What::Pool(fd) => {
                let len = usize::try_from(len)
                    .map_err(|e| Error::failed(ErrorCode::Protocol, format!("{len} bytes: {e}")))?;
                Ok(Target::Pool(Arc::new(Pool::new(fd, len))))
            }
        }
    }
}

/// Both sides ready for a device: at once where nothing must be pinned, else by a thread of its own.
fn prepare(target: &Arc<Target>, local: &Arc<Memory>) -> Result<Ready> {
    let held = match &**target {
        Target::Opened { opened, offset, .. } => {
            Some(Held::Opened { opened: opened.clone(), offset: *offset })
        }
        Target::Here { owner, region, .. } => Some(Held::Memory(target::here(*owner, *region)?)),
        Target::Pool(pool) => pool.ready().map(Held::Memory),
    };
    let to_pin = |m: &Memory| !m.is_device() && !m.is_pinned();
    let ready = Ready::default();
    let far_is_fine = match &held {
        Some(Held::Memory(m)) => !to_pin(m),
        Some(Held::Opened { .. }) => true,
        None => false,
    };
    if let (true, false, Some(held)) = (far_is_fine, to_pin(local), held.clone()) {
        return Ok(Arc::new(OnceLock::from(Ok(held))));
    }
    let (answer, target, local) = (ready.clone(), target.clone(), local.clone());
    crate::threads::spawn("kvxfer-pin", move || {
        let made = (|| {
            local.pin()?;
            match (held, &*target) {
                (Some(Held::Memory(m)), _) => m.pin().map(|()| Held::Memory(m)),
                (Some(opened), _) => Ok(opened),
                (None, Target::Pool(pool)) => pool.open().map(Held::Memory),
                (None, _) => Err(Error::failed(ErrorCode::NotFound, "the region is gone")),
            }
        })();
        let _ = answer.set(made);
    })
    .map_err(|e| {
        Error::system("starting the thread that pins memory", e, "raise the limit of threads (ulimit -u)")
    })?;
    Ok(ready)
}

impl Link for CudaLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        let target = Arc::new(self.open(ticket)?);
        let mut imports = self.imports.lock();
        imports.next += 1;
        let key = RemoteKey(imports.next);
        imports.regions.insert(key, target);
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        let mut imports = self.imports.lock();
        let gone = imports.regions.remove(&key);
        let mut dropped = None;
        if let Some(Target::Opened { opened, .. }) = gone.as_deref()
            && opened.is_found_again()
        {
            // Ones that are known already move to the front.
            imports.kept.retain(|o| !Arc::ptr_eq(o, opened));
            imports.kept.push_front(opened.clone());
            if imports.kept.len() > KEPT {
                dropped = imports.kept.pop_back();
            }
        }
        drop(imports);
        // Unmapping takes time; not under the lock.
        drop((gone, dropped));
    }

    fn carries(&self, _region: RegionId, local: &Memory, remote: RemoteKey) -> bool {
        local.is_device() || self.target(remote).is_some_and(|t| t.device().is_some())
    }

    /// Another process's device memory only: kernels here write to it, and the peer waits for this process to end before it reuses any
    /// of it after a lost connection.
    fn map(&self, key: RemoteKey) -> Option<Mapping> {
        let target = self.target(key)?;
        let Target::Opened { opened, offset, len } = &*target else { return None };
        let memory = Memory::device_opened(opened, *offset, usize::try_from(*len).ok()?)?;
        Some(Mapping { memory, held: None })
    }

    fn submit(&self, job: Job) -> Result<()> {
        let target = self.target(job.remote).ok_or_else(|| not_imported(job.remote))?;
        let here: Option<&Device> = job.local.on_device();
        let there = target.device();
        let engine = match job.local.block() {
            Some(block) => block.engine()?,
            None => target.engine()?,
        };
        let kernel = match (here, there) {
            (Some(a), Some(b)) => a.reaches(b)?,
            _ => true,
        };
        let ready = prepare(&target, &job.local)?;
        self.jobs.add(Active::new(job, engine, kernel, ready))
    }

    fn assist(&self, transfer: TransferId) -> bool {
        // The waiter looks at the event itself: it learns of the end at once, and nobody needs to wake it.
        self.jobs.drive() && self.jobs.has(transfer)
    }
    fn cancel(&self, _transfer: TransferId) {
        // The flag is in the tracker.
        self.jobs.drive();
    }
    fn close(&self) {
        self.jobs.close(ErrorCode::PeerGone, "the peer is gone or was replaced");
        let gone = std::mem::take(&mut *self.imports.lock());
        drop(gone);
    }

    /// The peer may write through its mapping until its process has ended; within a process, until its end of the session is closed.
    fn fenced(&self) -> bool {
        match &self.place {
            Place::Process(process) => return process.exited(),
            Place::OtherNamespace => return false,
            Place::Here => {}
        }
        let far_end = TABLE.lock().jobs.get(&(self.peer, self.session)).and_then(Weak::upgrade);
        far_end.is_none_or(|jobs| jobs.is_quiet())
    }

    fn describe(&self) -> String {
        let imports = self.imports.lock();
        let mut devices: Vec<_> =
            imports.regions.values().filter_map(|t| t.device().map(ToString::to_string)).collect();
        devices.sort();
        devices.dedup();
        let place = match &self.place {
            Place::Here => "within this process".to_owned(),
            Place::Process(p) => format!("process {}", p.pid),
            Place::OtherNamespace => "a process of another PID namespace".to_owned(),
        };
        let on = if devices.is_empty() { String::new() } else { format!(" on {}", devices.join(", ")) };
        format!("{place}, for GPU memory, {} regions{on}", imports.regions.len())
    }
}

impl Drop for CudaLink {
    fn drop(&mut self) {
        // The transport keeps the jobs until the last has ended.
        self.jobs.close(ErrorCode::PeerGone, "the link was dropped");
    }
}
