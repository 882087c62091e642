//! The receiving half of a stream: from the socket to memory, checked.
//!
//! Headers and tables are read into a small look-ahead buffer, payload straight to where it belongs; the call that
//! takes the end of a payload also takes what follows it, so a frame costs few system calls. A digest is taken of
//! each block right after it was received. Receiving never waits for anything but the socket: answers are noted in
//! the ledger, whose size the peer's window bounds.

use super::frame::{self, Ack, DIGEST_LEN, FrameError, HEADER_LEN, Header, Kind, MAX_TABLE};
use super::lane::{Arrived, Broken, Ledger, Reply, STEP_BYTES, Scratch, Sent, Then, WINDOW_FRAMES};
use super::link::Inner;
use super::region::Denied;
use super::scatter::{self, Digest, MAX_IOV, Scatter};
use crate::transport::Op;
use kvxfer_proto::ErrorCode;
use std::os::fd::BorrowedFd;

/// State of the receiving half.
pub(super) struct Receiver {
    /// Bytes `start..end` were received and not yet looked at.
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
}

enum State {
    Header,
    Table { fixed: [u8; HEADER_LEN], header: Header, check: u64 },
    Body(Box<Body>),
}

/// Payload and digest under way.
struct Body {
    target: Target,
    /// Where the bytes go; `None`: they are thrown away.
    bytes: Option<Scatter>,
    left: usize,
    header: Header,
    digest: Option<Digest>,
}

enum Target {
    /// Into a region of ours; the acknowledgement will say this unless the check fails.
    Write(ErrorCode),
    /// Into the local side of a read of ours.
    Read(Sent),
}

/// Room for a header with the largest table and the look-ahead.
const AHEAD: usize = 16 << 10;
/// Bytes asked for beyond what is needed: further small frames come in the same call, at the price of copying at most
/// this much of a payload.
const LOOK: usize = 2 << 10;
/// Bytes received before they are hashed, while they are in the core's cache.
const BLOCK: usize = 256 << 10;
/// Answers a peer may leave us owing before it must be broken: well above its own window.
const MAX_OWED: usize = 4 * WINDOW_FRAMES;

const _: () = assert!(HEADER_LEN + MAX_TABLE + LOOK <= AHEAD);

