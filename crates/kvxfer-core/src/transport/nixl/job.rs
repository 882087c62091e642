//! One transfer on its way through NIXL: requests are made, posted and retired here, in order.

use super::agent::{failed, only_backend, place_of, xfer_list};
use super::engine::SLICE;
use super::link::{Import, Remote};
use super::plan::{Cursor, Descriptor, next_request};
use crate::transport::{Job, Op};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use nixl_sys::{Agent, Backend, XferOp, XferRequest};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests of one job under way at the same time: enough to keep a network busy.
const WINDOW: usize = 4;
/// Largest message whose request is kept.
const SMALL: u64 = 64 << 10;
/// How long a job that must end waits for its posted requests before the connection under them is given up.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// A job, its place in the plan, and its requests under way.
pub(super) struct Active {
    pub(super) job: Job,
    pub(super) remote: Arc<Remote>,
    import: Arc<Import>,
    cursor: Cursor,
    /// Pieces before this one have an outcome.
    decided: usize,
    posted: VecDeque<Posted>,
    /// Why nothing more is posted, and since when.
    stop: Option<(ErrorCode, String)>,
    stopping: Option<Instant>,
    /// When something last moved; set by [`Active::waits`].
    quiet: Option<Instant>,
}

struct Posted {
    request: XferRequest,
    end: Cursor,
}

/// Requests of a single descriptor that have ended and can be posted again. Small messages often go to the same few
/// places (slots of a ring, a flag), and to make a request costs a quarter of such a message's time.
#[derive(Default)]
pub(super) struct Prepared {
    requests: HashMap<Place, XferRequest>,
}

/// Import, operation, local address, remote offset, length.
type Place = (u64, u8, u64, u64, u64);

impl Prepared {
    const MAX: usize = 256;

    fn take(&mut self, place: Place) -> Option<XferRequest> {
        if self.requests.is_empty() { None } else { self.requests.remove(&place) }
    }

    fn keep(&mut self, place: Place, request: XferRequest) {
        if self.requests.len() >= Self::MAX {
            // Rare, and cheaper than keeping track of ages with every message.
            self.requests.clear();
        }
        self.requests.insert(place, request);
    }

    /// Releases them all: a registration or a peer's metadata goes away.
    pub(super) fn clear(&mut self) {
        self.requests.clear();
    }
}

/// What one turn did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Requests are under way and none has ended.
    Waiting,
    /// Something was posted or ended.
    Moved,
    /// Every piece has an outcome and nothing is under way: to be finished.
    Ended,
}

/// What a turn needs of the engine.
pub(super) struct Tools<'a> {
    pub(super) agent: &'a Agent,
    pub(super) backends: &'a [Backend],
    /// Ended requests; dropping them is left to a quieter moment.
    pub(super) retired: &'a mut Vec<XferRequest>,
    pub(super) prepared: &'a mut Prepared,
    pub(super) scratch: &'a mut Vec<Descriptor>,
    /// The transport shuts down.
    pub(super) closing: bool,
}

impl Active {
    pub(super) fn new(job: Job, remote: Arc<Remote>, import: Arc<Import>) -> Self {
        Self {
            job,
            remote,
            import,
            cursor: Cursor::default(),
            decided: 0,
            posted: VecDeque::new(),
            stop: None,
            stopping: None,
            quiet: None,
        }
    }

    /// One turn: retires what has ended, then posts at most one request.
    pub(super) fn step(&mut self, tools: &mut Tools<'_>) -> Step {
        let mut moved = self.retire(tools);
        if self.stop.is_none() {
            self.stop = self.reason(tools.closing);
        }
        if self.stop.is_none() && self.posted.len() < WINDOW && self.cursor.piece < self.job.pieces.len() {
            moved = true;
            match self.post(tools) {
                Ok(Some(request)) => {
                    self.posted.push_back(Posted { request, end: self.cursor });
                }
                Ok(None) => self.retire_ended_at_once(),
                Err(e) => {
                    let from = self.posted.back().map_or(self.decided, |p| p.end.piece);
                    self.fail(from, self.cursor, &e);
                }
            }
        }
        if self.posted.is_empty() && (self.stop.is_some() || self.cursor.piece == self.job.pieces.len()) {
            let (code, detail) = self.stop.take().unwrap_or((ErrorCode::Ok, String::new()));
            if code != ErrorCode::Ok {
                self.job.tracker.fail_rest(code, detail);
            }
            return Step::Ended;
        }
        if self.stop.is_some() && self.stopping.get_or_insert_with(Instant::now).elapsed() > GRACE {
            self.sever();
        }
        if moved {
            self.quiet = None;
            return Step::Moved;
        }
        Step::Waiting
    }

    /// For how long nothing has moved.
    pub(super) fn waits(&mut self) -> Duration {
        self.quiet.get_or_insert_with(Instant::now).elapsed()
    }

    /// Why the job should end early.
    fn reason(&self, closing: bool) -> Option<(ErrorCode, String)> {
        if let Some(code) = self.job.tracker.cancelled() {
            return Some((code, format!("ended early: {code}")));
        }
        if closing {
            return Some((ErrorCode::Closed, "the agent was shut down".into()));
        }
        self.remote.ended()
    }

