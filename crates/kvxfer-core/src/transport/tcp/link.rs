//! One peer over several streams: the jobs under way, who may send what next, and the end of it all.
//!
//! Locks are taken in the order closing -> lanes -> a lane's io -> state. Trackers are finished with none of them
//! held, because their hooks may call back into the link.

use super::engine::Engine;
use super::frame::{MAX_PIECES, Ticket, decode_acks};
use super::job::{Active, Cut, Remote};
use super::lane::{Lane, Sent};
use super::region::Regions;
use crate::config::TcpConfig;
use crate::cuda::Staging;
use crate::transport::{Job, Link, Op, RemoteKey, RemoteTicket, Tracker};
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, TransferId};
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, VecDeque};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Trackers to finish once no lock is held.
pub(super) type Finished = Vec<Arc<Tracker>>;

/// The shared heart of a link: lanes point to it, as does [`TcpLink`].
pub(super) struct Inner {
    pub(super) name: String,
    pub(super) session: [u8; 16],
    pub(super) streams: u16,
    pub(super) frame_bytes: u32,
    /// Frames from a device copied ahead of the socket, per stream.
    pub(super) staging_depth: usize,
    pub(super) staging: Arc<Staging>,
    pub(super) peer_timeout: std::time::Duration,
    pub(super) regions: Arc<Regions>,
    pub(super) engine: Arc<Engine>,
    state: Mutex<State>,
    lanes: Mutex<Vec<Arc<Lane>>>,
    remotes: RwLock<HashMap<RemoteKey, Remote>>,
    next_key: AtomicU64,
    closing: Mutex<()>,
    fenced: AtomicBool,
}

#[derive(Default)]
struct State {
    jobs: HashMap<u64, Active>,
    writes: VecDeque<u64>,
    reads: VecDeque<u64>,
    next: u64,
    ended: Option<(ErrorCode, String)>,
}

/// What a lane is to send for a job.
pub(super) struct Taken {
    pub(super) job: Arc<Job>,
    pub(super) remote: Remote,
    pub(super) sent: Sent,
}

