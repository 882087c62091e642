//! One chunk on its way: bytes moved by a transport, a digest from wherever it is cheapest, one outcome.

use super::digest::Bytes;
use super::sender::ChunkSource;
use super::session::{Session, failed, part};
use crate::transport::{Capabilities, SegmentDigests, Tracker};
use kvxfer_proto::Integrity;
use kvxfer_proto::integrity::{Binding, segment_count};
use kvxfer_proto::sender::{Failure, Write};
use kvxfer_proto::wire::Check;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A write under way: it is over when its bytes have been moved and its digest is known.
pub(super) struct WriteJob {
    pub(super) session: Arc<Session>,
    pub(super) write: Write,
    pub(super) binding: Binding,
    pub(super) source: Arc<ChunkSource>,
    pub(super) how: How,
    pub(super) parts: Mutex<Parts>,
}

#[derive(Default)]
pub(super) struct Parts {
    moved: Option<Result<(), Failure>>,
    digest: Option<Result<u64, Failure>>,
    /// The machine has been told.
    pub(super) over: bool,
}

/// Where the digest of a write comes from.
pub(super) enum How {
    None,
    /// Sampled lines of the source, once the bytes have been moved.
    Bound,
    /// Left by the mover.
    Fused(Arc<SegmentDigests>),
    /// The hashing thread's, while the bytes are moved.
    Hashed,
    /// Sampled lines of a source on a device: the hashing thread waits for the device, nobody else does.
    Sampled,
}

/// How a level is kept on a transport, and at which level the transport itself works.
pub(super) fn choose(
    level: Integrity,
    caps: Capabilities,
    device: bool,
    base: u64,
    len: u64,
) -> (How, Integrity) {
    let bound = if device { How::Sampled } else { How::Bound };
    match level {
        Integrity::Off => (How::None, Integrity::Off),
        Integrity::Bound => (bound, Integrity::Bound),
        // Every byte is checked as it arrives: what is left to check is that it is the right chunk.
        Integrity::Full if caps.verifies_arrival => (bound, Integrity::Full),
        Integrity::Full if caps.fuses_digest => {
            let hashes = (0..segment_count(len)).map(|_| AtomicU64::new(0)).collect();
            (How::Fused(Arc::new(SegmentDigests { base, len, hashes })), Integrity::Bound)
        }
        Integrity::Full => (How::Hashed, Integrity::Bound),
    }
}

impl WriteJob {
    /// The transfer has ended; runs on the thread that ended it.
    pub(super) fn moved(job: Arc<Self>, tracker: &Tracker) {
        let result = match tracker.error() {
            None => Ok(()),
            Some(code) => Err(failed(code, tracker.detail().unwrap_or_else(|| code.to_string()))),
        };
        let bytes = || Bytes { memory: job.source.region.memory(), runs: &job.source.runs };
        let digest = match &job.how {
            How::Hashed | How::Sampled => None,
            _ if result.is_err() => None,
            How::None => Some(Ok(0)),
            How::Bound => Some(bytes().bound(&job.binding)),
            How::Fused(d) => Some(Ok(job.binding.full(d.hashes.iter().map(|h| h.load(Ordering::Acquire))))),
        };
        let digest = digest.map(|d| d.map_err(|e| failed(e.code(), e.to_string())));
        {
            let mut parts = job.parts.lock();
            parts.moved = Some(result);
            if digest.is_some() {
                parts.digest = digest;
            }
        }
        job.end_if_complete();
        job.let_go();
    }

    /// Runs on the hashing thread.
    pub(super) fn hash(job: Arc<Self>) {
        let bytes = Bytes { memory: job.source.region.memory(), runs: &job.source.runs };
        let ready = job.source.after.as_ref().map_or(Ok(()), crate::cuda::Fence::wait);
        let digest = ready.and_then(|()| match job.how {
            How::Sampled => bytes.bound(&job.binding),
            _ => bytes.full(&job.binding),
        });
        let digest = digest.map_err(|e| failed(e.code(), e.to_string()));
        job.parts.lock().digest = Some(digest);
        job.end_if_complete();
        job.let_go();
    }

    /// Tells the machine, once, as soon as the outcome is certain.
    fn end_if_complete(&self) {
        let result = {
            let mut parts = self.parts.lock();
            let result = match (&parts.moved, &parts.digest) {
                _ if parts.over => return,
                (Some(Ok(())), Some(Ok(digest))) => Ok(match self.how {
                    How::None => Check::None,
                    How::Bound | How::Sampled => Check::Bound(*digest),
                    How::Fused(_) | How::Hashed => Check::Full(*digest),
                }),
                (Some(Err(f)), _) | (Some(Ok(())), Some(Err(f))) => Err(f.clone()),
                _ => return,
            };
            parts.over = true;
            result
        };
        self.session.write_ended(self.write, result);
    }

    /// Drops one reference; the last one hands what must not be dropped here to the progress thread.
    pub(super) fn let_go(self: Arc<Self>) {
        if let Some(Self { session, source, .. }) = Arc::into_inner(self) {
            session.throw_away(Box::new(source));
            part(session);
        }
    }
}
