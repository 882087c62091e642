//! The plan of a transfer: a request's chunks, taken apart into pieces.
//!
//! Decided first, carried out later: [`plan`] reads no memory and submits nothing. It returns a value that tests can look at
//! and transports can follow. Each [`PlanPiece`] carries its own source, destination and lane, so no second list has to
//! stay in step with it. Only a chunk's valid bytes are in the plan, never the rest of its page (Contract line 9).

use crate::layout::{Layout, LayoutError};
use crate::{PageIndex, ids};

/// A chunk's bytes and where they go.
#[derive(Clone, Copy, Debug)]
pub struct PlanChunk<'a> {
    /// Index of the chunk in its request.
    pub chunk: u32,
    /// Page at the receiver.
    pub page: PageIndex,
    /// Valid bytes.
    pub len: u64,
    /// Bytes of the source region; every run must lie inside.
    pub source_len: u64,
    /// `(offset, length)` runs of the source region in the order of the chunk's bytes.
    pub runs: &'a [(u64, u64)],
}

/// How a plan is spread over parallel paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Striping {
    /// Parallel paths; 1 leaves pieces whole.
    pub lanes: u16,
    /// A piece longer than this is cut when there are several lanes.
    pub frame_bytes: u64,
}

impl Striping {
    /// One lane: for links that spread the bytes themselves.
    pub const NONE: Self = Self { lanes: 1, frame_bytes: u64::MAX };
}

/// One contiguous move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanPiece {
    /// Index of the chunk in its request.
    pub chunk: u32,
    /// Offset in the source region.
    pub source: u64,
    /// Offset in the pool's region.
    pub destination: u64,
    /// Bytes.
    pub len: u64,
    /// Which parallel path takes it.
    pub lane: u16,
}

/// Why no plan can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The page does not exist or does not hold the chunk.
    #[error("chunk {chunk}: {source}")]
    Layout {
        /// The chunk.
        chunk: u32,
        /// What is wrong.
        source: LayoutError,
    },
    /// A run is empty or leaves the source region.
    #[error(
        "chunk {chunk}: run at offset {offset} of {len} bytes does not lie within the source region's {limit} bytes"
    )]
    Run {
        /// The chunk.
        chunk: u32,
        /// The run's offset.
        offset: u64,
        /// The run's length.
        len: u64,
        /// Bytes of the region.
        limit: u64,
    },
    /// The runs do not add up to the chunk.
    #[error("chunk {chunk}: its runs hold {sum} bytes, the chunk {len}")]
    Sum {
        /// The chunk.
        chunk: u32,
        /// Bytes in all runs.
        sum: u64,
        /// Valid bytes of the chunk.
        len: u64,
    },
    /// No lanes, or frames without bytes.
    #[error("striping over {lanes} lanes in frames of {frame_bytes} bytes; both must be at least 1")]
    Striping {
        /// Lanes.
        lanes: u16,
        /// Bytes of a frame.
        frame_bytes: u64,
    },
}

/// Takes `chunks` apart into pieces, in the order of the chunks and their bytes.
///
/// Runs that follow one another in the source are merged. With several lanes, pieces are cut at multiples of the frame size
/// within the chunk, and frames go round the lanes in turn, so that lanes carry equal shares of a large chunk.
pub fn plan(
    layout: &Layout,
    chunks: &[PlanChunk<'_>],
    striping: Striping,
) -> Result<Vec<PlanPiece>, PlanError> {
    let Striping { lanes, frame_bytes } = striping;
    if lanes == 0 || frame_bytes == 0 {
        return Err(PlanError::Striping { lanes, frame_bytes });
    }
    let mut pieces = Vec::with_capacity(chunks.iter().map(|c| c.runs.len()).sum());
    for c in chunks {
        let refuse = |source| PlanError::Layout { chunk: c.chunk, source };
        layout.check_len(c.len).map_err(refuse)?;
        let base = layout.offset(c.page).map_err(refuse)?;
        let sum = c.check_runs()?;
        if sum != c.len {
            return Err(PlanError::Sum { chunk: c.chunk, sum, len: c.len });
        }
        let first = pieces.len();
        let mut within = 0;
        for &(offset, len) in c.runs {
            match pieces[first..].last_mut() {
                Some(PlanPiece { source, len: before, .. }) if *source + *before == offset => *before += len,
                _ => pieces.push(PlanPiece {
                    chunk: c.chunk,
                    source: offset,
                    destination: base + within,
                    len,
                    lane: 0,
                }),
            }
            within += len;
        }
        if lanes > 1 {
            let whole = pieces.split_off(first);
            for piece in whole {
                stripe(&mut pieces, piece, base, lanes, frame_bytes);
            }
        }
    }
    Ok(pieces)
}

impl PlanChunk<'_> {
    /// Bytes of all runs, each checked against the source region.
    fn check_runs(&self) -> Result<u64, PlanError> {
        self.runs.iter().try_fold(0u64, |sum, &(offset, len)| {
            if len == 0 || offset.checked_add(len).is_none_or(|end| end > self.source_len) {
                return Err(PlanError::Run { chunk: self.chunk, offset, len, limit: self.source_len });
            }
            sum.checked_add(len).ok_or(PlanError::Sum { chunk: self.chunk, sum: u64::MAX, len: self.len })
        })
    }
}

