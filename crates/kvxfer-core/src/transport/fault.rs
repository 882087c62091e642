//! A decorator that injects faults into any transport: delay, drop, failure after N, duplication, stall, corruption.
//!
//! It decorates the links a transport connects: each submitted job is numbered, and the plan says what happens to that
//! number. Submit stays non-blocking (a delayed job waits in a timer thread), every job still ends exactly once, and a
//! cancelled one ends at once if it was held back here, else as the transport underneath ends it.
//!
//! What arrives flipped is flipped behind the transport's back, by a write of its own after the job's own checks: the
//! way bad memory would do it. So it is the check on arrival that has to find it.

mod held;

use super::{
    Capabilities, Job, Link, LocalTicket, Op, Outcome, PeerInfo, Piece, RemoteKey, RemoteTicket, Tracker,
    Transport, TransportKind,
};
use crate::{Error, Memory, Result};
use held::Held;
use kvxfer_proto::{ErrorCode, Integrity, RegionId, TransferId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// What goes wrong, and when. Counts are per link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FaultPlan {
    /// Every job starts this much later.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
    /// The job after this many never completes by itself (it can be cancelled).
    pub stall_after: Option<u64>,
    /// Jobs after this many fail with [`kvxfer_proto::ErrorCode::Transport`].
    pub fail_after: Option<u64>,
    /// Within a failing job, pieces before this one still move.
    pub fail_at_piece: usize,
    /// Every n-th job is submitted twice underneath.
    pub duplicate_every: Option<u64>,
    /// In every n-th write job one byte arrives flipped.
    pub corrupt_every: Option<u64>,
    /// Every n-th job claims success without moving a byte.
    pub drop_every: Option<u64>,
}

/// A transport whose links misbehave as planned.
pub struct FaultTransport {
    inner: Arc<dyn Transport>,
    plan: FaultPlan,
    links: Mutex<Vec<Weak<FaultLink>>>,
}

struct FaultLink {
    shared: Arc<Shared>,
}

struct Shared {
    transport: Arc<dyn Transport>,
    inner: Arc<dyn Link>,
    plan: FaultPlan,
    jobs: AtomicU64,
    held: Held,
    /// Jobs that run underneath under another tracker, by the caller's id.
    replaced: Mutex<HashMap<TransferId, (TransferId, Arc<Tracker>)>>,
}

/// What follows when a replaced job has ended underneath.
enum Then {
    End,
    /// Pieces not given to the transport fail.
    Fail,
    /// The same once more.
    Again,
    /// One byte is overwritten.
    Flip,
}

/// Ids of jobs and regions made here; far from those an agent counts up to.
static NEXT_ID: AtomicU64 = AtomicU64::new(u64::MAX / 2);

impl FaultTransport {
    /// Decorates `inner`; everything but submitted jobs passes through.
    pub fn new(inner: Arc<dyn Transport>, plan: FaultPlan) -> Arc<Self> {
        Arc::new(Self { inner, plan, links: Mutex::default() })
    }
}

impl Transport for FaultTransport {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        self.inner.offer(peer)
    }
    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        self.inner.ticket(region, memory)
    }
    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        self.inner.register(region, memory)
    }
    fn deregister(&self, region: RegionId) {
        self.inner.deregister(region);
    }
    fn connect(&self, peer: &PeerInfo, offer: &[u8], deadline: Instant) -> Result<Arc<dyn Link>> {
        let inner = self.inner.connect(peer, offer, deadline)?;
        let link = Arc::new(FaultLink {
            shared: Arc::new(Shared {
                transport: Arc::clone(&self.inner),
                inner,
                plan: self.plan.clone(),
                jobs: AtomicU64::new(0),
                held: Held::default(),
                replaced: Mutex::default(),
            }),
        });
        let mut links = self.links.lock();
        links.retain(|l| l.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }
    fn adopt(&self, session: [u8; 16], lane: u16, stream: std::net::TcpStream) {
        self.inner.adopt(session, lane, stream);
    }
    fn poll(&self) -> bool {
        // A delayed job is started by another thread: a transport that is driven from here goes on being driven until then.
        let links = self.links.lock();
        let delayed = links.iter().filter_map(Weak::upgrade).any(|l| l.shared.held.delays());
        drop(links);
        self.inner.poll() | delayed
    }
    fn shutdown(&self) {
        self.inner.shutdown();
        let links = std::mem::take(&mut *self.links.lock());
        for link in links.iter().filter_map(Weak::upgrade) {
            link.shared.held.close(ErrorCode::Closed, "the agent was shut down");
        }
    }
}

