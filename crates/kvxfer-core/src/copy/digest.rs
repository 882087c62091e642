//! Digests of segments, left while the bytes pass by.
//!
//! A segment is a fixed part of the written chunk, in remote order; the runs that fill it may lie anywhere locally.
//! The same over memory at rest serves the side where a chunk arrives. When all of them (but the last) are whole stripes, copying and hashing are one pass; otherwise the bytes take a
//! detour through a small private buffer.

use super::xxh3::{SHORTEST, STRIPE, Store, Xxh3};
use super::{STREAM_FROM, Sides, stream};
use crate::transport::mover::{Run, Slice};
use crate::transport::{Job, SegmentDigests};
use crate::{Memory, Result};
use kvxfer_proto::integrity::SEGMENT;
use std::sync::atomic::Ordering;

const BOUNCE: usize = 16 << 10;

/// Where a part of a segment comes from and, unless it is only hashed, goes to.
#[derive(Clone, Copy)]
struct Part {
    from: *const u8,
    to: Option<*mut u8>,
    len: usize,
}

/// Copies a slice and leaves the digests of its segments. Slices of such jobs begin and end where segments do.
///
/// # Safety
/// The slice's ranges lie inside what is mapped at both sides.
pub(super) unsafe fn copy(job: &Job, slice: &Slice, digests: &SegmentDigests, sides: Sides) {
    let parts = slice.runs(&job.pieces).map(|run| {
        let (from, to) = sides.of(&run);
        Part { from, to: Some(to), len: run.len as usize }
    });
    let streaming = digests.len >= STREAM_FROM;
    // SAFETY: the caller's promise.
    unsafe { segments(parts, streaming, put(slice, digests)) };
    stream::fence();
}

/// Leaves the digests of a slice's segments from the local side alone, without copying.
///
/// # Safety
/// The job's local ranges have been checked against its memory.
pub(crate) unsafe fn local(job: &Job, slice: &Slice, digests: &SegmentDigests) {
    let base = job.local.as_ptr();
    let part =
        |run: Run| Part { from: base.wrapping_add(run.local as usize), to: None, len: run.len as usize };
    // SAFETY: the caller's promise.
    unsafe { segments(slice.runs(&job.pieces).map(part), false, put(slice, digests)) };
}

/// Hashes of the segments of a chunk that consists of `(offset, length)` runs of `memory`.
pub(crate) fn segment_hashes(memory: &Memory, runs: &[(u64, u64)]) -> Result<Vec<u64>> {
    let mut parts = Vec::with_capacity(runs.len());
    for (offset, len) in runs {
        parts.push(Part { from: memory.range(*offset, *len)?, to: None, len: *len as usize });
    }
    let mut hashes = Vec::new();
    // SAFETY: `range` checked each part against the memory, which the caller holds; nothing is written.
    unsafe { segments(parts.into_iter(), false, |hash| hashes.push(hash)) };
    Ok(hashes)
}

/// Takes the hashes of a slice's segments in their order.
fn put<'a>(slice: &Slice, digests: &'a SegmentDigests) -> impl FnMut(u64) + use<'a> {
    debug_assert!(slice.position.is_multiple_of(SEGMENT));
    let mut places = digests.hashes[(slice.position / SEGMENT) as usize..].iter();
    move |hash| {
        if let Some(place) = places.next() {
            place.store(hash, Ordering::Release);
        }
    }
}

/// # Safety
/// Every part is readable and, where it has a destination, writable.
unsafe fn segments(parts: impl Iterator<Item = Part>, streaming: bool, mut put: impl FnMut(u64)) {
    let mut segment: Vec<Part> = Vec::new();
    let mut filled = 0;
    let mut close = |segment: &mut Vec<Part>| {
        // SAFETY: the caller's promise.
        put(unsafe { one_segment(segment, streaming) });
        segment.clear();
    };
    for mut part in parts {
        while part.len > 0 {
            let now = part.len.min(SEGMENT as usize - filled);
            segment.push(Part { len: now, ..part });
            part.from = part.from.wrapping_add(now);
            part.to = part.to.map(|to| to.wrapping_add(now));
            part.len -= now;
            filled += now;
            if filled == SEGMENT as usize {
                close(&mut segment);
                filled = 0;
            }
        }
    }
    if filled > 0 {
        close(&mut segment);
    }
}

/// Copies one segment's parts and returns its hash.
///
/// # Safety
/// As for [`segments`].
unsafe fn one_segment(parts: &[Part], streaming: bool) -> u64 {
    let len: u64 = parts.iter().map(|p| p.len as u64).sum();
    let whole_stripes = parts.split_last().is_some_and(|(_, rest)| rest.iter().all(|p| p.len % STRIPE == 0));
    match Xxh3::new() {
        // SAFETY: the caller's promise.
        Some(state) if whole_stripes && len >= SHORTEST => unsafe { fused(state, parts, len, streaming) },
        // SAFETY: the caller's promise.
        _ => unsafe { bounced(parts) },
    }
}

/// # Safety
/// As for [`segments`].
unsafe fn fused(mut state: Xxh3, parts: &[Part], len: u64, streaming: bool) -> u64 {
    let mut left = (len - 1) / STRIPE as u64;
    let mut last = [0_u8; STRIPE];
    for part in parts {
        let stripes = left.min((part.len / STRIPE) as u64);
        let bytes = stripes as usize * STRIPE;
        let (to, store) = match part.to {
            None => (std::ptr::null_mut(), Store::None),
            Some(to) if streaming && to.align_offset(STRIPE) == 0 => (to, Store::Streaming),
            Some(to) => (to, Store::Cached),
        };
        // SAFETY: the caller's promise; the streaming store's alignment was just checked.
        unsafe { state.consume(to, part.from, stripes, store) };
        left -= stripes;
        // The hash ends with the input's last 64 bytes, wherever the parts divide them. The private copy is what is
        // stored, so that the hash is of the very bytes that travel.
        let tail = part.len.min(STRIPE);
        last.copy_within(tail.., 0);
        let rest = part.len - bytes;
        // SAFETY: `tail` and `rest` bytes end where the part ends; a part has at most one stripe left over (the one
        // that holds the input's last byte), so `rest <= tail`.
        unsafe {
            let end = part.from.add(part.len);
            std::ptr::copy(end.sub(tail), last.as_mut_ptr().add(STRIPE - tail), tail);
            if let Some(to) = part.to {
                std::ptr::copy(last.as_ptr().add(STRIPE - rest), to.add(bytes), rest);
            }
        }
    }
    state.finish(len, &last)
}

/// # Safety
/// As for [`segments`].
unsafe fn bounced(parts: &[Part]) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    let mut bounce = [0_u8; BOUNCE];
    for part in parts {
        let mut at = 0;
        while at < part.len {
            let now = BOUNCE.min(part.len - at);
            // SAFETY: the caller's promise; the buffer is private.
            unsafe {
                std::ptr::copy(part.from.add(at), bounce.as_mut_ptr(), now);
                if let Some(to) = part.to {
                    std::ptr::copy(bounce.as_ptr(), to.add(at), now);
                }
            }
            hasher.update(&bounce[..now]);
            at += now;
        }
    }
    hasher.digest()
}