    /// Takes ended requests from the front; their order is the order of the pieces.
    fn retire(&mut self, tools: &mut Tools<'_>) -> bool {
        let mut moved = false;
        while let Some(front) = self.posted.front() {
            let status = match tools.agent.get_xfer_status(&front.request) {
                Ok(status) if !status.is_success() => break,
                other => other,
            };
            let Some(Posted { request, end }) = self.posted.pop_front() else { break };
            moved = true;
            tools.retired.push(request);
            match status {
                Ok(_) => self.arrived(end),
                Err(e) => self.fail(self.decided, end, &failed("get_xfer_status", &e)),
            }
        }
        moved
    }

    /// The request up to the cursor ended within the call that posted it, and so did everything before it.
    fn retire_ended_at_once(&mut self) {
        if self.posted.is_empty() {
            self.arrived(self.cursor);
        } else if let Some(last) = self.posted.back_mut() {
            // It counts once those before it have ended.
            last.end = self.cursor;
        }
    }

    fn arrived(&mut self, end: Cursor) {
        if end.piece > self.decided {
            let pieces = &self.job.pieces[self.decided..end.piece];
            let bytes = pieces.iter().map(|p| p.len).sum();
            self.job.tracker.done(self.decided, pieces.len(), bytes);
            self.decided = end.piece;
        }
    }

    /// The pieces from `from` to where the request ends at `end` failed, and no further one is posted.
    fn fail(&mut self, from: usize, end: Cursor, error: &Error) {
        let code = self.remote.failed();
        let to = end.touched().min(self.job.pieces.len());
        (from..to).for_each(|piece| self.job.tracker.fail(piece, code));
        if from == self.decided {
            self.decided = to;
        }
        self.stop = Some((code, error.to_string()));
    }

    /// Makes and posts the next request; `None` when it has ended already.
    fn post(&mut self, tools: &mut Tools<'_>) -> Result<Option<XferRequest>> {
        next_request(&self.job.pieces, &mut self.cursor, SLICE, self.import.slice, tools.scratch);
        let place = self.place(tools.scratch);
        let request = match place.and_then(|p| tools.prepared.take(p)) {
            Some(request) => request,
            None => self.request(tools)?,
        };
        match tools.agent.post_xfer_req(&request, None) {
            Ok(true) => Ok(Some(request)),
            Ok(false) => {
                match place {
                    Some(place) => tools.prepared.keep(place, request),
                    None => tools.retired.push(request),
                }
                Ok(None)
            }
            Err(e) => {
                tools.retired.push(request);
                Err(failed("post_xfer_req", &e))
            }
        }
    }

    /// The key under which a request is kept for the next time, when it is worth it.
    fn place(&self, descriptors: &[Descriptor]) -> Option<Place> {
        match descriptors {
            [d] if self.job.pieces.len() == 1 && d.len <= SMALL => {
                let local = self.job.local.as_ptr() as u64 + d.local;
                Some((self.import.id, self.job.op as u8, local, d.remote, d.len))
            }
            _ => None,
        }
    }

    /// Makes the request for the descriptors in `tools.scratch`.
    fn request(&self, tools: &Tools<'_>) -> Result<XferRequest> {
        let (kind, device) = place_of(&self.job.local);
        let mut locals = xfer_list(kind)?;
        let mut remotes = xfer_list(self.import.kind)?;
        let base = self.job.local.as_ptr() as u64;
        for d in tools.scratch.iter() {
            locals.add_desc((base + d.local) as usize, d.len as usize, device);
            remotes.add_desc((self.import.address + d.remote) as usize, d.len as usize, self.import.device);
        }
        let op = match self.job.op {
            Op::Write => XferOp::Write,
            Op::Read => XferOp::Read,
        };
        let mut made = Err(Error::failed(ErrorCode::Transport, "no backend"));
        for backend in tools.backends {
            let args = only_backend(tools.backends, backend)?;
            made = tools
                .agent
                .create_xfer_req(op, &locals, &remotes, &self.remote.nixl_name, args.as_ref())
                .map_err(|e| failed("create_xfer_req", &e));
            if made.is_ok() {
                break;
            }
        }
        made
    }

    /// Gives up requests that do not end: they are released, and the engine drops the connection under them before
    /// this job is finished.
    fn sever(&mut self) {
        tracing::warn!(
            transfer = %self.job.transfer,
            peer = %self.remote.peer,
            requests = self.posted.len(),
            "NIXL requests did not end in time; the connection is given up"
        );
        self.remote.sever();
        self.posted.clear();
    }

    /// Releases everything under way; the agent is destroyed next.
    pub(super) fn release(&mut self) {
        self.posted.clear();
    }

    /// Drops what is under way because the connection is given up; true when there was something.
    pub(super) fn drop_severed(&mut self) -> bool {
        let any = self.remote.severed() && !self.posted.is_empty();
        if any {
            self.posted.clear();
        }
        any
    }
}
