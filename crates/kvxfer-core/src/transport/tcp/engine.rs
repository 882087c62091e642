//! The threads that serve data connections: each sleeps in epoll and steps those of its lanes that can do something.
//!
//! Readiness is edge-triggered and kept by the lane, so a busy lane costs no epoll call of its own. A lane with
//! work is queued once, stepped for a bounded amount, and goes to the back of the queue: lanes take turns.

use super::lane::{Lane, Scratch};
use super::link::{Finished, Inner, finish};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use std::collections::{HashMap, VecDeque};
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// All threads and links of one transport.
pub(super) struct Engine {
    threads: usize,
    spin: Duration,
    pool: Mutex<Pool>,
    next: AtomicU64,
    doors: Mutex<Doors>,
}

#[derive(Default)]
struct Pool {
    workers: Vec<(Arc<Worker>, JoinHandle<()>)>,
    stopped: bool,
}

/// Who may come in: links by session, and streams that came before their link.
#[derive(Default)]
struct Doors {
    links: HashMap<[u8; 16], Arc<Inner>>,
    parked: VecDeque<Parked>,
}

struct Parked {
    session: [u8; 16],
    lane: u16,
    stream: TcpStream,
    until: Instant,
}

/// Streams kept for links that are not there yet, and for how long.
const MAX_PARKED: usize = 256;
const PARK_FOR: Duration = Duration::from_secs(30);

impl Engine {
    pub(super) fn new(threads: usize, spin: Duration) -> Arc<Self> {
        Arc::new(Self {
            threads,
            spin,
            pool: Mutex::default(),
            next: AtomicU64::new(1),
            doors: Mutex::default(),
        })
    }

    /// The worker with the fewest lanes and a token for a new one; starts the threads with the first lane. The lanes of
    /// one link are started one after another, so they are spread over the threads.
    pub(super) fn worker(&self) -> Result<(Arc<Worker>, u64)> {
        let mut pool = self.pool.lock();
        if pool.stopped {
            return Err(stopped());
        }
        while pool.workers.len() < self.threads {
            let worker = Worker::new()?;
            let (shared, spin) = (worker.clone(), self.spin);
            let thread =
                crate::threads::spawn(format!("kvxfer-tcp-{}", pool.workers.len()), move || shared.run(spin))
                    .map_err(|e| {
                        Error::system("spawn an I/O thread", e, "raise the limit of threads (ulimit -u)")
                    })?;
            pool.workers.push((worker, thread));
        }
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let least = pool.workers.iter().min_by_key(|(worker, _)| worker.lanes.lock().len());
        least.map(|(worker, _)| (worker.clone(), token)).ok_or_else(stopped)
    }

    /// Makes a link known, hands it the streams that came before it, and ends it if not all have come by `deadline`.
    pub(super) fn admit(&self, link: &Arc<Inner>, deadline: Instant) -> Result<()> {
        let early: Vec<Parked> = {
            let mut doors = self.doors.lock();
            if self.pool.lock().stopped {
                return Err(stopped());
            }
            if doors.links.contains_key(&link.session) {
                return Err(Error::failed(
                    ErrorCode::Busy,
                    format!("a tcp link to {} for this session exists already: close it first", link.name),
                ));
            }
            doors.links.insert(link.session, link.clone());
            let (early, late) = doors.parked.drain(..).partition(|p| p.session == link.session);
            doors.parked = late;
            early.into_iter().collect()
        };
        for p in early {
            report(link.add_lane(p.lane, p.stream));
        }
        if !link.complete() {
            let (worker, _) = self.worker()?;
            worker.deadlines.lock().push((deadline, Arc::downgrade(link)));
            worker.wake();
        }
        Ok(())
    }

    /// A stream came from the listener.
    pub(super) fn adopt(&self, session: [u8; 16], lane: u16, stream: TcpStream) {
        let link = {
            let mut doors = self.doors.lock();
            let now = Instant::now();
            doors.parked.retain(|p| p.until > now);
            match doors.links.get(&session) {
                Some(link) => link.clone(),
                None if self.pool.lock().stopped => return,
                None => {
                    if doors.parked.len() >= MAX_PARKED {
                        doors.parked.pop_front();
                    }
                    doors.parked.push_back(Parked { session, lane, stream, until: now + PARK_FOR });
                    return;
                }
            }
        };
        report(link.add_lane(lane, stream));
    }

