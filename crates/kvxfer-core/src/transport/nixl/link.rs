//! A connected peer: its imported regions, its state, and how it ends.

use super::engine::{Engine, Session};
use super::job::{Active, GRACE, Way};
use super::wire::Ticket;
use crate::transport::{Job, Link, RemoteKey, RemoteTicket, not_imported};
use crate::{Error, Memory, Result};
use kvxfer_proto::{AgentName, ErrorCode, RegionId, TransferId};
use nixl_sys::MemType;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long [`Link::close`] itself drives jobs to their end; what takes longer ends in the background.
const CLOSE_WAIT: Duration = Duration::from_millis(200);
/// A job of at most this many pieces and bytes is posted within submit: one request, done in microseconds over CMA.
const AT_ONCE_PIECES: usize = 16;

static NEXT_IMPORT: AtomicU64 = AtomicU64::new(1);

/// The link of one peer.
pub(super) struct NixlLink {
    engine: Arc<Engine>,
    remote: Arc<Remote>,
    /// The peer's connection metadata, to build everything up anew.
    offer: Vec<u8>,
    imports: Mutex<Imports>,
    inline_bytes: u64,
    description: String,
    /// The peer's transfers need this side's help: they run over sockets.
    needs_help: bool,
}

/// What jobs need to know of the peer.
pub(super) struct Remote {
    pub(super) peer: AgentName,
    pub(super) nixl_name: String,
    pub(super) session: Session,
    /// Of the peer's process, when it runs on this host.
    pub(super) process: Option<OwnedFd>,
    jobs: AtomicUsize,
    closed: AtomicBool,
    /// The connection failed, with this code.
    broken: AtomicU16,
    /// The connection is given up although requests had not ended; and that has been done.
    severed: AtomicBool,
    cut: AtomicBool,
    /// Slots that its transfers have.
    slots: AtomicUsize,
}

/// Imported regions.
#[derive(Default)]
struct Imports {
    next: u64,
    regions: HashMap<RemoteKey, Arc<Import>>,
    /// What NIXL holds of this peer: it can add metadata but only forget all of a peer's at once.
    loaded: Vec<Arc<Import>>,
}

/// One imported region.
pub(super) struct Import {
    /// Unique in this process.
    pub(super) id: u64,
    pub(super) kind: MemType,
    pub(super) device: u64,
    pub(super) address: u64,
    len: u64,
    pub(super) slice: u64,
    metadata: Vec<u8>,
}

impl Import {
    fn same_range(&self, other: &Self) -> bool {
        (self.kind, self.device, self.address, self.len)
            == (other.kind, other.device, other.address, other.len)
    }
    fn overlaps(&self, other: &Self) -> bool {
        (self.kind, self.device) == (other.kind, other.device)
            && self.address < other.address + other.len
            && other.address < self.address + self.len
    }
}

