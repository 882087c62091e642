//! The decoder's side: a pool of pages that senders fill and the engine reads.
//!
//! [`Pool`] drives the receiver's machine: it is called by the agent's progress thread (messages, peers, time), by the
//! verifier thread (ends of checks) and by the engine (lookups, pins). A check at level `bound` reads 4 KiB and is made where
//! it is asked for; one at level `full` reads the whole chunk and is made on the verifier thread, while the next chunk is
//! under way.

use super::anchor::Anchor;
use super::digest::Bytes;
use super::worker::Worker;
use crate::agent::host::{self, Host};
use crate::memory::HugePages;
use crate::metrics::PoolGauges;
use crate::{Agent, Error, Memory, Peer, Region, Result};
use kvxfer_proto::layout::Layout;
use kvxfer_proto::pool::{Hold, Known};
use kvxfer_proto::receiver::{self as machine, Event, Output, PeerId, Settings, Verify};
use kvxfer_proto::wire::{Check, Message};
use kvxfer_proto::{AgentName, ChunkKey, ErrorCode, Geometry, PageIndex, RequestId, Time};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Most events that wait for [`Receiver::next_event`], and most ended requests [`Receiver::wait_request`] remembers.
const MAX_REMEMBERED: usize = 16_384;

/// Settings of a pool.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// Name senders attach to.
    pub pool: String,
    /// Pages.
    pub pages: u32,
    /// What the pages hold; `geometry.page_bytes` is the size of a page.
    pub geometry: Geometry,
    /// A sender that neither commits nor renews for this long loses its lease.
    pub lease: Duration,
    /// A request not admitted for this long is refused (its own deadline may be shorter).
    pub admission_timeout: Duration,
    /// Longest queue of requests that wait for pages.
    pub max_queue: usize,
    /// A published chunk nobody has acquired is dropped after this long.
    pub retention: Duration,
}

/// The pool. Cheap to clone; senders are told when the last clone goes. Chunks acquired from it outlive it.
#[derive(Clone)]
pub struct Receiver {
    handle: Arc<Handle>,
}

/// What is known of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Published: complete and checked, this many bytes.
    Present(u64),
    /// On its way.
    Pending,
    /// Nothing known.
    Absent,
}

/// A published chunk, pinned: its bytes stay as they are until this is dropped.
pub struct Chunk {
    pool: Arc<Pool>,
    hold: Hold,
    offset: u64,
    len: u64,
}

/// What happens to requests; see [`Receiver::next_event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// Every chunk of the request is published.
    Ready {
        /// From whom.
        sender: AgentName,
        /// The request.
        request: RequestId,
    },
    /// The request ended otherwise.
    Failed {
        /// From whom.
        sender: AgentName,
        /// The request.
        request: RequestId,
        /// Why.
        code: ErrorCode,
        /// In words.
        text: String,
    },
}

/// Pages by state, and the queue. `free + writing + published + quarantined == pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All pages.
    pub pages: u32,
    /// Free.
    pub free: u32,
    /// Granted and being written.
    pub writing: u32,
    /// Published.
    pub published: u32,
    /// Published and pinned.
    pub pinned: u32,
    /// Waiting until no write can land any more.
    pub quarantined: u32,
    /// Requests waiting for pages.
    pub queued: u32,
    /// Requests admitted and not ended.
    pub active: u32,
    /// Pages a new request could have: free ones, and published ones whose consumers have come and gone.
    pub available: u32,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            pool: "kv".into(),
            pages: 0,
            geometry: Geometry::default(),
            lease: Duration::from_secs(30),
            admission_timeout: Duration::from_secs(30),
            max_queue: 1024,
            retention: Duration::from_secs(120),
        }
    }
}

impl Receiver {
    /// Allocates a shareable pool and opens it to senders.
    pub fn new(agent: &Agent, config: ReceiverConfig) -> Result<Self> {
        let layout = layout(&config)?;
        let memory = Memory::shared(layout.total_bytes() as usize, HugePages::Try)?;
        Self::with_memory(agent, config, memory)
    }

