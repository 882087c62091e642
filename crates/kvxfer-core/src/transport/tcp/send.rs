//! The sending half of a stream: what goes next, and how it gets into the socket.
//!
//! Acknowledgements and read requests go first, in one call with the header of the frame that follows them; then
//! answers to the peer's reads and our own writes take turns. A digest is taken slice by slice just before the
//! slice is handed to the kernel, which then finds it in the cache.

use super::frame::{self, DIGEST_LEN, Header, Kind, MAX_ACKS, TablePiece};
use super::lane::{Broken, Ledger, Pumped, Reply, STEP_BYTES, Scratch, Sent};
use super::link::{Inner, Taken};
use super::scatter::{self, Digest, MAX_IOV, Scatter};
use crate::cuda::Landing;
use crate::transport::{Job, Op};
use kvxfer_proto::{ErrorCode, Integrity, RegionId};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

/// State of the sending half.
pub(super) struct Sender {
    /// Most payload bytes of one call.
    slice: Slice,
    /// Control frames, and header and table of the frame under way.
    head: Vec<u8>,
    head_at: usize,
    body: Option<Body>,
    /// Frames from a device that are being copied to slots while others are sent.
    ahead: VecDeque<Ahead>,
    /// Whose turn it is: answers or writes.
    writes_next: bool,
}

/// A frame that waits for its bytes.
struct Ahead {
    taken: Taken,
    /// Goes before what it writes to.
    filling: Landing,
    bytes: Scatter,
}

/// Payload and digest under way.
struct Body {
    bytes: Scatter,
    /// Set for `Full`: what was handed to the kernel so far.
    digest: Option<Digest>,
    /// Bytes from the position on that the digest covers already.
    hashed: usize,
    tail: [u8; DIGEST_LEN],
    tail_at: usize,
    tail_len: usize,
}

/// Payload bytes of one call.
#[derive(Clone, Copy)]
struct Slice {
    plain: usize,
    /// With a digest: a block that is still in the core's cache when the kernel copies it after hashing.
    hashed: usize,
}

/// Within a host both ends share the cores and the caches: with a digest a receiver that starts early finds the bytes
/// in the cache. Measured best among 32 KiB to 512 KiB (`docs/performance.md`).
const LOCAL: Slice = Slice { plain: 512 << 10, hashed: 32 << 10 };
/// Between hosts: few calls.
const REMOTE: Slice = Slice { plain: 512 << 10, hashed: 256 << 10 };

impl Sender {
    /// For a socket to a peer on the same host, or on another one.
    pub(super) fn new(local: bool) -> Self {
        let slice = if local { LOCAL } else { REMOTE };
        Self { slice, head: Vec::new(), head_at: 0, body: None, ahead: VecDeque::new(), writes_next: false }
    }

    /// Lets go of what is under way.
    pub(super) fn clear(&mut self) {
        *self = Self { slice: self.slice, ..Self::new(true) };
    }

    /// True while a frame with payload is partly sent.
    pub(super) fn in_payload(&self) -> bool {
        self.body.is_some()
    }

    /// Sends until the socket is full, nothing is left, or the step's budget is used up.
    pub(super) fn pump(
        &mut self,
        socket: BorrowedFd<'_>,
        link: &Inner,
        ledger: &mut Ledger,
        scratch: &mut Scratch,
    ) -> Result<Pumped, Broken> {
        let mut budget = STEP_BYTES;
        loop {
            if self.head_at == self.head.len() && self.body.is_none() {
                if budget == 0 {
                    return Ok(Pumped::Budget);
                }
                let asked = self.build(link, ledger, scratch);
                if self.head.is_empty() {
                    return Ok(Pumped::Drained);
                }
                budget = budget.saturating_sub(asked);
            }
            match self.send(socket, scratch) {
                Ok(n) => {
                    scratch.moved += n;
                    budget = budget.saturating_sub(n);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(Pumped::Blocked),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Broken::io("send", &e)),
            }
            if budget == 0 {
                return Ok(Pumped::Budget);
            }
        }
    }

