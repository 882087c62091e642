//! One job cut into slices: who may take the next one, what a finished slice decides, and when the job has ended.
//!
//! Every step happens under the task's own short lock; the bytes move outside of it. A slice in progress keeps the
//! job from ending, a stop (cancel, peer gone, closed) keeps new slices from starting, and whoever takes the last
//! step (the last slice's mover or the one who stops an idle job) finishes the tracker, exactly once.

use crate::transport::{Job, Piece, Tracker};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::integrity::SEGMENT;
use parking_lot::Mutex;
use std::sync::Arc;

/// Bytes of a slice: the unit of sharing between threads and of cancelling. A whole number of segments.
pub(super) const SLICE: u64 = 2 << 20;
/// Most pieces in a slice, so that many tiny pieces are shared and cancelled as well.
const SLICE_PIECES: usize = 4096;
const _: () = assert!(SLICE.is_multiple_of(SEGMENT));

/// Moves the bytes of slices to or from one imported region.
pub(crate) trait Carrier: Send + Sync + 'static {
    /// Moves one slice of `job`. Ranges lie inside both sides. May be called by several threads for different slices.
    fn carry(&self, job: &Job, slice: &Slice) -> Report;
}

/// A run of a job's bytes: whole pieces, except that the first may be entered and the last left in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    /// First piece touched.
    pub(crate) first: usize,
    /// Bytes of the first piece that belong to earlier slices.
    pub(crate) skip: u64,
    /// One beyond the last piece touched.
    pub(crate) end: usize,
    /// Bytes in all.
    pub(crate) bytes: u64,
    /// Bytes of the job before this slice.
    pub(crate) position: u64,
    /// The last piece goes on in the next slice.
    pub(crate) cut: bool,
}

/// A contiguous part of one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) piece: usize,
    pub(crate) local: u64,
    pub(crate) remote: u64,
    pub(crate) len: u64,
}

/// What became of a slice. The default: everything moved.
#[derive(Debug, Default)]
pub(crate) struct Report {
    failed: Vec<(usize, ErrorCode)>,
    detail: Option<String>,
    stop: Option<(usize, ErrorCode)>,
}

/// A job under way.
pub(crate) struct Task {
    pub(super) lane: u64,
    pub(super) job: Job,
    carrier: Arc<dyn Carrier>,
    progress: Mutex<Progress>,
}

/// What is there to do for a task.
pub(super) enum Grab {
    /// Move this.
    Slice(Slice),
    /// Nothing (any more).
    Nothing,
    /// The job has ended and the caller must call [`Task::finish`].
    End,
}

/// The state machine behind a task's lock.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// Next piece to hand out, and bytes of it handed out already.
    piece: usize,
    offset: u64,
    /// Bytes handed out.
    position: u64,
    /// Slices in progress.
    running: u32,
    stopped: Option<ErrorCode>,
    detail: Option<String>,
    ended: bool,
    /// Pieces spread over several slices.
    open: Vec<Open>,
}

#[derive(Clone, Debug)]
struct Open {
    piece: usize,
    left: u64,
    failed: Option<ErrorCode>,
}

impl Slice {
    /// The whole job as one slice.
    pub(super) fn whole(pieces: &[Piece], bytes: u64) -> Self {
        Self { first: 0, skip: 0, end: pieces.len(), bytes, position: 0, cut: false }
    }

    /// Its runs, in order.
    pub(crate) fn runs<'a>(&self, pieces: &'a [Piece]) -> impl Iterator<Item = Run> + Clone + use<'a> {
        let (first, mut skip, mut left) = (self.first, self.skip, self.bytes);
        pieces[first..self.end].iter().enumerate().map(move |(i, p)| {
            let len = (p.len - skip).min(left);
            let run =
                Run { piece: first + i, local: p.local_offset + skip, remote: p.remote_offset + skip, len };
            skip = 0;
            left -= len;
            run
        })
    }

    fn is_partial(&self, piece: usize) -> bool {
        (piece == self.first && self.skip > 0) || (self.cut && piece + 1 == self.end)
    }
}

impl Report {
    /// One piece did not arrive as it should; the others go on.
    pub(crate) fn fail(&mut self, piece: usize, code: ErrorCode, detail: impl FnOnce() -> String) {
        self.failed.push((piece, code));
        self.detail.get_or_insert_with(detail);
    }
    /// From this piece on nothing moved and nothing will: the whole job ends.
    pub(crate) fn stop(&mut self, piece: usize, code: ErrorCode, detail: String) {
        self.stop = Some((piece, code));
        self.detail.get_or_insert(detail);
    }
    fn failure(&self, piece: usize) -> Option<ErrorCode> {
        self.failed.iter().find(|(p, _)| *p == piece).map(|(_, code)| *code)
    }
}

impl Task {
    pub(super) fn new(lane: u64, job: Job, carrier: Arc<dyn Carrier>) -> Self {
        Self { lane, job, carrier, progress: Mutex::default() }
    }

    /// Takes the next slice.
    pub(super) fn grab(&self) -> Grab {
        let mut progress = self.progress.lock();
        if let Some(code) = self.job.tracker.cancelled() {
            progress.stopped.get_or_insert(code);
        }
        match progress.grab(&self.job.pieces, self.job.digest.is_some()) {
            Some(slice) => Grab::Slice(slice),
            // The cancel flag was set before anybody knew the job, so nobody else will end it.
            None if progress.end(self.job.pieces.len()) => Grab::End,
            None => Grab::Nothing,
        }
    }