    /// The same over memory the caller provides: at least `pages * page_bytes` bytes.
    pub fn with_memory(agent: &Agent, config: ReceiverConfig, memory: Arc<Memory>) -> Result<Self> {
        let layout = layout(&config)?;
        if (memory.len() as u64) < layout.total_bytes() {
            return Err(Error::InvalidArgument {
                argument: "memory",
                problem: format!(
                    "{} bytes; {} pages of {} bytes need {}",
                    memory.len(),
                    layout.pages(),
                    layout.page_bytes(),
                    layout.total_bytes()
                ),
            });
        }
        let region = agent.register(memory)?;
        let settings = Settings {
            pool: config.pool.clone(),
            layout,
            geometry: config.geometry,
            lease: config.lease,
            admission_timeout: config.admission_timeout,
            max_queue: config.max_queue,
            retention: config.retention,
        };
        let pool = Arc::new_cyclic(|me| Pool {
            me: me.clone(),
            anchor: Anchor::new(agent),
            name: config.pool.clone(),
            layout,
            region,
            verifier: Worker::new("kvxfer-verify"),
            state: Mutex::new(State::new(machine::Receiver::new(settings), agent.pool_gauges(&config.pool))),
            changed: Condvar::new(),
        });
        pool.state.lock().show();
        let host: Weak<Pool> = Arc::downgrade(&pool);
        agent.add_host(host);
        Ok(Self { handle: Arc::new(Handle { pool }) })
    }

    /// What is known of `key` now.
    pub fn lookup(&self, key: &ChunkKey) -> Lookup {
        match self.pool().state.lock().machine.known(key) {
            Known::Published(len) => Lookup::Present(len),
            Known::Writing => Lookup::Pending,
            Known::Absent => Lookup::Absent,
        }
    }

    /// Pins a published chunk; [`ErrorCode::InProgress`] while it is being written, [`ErrorCode::NotFound`] when unknown.
    pub fn acquire(&self, key: &ChunkKey) -> Result<Chunk> {
        let pool = self.pool();
        let mut state = pool.state.lock();
        let Some((hold, len)) = state.machine.pin(key) else {
            return Err(match state.machine.known(key) {
                Known::Writing => {
                    Error::failed(ErrorCode::InProgress, format!("chunk {key} is still being written"))
                }
                _ => Error::NotFound { what: "chunk", name: key.to_string() },
            });
        };
        state.show();
        let offset = pool.offset(hold.page);
        Ok(Chunk { pool: pool.clone(), hold, offset, len })
    }

    /// Gives a published chunk back: it goes when no other request announced here counts on it, and its page is free once the
    /// last pin is gone. False when no such chunk is published.
    pub fn remove(&self, key: &ChunkKey) -> bool {
        self.pool().with(|m| m.remove(host::now(), key))
    }

    /// Waits until the request has ended, declared already or not; its failure is the error. Where several senders use the
    /// same id, the one that ended last counts.
    pub fn wait_request(&self, request: &RequestId, timeout: Duration) -> Result<()> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        let mut state = pool.state.lock();
        loop {
            if let Some(end) = state.ends.get(request) {
                return end.clone().map_err(|(code, text)| Error::failed(code, text));
            }
            if state.closed {
                return Err(pool.closed_error());
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() && !state.ends.contains_key(request)
            {
                return Err(Error::TimedOut { operation: format!("request {request}"), after: timeout });
            }
        }
    }

    /// Next event, `None` when the time is over or the pool is closed. Every event is given to one caller only; when nobody
    /// asks, the oldest are dropped.
    pub fn next_event(&self, timeout: Duration) -> Option<ReceiverEvent> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        let mut state = pool.state.lock();
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if state.closed {
                return None;
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() {
                return state.events.pop_front();
            }
        }
    }

    /// Pages by state.
    pub fn stats(&self) -> PoolStats {
        self.pool().state.lock().stats()
    }

    /// The pool's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.pool().region.memory()
    }

    /// Refuses new requests, ends the ones under way, waits until no page can be written any more. Published chunks stay
    /// until the last handle goes.
    pub fn close(&self, timeout: Duration) -> Result<()> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        pool.shut("the receiver was closed");
        let mut state = pool.state.lock();
        loop {
            let quarantined = state.stats().quarantined;
            if quarantined == 0 || state.agent_gone {
                return Ok(());
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() && state.stats().quarantined > 0 {
                return Err(Error::TimedOut {
                    operation: format!(
                        "closing pool {:?}: {quarantined} pages may still be written",
                        pool.name
                    ),
                    after: timeout,
                });
            }
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        &self.handle.pool
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver")
            .field("pool", &self.pool().name)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Chunk {
    /// Its page.
    pub fn page(&self) -> PageIndex {
        self.hold.page
    }
    /// Offset of its first byte in the pool's memory.
    pub fn offset(&self) -> u64 {
        self.offset
    }
    /// Valid bytes.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// The pool's memory; it stays mapped while this chunk lives.
    pub fn memory(&self) -> &Arc<Memory> {
        self.pool.region.memory()
    }
    /// Copies bytes out, from `offset` within the chunk.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let len = out.len() as u64;
        if offset > self.len || len > self.len - offset {
            let what = format!("chunk on page {}", self.hold.page);
            return Err(Error::OutOfRange { what, offset, len, limit: self.len });
        }
        self.memory().read_at(self.offset + offset, out)
    }
}

impl std::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunk").field("page", &self.hold.page).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.with(|m| m.unpin(host::now(), self.hold));
    }
}