    /// The link has ended.
    pub(super) fn forget(&self, link: &Inner) {
        let mut doors = self.doors.lock();
        // A second link of the same session was refused and must not take the first one's place with it.
        if doors.links.get(&link.session).is_some_and(|known| std::ptr::eq(&raw const **known, link)) {
            doors.links.remove(&link.session);
            doors.parked.retain(|p| p.session != link.session);
        }
    }

    /// Ends every link and every thread.
    pub(super) fn shutdown(&self) {
        let workers = {
            let mut pool = self.pool.lock();
            pool.stopped = true;
            std::mem::take(&mut pool.workers)
        };
        let links: Vec<_> = {
            let mut doors = self.doors.lock();
            doors.parked.clear();
            doors.links.values().cloned().collect()
        };
        let mut finished = Finished::new();
        for link in links {
            link.end(ErrorCode::Closed, "the transport was shut down", &mut finished);
        }
        finish(finished);
        for (worker, thread) in workers {
            worker.stop.store(true, Ordering::SeqCst);
            worker.wake();
            // A hook that shuts the agent down runs on the thread itself, which ends by itself afterwards.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a tcp I/O thread panicked");
            }
        }
    }
}

fn stopped() -> Error {
    Error::failed(ErrorCode::Closed, "the tcp transport was shut down")
}

fn report(outcome: Result<()>) {
    if let Err(e) = outcome {
        tracing::warn!(error = %e, "tcp data connection refused");
    }
}

/// One thread and its epoll.
pub(super) struct Worker {
    epoll: OwnedFd,
    wakeup: OwnedFd,
    sleeping: AtomicBool,
    stop: AtomicBool,
    ready: Mutex<VecDeque<Arc<Lane>>>,
    lanes: Mutex<HashMap<u64, Arc<Lane>>>,
    deadlines: Mutex<Vec<(Instant, std::sync::Weak<Inner>)>>,
}

/// Token of the eventfd; lanes count from one.
const WAKEUP: u64 = 0;

