//! The progress thread: the one place where an agent's sockets, timers and channels meet.
//!
//! It sleeps in `epoll` until something happens or the nearest deadline comes. Transports that need polling are polled
//! only while they have jobs. Channels are called from here with no lock of the agent held.

use super::Peer;
use super::accept::Incoming;
use super::entry::Entry;
use super::host;
use super::identity::whereabouts;
use super::peer::PeerInner;
use super::reactor::{Command, WAKE};
use super::state::Inner;
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::frame::Decoder;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long the thread stays awake for what a channel expects.
const EXPECTATION: Duration = Duration::from_millis(2);
/// Between two looks at peers that are ending.
const DRAIN_TICK: Duration = Duration::from_millis(5);
/// Naps between two polls of a library that has no thread of its own, once the spinning budget is spent.
const POLL_NAP: Duration = Duration::from_micros(20);

/// What an epoll token stands for.
pub(super) enum Source {
    Listener(usize),
    SideListener,
    /// A side socket that has not yet shown its session.
    SideStranger(OwnedFd, Instant),
    Incoming,
    Peer(u64),
    PeerLane(u64),
    PeerSide(u64),
    PeerProcess(u64),
}

/// The thread's own state.
pub(crate) struct Progress {
    pub(super) inner: Arc<Inner>,
    pub(super) sources: HashMap<u64, Source>,
    pub(super) incoming: HashMap<u64, Incoming>,
    pub(super) peers: HashMap<u64, Entry>,
    pub(super) connectors: usize,
    /// Listeners rest until then.
    pub(super) resting: Option<Instant>,
    next_tick: Option<Instant>,
    /// Channels that have been told of the peers; others are told when their turn comes.
    introduced: Vec<Weak<dyn host::Host>>,
    spilled: Vec<Arc<PeerInner>>,
    spill_nap: Duration,
    polling_since: Option<Instant>,
    pub(super) shutdown: Option<Instant>,
}

/// How long the thread stays awake after something came: an answer usually follows within microseconds, and going to sleep for it takes
/// as long.
#[derive(Default)]
struct Awake {
    since: Option<Instant>,
    /// Next look at whether something is expected.
    look: Option<Instant>,
}

impl Awake {
    fn heard(&mut self) {
        self.since = Some(Instant::now());
        self.look = None;
    }

    /// Whether to go on without sleeping: for `spin`, or longer where something comes through a lane and a channel expects it any moment.
    fn goes_on(&mut self, agent: &Inner, lanes: impl FnOnce() -> bool) -> bool {
        let Some(since) = self.since else { return false };
        let (now, spin) = (Instant::now(), agent.config.spin);
        if now >= *self.look.get_or_insert(since + spin) {
            let may = !spin.is_zero() && now < since + EXPECTATION && lanes();
            let expected = may && agent.hosts().iter().any(|h| h.expects());
            self.look = Some(now + spin);
            if !expected {
                self.since = None;
            }
        }
        self.since.is_some()
    }
}

/// Runs until the agent is shut down. A panic (a bug) ends the agent, not the process.
pub(crate) fn run(inner: &Arc<Inner>) {
    inner.reactor.adopt_thread();
    let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut p = Progress::new(inner.clone());
        p.run();
        p.finish()
    }));
    let result = attempt.unwrap_or_else(|_| {
        tracing::error!(agent = %inner.name, "the progress thread panicked; the agent is closed");
        inner.closed.store(true, Ordering::Release);
        Err(Error::failed(ErrorCode::Panic, "the agent's progress thread panicked; please report this"))
    });
    inner.inbox.shut();
    drop(inner.reactor.end());
    inner.set_ended(result);
}

impl Progress {
    fn new(inner: Arc<Inner>) -> Self {
        let mut p = Self {
            inner,
            sources: HashMap::new(),
            incoming: HashMap::new(),
            peers: HashMap::new(),
            connectors: 0,
            resting: None,
            next_tick: None,
            introduced: Vec::new(),
            spilled: Vec::new(),
            spill_nap: Duration::ZERO,
            polling_since: None,
            shutdown: None,
        };
        p.watch_listeners();
        p
    }

