//! Jobs held back: stalled ones until they are cancelled, delayed ones until their time comes.

use super::{Shared, closed, end};
use crate::transport::Job;
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, TransferId};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

#[derive(Default)]
pub(super) struct Held {
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    jobs: HashMap<TransferId, Entry>,
    /// Delayed ones that are just being started.
    starting: usize,
    timer: bool,
    closed: bool,
}

struct Entry {
    job: Job,
    /// When it starts, and its number; `None`: never.
    due: Option<(Instant, u64)>,
}

impl Held {
    /// Keeps the job until it is taken.
    pub(super) fn stall(&self, job: Job) -> Result<()> {
        let mut state = self.state.0.lock();
        if state.closed {
            return Err(closed());
        }
        state.jobs.insert(job.transfer, Entry { job, due: None });
        Ok(())
    }

    /// Starts the job at `at`, on the timer's thread.
    pub(super) fn delay(&self, shared: &Arc<Shared>, job: Job, number: u64, at: Instant) -> Result<()> {
        let mut state = self.state.0.lock();
        if state.closed {
            return Err(closed());
        }
        if !state.timer {
            let (held, owner) = (Arc::clone(&self.state), Arc::downgrade(shared));
            crate::threads::spawn("kvxfer-fault", move || run_timer(&held, &owner))
                .map_err(|e| Error::system("starting a timer thread", e, "raise the limit of processes"))?;
            state.timer = true;
        }
        state.jobs.insert(job.transfer, Entry { job, due: Some((at, number)) });
        drop(state);
        self.state.1.notify_one();
        Ok(())
    }

    /// Whether a job will still be started.
    pub(super) fn delays(&self) -> bool {
        let state = self.state.0.lock();
        state.starting > 0 || state.jobs.values().any(|e| e.due.is_some())
    }

    /// Gives a held job back to its end.
    pub(super) fn take(&self, transfer: TransferId) -> Option<Job> {
        self.state.0.lock().jobs.remove(&transfer).map(|e| e.job)
    }

    /// Ends all held jobs and the timer; refuses further ones.
    pub(super) fn close(&self, code: ErrorCode, why: &str) {
        let jobs = {
            let mut state = self.state.0.lock();
            state.closed = true;
            std::mem::take(&mut state.jobs)
        };
        self.state.1.notify_all();
        for entry in jobs.into_values() {
            end(&entry.job, code, why);
        }
    }
}

/// The timer's life: it ends when the link is closed or gone.
fn run_timer(held: &(Mutex<State>, Condvar), owner: &Weak<Shared>) {
    let mut state = held.0.lock();
    while !state.closed {
        let next = state.jobs.values().filter_map(|e| e.due.map(|(at, n)| (at, n, e.job.transfer))).min();
        match next {
            None => held.1.wait(&mut state),
            Some((at, ..)) if at > Instant::now() => {
                held.1.wait_until(&mut state, at);
            }
            Some((_, number, transfer)) => {
                let Some(entry) = state.jobs.remove(&transfer) else { continue };
                state.starting += 1;
                parking_lot::MutexGuard::unlocked(&mut state, || start(owner, entry.job, number));
                state.starting -= 1;
            }
        }
    }
}

fn start(owner: &Weak<Shared>, job: Job, number: u64) {
    let tracker = Arc::clone(&job.tracker);
    let started = match owner.upgrade() {
        // A cancel that found the job neither here nor underneath has only set the flag.
        Some(_) if tracker.cancelled().is_some() => Err(None),
        Some(shared) => {
            let transfer = job.transfer;
            let started = shared.start(job, number).map_err(Some);
            if tracker.cancelled().is_some() {
                shared.cancel(transfer);
            }
            started
        }
        None => Err(None),
    };
    if let Err(e) = started {
        let code = e.as_ref().map_or(tracker.cancelled().unwrap_or(ErrorCode::PeerGone), Error::code);
        tracker.fail_rest(
            code,
            e.map_or_else(|| "the transfer was held back and ended".into(), |e| e.to_string()),
        );
        tracker.finish();
    }
}