    /// One `sendmsg` of what is under way; returns the bytes sent.
    fn send(&mut self, socket: BorrowedFd<'_>, scratch: &mut Scratch) -> std::io::Result<usize> {
        let iov = &mut scratch.iov;
        iov.clear();
        let head = &self.head[self.head_at..];
        if !head.is_empty() {
            iov.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        }
        if let Some(body) = &mut self.body {
            let limit =
                if body.digest.is_some() { body.prepare(self.slice.hashed) } else { self.slice.plain };
            let taken = body.bytes.gather(limit, MAX_IOV, iov);
            if taken == body.bytes.left() && body.tail_len > 0 {
                let tail = &body.tail[body.tail_at..];
                iov.push(libc::iovec { iov_base: tail.as_ptr().cast_mut().cast(), iov_len: tail.len() });
            }
        }
        // SAFETY: the entries name `self.head`, the body's memory (kept alive and range-checked by its `Scatter`) and
        // `body.tail`; none of them is changed during the call by us.
        let sent = unsafe { scatter::send(socket, iov) }?;
        let from_head = sent.min(self.head.len() - self.head_at);
        self.head_at += from_head;
        if let Some(body) = &mut self.body
            && body.consume(sent - from_head)
        {
            self.body = None;
        }
        Ok(sent)
    }

    /// Chooses what to send next and encodes it; `head` stays empty when there is nothing. Returns the bytes asked
    /// for by read requests.
    fn build(&mut self, link: &Inner, ledger: &mut Ledger, scratch: &mut Scratch) -> usize {
        self.head.clear();
        self.head_at = 0;
        while !ledger.acks.is_empty() {
            scratch.table.clear();
            let count = ledger.acks.len().min(MAX_ACKS);
            ledger.acks.drain(..count).for_each(|ack| frame::push_ack(&mut scratch.table, ack));
            answer(Kind::Ack, count as u32).encode(&scratch.table, &mut self.head);
        }
        let mut asked = 0;
        while asked < STEP_BYTES && ledger.may_ask() {
            let Some(taken) = link.take(Op::Read, &mut scratch.finished) else { break };
            self.encode(Kind::Read, &taken, &mut scratch.table);
            let bytes = taken.sent.cut.bytes;
            ledger.asked_bytes += u64::from(bytes);
            ledger.asked.push_back(taken.sent);
            asked += bytes as usize;
        }
        // Answers and writes take turns: the one that had the last frame comes second.
        let writes_first = std::mem::take(&mut self.writes_next);
        let chosen = writes_first && self.build_write(link, ledger, scratch);
        if !chosen && !self.build_reply(ledger) && !writes_first {
            self.build_write(link, ledger, scratch);
        }
        asked
    }

    fn build_reply(&mut self, ledger: &mut Ledger) -> bool {
        let Some(reply) = ledger.replies.front_mut() else { return false };
        if let Some(filling) = &mut reply.filling {
            match filling.is_done() {
                // The end of the copy wakes this stream.
                Ok(false) => return false,
                Ok(true) => {}
                Err(e) => {
                    tracing::warn!(error = %e, "a peer's read of device memory");
                    reply.bytes = Err(e.code());
                }
            }
        }
        let Some(reply) = ledger.replies.pop_front() else { return false };
        self.writes_next = true;
        let Reply { job, seq, integrity, bytes, .. } = reply;
        let header = Header { integrity, job, seq, ..answer(Kind::Data, 0) };
        match bytes {
            Ok(bytes) => {
                let header = Header { payload: bytes.left() as u32, ..header };
                let check = header.encode(&[], &mut self.head);
                self.body = Some(Body::new(bytes, integrity, check));
            }
            Err(code) => {
                Header { code, ..header }.encode(&[], &mut self.head);
            }
        }
        true
    }

