//! The NIXL agent of one kvxfer agent, and everything that may only be done by one thread at a time.
//!
//! NIXL runs without its progress thread, so something moves only while somebody is inside the library. That is
//! whoever waits for a transfer ([`Engine::assist`]), else the agent's progress thread ([`Engine::poll`]), else, and for
//! what *peers* ask of this side, the [`super::keeper`]. They all enter through one lock. It is never held while
//! trackers are finished, because a tracker's hooks may come back here.

use super::agent::{create_agent, failed};
use super::job::{Active, GRACE, Prepared, Step, Tools, Way};
use super::link::Remote;
use super::plan::Descriptor;
use super::regions::Regions;
use super::staged::Slots;
use crate::config::NixlConfig;
use crate::{Error, Memory, Result};
use crossbeam::queue::SegQueue;
use kvxfer_proto::{ErrorCode, RegionId, TransferId};
use nixl_sys::{Agent, Backend, MemType, NotificationMap, RegDescList, XferRequest};
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A waiter that found nothing to do within this time goes to sleep and leaves the rest to the progress thread.
const ASSIST_WAIT: Duration = Duration::from_micros(500);
/// Longest wait of a waiter for the lock; a request over CMA is copied within it.
const ASSIST_LOCK: Duration = Duration::from_millis(5);
/// The progress thread has other things to do after this long; one request may take longer.
const POLL_TURN: Duration = Duration::from_micros(500);
/// The progress thread stays away this long after a waiter was seen driving.
const ASSISTED: Duration = Duration::from_micros(200);
/// Ended requests kept until a quiet moment.
const MAX_RETIRED: usize = 64;
/// Sessions that have greeted but not (yet) been connected to.
const MAX_STRANGERS: usize = 1024;
/// Asks the peer for an answer; the session follows.
const HELLO: &[u8] = b"kvxfer?";
/// The answer; the session follows.
const ANSWER: &[u8] = b"kvxfer!";

pub(super) type Session = [u8; 16];

/// What the keeper found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing to do.
    Nothing,
    /// Something happened.
    Activity,
    /// Somebody else drives NIXL.
    OthersAtWork,
}

/// Shared by the transport, its links and its keeper.
pub(super) struct Engine {
    /// Name of the NIXL agent: unique among all agents that may meet.
    pub(super) name: String,
    state: Mutex<Option<State>>,
    /// Regions and their tickets, readable without waiting for a driver.
    known: RwLock<HashMap<RegionId, Known>>,
    /// Submitted and not yet seen by a driver.
    inbox: SegQueue<Active>,
    /// Jobs not finished.
    jobs: AtomicUsize,
    links: AtomicUsize,
    /// Those of them whose peers need help.
    helped: AtomicUsize,
    closing: AtomicBool,
    /// The log has said that device memory is not registered.
    told: AtomicBool,
    origin: Instant,
    /// Threads inside [`Engine::assist`].
    waiters: AtomicUsize,
    /// Nanoseconds after `origin` at which a waiter, or anybody, last drove.
    assisted: AtomicU64,
    driven: AtomicU64,
}

/// What the lock guards. Fields are dropped in this order: requests, then registrations, then their memory, then NIXL.
struct State {
    active: Vec<Active>,
    retired: Vec<XferRequest>,
    prepared: Prepared,
    regions: Regions,
    slots: Slots,
    /// Memory of transfers whose connection was given up: NIXL may still look at it.
    limbo: Vec<Arc<Memory>>,
    greetings: HashMap<Session, Greeting>,
    scratch: Vec<Descriptor>,
    backends: Vec<Backend>,
    agent: Agent,
}

/// What has become of a region.
enum Known {
    /// Registered; its ticket.
    Registered(Arc<[u8]>),
    /// A device's, which the backends do not take.
    Staged,
}

#[derive(Default)]
struct Greeting {
    /// NIXL name of the peer, once this side has its metadata.
    connected: Option<String>,
    /// The peer said hello, and whether it has its answer.
    heard: bool,
    replied: bool,
    /// The peer answered ours.
    answered: bool,
}