impl From<FrameError> for Broken {
    fn from(e: FrameError) -> Self {
        Self::protocol(e)
    }
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { ahead: vec![0; AHEAD].into(), start: 0, end: 0, state: State::Header }
    }

    /// Receives until the socket is empty (false) or the step's budget is used up (true).
    pub(super) fn pump(
        &mut self,
        socket: BorrowedFd<'_>,
        link: &Inner,
        ledger: &mut Ledger,
        scratch: &mut Scratch,
    ) -> Result<bool, Broken> {
        let mut budget = STEP_BYTES;
        while budget > 0 {
            let n = match self.fill(socket, scratch) {
                Ok(0) if self.start == self.end && matches!(self.state, State::Header) => {
                    return Err(Broken { code: ErrorCode::PeerGone, text: "closed by the peer".into() });
                }
                Ok(0) => {
                    return Err(Broken {
                        code: ErrorCode::PeerGone,
                        text: "closed by the peer in the middle of a frame".into(),
                    });
                }
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Broken::io("recv", &e)),
            };
            scratch.moved += n;
            budget = budget.saturating_sub(n);
            while self.advance(link, ledger, scratch)? {}
        }
        Ok(true)
    }

    /// If one of `jobs` is being received, throws the rest away from now on and returns the job.
    pub(super) fn abandon(&mut self, jobs: &[u64]) -> Option<u64> {
        let State::Body(body) = &mut self.state else { return None };
        let Target::Read(sent) = body.target else { return None };
        (jobs.contains(&sent.job) && body.bytes.take().is_some()).then_some(sent.job)
    }

    /// One call to the socket.
    fn fill(&mut self, socket: BorrowedFd<'_>, scratch: &mut Scratch) -> std::io::Result<usize> {
        if let State::Body(body) = &mut self.state
            && body.left > 0
        {
            debug_assert_eq!(self.start, self.end, "payload is taken from the look-ahead first");
            let Some(bytes) = &mut body.bytes else {
                let n = scatter::discard(socket, body.left)?;
                body.left -= n;
                return Ok(n);
            };
            let iov = &mut scratch.iov;
            iov.clear();
            let limit = if body.digest.is_some() { BLOCK } else { STEP_BYTES };
            let taken = bytes.gather(limit, MAX_IOV, iov);
            (self.start, self.end) = (0, 0);
            if taken == body.left {
                iov.push(libc::iovec { iov_base: self.ahead.as_mut_ptr().cast(), iov_len: LOOK });
            }
            // SAFETY: the entries name registered memory (kept alive and range-checked by the `Scatter`, which nobody
            // borrows) and the look-ahead buffer, which is ours alone and longer than LOOK.
            let n = unsafe { scatter::receive(socket, iov) }?;
            let payload = n.min(taken);
            if let Some(digest) = body.digest.as_mut().filter(|_| body.header.integrity == FULL) {
                bytes.digest(payload, digest);
            }
            bytes.advance(payload);
            body.left -= payload;
            self.end = n - payload;
            return Ok(n);
        }
        if self.start > 0 {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let need = match &self.state {
            State::Header => HEADER_LEN,
            State::Table { header, .. } => header.table_len(),
            State::Body(_) => DIGEST_LEN,
        };
        let room = &mut self.ahead[self.end..need.max(LOOK)];
        let mut iov = [libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() }];
        // SAFETY: the entry names the free part of the look-ahead buffer.
        let n = unsafe { scatter::receive(socket, &mut iov) }?;
        self.end += n;
        Ok(n)
    }

    /// Takes one step with the bytes at hand; false when more are needed.
    fn advance(&mut self, link: &Inner, ledger: &mut Ledger, scratch: &mut Scratch) -> Result<bool, Broken> {
        let at_hand = &self.ahead[self.start..self.end];
        match &mut self.state {
            State::Header => {
                let Some(fixed) = at_hand.first_chunk::<HEADER_LEN>() else { return Ok(false) };
                let (header, check) = Header::decode(fixed)?;
                self.start += HEADER_LEN;
                self.state = State::Table { fixed: *fixed, header, check };
            }
            State::Table { fixed, header, check } => {
                let Some(table) = at_hand.get(..header.table_len()) else { return Ok(false) };
                frame::verify(fixed, table)?;
                let next = begin(*header, *check, table, link, ledger, scratch)?;
                self.start += header.table_len();
                self.state = next.map_or(State::Header, State::Body);
            }
            State::Body(body) if body.left > 0 => {
                if at_hand.is_empty() {
                    return Ok(false);
                }
                let n = at_hand.len().min(body.left);
                if let Some(bytes) = &mut body.bytes {
                    bytes.put(&at_hand[..n]);
                    if let Some(digest) = body.digest.as_mut().filter(|_| body.header.integrity == FULL) {
                        digest.bytes(&at_hand[..n]);
                    }
                }
                body.left -= n;
                self.start += n;
            }
            State::Body(body) => {
                let Some(tail) = at_hand.get(..body.header.digest_len()) else { return Ok(false) };
                self.start += tail.len();
                complete(body, tail, link, ledger, scratch);
                self.state = State::Header;
            }
        }
        Ok(true)
    }
}

const FULL: kvxfer_proto::Integrity = kvxfer_proto::Integrity::Full;

