//! A connected remote agent.

use super::conn::Conn;
use super::host;
use super::inbox::Mailbox;
use super::lane::Lane;
use super::links::{Assembled, Path};
use super::mailbox::{Producer, Pushed};
use super::reactor::Command;
use super::reader::{self, Reader};
use super::region::{RegionInner, RemoteInner};
use super::side::SideChannel;
use super::state::Inner;
use super::{Access, Peer, PeerState, Region, RemoteRegion, Transfer, TransferOptions, transfer};
use crate::metrics::PathStats;
use crate::transport::{Capabilities, Mapping, Op, PeerInfo, Piece, SegmentDigests, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::wire::{MAX_NOTIFICATION, Message, RegionAdvert};
use kvxfer_proto::{AgentName, Epoch, ErrorCode, RegionId, Time};
use parking_lot::{Condvar, Mutex, RwLock};
use prometheus_client::metrics::counter::Counter;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Most region queries under way to one peer.
const MAX_QUERIES: usize = 1024;

/// One peer of one epoch over one control connection.
pub(crate) struct PeerInner {
    pub(crate) id: u64,
    pub(crate) info: PeerInfo,
    /// The address we called, when we did.
    pub(crate) dialled: Option<String>,
    pub(crate) conn: Arc<Conn>,
    /// Best first.
    pub(crate) paths: Vec<Path>,
    skipped: Vec<(TransportKind, String)>,
    /// Taken away when the peer is fenced, as are the two below: stale handles keep no descriptors.
    side: Mutex<Option<Arc<SideChannel>>>,
    pub(crate) outbox: RwLock<Option<Producer>>,
    pub(crate) mailbox: Option<Arc<Mailbox>>,
    lane: Mutex<Option<Arc<Lane>>>,
    pub(crate) reader: Mutex<Reader>,
    /// When something of it came last, on the channels' clock.
    last_heard: AtomicU64,
    pub(crate) pidfd: Mutex<Option<OwnedFd>>,
    gone: AtomicU16,
    gone_text: Mutex<String>,
    /// Our transfers under way with this peer.
    pub(crate) in_flight: AtomicU64,
    queries: Mutex<HashMap<u64, Arc<Query>>>,
    imports: Mutex<HashMap<RegionId, Vec<Weak<RemoteInner>>>>,
    /// Notifications of this peer that came over the control connection and wait.
    pub(crate) waiting_notifications: Arc<AtomicUsize>,
    pub(crate) sent: Counter,
    pub(crate) received: Counter,
    since: Instant,
}

#[derive(Default)]
struct Query {
    answer: Mutex<Option<Result<Option<RegionAdvert>>>>,
    answered: Condvar,
}

impl PeerInner {
    pub(crate) fn new(agent: &Inner, a: Assembled, dialled: Option<String>, conn: Arc<Conn>) -> Arc<Self> {
        let (sent, received) = agent.metrics.notifications(&a.info.name);
        if let Some(lane) = a.lane {
            conn.use_lane(lane);
        }
        Arc::new(Self {
            id: agent.id(),
            info: a.info,
            dialled,
            conn,
            paths: a.paths,
            skipped: a.skipped,
            side: Mutex::new(a.side),
            outbox: RwLock::new(a.outbox),
            mailbox: a.invited.mailbox,
            lane: Mutex::new(a.invited.lane),
            reader: Mutex::default(),
            last_heard: AtomicU64::new(host::now().0),
            pidfd: Mutex::new(a.pidfd),
            gone: AtomicU16::new(0),
            gone_text: Mutex::default(),
            in_flight: AtomicU64::new(0),
            queries: Mutex::default(),
            imports: Mutex::default(),
            waiting_notifications: Arc::default(),
            sent,
            received,
            since: Instant::now(),
        })
    }

    pub(crate) fn side(&self) -> Option<Arc<SideChannel>> {
        self.side.lock().clone()
    }

    /// Where its control messages come, when it is on this host.
    pub(crate) fn lane(&self) -> Option<Arc<Lane>> {
        self.lane.lock().clone()
    }

    /// Something came.
    pub(crate) fn heard(&self) {
        self.last_heard.store(host::now().0, Ordering::Relaxed);
    }

    /// When something came last.
    pub(crate) fn last_heard(&self) -> Instant {
        host::to_instant(Time(self.last_heard.load(Ordering::Relaxed)))
    }

    /// The peer is fenced: lets go of what belongs to it, also while somebody still holds a handle.
    pub(crate) fn let_go(&self) {
        self.conn.close();
        *self.side.lock() = None;
        *self.outbox.write() = None;
        *self.lane.lock() = None;
        *self.pidfd.lock() = None;
    }

    pub(crate) fn is_up(&self) -> bool {
        self.gone.load(Ordering::Acquire) == 0
    }

    pub(crate) fn state(&self) -> PeerState {
        match self.gone.load(Ordering::Acquire) {
            0 => PeerState::Up,
            code => PeerState::Gone(ErrorCode::from(code)),
        }
    }

    /// From now on every call on it fails; true for the first to say so.
    pub(crate) fn mark_gone(&self, code: ErrorCode, text: &str) -> bool {
        // Under the lock, so that whoever sees the code finds the text.
        let mut why = self.gone_text.lock();
        let first = self.gone.compare_exchange(0, code as u16, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if first {
            text.clone_into(&mut why);
        }
        first
    }

    pub(crate) fn gone_error(&self) -> Error {
        let text = self.gone_text.lock().clone();
        Error::failed(
            ErrorCode::PeerGone,
            format!("agent {:?} of epoch {} is gone: {text}", self.info.name.as_str(), self.info.epoch),
        )
    }

    pub(crate) fn check_up(&self) -> Result<()> {
        if self.is_up() { Ok(()) } else { Err(self.gone_error()) }
    }

    /// Sends a descriptor over the side socket; gives the label it is known by.
    pub(crate) fn pass(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let side = self.side().ok_or_else(|| {
            Error::failed(ErrorCode::NotAvailable, "file descriptors cannot be passed to this peer")
        })?;
        let label = side.label();
        side.send(label, Some(fd))?;
        Ok(label)
    }

    pub(crate) fn remember(&self, region: &Arc<RemoteInner>) {
        let mut imports = self.imports.lock();
        let of_region = imports.entry(region.id).or_default();
        of_region.retain(|w| w.strong_count() > 0);
        of_region.push(Arc::downgrade(region));
        if imports.len() > 4096 {
            imports.retain(|_, v| v.iter().any(|w| w.strong_count() > 0));
        }
    }

    /// The peer has taken an export back.
    pub(crate) fn revoke(&self, region: RegionId) {
        for import in self.imports.lock().remove(&region).unwrap_or_default() {
            if let Some(import) = import.upgrade() {
                import.revoked.store(true, Ordering::Release);
            }
        }
    }

    /// Hands an answer to whoever waits for it.
    pub(crate) fn answer(&self, query: u64, region: Option<RegionAdvert>) {
        if let Some(q) = self.queries.lock().remove(&query) {
            *q.answer.lock() = Some(Ok(region));
            q.answered.notify_all();
        }
    }

    /// Ends everything that waits for an answer.
    pub(crate) fn fail_queries(&self) {
        let queries: Vec<_> = self.queries.lock().drain().collect();
        for (_, q) in queries {
            *q.answer.lock() = Some(Err(self.gone_error()));
            q.answered.notify_all();
        }
    }

    /// Sends a notification. `accounted`: its transfer was admitted while there was room, so it is never refused.
    pub(crate) fn send_notification(
        self: &Arc<Self>,
        agent: &Inner,
        payload: &[u8],
        accounted: bool,
    ) -> Result<()> {
        if let Some(outbox) = &*self.outbox.read() {
            if outbox.push(payload, accounted)? == Pushed::Waiting {
                agent.reactor.command(Command::Spilled(self.clone()));
            }
        } else {
            let message = Message::Notify { payload: payload.to_vec() };
            if accounted {
                self.conn.send_accounted(&message)?;
            } else {
                self.conn.send(&message)?;
            }
        }
        self.sent.inc();
        Ok(())
    }

    /// Bytes that wait for space in the peer's rings.
    pub(crate) fn waiting(&self) -> usize {
        self.outbox.read().as_ref().map_or(0, Producer::waiting) + self.conn.waiting()
    }

    /// Moves what waits into the peer's rings; true when nothing waits any more.
    pub(crate) fn flush(&self) -> bool {
        let notifications = self.outbox.read().as_ref().is_none_or(Producer::flush);
        self.conn.flush() && notifications
    }

    /// Room for one more notification?
    pub(crate) fn check_room(&self) -> Result<()> {
        let full = self.outbox.read().as_ref().map_or_else(|| self.conn.is_full(), Producer::is_full);
        if full {
            return Err(Error::failed(
                ErrorCode::NoCapacity,
                format!(
                    "agent {:?} does not fetch its notifications; its queue is full",
                    self.info.name.as_str()
                ),
            ));
        }
        Ok(())
    }
}

/// What has been exchanged with a peer since its connection came up (Contract line 12).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStats {
    /// How long ago the connection came up.
    pub connected: Duration,
    /// Per transport, best first.
    pub paths: Vec<PathStats>,
    /// Our transfers under way.
    pub in_flight: u64,
    /// Notifications sent to agents of this name.
    pub notifications_sent: u64,
    /// Notifications received from agents of this name.
    pub notifications_received: u64,
}

impl Peer {
    pub(crate) fn from_inner(agent: &Arc<Inner>, peer: &Arc<PeerInner>) -> Self {
        Self { agent: agent.clone(), inner: peer.clone() }
    }

    /// Its name.
    pub fn name(&self) -> &AgentName {
        &self.inner.info.name
    }
    /// Its epoch; another one means another process.
    pub fn epoch(&self) -> Epoch {
        self.inner.info.epoch
    }
    /// Number of this connection; another connection of the same agent has another one.
    pub(crate) fn connection(&self) -> u64 {
        self.inner.id
    }
    /// Up or gone.
    pub fn state(&self) -> PeerState {
        self.inner.state()
    }
    /// True when it shares this host and its process ids.
    pub fn is_same_host(&self) -> bool {
        self.inner.info.same_host
    }
    /// Looks up a region the peer exports.
    pub fn region(&self, name: &str, timeout: Duration) -> Result<RemoteRegion> {
        self.agent.check()?;
        self.agent.check_may_wait("Peer::region")?;
        AgentName::new(name).map_err(|e| Error::InvalidArgument {
            argument: "region name",
            problem: format!("{name:?}: {e}"),
        })?;
        let query = self.agent.id();
        let slot = Arc::new(Query::default());
        {
            let mut queries = self.inner.queries.lock();
            if queries.len() >= MAX_QUERIES {
                return Err(Error::failed(
                    ErrorCode::NoCapacity,
                    format!("{MAX_QUERIES} region queries are under way to this peer already"),
                ));
            }
            queries.insert(query, slot.clone());
        }
        let deadline = Instant::now() + timeout;
        // Checked after the query is in the table: a peer that goes from now on fails it.
        let asked = self
            .inner
            .check_up()
            .and_then(|()| self.inner.conn.send(&Message::RegionQuery { query, name: name.to_owned() }));
        if let Err(e) = asked {
            self.inner.queries.lock().remove(&query);
            return Err(e);
        }
        let mut answer = slot.answer.lock();
        while answer.is_none() {
            if slot.answered.wait_until(&mut answer, deadline).timed_out() && answer.is_none() {
                self.inner.queries.lock().remove(&query);
                return Err(Error::TimedOut {
                    operation: format!("asking agent {:?} for region {name:?}", self.name().as_str()),
                    after: timeout,
                });
            }
        }
        match answer.take() {
            Some(Ok(Some(advert))) => self.import(&advert),
            Some(Err(e)) => Err(e),
            _ => Err(Error::NotFound { what: "exported region", name: name.to_owned() }),
        }
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
        op: Op,
        local: &Region,
        remote: &RemoteRegion,
        pieces: &[Piece],
        options: TransferOptions,
    ) -> Result<Transfer> {
        transfer::submit(self, op, local, remote, pieces, options, None)
    }
    /// Sends a notification without data. Does not block.
    pub fn notify(&self, payload: &[u8]) -> Result<()> {
        self.agent.check()?;
        check_notification(payload)?;
        self.inner.check_up()?;
        self.inner.send_notification(&self.agent, payload, false)
    }
    /// Looks after what the peer says on the caller's thread, for a moment and until `done`: for who waits for an answer of it and holds no
    /// lock of a channel.
    pub(crate) fn attend(&self, done: impl FnMut() -> bool) {
        reader::attend(&self.agent, [self.inner.clone()], reader::attention(&self.agent), done);
    }
    /// Refuses a call that waits on the thread which would have to make it come true.
    pub(crate) fn check_may_wait(&self, call: &str) -> Result<()> {
        self.agent.check_may_wait(call)
    }
    /// Queues a control message; does not block. Fails when the peer is gone or its queue is full.
    #[expect(clippy::needless_pass_by_value, reason = "the message is spent")]
    pub(crate) fn send(&self, message: Message) -> Result<()> {
        self.agent.check()?;
        self.inner.check_up()?;
        self.inner.conn.send(&message)
    }
    /// What peers must be told to reach `region` (a pool's region travels in `Attached`).
    pub(crate) fn advert(&self, region: &Region, name: &str) -> Result<RegionAdvert> {
        self.agent.check()?;
        self.inner.check_up()?;
        Ok(region.inner.advert(&self.inner, name, Access::ReadWrite))
    }
    /// Imports a region from its advert on every connected transport that has a ticket for it.
    pub(crate) fn import(&self, advert: &RegionAdvert) -> Result<RemoteRegion> {
        self.agent.check()?;
        self.inner.check_up()?;
        Ok(RemoteRegion { inner: RemoteInner::import(&self.agent, &self.inner, advert)? })
    }
    /// Like [`Peer::write`], and the mover leaves segment digests in `digests` when it can (see [`Peer::carrier`]).
    pub(crate) fn write_with_digests(
        &self,
        local: &Region,
        remote: &RemoteRegion,
        pieces: &[Piece],
        options: TransferOptions,
        digests: Option<Arc<SegmentDigests>>,
    ) -> Result<Transfer> {
        transfer::submit(self, Op::Write, local, remote, pieces, options, digests)
    }
    /// The transport that would carry a transfer between the two, and what it can do.
    pub(crate) fn carrier(
        &self,
        local: &Region,
        remote: &RemoteRegion,
    ) -> Option<(TransportKind, Capabilities)> {
        let (path, _) = transfer::pick(&self.inner, &local.inner, &remote.inner, None).ok()?;
        Some((path.candidate.kind, path.caps))
    }
    /// The region in this process's address space, where a connected transport has it there: host memory for `None`, else that
    /// device's.
    pub(crate) fn mapping(
        &self,
        remote: &RemoteRegion,
        device: Option<i32>,
    ) -> Option<(TransportKind, Capabilities, Mapping)> {
        let remote = &remote.inner;
        if !remote.writable || remote.revoked.load(Ordering::Acquire) || self.inner.check_up().is_err() {
            return None;
        }
        remote.keys.iter().find_map(|(i, key)| {
            let path = &self.inner.paths[*i];
            let mapping = path.link.map(*key)?;
            let there = mapping.memory.on_device().map(crate::cuda::Device::ordinal);
            (there == device).then_some((path.candidate.kind, path.caps, mapping))
        })
    }
    /// The peer's region as a region of this agent, where a connected transport has it in this process's address space (`shm`,
    /// `cuda_ipc`, `inproc`): host memory for `None`, else that of the device. Copies and kernels of this process work on it as on their
    /// own memory: a [`crate::gather::Gather`] to it is a gather and a write in one pass.
    ///
    /// Nobody tells the peer when that has ended: send it a notification then, and stop before the peer takes its export back. The
    /// mapping is kept as long as the region, also after the peer is gone; what is written then, nobody reads.
    pub fn map(&self, remote: &RemoteRegion, device: Option<i32>) -> Result<Region> {
        self.agent.check()?;
        let Some((_, _, mapping)) = self.mapping(remote, device) else {
            let place = device.map_or("host memory".to_owned(), |d| format!("memory of CUDA device {d}"));
            return Err(Error::failed(
                ErrorCode::NotAvailable,
                format!(
                    "region {:?} of agent {} is not in this process's address space as {place}; it is reached by {:?}",
                    remote.inner.name,
                    self.name(),
                    remote.transports()
                ),
            ));
        };
        Ok(Region { inner: RegionInner::register_mapped(&self.agent, mapping)? })
    }
    /// Counts bytes that reached the peer through a mapping of that transport's.
    pub(crate) fn count_placed(&self, kind: TransportKind, bytes: u64, took: Duration) {
        if let Some(path) = self.inner.paths.iter().find(|p| p.candidate.kind == kind) {
            path.metrics.ended(Op::Write, bytes, took, None);
        }
    }
    /// Connected transports, best first, each with a description (address, streams, protocol underneath).
    pub fn paths(&self) -> Vec<(TransportKind, String)> {
        self.inner.paths.iter().map(|p| (p.candidate.kind, p.link.describe())).collect()
    }
    /// Transports that do not reach this peer, each with the reason.
    pub fn skipped(&self) -> &[(TransportKind, String)] {
        &self.inner.skipped
    }
    /// What has been exchanged since the connection came up.
    pub fn stats(&self) -> PeerStats {
        PeerStats {
            connected: self.inner.since.elapsed(),
            paths: self.inner.paths.iter().map(|p| p.metrics.stats(p.candidate.kind)).collect(),
            in_flight: self.inner.in_flight.load(Ordering::Relaxed),
            notifications_sent: self.inner.sent.get(),
            notifications_received: self.inner.received.get(),
        }
    }
    /// Disconnects; transfers under way end with [`ErrorCode::PeerGone`].
    pub fn disconnect(&self) {
        if self.agent.check().is_err() {
            return;
        }
        let text = "disconnected by this side";
        self.inner.mark_gone(ErrorCode::PeerGone, text);
        self.agent.reactor.command(Command::Gone(self.inner.clone(), ErrorCode::PeerGone, text.into(), true));
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("name", &self.name().as_str())
            .field("epoch", &self.epoch().0)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// Refuses a payload that cannot be sent.
pub(crate) fn check_notification(payload: &[u8]) -> Result<()> {
    if payload.len() > MAX_NOTIFICATION {
        return Err(Error::InvalidArgument {
            argument: "notification",
            problem: format!("{} bytes; at most {MAX_NOTIFICATION} are allowed", payload.len()),
        });
    }
    Ok(())
}

/// A region that its user handle has gone from and whose last transfer ends on a thread of a transport.
pub(crate) fn release(agent: &Inner, region: Arc<RegionInner>) {
    if let Some(last) = Arc::into_inner(region) {
        agent.reactor.command(Command::Reap(Box::new(last)));
    }
}
