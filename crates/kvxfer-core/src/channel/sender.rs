//! The prefiller's side: reserve, write, commit.
//!
//! A [`Sender`] is a name for a receiver's pool; what happens over one connection to it is a [`Session`]. When the receiver
//! was restarted the session's requests end with [`ErrorCode::PeerGone`], and the next request opens a new one.

use super::place::Place;
use super::query::{self, Found};
use super::session::{Session, failed};
use super::ticket::Ticket;
use crate::{Agent, Error, Peer, Region, Result};
use kvxfer_proto::plan::{PlanChunk, Striping, plan};
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ChunkKey, ErrorCode, Geometry, Integrity, PageIndex, RequestId};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First and longest pause between two attempts to reach a receiver that is restarting.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// How long a receiver that is just starting may take to open its pool after it has begun to listen.
const POOL_GRACE: Duration = Duration::from_secs(1);

/// Settings of a sender.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// The receiver's pool.
    pub pool: String,
    /// Must equal the receiver's.
    pub geometry: Geometry,
    /// Level of checking; default: by transport.
    pub integrity: Option<Integrity>,
    /// Deadline of a request that states none, admission included.
    pub request_timeout: Duration,
}

/// A channel to one receiver's pool. Reconnects by itself when the receiver was restarted. Cheap to clone.
///
/// It stays open while a clone, a [`Reservation`] or a [`Delivery`] of it lives; then what is still under way is given up.
#[derive(Clone)]
pub struct Sender {
    handle: Arc<Handle>,
}

/// An admitted (or waiting) request. Dropping it without [`Reservation::finish`] gives the request up.
pub struct Reservation {
    delivery: Option<Delivery>,
}

/// A request whose end can be waited for. Dropping it does not end the request.
pub struct Delivery {
    handle: Arc<Handle>,
    session: Arc<Session>,
    ticket: Arc<Ticket>,
}

/// Where a chunk's bytes are: runs of a local region, concatenated.
#[derive(Clone)]
pub struct ChunkSource {
    /// The region.
    pub region: Region,
    /// `(offset, length)` runs in the order of the chunk's bytes; their sum is the chunk's length.
    pub runs: Vec<(u64, u64)>,
    /// Dropped when nothing reads the bytes any more: the chunk is published, or its request has ended and its transfer too.
    pub keep: Option<Arc<dyn std::any::Any + Send + Sync>>,
    /// The bytes are complete at this point of the caller's stream; they are not read before.
    pub after: Option<crate::cuda::Fence>,
}

impl ChunkSource {
    /// Runs of a region, with nothing to keep.
    pub fn new(region: Region, runs: Vec<(u64, u64)>) -> Self {
        Self { region, runs, keep: None, after: None }
    }
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryReport {
    /// Bytes that crossed (chunks already present do not).
    pub bytes: u64,
    /// Chunks written.
    pub written: u32,
    /// Chunks that were already there.
    pub present: u32,
    /// Wait for admission.
    pub queued: Duration,
    /// From admission to the receiver's word that all is published.
    pub moved: Duration,
    /// What carried it (or would have).
    pub transport: crate::TransportKind,
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self {
            pool: "kv".into(),
            geometry: Geometry::default(),
            integrity: None,
            request_timeout: Duration::from_secs(60),
        }
    }
}

impl Sender {
    /// Connects and compares geometries.
    pub fn connect(agent: &Agent, address: &str, config: SenderConfig, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let peer = agent.connect(address, timeout)?;
        let session = attach(agent, &peer, &config, deadline)?;
        let (agent, address) = (agent.clone(), address.to_owned());
        Ok(Self { handle: Arc::new(Handle { agent, address, config, session: Mutex::new(session) }) })
    }

    /// Declares a request with all its chunks. Returns at once; admission is waited for with [`Reservation::wait_admitted`].
    ///
    /// Only when the receiver was restarted or is not connected does it first reconnect, at most until the request's own
    /// deadline.
    pub fn reserve(
        &self,
        request: RequestId,
        chunks: Vec<ChunkSpec>,
        timeout: Option<Duration>,
    ) -> Result<Reservation> {
        self.reserve_more(request, chunks, 0, timeout)
    }

    /// The same where only the first `chunks` are known yet, as in a prefill that is cut into steps: pages for up to `more` further
    /// ones are granted with them, and [`Reservation::extend`] names those.
    pub fn reserve_more(
        &self,
        request: RequestId,
        chunks: Vec<ChunkSpec>,
        more: u32,
        timeout: Option<Duration>,
    ) -> Result<Reservation> {
        self.declare(request, (chunks, more), timeout, false)
    }

    /// The same for who has the bytes already, or makes them in their places next ([`Reservation::place`]). Where all chunks are known
    /// and the receiver has given pages in advance, the chunks go there, and nobody waits for its answer; it is asked for as many for the
    /// next request. Until then they are not anybody's: up to an eighth of the pool is in senders' hands, and comes back when others wait.
    pub fn reserve_at_once(
        &self,
        request: RequestId,
        chunks: Vec<ChunkSpec>,
        more: u32,
        timeout: Option<Duration>,
    ) -> Result<Reservation> {
        self.declare(request, (chunks, more), timeout, true)
    }

