//! The life of one transfer: outcome per piece, the moment of completion, and who is waiting for it.

use kvxfer_proto::ErrorCode;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

/// Outcome of one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not decided yet.
    Pending,
    /// Moved (and checked, as far as the transfer's integrity asks).
    Done,
    /// Not moved, or not trustworthy.
    Failed(ErrorCode),
}

type Hook = Box<dyn FnOnce(&Tracker) + Send>;

/// Shared between the caller's [`crate::Transfer`], the agent and the link that moves the bytes.
pub struct Tracker {
    outcomes: Box<[AtomicU8]>,
    undecided: AtomicU32,
    failed: AtomicU32,
    first_error: AtomicU16,
    bytes_done: AtomicU64,
    cancel: AtomicU16,
    finished: AtomicBool,
    started: Instant,
    duration_ns: AtomicU64,
    waiters: Mutex<Waiters>,
    woken: Condvar,
}

#[derive(Default)]
struct Waiters {
    wakers: Vec<Waker>,
    hooks: Vec<Hook>,
    detail: Option<String>,
}

const PENDING: u8 = 0;
const DONE: u8 = 1;

impl Tracker {
    /// For a transfer of `pieces` pieces.
    pub fn new(pieces: usize) -> Self {
        Self {
            outcomes: (0..pieces).map(|_| AtomicU8::new(PENDING)).collect(),
            undecided: AtomicU32::new(pieces as u32),
            failed: AtomicU32::new(0),
            first_error: AtomicU16::new(0),
            bytes_done: AtomicU64::new(0),
            cancel: AtomicU16::new(0),
            finished: AtomicBool::new(false),
            started: Instant::now(),
            duration_ns: AtomicU64::new(0),
            waiters: Mutex::default(),
            woken: Condvar::new(),
        }
    }

    // ---- the link's side ----

    /// Why the job should end early, once it should: [`ErrorCode::Cancelled`], [`ErrorCode::TimedOut`], … Checked between slices.
    pub fn cancelled(&self) -> Option<ErrorCode> {
        match self.cancel.load(Ordering::Acquire) {
            0 => None,
            code => Some(ErrorCode::from(code)),
        }
    }

    /// Pieces `first..first + count` have moved, `bytes` in all. Each piece is decided once; a second decision is ignored.
    pub fn done(&self, first: usize, count: usize, bytes: u64) {
        let mut decided = 0;
        for o in &self.outcomes[first..first + count] {
            decided +=
                u32::from(o.compare_exchange(PENDING, DONE, Ordering::AcqRel, Ordering::Relaxed).is_ok());
        }
        if decided > 0 {
            self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
            self.undecided.fetch_sub(decided, Ordering::AcqRel);
        }
    }

    /// One piece failed.
    pub fn fail(&self, piece: usize, code: ErrorCode) {
        debug_assert!(code != ErrorCode::Ok);
        // Codes above 253 do not occur in outcomes; an unknown one from a peer is reported as a transport failure.
        let code = if (code as u16) > 253 { ErrorCode::Transport } else { code };
        let byte = code as u8 + 1;
        if self.outcomes[piece].compare_exchange(PENDING, byte, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let _ = self.first_error.compare_exchange(0, code as u16, Ordering::AcqRel, Ordering::Relaxed);
            self.failed.fetch_add(1, Ordering::Relaxed);
            self.undecided.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Everything still undecided failed with `code`, for the reason in `detail`.
    pub fn fail_rest(&self, code: ErrorCode, detail: impl Into<String>) {
        self.waiters.lock().detail.get_or_insert_with(|| detail.into());
        for i in 0..self.outcomes.len() {
            if self.outcomes[i].load(Ordering::Acquire) == PENDING {
                self.fail(i, code);
            }
        }
    }

    /// Leaves the reason of a failure in words; the first one counts.
    pub fn explain(&self, detail: impl Into<String>) {
        self.waiters.lock().detail.get_or_insert_with(|| detail.into());
    }

    /// True when every piece has an outcome.
    pub fn all_decided(&self) -> bool {
        self.undecided.load(Ordering::Acquire) == 0
    }

    /// The link no longer touches any memory for this job. Every piece must be decided. Runs the hooks, wakes the waiters; only the first call counts.
    pub fn finish(&self) {
        debug_assert!(self.all_decided(), "a transfer was finished with undecided pieces");
        // Hooks run first: what they do (send the notification, count metrics) is visible to whoever sees the end.
        let wakers = loop {
            let hooks = {
                let mut w = self.waiters.lock();
                if self.is_finished() {
                    return;
                }
                if self.duration_ns.load(Ordering::Relaxed) == 0 {
                    self.duration_ns
                        .store((self.started.elapsed().as_nanos() as u64).max(1), Ordering::Relaxed);
                }
                if w.hooks.is_empty() {
                    self.finished.store(true, Ordering::Release);
                    break std::mem::take(&mut w.wakers);
                }
                std::mem::take(&mut w.hooks)
            };
            for hook in hooks {
                hook(self);
            }
        };
        self.woken.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    // ---- the owner's side ----

    /// Asks the link to stop; the first reason counts.
    pub fn request_cancel(&self, why: ErrorCode) {
        let _ = self.cancel.compare_exchange(0, why as u16, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// True once [`Tracker::finish`] has run.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Outcome of one piece; `None` beyond the last.
    pub fn outcome(&self, piece: usize) -> Option<Outcome> {
        Some(match self.outcomes.get(piece)?.load(Ordering::Acquire) {
            PENDING => Outcome::Pending,
            DONE => Outcome::Done,
            byte => Outcome::Failed(ErrorCode::from(u16::from(byte) - 1)),
        })
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.outcomes.len()
    }

    /// The first failure, `None` when all went well (so far).
    pub fn error(&self) -> Option<ErrorCode> {
        match self.first_error.load(Ordering::Acquire) {
            0 => None,
            code => Some(ErrorCode::from(code)),
        }
    }

    /// The reason in words, when there is one.
    pub fn detail(&self) -> Option<String> {
        self.waiters.lock().detail.clone()
    }

    /// Bytes moved.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    /// Pieces that failed.
    pub fn failed_pieces(&self) -> u32 {
        self.failed.load(Ordering::Relaxed)
    }

    /// From submission to the end; zero while under way.
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.duration_ns.load(Ordering::Relaxed))
    }

    /// Runs `hook` at the end, before anybody sees it; at once when already finished.
    pub fn on_finish(&self, hook: impl FnOnce(&Tracker) + Send + 'static) {
        let mut w = self.waiters.lock();
        if self.is_finished() {
            drop(w);
            hook(self);
        } else {
            w.hooks.push(Box::new(hook));
        }
    }

    /// Wakes `waker` at the end; false when already finished.
    pub fn register(&self, waker: &Waker) -> bool {
        let mut w = self.waiters.lock();
        if self.is_finished() {
            return false;
        }
        if !w.wakers.iter().any(|other| other.will_wake(waker)) {
            w.wakers.push(waker.clone());
        }
        true
    }

    /// Sleeps until the end or `deadline`; true when finished.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let mut w = self.waiters.lock();
        while !self.is_finished() {
            if self.woken.wait_until(&mut w, deadline).timed_out() {
                return self.is_finished();
            }
        }
        true
    }
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("pieces", &self.outcomes.len())
            .field("undecided", &self.undecided.load(Ordering::Relaxed))
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}
