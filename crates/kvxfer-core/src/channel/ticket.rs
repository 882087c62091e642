//! The end of a request as its caller sees it: who waits for it is woken by whoever ends it, who asked to be told is told.

use super::sender::DeliveryReport;
use crate::{Error, Result};
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ErrorCode, RequestId};
use parking_lot::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// Told of the end once, by the thread that ends the request; must not block.
pub(super) type OnEnd = Box<dyn FnOnce(&Result<DeliveryReport>) + Send>;

/// The end of a request as its caller sees it.
pub(super) struct Ticket {
    pub(super) request: RequestId,
    pub(super) serial: u64,
    /// Grows while chunks are still being named.
    specs: Mutex<Vec<ChunkSpec>>,
    state: Mutex<TicketState>,
    changed: Condvar,
}

#[derive(Default)]
struct TicketState {
    admitted: bool,
    result: Option<Result<DeliveryReport>>,
    on_end: Vec<OnEnd>,
}

impl Ticket {
    pub(super) fn new(request: RequestId, serial: u64, specs: Vec<ChunkSpec>) -> Self {
        Self { request, serial, specs: Mutex::new(specs), state: Mutex::default(), changed: Condvar::new() }
    }

    /// Chunks named so far.
    pub(super) fn chunks(&self) -> usize {
        self.specs.lock().len()
    }

    pub(super) fn spec(&self, chunk: usize) -> Option<ChunkSpec> {
        self.specs.lock().get(chunk).cloned()
    }

    pub(super) fn name(&self, specs: Vec<ChunkSpec>) {
        self.specs.lock().extend(specs);
    }

    /// Has `f` told of the end, at once when there was one.
    pub(super) fn on_end(&self, f: OnEnd) {
        let mut state = self.state.lock();
        let Some(result) = state.result.clone() else {
            state.on_end.push(f);
            return;
        };
        drop(state);
        f(&result);
    }

    pub(super) fn admit(&self) {
        self.state.lock().admitted = true;
        self.changed.notify_all();
    }

    pub(super) fn end(&self, result: &Result<DeliveryReport>) {
        let told = {
            let mut state = self.state.lock();
            state.result = Some(result.clone());
            std::mem::take(&mut state.on_end)
        };
        self.changed.notify_all();
        for f in told {
            f(result);
        }
    }

    pub(super) fn wait(&self, timeout: Duration) -> Result<DeliveryReport> {
        let mut state = self.state.lock();
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(result) = &state.result {
                return result.clone();
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() && state.result.is_none() {
                return Err(self.timed_out("delivery", timeout));
            }
        }
    }

    pub(super) fn wait_admitted(&self, timeout: Duration) -> Result<()> {
        let mut state = self.state.lock();
        let deadline = Instant::now() + timeout;
        loop {
            match &state.result {
                Some(Err(e)) => return Err(e.clone()),
                Some(Ok(_)) => return Ok(()),
                None if state.admitted => return Ok(()),
                None => {}
            }
            if self.changed.wait_until(&mut state, deadline).timed_out()
                && !state.admitted
                && state.result.is_none()
            {
                return Err(self.timed_out("admission", timeout));
            }
        }
    }

    pub(super) fn is_admitted(&self) -> bool {
        let state = self.state.lock();
        state.admitted && !matches!(state.result, Some(Err(_)))
    }

    pub(super) fn is_finished(&self) -> bool {
        self.state.lock().result.is_some()
    }

    /// Why nothing can be done with it any more.
    pub(super) fn error(&self) -> Error {
        match &self.state.lock().result {
            Some(Err(e)) => e.clone(),
            _ => Error::failed(ErrorCode::InvalidArgument, format!("request {} has ended", self.request)),
        }
    }

    fn timed_out(&self, what: &str, after: Duration) -> Error {
        Error::TimedOut { operation: format!("{what} of request {}", self.request), after }
    }
}
