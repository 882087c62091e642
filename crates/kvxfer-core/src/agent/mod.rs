//! An agent: one endpoint of a process, with its regions, its peers and one progress thread.
//!
//! ```text
//! Agent ── register ──► Region ─┐                        ┌─► choose: best path that reaches both regions
//!   │                           ├─► Peer::write/read ────┼─► Link::submit (transport)  ──► Tracker ──► Transfer
//!   └─ connect ──► Peer ── region ──► RemoteRegion       └─► deadline on the progress thread
//! ```
//!
//! The public types are here; `state` is what they share, `progress` the thread that owns sockets and timers,
//! `doors`, `accept` and `connect` the ways in and out up to the end of a handshake, `links` the data paths, `reader` what a peer says and
//! who hands it on, `lane` and `conn` the way it comes, `entry` the end of a peer, `mailbox` and `inbox` the notifications, and `host` the
//! seam to the channels.

mod accept;
pub(crate) mod address;
mod builder;
mod choose;
mod conn;
mod connect;
mod doors;
mod entry;
mod held;
pub(crate) mod host;
mod identity;
mod inbox;
mod lane;
mod links;
mod mailbox;
mod peer;
mod progress;
mod reactor;
mod reader;
mod region;
mod side;
mod state;
mod transfer;
mod transports;

pub use builder::AgentBuilder;
pub use peer::PeerStats;
pub use transfer::MAX_PIECES;

use crate::memory::Memory;
use crate::transport::TransportKind;
use crate::{Error, Result};
use kvxfer_proto::wire::Message;
use kvxfer_proto::{AgentName, Epoch, ErrorCode, Integrity};
use parking_lot::Mutex;
use reactor::Command;
use region::RegionInner;
use state::{Export, Inner};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One endpoint. Cheap to clone; the last clone shuts it down (see [`Agent::shutdown`]).
///
/// Threads: everything here may be called from any thread. A child of `fork` must make agents of its own: every call
/// on one made before answers with [`ErrorCode::Closed`] there.
#[derive(Clone)]
pub struct Agent {
    handle: Arc<Handle>,
}

/// Registered memory. Cheap to clone; deregistered when the last clone, export and transfer on it are gone.
#[derive(Clone)]
pub struct Region {
    inner: Arc<RegionInner>,
}

/// A peer's exported region. Cheap to clone.
#[derive(Clone)]
pub struct RemoteRegion {
    inner: Arc<region::RemoteInner>,
}

/// A connected remote agent of one epoch. Stays valid (and answers with errors) after the peer is gone.
#[derive(Clone)]
pub struct Peer {
    agent: Arc<Inner>,
    inner: Arc<peer::PeerInner>,
}

/// A transfer under way or finished. Dropping it does not cancel it; it detaches.
#[derive(Clone)]
pub struct Transfer {
    inner: Arc<transfer::TransferInner>,
}

/// What a transfer may be told beside its pieces.
#[derive(Clone, Debug, Default)]
pub struct TransferOptions {
    /// Ends it with [`ErrorCode::TimedOut`]; default: [`crate::AgentConfig::transfer_timeout`].
    pub timeout: Option<Duration>,
    /// Sent to the peer once every byte has landed, and only then; at most [`kvxfer_proto::wire::MAX_NOTIFICATION`] bytes.
    pub notify: Option<Vec<u8>>,
    /// Level of checking; default: as configured.
    pub integrity: Option<Integrity>,
    /// Only this transport; default: the peer's best that reaches both regions.
    pub transport: Option<TransportKind>,
    /// Nothing is read or written before this point of the caller's stream: for memory that a GPU is still producing.
    pub after: Option<crate::cuda::Fence>,
}

/// A notification that arrived. Those of one peer come in the order they were sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Who sent it.
    pub peer: AgentName,
    /// What it says.
    pub payload: Vec<u8>,
}

/// What a peer of an agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Connected.
    Up,
    /// Gone; the code says why.
    Gone(ErrorCode),
}

/// How a transfer went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferReport {
    /// What carried it.
    pub transport: TransportKind,
    /// Bytes moved.
    pub bytes: u64,
    /// Pieces in all, and those that failed.
    pub pieces: usize,
    /// Pieces that failed.
    pub failed: u32,
    /// From submission to the last outcome.
    pub duration: Duration,
    /// The first failure.
    pub error: Option<ErrorCode>,
    /// In words.
    pub detail: Option<String>,
}

impl TransferReport {
    /// The failure as an error; `Ok` when every byte has landed.
    pub fn ok(&self) -> Result<()> {
        match self.error {
            None => Ok(()),
            Some(code) => Err(Error::failed(code, self.detail.clone().unwrap_or_else(|| code.to_string()))),
        }
    }
}