/// Cuts one piece at the chunk's frame boundaries and deals the frames out.
fn stripe(out: &mut Vec<PlanPiece>, piece: PlanPiece, base: u64, lanes: u16, frame_bytes: u64) {
    let mut done = 0;
    while done < piece.len {
        let within = piece.destination + done - base;
        let frame = within / frame_bytes;
        // Saturating: the end of the last frame may lie beyond what can be addressed.
        let frame_end = (frame + 1).saturating_mul(frame_bytes);
        let len = (frame_end - within).min(piece.len - done);
        out.push(PlanPiece {
            source: piece.source + done,
            destination: piece.destination + done,
            len,
            lane: (frame % u64::from(lanes)) as u16,
            ..piece
        });
        done += len;
    }
}

/// Checks a request's chunks against a pool before anything is reserved: at least one, each of a length a page can hold, no key
/// twice.
pub fn check_chunks(layout: &Layout, chunks: &[crate::wire::ChunkSpec]) -> Result<(), RequestError> {
    if chunks.is_empty() {
        return Err(RequestError::Empty);
    }
    if chunks.len() > crate::wire::MAX_CHUNKS {
        return Err(RequestError::TooMany { count: chunks.len() });
    }
    let mut keys = std::collections::HashSet::with_capacity(chunks.len());
    for (i, c) in chunks.iter().enumerate() {
        layout.check_len(c.len).map_err(|source| RequestError::Length { chunk: i as u32, source })?;
        if !keys.insert(&c.key) {
            return Err(RequestError::Twice { chunk: i as u32, key: c.key.clone() });
        }
    }
    Ok(())
}