impl Worker {
    fn new() -> Result<Arc<Self>> {
        let advice = "raise the limit of open files (ulimit -n)";
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| Error::system("epoll_create", e, advice))?;
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::system("eventfd", e, advice))?;
        epoll::add(&epoll, &wakeup, EventData::new_u64(WAKEUP), EventFlags::IN)
            .map_err(|e| Error::system("epoll_ctl", e, advice))?;
        Ok(Arc::new(Self {
            epoll,
            wakeup,
            sleeping: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ready: Mutex::default(),
            lanes: Mutex::default(),
            deadlines: Mutex::default(),
        }))
    }

    /// Starts to watch a lane's socket.
    pub(super) fn watch(&self, lane: &Arc<Lane>, socket: BorrowedFd<'_>) -> Result<()> {
        self.lanes.lock().insert(lane.token, lane.clone());
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(lane.token), events).map_err(|e| {
            self.lanes.lock().remove(&lane.token);
            Error::system("epoll_ctl", e, "the limit of epoll watches is fs.epoll.max_user_watches")
        })
    }

    /// Stops watching.
    pub(super) fn unwatch(&self, lane: &Lane, socket: BorrowedFd<'_>) {
        if let Err(e) = epoll::delete(&self.epoll, socket) {
            tracing::debug!(error = %e, "epoll_ctl del");
        }
        self.lanes.lock().remove(&lane.token);
    }

    /// Queues a lane for a step.
    pub(super) fn kick(&self, lane: &Arc<Lane>) {
        if !lane.queued.swap(true, Ordering::AcqRel) {
            {
                let mut ready = self.ready.lock();
                // A stopped worker takes nothing out any more: lane and worker would keep each other for ever.
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                ready.push_back(lane.clone());
            }
            self.wake();
        }
    }

    fn wake(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst)
            && let Err(e) = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes())
        {
            tracing::error!(error = %e, "cannot wake a tcp I/O thread");
        }
    }

    fn run(&self, spin: Duration) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut batch = VecDeque::new();
        let mut scratch = Scratch::default();
        let mut pace = Pace::new(spin);
        while !self.stop.load(Ordering::Acquire) {
            self.wait(&mut events, &pace);
            std::mem::swap(&mut batch, &mut *self.ready.lock());
            scratch.moved = 0;
            let stepped = !batch.is_empty();
            for lane in batch.drain(..) {
                lane.queued.store(false, Ordering::Release);
                if lane.step(&mut scratch) && !lane.queued.swap(true, Ordering::AcqRel) {
                    self.ready.lock().push_back(lane);
                }
                if !scratch.finished.is_empty() {
                    finish(std::mem::take(&mut scratch.finished));
                }
            }
            if stepped {
                pace.note(scratch.moved);
            }
            self.expire(&mut scratch.finished);
        }
        // What was queued too late; from here on `kick` refuses.
        drop(std::mem::take(&mut *self.ready.lock()));
    }

    /// Collects events; sleeps when there is nothing else to do.
    fn wait(&self, events: &mut Vec<epoll::Event>, pace: &Pace) {
        let awake = pace.awake();
        if !awake {
            self.sleeping.store(true, Ordering::SeqCst);
        }
        let idle = !awake && self.ready.lock().is_empty() && !self.stop.load(Ordering::SeqCst);
        let timeout = if idle {
            let next = self.deadlines.lock().iter().map(|d| d.0).min();
            next.map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
        } else {
            Some(Duration::ZERO)
        };
        let timeout = timeout.map(|d| Timespec {
            tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: d.subsec_nanos().into(),
        });
        events.clear();
        let outcome = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout.as_ref());
        self.sleeping.store(false, Ordering::SeqCst);
        if let Err(e) = outcome
            && e != rustix::io::Errno::INTR
        {
            tracing::error!(error = %e, "epoll_wait failed");
        }
        for event in events.iter() {
            if event.data.u64() == WAKEUP {
                // Nonblocking; an empty eventfd is fine.
                let _ = rustix::io::read(&self.wakeup, &mut [0u8; 8]);
                continue;
            }
            let Some(lane) = self.lanes.lock().get(&event.data.u64()).cloned() else { continue };
            let flags = event.flags;
            let fault = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            lane.ready(
                fault || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                fault || flags.contains(EventFlags::OUT),
            );
            if !lane.queued.swap(true, Ordering::AcqRel) {
                self.ready.lock().push_back(lane);
            }
        }
    }

    /// Ends links whose streams have not all come in time.
    fn expire(&self, finished: &mut Finished) {
        let mut deadlines = self.deadlines.lock();
        if deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut late = Vec::new();
        deadlines.retain(|(at, link)| match link.upgrade() {
            Some(link) if !link.complete() => {
                if *at <= now {
                    late.push(link);
                    return false;
                }
                true
            }
            _ => false,
        });
        drop(deadlines);
        for link in late {
            let text = format!("not all {} data connections of {} came in time", link.streams, link.name);
            link.end(ErrorCode::Unreachable, &text, finished);
        }
        finish(std::mem::take(finished));
    }
}

/// When a thread looks around instead of sleeping: for a moment after small messages, where waking up would cost more
/// than the message. Not while bulk data flows: there the core is better left to whoever moves the other end's bytes.
struct Pace {
    spin: Duration,
    awake_until: Option<Instant>,
    bulk_until: Option<Instant>,
}

/// Moving this much in one round is bulk.
const BULK_BYTES: usize = 64 << 10;
/// How long the last bulk round counts.
const BULK_FOR: Duration = Duration::from_millis(1);

impl Pace {
    fn new(spin: Duration) -> Self {
        Self { spin, awake_until: None, bulk_until: None }
    }

    fn note(&mut self, moved: usize) {
        if self.spin.is_zero() {
            return;
        }
        let now = Instant::now();
        if moved >= BULK_BYTES {
            self.bulk_until = Some(now + BULK_FOR);
        }
        let bulk = self.bulk_until.is_some_and(|until| now < until);
        self.awake_until = (!bulk).then(|| now + self.spin);
    }

    fn awake(&self) -> bool {
        self.awake_until.is_some_and(|until| Instant::now() < until)
    }
}
