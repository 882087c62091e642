//! An agent: one endpoint of a process, with its regions, its peers and one progress thread.

pub(crate) mod host;

use crate::config::AgentConfig;
use crate::transport::{Op, Outcome, Piece, SegmentDigests, Transport, TransportKind};
use crate::{Memory, Result};
use kvxfer_proto::{AgentName, Epoch, ErrorCode, Integrity, RegionId, TransferId};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// One endpoint. Cheap to clone; the last clone shuts it down (see [`Agent::shutdown`]).
#[derive(Clone)]
pub struct Agent {
    _inner: Arc<()>,
}

/// Builds an [`Agent`]; starts from [`AgentConfig::default`] and, when asked, the environment.
pub struct AgentBuilder {
    config: AgentConfig,
    transports: Vec<Arc<dyn Transport>>,
}

/// Registered memory. Cheap to clone; deregistered when the last clone and the last transfer on it are gone.
#[derive(Clone)]
pub struct Region {
    _inner: Arc<()>,
}

/// A peer's exported region.
#[derive(Clone)]
pub struct RemoteRegion {
    _inner: Arc<()>,
}

/// A connected remote agent of one epoch. Stays valid (and answers with errors) after the peer is gone.
#[derive(Clone)]
pub struct Peer {
    _inner: Arc<()>,
}

/// A transfer under way or finished. Dropping it does not cancel it; it detaches.
pub struct Transfer {
    _inner: Arc<()>,
}

/// What a transfer may be told beside its pieces.
#[derive(Clone, Debug, Default)]
pub struct TransferOptions {
    /// Ends it with [`ErrorCode::TimedOut`]; default: [`AgentConfig::transfer_timeout`].
    pub timeout: Option<Duration>,
    /// Sent to the peer once every byte has landed, and only then; at most [`kvxfer_proto::wire::MAX_NOTIFICATION`] bytes.
    pub notify: Option<Vec<u8>>,
    /// Level of checking; default: as configured.
    pub integrity: Option<Integrity>,
    /// Only this transport; default: the peer's best that reaches both regions.
    pub transport: Option<TransportKind>,
}

/// A notification that arrived.
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

impl AgentBuilder {
    /// Replaces the whole configuration.
    pub fn config(mut self, config: AgentConfig) -> Self {
        self.config = config;
        self
    }
    /// Sets the name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.config.name = Some(name.into());
        self
    }
    /// Adds a listening address, `tcp://host:port` or `unix:///path`.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.config.listen.push(address.into());
        self
    }
    /// Sets the pre-shared key.
    pub fn auth_key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.config.auth_key = Some(crate::config::Secret::new(key));
        self
    }
    /// Allows only these transports, in this order.
    pub fn allow(mut self, kinds: impl IntoIterator<Item = TransportKind>) -> Self {
        self.config.transports.allow = kinds.into_iter().collect();
        self
    }
    /// Adds a transport of the caller's own (or a decorated one), asked before the built-in ones.
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transports.push(transport);
        self
    }
    /// Overlays `KVXFER_*` environment variables (the only place that reads them).
    pub fn env(self) -> Result<Self> {
        todo!("runtime")
    }
    /// Starts the agent: listeners are bound and the progress thread runs when this returns.
    pub fn build(self) -> Result<Agent> {
        let _ = self.transports;
        todo!("runtime")
    }
}