    fn run(&mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut awake = Awake::default();
        loop {
            // Whoever adds a deadline while we are busy wakes us; the value is settled before we sleep.
            self.inner.reactor.announce_sleep(None);
            for command in self.inner.reactor.take_commands() {
                self.command(command);
            }
            let next = self.timers();
            if let Some(limit) = self.shutdown
                && (self.peers.is_empty() || Instant::now() >= limit)
            {
                return;
            }
            let next = self.poll_transports(next);
            let spinning =
                awake.goes_on(&self.inner, || self.peers.values().any(|e| e.peer.lane().is_some()));
            if self.listen_to_all(!spinning) {
                awake.heard();
                continue;
            }
            let next = if spinning { Some(Instant::now()) } else { next };
            self.inner.reactor.announce_sleep(next);
            let timeout = next.map(|t| {
                let left = t.saturating_duration_since(Instant::now());
                rustix::event::Timespec {
                    tv_sec: left.as_secs() as i64,
                    tv_nsec: i64::from(left.subsec_nanos()),
                }
            });
            events.clear();
            match epoll::wait(
                &self.inner.reactor.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => {
                    tracing::error!(error = %e, "epoll");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            if events.is_empty() {
                if spinning {
                    std::thread::yield_now();
                }
                continue;
            }
            for event in &events {
                self.event(event.data.u64(), event.flags);
            }
            awake.heard();
        }
    }

    fn event(&mut self, token: u64, flags: EventFlags) {
        if token == WAKE {
            self.inner.reactor.clear_wake();
            return;
        }
        match self.sources.get(&token) {
            None => {}
            Some(Source::Listener(i)) => self.accept(*i),
            Some(Source::SideListener) => self.accept_side(),
            Some(Source::SideStranger(..)) => self.side_stranger(token),
            Some(Source::Incoming) => self.incoming(token),
            Some(Source::Peer(id)) => {
                let id = *id;
                if let Some(entry) = self.peers.get(&id) {
                    entry.peer.conn.flush();
                }
                if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
                    self.read_peer(id);
                }
            }
            Some(Source::PeerLane(id)) => {
                if let Some(peer) = self.peers.get(id).map(|e| e.peer.clone())
                    && let Some(lane) = peer.lane()
                {
                    lane.ring.drain_event();
                    self.listen(&peer);
                }
            }
            Some(Source::PeerSide(id)) => {
                if let Some(side) = self.peers.get(id).and_then(|e| e.peer.side())
                    && !side.drain()
                {
                    self.inner.reactor.unwatch(&side.fd);
                    self.sources.remove(&token);
                }
            }
            Some(Source::PeerProcess(id)) => {
                let id = *id;
                self.process_died(id, token);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::PeerUp(peer, decoder) => self.peer_up(&peer, decoder),
            Command::Gone(peer, code, text, tell) => self.gone(peer.id, code, &text, tell),
            Command::Linked(token, result) => self.linked(token, *result),
            Command::Spilled(peer) => self.spilled(peer),
            Command::Blocked(token) => {
                if let Some(Source::Peer(id)) = self.sources.get(&token)
                    && let Some(entry) = self.peers.get(id)
                {
                    self.spilled(entry.peer.clone());
                }
            }
            Command::Reap(region) => drop(region),
            Command::HostAdded(weak) => {
                if let Some(host) = weak.upgrade() {
                    self.introduced.push(weak);
                    for entry in self.peers.values().filter(|e| e.peer.is_up()) {
                        host.peer_up(&Peer::from_inner(&self.inner, &entry.peer));
                    }
                }
            }
            Command::Shutdown(deadline) => {
                if self.shutdown.is_none() {
                    self.begin_shutdown();
                }
                self.shutdown = Some(self.shutdown.map_or(deadline, |d| d.max(deadline)));
            }
        }
    }

    fn spilled(&mut self, peer: Arc<PeerInner>) {
        if !self.spilled.iter().any(|p| p.id == peer.id) {
            self.spilled.push(peer);
            self.spill_nap = Duration::ZERO;
        }
    }

    // ---- timers ----

    /// Does what is due; gives the time of the next thing to do.
    fn timers(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = self.shutdown;
        let mut at = |t: Option<Instant>| next = [next, t].into_iter().flatten().min();

        let grace = self.inner.config.peer_timeout;
        let (stuck, deadline) = self.inner.reactor.run_deadlines(now, grace);
        at(deadline);
        for (peer, transfer) in stuck {
            let text = format!("transfer {transfer} did not stop within {grace:?} of its deadline");
            self.gone(peer.id, ErrorCode::TimedOut, &text, true);
        }
        at(self.check_incoming(now));
        at(self.check_peers(now));
        if let Some(t) = self.resting {
            if t <= now {
                self.resting = None;
                self.watch_listeners();
            } else {
                at(Some(t));
            }
        }
        if !self.spilled.is_empty() {
            let waiting = |spilled: &[Arc<PeerInner>]| spilled.iter().map(|p| p.waiting()).sum::<usize>();
            let before = waiting(&self.spilled);
            self.spilled.retain(|p| p.is_up() && !p.flush());
            // The consumer does not tell when it makes room: look again, less and less often while it makes none.
            let moves = waiting(&self.spilled) < before;
            let nap = if moves { Duration::ZERO } else { self.spill_nap * 2 };
            self.spill_nap = nap.clamp(Duration::from_micros(200), Duration::from_millis(20));
            if !self.spilled.is_empty() {
                at(Some(now + self.spill_nap));
            }
        }
        at(self.tick(now));
        next
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        if self.shutdown.is_some() {
            return None;
        }
        let wanted = self.inner.reactor.tick_wanted.swap(false, Ordering::AcqRel);
        if wanted || self.next_tick.is_some_and(|t| t <= now) {
            let time = host::to_time(now);
            self.next_tick = None;
            for host in self.inner.hosts() {
                let again = host.tick(time).map(host::to_instant);
                self.next_tick = [self.next_tick, again].into_iter().flatten().min();
            }
            if self.inner.reactor.tick_wanted.load(Ordering::Acquire) {
                return Some(now);
            }
        }
        self.next_tick
    }

    /// Polls the libraries that have no thread; gives when to do so again.
    fn poll_transports(&mut self, next: Option<Instant>) -> Option<Instant> {
        let wanted = self.inner.reactor.poll_wanted.swap(false, Ordering::AcqRel);
        if !wanted && self.polling_since.is_none() {
            return next;
        }
        let mut busy = self.inner.held.drive();
        for slot in self.inner.slots.iter().filter(|s| s.caps.needs_poll) {
            busy |= slot.transport.poll();
        }
        if !busy {
            self.polling_since = None;
            return next;
        }
        let now = Instant::now();
        if wanted || self.polling_since.is_none() {
            self.polling_since = Some(now);
        }
        let spent = self.polling_since.map_or(Duration::ZERO, |t| now - t);
        let again = if spent < self.inner.config.spin { now } else { now + POLL_NAP };
        Some(next.map_or(again, |t| t.min(again)))
    }

    // ---- peers ----

    pub(super) fn peer_up(&mut self, peer: &Arc<PeerInner>, decoder: Decoder) {
        let id = peer.id;
        if let Some(mailbox) = &peer.mailbox
            && let Err(e) = self.inner.inbox.add(mailbox)
        {
            tracing::warn!(peer = %peer.info.name, error = %e, "mailbox not watched");
        }
        self.inner.metrics.peer_up(&peer.info.name);
        let mut watched = peer.conn.watch();
        self.sources.insert(peer.conn.token, Source::Peer(id));
        if let Some(lane) = peer.lane() {
            let token = self.inner.reactor.token();
            watched =
                watched.and_then(|()| self.inner.reactor.watch(&lane.ring.event, token, EventFlags::IN));
            self.sources.insert(token, Source::PeerLane(id));
        }
        if let Some(side) = peer.side() {
            let token = self.inner.reactor.token();
            if self.inner.reactor.watch(&side.fd, token, EventFlags::IN).is_ok() {
                self.sources.insert(token, Source::PeerSide(id));
            }
        }
        if let Some(pidfd) = &*peer.pidfd.lock() {
            let token = self.inner.reactor.token();
            if self.inner.reactor.watch(pidfd, token, EventFlags::IN).is_ok() {
                self.sources.insert(token, Source::PeerProcess(id));
            }
        }
        let kinds: Vec<_> = peer.paths.iter().map(|p| p.candidate.kind.as_str()).collect();
        tracing::info!(
            agent = %self.inner.name,
            peer = %peer.info.name,
            epoch = %peer.info.epoch,
            at = whereabouts(&peer.info),
            transports = ?kinds,
            "peer up"
        );
        self.peers.insert(id, Entry::new(peer.clone()));
        let handle = Peer::from_inner(&self.inner, peer);
        self.introduced.retain(|h| h.strong_count() > 0);
        for host in self.introduced.clone().iter().filter_map(Weak::upgrade) {
            host.peer_up(&handle);
        }
        if self.shutdown.is_some() {
            self.gone(id, ErrorCode::Closed, "this agent is shutting down", true);
        } else if let Err(e) = watched {
            self.gone(id, ErrorCode::System, &e.to_string(), true);
        } else if !peer.is_up() {
            // Disconnected before we came to it.
            self.gone(id, ErrorCode::PeerGone, "disconnected by this side", true);
        } else if let Err(end) = peer.begin(&self.inner, decoder) {
            self.gone(id, end.code, &end.text, end.tell);
        }
    }

    fn read_peer(&mut self, id: u64) {
        let mut buffer = [0u8; 16 << 10];
        // A bounded number of rounds, so that one peer cannot keep the thread to itself.
        for _ in 0..64 {
            let Some(peer) = self.peers.get(&id).map(|e| e.peer.clone()) else { return };
            match peer.conn.read(&mut buffer) {
                Ok(0) => {
                    // What it said before it left.
                    while self.listen(&peer) {}
                    return self.ended(id, "closed its connection");
                }
                Ok(n) => {
                    if let Err(end) = peer.hear(&self.inner, &buffer[..n]) {
                        self.gone(id, end.code, &end.text, end.tell);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(e) => return self.ended(id, &format!("broke its connection: {e}")),
            }
        }
    }

    /// Takes what is in a peer's lane; true when there was something.
    fn listen(&mut self, peer: &Arc<PeerInner>) -> bool {
        match peer.listen(&self.inner) {
            Ok(found) => found,
            Err(end) => {
                self.gone(peer.id, end.code, &end.text, end.tell);
                true
            }
        }
    }

    /// Takes what is in the peers' lanes; true when there was something. `asleep`: asks to be woken for what comes from now on.
    fn listen_to_all(&mut self, asleep: bool) -> bool {
        let ready =
            |e: &&Entry| e.peer.lane().is_some_and(|l| if asleep { l.arm() } else { l.ring.has_some() });
        let ready: Vec<_> = self.peers.values().filter(ready).map(|e| e.peer.clone()).collect();
        let mut some = false;
        for peer in &ready {
            some |= self.listen(peer);
        }
        some
    }

    /// Ends pings, timeouts and drains of peers; gives when to look again.
    fn check_peers(&mut self, now: Instant) -> Option<Instant> {
        let timeout = self.inner.config.peer_timeout;
        let mut next = None::<Instant>;
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        for id in ids {
            let Some(entry) = self.peers.get_mut(&id) else { continue };
            let again = if entry.is_draining() {
                if self.drain(id) { None } else { Some(now + DRAIN_TICK) }
            } else {
                match entry.check(now, timeout) {
                    Ok(at) => Some(at),
                    Err(text) => {
                        self.gone(id, ErrorCode::PeerGone, &text, true);
                        Some(now + DRAIN_TICK)
                    }
                }
            };
            next = [next, again].into_iter().flatten().min();
        }
        next
    }

    /// Takes everything that stands for a peer out of the epoll set.
    pub(super) fn forget_sources(&mut self, peer: &PeerInner) {
        if let Some(lane) = peer.lane() {
            self.inner.reactor.unwatch(&lane.ring.event);
        }
        if let Some(side) = peer.side() {
            self.inner.reactor.unwatch(&side.fd);
        }
        if let Some(pidfd) = &*peer.pidfd.lock() {
            self.inner.reactor.unwatch(pidfd);
        }
        let id = peer.id;
        self.sources.retain(
            |_, s| {
                !matches!(
                    s,
                    Source::Peer(i) | Source::PeerLane(i) | Source::PeerSide(i) | Source::PeerProcess(i) if *i == id
                )
            },
        );
    }

    pub(super) fn forget_source(&mut self, token: u64) {
        self.sources.remove(&token);
    }

    // ---- the end ----

    fn begin_shutdown(&mut self) {
        self.inner.closed.store(true, Ordering::Release);
        self.inner.inbox.shut();
        self.inner.hosts().iter().for_each(|h| h.closed());
        self.inner.hosts.write().clear();
        self.unwatch_listeners();
        let tokens: Vec<u64> = self.incoming.keys().copied().collect();
        for token in tokens {
            self.drop_incoming(token);
        }
        self.sources.retain(|_, s| !matches!(s, Source::SideStranger(..)));
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        for id in ids {
            self.gone(id, ErrorCode::Closed, "this agent is shutting down", true);
        }
    }

    /// Lets go of everything. An error says what could not be ended in time.
    fn finish(mut self) -> Result<()> {
        let mut left = Vec::new();
        for (_, entry) in std::mem::take(&mut self.peers) {
            let peer = entry.peer;
            left.push(peer.info.name.to_string());
            self.forget_sources(&peer);
            if peer.in_flight.load(Ordering::Acquire) > 0 {
                peer.conn.abandon();
            } else {
                peer.let_go();
            }
        }
        self.inner.held.close();
        for slot in &self.inner.slots {
            slot.transport.shutdown();
        }
        self.inner.exports.write().clear();
        for listener in &self.inner.listeners {
            listener.remove_file();
        }
        // Data paths that were still being connected end with their deadline; their results are dropped.
        if left.is_empty() {
            Ok(())
        } else {
            Err(Error::failed(
                ErrorCode::TimedOut,
                format!(
                    "these peers did not confirm in time that they have stopped writing: {}",
                    left.join(", ")
                ),
            ))
        }
    }
}
