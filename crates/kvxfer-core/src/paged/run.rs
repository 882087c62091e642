//! One run of one (block, head): between the order of the attention kernels and rows of tokens.

use super::layout::{GROUP, PagedLayout, PagedVariant};
use super::transpose::{Ahead, interleave, transpose};

/// Tokens `place..place + count` of the keys or values of a (block, head), and where their rows are.
#[derive(Clone, Copy)]
pub(super) struct Side {
    /// First byte of the keys, or of the values, of the (block, head).
    pub(super) half: *mut u8,
    /// Place of the first token in the block.
    pub(super) place: usize,
    /// Tokens.
    pub(super) count: usize,
    /// The head's bytes of the first token, in a row.
    pub(super) rows: *mut u8,
    /// From a token's row to the next one's, bytes.
    pub(super) stride: usize,
    /// What is read next: fetched meanwhile.
    pub(super) ahead: Ahead,
}

impl Side {
    /// Copies rows out of the cache (`GATHER`) or into it.
    ///
    /// # Safety
    /// The half is valid for [`PagedLayout::half_bytes`], every row for [`PagedLayout::head_bytes`]; the place and count lie within
    /// a block. The side that is written is nobody else's.
    pub(super) unsafe fn carry<const GATHER: bool>(&self, layout: &PagedLayout, values: bool) {
        // SAFETY, for all four: the promise; the layout was checked, which is what the offsets below rest on.
        match (layout.variant, values) {
            // SAFETY: see above.
            (PagedVariant::Vec, false) => unsafe { self.vec_keys::<GATHER>(layout) },
            // SAFETY: see above.
            (PagedVariant::Vec, true) => unsafe { self.vec_values::<GATHER>(layout) },
            // SAFETY: see above.
            (PagedVariant::Amx, false) => unsafe { self.amx_keys::<GATHER>(layout) },
            // SAFETY: see above.
            (PagedVariant::Amx, true) => unsafe { self.amx_values::<GATHER>(layout) },
        }
    }

    /// `[head size][block size]` elements.
    unsafe fn vec_keys<const GATHER: bool>(&self, layout: &PagedLayout) {
        let bytes = layout.element_bytes;
        let line = layout.block_size * bytes;
        let columns = self.half.wrapping_add(self.place * bytes);
        // SAFETY: `head_size` lines of `count` elements from the first token's lie within the half.
        unsafe {
            if bytes == 2 {
                self.transposed::<2, GATHER>(
                    (columns, line),
                    layout.head_size,
                    self.rows,
                    self.count,
                    self.ahead,
                );
            } else {
                self.transposed::<4, GATHER>(
                    (columns, line),
                    layout.head_size,
                    self.rows,
                    self.count,
                    self.ahead,
                );
            }
        }
    }

    /// `[block size][head size]` elements: a row a token.
    unsafe fn vec_values<const GATHER: bool>(&self, layout: &PagedLayout) {
        let bytes = layout.head_bytes();
        let first = self.half.wrapping_add(self.place * bytes);
        for token in 0..self.count {
            let (paged, row) =
                (first.wrapping_add(token * bytes), self.rows.wrapping_add(token * self.stride));
            let (from, to) = if GATHER { (paged, row) } else { (row, paged) };
            // SAFETY: a row on each side; the two sides are apart.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
    }

    /// `[block size / 16][head size / 2][16 tokens][2]`: within sixteen tokens, pairs of elements are transposed.
    unsafe fn amx_keys<const GATHER: bool>(&self, layout: &PagedLayout) {
        let pair = 2 * layout.element_bytes;
        let (line, pairs) = (GROUP * pair, layout.head_size / 2);
        let mut done = 0;
        while done < self.count {
            let place = self.place + done;
            let count = (GROUP - place % GROUP).min(self.count - done);
            let columns = self.half.wrapping_add(place / GROUP * pairs * line + place % GROUP * pair);
            let rows = self.rows.wrapping_add(done * self.stride);
            let ahead = match self.ahead {
                Ahead::At(next) => Ahead::At(next.wrapping_add(done * layout.head_bytes())),
                other => other,
            };
            // SAFETY: `pairs` lines of `count` pairs lie within the group, which lies within the half.
            unsafe { self.transposed::<4, GATHER>((columns, line), pairs, rows, count, ahead) };
            done += count;
        }
    }

    /// `[head size / 16][block size / 2][16 elements][2 tokens]`: two tokens' elements take turns.
    unsafe fn amx_values<const GATHER: bool>(&self, layout: &PagedLayout) {
        let group = GROUP * layout.element_bytes;
        let pair = 2 * group;
        for g in 0..layout.head_size / GROUP {
            let pairs = self.half.wrapping_add(g * layout.block_size / 2 * pair);
            let rows = self.rows.wrapping_add(g * group);
            let mut done = 0;
            while done < self.count {
                let place = self.place + done;
                let line = pairs.wrapping_add(place / 2 * pair);
                let row = rows.wrapping_add(done * self.stride);
                let count = (self.count - done) / 2;
                if place.is_multiple_of(2) && count > 0 {
                    // SAFETY: whole lines, and sixteen elements of two rows for each.
                    unsafe { interleave::<GATHER>(line, row, self.stride, count) };
                    done += 2 * count;
                    continue;
                }
                // One token of a pair.
                for i in 0..GROUP {
                    let paged = line.wrapping_add((2 * i + place % 2) * 2);
                    let (from, to) = turned::<GATHER>(paged, row.wrapping_add(2 * i));
                    // SAFETY: one element of the line and of the row.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, 2) };
                }
                done += 1;
            }
        }
    }

    /// `lines` lines, a stride of `line` bytes apart, of `count` words each; and `count` rows of `lines` words.
    unsafe fn transposed<const WORD: usize, const GATHER: bool>(
        &self,
        (columns, line): (*mut u8, usize),
        lines: usize,
        rows: *mut u8,
        count: usize,
        ahead: Ahead,
    ) {
        // SAFETY: passed on.
        unsafe {
            if GATHER {
                transpose::<WORD>((columns, line), (rows, self.stride), lines, count, ahead);
            } else {
                transpose::<WORD>((rows, self.stride), (columns, line), count, lines, ahead);
            }
        }
    }
}

/// Source and destination.
fn turned<const GATHER: bool>(paged: *mut u8, row: *mut u8) -> (*const u8, *mut u8) {
    if GATHER { (paged, row) } else { (row, paged) }
}
