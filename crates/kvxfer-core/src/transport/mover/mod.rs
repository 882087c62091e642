//! The engine under `inproc`, `shm` and `cma`: threads (and waiting callers) that move jobs slice by slice.
//!
//! A link owns a `Lane`. `submit` checks the job and either moves it at once, when it is small, or queues it: cheap
//! in both cases, and it never waits. Copy threads take slices from the lanes in turn (first in, first out within a
//! lane), so a big job of one peer does not hold up the others; a caller that waits for a job takes slices of it as
//! well. Threads start with the first job that needs them, and sleep when there is nothing to do.

mod task;

pub(crate) use task::{Carrier, Report, Run, Slice};

use super::Job;
use crate::config::AgentConfig;
use crate::{Error, Result};
use kvxfer_proto::integrity::SEGMENT;
use kvxfer_proto::{ErrorCode, TransferId};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use task::{Grab, Task};

/// Copy threads and their queue; one per agent, shared by its copying transports.
pub struct Mover {
    shared: Arc<Shared>,
}

/// One link's place in the queue.
pub(crate) struct Lane {
    shared: Arc<Shared>,
    id: u64,
    /// A link may outlive its transport; its threads stay as long.
    _mover: Arc<Mover>,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Lanes in the ring, readable without the lock by a spinning thread.
    ready: AtomicUsize,
    threads: usize,
    spin: Duration,
    inline_bytes: u64,
}

#[derive(Default)]
struct Queue {
    /// Lanes with slices to hand out, in the order of their turns.
    ring: VecDeque<u64>,
    lanes: HashMap<u64, LaneQueue>,
    next_lane: u64,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    shut: bool,
}

#[derive(Default)]
struct LaneQueue {
    /// Jobs with slices to hand out.
    fifo: VecDeque<Arc<Task>>,
    /// Jobs not finished.
    tasks: HashMap<TransferId, Arc<Task>>,
    /// Jobs being moved within submit, and holds.
    inline: usize,
    closed: bool,
}