/// Whether a transport can be used on this agent, for `doctor` and for error texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportStatus {
    /// Which one.
    pub kind: TransportKind,
    /// Why it cannot be used; `None` when it can.
    pub reason: Option<String>,
}

impl TransportStatus {
    /// True when it can be used.
    pub fn is_available(&self) -> bool {
        self.reason.is_none()
    }
}

/// What peers may do with an exported region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Peers read.
    Read,
    /// Peers write.
    Write,
    /// Both.
    ReadWrite,
}

/// Owns the thread; the last clone of [`Agent`] drops it.
struct Handle {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Agent {
    /// Starts building one.
    pub fn builder() -> AgentBuilder {
        AgentBuilder::default()
    }
    /// Its name.
    pub fn name(&self) -> &AgentName {
        &self.handle.inner.name
    }
    /// Its epoch.
    pub fn epoch(&self) -> Epoch {
        self.handle.inner.epoch
    }
    /// Its settings.
    pub fn config(&self) -> &crate::AgentConfig {
        &self.handle.inner.config
    }
    /// Addresses it listens on, with the real port where 0 was asked for.
    pub fn addresses(&self) -> Vec<String> {
        self.handle.inner.listeners.iter().map(|l| l.address.clone()).collect()
    }
    /// Every transport this library knows, and why it cannot be used here where it cannot.
    pub fn transports(&self) -> Vec<TransportStatus> {
        self.handle.inner.status.clone()
    }
    /// Allocates shareable memory and registers it.
    pub fn allocate(&self, len: usize) -> Result<Region> {
        self.handle.inner.check()?;
        self.register(Memory::shared(len, self.handle.inner.config.shm.huge_pages)?)
    }
    /// Registers memory.
    pub fn register(&self, memory: Arc<Memory>) -> Result<Region> {
        self.handle.inner.check()?;
        Ok(Region { inner: RegionInner::register(&self.handle.inner, memory)? })
    }
    /// Makes a region reachable for every authenticated peer under `name`.
    pub fn export(&self, region: &Region, name: &str, access: Access) -> Result<()> {
        let inner = &self.handle.inner;
        inner.check()?;
        let bad = |problem: String| Error::InvalidArgument { argument: "region name", problem };
        AgentName::new(name).map_err(|e| bad(format!("{name:?}: {e}")))?;
        if !Arc::ptr_eq(&region.inner.agent, inner) {
            return Err(Error::InvalidArgument {
                argument: "region",
                problem: format!("region {} belongs to another agent", region.id()),
            });
        }
        let mut exports = inner.exports.write();
        if exports.contains_key(name) {
            return Err(bad(format!("a region is exported as {name:?} already; unexport it first")));
        }
        exports.insert(name.to_owned(), Export { region: region.inner.clone(), access });
        drop(exports);
        inner.allow(&region.inner);
        Ok(())
    }
    /// Takes an export back; peers' later transfers on it fail. Transfers of a peer that are under way at this moment
    /// still end normally: memory that is to be reused at once needs [`Peer::disconnect`] or an agreement with the peer.
    pub fn unexport(&self, name: &str) -> Result<()> {
        let inner = &self.handle.inner;
        inner.check()?;
        let export = inner.exports.write().remove(name);
        let Some(export) = export else {
            return Err(Error::NotFound { what: "exported region", name: name.to_owned() });
        };
        // The same memory may be exported under another name too.
        if !inner.allow(&export.region) {
            for peer in self.peers() {
                let _ = peer.send(Message::Unexported { region: export.region.id });
            }
        }
        Ok(())
    }
    /// Connects to a listening agent. A peer already connected under the same address and still up is returned as it is.
    pub fn connect(&self, address: &str, timeout: Duration) -> Result<Peer> {
        let inner = &self.handle.inner;
        Ok(Peer::from_inner(inner, &connect::connect(inner, address, timeout)?))
    }
    /// The connected peer of that name (either side may have opened the connection).
    pub fn peer(&self, name: &str) -> Option<Peer> {
        let inner = &self.handle.inner;
        inner.check().ok()?;
        let peer = inner.peer(&AgentName::new(name).ok()?)?;
        Some(Peer::from_inner(inner, &peer))
    }
    /// All peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        let inner = &self.handle.inner;
        if inner.check().is_err() {
            return Vec::new();
        }
        let table = inner.peers.read();
        table.by_name.values().filter(|p| p.is_up()).map(|p| Peer::from_inner(inner, p)).collect()
    }
    /// Next notification, if one is there.
    pub fn try_notification(&self) -> Option<Notification> {
        let inner = &self.handle.inner;
        if identity::forked_since(inner.made_in) { None } else { inner.inbox.try_pop() }
    }
    /// Waits for the next notification; `Ok(None)` when the time is over.
    pub fn notification(&self, timeout: Duration) -> Result<Option<Notification>> {
        let inner = &self.handle.inner;
        inner.check()?;
        inner.check_may_wait("Agent::notification")?;
        match inner.inbox.wait(Instant::now() + timeout, inner.config.spin) {
            Some(n) => Ok(Some(n)),
            None => inner.check().map(|()| None),
        }
    }
    /// Readable while something has happened since [`Agent::clear_event`]: a transfer ended or a notification came.
    /// For epoll and asyncio. Owned by the agent: do not close it.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.handle.inner.inbox.outside()
    }
    /// Makes [`Agent::event_fd`] unreadable until the next event. Call it before looking at transfers and notifications.
    pub fn clear_event(&self) {
        if !identity::forked_since(self.handle.inner.made_in) {
            self.handle.inner.inbox.clear();
        }
    }
    /// Metrics in Prometheus text format.
    pub fn metrics(&self) -> String {
        if identity::forked_since(self.handle.inner.made_in) {
            return String::new();
        }
        self.handle.inner.metrics.text()
    }
    /// The gauges of a pool, for its channel to set.
    pub(crate) fn pool_gauges(&self, pool: &str) -> crate::metrics::PoolGauges {
        self.handle.inner.metrics.pool(pool)
    }
    /// Adds a channel; it is asked in the order of addition and forgotten when it is dropped. Refuses a second pool of a
    /// name that is taken: senders could not tell the two apart.
    pub(crate) fn add_host(&self, host: std::sync::Weak<dyn host::Host>) -> Result<()> {
        let inner = &self.handle.inner;
        let pool = host.upgrade().and_then(|h| h.pool());
        // Dropped after the lock: one of them may be the last to hold its channel.
        let others: Vec<_>;
        let mut hosts = inner.hosts.write();
        others = hosts.iter().filter_map(std::sync::Weak::upgrade).collect();
        if pool.is_some() && others.iter().any(|h| h.pool() == pool) {
            return Err(Error::InvalidArgument {
                argument: "pool",
                problem: format!(
                    "{:?} is open on this agent already; close it first, or name this one differently",
                    pool.unwrap_or_default()
                ),
            });
        }
        hosts.push(host.clone());
        drop(hosts);
        inner.reactor.command(Command::HostAdded(host));
        Ok(())
    }
    /// Makes the progress thread ask every host's tick, at the latest then. It is not woken if it looks at its clock in time anyway.
    pub(crate) fn schedule(&self, latest: Instant) {
        let reactor = &self.handle.inner.reactor;
        reactor.tick_wanted.store(true, Ordering::SeqCst);
        if !reactor.is_progress_thread() && reactor.sleeps_beyond(latest) {
            reactor.wake();
        }
    }
    /// Looks after what all peers say on the caller's thread until `done`, at most so long; see [`Peer::attend`].
    pub(crate) fn attend(&self, at_most: Duration, done: impl FnMut() -> bool) {
        let inner = &self.handle.inner;
        let peers: Vec<_> = inner.peers.read().by_name.values().cloned().collect();
        reader::attend(inner, peers, at_most, done);
    }
    /// True when the two are clones of one agent.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }
    /// Ends everything in order: transfers are cancelled, peers told, threads joined. Further calls fail with [`ErrorCode::Closed`].
    ///
    /// An error says that something was still under way after `timeout`: a peer has not confirmed that it stopped
    /// writing to our memory, so that memory may not be reused yet.
    pub fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.handle.shutdown(timeout)
    }
}