impl Link for FaultLink {
    fn import(&self, ticket: RemoteTicket) -> Result<RemoteKey> {
        self.shared.inner.import(ticket)
    }
    fn forget(&self, key: RemoteKey) {
        self.shared.inner.forget(key);
    }
    fn carries(&self, region: RegionId, local: &Memory, remote: RemoteKey) -> bool {
        self.shared.inner.carries(region, local, remote)
    }

    fn submit(&self, job: Job) -> Result<()> {
        let shared = &self.shared;
        let number = shared.jobs.fetch_add(1, Ordering::Relaxed) + 1;
        if shared.plan.delay.is_zero() {
            return shared.start(job, number);
        }
        shared.held.delay(shared, job, number, Instant::now() + shared.plan.delay)
    }

    fn assist(&self, transfer: TransferId) -> bool {
        let replaced = self.shared.replaced.lock().get(&transfer).map(|(id, _)| *id);
        self.shared.inner.assist(replaced.unwrap_or(transfer))
    }

    fn cancel(&self, transfer: TransferId) {
        self.shared.cancel(transfer);
    }

    fn close(&self) {
        self.shared.inner.close();
        self.shared.held.close(ErrorCode::PeerGone, "the peer is gone");
    }
    fn fenced(&self) -> bool {
        self.shared.inner.fenced()
    }
    fn describe(&self) -> String {
        format!("{}, with faults", self.shared.inner.describe())
    }
}

impl Drop for FaultLink {
    fn drop(&mut self) {
        self.shared.held.close(ErrorCode::PeerGone, "the peer is gone");
    }
}

impl Shared {
    /// Lets the job's fate begin.
    fn start(self: &Arc<Self>, job: Job, number: u64) -> Result<()> {
        let plan = &self.plan;
        let every = |n: Option<u64>| n.is_some_and(|n| n > 0 && number.is_multiple_of(n));
        if plan.stall_after == Some(number - 1) {
            return self.held.stall(job);
        }
        if plan.fail_after.is_some_and(|after| number > after) {
            let moving = plan.fail_at_piece.min(job.pieces.len());
            if moving == 0 {
                end(&job, ErrorCode::Transport, "a fault was injected");
                return Ok(());
            }
            let mut inner = replacement(&job);
            inner.pieces = job.pieces[..moving].into();
            inner.tracker = Arc::new(Tracker::new(moving));
            inner.digest = None;
            return self.replace(job, inner, Then::Fail);
        }
        if every(plan.drop_every) {
            job.tracker.done(0, job.pieces.len(), job.pieces.iter().map(|p| p.len).sum());
            job.tracker.finish();
            return Ok(());
        }
        if every(plan.duplicate_every) {
            let inner = replacement(&job);
            return self.replace(job, inner, Then::Again);
        }
        if job.op == Op::Write && every(plan.corrupt_every) {
            let inner = replacement(&job);
            return self.replace(job, inner, Then::Flip);
        }
        self.inner.submit(job)
    }

    fn cancel(&self, transfer: TransferId) {
        if let Some(job) = self.held.take(transfer) {
            let code = job.tracker.cancelled().unwrap_or(ErrorCode::Cancelled);
            end(&job, code, "the transfer was cancelled");
            return;
        }
        let replaced = self.replaced.lock().get(&transfer).cloned();
        if let Some((id, tracker)) = replaced {
            tracker.request_cancel(ErrorCode::Cancelled);
            self.inner.cancel(id);
        } else {
            self.inner.cancel(transfer);
        }
    }