impl Agent {
    /// Starts building one.
    pub fn builder() -> AgentBuilder {
        AgentBuilder { config: AgentConfig::default(), transports: Vec::new() }
    }
    /// Its name.
    pub fn name(&self) -> &AgentName {
        todo!("runtime")
    }
    /// Its epoch.
    pub fn epoch(&self) -> Epoch {
        todo!("runtime")
    }
    /// Addresses it listens on, with the real port where 0 was asked for.
    pub fn addresses(&self) -> Vec<String> {
        todo!("runtime")
    }
    /// Allocates shareable memory and registers it.
    pub fn allocate(&self, _len: usize) -> Result<Region> {
        todo!("runtime")
    }
    /// Registers memory.
    pub fn register(&self, _memory: Arc<Memory>) -> Result<Region> {
        todo!("runtime")
    }
    /// Makes a region reachable for every authenticated peer under `name`.
    pub fn export(&self, _region: &Region, _name: &str, _access: Access) -> Result<()> {
        todo!("runtime")
    }
    /// Takes an export back; peers' later transfers on it fail.
    pub fn unexport(&self, _name: &str) -> Result<()> {
        todo!("runtime")
    }
    /// Connects to a listening agent. A peer already connected under the same address and still up is returned as it is.
    pub fn connect(&self, _address: &str, _timeout: Duration) -> Result<Peer> {
        todo!("runtime")
    }
    /// The connected peer of that name (either side may have opened the connection).
    pub fn peer(&self, _name: &str) -> Option<Peer> {
        todo!("runtime")
    }
    /// All peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        todo!("runtime")
    }
    /// Next notification, if one is there.
    pub fn try_notification(&self) -> Option<Notification> {
        todo!("runtime")
    }
    /// Waits for the next notification; `Ok(None)` when the time is over.
    pub fn notification(&self, _timeout: Duration) -> Result<Option<Notification>> {
        todo!("runtime")
    }
    /// Readable while something has happened since [`Agent::clear_event`]: a transfer ended or a notification came.
    /// For epoll and asyncio. Owned by the agent: do not close it.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        todo!("runtime")
    }
    /// Makes [`Agent::event_fd`] unreadable until the next event. Call it before looking at transfers and notifications.
    pub fn clear_event(&self) {
        todo!("runtime")
    }
    /// Metrics in Prometheus text format.
    pub fn metrics(&self) -> String {
        todo!("runtime")
    }
    /// Adds a channel; it is asked in the order of addition and forgotten when it is dropped.
    pub(crate) fn add_host(&self, _host: std::sync::Weak<dyn host::Host>) {
        todo!("runtime")
    }
    /// Makes the progress thread ask every host's tick soon.
    pub(crate) fn schedule(&self) {
        todo!("runtime")
    }
    /// Ends everything in order: transfers are cancelled, peers told, threads joined. Further calls fail with [`ErrorCode::Closed`].
    pub fn shutdown(&self, _timeout: Duration) -> Result<()> {
        todo!("runtime")
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

impl Region {
    /// Its id.
    pub fn id(&self) -> RegionId {
        todo!("runtime")
    }
    /// Its memory.
    pub fn memory(&self) -> &Arc<Memory> {
        todo!("runtime")
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        todo!("runtime")
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl RemoteRegion {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        todo!("runtime")
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// Transports that reach it, best first.
    pub fn transports(&self) -> Vec<TransportKind> {
        todo!("runtime")
    }
}

impl Peer {
    /// Its name.
    pub fn name(&self) -> &AgentName {
        todo!("runtime")
    }
    /// Its epoch; another one means another process.
    pub fn epoch(&self) -> Epoch {
        todo!("runtime")
    }
    /// Up or gone.
    pub fn state(&self) -> PeerState {
        todo!("runtime")
    }
    /// Looks up a region the peer exports.
    pub fn region(&self, _name: &str, _timeout: Duration) -> Result<RemoteRegion> {
        todo!("runtime")
    }
    /// Starts moving local bytes to the peer. Does not block.
    pub fn write(
        &self,
        local: &Region,
        remote: &RemoteRegion,
        pieces: &[Piece],
        options: TransferOptions,
    ) -> Result<Transfer> {
        self.submit(Op::Write, local, remote, pieces, options)
    }
    /// Starts moving the peer's bytes here. Does not block.
    pub fn read(
        &self,
        local: &Region,
        remote: &RemoteRegion,
        pieces: &[Piece],
        options: TransferOptions,
    ) -> Result<Transfer> {
        self.submit(Op::Read, local, remote, pieces, options)
    }
    /// [`Peer::write`] or [`Peer::read`].
    pub fn submit(
        &self,
        _op: Op,
        _local: &Region,
        _remote: &RemoteRegion,
        _pieces: &[Piece],
        _options: TransferOptions,
    ) -> Result<Transfer> {
        todo!("runtime")
    }
    /// Sends a notification without data. Does not block.
    pub fn notify(&self, _payload: &[u8]) -> Result<()> {
        todo!("runtime")
    }
    /// Queues a control message; does not block. Fails when the peer is gone or its queue is full.
    pub(crate) fn send(&self, _message: kvxfer_proto::wire::Message) -> Result<()> {
        todo!("runtime")
    }
    /// What peers must be told to reach `region` (a pool's region travels in `Attached`).
    pub(crate) fn advert(&self, _region: &Region, _name: &str) -> Result<kvxfer_proto::wire::RegionAdvert> {
        todo!("runtime")
    }
    /// Imports a region from its advert on every connected transport that has a ticket for it.
    pub(crate) fn import(&self, _advert: &kvxfer_proto::wire::RegionAdvert) -> Result<RemoteRegion> {
        todo!("runtime")
    }
    /// Like [`Peer::write`], and the mover leaves segment digests in `digests` when it can (see [`Peer::fuses_digest`]).
    pub(crate) fn write_with_digests(
        &self,
        _local: &Region,
        _remote: &RemoteRegion,
        _pieces: &[Piece],
        _options: TransferOptions,
        _digests: Option<Arc<SegmentDigests>>,
    ) -> Result<Transfer> {
        todo!("runtime")
    }
    /// True when the transport that would carry a write from `local` to `remote` fills [`SegmentDigests`] while copying.
    pub(crate) fn fuses_digest(&self, _local: &Region, _remote: &RemoteRegion) -> bool {
        todo!("runtime")
    }
    /// Connected transports, best first, each with a description (address, streams, protocol underneath).
    pub fn paths(&self) -> Vec<(TransportKind, String)> {
        todo!("runtime")
    }
    /// Disconnects; transfers under way end with [`ErrorCode::PeerGone`].
    pub fn disconnect(&self) {
        todo!("runtime")
    }
}

impl Transfer {
    /// Its id.
    pub fn id(&self) -> TransferId {
        todo!("runtime")
    }
    /// True when it has ended; its memory is not touched any more.
    pub fn is_finished(&self) -> bool {
        todo!("runtime")
    }
    /// Waits for the end and tells how it went; [`crate::Error::TimedOut`] when `timeout` passes first (the transfer goes on until its own deadline).
    pub fn wait(&self, _timeout: Duration) -> Result<TransferReport> {
        todo!("runtime")
    }
    /// The report, once finished.
    pub fn report(&self) -> Option<TransferReport> {
        todo!("runtime")
    }
    /// Outcome of piece `i`.
    pub fn outcome(&self, _i: usize) -> Option<Outcome> {
        todo!("runtime")
    }
    /// Asks it to end. `true`: it has ended and no byte changes any more (`Done`). `false`: not yet; wait for it.
    pub fn cancel(&self) -> bool {
        todo!("runtime")
    }
}

impl std::future::Future for Transfer {
    type Output = TransferReport;
    fn poll(
        self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<TransferReport> {
        todo!("runtime")
    }
}
