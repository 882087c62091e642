//! Copying between mapped memory: what a transfer's slice does when both sides are addresses of this process.
//!
//! Three ways through a slice. The plain one copies run by run, with streaming stores when the transfer is large
//! ([`stream`]), and compares sampled cache lines afterwards when the integrity is `Bound` ([`verify`]). The full one
//! copies block by block and compares each block with its source while both are in the cache. The fused one leaves a
//! digest of every segment while it copies ([`digest`]); the receiver checks those on arrival.
//!
//! Both sides may be changed by other processes at any time (a peer that breaks its promise). Copies go through raw
//! pointers and private buffers, never through references, so that such a peer can spoil bytes but nothing else.

mod digest;
pub(crate) mod stream;
mod verify;
mod xxh3;

pub(crate) use digest::{local as digest_local, segment_hashes};
pub(crate) use verify::{differs, equal, samples};

use crate::transport::mover::{Report, Run, Slice};
use crate::transport::{Job, Op};
use kvxfer_proto::{ErrorCode, Integrity};

/// Transfers of at least this many bytes are written past the cache: the destination would not stay in it anyway, and
/// reading each destination line before overwriting it costs a third of the bandwidth. Smaller ones are likely to be
/// read from the cache soon.
const STREAM_FROM: u64 = 512 << 10;
/// Shorter runs gain nothing from streaming stores.
const STREAM_RUN: usize = 1 << 10;
/// Copied and compared at a time when every byte is checked; source and destination block fit a first-level cache.
const CHECKED_BLOCK: u64 = 16 << 10;

/// Moves one slice of `job` between its local memory and the mapped remote side.
///
/// # Safety
/// The job's remote ranges lie inside memory that is mapped at `remote` for the duration of the call.
pub(crate) unsafe fn carry(job: &Job, slice: &Slice, remote: *mut u8) -> Report {
    let mut report = Report::default();
    let sides = Sides { op: job.op, local: job.local.as_ptr(), remote };
    // SAFETY, for all three: local ranges were checked against the memory at submit, remote ones are the promise.
    if let Some(digests) = &job.digest {
        // SAFETY: see above.
        unsafe { digest::copy(job, slice, digests, sides) };
        return report;
    }
    if job.integrity == Integrity::Full {
        // SAFETY: see above.
        unsafe { copy_checked(job, slice, sides, &mut report) };
        return report;
    }
    // SAFETY: see above.
    unsafe { copy_runs(job, slice, sides) };
    if job.integrity == Integrity::Bound {
        let samples = samples(job, slice);
        // SAFETY: samples lie inside the slice's ranges.
        unsafe { verify::compare(&samples, sides, &mut report) };
    }
    report
}

/// The two address ranges of a job, and which is the source.
#[derive(Clone, Copy)]
struct Sides {
    op: Op,
    local: *mut u8,
    remote: *mut u8,
}

impl Sides {
    /// Source and destination of a run.
    fn of(&self, run: &Run) -> (*const u8, *mut u8) {
        let local = self.local.wrapping_add(run.local as usize);
        let remote = self.remote.wrapping_add(run.remote as usize);
        match self.op {
            Op::Write => (local, remote),
            Op::Read => (remote, local),
        }
    }
}

/// # Safety
/// The slice's ranges lie inside what is mapped at both sides.
unsafe fn copy_runs(job: &Job, slice: &Slice, sides: Sides) {
    // The first slice of a larger transfer reaches the threshold by itself.
    let streaming = slice.position + slice.bytes >= STREAM_FROM;
    let mut runs = merged(slice.runs(&job.pieces)).peekable();
    while let Some(run) = runs.next() {
        let (from, to) = sides.of(&run);
        let len = run.len as usize;
        if streaming && len >= STREAM_RUN {
            let next = runs.peek().map_or(from, |next| sides.of(next).0);
            // SAFETY: the caller's promise; `next` is only a hint.
            unsafe { stream::copy(to, from, len, next) };
        } else {
            // SAFETY: the caller's promise. A region transferred onto itself is why the two may overlap.
            unsafe { std::ptr::copy(from, to, len) };
        }
    }
    if streaming {
        stream::fence();
    }
}

/// # Safety
/// As for [`copy_runs`].
unsafe fn copy_checked(job: &Job, slice: &Slice, sides: Sides, report: &mut Report) {
    let mut blocks = slice.runs(&job.pieces).flat_map(blocks).peekable();
    let mut copied = Vec::new();
    let mut bytes = 0;
    while let Some(block) = blocks.next() {
        let (from, to) = sides.of(&block);
        let next = blocks.peek().map_or(from, |next| sides.of(next).0);
        // SAFETY: the caller's promise; `next` is only a hint.
        unsafe { stream::copy_cached(to, from, block.len as usize, next) };
        bytes += block.len;
        copied.push(block);
        if bytes < CHECKED_BLOCK && blocks.peek().is_some() {
            continue;
        }
        for block in copied.drain(..) {
            let (from, to) = sides.of(&block);
            // SAFETY: the caller's promise.
            if !unsafe { verify::equal(from, to, block.len as usize) } {
                report.fail(block.piece, ErrorCode::Corrupt, || verify::differs(block.piece, &block));
            }
        }
        bytes = 0;
    }
}

/// A run in parts of at most [`CHECKED_BLOCK`].
fn blocks(run: Run) -> impl Iterator<Item = Run> {
    (0..run.len).step_by(CHECKED_BLOCK as usize).map(move |at| Run {
        local: run.local + at,
        remote: run.remote + at,
        len: CHECKED_BLOCK.min(run.len - at),
        ..run
    })
}

/// Joins runs that follow one another on both sides.
fn merged(runs: impl Iterator<Item = Run>) -> impl Iterator<Item = Run> {
    let mut runs = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while let Some(next) =
            runs.next_if(|n| n.local == run.local + run.len && n.remote == run.remote + run.len)
        {
            run.len += next.len;
        }
        Some(run)
    })
}

#[cfg(test)]
mod tests;