    /// Runs `inner` in place of `job`.
    fn replace(self: &Arc<Self>, job: Job, inner: Job, then: Then) -> Result<()> {
        let (id, transfer) = (job.transfer, inner.transfer);
        let tracker = Arc::clone(&inner.tracker);
        self.replaced.lock().insert(id, (transfer, Arc::clone(&tracker)));
        // A cancel that came before the line above has set the flag only.
        if let Some(code) = job.tracker.cancelled() {
            tracker.request_cancel(code);
        }
        let shared = Arc::clone(self);
        tracker.on_finish(move |inner| shared.ended(&job, inner, &then));
        let submitted = self.inner.submit(inner);
        if submitted.is_err() {
            self.replaced.lock().remove(&id);
        }
        submitted
    }

    /// The job underneath has ended; hands its outcomes on and goes on with what follows.
    fn ended(self: &Arc<Self>, job: &Job, inner: &Tracker, then: &Then) {
        self.replaced.lock().remove(&job.transfer);
        // What follows a job has no say about its pieces.
        let own = if matches!(then, Then::End) { 0 } else { inner.pieces() };
        for (i, piece) in job.pieces.iter().enumerate().take(own) {
            match inner.outcome(i) {
                Some(Outcome::Done) => job.tracker.done(i, 1, piece.len),
                Some(Outcome::Failed(code)) => job.tracker.fail(i, code),
                Some(Outcome::Pending) | None => {}
            }
        }
        if let Some(detail) = inner.detail() {
            job.tracker.explain(detail);
        }
        let next = match then {
            _ if inner.error().is_some() => None,
            Then::End => None,
            Then::Fail => {
                end(job, ErrorCode::Transport, "a fault was injected");
                return;
            }
            Then::Again => Some(Job { digest: None, ..replacement(job) }),
            Then::Flip => self.flip(job),
        };
        if let Some(next) = next
            && self.replace(job.clone(), next, Then::End).is_ok()
        {
            return;
        }
        end(job, ErrorCode::Transport, "a fault was injected");
    }

    /// A job that overwrites one byte in the middle of the first piece with its complement.
    fn flip(&self, job: &Job) -> Option<Job> {
        let piece = job.pieces.first()?;
        let offset = piece.len / 2;
        let mut byte = [0];
        job.local.read_at(piece.local_offset + offset, &mut byte).ok()?;
        let local = Memory::anonymous(1).ok()?;
        local.write_at(0, &[!byte[0]]).ok()?;
        let region = RegionId(NEXT_ID.fetch_add(1, Ordering::Relaxed));
        self.transport.register(region, &local).ok()?;
        let tracker = Arc::new(Tracker::new(1));
        let transport = Arc::clone(&self.transport);
        tracker.on_finish(move |_| transport.deregister(region));
        Some(Job {
            local_region: region,
            local,
            pieces: [Piece { local_offset: 0, remote_offset: piece.remote_offset + offset, len: 1 }].into(),
            integrity: Integrity::Off,
            digest: None,
            tracker,
            ..replacement(job)
        })
    }
}

/// The same job under another id and tracker.
fn replacement(job: &Job) -> Job {
    Job {
        transfer: TransferId(NEXT_ID.fetch_add(1, Ordering::Relaxed)),
        tracker: Arc::new(Tracker::new(job.pieces.len())),
        ..job.clone()
    }
}

/// Ends a job that the transport underneath does not know (any more).
fn end(job: &Job, code: ErrorCode, why: &str) {
    if !job.tracker.all_decided() {
        job.tracker.fail_rest(code, why);
    }
    job.tracker.finish();
}

fn closed() -> Error {
    Error::failed(ErrorCode::Closed, "the link is closed; connect to the peer again")
}

#[cfg(test)]
mod tests;
