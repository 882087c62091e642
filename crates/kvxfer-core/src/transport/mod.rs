//! The seam between the agent and what carries bytes.
//!
//! A [`Transport`] belongs to one agent. It says what it can do, registers memory and makes an `Offer`; given a
//! peer's offer it connects a [`Link`]. A link imports the peer's regions and moves [`Job`]s. Progress is pushed into
//! the job's [`Tracker`] by whichever thread moves the bytes, so nobody polls for completion; transports whose
//! library must be polled (NIXL) say so in their capabilities and get [`Transport::poll`] from the progress thread.
//!
//! Rules every implementation keeps: `submit` never blocks; each piece of a job gets exactly one outcome; the tracker is
//! finished exactly once and only when the link touches neither side's memory for that job any more; a cancelled job
//! ends at the next piece or slice boundary.

pub mod cma;
#[cfg(feature = "cuda")]
pub mod cuda_ipc;
pub mod fault;
pub mod inproc;
pub mod mover;
pub mod nixl;
mod process;
pub mod shm;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod tracker;

pub use tracker::{Outcome, Tracker};

use crate::{Memory, Result};
use kvxfer_proto::wire::HostIdentity;
use kvxfer_proto::{AgentName, Epoch, Integrity, RegionId, TransferId};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// The transports this library knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
#[non_exhaustive]
pub enum TransportKind {
    /// Inside one process.
    Inproc = 1,
    /// Shared memory on one host.
    Shm = 2,
    /// `process_vm_writev` on one host.
    Cma = 3,
    /// Sockets.
    Tcp = 4,
    /// NIXL's plug-ins.
    Nixl = 5,
    /// GPU to GPU on one host.
    CudaIpc = 6,
}

impl TransportKind {
    /// All of them, in order of preference on one host.
    pub const ALL: [Self; 6] = [Self::Inproc, Self::CudaIpc, Self::Shm, Self::Cma, Self::Nixl, Self::Tcp];
    /// Name in configuration, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inproc => "inproc",
            Self::Shm => "shm",
            Self::Cma => "cma",
            Self::Tcp => "tcp",
            Self::Nixl => "nixl",
            Self::CudaIpc => "cuda_ipc",
        }
    }
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for TransportKind {
    type Err = crate::Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == s).ok_or_else(|| crate::Error::InvalidArgument {
            argument: "transport",
            problem: format!("{s:?} is none of inproc, cuda_ipc, shm, cma, nixl, tcp"),
        })
    }
}

/// Direction of a transfer, seen from the agent that submits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Local to remote.
    Write = 1,
    /// Remote to local.
    Read = 2,
}

/// One contiguous run of bytes of a transfer: a descriptor pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Piece {
    /// Offset in the local region, bytes.
    pub local_offset: u64,
    /// Offset in the remote region, bytes.
    pub remote_offset: u64,
    /// Length, bytes; not zero.
    pub len: u64,
}

/// What a transport can do.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about a transport, not states")]
pub struct Capabilities {
    /// Reaches a peer in the same process only.
    pub same_process: bool,
    /// Reaches a peer on the same host (and PID namespace where needed) only.
    pub same_host: bool,
    /// With `same_host`: reaches a peer in another PID namespace of this kernel, too, once descriptors can be passed to it.
    pub other_pid_namespace: bool,
    /// Every piece is checked against a digest by the side it arrives at when the job's integrity is `Full`.
    pub verifies_arrival: bool,
    /// Fills [`Job::digest`] while it moves the bytes.
    pub fuses_digest: bool,
    /// Needs [`Transport::poll`] while jobs are under way.
    pub needs_poll: bool,
    /// Takes a GPU's memory; the others move host memory only.
    pub device_memory: bool,
    /// Takes [`Job::after`] into account by itself; for the others the agent waits.
    pub follows_streams: bool,
    /// What is assumed when nothing is configured (Contract line 1).
    pub default_integrity: Integrity,
}

/// The part of a ticket a transport made; the agent adds the name and passes the descriptor over the side socket.
#[derive(Debug)]
pub struct LocalTicket {
    /// Opaque to everybody else; validated by the importing side.
    pub payload: Vec<u8>,
    /// A descriptor the peer needs (shared memory).
    pub fd: Option<OwnedFd>,
}

/// A ticket as it arrived from the peer.
#[derive(Debug)]
pub struct RemoteTicket {
    /// Id of the region at the peer.
    pub region: RegionId,
    /// Length the peer stated.
    pub len: u64,
    /// Made by the peer's transport of the same kind; not trusted.
    pub payload: Vec<u8>,
    /// The descriptor that came with it.
    pub fd: Option<OwnedFd>,
}

/// An imported remote region inside one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RemoteKey(pub u64);

/// Who opened the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We connected.
    Initiator,
    /// The peer connected.
    Acceptor,
}

/// What a transport may know of a peer.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Its name.
    pub name: AgentName,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where it runs.
    pub host: HostIdentity,
    /// It shares our boot id and PID namespace.
    pub same_host: bool,
    /// It shares our boot id: the same kernel, perhaps in another container.
    pub same_kernel: bool,
    /// It is this very process.
    pub same_process: bool,
    /// Who opened the control connection.
    pub role: Role,
    /// Address of the control connection's far end, when it is TCP.
    pub address: Option<std::net::SocketAddr>,
    /// 16 random bytes both sides know (made by the acceptor, told over the authenticated connection).
    pub session: [u8; 16],
}