    /// Moves a slice taken with [`Task::grab`]. True: the job has ended and this caller must call [`Task::finish`].
    pub(super) fn run(&self, slice: &Slice) -> bool {
        let report = self.carrier.carry(&self.job, slice);
        decide_whole(&self.job.tracker, &self.job.pieces, slice, &report);
        self.progress.lock().complete(&self.job.tracker, &self.job.pieces, slice, report)
    }

    /// No new slice starts. True: none was in progress, and this caller must call [`Task::finish`].
    pub(super) fn stop(&self, code: ErrorCode, detail: &str) -> bool {
        let mut progress = self.progress.lock();
        if !progress.ended {
            progress.stopped.get_or_insert(code);
            progress.detail.get_or_insert_with(|| detail.into());
        }
        progress.end(self.job.pieces.len())
    }

    /// Decides what is left and ends the tracker. No slice runs any more.
    pub(super) fn finish(&self) {
        let (stopped, detail) = {
            let mut progress = self.progress.lock();
            debug_assert!(progress.ended && progress.running == 0);
            (progress.stopped, progress.detail.take())
        };
        end_tracker(&self.job.tracker, stopped, detail);
    }
}

/// Moves a whole job at once on the calling thread, without a task.
pub(super) fn run_inline(job: &Job, carrier: &dyn Carrier, bytes: u64) {
    let mut progress = Progress { stopped: job.tracker.cancelled(), ..Progress::default() };
    if progress.stopped.is_none() {
        let slice = Slice::whole(&job.pieces, bytes);
        progress.piece = job.pieces.len();
        progress.running = 1;
        let report = carrier.carry(job, &slice);
        decide_whole(&job.tracker, &job.pieces, &slice, &report);
        progress.complete(&job.tracker, &job.pieces, &slice, report);
    }
    end_tracker(&job.tracker, progress.stopped, progress.detail);
}

fn end_tracker(tracker: &Tracker, stopped: Option<ErrorCode>, detail: Option<String>) {
    if let Some(code) = stopped {
        tracker.fail_rest(code, detail.unwrap_or_else(|| format!("the transfer was stopped: {code}")));
    } else if let Some(detail) = detail {
        tracker.explain(detail);
    }
    tracker.finish();
}

/// Outcomes of the pieces that lie wholly inside a slice; needs no lock.
fn decide_whole(tracker: &Tracker, pieces: &[Piece], slice: &Slice, report: &Report) {
    let end = report.stop.map_or(slice.end, |(piece, _)| piece);
    let (mut first, mut bytes) = (slice.first, 0);
    for (piece, p) in pieces.iter().enumerate().take(end).skip(slice.first) {
        let failure = if report.failed.is_empty() { None } else { report.failure(piece) };
        if slice.is_partial(piece) || failure.is_some() {
            if piece > first {
                tracker.done(first, piece - first, bytes);
            }
            (first, bytes) = (piece + 1, 0);
            if let Some(code) = failure
                && !slice.is_partial(piece)
            {
                tracker.fail(piece, code);
            }
        } else {
            bytes += p.len;
        }
    }
    if end > first {
        tracker.done(first, end - first, bytes);
    }
}

impl Progress {
    fn grab(&mut self, pieces: &[Piece], exact: bool) -> Option<Slice> {
        if self.ended || self.stopped.is_some() || self.piece == pieces.len() {
            return None;
        }
        let (first, skip, position) = (self.piece, self.offset, self.position);
        let (mut bytes, mut cut) = (0, false);
        while self.piece < pieces.len() && bytes < SLICE && !cut {
            let rest = pieces[self.piece].len - self.offset;
            let room = SLICE - bytes;
            // A small remainder goes along, unless slices must end where segments end.
            if rest <= room || (!exact && rest <= room + SLICE / 2) {
                self.piece += 1;
                self.offset = 0;
                bytes += rest;
            } else {
                self.offset += room;
                bytes += room;
                cut = true;
            }
            if !exact && self.piece - first >= SLICE_PIECES {
                break;
            }
        }
        self.position += bytes;
        self.running += 1;
        let end = self.piece + usize::from(cut);
        let slice = Slice { first, skip, end, bytes, position, cut };
        if cut && !(skip > 0 && end == first + 1) {
            self.open.push(Open { piece: self.piece, left: pieces[self.piece].len, failed: None });
        }
        Some(slice)
    }

    /// A slice in progress has ended; decides pieces that several slices share. True: the job has ended.
    fn complete(&mut self, tracker: &Tracker, pieces: &[Piece], slice: &Slice, report: Report) -> bool {
        let end = report.stop.map_or(slice.end, |(piece, _)| piece);
        for run in slice.runs(pieces).filter(|r| r.piece < end && slice.is_partial(r.piece)) {
            let Some(at) = self.open.iter().position(|o| o.piece == run.piece) else { continue };
            let open = &mut self.open[at];
            open.left -= run.len;
            open.failed = open.failed.or_else(|| report.failure(run.piece));
            if open.left == 0 {
                match open.failed {
                    None => tracker.done(run.piece, 1, pieces[run.piece].len),
                    Some(code) => tracker.fail(run.piece, code),
                }
                self.open.swap_remove(at);
            }
        }
        if let Some((_, code)) = report.stop {
            self.stopped.get_or_insert(code);
        }
        if let Some(detail) = report.detail {
            self.detail.get_or_insert(detail);
        }
        self.running -= 1;
        self.end(pieces.len())
    }

    /// True once, when nothing runs and nothing will.
    fn end(&mut self, pieces: usize) -> bool {
        let over = self.running == 0 && (self.stopped.is_some() || self.piece == pieces);
        let first = over && !self.ended;
        self.ended |= over;
        first
    }
}

#[cfg(test)]
mod model;