impl Inner {
    pub(super) fn new(
        name: String,
        session: [u8; 16],
        config: &TcpConfig,
        peer_timeout: std::time::Duration,
        staging: Arc<Staging>,
        regions: Arc<Regions>,
        engine: Arc<Engine>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            session,
            streams: config.streams,
            frame_bytes: config.frame_bytes,
            staging_depth: config.staging_depth,
            staging,
            peer_timeout,
            regions,
            engine,
            state: Mutex::default(),
            lanes: Mutex::default(),
            remotes: RwLock::default(),
            next_key: AtomicU64::new(1),
            closing: Mutex::default(),
            fenced: AtomicBool::new(false),
        })
    }

    /// Adds a connected stream. Refuses one that is out of range, there already, or too late.
    pub(super) fn add_lane(self: &Arc<Self>, index: u16, stream: TcpStream) -> Result<()> {
        let refuse = |text: String| Err(Error::failed(ErrorCode::Protocol, text));
        let mut lanes = self.lanes.lock();
        if let Some((code, text)) = &self.state.lock().ended {
            return Err(Error::failed(*code, text.clone()));
        }
        if index >= self.streams {
            return refuse(format!("stream {index} from {}, {} were agreed", self.name, self.streams));
        }
        if lanes.iter().any(|l| l.index == index) {
            return refuse(format!("stream {index} from {} came twice", self.name));
        }
        let lane = Lane::start(self, index, stream)?;
        lanes.push(lane);
        Ok(())
    }

    /// True when all streams are there.
    pub(super) fn complete(&self) -> bool {
        self.lanes.lock().len() == self.streams as usize
    }

    /// Wakes streams for new work: one for little work when nothing else waits (always the same while it can send, so
    /// its thread is likely awake), all of them otherwise.
    fn kick(&self, all: bool) {
        for lane in self.lanes.lock().iter().filter(|l| all || l.open()) {
            lane.kick();
            if !all {
                return;
            }
        }
    }

    /// True when work waits for a stream that can send.
    pub(super) fn waiting(&self) -> bool {
        let state = self.state.lock();
        !(state.writes.is_empty() && state.reads.is_empty())
    }

    /// A stream cannot send: if work waits, another one gets the hint. Called without a lane's lock.
    pub(super) fn pass_on(&self) {
        if self.waiting() {
            self.kick(false);
        }
    }

    /// The next cut of a job of the given direction, jobs taking turns.
    pub(super) fn take(&self, op: Op, finished: &mut Finished) -> Option<Taken> {
        let mut state = self.state.lock();
        let State { jobs, writes, reads, .. } = &mut *state;
        let queue = match op {
            Op::Write => writes,
            Op::Read => reads,
        };
        while let Some(number) = queue.pop_front() {
            let Some(active) = jobs.get_mut(&number) else { continue };
            if let Some(code) = active.job.tracker.cancelled() {
                active.stopped.get_or_insert(code);
            }
            if let Some((seq, cut)) = active.cut(self.frame_bytes) {
                if !active.exhausted() {
                    queue.push_back(number);
                }
                let sent = Sent { job: number, seq, cut };
                return Some(Taken { job: active.job.clone(), remote: active.remote, sent });
            }
            conclude(jobs, number, finished);
        }
        None
    }

    /// Outcomes of cuts that no stream touches any more.
    pub(super) fn settle(
        &self,
        outcomes: impl Iterator<Item = (u64, Cut, ErrorCode)>,
        finished: &mut Finished,
    ) {
        let mut state = self.state.lock();
        for (number, cut, code) in outcomes {
            let Some(active) = state.jobs.get_mut(&number) else { continue };
            active.outstanding -= 1;
            active.decide(cut, code);
            conclude(&mut state.jobs, number, finished);
        }
    }

    /// Settles writes from the peer's acknowledgements, which must come in the order of the writes.
    pub(super) fn acknowledged(
        &self,
        table: &[u8],
        sent: &mut VecDeque<Sent>,
        finished: &mut Finished,
    ) -> Result<u64, String> {
        let mut bytes = 0;
        let mut outcomes = Vec::with_capacity(sent.len().min(super::frame::MAX_ACKS));
        for ack in decode_acks(table) {
            match sent.pop_front() {
                Some(s) if (s.job, s.seq) == (ack.job, ack.seq) => {
                    bytes += u64::from(s.cut.bytes);
                    outcomes.push((s.job, s.cut, ack.code));
                }
                _ => return Err(format!("acknowledgement of job {} frame {} was not due", ack.job, ack.seq)),
            }
        }
        self.settle(outcomes.into_iter(), finished);
        Ok(bytes)
    }

    /// A stream starts to write into a job's local memory; `None` when the job wants it no more.
    pub(super) fn begin_receive(&self, number: u64) -> Option<Arc<Job>> {
        let mut state = self.state.lock();
        let active = state.jobs.get_mut(&number)?;
        if active.stopped.is_some() || active.job.tracker.cancelled().is_some() {
            return None;
        }
        active.receiving += 1;
        Some(active.job.clone())
    }

    /// The stream that called [`Inner::begin_receive`] touches the memory no more; `outcome` when the cut arrived.
    pub(super) fn end_receive(
        &self,
        number: u64,
        outcome: Option<(Cut, ErrorCode)>,
        finished: &mut Finished,
    ) {
        let mut state = self.state.lock();
        let Some(active) = state.jobs.get_mut(&number) else { return };
        active.receiving -= 1;
        if let Some((cut, code)) = outcome {
            active.outstanding -= 1;
            active.decide(cut, code);
        }
        conclude(&mut state.jobs, number, finished);
    }

    /// Stops jobs of that transfer: what was not handed out is not sent any more.
    fn stop(&self, transfer: TransferId) {
        let mut finished = Finished::new();
        let mut busy = Vec::new();
        {
            let mut state = self.state.lock();
            let numbers: Vec<u64> =
                state.jobs.iter().filter(|(_, a)| a.job.transfer == transfer).map(|(&n, _)| n).collect();
            for number in numbers {
                let Some(active) = state.jobs.get_mut(&number) else { continue };
                let code = active.job.tracker.cancelled().unwrap_or(ErrorCode::Cancelled);
                active.stopped.get_or_insert(code);
                if active.receiving > 0 {
                    busy.push(number);
                }
                conclude(&mut state.jobs, number, &mut finished);
            }
        }
        if !busy.is_empty() {
            // Each stream stops between two calls of `recvmsg`; its lock is ours only then.
            let lanes = self.lanes.lock().clone();
            for lane in lanes {
                lane.abandon(&busy, &mut finished);
            }
        }
        finish(finished);
    }

    /// Ends the link: sockets are closed, and then every job fails. When this returns, no byte of the peer can land here
    /// any more. Called by anybody, also twice; not with a lane's lock held.
    pub(super) fn end(&self, code: ErrorCode, text: &str, finished: &mut Finished) {
        let _closing = self.closing.lock();
        let jobs = {
            let mut state = self.state.lock();
            if state.ended.is_some() {
                return;
            }
            state.ended = Some((code, text.to_owned()));
            state.writes.clear();
            state.reads.clear();
            std::mem::take(&mut state.jobs)
        };
        tracing::debug!(peer = %self.name, %code, text, jobs = jobs.len(), "tcp link ended");
        let lanes = std::mem::take(&mut *self.lanes.lock());
        for lane in &lanes {
            lane.shut();
        }
        self.fenced.store(true, Ordering::Release);
        self.engine.forget(self);
        for active in jobs.into_values() {
            active.job.tracker.fail_rest(code, text);
            finished.push(active.job.tracker.clone());
        }
    }
}

