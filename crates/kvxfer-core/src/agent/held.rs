//! Jobs that wait for their producer's stream, on transports that know nothing of streams.
//!
//! `cuda_ipc` queues its copies behind the fence on the device. The others read memory at once, so their jobs are held here until the
//! progress thread finds the fence passed. A held job can be cancelled and has its deadline like any other.

use crate::cuda::Fence;
use crate::transport::{Job, Link, Tracker};
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct Held {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    closed: bool,
}

struct Waiting {
    link: Arc<dyn Link>,
    job: Job,
}

impl Held {
    /// Holds a job until its fence has passed.
    pub(crate) fn hold(&self, link: Arc<dyn Link>, job: Job) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            return end(&job.tracker, ErrorCode::Closed, "the agent was shut down");
        }
        state.waiting.push(Waiting { link, job });
    }

    /// Submits what need not wait any more, ends what was cancelled. True while some wait.
    pub(crate) fn drive(&self) -> bool {
        let mut over = Vec::new();
        let busy = {
            let mut state = self.state.lock();
            let mut i = 0;
            while i < state.waiting.len() {
                let w = &state.waiting[i];
                let passed = w.job.after.as_ref().map_or(Ok(true), Fence::is_done);
                if matches!(passed, Ok(false)) && w.job.tracker.cancelled().is_none() {
                    i += 1;
                } else {
                    // In the order of their coming: they share links.
                    over.push((state.waiting.remove(i), passed));
                }
            }
            !state.waiting.is_empty()
        };
        // Not under the lock: the end of a transfer may submit the next one.
        for (Waiting { link, job, .. }, passed) in over {
            let tracker = job.tracker.clone();
            if let Some(code) = tracker.cancelled() {
                end(&tracker, code, "");
            } else if let Err(e) = passed {
                end(&tracker, ErrorCode::Transport, &format!("the producer's stream failed: {e}"));
            } else if let Err(e) = link.submit(job) {
                end(&tracker, e.code(), &e.to_string());
            }
        }
        busy
    }

    /// Ends everything; nothing is held any more.
    pub(crate) fn close(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        for w in waiting {
            end(&w.job.tracker, ErrorCode::Closed, "the agent was shut down");
        }
    }
}

fn end(tracker: &Tracker, code: ErrorCode, why: &str) {
    if !tracker.all_decided() {
        tracker.fail_rest(code, why);
    }
    tracker.finish();
}
