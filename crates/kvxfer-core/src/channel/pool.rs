//! What drives the receiver's machine.
//!
//! It is called by the agent's progress thread (messages, peers, time), by the verifier thread (ends of checks) and by the
//! engine (lookups, pins). A check at level `bound` of host memory reads 4 KiB and is made where it is asked for; one at level `full`
//! reads the whole chunk, one of device memory waits for the device: both are made on the verifier thread, while the next chunk is
//! under way.

use super::anchor::Anchor;
use super::digest::Bytes;
use super::receiver::{PoolStats, ReceiverConfig, ReceiverEvent};
use super::worker::Worker;
use crate::agent::host::{self, Host};
use crate::metrics::PoolGauges;
use crate::{Agent, Error, Memory, Peer, Region, Result};
use kvxfer_proto::layout::Layout;
use kvxfer_proto::receiver::{self as machine, Event, Output, PeerId, Settings, Verify};
use kvxfer_proto::wire::{Check, Message};
use kvxfer_proto::{ErrorCode, PageIndex, RequestId, Time};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

/// Most events that wait for [`super::Receiver::next_event`], and most ended requests
/// [`super::Receiver::wait_request`] remembers.
const MAX_REMEMBERED: usize = 16_384;

/// One of so many pages may be in the hands of senders, for requests to come.
const ADVANCED_OF: u32 = 8;

/// What all clones of a receiver share.
pub(super) struct Handle {
    pub(super) pool: Arc<Pool>,
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
pub(super) struct Pool {
    me: Weak<Self>,
    anchor: Anchor,
    pub(super) name: String,
    layout: Layout,
    pub(super) region: Region,
    verifier: Worker,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

pub(super) struct State {
    pub(super) machine: machine::Receiver,
    gauges: PoolGauges,
    shown: PoolStats,
    /// By the number of their connection.
    peers: HashMap<u64, Peer>,
    pub(super) events: VecDeque<ReceiverEvent>,
    pub(super) ends: HashMap<RequestId, Result<(), (ErrorCode, String)>>,
    ended: VecDeque<RequestId>,
    spans: HashMap<(PeerId, RequestId), tracing::Span>,
    announced: Time,
    pub(super) closed: bool,
    pub(super) agent_gone: bool,
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

    pub(super) fn stats(&self) -> PoolStats {
        let s = self.machine.stats();
        let p = s.pages;
        PoolStats {
            pages: p.free + p.writing + p.advanced + p.published + p.quarantined,
            free: p.free,
            writing: p.writing,
            advanced: p.advanced,
            published: p.published,
            pinned: p.pinned,
            quarantined: p.quarantined,
            queued: s.queued,
            active: s.active,
            available: s.available,
        }
    }

    pub(super) fn show(&mut self) {
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
    /// Registers the memory and opens the pool to senders.
    pub(super) fn open(
        agent: &Agent,
        config: ReceiverConfig,
        layout: Layout,
        memory: Arc<Memory>,
    ) -> Result<Arc<Self>> {
        let region = agent.register(memory)?;
        let settings = Settings {
            pool: config.pool.clone(),
            layout,
            geometry: config.geometry,
            lease: config.lease,
            admission_timeout: config.admission_timeout,
            max_queue: config.max_queue,
            retention: config.retention,
            advance: layout.pages() / ADVANCED_OF,
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
        let host: Weak<Pool> = Arc::downgrade(&pool);
        agent.add_host(host)?;
        // Only now: a pool that is refused has no business in the metrics of the one whose name it wanted.
        pool.state.lock().show();
        Ok(pool)
    }

    pub(super) fn offset(&self, page: PageIndex) -> u64 {
        // The machine names pages of its own layout only.
        self.layout.offset(page).unwrap_or(0)
    }

    pub(super) fn closed_error(&self) -> Error {
        Error::failed(ErrorCode::Closed, format!("pool {:?} is closed", self.name))
    }

    /// Tells the machine something and carries out what it wants.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut machine::Receiver) -> T) -> T {
        let mut state = self.state.lock();
        let result = f(&mut state.machine);
        self.carry_out(state);
        result
    }

    fn carry_out(&self, mut state: MutexGuard<'_, State>) {
        let mut told = false;
        while let Some(output) = state.machine.poll() {
            match output {
                Output::Send(to, message) => {
                    // Whoever hears of a change finds it in the metrics.
                    state.show();
                    self.send(&state, &to, message);
                }
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
            self.anchor.schedule(next);
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
        let (full, digest) = match verify.check {
            Check::None => return state.machine.verified(host::now(), verify.token, true),
            Check::Bound(digest) => (false, digest),
            Check::Full(digest) => (true, digest),
        };
        let memory = self.region.memory();
        if !full && !memory.is_device() {
            let good = Bytes { memory, runs: &runs }.bound(&verify.binding).is_ok_and(|d| d == digest);
            return state.machine.verified(host::now(), verify.token, good);
        }
        let (memory, me, token) = (memory.clone(), self.me.clone(), verify.token);
        let job = move || {
            let bytes = Bytes { memory: &memory, runs: &runs };
            let found = if full { bytes.full(&verify.binding) } else { bytes.bound(&verify.binding) };
            if let Err(e) = &found {
                tracing::warn!(error = %e, "a chunk's bytes cannot be read back");
            }
            let good = found.is_ok_and(|d| d == digest);
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

    pub(super) fn shut(&self, text: &str) {
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
    fn pool(&self) -> Option<String> {
        (!self.state.lock().closed).then(|| self.name.clone())
    }

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

    fn expects(&self) -> bool {
        // Pages have been granted, and somebody fills them.
        self.state.lock().stats().writing > 0
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