/// A transfer as a link sees it. Ranges have been checked against both regions' lengths.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its id.
    pub transfer: TransferId,
    /// Direction.
    pub op: Op,
    /// Local region's id, for transports that keep registrations.
    pub local_region: RegionId,
    /// Local bytes; kept alive by this handle.
    pub local: Arc<Memory>,
    /// Remote region.
    pub remote: RemoteKey,
    /// What to move; not empty.
    pub pieces: Arc<[Piece]>,
    /// Level of checking.
    pub integrity: Integrity,
    /// Nothing is read or written before this; only where the transport says `follows_streams`.
    pub after: Option<crate::cuda::Fence>,
    /// Where to leave digests of the written bytes, computed while they are hot; only when the transport says `fuses_digest`.
    pub digest: Option<Arc<SegmentDigests>>,
    /// Where outcomes go.
    pub tracker: Arc<Tracker>,
}

/// xxh3-64 of each segment of a chunk that is being written, filled by the mover.
///
/// Segment `i` covers `[base + i * SEGMENT, …)` of the remote region, the last one may be shorter; its hash is over the
/// bytes in remote order. The job's pieces cover `base..base + len` completely, in order and without gaps.
#[derive(Debug)]
pub struct SegmentDigests {
    /// Remote offset of the chunk's first byte.
    pub base: u64,
    /// Length of the chunk.
    pub len: u64,
    /// One per segment.
    pub hashes: Box<[std::sync::atomic::AtomicU64]>,
}

/// One way of carrying bytes, owned by one agent.
pub trait Transport: Send + Sync + 'static {
    /// Which one.
    fn kind(&self) -> TransportKind;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// What a peer needs to reach this agent; `None` when this peer cannot be reached this way.
    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>>;
    /// Makes memory reachable; the ticket is given to peers. Called again for each peer: registration is done once,
    /// tickets are cheap. `None` when this transport cannot carry that kind of memory as a remote side.
    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>>;
    /// Registers memory for use as a local side (and before the first ticket).
    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()>;
    /// What peers may do with a region from now on; `None` takes its tickets back. Before the first call, everything.
    /// Transports whose peers reach memory without asking this side (`shm`, `cma`) cannot enforce it.
    fn allow(&self, _region: RegionId, _access: Option<crate::agent::Access>) {}
    /// Takes a registration back. No job uses it any more.
    fn deregister(&self, region: RegionId);
    /// Connects to a peer from its offer. May take until `deadline`; never longer. Runs on the thread that called
    /// `Agent::connect` (initiator) or on a short-lived thread (acceptor), on both sides at the same time.
    fn connect(&self, peer: &PeerInfo, offer: &[u8], deadline: Instant) -> Result<Arc<dyn Link>>;
    /// The agent listens on these addresses (real ports); called once, before any peer, when there are TCP listeners.
    fn listening(&self, _addresses: &[std::net::SocketAddr]) {}
    /// A data connection for this transport arrived on the agent's listener (`tcp` only); `session` was checked to be
    /// known. Both sides' [`Transport::connect`] run at the same time, so this may come before, while or after ours runs:
    /// an early one is parked. The stream is blocking, its preamble (magic, session, lane) has been read. Progress thread:
    /// must not block.
    fn adopt(&self, _session: [u8; 16], _lane: u16, _stream: std::net::TcpStream) {}
    /// Drives a library that has no thread of its own; true when something is still under way. Progress thread only.
    fn poll(&self) -> bool {
        false
    }
    /// Ends everything; every job not yet finished finishes as [`kvxfer_proto::ErrorCode::Closed`].
    fn shutdown(&self) {}
}

/// A connected peer on one transport.
pub trait Link: Send + Sync + 'static {
    /// Makes a peer's region usable. Validates the ticket.
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey>;
    /// Forgets an imported region; jobs under way keep it alive.
    fn forget(&self, key: RemoteKey);
    /// Whether this link is for that pair of memories: a transport that reaches both may still be the wrong one.
    fn carries(&self, _region: RegionId, _local: &Memory, _remote: RemoteKey) -> bool {
        true
    }
    /// The peer's region in this process's address space, where this link has it there: what is written to it is written to the peer.
    /// As long as the mapping lives it counts as a job under way ([`Link::fenced`] at the peer's end). `None`: bytes go by jobs only.
    fn map(&self, _remote: RemoteKey) -> Option<Mapping> {
        None
    }
    /// Starts a job; never blocks. Errors before anything moved are returned, later ones go to the tracker.
    /// A job that is finished on return has cost no thread switch.
    fn submit(&self, job: Job) -> Result<()>;
    /// Lends the calling thread to a job that is under way (the waiter would sleep otherwise). Returns true if it did some of it.
    fn assist(&self, _transfer: TransferId) -> bool {
        false
    }
    /// The job's cancel flag (in its tracker) has been set: stop as soon as no write can land any more.
    fn cancel(&self, transfer: TransferId);
    /// The peer is gone or is being replaced: end all jobs with [`kvxfer_proto::ErrorCode::PeerGone`] and drop every mapping.
    fn close(&self);
    /// True when no write of the *peer* can reach our memory over this link any more (Contract line 2); asked after `close`.
    fn fenced(&self) -> bool;
    /// Why the link ended by itself, when it has: every further job is refused, and the agent may connect anew.
    fn broken(&self) -> Option<kvxfer_proto::ErrorCode> {
        None
    }
    /// For reports: address, protocol under it, stream count, … A `nixl` link that runs over RDMA says `rdma` in it.
    fn describe(&self) -> String;
}

/// A peer's region, mapped here by a link.
#[derive(Clone)]
pub struct Mapping {
    /// Where it is; its length is the region's.
    pub memory: std::sync::Arc<crate::Memory>,
    /// What the link wants to know alive meanwhile.
    pub held: Option<std::sync::Arc<dyn std::any::Any + Send + Sync>>,
}

fn not_imported(key: RemoteKey) -> crate::Error {
    crate::Error::NotFound { what: "remote region", name: key.0.to_string() }
}