impl Handle {
    fn shutdown(&self, timeout: Duration) -> Result<()> {
        if identity::forked_since(self.inner.made_in) {
            return Err(identity::forked_error());
        }
        let deadline = Instant::now() + timeout;
        self.inner.closed.store(true, Ordering::Release);
        self.inner.inbox.shut();
        self.inner.reactor.command(Command::Shutdown(deadline));
        if self.inner.reactor.is_progress_thread() {
            // A channel's callback held the last clone: the thread ends itself after it.
            return Ok(());
        }
        let Some(result) = self.inner.wait_ended(deadline + Duration::from_millis(500)) else {
            return Err(Error::TimedOut {
                operation: format!("shutting down agent {:?}", self.inner.name.as_str()),
                after: timeout,
            });
        };
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        result
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if identity::forked_since(self.inner.made_in) {
            // Thread, sockets and mappings are the parent's: leave this copy of everything alone.
            std::mem::forget(self.inner.clone());
            std::mem::forget(self.thread.lock().take());
            return;
        }
        if let Err(e) = self.shutdown(Duration::from_secs(1)) {
            tracing::debug!(agent = %self.inner.name, error = %e, "dropped");
        }
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("name", &self.name().as_str())
            .field("epoch", &self.epoch().0)
            .field("addresses", &self.addresses())
            .finish_non_exhaustive()
    }
}