    fn declare(
        &self,
        request: RequestId,
        chunks: (Vec<ChunkSpec>, u32),
        timeout: Option<Duration>,
        at_once: bool,
    ) -> Result<Reservation> {
        let timeout = timeout.unwrap_or(self.handle.config.request_timeout);
        let deadline = Instant::now() + timeout;
        let mut session = self.handle.session(deadline)?;
        let ticket = match session.reserve(request.clone(), chunks.clone(), deadline, at_once) {
            // It ended between being looked at and being used: once more, over a new one.
            Err(_) if !session.is_open() => {
                session = self.handle.session(deadline)?;
                session.reserve(request, chunks, deadline, at_once)?
            }
            result => result?,
        };
        let handle = self.handle.clone();
        Ok(Reservation { delivery: Some(Delivery { handle, session, ticket }) })
    }

    /// Reserve, write and commit in one go; returns at once.
    pub fn send(
        &self,
        request: RequestId,
        chunks: Vec<(ChunkSpec, ChunkSource)>,
        timeout: Option<Duration>,
    ) -> Result<Delivery> {
        let (specs, sources): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
        let reservation = self.reserve(request, specs, timeout)?;
        for (i, source) in sources.into_iter().enumerate() {
            reservation.write(i, source)?;
        }
        Ok(reservation.finish())
    }

    /// Asks which of `keys` the receiver has published. Their pages are held for `lease` (at most the receiver's own), counted from
    /// its answer, so that [`Found::read`] can read them back; a lease of zero only asks and holds nothing.
    pub fn query(&self, keys: Vec<ChunkKey>, lease: Duration, timeout: Duration) -> Result<Found> {
        let deadline = Instant::now() + timeout;
        let mut session = self.handle.session(deadline)?;
        let answer = match query::ask(&session, &keys, lease, deadline) {
            // It ended between being looked at and being used: once more, over a new one.
            Err(_) if !session.is_open() => {
                session = self.handle.session(deadline)?;
                query::ask(&session, &keys, lease, deadline)?
            }
            result => result?,
        };
        Ok(Found::new(self.handle.clone(), session, keys, answer))
    }

    /// True when a request can be declared without connecting first.
    pub fn is_open(&self) -> bool {
        self.handle.session.try_lock().is_some_and(|session| session.is_open())
    }

    /// Whether [`Reservation::place`] can have pages: the receiver's pool is mapped in this process, as host memory or as that GPU's.
    pub fn maps(&self, device: Option<i32>) -> bool {
        self.handle.session.try_lock().is_some_and(|session| session.maps(device))
    }

    /// The receiver's agent, as last connected.
    pub fn peer(&self) -> Peer {
        self.handle.session.lock().peer().clone()
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender")
            .field("address", &self.handle.address)
            .field("pool", &self.handle.config.pool)
            .finish_non_exhaustive()
    }
}

impl Reservation {
    /// Waits until the request is admitted; refusal is the error.
    pub fn wait_admitted(&self, timeout: Duration) -> Result<()> {
        let Delivery { session, ticket, .. } = self.inner();
        session.attend(|| ticket.is_admitted() || ticket.is_finished());
        ticket.wait_admitted(timeout)
    }

    /// True when the request is admitted and has not failed.
    pub fn is_admitted(&self) -> bool {
        self.inner().ticket.is_admitted()
    }

    /// Writes and commits chunk `i` from `source`; returns at once. Chunks that are present already cost nothing.
    /// Call it as soon as the chunk's bytes are final, while the prefill goes on: they must stay as they are until the request
    /// has ended. Each chunk is written once.
    pub fn write(&self, i: usize, source: ChunkSource) -> Result<()> {
        let Delivery { session, ticket, .. } = self.inner();
        let Some(spec) = ticket.spec(i) else {
            return Err(Error::OutOfRange {
                what: format!("chunks of request {}", ticket.request),
                offset: i as u64,
                len: 1,
                limit: ticket.chunks() as u64,
            });
        };
        let chunk = PlanChunk {
            chunk: i as u32,
            page: PageIndex(0),
            len: spec.len,
            source_len: source.region.len(),
            runs: &source.runs,
        };
        plan(&session.layout()?, &[chunk], Striping::NONE)
            .map_err(|e| Error::InvalidArgument { argument: "source", problem: e.to_string() })?;
        session.supply(ticket, i as u32, source)
    }

    /// The page of chunk `i` in this process's address space, so that its bytes can be produced where they are to be instead of being
    /// written there: host memory, or with `device` that GPU's. Takes the place of [`Reservation::write`] for the chunk. Waits at most
    /// `timeout` for the receiver to grant it. `None` when it cannot be had (no page until then, the chunk is there already or coming
    /// from another request, the pool is not mapped here): write it then.
    pub fn place(&self, i: usize, device: Option<i32>, timeout: Duration) -> Result<Option<Place>> {
        let Delivery { session, ticket, .. } = self.inner();
        session.place(ticket, i as u32, device, Instant::now() + timeout)
    }