/// A request that no pool would take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No chunks.
    #[error("the request has no chunks")]
    Empty,
    /// More chunks than a message may name.
    #[error("the request has {count} chunks; at most {} are allowed", crate::wire::MAX_CHUNKS)]
    TooMany {
        /// Their number.
        count: usize,
    },
    /// A chunk is empty or larger than a page.
    #[error("chunk {chunk}: {source}")]
    Length {
        /// The chunk.
        chunk: u32,
        /// What is wrong.
        source: LayoutError,
    },
    /// The same key twice.
    #[error("chunk {chunk} repeats key {key}")]
    Twice {
        /// The second one's index.
        chunk: u32,
        /// The key.
        key: ids::ChunkKey,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 1000;

    fn layout() -> Layout {
        Layout::new(PAGE, 8).expect("a valid pool")
    }

    fn chunk(page: u32, len: u64, runs: &[(u64, u64)]) -> PlanChunk<'_> {
        PlanChunk { chunk: page, page: PageIndex(page), len, source_len: 10_000, runs }
    }

    fn piece(chunk: u32, source: u64, destination: u64, len: u64, lane: u16) -> PlanPiece {
        PlanPiece { chunk, source, destination, len, lane }
    }

    #[test]
    fn a_partial_chunk_moves_its_valid_bytes_only() {
        let pieces = plan(&layout(), &[chunk(3, 128, &[(512, 128)])], Striping::NONE);
        assert_eq!(pieces, Ok(vec![piece(3, 512, 3000, 128, 0)]));
    }

    #[test]
    fn runs_that_follow_one_another_are_merged_within_a_chunk_only() {
        let runs = [(0, 100), (100, 50), (400, 10), (410, 40)];
        let next = [(450, 200)];
        let pieces = plan(&layout(), &[chunk(0, 200, &runs), chunk(1, 200, &next)], Striping::NONE);
        assert_eq!(
            pieces,
            Ok(vec![piece(0, 0, 0, 150, 0), piece(0, 400, 150, 50, 0), piece(1, 450, 1000, 200, 0)])
        );
    }

    #[test]
    fn frames_go_round_the_lanes() {
        let striping = Striping { lanes: 2, frame_bytes: 300 };
        let pieces = plan(&layout(), &[chunk(1, 1000, &[(0, 200), (500, 800)])], striping);
        assert_eq!(
            pieces,
            Ok(vec![
                piece(1, 0, 1000, 200, 0),
                piece(1, 500, 1200, 100, 0),
                piece(1, 600, 1300, 300, 1),
                piece(1, 900, 1600, 300, 0),
                piece(1, 1200, 1900, 100, 1),
            ])
        );
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_values() {
        let l = layout();
        let err = |c: PlanChunk<'_>| plan(&l, &[c], Striping::NONE).expect_err("refused");
        assert_eq!(
            err(chunk(1, 10, &[(9_995, 10)])),
            PlanError::Run { chunk: 1, offset: 9_995, len: 10, limit: 10_000 }
        );
        assert!(matches!(err(chunk(1, 10, &[(u64::MAX, 10)])), PlanError::Run { .. }));
        assert!(matches!(err(chunk(1, 10, &[(0, 0)])), PlanError::Run { len: 0, .. }));
        assert_eq!(err(chunk(1, 10, &[(0, 9)])), PlanError::Sum { chunk: 1, sum: 9, len: 10 });
        assert_eq!(err(chunk(1, 10, &[])), PlanError::Sum { chunk: 1, sum: 0, len: 10 });
        assert!(matches!(
            err(chunk(8, 10, &[(0, 10)])),
            PlanError::Layout { chunk: 8, source: LayoutError::NoSuchPage { page: 8, pages: 8 } }
        ));
        assert!(matches!(
            err(chunk(1, 1001, &[(0, 1001)])),
            PlanError::Layout { source: LayoutError::BadLength { len: 1001, .. }, .. }
        ));
        assert!(matches!(
            err(chunk(1, 0, &[])),
            PlanError::Layout { source: LayoutError::BadLength { len: 0, .. }, .. }
        ));
        let runs = [(0, u64::MAX / 2); 3];
        let huge = PlanChunk { source_len: u64::MAX, ..chunk(1, 10, &runs) };
        assert!(matches!(err(huge), PlanError::Sum { .. }));
        let none = Striping { lanes: 0, frame_bytes: 1 };
        assert!(matches!(plan(&l, &[], none), Err(PlanError::Striping { .. })));
    }

    #[test]
    fn a_pool_that_cannot_be_addressed_is_refused() {
        for (page_bytes, pages) in [(0, 1), (1, 0), (u64::MAX, 2), (1 << 62, 2)] {
            assert_eq!(Layout::new(page_bytes, pages), Err(LayoutError::BadPool { pages, page_bytes }));
        }
    }

    proptest! {
        /// Every byte of the chunk is moved exactly once, to its place, from its place.
        #[test]
        fn a_plan_covers_every_valid_byte_once(
            lens in proptest::collection::vec((1u64..40, 0u64..3), 1..30),
            page in 0u32..8, lanes in 1u16..5, frame_bytes in 1u64..200,
        ) {
            let mut at = 0;
            let runs: Vec<(u64, u64)> = lens.iter().map(|&(len, gap)| { let o = at + gap; at = o + len; (o, len) }).collect();
            let len = runs.iter().map(|r| r.1).sum::<u64>();
            prop_assume!(len <= PAGE);
            let c = PlanChunk { chunk: 5, page: PageIndex(page), len, source_len: at, runs: &runs };
            let pieces = plan(&layout(), &[c], Striping { lanes, frame_bytes }).expect("valid");
            let wanted: Vec<u64> = runs.iter().flat_map(|&(o, l)| o..o + l).collect();
            let base = u64::from(page) * PAGE;
            let mut next = base;
            let mut moved = Vec::new();
            for p in &pieces {
                prop_assert_eq!(p.destination, next);
                prop_assert!(p.lane < lanes && p.chunk == 5 && p.len > 0);
                if lanes > 1 {
                    let frame = (p.destination - base) / frame_bytes;
                    prop_assert_eq!(frame, (p.destination + p.len - 1 - base) / frame_bytes);
                    prop_assert_eq!(u64::from(p.lane), frame % u64::from(lanes));
                }
                moved.extend(p.source..p.source + p.len);
                next += p.len;
            }
            prop_assert_eq!(moved, wanted);
        }
    }
}
