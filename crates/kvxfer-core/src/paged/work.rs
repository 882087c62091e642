//! Who copies what: a layer's keys and a layer's values are a piece of work each, and threads take them as they get free.

use super::run::Side;
use super::runs::{Run, runs};
use super::transpose::Ahead;
use super::{PagedCache, PagedChunk, PagedVariant};
use crate::copy::stream;
use crate::threads;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Moves of at least this many bytes are written past the cache: the whole of what was written would not stay in it.
const STREAM_FROM: usize = 2 << 20;
/// Rows are put together in a buffer of this size before they are streamed: a part of a second-level cache.
const STAGE: usize = 128 << 10;
/// One head's rows are put in order in a part of the stage of this size, of a first-level cache.
const HEAD_STAGE: usize = 16 << 10;
const LINE: usize = 64;
/// How far ahead rows that follow one another are fetched.
const FURTHER: usize = 2 << 10;
/// A further thread for each so many bytes; below, starting it costs more than it brings.
const THREAD_BYTES: usize = 1 << 20;
/// Threads at most where the caller leaves it to us.
const DEFAULT_THREADS: usize = 8;

/// Tokens that no tile is larger than.
const TILE: usize = 32;

struct Work<'a> {
    cache: &'a PagedCache,
    chunks: Vec<(&'a PagedChunk<'a>, Vec<Run>)>,
    streaming: bool,
    next: AtomicUsize,
}

// SAFETY: chunks name memory that the caller of `carry` has promised for all threads of the call, and each piece of work has
// bytes of its own to write.
unsafe impl Sync for Work<'_> {}

/// Copies all chunks out of the cache (`GATHER`) or into it.
///
/// # Safety
/// As for [`PagedCache::gather`] and [`PagedCache::scatter`]; arguments were checked.
pub(super) unsafe fn carry<const GATHER: bool>(
    cache: &PagedCache,
    chunks: &[PagedChunk<'_>],
    threads: usize,
) {
    let row = 2 * cache.layers.len() * cache.layout.row_bytes();
    let bytes = chunks.iter().map(|c| (c.slots.len() - c.skip) * row).sum::<usize>();
    if bytes == 0 {
        return;
    }
    let runs = |chunk: &PagedChunk<'_>| runs(chunk.slots, chunk.skip, cache.layout.block_size);
    let work = Work {
        cache,
        chunks: chunks.iter().map(|chunk| (chunk, runs(chunk))).collect(),
        streaming: bytes >= STREAM_FROM,
        next: AtomicUsize::new(0),
    };
    let wanted = if threads == 0 { default_threads() } else { threads };
    let helpers = wanted.min(2 * cache.layers.len()).min(1 + bytes / THREAD_BYTES) - 1;
    threads::helped("kvxfer-paged", helpers, || {
        // SAFETY: passed on.
        unsafe { work.run::<GATHER>() };
    });
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_THREADS)
}

impl Work<'_> {
    /// Takes pieces until there are no more.
    unsafe fn run<const GATHER: bool>(&self) {
        let layers = self.cache.layers.len();
        let mut stage =
            if self.streaming { Stage::new(self.stage_bytes::<GATHER>()) } else { Stage::default() };
        loop {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            if piece >= 2 * layers {
                break;
            }
            let (layer, values) = (piece / 2, piece % 2 == 1);
            for (chunk, runs) in &self.chunks {
                let row = self.cache.layout.row_bytes();
                let at = (usize::from(values) * layers + layer) * chunk.slots.len() * row;
                let part = Part {
                    cache: self.cache,
                    values,
                    base: self.cache.layers[layer]
                        .wrapping_add(usize::from(values) * self.cache.layout.half_bytes()),
                    rows: chunk.data.wrapping_add(at),
                    row,
                };
                // SAFETY: the caller's promise; the part's rows lie within the chunk, whose length was checked.
                unsafe {
                    match (self.streaming, GATHER) {
                        (false, _) => part.direct::<GATHER>(runs),
                        (true, true) if of_lines(part.rows, self.cache.layout.head_bytes()) => {
                            part.gather_lines(runs, &mut stage);
                        }
                        (true, true) => part.gather_streaming(runs, &mut stage),
                        (true, false) => part.scatter_streaming(runs, &mut stage),
                    }
                }
            }
        }
        if self.streaming {
            stream::fence();
        }
    }

    fn stage_bytes<const GATHER: bool>(&self) -> usize {
        let layout = &self.cache.layout;
        if GATHER {
            STAGE.max(layout.row_bytes()).max(TILE * layout.head_bytes())
        } else {
            layout.half_bytes()
        }
    }
}

/// One layer's keys or values, and one chunk's rows of them.
struct Part<'a> {
    cache: &'a PagedCache,
    values: bool,
    /// First byte of the keys or values of block 0, head 0.
    base: *mut u8,
    /// First token's row.
    rows: *mut u8,
    /// Bytes of a row.
    row: usize,
}

