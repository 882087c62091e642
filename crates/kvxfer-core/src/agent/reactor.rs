//! What other threads share with the progress thread: its epoll, its wake-up, its commands and its deadlines.

use super::host::Host;
use super::links::Assembled;
use super::peer::PeerInner;
use super::region::RegionInner;
use crate::transport::{Link, Tracker};
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, TransferId};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// What the progress thread is asked to do.
pub(crate) enum Command {
    /// A peer we connected to is up; what its handshake read beyond the end comes along.
    PeerUp(Arc<PeerInner>, kvxfer_proto::frame::Decoder),
    /// End a peer; the flag says whether it hears of it.
    Gone(Arc<PeerInner>, ErrorCode, String, bool),
    /// The data paths of an incoming connection stand or have failed.
    Linked(u64, Box<Result<Assembled>>),
    /// Something of a peer waits for space in its mailbox.
    Spilled(Arc<PeerInner>),
    /// Something of the peer with that connection waits for space in its lane.
    Blocked(u64),
    /// A region whose last user was a transfer.
    Reap(Box<RegionInner>),
    /// A channel was added.
    HostAdded(Weak<dyn Host>),
    /// End everything until the deadline.
    Shutdown(Instant),
}

/// One transfer's deadline.
struct Deadline {
    at: Instant,
    id: TransferId,
    tracker: Arc<Tracker>,
    link: Arc<dyn Link>,
    peer: Weak<PeerInner>,
    /// It was asked to end at its deadline and has until `at` to do so.
    overdue: bool,
}