impl Remote {
    pub(super) fn new(
        peer: AgentName,
        nixl_name: String,
        session: Session,
        process: Option<OwnedFd>,
    ) -> Self {
        Self {
            peer,
            nixl_name,
            session,
            process,
            jobs: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            broken: AtomicU16::new(0),
            severed: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            slots: AtomicUsize::new(0),
        }
    }
    pub(super) fn job_begins(&self) {
        self.jobs.fetch_add(1, Ordering::AcqRel);
    }
    /// True when it was the last one.
    pub(super) fn job_ends(&self) -> bool {
        self.jobs.fetch_sub(1, Ordering::AcqRel) == 1
    }
    pub(super) fn jobs(&self) -> usize {
        self.jobs.load(Ordering::Acquire)
    }
    pub(super) fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
    pub(super) fn severed(&self) -> bool {
        self.severed.load(Ordering::Acquire)
    }
    pub(super) fn sever(&self) {
        self.failed();
        self.severed.store(true, Ordering::Release);
    }
    /// Whether the connection is to be given up now: true once.
    pub(super) fn to_be_cut(&self) -> bool {
        self.severed() && !self.cut.swap(true, Ordering::AcqRel)
    }
    pub(super) fn slots(&self) -> usize {
        self.slots.load(Ordering::Acquire)
    }
    pub(super) fn slot_taken(&self) {
        self.slots.fetch_add(1, Ordering::AcqRel);
    }
    pub(super) fn slot_given_back(&self) {
        self.slots.fetch_sub(1, Ordering::AcqRel);
    }
    fn broken(&self) -> Option<ErrorCode> {
        match self.broken.load(Ordering::Acquire) {
            0 => None,
            code => Some(ErrorCode::from(code)),
        }
    }
    /// Notes that a request failed. UCX does not use an endpoint again after an error, so neither do we.
    pub(super) fn failed(&self) -> ErrorCode {
        let code = if self.gone() { ErrorCode::PeerGone } else { ErrorCode::Transport };
        let _ = self.broken.compare_exchange(0, code as u16, Ordering::AcqRel, Ordering::Acquire);
        code
    }
    /// Why jobs of this peer end early.
    pub(super) fn ended(&self) -> Option<(ErrorCode, String)> {
        if self.closed() {
            return Some((ErrorCode::PeerGone, format!("{} is gone or was replaced", self.peer)));
        }
        let code = self.broken()?;
        Some((code, format!("the nixl connection to {} has failed; connect again", self.peer)))
    }
    /// The peer's process is known to have ended.
    fn gone(&self) -> bool {
        let Some(process) = &self.process else { return false };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

impl NixlLink {
    pub(super) fn new(
        engine: Arc<Engine>,
        remote: Arc<Remote>,
        offer: Vec<u8>,
        inline_bytes: u64,
        description: String,
        needs_help: bool,
    ) -> Self {
        engine.link_begins(needs_help);
        Self { engine, remote, offer, imports: Mutex::default(), inline_bytes, description, needs_help }
    }

    /// Makes the peer known to NIXL.
    pub(super) fn connect(&self) -> Result<()> {
        self.engine.load(&self.remote.nixl_name, &self.offer)
    }

    /// Makes NIXL know an import. It refuses two versions of one range and keeps what it once learned, so when the
    /// peer has registered other memory where a forgotten region was, everything is loaded anew.
    fn load(&self, imports: &mut Imports, new: &Arc<Import>) -> Result<()> {
        if imports.loaded.iter().any(|l| l.same_range(new) && l.metadata == new.metadata) {
            return Ok(());
        }
        let live = |import: &Arc<Import>| {
            !import.same_range(new) && imports.regions.values().any(|r| Arc::ptr_eq(r, import))
        };
        let conflict = imports.loaded.iter().any(|l| l.overlaps(new) && !live(l));
        if !conflict {
            self.engine.load(&self.remote.nixl_name, &new.metadata)?;
            imports.loaded.push(Arc::clone(new));
            return Ok(());
        }
        if self.remote.jobs() > 0 {
            return Err(Error::failed(
                ErrorCode::Busy,
                format!(
                    "{} has registered new memory where an old region was, and transfers to it are under way; try again when \
                     they have ended",
                    self.remote.peer
                ),
            ));
        }
        let mut keep: Vec<Arc<Import>> = imports.loaded.iter().filter(|l| live(l)).cloned().collect();
        keep.push(Arc::clone(new));
        let metadata =
            std::iter::once(self.offer.as_slice()).chain(keep.iter().map(|l| l.metadata.as_slice()));
        self.engine.reload(&self.remote.nixl_name, metadata)?;
        imports.loaded = keep;
        Ok(())
    }

    fn import_of(&self, key: RemoteKey) -> Result<Arc<Import>> {
        self.imports.lock().regions.get(&key).cloned().ok_or_else(|| not_imported(key))
    }

    fn usable(&self) -> Result<()> {
        match self.remote.ended() {
            Some((code, text)) => Err(Error::failed(code, text)),
            None if self.engine.is_closing() => {
                Err(Error::failed(ErrorCode::Closed, "the agent was shut down"))
            }
            None => Ok(()),
        }
    }
}

impl Link for NixlLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        self.usable()?;
        let Ticket { kind, device, address, len, slice, metadata, .. } =
            Ticket::decode(&ticket.payload, ticket.len, &self.remote.nixl_name)?;
        let import = Arc::new(Import {
            id: NEXT_IMPORT.fetch_add(1, Ordering::Relaxed),
            kind,
            device,
            address,
            len,
            slice,
            metadata,
        });
        let mut imports = self.imports.lock();
        self.load(&mut imports, &import)?;
        imports.next += 1;
        let key = RemoteKey(imports.next);
        imports.regions.insert(key, import);
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        self.imports.lock().regions.remove(&key);
    }

    /// From and to a device that the backends do not take: host memory of the peer's.
    fn carries(&self, region: RegionId, local: &Memory, remote: RemoteKey) -> bool {
        !local.is_device()
            || match self.engine.way(region) {
                None => false,
                Some(Way::Direct) => true,
                Some(Way::Staged) => self.import_of(remote).is_ok_and(|i| i.kind == MemType::Dram),
            }
    }

    fn submit(&self, job: Job) -> Result<()> {
        self.usable()?;
        let import = self.import_of(job.remote)?;
        let way = self
            .engine
            .way(job.local_region)
            .ok_or_else(|| Error::NotFound { what: "local region", name: job.local_region.to_string() })?;
        let at_once = job.pieces.len() <= AT_ONCE_PIECES
            && job.pieces.iter().map(|p| p.len).sum::<u64>() <= self.inline_bytes;
        self.engine.submit(Active::new(job, Arc::clone(&self.remote), import, way), at_once);
        Ok(())
    }

    fn assist(&self, transfer: TransferId) -> bool {
        self.engine.assist(transfer)
    }

    fn cancel(&self, _transfer: TransferId) {
        // The flag is seen before the next request is posted; an unposted job ends at once when nobody is driving.
        self.engine.nudge();
    }

    fn close(&self) {
        self.remote.closed.store(true, Ordering::Release);
        self.engine.settle(&self.remote, Instant::now() + CLOSE_WAIT.min(GRACE));
        if self.remote.jobs() == 0 {
            self.engine.disconnect(&self.remote);
        }
        let mut imports = self.imports.lock();
        imports.regions.clear();
        imports.loaded.clear();
    }

    fn fenced(&self) -> bool {
        // NIXL does not tell when a connection is really down, so while the peer's process may live, only the end of
        // our own NIXL agent proves that nothing of the peer's reaches our memory.
        self.engine.is_down() || (self.remote.closed() && self.remote.gone())
    }

    fn broken(&self) -> Option<ErrorCode> {
        self.remote.broken()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for NixlLink {
    fn drop(&mut self) {
        if !self.remote.closed() {
            self.close();
        }
        self.engine.link_ends(self.needs_help);
    }
}
