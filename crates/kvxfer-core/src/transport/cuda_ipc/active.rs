//! One job under way: cut into flights of bounded size, so that a cancelled one ends soon, with several of them queued on the
//! device, so that it never runs dry.

use super::target::Held;
use crate::cuda::{Engine, Flight, Move};
use crate::transport::{Job, Op};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

/// Bytes of a flight: a tenth of a millisecond on an H200.
const FLIGHT_BYTES: u64 = 256 << 20;
/// Descriptors of a flight.
const FLIGHT_MOVES: usize = 64 << 10;
/// Flights that the device has been given and not ended.
const QUEUED: usize = 4;

/// What a job waits for before its first flight: the remote side's addresses, known at once or when a thread has pinned the memory.
pub(super) type Ready = Arc<OnceLock<Result<Held>>>;

pub(super) struct Active {
    pub(super) job: Job,
    engine: Arc<Engine>,
    stream: usize,
    /// Kernels of the engine's device may touch both sides.
    kernel: bool,
    remote: Ready,
    flights: VecDeque<Flown>,
    /// Next piece to start, and the bytes of it that have been started.
    next: usize,
    within: u64,
    fenced: bool,
    failed: Option<(ErrorCode, String)>,
}

/// A flight and the pieces that are complete when it has ended.
struct Flown {
    flight: Flight,
    first: usize,
    count: usize,
    bytes: u64,
}

impl Active {
    pub(super) fn new(job: Job, engine: Arc<Engine>, kernel: bool, remote: Ready) -> Self {
        let stream = engine.pick();
        Self {
            job,
            engine,
            stream,
            kernel,
            remote,
            flights: VecDeque::new(),
            next: 0,
            within: 0,
            fenced: false,
            failed: None,
        }
    }

    /// Takes in what has ended and starts what can be started. True when nothing is left: the tracker can be finished.
    pub(super) fn advance(&mut self, closed: Option<(ErrorCode, &str)>) -> bool {
        self.collect();
        let tracker = self.job.tracker.clone();
        if self.failed.is_none() {
            if let Some((code, why)) = closed {
                self.failed = Some((code, why.to_owned()));
            } else if let Some(code) = tracker.cancelled() {
                self.failed = Some((code, String::new()));
            }
        }
        if self.failed.is_none()
            && let Err(e) = self.launch()
        {
            self.failed = Some((e.code(), e.to_string()));
        }
        if !self.flights.is_empty() {
            return false;
        }
        if let Some((code, why)) = &self.failed {
            tracker.fail_rest(*code, why.clone());
            return true;
        }
        self.next == self.job.pieces.len()
    }

    /// Starts flights until enough are queued.
    pub(super) fn launch(&mut self) -> Result<()> {
        let remote = match self.remote.get() {
            None => return Ok(()),
            Some(Err(e)) => return Err(e.clone()),
            Some(Ok(held)) => held.base(),
        };
        while self.flights.len() < QUEUED && self.next < self.job.pieces.len() {
            let first = self.next;
            let (moves, complete, bytes) = self.cut(remote);
            let fence = if self.fenced { None } else { self.job.after.as_ref() };
            // SAFETY: the ranges lie inside both regions (checked by the agent against the lengths that were imported); the job keeps the
            // local memory, `remote` the other, and both outlive the flight: `Active` is dropped only when no flight is left.
            let flight = unsafe { self.engine.start(self.stream, &moves, fence, self.kernel) }?;
            self.fenced = true;
            self.flights.push_back(Flown { flight, first, count: complete, bytes });
        }
        Ok(())
    }

    /// The next flight: moves, number of pieces that end in it, and the bytes of those.
    fn cut(&mut self, remote: u64) -> (Vec<Move>, usize, u64) {
        let local = self.job.local.as_ptr() as u64;
        let left = self.job.pieces.len() - self.next;
        let mut moves: Vec<Move> = Vec::with_capacity(left.min(FLIGHT_MOVES));
        let (mut room, mut complete, mut bytes) = (FLIGHT_BYTES, 0, 0);
        while let Some(p) = self.job.pieces.get(self.next) {
            if room == 0 || moves.len() == FLIGHT_MOVES {
                break;
            }
            let len = (p.len - self.within).min(room);
            let (near, far) = (local + p.local_offset + self.within, remote + p.remote_offset + self.within);
            let (src, dst) = match self.job.op {
                Op::Write => (near, far),
                Op::Read => (far, near),
            };
            Move { src, dst, len }.append_to(&mut moves);
            room -= len;
            self.within += len;
            if self.within == p.len {
                self.next += 1;
                self.within = 0;
                complete += 1;
                bytes += p.len;
            }
        }
        (moves, complete, bytes)
    }

    fn collect(&mut self) {
        while let Some(flown) = self.flights.front_mut() {
            match flown.flight.poll() {
                Ok(false) => return,
                Ok(true) => self.job.tracker.done(flown.first, flown.count, flown.bytes),
                Err(e) => {
                    for piece in flown.first..flown.first + flown.count {
                        self.job.tracker.fail(piece, ErrorCode::Transport);
                    }
                    self.failed.get_or_insert_with(|| (ErrorCode::Transport, e.to_string()));
                }
            }
            self.flights.pop_front();
        }
    }

    /// Nothing of it is on the device.
    pub(super) fn is_grounded(&self) -> bool {
        self.flights.is_empty()
    }

    /// For the end of an agent whose device does not answer: what may still be written to stays allocated for good.
    pub(super) fn abandon(self) {
        let error = Error::failed(ErrorCode::TimedOut, "the device did not answer");
        tracing::error!(transfer = %self.job.transfer, "{error}; its memory stays allocated");
        self.job.tracker.fail_rest(ErrorCode::TimedOut, error.to_string());
        self.job.tracker.finish();
        std::mem::forget(self);
    }
}