fn layout(config: &ReceiverConfig) -> Result<Layout> {
    Layout::new(config.geometry.page_bytes, config.pages).map_err(|e| Error::InvalidArgument {
        argument: "pages and geometry.page_bytes",
        problem: e.to_string(),
    })
}

/// What all clones of a receiver share.
struct Handle {
    pool: Arc<Pool>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.pool.shut("the receiver is gone");
        let mut state = self.pool.state.lock();
        if state.stats().quarantined > 0 {
            // Writes may still land in this memory: it stays mapped until they cannot (Contract line 2).
            state.linger = Some(self.pool.clone());
        }
        drop(state);
        self.pool.anchor.release();
    }
}

/// The pool and its machine.
struct Pool {
    me: Weak<Self>,
    anchor: Anchor,
    name: String,
    layout: Layout,
    region: Region,
    verifier: Worker,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    machine: machine::Receiver,
    gauges: PoolGauges,
    shown: PoolStats,
    /// By the number of their connection.
    peers: HashMap<u64, Peer>,
    events: VecDeque<ReceiverEvent>,
    ends: HashMap<RequestId, Result<(), (ErrorCode, String)>>,
    ended: VecDeque<RequestId>,
    spans: HashMap<(PeerId, RequestId), tracing::Span>,
    announced: Time,
    closed: bool,
    agent_gone: bool,
    linger: Option<Arc<Pool>>,
}

impl State {
    fn new(machine: machine::Receiver, gauges: PoolGauges) -> Self {
        Self {
            machine,
            gauges,
            shown: PoolStats::default(),
            peers: HashMap::new(),
            events: VecDeque::new(),
            ends: HashMap::new(),
            ended: VecDeque::new(),
            spans: HashMap::new(),
            announced: Time::NEVER,
            closed: false,
            agent_gone: false,
            linger: None,
        }
    }

    fn stats(&self) -> PoolStats {
        let s = self.machine.stats();
        let p = s.pages;
        PoolStats {
            pages: p.free + p.writing + p.published + p.quarantined,
            free: p.free,
            writing: p.writing,
            published: p.published,
            pinned: p.pinned,
            quarantined: p.quarantined,
            queued: s.queued,
            active: s.active,
            available: s.available,
        }
    }

    fn show(&mut self) {
        let stats = self.stats();
        if stats != self.shown {
            self.gauges.set(&stats);
            self.shown = stats;
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Started { peer, request } => {
                let span = tracing::info_span!("request", side = "receiver", %request, sender = %peer.name);
                self.ends.remove(&request);
                self.spans.insert((peer, request), span);
            }
            Event::Ready { peer, request, bytes, took } => {
                let span =
                    self.spans.remove(&(peer.clone(), request.clone())).unwrap_or_else(tracing::Span::none);
                tracing::debug!(parent: &span, bytes, ?took, "ready");
                self.end(request.clone(), Ok(()));
                self.push(ReceiverEvent::Ready { sender: peer.name, request });
            }
            Event::Failed { peer, request, code, text } => {
                let span =
                    self.spans.remove(&(peer.clone(), request.clone())).unwrap_or_else(tracing::Span::none);
                tracing::warn!(parent: &span, %request, %code, text, "request failed");
                self.end(request.clone(), Err((code, text.clone())));
                self.push(ReceiverEvent::Failed { sender: peer.name, request, code, text });
            }
        }
    }

    fn end(&mut self, request: RequestId, end: Result<(), (ErrorCode, String)>) {
        if self.ends.insert(request.clone(), end).is_none() {
            self.ended.push_back(request);
        }
        while self.ended.len() > MAX_REMEMBERED {
            if let Some(old) = self.ended.pop_front() {
                self.ends.remove(&old);
            }
        }
    }