impl PartialEq for Deadline {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Deadline {}
impl PartialOrd for Deadline {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Deadline {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

#[derive(Default)]
struct Deadlines {
    heap: BinaryHeap<Reverse<Deadline>>,
    purge_at: usize,
}

/// The shared half of the progress thread.
pub(crate) struct Reactor {
    pub(crate) epoll: OwnedFd,
    wake: OwnedFd,
    woken: AtomicBool,
    commands: Mutex<Vec<Command>>,
    deadlines: Mutex<Deadlines>,
    /// When the thread will look at the clock next, in nanoseconds since `origin`.
    next_look: AtomicU64,
    origin: Instant,
    thread: OnceLock<ThreadId>,
    /// Transports that must be polled may have jobs.
    pub(crate) poll_wanted: AtomicBool,
    /// Hosts want a tick.
    pub(crate) tick_wanted: AtomicBool,
    next_token: AtomicU64,
    /// Set once; afterwards commands are dropped (and run their own `Drop`).
    ended: AtomicBool,
}

/// Token of the wake-up in the epoll set.
pub(crate) const WAKE: u64 = 0;

impl Reactor {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let advice = "raise the limit on open files (ulimit -n)";
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| Error::system("creating an epoll set", e, advice))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::system("creating an eventfd", e, advice))?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)
            .map_err(|e| Error::system("watching an eventfd", e, advice))?;
        Ok(Arc::new(Self {
            epoll,
            wake,
            woken: AtomicBool::new(false),
            commands: Mutex::default(),
            deadlines: Mutex::default(),
            next_look: AtomicU64::new(u64::MAX),
            origin: Instant::now(),
            thread: OnceLock::new(),
            poll_wanted: AtomicBool::new(false),
            tick_wanted: AtomicBool::new(false),
            next_token: AtomicU64::new(1),
            ended: AtomicBool::new(false),
        }))
    }

    pub(crate) fn token(&self) -> u64 {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }

    /// Called by the progress thread when it starts.
    pub(crate) fn adopt_thread(&self) {
        let _ = self.thread.set(std::thread::current().id());
    }

    /// True on the progress thread, which must not wait for itself.
    pub(crate) fn is_progress_thread(&self) -> bool {
        self.thread.get() == Some(&std::thread::current().id())
    }

    /// Watches a descriptor.
    pub(crate) fn watch(&self, fd: impl AsFd, token: u64, flags: epoll::EventFlags) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)
            .map_err(|e| Error::system("watching a descriptor", e, "raise fs.epoll.max_user_watches"))
    }

    /// Stops watching a descriptor.
    pub(crate) fn unwatch(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Wakes the progress thread; many wake-ups before it looks cost one system call.
    pub(crate) fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// The progress thread has seen the wake-up; what is asked from now on wakes again.
    pub(crate) fn clear_wake(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        self.woken.store(false, Ordering::Release);
    }

    pub(crate) fn command(&self, command: Command) {
        if self.ended.load(Ordering::Acquire) {
            return;
        }
        self.commands.lock().push(command);
        if self.ended.load(Ordering::Acquire) {
            // The thread has ended meanwhile: what nobody will do is dropped.
            drop(self.take_commands());
        }
        self.wake();
    }

    pub(crate) fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut *self.commands.lock())
    }

    /// After this nothing is taken in any more; what was left is dropped by the caller.
    pub(crate) fn end(&self) -> Vec<Command> {
        self.ended.store(true, Ordering::Release);
        self.deadlines.lock().heap.clear();
        self.take_commands()
    }

    /// Watches over a transfer's deadline. Wakes the thread only when it would sleep beyond it.
    pub(crate) fn add_deadline(
        &self,
        at: Instant,
        id: TransferId,
        tracker: &Arc<Tracker>,
        link: &Arc<dyn Link>,
        peer: &Arc<PeerInner>,
    ) {
        let entry = Deadline {
            at,
            id,
            tracker: tracker.clone(),
            link: link.clone(),
            peer: Arc::downgrade(peer),
            overdue: false,
        };
        let mut d = self.deadlines.lock();
        if d.heap.len() >= d.purge_at.max(1024) {
            // Most transfers end long before their deadline: drop those now and then, at a constant cost each.
            d.heap.retain(|Reverse(e)| !e.tracker.is_finished());
            d.purge_at = d.heap.len() * 2;
        }
        d.heap.push(Reverse(entry));
        drop(d);
        if self.sleeps_beyond(at) {
            self.wake();
        }
    }

    /// Forgets transfers that have ended: what they hold of their links goes with them.
    pub(crate) fn purge_deadlines(&self) {
        self.deadlines.lock().heap.retain(|Reverse(e)| !e.tracker.is_finished());
    }

    /// Asks transfers past their deadline to end; gives those that do not within `grace` as `(peer, transfer)`.
    /// Also returns the next deadline.
    pub(crate) fn run_deadlines(
        &self,
        now: Instant,
        grace: Duration,
    ) -> (Vec<(Arc<PeerInner>, TransferId)>, Option<Instant>) {
        let mut due = Vec::new();
        let next = {
            let mut d = self.deadlines.lock();
            loop {
                match d.heap.peek() {
                    Some(Reverse(e)) if e.tracker.is_finished() => {
                        d.heap.pop();
                    }
                    Some(Reverse(e)) if e.at <= now => due.extend(d.heap.pop()),
                    Some(Reverse(e)) => break Some(e.at),
                    None => break None,
                }
            }
        };
        let mut stuck = Vec::new();
        let mut again = Vec::new();
        for Reverse(mut e) in due {
            if e.overdue {
                stuck.extend(e.peer.upgrade().map(|p| (p, e.id)));
                continue;
            }
            e.tracker.request_cancel(ErrorCode::TimedOut);
            e.link.cancel(e.id);
            if !e.tracker.is_finished() {
                e.overdue = true;
                e.at = now + grace;
                again.push(Reverse(e));
            }
        }
        let next = again.iter().map(|Reverse(e)| e.at).chain(next).min();
        self.deadlines.lock().heap.extend(again);
        (stuck, next)
    }

    /// Tells everybody until when the thread intends to sleep. Look at commands and deadlines again after this.
    pub(crate) fn announce_sleep(&self, until: Option<Instant>) {
        self.next_look.store(until.map_or(u64::MAX, |t| self.nanos(t)), Ordering::SeqCst);
    }

    /// Whether the thread must be woken to look at the clock by then.
    pub(crate) fn sleeps_beyond(&self, at: Instant) -> bool {
        self.nanos(at) < self.next_look.load(Ordering::SeqCst)
    }

    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.origin).as_nanos() as u64
    }
}
