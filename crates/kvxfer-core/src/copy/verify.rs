//! Comparing what arrived with what was sent.
//!
//! Sampled lines (integrity `Bound`) prove that the destination really is the memory meant and that every part of the
//! slice was written: they catch a stale or foreign mapping, a misplaced run, an overlap and a source that changes
//! under the copy with good probability, at almost no cost. They do not prove every byte. Comparing all of it
//! (`Full`) does, as this processor sees both sides at that moment.

use super::Sides;
use crate::transport::Job;
use crate::transport::mover::{Report, Run, Slice};
use kvxfer_proto::ErrorCode;
use std::cmp::Ordering;

/// A line of a slice chosen for comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) piece: usize,
    pub(crate) local: u64,
    pub(crate) remote: u64,
    pub(crate) len: usize,
}

/// Bytes of a slice that one sample stands for.
const STRIDE: u64 = 128 << 10;
const LINE: u64 = 64;

/// The first and the last line of the slice, and one at an unpredictable place in each stride.
pub(crate) fn samples(job: &Job, slice: &Slice) -> Vec<Sample> {
    let count = slice.bytes / STRIDE;
    let mut samples = Vec::with_capacity(count as usize + 2);
    let mut wanted =
        Wanted { next: 0, index: 0, count, seed: job.transfer.0 ^ slice.position, end: slice.bytes };
    let mut at = 0;
    for run in slice.runs(&job.pieces) {
        while wanted.next < at + run.len {
            // The line that holds the wanted byte, moved or cut to lie inside the run.
            let offset = ((wanted.next - at) / LINE * LINE).min(run.len.saturating_sub(LINE));
            samples.push(Sample {
                piece: run.piece,
                local: run.local + offset,
                remote: run.remote + offset,
                len: LINE.min(run.len - offset) as usize,
            });
            wanted.advance();
        }
        at += run.len;
    }
    samples
}

/// Ascending positions in a slice.
struct Wanted {
    next: u64,
    index: u64,
    count: u64,
    seed: u64,
    end: u64,
}

impl Wanted {
    fn advance(&mut self) {
        self.next = match self.index.cmp(&self.count) {
            Ordering::Less => {
                let place = (self.seed ^ self.index).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47;
                self.index * STRIDE + place
            }
            Ordering::Equal => self.end - 1,
            Ordering::Greater => u64::MAX,
        };
        self.index += 1;
    }
}

/// Compares the samples' lines on both sides and reports pieces that differ.
///
/// # Safety
/// The samples lie inside what is mapped at both sides.
pub(super) unsafe fn compare(samples: &[Sample], sides: Sides, report: &mut Report) {
    let addresses =
        |s: &Sample| sides.of(&Run { piece: s.piece, local: s.local, remote: s.remote, len: s.len as u64 });
    // All lines are asked for before the first is looked at: their way from memory overlaps.
    for sample in samples {
        let (from, to) = addresses(sample);
        prefetch(from);
        prefetch(to);
    }
    for sample in samples {
        let (from, to) = addresses(sample);
        // SAFETY: the caller's promise.
        if !unsafe { equal(from, to, sample.len) } {
            let run = Run {
                piece: sample.piece,
                local: sample.local,
                remote: sample.remote,
                len: sample.len as u64,
            };
            report.fail(sample.piece, ErrorCode::Corrupt, || differs(sample.piece, &run));
        }
    }
}

/// True when `len` bytes at both addresses are the same.
///
/// # Safety
/// Both are readable for `len` bytes.
pub(crate) unsafe fn equal(a: *const u8, b: *const u8, len: usize) -> bool {
    // SAFETY: the caller's promise.
    unsafe { libc::memcmp(a.cast(), b.cast(), len) == 0 }
}

/// The reason for a piece that differs.
pub(crate) fn differs(piece: usize, run: &Run) -> String {
    format!(
        "piece {piece} arrived damaged within {} bytes at remote offset {}: the destination differs from the source \
         (was the source changed during the transfer, or do destinations overlap?)",
        run.len, run.remote
    )
}

fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; wrong addresses are ignored.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