    /// Names further chunks, at most as many as [`Sender::reserve_more`] announced; `last` says that none will follow, and gives
    /// pages that were kept for more back. Returns the index of the first, to be named in [`Reservation::write`].
    pub fn extend(&self, chunks: Vec<ChunkSpec>, last: bool) -> Result<usize> {
        let Delivery { session, ticket, .. } = self.inner();
        session.extend(ticket, chunks, last)
    }

    /// Has `f` told how the request ends: once, at once if it has ended, on the thread that ends it, where it must not block
    /// or call into the channel.
    pub fn on_end(&self, f: impl FnOnce(&Result<DeliveryReport>) + Send + 'static) {
        self.inner().ticket.on_end(Box::new(f));
    }

    /// Every chunk has been given to [`Reservation::write`]; the rest can be waited for.
    pub fn finish(mut self) -> Delivery {
        let delivery = self.delivery.take();
        delivery
            .unwrap_or_else(|| unreachable!("taken by finish and abort only, which consume the reservation"))
    }

    /// Gives the request up. Pages are reused once no write can land.
    pub fn abort(mut self, why: ErrorCode) {
        if let Some(d) = self.delivery.take() {
            d.session.abort(&d.ticket, why);
        }
    }

    fn inner(&self) -> &Delivery {
        self.delivery
            .as_ref()
            .unwrap_or_else(|| unreachable!("taken by finish and abort only, which consume the reservation"))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(d) = self.delivery.take() {
            d.session.abort(&d.ticket, ErrorCode::Cancelled);
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation").field("request", &self.inner().ticket.request).finish_non_exhaustive()
    }
}

impl Delivery {
    /// Waits for the end; the request's failure is the error. [`ErrorCode::TimedOut`] also when `timeout` passes first: the
    /// request goes on until its own deadline.
    pub fn wait(&self, timeout: Duration) -> Result<DeliveryReport> {
        self.session.attend(|| self.ticket.is_finished());
        self.ticket.wait(timeout)
    }
    /// True when the request is admitted and has not failed.
    pub fn is_admitted(&self) -> bool {
        self.ticket.is_admitted()
    }
    /// True when it has ended.
    pub fn is_finished(&self) -> bool {
        self.ticket.is_finished()
    }
    /// The request.
    pub fn request(&self) -> &RequestId {
        &self.ticket.request
    }
    /// Gives the request up if it has not ended. Pages are reused once no write can land.
    pub fn abort(&self, why: ErrorCode) {
        self.session.abort(&self.ticket, why);
    }
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery")
            .field("request", &self.ticket.request)
            .field("pool", &self.handle.config.pool)
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ChunkSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkSource")
            .field("region", &self.region.id())
            .field("runs", &self.runs.len())
            .finish_non_exhaustive()
    }
}

/// What all clones of a sender share.
pub(super) struct Handle {
    agent: Agent,
    address: String,
    config: SenderConfig,
    session: Mutex<Arc<Session>>,
}

impl Handle {
    /// The session, a new one when the last has ended.
    fn session(&self, deadline: Instant) -> Result<Arc<Session>> {
        let mut session = self.session.try_lock_until(deadline).ok_or_else(|| Error::TimedOut {
            operation: format!("reconnecting to {}", self.address),
            after: Duration::ZERO,
        })?;
        if session.is_open() {
            return Ok(session.clone());
        }
        let started = Instant::now();
        let mut pause = RETRY.0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let fresh = match self.agent.connect(&self.address, left) {
                // Closed is our own agent here, and the receiver's pool below.
                Err(e) if e.code() == ErrorCode::Closed => return Err(e),
                connected => connected.and_then(|peer| attach(&self.agent, &peer, &self.config, deadline)),
            };
            match fresh {
                Ok(fresh) => {
                    tracing::info!(address = self.address, took = ?started.elapsed(), "reconnected to the receiver");
                    session.release();
                    *session = fresh;
                    return Ok(session.clone());
                }
                Err(e) => {
                    let again = matches!(
                        e.code(),
                        ErrorCode::Unreachable
                            | ErrorCode::PeerGone
                            | ErrorCode::NotFound
                            | ErrorCode::Closed
                    );
                    if !again || Instant::now() + pause >= deadline {
                        return Err(e);
                    }
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(RETRY.1);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let session = self.session.get_mut();
        session.close(&failed(ErrorCode::Closed, "the sender was closed"));
        session.release();
    }
}

/// Attaches to the pool. One that is not open yet, because its process is just starting, is asked for again for a moment.
fn attach(agent: &Agent, peer: &Peer, config: &SenderConfig, deadline: Instant) -> Result<Arc<Session>> {
    let patience = deadline.min(Instant::now() + POOL_GRACE);
    let mut pause = RETRY.0;
    loop {
        match Session::attach(agent, peer, config, deadline) {
            Err(e) if e.code() == ErrorCode::NotFound && Instant::now() + pause < patience => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(RETRY.1);
            }
            result => return result,
        }
    }
}