impl Mover {
    /// An engine with the configured number of copy threads (at least one), none of them started yet.
    pub fn new(config: &AgentConfig) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                wake: Condvar::new(),
                ready: AtomicUsize::new(0),
                threads: config.copy_threads.max(1),
                spin: config.spin,
                inline_bytes: config.inline_bytes,
            }),
        })
    }

    /// Ends every job as [`ErrorCode::Closed`] and joins the threads. Called again, it does nothing.
    pub fn shutdown(&self) {
        let (tasks, threads) = {
            let mut queue = self.shared.queue.lock();
            queue.shut = true;
            let tasks: Vec<_> = queue.lanes.values().flat_map(|l| l.tasks.values().cloned()).collect();
            (tasks, std::mem::take(&mut queue.threads))
        };
        self.shared.wake.notify_all();
        for task in tasks {
            self.shared.stop(&task, ErrorCode::Closed, "the agent was shut down");
        }
        for thread in threads {
            // The last handle of an agent may go in a completion hook, which runs on one of these threads.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a copy thread had panicked");
            }
        }
    }

    pub(crate) fn lane(self: &Arc<Self>) -> Lane {
        let mut queue = self.shared.queue.lock();
        queue.next_lane += 1;
        let id = queue.next_lane;
        queue.lanes.insert(id, LaneQueue::default());
        Lane { shared: Arc::clone(&self.shared), id, _mover: Arc::clone(self) }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Lane {
    /// Starts `job` on a remote side of `remote_len` bytes. A small one has ended when this returns.
    pub(crate) fn submit(&self, job: Job, carrier: Arc<dyn Carrier>, remote_len: u64) -> Result<()> {
        let bytes = check(&job, remote_len)?;
        if bytes <= self.shared.inline_bytes {
            let _leave = self.enter()?;
            task::run_inline(&job, &*carrier, bytes);
            return Ok(());
        }
        let task = Arc::new(Task::new(self.id, job, carrier));
        let mut queue = self.shared.queue.lock();
        let open = queue.lanes.get(&self.id).filter(|l| !l.closed && !queue.shut).ok_or_else(closed)?;
        if open.tasks.contains_key(&task.job.transfer) {
            return Err(invalid("transfer", format!("transfer {} is under way already", task.job.transfer)));
        }
        // Without a thread nobody would move it unless somebody waited; start it before the job counts.
        self.shared.need_thread(&mut queue)?;
        let Queue { lanes, ring, .. } = &mut *queue;
        let lane = lanes.get_mut(&self.id).ok_or_else(closed)?;
        lane.tasks.insert(task.job.transfer, Arc::clone(&task));
        if lane.fifo.is_empty() {
            ring.push_back(self.id);
            self.shared.ready.store(ring.len(), Ordering::Release);
        }
        lane.fifo.push_back(task);
        let wake = queue.idle > 0;
        drop(queue);
        if wake {
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    /// Moves one slice of the job on the calling thread; false when none is left to take.
    pub(crate) fn assist(&self, transfer: TransferId) -> bool {
        let Some(task) = self.task(transfer) else { return false };
        match task.grab() {
            Grab::Slice(slice) => self.shared.run(&task, &slice),
            Grab::End => self.shared.finish(&task),
            Grab::Nothing => return false,
        }
        true
    }

    /// No new slice of the job starts; it ends with its last slice in progress, at once when there is none.
    pub(crate) fn cancel(&self, transfer: TransferId) {
        if let Some(task) = self.task(transfer) {
            let code = task.job.tracker.cancelled().unwrap_or(ErrorCode::Cancelled);
            self.shared.stop(&task, code, "the transfer was cancelled");
        }
    }

    /// Refuses new jobs and ends all others as cancelled ones end, with [`ErrorCode::PeerGone`].
    pub(crate) fn close(&self) {
        let tasks: Vec<_> = {
            let mut queue = self.shared.queue.lock();
            let Some(lane) = queue.lanes.get_mut(&self.id) else { return };
            lane.closed = true;
            lane.tasks.values().cloned().collect()
        };
        for task in tasks {
            self.shared.stop(&task, ErrorCode::PeerGone, "the peer is gone");
        }
    }

    /// The error of a closed lane, else `otherwise`.
    pub(crate) fn closed_or(&self, otherwise: Error) -> Error {
        let queue = self.shared.queue.lock();
        let open = !queue.shut && queue.lanes.get(&self.id).is_some_and(|l| !l.closed);
        if open { otherwise } else { closed() }
    }

    /// True when it was closed and no job touches memory any more.
    pub(crate) fn is_quiet(&self) -> bool {
        let queue = self.shared.queue.lock();
        queue.lanes.get(&self.id).is_none_or(|l| l.closed && l.tasks.is_empty() && l.inline == 0)
    }

    /// Keeps the lane from being quiet while somebody writes to the remote side by himself. `None` when it is closed.
    pub(crate) fn hold(&self) -> Option<Hold> {
        self.enter().ok()
    }

    fn task(&self, transfer: TransferId) -> Option<Arc<Task>> {
        self.shared.queue.lock().lanes.get(&self.id)?.tasks.get(&transfer).cloned()
    }

    /// Counts one in that is not a task.
    fn enter(&self) -> Result<Hold> {
        let mut queue = self.shared.queue.lock();
        let shut = queue.shut;
        let lane = queue.lanes.get_mut(&self.id).filter(|l| !l.closed && !shut).ok_or_else(closed)?;
        lane.inline += 1;
        Ok(Hold { shared: Arc::clone(&self.shared), id: self.id })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.close();
        let mut queue = self.shared.queue.lock();
        queue.ring.retain(|id| *id != self.id);
        self.shared.ready.store(queue.ring.len(), Ordering::Release);
        // Jobs with a slice in progress keep themselves alive and end on the thread that moves it.
        let lane = queue.lanes.remove(&self.id);
        drop(queue);
        drop(lane);
    }
}

/// Counts out what [`Lane::enter`] counted in, also when a completion hook panics.
pub(crate) struct Hold {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(lane) = self.shared.queue.lock().lanes.get_mut(&self.id) {
            lane.inline -= 1;
        }
    }
}

impl Shared {
    /// The next thing to do, by turns: a slice to move, or a job to finish.
    fn next(&self) -> Option<(Arc<Task>, Grab)> {
        let mut queue = self.queue.lock();
        let mut found = None;
        while found.is_none()
            && let Some(id) = queue.ring.pop_front()
        {
            let Some(lane) = queue.lanes.get_mut(&id) else { continue };
            while let Some(task) = lane.fifo.front() {
                let grab = task.grab();
                if !matches!(grab, Grab::Nothing) {
                    found = Some((Arc::clone(task), grab));
                    break;
                }
                lane.fifo.pop_front();
            }
            if !lane.fifo.is_empty() {
                queue.ring.push_back(id);
            }
        }
        self.ready.store(queue.ring.len(), Ordering::Release);
        found
    }

    fn run(&self, task: &Task, slice: &Slice) {
        if task.run(slice) {
            self.finish(task);
        }
    }

    fn stop(&self, task: &Task, code: ErrorCode, detail: &str) {
        if task.stop(code, detail) {
            self.finish(task);
        }
    }

    fn finish(&self, task: &Task) {
        let mut queue = self.queue.lock();
        let gone = queue.lanes.get_mut(&task.lane).and_then(|lane| {
            lane.fifo.retain(|t| !std::ptr::eq(&raw const **t, task));
            lane.tasks.remove(&task.job.transfer)
        });
        drop(queue);
        // Hooks and wakers run here, with no lock held.
        task.finish();
        drop(gone);
    }

    fn need_thread(self: &Arc<Self>, queue: &mut Queue) -> Result<()> {
        if queue.idle > 0 || queue.threads.len() >= self.threads {
            return Ok(());
        }
        let index = queue.threads.len();
        let shared = Arc::clone(self);
        match crate::threads::spawn(format!("kvxfer-copy-{index}"), move || shared.work()) {
            Ok(thread) => {
                queue.threads.push(thread);
                Ok(())
            }
            // One thread is enough to make progress.
            Err(_) if index > 0 => Ok(()),
            Err(e) => Err(Error::system(
                "starting a copy thread",
                e,
                "raise the limit of processes (ulimit -u) or of the container's pids",
            )),
        }
    }

    /// A copy thread's life.
    fn work(&self) {
        loop {
            while let Some((task, grab)) = self.next() {
                let run = std::panic::AssertUnwindSafe(|| match grab {
                    Grab::Slice(slice) => self.run(&task, &slice),
                    Grab::End | Grab::Nothing => self.finish(&task),
                });
                if std::panic::catch_unwind(run).is_err() {
                    tracing::error!(transfer = %task.job.transfer, "a completion hook panicked");
                }
            }
            if !self.spin.is_zero() {
                let until = Instant::now() + self.spin;
                while self.ready.load(Ordering::Acquire) == 0 && Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
            let mut queue = self.queue.lock();
            if queue.shut && queue.ring.is_empty() {
                return;
            }
            if queue.ring.is_empty() {
                queue.idle += 1;
                self.wake.wait(&mut queue);
                queue.idle -= 1;
            }
        }
    }
}

/// Checks what the agent has checked before, because a mistake here is memory corruption; returns the sum of lengths.
fn check(job: &Job, remote_len: u64) -> Result<u64> {
    let mut bytes = 0_u64;
    let local_len = job.local.len() as u64;
    for (i, p) in job.pieces.iter().enumerate() {
        let inside = |offset: u64, limit: u64| offset <= limit && p.len <= limit - offset;
        if !inside(p.local_offset, local_len) {
            return Err(out_of_range("local", i, p.local_offset, p.len, local_len));
        }
        if !inside(p.remote_offset, remote_len) {
            return Err(out_of_range("remote", i, p.remote_offset, p.len, remote_len));
        }
        if p.len == 0 {
            return Err(invalid("pieces", format!("piece {i} has length 0")));
        }
        bytes = bytes
            .checked_add(p.len)
            .ok_or_else(|| invalid("pieces", format!("the sum of lengths overflows at piece {i}")))?;
    }
    if job.pieces.is_empty() || job.tracker.pieces() != job.pieces.len() {
        let (pieces, tracked) = (job.pieces.len(), job.tracker.pieces());
        return Err(invalid("pieces", format!("{pieces} pieces with a tracker for {tracked}")));
    }
    if let Some(digest) = &job.digest {
        let mut at = digest.base;
        let gapless = job.pieces.iter().all(|p| {
            let here = p.remote_offset == at;
            at = at.saturating_add(p.len);
            here
        });
        if !gapless || digest.len != bytes || digest.hashes.len() as u64 != bytes.div_ceil(SEGMENT) {
            return Err(invalid(
                "digest",
                format!(
                    "a digest over {} bytes from {} with {} segments does not fit pieces of {bytes} bytes",
                    digest.len,
                    digest.base,
                    digest.hashes.len()
                ),
            ));
        }
    }
    Ok(bytes)
}

fn out_of_range(side: &str, piece: usize, offset: u64, len: u64, limit: u64) -> Error {
    Error::OutOfRange { what: format!("piece {piece}, {side} side"), offset, len, limit }
}

fn invalid(argument: &'static str, problem: String) -> Error {
    Error::InvalidArgument { argument, problem }
}

fn closed() -> Error {
    Error::failed(ErrorCode::Closed, "the link is closed; connect to the peer again")
}

#[cfg(test)]
mod tests;
