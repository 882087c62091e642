//! Notifications of all peers under one roof, and the descriptor that says that something has happened.
//!
//! Peers on this host write into mailboxes of their own, the others' notifications come through the progress thread.
//! The thread that asks looks at both and, when it must wait, sleeps on the mailboxes' eventfds itself.

use super::Notification;
use super::mailbox::{Consumer, drain_eventfd};
use crate::{Error, Result};
use kvxfer_proto::AgentName;
use parking_lot::{Mutex, RwLock};
use prometheus_client::metrics::counter::Counter;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

/// A peer's mailbox, as its consumer sees it.
pub(crate) struct Mailbox {
    pub(crate) peer: AgentName,
    pub(crate) ring: Consumer,
    pub(crate) received: Counter,
    /// The peer is gone: forgotten once empty.
    pub(crate) closing: AtomicBool,
    /// It did not keep the rules; the progress thread ends the peer.
    pub(crate) violated: AtomicBool,
}

/// All of an agent's incoming notifications and events.
pub(crate) struct Inbox {
    queue: Mutex<VecDeque<Arrived>>,
    queued: AtomicUsize,
    boxes: RwLock<Vec<Arc<Mailbox>>>,
    turn: AtomicUsize,
    /// Threads asleep in [`Inbox::wait`].
    sleepers: AtomicUsize,
    /// Written for notifications that came through the progress thread, and to pass a wake-up on.
    arrived: OwnedFd,
    /// Readable when a mailbox or `arrived` is.
    any: OwnedFd,
    /// Written when a transfer ends and somebody listens to `outside`.
    transfers: OwnedFd,
    /// `any` or `transfers`: what the user polls.
    outside: OwnedFd,
    exposed: AtomicBool,
    signalled: AtomicBool,
    pub(crate) closed: AtomicBool,
}

struct Arrived {
    notification: Notification,
    /// How many of this peer wait.
    count: Arc<AtomicUsize>,
}

