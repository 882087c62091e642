//! One transfer on its way through NIXL: requests are made, posted and retired here, in order.

use super::agent::{failed, only_backend, place_of, xfer_list};
use super::link::{Import, Remote};
use super::plan::{Cursor, Descriptor, Limits, MAX_BYTES, next_request};
use super::regions::SLICE;
use super::staged::{Fault, SLOT, Slice, Slots};
use crate::transport::{Job, Op};
use crate::{Error, Memory, Result};
use kvxfer_proto::ErrorCode;
use nixl_sys::{Agent, Backend, MemType, XferOp, XferRequest};
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
    way: Way,
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

/// How the backends meet the local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It is registered with them.
    Direct,
    /// It is a device's that they do not take: through slots.
    Staged,
}

/// Something of the job under way, up to a place in its pieces.
struct Posted {
    work: Work,
    end: Cursor,
}

enum Work {
    Request(XferRequest),
    Slice(Slice),
}

/// Between what and whom.
#[derive(Clone, Copy)]
pub(super) struct Route<'a> {
    pub(super) job: &'a Job,
    pub(super) remote: &'a Remote,
    pub(super) import: &'a Import,
}

/// Registered memory on this side, as NIXL names it: descriptors count from `base`.
#[derive(Clone, Copy)]
pub(super) struct Local {
    pub(super) kind: MemType,
    pub(super) device: u64,
    pub(super) base: u64,
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
    pub(super) slots: &'a mut Slots,
    pub(super) scratch: &'a mut Vec<Descriptor>,
    /// The transport shuts down.
    pub(super) closing: bool,
}

impl Tools<'_> {
    /// Makes a request.
    pub(super) fn request(
        &self,
        route: Route<'_>,
        local: Local,
        descriptors: &[Descriptor],
    ) -> Result<XferRequest> {
        let Route { job, remote, import } = route;
        let mut locals = xfer_list(local.kind)?;
        let mut remotes = xfer_list(import.kind)?;
        for d in descriptors {
            locals.add_desc((local.base + d.local) as usize, d.len as usize, local.device);
            remotes.add_desc((import.address + d.remote) as usize, d.len as usize, import.device);
        }
        let op = match job.op {
            Op::Write => XferOp::Write,
            Op::Read => XferOp::Read,
        };
        let mut made = Err(Error::failed(ErrorCode::Transport, "no backend"));
        for backend in self.backends {
            let args = only_backend(self.backends, backend)?;
            made = self
                .agent
                .create_xfer_req(op, &locals, &remotes, &remote.nixl_name, args.as_ref())
                .map_err(|e| failed("create_xfer_req", &e));
            if made.is_ok() {
                break;
            }
        }
        made
    }

    /// Posts a request; false when it has ended already.
    pub(super) fn post(&self, request: &XferRequest) -> Result<bool> {
        self.agent.post_xfer_req(request, None).map_err(|e| failed("post_xfer_req", &e))
    }
}

impl Active {
    pub(super) fn new(job: Job, remote: Arc<Remote>, import: Arc<Import>, way: Way) -> Self {
        Self {
            job,
            remote,
            import,
            way,
            cursor: Cursor::default(),
            decided: 0,
            posted: VecDeque::new(),
            stop: None,
            stopping: None,
            quiet: None,
        }
    }