    fn build_write(&mut self, link: &Inner, ledger: &mut Ledger, scratch: &mut Scratch) -> bool {
        if !ledger.may_write() {
            return false;
        }
        while self.ahead.len() < link.staging_depth {
            let Some(taken) = link.take(Op::Write, &mut scratch.finished) else { break };
            let Taken { job, sent, .. } = &taken;
            let ranges = sent.cut.parts(&job.pieces).map(|p| (p.local_offset, p.len as u32));
            // Submit checks every piece, so a list that cannot be made is a mistake of ours; the job ends, nothing else does.
            let bytes = Scatter::new(job.local.clone(), ranges)
                .map_err(|_| ErrorCode::OutOfRange)
                .and_then(|b| b.stage(&link.staging).map_err(|e| refused(link, job, &e)))
                .and_then(|b| Ok((b.fill(ledger.waker()).map_err(|e| refused(link, job, &e))?, b)));
            match bytes {
                Ok((None, bytes)) => {
                    self.start(&taken, bytes, ledger, scratch);
                    return true;
                }
                Ok((Some(filling), bytes)) => self.ahead.push_back(Ahead { taken, filling, bytes }),
                Err(code) => {
                    link.settle([(sent.job, sent.cut, code)].into_iter(), &mut scratch.finished);
                }
            }
        }
        while let Some(mut next) = self.ahead.pop_front() {
            let code = match next.filling.is_done() {
                Ok(false) => {
                    // The end of the copy wakes this stream.
                    self.ahead.push_front(next);
                    return false;
                }
                Ok(true) => next.taken.job.tracker.cancelled(),
                Err(e) => Some(refused(link, &next.taken.job, &e)),
            };
            let Some(code) = code else {
                self.start(&next.taken, next.bytes, ledger, scratch);
                return true;
            };
            let Sent { job, cut, .. } = next.taken.sent;
            link.settle([(job, cut, code)].into_iter(), &mut scratch.finished);
        }
        false
    }

    /// Makes a frame the one under way.
    fn start(&mut self, taken: &Taken, bytes: Scatter, ledger: &mut Ledger, scratch: &mut Scratch) {
        let Taken { job, sent, .. } = taken;
        let check = self.encode(Kind::Write, taken, &mut scratch.table);
        self.body = Some(Body::new(bytes, job.integrity, check));
        ledger.sent_bytes += u64::from(sent.cut.bytes);
        ledger.sent.push_back(*sent);
    }

    fn encode(&mut self, kind: Kind, taken: &Taken, table: &mut Vec<u8>) -> u64 {
        let Taken { job, remote, sent } = taken;
        table.clear();
        for p in sent.cut.parts(&job.pieces) {
            frame::push_piece(table, TablePiece { offset: p.remote_offset, len: p.len as u32 });
        }
        let header = Header {
            kind,
            integrity: job.integrity,
            code: ErrorCode::Ok,
            job: sent.job,
            seq: sent.seq,
            count: sent.cut.count,
            payload: sent.cut.bytes,
            region: remote.region,
            capability: remote.capability,
        };
        header.encode(table, &mut self.head)
    }
}

impl Body {
    fn new(bytes: Scatter, integrity: Integrity, check: u64) -> Self {
        let mut digest = Digest::for_level(integrity, check);
        let tail_len = if digest.is_some() { DIGEST_LEN } else { 0 };
        let mut tail = [0; DIGEST_LEN];
        if integrity == Integrity::Bound
            && let Some(mut d) = digest.take()
        {
            bytes.sample(&mut d);
            tail = d.finish().to_le_bytes();
        }
        Self { bytes, digest, hashed: 0, tail, tail_at: 0, tail_len }
    }

    /// Makes sure that the next bytes are hashed and returns how many of them are.
    fn prepare(&mut self, slice: usize) -> usize {
        if self.hashed == 0
            && let Some(digest) = &mut self.digest
        {
            let n = slice.min(self.bytes.left());
            self.bytes.digest(n, digest);
            self.hashed = n;
            if n == self.bytes.left() {
                self.tail = digest.finish().to_le_bytes();
            }
        }
        self.hashed
    }

    /// Notes that `n` bytes are sent; true when nothing is left.
    fn consume(&mut self, n: usize) -> bool {
        let payload = n.min(self.bytes.left());
        self.bytes.advance(payload);
        self.hashed -= payload.min(self.hashed);
        self.tail_at += n - payload;
        self.bytes.left() == 0 && self.tail_at == self.tail_len
    }
}

/// The frame fails with the code, the transfer says why.
fn refused(link: &Inner, job: &Job, e: &crate::Error) -> ErrorCode {
    job.tracker.explain(e.to_string());
    tracing::warn!(peer = link.name, error = %e, "no way between device memory and a socket");
    e.code()
}

fn answer(kind: Kind, count: u32) -> Header {
    Header {
        kind,
        integrity: Integrity::Off,
        code: ErrorCode::Ok,
        job: 0,
        seq: 0,
        count,
        payload: 0,
        region: RegionId(0),
        capability: 0,
    }
}