impl Engine {
    pub(super) fn new(name: String, config: &NixlConfig) -> Result<Arc<Self>> {
        let (agent, backends) = create_agent(&name, config)?;
        let state = State {
            active: Vec::new(),
            retired: Vec::new(),
            prepared: Prepared::default(),
            regions: Regions::default(),
            slots: Slots::new(config.staging_depth),
            limbo: Vec::new(),
            greetings: HashMap::new(),
            scratch: Vec::new(),
            backends,
            agent,
        };
        Ok(Arc::new(Self {
            name,
            state: Mutex::new(Some(state)),
            known: RwLock::default(),
            inbox: SegQueue::new(),
            jobs: AtomicUsize::new(0),
            links: AtomicUsize::new(0),
            helped: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            told: AtomicBool::new(false),
            waiters: AtomicUsize::new(0),
            origin: Instant::now(),
            assisted: AtomicU64::new(0),
            driven: AtomicU64::new(0),
        }))
    }

    // ---- memory ----

    /// Registers a region's memory; once is enough. A device's that no backend takes will go through slots.
    pub(super) fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        self.with(|state| {
            if self.known.read().contains_key(&region) {
                return Ok(());
            }
            let known = match state.regions.register(&state.agent, &state.backends, &self.name, region, memory) {
                Ok(ticket) => Known::Registered(ticket.into()),
                Err(e) if memory.is_device() => {
                    // Said once where everybody sees it: a NIC that could read the device is faster.
                    if self.told.swap(true, Ordering::Relaxed) {
                        tracing::debug!(%region, error = %e, "goes through pinned memory");
                    } else {
                        tracing::warn!(%region, error = %e, "NIXL's transfers of device memory go through pinned memory");
                    }
                    Known::Staged
                }
                Err(e) => return Err(e),
            };
            self.known.write().insert(region, known);
            Ok(())
        })
    }

    /// The bytes of a region's ticket; none of one that the backends do not take.
    pub(super) fn ticket(&self, region: RegionId) -> Option<Arc<[u8]>> {
        match self.known.read().get(&region)? {
            Known::Registered(ticket) => Some(Arc::clone(ticket)),
            Known::Staged => None,
        }
    }

    /// How transfers from and to a region go; `None` when it was never registered.
    pub(super) fn way(&self, region: RegionId) -> Option<Way> {
        self.known.read().get(&region).map(|known| match known {
            Known::Registered(_) => Way::Direct,
            Known::Staged => Way::Staged,
        })
    }

    pub(super) fn deregister(&self, region: RegionId) {
        self.known.write().remove(&region);
        let mut guard = self.state.lock();
        let Some(state) = guard.as_mut() else { return };
        if let Some(range) = state.regions.remove(region) {
            // Ended requests may refer to it.
            state.retired.clear();
            state.prepared.clear();
            drop(range);
        }
    }

    // ---- peers ----

    /// What a peer needs to connect: how to reach the backends, no memory.
    pub(super) fn connection_metadata(&self) -> Result<Vec<u8>> {
        self.with(|state| {
            let none = RegDescList::new(MemType::Dram).map_err(|e| failed("create_reg_dlist", &e))?;
            state.agent.get_local_partial_md(&none, None).map_err(|e| failed("get_local_partial_md", &e))
        })
    }

    /// Loads a peer's metadata, which must be that of `name`.
    pub(super) fn load(&self, name: &str, metadata: &[u8]) -> Result<()> {
        self.with(|state| state.load(name, metadata))
    }

    /// Forgets all of a peer's metadata, closing its connection, and loads the given ones instead.
    pub(super) fn reload<'a>(&self, name: &str, metadata: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        self.with(|state| {
            state.forget(name);
            metadata.into_iter().try_for_each(|m| state.load(name, m))
        })
    }

    /// Says hello to a peer whose metadata is loaded and waits for its answer: UCX connects in both directions only
    /// while both sides drive it, and later transfers find the connection ready.
    pub(super) fn greet(&self, name: &str, session: Session, deadline: Instant) -> Result<bool> {
        let hello = [HELLO, &session].concat();
        self.with(|state| {
            let greeting = state.greetings.entry(session).or_default();
            *greeting =
                Greeting { connected: Some(name.to_owned()), heard: greeting.heard, ..Greeting::default() };
            state.agent.send_notification(name, &hello, None).map_err(|e| failed("gen_notif", &e))
        })?;
        let start = Instant::now();
        loop {
            let done = self.with(|state| {
                state.progress();
                Ok(state.greetings.get(&session).is_some_and(|g| g.answered))
            })?;
            let now = Instant::now();
            if done || now >= deadline {
                return Ok(done);
            }
            if now - start < Duration::from_micros(500) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Drops a peer: its session, its metadata and the connection.
    pub(super) fn disconnect(&self, remote: &Remote) {
        if let Some(state) = self.state.lock().as_mut() {
            state.leave(remote);
        }
    }

    // ---- jobs ----

    /// Takes a job. When `at_once`, and nobody is driving, its first request is posted before this returns.
    pub(super) fn submit(&self, mut active: Active, at_once: bool) {
        self.jobs.fetch_add(1, Ordering::AcqRel);
        active.remote.job_begins();
        if at_once
            && let Some(mut guard) = self.state.try_lock()
            && let Some(state) = guard.as_mut()
        {
            if state.step(&mut active, self.is_closing()) == Step::Ended {
                state.after(&active);
                drop(guard);
                self.finish(&active);
            } else {
                state.active.push(active);
            }
            return;
        }
        self.inbox.push(active);
        if self.is_closing() {
            // Shutdown may have looked into the inbox for the last time.
            self.abandon();
        }
    }

    /// Lends the calling thread to a job: true when it is worth asking again.
    pub(super) fn assist(&self, transfer: TransferId) -> bool {
        self.waiters.fetch_add(1, Ordering::AcqRel);
        let again = self.assist_once(transfer);
        // A request may have taken milliseconds; the next turn is this thread's as well.
        let now = self.now();
        self.assisted.store(now, Ordering::Relaxed);
        self.driven.store(now, Ordering::Relaxed);
        self.waiters.fetch_sub(1, Ordering::AcqRel);
        again
    }

    fn assist_once(&self, transfer: TransferId) -> bool {
        // Whoever is inside does work that this thread waits for as well, if only by its turn.
        let Some(mut guard) = self.state.try_lock_for(ASSIST_LOCK) else { return true };
        let Some(state) = guard.as_mut() else { return false };
        state.collect(&self.inbox);
        let Some(index) = state.active.iter().position(|a| a.job.transfer == transfer) else { return false };
        let mut ended = Vec::new();
        let step = state.turn_of(index, self.is_closing(), &mut ended);
        let again = step != Step::Waiting || state.active[index].waits() < ASSIST_WAIT;
        state.cut(self.is_closing(), &mut ended);
        drop(guard);
        self.finish_all(&ended);
        again
    }

    /// Drives every job while something moves, for a moment at most; true when it should be called again.
    pub(super) fn poll(&self) -> bool {
        if self.jobs() == 0 {
            return false;
        }
        let since = Duration::from_nanos(self.now().saturating_sub(self.assisted.load(Ordering::Relaxed)));
        if self.waiters.load(Ordering::Acquire) > 0 || since < ASSISTED {
            // Two threads that take turns at one lock are slower than one, and on a small machine a thread that looks
            // every few microseconds slows its neighbour down. Should the waiter leave, the keeper takes over.
            return false;
        }
        let start = Instant::now();
        while self.drive() == Some(true) && self.jobs() > 0 && start.elapsed() < POLL_TURN {}
        self.jobs() > 0
    }

    /// For the keeper: serves peers, and drives jobs that nobody else has driven for a moment.
    pub(super) fn keep(&self) -> Seen {
        let idle = Duration::from_nanos(self.now().saturating_sub(self.driven.load(Ordering::Relaxed)));
        if idle < super::keeper::ASIDE {
            // A driver serves peers as well: all of it goes through the same worker.
            return Seen::OthersAtWork;
        }
        if self.jobs() > 0 {
            return if self.drive().is_some() { Seen::Activity } else { Seen::OthersAtWork };
        }
        let Some(mut guard) = self.state.try_lock() else { return Seen::OthersAtWork };
        let Some(state) = guard.as_mut() else { return Seen::Nothing };
        state.retired.clear();
        // The library does not say whether it did anything. A look that finds nothing takes a microsecond, and ten when
        // the caches are cold; a small message over a socket takes as long.
        let busy = if self.helps() { Duration::from_micros(6) } else { Duration::from_micros(50) };
        if state.progress() > busy { Seen::Activity } else { Seen::Nothing }
    }

    /// Drives until none of the peer's jobs is left or `deadline` has passed.
    pub(super) fn settle(&self, remote: &Remote, deadline: Instant) {
        while remote.jobs() > 0 && Instant::now() < deadline {
            if self.drive() != Some(true) {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }

    /// Ends every job and takes NIXL's agent down.
    pub(super) fn shutdown(&self) {
        self.closing.store(true, Ordering::Release);
        let deadline = Instant::now() + GRACE + Duration::from_millis(500);
        while self.jobs.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            if self.drive() != Some(true) {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        self.known.write().clear();
        let state = self.state.lock().take();
        // Requests that did not end go down with the agent: after that nothing moves any more.
        let left = state.map(State::take_down).unwrap_or_default();
        for job in &left {
            self.end(job);
        }
        self.abandon();
    }

    /// One turn, if nobody else is at it.
    pub(super) fn nudge(&self) {
        self.drive();
    }

    pub(super) fn link_begins(&self, needs_help: bool) {
        self.links.fetch_add(1, Ordering::AcqRel);
        self.helped.fetch_add(usize::from(needs_help), Ordering::AcqRel);
    }
    pub(super) fn link_ends(&self, needs_help: bool) {
        self.links.fetch_sub(1, Ordering::AcqRel);
        self.helped.fetch_sub(usize::from(needs_help), Ordering::AcqRel);
    }
    /// Some peer's transfers run over sockets and need this side's help.
    pub(super) fn helps(&self) -> bool {
        self.helped.load(Ordering::Acquire) > 0
    }
    /// Peers connected, or being connected.
    pub(super) fn links(&self) -> usize {
        self.links.load(Ordering::Acquire)
    }

    /// Jobs under way.
    pub(super) fn jobs(&self) -> usize {
        self.jobs.load(Ordering::Acquire)
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// True when the NIXL agent is gone.
    pub(super) fn is_down(&self) -> bool {
        self.is_closing() && self.state.lock().is_none()
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut guard: MutexGuard<'_, Option<State>> = self.state.lock();
        let state = guard.as_mut().ok_or_else(|| {
            Error::failed(ErrorCode::Closed, "the agent's nixl transport has been shut down")
        })?;
        f(state)
    }

    /// One turn of every job: whether anything moved, or `None` when somebody else is at it.
    fn drive(&self) -> Option<bool> {
        let mut guard = self.state.try_lock()?;
        self.driven.store(self.now(), Ordering::Relaxed);
        let Some(state) = guard.as_mut() else { return Some(false) };
        state.collect(&self.inbox);
        let (ended, moved) = state.drive(self.is_closing());
        if state.retired.len() > MAX_RETIRED {
            state.retired.clear();
        }
        drop(guard);
        self.finish_all(&ended);
        Some(moved)
    }

    /// After [`State::after`], without the lock.
    fn finish(&self, active: &Active) {
        active.job.tracker.finish();
        self.jobs.fetch_sub(1, Ordering::AcqRel);
    }

    fn finish_all(&self, ended: &[Active]) {
        for active in ended {
            self.finish(active);
        }
    }

    /// Ends a job that will not be driven any more.
    fn end(&self, active: &Active) {
        active.job.tracker.fail_rest(ErrorCode::Closed, "the agent was shut down");
        active.remote.job_ends();
        self.finish(active);
    }

    fn abandon(&self) {
        if self.state.lock().is_none() {
            while let Some(active) = self.inbox.pop() {
                self.end(&active);
            }
        }
    }
}

impl State {
    fn collect(&mut self, inbox: &SegQueue<Active>) {
        while let Some(active) = inbox.pop() {
            self.active.push(active);
        }
    }

    fn step(&mut self, active: &mut Active, closing: bool) -> Step {
        active.step(&mut Tools {
            agent: &self.agent,
            backends: &self.backends,
            retired: &mut self.retired,
            prepared: &mut self.prepared,
            slots: &mut self.slots,
            scratch: &mut self.scratch,
            closing,
        })
    }

    /// One turn of every job: the ended ones, to be finished without the lock, and whether anything moved.
    fn drive(&mut self, closing: bool) -> (Vec<Active>, bool) {
        let mut ended = Vec::new();
        let moved = self.turn(closing, &mut ended);
        self.cut(closing, &mut ended);
        (ended, moved)
    }

    /// One turn of every job; true when anything moved.
    fn turn(&mut self, closing: bool, ended: &mut Vec<Active>) -> bool {
        let mut moved = false;
        let mut at = 0;
        while at < self.active.len() {
            let step = self.turn_of(at, closing, ended);
            moved |= step != Step::Waiting;
            at += usize::from(step != Step::Ended);
        }
        moved
    }

    /// One turn of one job, which is taken out when it has ended.
    fn turn_of(&mut self, index: usize, closing: bool, ended: &mut Vec<Active>) -> Step {
        let mut active = self.active.remove(index);
        let step = self.step(&mut active, closing);
        if step == Step::Ended {
            self.after(&active);
            ended.push(active);
        } else {
            self.active.insert(index, active);
        }
        step
    }

    /// Gives up the connections whose requests do not end. What else runs over the same one ends with it, before any of it is reported
    /// as finished.
    fn cut(&mut self, closing: bool, ended: &mut Vec<Active>) {
        let severed: Vec<_> =
            self.active.iter().map(|a| &a.remote).filter(|r| r.to_be_cut()).cloned().collect();
        for remote in &severed {
            for active in self.active.iter_mut().filter(|a| Arc::ptr_eq(&a.remote, remote)) {
                active.give_up(&mut self.slots, &mut self.limbo);
            }
            self.leave(remote);
        }
        if !severed.is_empty() {
            self.turn(closing, ended);
        }
    }

    /// Bookkeeping of a job that has ended.
    fn after(&mut self, active: &Active) {
        if active.remote.job_ends() && active.remote.closed() {
            self.leave(&active.remote);
        }
    }

    /// Drops a peer: its session, its metadata and the connection.
    fn leave(&mut self, remote: &Remote) {
        self.greetings.remove(&remote.session);
        self.forget(&remote.nixl_name);
    }

    fn load(&mut self, name: &str, metadata: &[u8]) -> Result<()> {
        let loaded = self.agent.load_remote_md(metadata).map_err(|e| failed("load_remote_md", &e))?;
        if loaded == name {
            return Ok(());
        }
        self.forget(&loaded);
        Err(Error::failed(
            ErrorCode::Protocol,
            format!("the peer's nixl metadata speaks for {loaded:?}, the peer is {name:?}"),
        ))
    }

    fn forget(&mut self, name: &str) {
        self.retired.clear();
        self.prepared.clear();
        // An error means that NIXL did not know it (any more).
        let _ = self.agent.invalidate_remote_md(name);
    }

    /// Lets NIXL do what peers asked for and answers their greetings. Gives the time it took; a long one when a peer
    /// greeted.
    fn progress(&mut self) -> Duration {
        let start = Instant::now();
        let Ok(mut map) = NotificationMap::new() else { return Duration::ZERO };
        if self.agent.get_notifications(&mut map, None).is_err() {
            return Duration::ZERO;
        }
        let took = start.elapsed();
        if map.is_empty().unwrap_or(true) {
            return if self.answer() { Duration::MAX } else { took };
        }
        let names: Vec<String> = map.agents().flatten().map(str::to_owned).collect();
        for name in names {
            for index in 0..map.get_notifications_size(&name).unwrap_or(0) {
                if let Ok(message) = map.get_notification_bytes(&name, index) {
                    self.heard(&message);
                }
            }
        }
        self.answer();
        Duration::MAX
    }

    /// Answers the peers that have greeted and that this side can reach by now.
    fn answer(&mut self) -> bool {
        let mut any = false;
        for (session, greeting) in self.greetings.iter_mut().filter(|(_, g)| g.heard && !g.replied) {
            if let Some(name) = &greeting.connected {
                let answer = [ANSWER, session].concat();
                greeting.replied = self.agent.send_notification(name, &answer, None).is_ok();
                any = true;
            }
        }
        any
    }

    /// Releases what is left and destroys the agent; the jobs are returned, to be ended without the lock.
    fn take_down(mut self) -> Vec<Active> {
        self.active.iter_mut().for_each(Active::release);
        std::mem::take(&mut self.active)
    }

    fn heard(&mut self, message: &[u8]) {
        let session = |prefix| message.strip_prefix(prefix).and_then(|s| Session::try_from(s).ok());
        if let Some(session) = session(HELLO) {
            if self.greetings.len() < MAX_STRANGERS || self.greetings.contains_key(&session) {
                let greeting = self.greetings.entry(session).or_default();
                greeting.heard = true;
                greeting.replied = false;
            }
        } else if let Some(greeting) = session(ANSWER).and_then(|s| self.greetings.get_mut(&s)) {
            greeting.answered = true;
        }
    }
}