    fn push(&mut self, event: ReceiverEvent) {
        if self.events.len() == MAX_REMEMBERED {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

impl Pool {
    fn offset(&self, page: PageIndex) -> u64 {
        // The machine names pages of its own layout only.
        self.layout.offset(page).unwrap_or(0)
    }

    fn closed_error(&self) -> Error {
        Error::failed(ErrorCode::Closed, format!("pool {:?} is closed", self.name))
    }

    /// Tells the machine something and carries out what it wants.
    fn with<T>(&self, f: impl FnOnce(&mut machine::Receiver) -> T) -> T {
        let mut state = self.state.lock();
        let result = f(&mut state.machine);
        self.carry_out(state);
        result
    }

    fn carry_out(&self, mut state: MutexGuard<'_, State>) {
        let mut told = false;
        while let Some(output) = state.machine.poll() {
            match output {
                Output::Send(to, message) => self.send(&state, &to, message),
                Output::Verify(verify) => self.verify(&mut state, verify),
                Output::Event(event) => {
                    state.event(event);
                    told = true;
                }
            }
        }
        state.show();
        let quiet = state.stats().quarantined == 0;
        let over = (quiet && state.closed).then(|| state.linger.take()).flatten();
        if told || (quiet && state.closed) {
            self.changed.notify_all();
        }
        let next = state.machine.next_timeout().unwrap_or(Time::NEVER);
        let sooner = next < state.announced;
        if sooner {
            state.announced = next;
        }
        drop(state);
        drop(over);
        if sooner {
            self.anchor.schedule();
        }
    }

    fn send(&self, state: &State, to: &PeerId, mut message: Message) {
        let Some(peer) = state.peers.get(&to.connection) else { return };
        if let Message::Attached { region, code: code @ ErrorCode::Ok, text, .. } = &mut message {
            match peer.advert(&self.region, &self.name) {
                Ok(advert) => *region = Some(advert),
                Err(e) => (*code, *text) = (e.code(), e.to_string()),
            }
        }
        if let Err(e) = peer.send(message)
            && !matches!(e.code(), ErrorCode::PeerGone | ErrorCode::Closed)
        {
            // A word that cannot be said leaves the sender waiting: better it learns that the connection is over.
            tracing::warn!(peer = %to.name, error = %e, "cannot answer a sender; disconnecting it");
            peer.disconnect();
        }
    }

    fn verify(&self, state: &mut State, verify: Verify) {
        let runs = [(self.offset(verify.binding.page), verify.binding.len)];
        match verify.check {
            Check::Full(digest) => {
                let memory = self.region.memory().clone();
                let (me, token) = (self.me.clone(), verify.token);
                let job = move || {
                    let good = Bytes { memory: &memory, runs: &runs }
                        .full(&verify.binding)
                        .is_ok_and(|d| d == digest);
                    drop(memory);
                    if let Some(pool) = me.upgrade() {
                        pool.with(|m| m.verified(host::now(), token, good));
                        part(pool);
                    }
                };
                if let Err(e) = self.verifier.run(job) {
                    tracing::error!(error = %e, "a chunk cannot be checked");
                    state.machine.verified(host::now(), token, false);
                }
            }
            Check::Bound(digest) => {
                let bytes = Bytes { memory: self.region.memory(), runs: &runs };
                let good = bytes.bound(&verify.binding).is_ok_and(|d| d == digest);
                state.machine.verified(host::now(), verify.token, good);
            }
            Check::None => state.machine.verified(host::now(), verify.token, true),
        }
    }

    fn shut(&self, text: &str) {
        let mut state = self.state.lock();
        state.closed = true;
        state.machine.close(host::now(), ErrorCode::Closed, text);
        self.carry_out(state);
        self.changed.notify_all();
    }

    fn id(peer: &Peer) -> PeerId {
        PeerId { name: peer.name().clone(), epoch: peer.epoch(), connection: peer.connection() }
    }
}

/// Lets go of a pool on a thread that must not wait for others: what deregisters memory is done elsewhere.
fn part(pool: Arc<Pool>) {
    if let Some(last) = Arc::into_inner(pool) {
        std::thread::spawn(move || drop(last));
    }
}

impl Host for Pool {
    fn message(&self, peer: &Peer, message: &Message) -> bool {
        let id = Self::id(peer);
        let mut state = self.state.lock();
        if matches!(message, Message::Attach { pool, .. } if *pool == self.name) {
            state.peers.insert(id.connection, peer.clone());
        }
        let taken = state.machine.message(host::now(), &id, message);
        self.carry_out(state);
        taken
    }

    fn peer_gone(&self, peer: &Peer, code: ErrorCode) {
        self.with(|m| m.peer_gone(host::now(), &Self::id(peer), code));
    }

    fn peer_fenced(&self, peer: &Peer) {
        let id = Self::id(peer);
        let mut state = self.state.lock();
        let gone = state.peers.remove(&id.connection);
        state.machine.peer_fenced(host::now(), &id);
        self.carry_out(state);
        drop(gone);
    }

    fn tick(&self, now: Time) -> Option<Time> {
        let mut state = self.state.lock();
        state.machine.tick(now);
        // Told by the return value: no need to be asked again for it.
        state.announced = Time(0);
        self.carry_out(state);
        let mut state = self.state.lock();
        let next = state.machine.next_timeout();
        state.announced = next.unwrap_or(Time::NEVER);
        next
    }

    fn closed(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.agent_gone = true;
        state.machine.close(host::now(), ErrorCode::Closed, "the agent was shut down");
        self.carry_out(state);
        self.changed.notify_all();
    }
}