/// Takes a job off the list when it is quiet.
fn conclude(jobs: &mut HashMap<u64, Active>, number: u64, finished: &mut Finished) {
    if !jobs.get(&number).is_some_and(Active::quiet) {
        return;
    }
    if let Some(active) = jobs.remove(&number) {
        let tracker = &active.job.tracker;
        if !tracker.all_decided() {
            let code = active.stopped.unwrap_or(ErrorCode::Transport);
            tracker.fail_rest(code, format!("the transfer was stopped ({code}) before all of it was moved"));
        }
        finished.push(tracker.clone());
    }
}

/// Runs the hooks and wakes the waiters.
pub(super) fn finish(finished: Finished) {
    for tracker in finished {
        tracker.finish();
    }
}

/// The handle that the agent holds; dropping it closes the link.
pub(super) struct TcpLink(pub(super) Arc<Inner>);

impl Link for TcpLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        let t = Ticket::decode(&ticket.payload)
            .map_err(|e| Error::failed(ErrorCode::Protocol, format!("ticket of {}: {e}", self.0.name)))?;
        if t.len != ticket.len {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!(
                    "ticket of {} says {} bytes, its advert {}: not the same region",
                    self.0.name, t.len, ticket.len
                ),
            ));
        }
        let key = RemoteKey(self.0.next_key.fetch_add(1, Ordering::Relaxed));
        let remote = Remote { region: ticket.region, capability: t.capability, len: t.len };
        self.0.remotes.write().insert(key, remote);
        Ok(key)
    }

    fn forget(&self, key: RemoteKey) {
        self.0.remotes.write().remove(&key);
    }

    fn submit(&self, job: Job) -> Result<()> {
        let remote = self
            .0
            .remotes
            .read()
            .get(&job.remote)
            .copied()
            .ok_or_else(|| Error::NotFound { what: "imported region", name: job.remote.0.to_string() })?;
        let local_len = job.local.len() as u64;
        for (i, p) in job.pieces.iter().enumerate() {
            let lies = |offset: u64, limit| offset.checked_add(p.len).is_some_and(|end| end <= limit);
            for (side, offset, limit) in
                [("local", p.local_offset, local_len), ("remote", p.remote_offset, remote.len)]
            {
                if p.len == 0 || !lies(offset, limit) {
                    let what = format!("{side} side of piece {i}");
                    return Err(Error::OutOfRange { what, offset, len: p.len, limit });
                }
            }
        }
        if job.pieces.is_empty() || u32::try_from(job.pieces.len()).is_err() {
            return Err(Error::InvalidArgument {
                argument: "pieces",
                problem: format!("{} pieces; 1 to {} are allowed", job.pieces.len(), u32::MAX),
            });
        }
        let all = {
            let mut state = self.0.state.lock();
            if let Some((code, text)) = &state.ended {
                return Err(Error::failed(*code, text.clone()));
            }
            let backlog = !(state.writes.is_empty() && state.reads.is_empty());
            let large = job.pieces.len() > MAX_PIECES
                || job.pieces.iter().map(|p| p.len).sum::<u64>() > self.0.frame_bytes.into();
            state.next += 1;
            let number = state.next;
            match job.op {
                Op::Write => state.writes.push_back(number),
                Op::Read => state.reads.push_back(number),
            }
            state.jobs.insert(number, Active::new(job, remote));
            backlog || large
        };
        self.0.kick(all);
        Ok(())
    }

    fn cancel(&self, transfer: TransferId) {
        self.0.stop(transfer);
    }

    fn close(&self) {
        let mut finished = Finished::new();
        self.0.end(ErrorCode::PeerGone, "the connection was closed", &mut finished);
        finish(finished);
    }

    fn fenced(&self) -> bool {
        self.0.fenced.load(Ordering::Acquire)
    }

    fn broken(&self) -> Option<ErrorCode> {
        self.0.state.lock().ended.as_ref().map(|e| e.0)
    }

    fn describe(&self) -> String {
        if let Some((_, text)) = &self.0.state.lock().ended {
            return format!("tcp, ended: {text}");
        }
        let lanes = self.0.lanes.lock();
        let addresses =
            lanes.first().map_or("waiting for the peer's connections".into(), |l| l.addresses.clone());
        format!(
            "tcp {addresses}, {} of {} streams, frames of {} KiB",
            lanes.len(),
            self.0.streams,
            self.0.frame_bytes >> 10
        )
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close();
    }
}