/// A header with its table has arrived intact. Returns the payload to expect, if any.
fn begin(
    header: Header,
    check: u64,
    table: &[u8],
    link: &Inner,
    ledger: &mut Ledger,
    scratch: &mut Scratch,
) -> Result<Option<Box<Body>>, Broken> {
    let owed = ledger.acks.len() + ledger.landing.len() + ledger.replies.len();
    if owed >= MAX_OWED && matches!(header.kind, Kind::Write | Kind::Read) {
        return Err(Broken::protocol(format!("{owed} frames sent without waiting for answers")));
    }
    let resolve = |op| {
        let pieces = frame::decode_pieces(table, header.payload)?;
        match link.regions.resolve(header.region, header.capability, op, &pieces) {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(Denied::Refused(code)) => Ok(Err(code)),
            Err(Denied::Violation(text)) => Err(Broken::protocol(text)),
        }
    };
    let left = header.payload as usize;
    let body = |target, bytes: Option<Scatter>| {
        let digest = Digest::for_level(header.integrity, check);
        Ok(Some(Box::new(Body { target, bytes, left, header, digest })))
    };
    match header.kind {
        Kind::Ack => {
            ledger.sent_bytes -= link
                .acknowledged(table, &mut ledger.sent, &mut scratch.finished)
                .map_err(Broken::protocol)?;
            Ok(None)
        }
        Kind::Read => {
            let Header { job, seq, integrity, .. } = header;
            let bytes = resolve(Op::Read)?.and_then(|bytes| staged(bytes, link));
            let (bytes, filling) = match bytes.map(|b| (b.fill(ledger.waker()), b)) {
                Ok((Ok(filling), bytes)) => (Ok(bytes), filling),
                Ok((Err(e), _)) => (Err(not_staged(link, &e)), None),
                Err(code) => (Err(code), None),
            };
            ledger.replies.push_back(Reply { job, seq, integrity, filling, bytes });
            Ok(None)
        }
        Kind::Write => match resolve(Op::Write)?.and_then(|bytes| staged(bytes, link)) {
            Ok(bytes) => body(Target::Write(ErrorCode::Ok), Some(bytes)),
            Err(code) => body(Target::Write(code), None),
        },
        Kind::Data => {
            let sent = match ledger.asked.pop_front() {
                Some(s) if (s.job, s.seq) == (header.job, header.seq) => s,
                _ => {
                    return Err(Broken::protocol(format!(
                        "data of job {} frame {} was not due",
                        header.job, header.seq
                    )));
                }
            };
            ledger.asked_bytes -= u64::from(sent.cut.bytes);
            if header.code != ErrorCode::Ok {
                link.settle([(sent.job, sent.cut, header.code)].into_iter(), &mut scratch.finished);
                return Ok(None);
            }
            if header.payload != sent.cut.bytes {
                return Err(Broken::protocol(format!(
                    "{} bytes of data, {} were asked for",
                    header.payload, sent.cut.bytes
                )));
            }
            let Some(job) = link.begin_receive(sent.job) else { return body(Target::Read(sent), None) };
            if job.integrity != header.integrity {
                link.end_receive(sent.job, None, &mut scratch.finished);
                return Err(Broken::protocol(format!(
                    "data checked at level {:?}, {:?} was asked for",
                    header.integrity, job.integrity
                )));
            }
            let ranges = sent.cut.parts(&job.pieces).map(|p| (p.local_offset, p.len as u32));
            // Submit checks every piece, so a list that cannot be made is a mistake of ours; the job ends, nothing else does.
            let bytes = Scatter::new(job.local.clone(), ranges).map_err(|_| ErrorCode::OutOfRange);
            let bytes = match bytes.and_then(|bytes| staged(bytes, link)) {
                Ok(bytes) => Some(bytes),
                Err(code) => {
                    link.end_receive(sent.job, Some((sent.cut, code)), &mut scratch.finished);
                    None
                }
            };
            body(Target::Read(sent), bytes)
        }
    }
}

/// A slot in the place of device memory.
fn staged(bytes: Scatter, link: &Inner) -> Result<Scatter, ErrorCode> {
    bytes.stage(&link.staging).map_err(|e| not_staged(link, &e))
}

/// The frame is answered with the code; the log has the reason.
fn not_staged(link: &Inner, e: &crate::Error) -> ErrorCode {
    tracing::warn!(peer = link.name, error = %e, "no way between a socket and device memory");
    e.code()
}

/// The payload and its digest have arrived.
fn complete(body: &mut Body, tail: &[u8], link: &Inner, ledger: &mut Ledger, scratch: &mut Scratch) {
    let mut intact = true;
    if let (Some(digest), Some(bytes)) = (&mut body.digest, &body.bytes) {
        if body.header.integrity != FULL {
            bytes.sample(digest);
        }
        intact = digest.finish().to_le_bytes() == *tail;
    }
    let mut verdict = match body.target {
        _ if !intact => ErrorCode::Corrupt,
        Target::Write(code) => code,
        Target::Read(_) => ErrorCode::Ok,
    };
    let Header { job, seq, .. } = body.header;
    // Only what passed its check goes on to a device.
    if verdict == ErrorCode::Ok
        && let Some(bytes) = body.bytes.take_if(|b| b.is_staged())
    {
        match bytes.land(ledger.waker()) {
            Ok(landing) => {
                let then = match body.target {
                    Target::Write(code) => Then::Ack(Ack { job, seq, code }),
                    Target::Read(sent) => Then::Read(sent),
                };
                ledger.landing.push_back(Arrived { landing: landing.map(|l| (l, bytes)), then });
                return;
            }
            Err(e) => verdict = not_staged(link, &e),
        }
        body.bytes = Some(bytes);
    }
    match body.target {
        Target::Write(_) => ledger.acknowledge(Ack { job, seq, code: verdict }),
        Target::Read(sent) => {
            if body.bytes.is_some() {
                link.end_receive(sent.job, Some((sent.cut, verdict)), &mut scratch.finished);
            }
        }
    }
}
