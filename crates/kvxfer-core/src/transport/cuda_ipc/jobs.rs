//! The jobs of one link, driven by whoever waits for one of them and by the progress thread.

use super::active::Active;
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, TransferId};
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// How long the end of an agent waits for a device.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Jobs {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    active: Vec<Active>,
    closed: Option<(ErrorCode, &'static str)>,
}

impl Jobs {
    /// Takes a job and starts it. An error when nothing of it was started.
    pub(super) fn add(&self, mut active: Active) -> Result<()> {
        let mut state = self.state.lock();
        if let Some((code, why)) = state.closed {
            return Err(Error::failed(code, why));
        }
        active.launch()?;
        state.active.push(active);
        Ok(())
    }

    /// Moves every job on. True while some are under way.
    pub(super) fn drive(&self) -> bool {
        let mut ended = Vec::new();
        {
            let Some(mut state) = self.state.try_lock() else { return true };
            let closed = state.closed;
            let mut i = 0;
            while i < state.active.len() {
                if state.active[i].advance(closed) {
                    // Order among those that remain does not matter.
                    ended.push(state.active.swap_remove(i));
                } else {
                    i += 1;
                }
            }
        }
        // Not under the lock: what follows a transfer may submit the next one.
        for active in ended {
            active.job.tracker.finish();
        }
        !self.state.lock().active.is_empty()
    }

    pub(super) fn has(&self, transfer: TransferId) -> bool {
        self.state.lock().active.iter().any(|a| a.job.transfer == transfer)
    }

    pub(super) fn close(&self, code: ErrorCode, why: &'static str) {
        self.state.lock().closed.get_or_insert((code, why));
        self.drive();
    }

    /// Closed, and nothing of it can touch memory any more.
    pub(super) fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        state.closed.is_some() && state.active.is_empty()
    }

    /// Waits until every job has ended.
    pub(super) fn drain(&self) {
        let limit = Instant::now() + DRAIN;
        while self.drive() {
            if Instant::now() >= limit {
                let stuck = std::mem::take(&mut self.state.lock().active);
                for active in stuck {
                    if active.is_grounded() {
                        active.job.tracker.fail_rest(ErrorCode::Closed, "the agent was shut down");
                        active.job.tracker.finish();
                    } else {
                        active.abandon();
                    }
                }
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