impl Part<'_> {
    fn half(&self, block: usize, head: usize) -> *mut u8 {
        let layout = &self.cache.layout;
        self.base.wrapping_add(block * layout.block_bytes() + head * 2 * layout.half_bytes())
    }

    /// Moves a run between the cache and rows that begin at `rows`.
    unsafe fn carry<const GATHER: bool>(&self, run: &Run, rows: *mut u8) {
        let layout = &self.cache.layout;
        for head in 0..layout.heads {
            let side = Side {
                half: self.half(run.block, head),
                place: run.place,
                count: run.count,
                rows: rows.wrapping_add(head * layout.head_bytes()),
                stride: self.row,
                ahead: Ahead::Nothing,
            };
            // SAFETY: passed on.
            unsafe { side.carry::<GATHER>(layout, self.values) };
        }
    }

    unsafe fn direct<const GATHER: bool>(&self, runs: &[Run]) {
        for run in runs {
            // SAFETY: passed on.
            unsafe { self.carry::<GATHER>(run, self.rows.wrapping_add(run.token * self.row)) };
        }
    }

    /// A head's rows are whole lines: they are put in order in a stage that stays in the first-level cache, or are so already, and
    /// streamed from there.
    unsafe fn gather_lines(&self, runs: &[Run], stage: &mut Stage) {
        let layout = &self.cache.layout;
        let bytes = layout.head_bytes();
        let room = (HEAD_STAGE / bytes / TILE * TILE).max(TILE);
        for (i, run) in runs.iter().enumerate() {
            for head in 0..layout.heads {
                let half = self.half(run.block, head);
                let to = self.rows.wrapping_add(run.token * self.row + head * bytes);
                if self.values && layout.variant == PagedVariant::Vec {
                    let from = half.wrapping_add(run.place * bytes);
                    // SAFETY: rows of whole lines on both sides; the caller has checked the destination's alignment.
                    unsafe { stream::copy_rows((to, self.row), (from, bytes), bytes, run.count, FURTHER) };
                    continue;
                }
                let next = match runs.get(i + 1) {
                    _ if head + 1 < layout.heads => Some(self.half(run.block, head + 1)),
                    next => next.map(|next| self.half(next.block, 0)),
                };
                let mut done = 0;
                while done < run.count {
                    let count = (run.count - done).min(room);
                    let ahead =
                        next.map_or(Ahead::Nothing, |next| Ahead::At(next.wrapping_add(done * bytes)));
                    let (place, rows) = (run.place + done, stage.at(0));
                    let side = Side { half, place, count, rows, stride: bytes, ahead };
                    let to = to.wrapping_add(done * self.row);
                    // SAFETY: the stage has room for `count` rows of the head; otherwise as above.
                    unsafe {
                        side.carry::<true>(layout, self.values);
                        stream::copy_rows((to, self.row), (rows, bytes), bytes, count, 0);
                    }
                    done += count;
                }
            }
        }
    }

    /// Puts rows together in the stage, as many as fit, and streams them to the chunk, where they follow one another.
    unsafe fn gather_streaming(&self, runs: &[Run], stage: &mut Stage) {
        let room = match stage.len() / self.row {
            // Tiles stay whole.
            room @ TILE.. => room / TILE * TILE,
            room => room,
        };
        let mut staged = 0;
        for run in runs {
            let mut done = 0;
            while done < run.count {
                let count = (run.count - done).min(room - staged);
                let part = Run { token: run.token + done, place: run.place + done, count, ..*run };
                // SAFETY: `staged + count` rows fit the stage; the chunk has them up to the part's last one.
                unsafe {
                    self.carry::<true>(&part, stage.at(staged * self.row));
                    staged += count;
                    done += count;
                    if staged == room {
                        let first = part.token + count - staged;
                        stage.flush(self.rows.wrapping_add(first * self.row), staged * self.row);
                        staged = 0;
                    }
                }
            }
        }
        if let Some(last) = runs.last() {
            let first = last.token + last.count - staged;
            // SAFETY: as above.
            unsafe { stage.flush(self.rows.wrapping_add(first * self.row), staged * self.row) };
        }
    }

    /// Whole blocks are put in order in the stage, head by head, and streamed; parts of blocks are written where they are.
    unsafe fn scatter_streaming(&self, runs: &[Run], stage: &mut Stage) {
        let layout = &self.cache.layout;
        for run in runs {
            let rows = self.rows.wrapping_add(run.token * self.row);
            if run.count < layout.block_size {
                // SAFETY: passed on.
                unsafe { self.carry::<false>(run, rows) };
                continue;
            }
            for head in 0..layout.heads {
                let (half, bytes) = (self.half(run.block, head), layout.head_bytes());
                let from = rows.wrapping_add(head * bytes);
                if self.values && layout.variant == PagedVariant::Vec && of_lines(half, bytes) {
                    // SAFETY: rows of whole lines on both sides; the half was found to be aligned.
                    unsafe { stream::copy_rows((half, bytes), (from, self.row), bytes, run.count, bytes) };
                    continue;
                }
                let side = Side {
                    half: stage.at(0),
                    place: 0,
                    count: run.count,
                    rows: from,
                    stride: self.row,
                    // The next head's part of the same rows.
                    ahead: Ahead::Beside(bytes),
                };
                // SAFETY: the stage has room for a half; the rest is passed on.
                unsafe {
                    side.carry::<false>(layout, self.values);
                    stage.flush(half, layout.half_bytes());
                }
            }
        }
    }
}

/// Whether rows of so many bytes that begin there are whole cache lines.
fn of_lines(rows: *mut u8, bytes: usize) -> bool {
    rows.addr().is_multiple_of(LINE) && bytes.is_multiple_of(LINE)
}

/// A buffer between two orders, aligned like a cache line.
#[derive(Default)]
struct Stage {
    lines: Vec<Line>,
    len: usize,
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "reached through pointers only")] [u8; 64]);

impl Stage {
    fn new(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn at(&mut self, offset: usize) -> *mut u8 {
        self.lines.as_mut_ptr().cast::<u8>().wrapping_add(offset)
    }

    /// Streams the first `len` bytes.
    ///
    /// # Safety
    /// `to` is writable for `len` bytes, and the stage has as many.
    unsafe fn flush(&mut self, to: *mut u8, len: usize) {
        let from = self.at(0);
        // SAFETY: the promise.
        unsafe { stream::copy(to, from, len, from) };
    }
}