    /// One turn: retires what has ended, then posts at most one request or starts one slice.
    pub(super) fn step(&mut self, tools: &mut Tools<'_>) -> Step {
        if self.stop.is_none() {
            self.stop = self.reason(tools.closing);
        }
        let mut moved = self.retire(tools);
        if self.stop.is_none() && self.cursor.piece < self.job.pieces.len() {
            moved |= match self.way {
                Way::Direct => self.post_request(tools),
                Way::Staged => self.start_slice(tools),
            };
        }
        if self.posted.is_empty() && (self.stop.is_some() || self.cursor.piece == self.job.pieces.len()) {
            let (code, detail) = self.stop.take().unwrap_or((ErrorCode::Ok, String::new()));
            if code != ErrorCode::Ok {
                self.job.tracker.fail_rest(code, detail);
            }
            return Step::Ended;
        }
        if self.stop.is_some()
            && self.stopping.get_or_insert_with(Instant::now).elapsed() > GRACE
            && self.has_requests()
        {
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

    fn route(&self) -> Route<'_> {
        Route { job: &self.job, remote: &self.remote, import: &self.import }
    }

    /// Takes what has ended from the front; its order is the order of the pieces.
    fn retire(&mut self, tools: &mut Tools<'_>) -> bool {
        let mut moved = false;
        if self.way == Way::Staged {
            let route = Route { job: &self.job, remote: &self.remote, import: &self.import };
            for posted in &mut self.posted {
                if let Work::Slice(slice) = &mut posted.work {
                    moved |= slice.advance(route, self.stop.is_some(), tools);
                }
            }
        }
        while let Some(front) = self.posted.front_mut() {
            let how = match &mut front.work {
                Work::Request(request) => match tools.agent.get_xfer_status(request) {
                    Ok(status) if !status.is_success() => break,
                    Ok(_) => Ok(()),
                    Err(e) => Err(Fault::Request(failed("get_xfer_status", &e))),
                },
                Work::Slice(slice) => match slice.ended() {
                    None => break,
                    Some(how) => how,
                },
            };
            let Some(Posted { work, end }) = self.posted.pop_front() else { break };
            moved = true;
            if let Work::Request(request) = work {
                tools.retired.push(request);
            }
            match how {
                Ok(()) => self.arrived(end),
                Err(fault) => self.fail(self.decided, end, fault),
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

    /// The pieces from `from` to where the request ends at `end` did not arrive, and no further one is posted.
    fn fail(&mut self, from: usize, end: Cursor, fault: Fault) {
        let (code, text) = match fault {
            Fault::Request(e) => (self.remote.failed(), e.to_string()),
            Fault::Copy(e) => (e.code(), e.to_string()),
            // Only of a job that has a reason to stop.
            Fault::Dropped => self.stop.clone().unwrap_or((ErrorCode::Cancelled, String::new())),
        };
        let to = end.touched().min(self.job.pieces.len());
        (from..to).for_each(|piece| self.job.tracker.fail(piece, code));
        if from == self.decided {
            self.decided = to;
        }
        self.stop = Some((code, text));
    }

    /// Makes and posts the next request if there is room for it; true when it did.
    fn post_request(&mut self, tools: &mut Tools<'_>) -> bool {
        if self.posted.len() >= WINDOW {
            return false;
        }
        match self.next_posted(tools) {
            Ok(Some(request)) => {
                self.posted.push_back(Posted { work: Work::Request(request), end: self.cursor });
            }
            Ok(None) => self.retire_ended_at_once(),
            Err(e) => {
                let from = self.posted.back().map_or(self.decided, |p| p.end.piece);
                self.fail(from, self.cursor, Fault::Request(e));
            }
        }
        true
    }

    /// The next request, posted; `None` when it has ended already.
    fn next_posted(&mut self, tools: &mut Tools<'_>) -> Result<Option<XferRequest>> {
        self.plan(MAX_BYTES, SLICE, tools);
        let local = local_of(&self.job.local);
        let place = self.place(tools.scratch);
        let request = match place.and_then(|p| tools.prepared.take(p)) {
            Some(request) => request,
            None => tools.request(self.route(), local, tools.scratch)?,
        };
        match tools.post(&request) {
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
                Err(e)
            }
        }
    }

    /// Starts the next slice if there is a slot for it; true when it did.
    fn start_slice(&mut self, tools: &mut Tools<'_>) -> bool {
        if !tools.slots.has_room(&self.remote) {
            return false;
        }
        // The device's memory is not registered.
        self.plan(SLOT, u64::MAX, tools);
        let slice = Slice::start(self.route(), tools);
        self.posted.push_back(Posted { work: Work::Slice(slice), end: self.cursor });
        true
    }

    /// Puts the next descriptors into `tools.scratch`.
    fn plan(&mut self, bytes: u64, local_slice: u64, tools: &mut Tools<'_>) {
        let limits = Limits { bytes, local_slice, remote_slice: self.import.slice };
        next_request(&self.job.pieces, &mut self.cursor, limits, tools.scratch);
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

    /// Whether anything is under way that the peer or the network can hold up.
    fn has_requests(&self) -> bool {
        self.posted.iter().any(|p| match &p.work {
            Work::Request(_) => true,
            Work::Slice(slice) => slice.is_posted(),
        })
    }

    /// Asks the engine to give up the connection under requests that do not end, before this job is finished.
    fn sever(&self) {
        tracing::warn!(
            transfer = %self.job.transfer,
            peer = %self.remote.peer,
            requests = self.posted.len(),
            "NIXL requests did not end in time; the connection is given up"
        );
        self.remote.sever();
    }

    /// Gives up requests under way, because the connection is given up. NIXL may still look at the memory that is kept in `limbo`
    /// and at the slots that are lost.
    pub(super) fn give_up(&mut self, slots: &mut Slots, limbo: &mut Vec<Arc<Memory>>) {
        let mut direct = false;
        self.posted.retain_mut(|posted| match &mut posted.work {
            Work::Request(_) => {
                direct = true;
                false
            }
            Work::Slice(slice) => {
                slice.give_up(slots);
                true
            }
        });
        if direct {
            limbo.push(Arc::clone(&self.job.local));
        }
    }

    /// Releases everything under way, after the copies have ended; the agent is destroyed next.
    pub(super) fn release(&mut self) {
        self.posted.clear();
    }
}

fn local_of(memory: &Memory) -> Local {
    let (kind, device) = place_of(memory);
    Local { kind, device, base: memory.as_ptr() as u64 }
}