impl Inbox {
    pub(crate) fn new() -> std::io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let set = || epoll::create(epoll::CreateFlags::CLOEXEC);
        let (arrived, transfers, any, outside) = (event()?, event()?, set()?, set()?);
        epoll::add(&any, &arrived, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&outside, &any, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&outside, &transfers, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self {
            queue: Mutex::default(),
            queued: AtomicUsize::new(0),
            boxes: RwLock::default(),
            turn: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            arrived,
            any,
            transfers,
            outside,
            exposed: AtomicBool::new(false),
            signalled: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }

    /// A peer's mailbox joins.
    pub(crate) fn add(&self, mailbox: &Arc<Mailbox>) -> Result<()> {
        epoll::add(&self.any, &mailbox.ring.event, EventData::new_u64(0), EventFlags::IN)
            .map_err(|e| Error::system("watching a mailbox", e, "raise fs.epoll.max_user_watches"))?;
        self.boxes.write().push(mailbox.clone());
        // Whoever sleeps already must be woken by this one too, also for what is in it by now.
        mailbox.ring.arm();
        if mailbox.ring.has_some() {
            signal(&self.arrived);
        }
        Ok(())
    }

    /// The peer is gone; what it left is still handed out.
    pub(crate) fn close(&self, mailbox: &Arc<Mailbox>) {
        mailbox.closing.store(true, Ordering::Release);
        self.sweep();
    }

    fn sweep(&self) {
        self.boxes.write().retain(|b| {
            let keep = !b.closing.load(Ordering::Acquire) || b.ring.has_some();
            if !keep {
                let _ = epoll::delete(&self.any, &b.ring.event);
            }
            keep
        });
    }

    /// One came through the progress thread; `count` is its peer's.
    pub(crate) fn push(&self, notification: Notification, count: &Arc<AtomicUsize>) {
        count.fetch_add(1, Ordering::Relaxed);
        self.queue.lock().push_back(Arrived { notification, count: count.clone() });
        self.queued.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 || self.exposed.load(Ordering::SeqCst) {
            signal(&self.arrived);
        }
    }

    /// The next one, if any.
    pub(crate) fn try_pop(&self) -> Option<Notification> {
        if self.queued.load(Ordering::Acquire) > 0
            && let Some(a) = self.queue.lock().pop_front()
        {
            self.queued.fetch_sub(1, Ordering::SeqCst);
            a.count.fetch_sub(1, Ordering::Relaxed);
            return Some(a.notification);
        }
        let mut emptied = false;
        let found = {
            let boxes = self.boxes.read();
            let n = boxes.len();
            // Each look starts at another peer, so a busy one does not hide the rest.
            let turn = if n > 1 { self.turn.fetch_add(1, Ordering::Relaxed) } else { 0 };
            (0..n).find_map(|i| {
                let b = &boxes[(turn + i) % n];
                match b.ring.pop() {
                    Ok(Some(payload)) => {
                        b.received.inc();
                        Some(Notification { peer: b.peer.clone(), payload })
                    }
                    Ok(None) => {
                        emptied |= b.closing.load(Ordering::Relaxed);
                        None
                    }
                    Err(e) => {
                        tracing::warn!(peer = %b.peer, error = %e, "mailbox");
                        b.violated.store(true, Ordering::Release);
                        None
                    }
                }
            })
        };
        if emptied {
            self.sweep();
        }
        found
    }

    fn has_some(&self) -> bool {
        self.queued.load(Ordering::SeqCst) > 0 || self.boxes.read().iter().any(|b| b.ring.has_some())
    }

    /// Waits for the next one; `None` at the deadline, or when the agent closes.
    pub(crate) fn wait(&self, deadline: Instant, spin: Duration) -> Option<Notification> {
        let start = Instant::now();
        loop {
            if let Some(n) = self.try_pop() {
                self.pass_on();
                return Some(n);
            }
            if self.closed.load(Ordering::Acquire) {
                return None;
            }
            if start.elapsed() < spin {
                std::hint::spin_loop();
                continue;
            }
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            self.arm();
            let more = self.has_some() || self.closed.load(Ordering::SeqCst);
            let woken = more || super::address::wait_for(&self.any, PollFlags::IN, deadline).unwrap_or(false);
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if !woken {
                return self.try_pop();
            }
            if !more {
                self.drain();
            }
        }
    }

    /// The wake-up this thread has consumed may have been another sleeper's too: arm again, and pass on what is left.
    fn pass_on(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 || self.exposed.load(Ordering::Acquire) {
            self.arm();
            if self.has_some() {
                signal(&self.arrived);
            }
        }
    }

    fn arm(&self) {
        self.boxes.read().iter().for_each(|b| b.ring.arm());
    }

    fn drain(&self) {
        drain_eventfd(&self.arrived);
        self.boxes.read().iter().for_each(|b| b.ring.drain_event());
    }

    /// A transfer has ended.
    pub(crate) fn transfer_ended(&self) {
        if self.exposed.load(Ordering::Acquire) && !self.signalled.swap(true, Ordering::AcqRel) {
            signal(&self.transfers);
        }
    }

    /// The user's descriptor. From the first call on events are signalled there.
    pub(crate) fn outside(&self) -> BorrowedFd<'_> {
        if !self.exposed.swap(true, Ordering::SeqCst) {
            // Whatever has happened before counts as an event.
            self.arm();
            signal(&self.transfers);
        }
        self.outside.as_fd()
    }

    /// Makes the descriptor unreadable until something happens after this.
    pub(crate) fn clear(&self) {
        drain_eventfd(&self.transfers);
        self.drain();
        self.signalled.store(false, Ordering::SeqCst);
        self.arm();
        // The signal that was cleared may have been meant for a thread that sleeps in `wait`.
        if self.sleepers.load(Ordering::SeqCst) > 0 && self.has_some() {
            signal(&self.arrived);
        }
    }

    /// Wakes everybody for good.
    pub(crate) fn shut(&self) {
        self.closed.store(true, Ordering::SeqCst);
        signal(&self.arrived);
    }
}

fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
