//! How a job is cut into NIXL requests: pure arithmetic over its pieces.
//!
//! NIXL has no cancel, and over CMA it copies a whole request within the call that posts it. So a job becomes several
//! requests of bounded size, and the next one is posted only while nobody wants the job to stop. Pieces that follow
//! one another on both sides are merged, because a descriptor costs more than its bytes; a descriptor never crosses
//! the border of two registrations, because NIXL looks each one up in a single registration.

use crate::transport::Piece;

/// Most bytes of one request: about two milliseconds of copying, the grain of cancelling.
pub(super) const MAX_BYTES: u64 = 16 << 20;
/// Most descriptors of one request.
pub(super) const MAX_DESCRIPTORS: usize = 2048;

/// A place within a job's pieces: everything before it has been planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Index of the piece.
    pub piece: usize,
    /// Bytes of that piece that have been planned.
    pub offset: u64,
}

impl Cursor {
    /// Pieces that have been planned at least in part.
    pub(super) fn touched(self) -> usize {
        self.piece + usize::from(self.offset > 0)
    }
}

/// One descriptor pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Offset in the local region.
    pub local: u64,
    /// Offset in the remote region.
    pub remote: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What bounds a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most bytes.
    pub bytes: u64,
    /// Lengths of registrations on both sides.
    pub local_slice: u64,
    pub remote_slice: u64,
}

/// Fills `out` with the next request's descriptors and moves the cursor behind them. Empty at the end.
pub(super) fn next_request(pieces: &[Piece], cursor: &mut Cursor, limits: Limits, out: &mut Vec<Descriptor>) {
    let Limits { bytes, local_slice, remote_slice } = limits;
    out.clear();
    let mut room = bytes;
    while room > 0 {
        let Some(piece) = pieces.get(cursor.piece) else { return };
        let local = piece.local_offset + cursor.offset;
        let remote = piece.remote_offset + cursor.offset;
        let len = (piece.len - cursor.offset)
            .min(room)
            .min(local_slice - local % local_slice)
            .min(remote_slice - remote % remote_slice);
        let inside = !local.is_multiple_of(local_slice) && !remote.is_multiple_of(remote_slice);
        let full = out.len() == MAX_DESCRIPTORS;
        match out.last_mut() {
            Some(last) if inside && last.local + last.len == local && last.remote + last.len == remote => {
                last.len += len;
            }
            _ if full => return,
            _ => out.push(Descriptor { local, remote, len }),
        }
        room -= len;
        cursor.offset += len;
        if cursor.offset == piece.len {
            *cursor = Cursor { piece: cursor.piece + 1, offset: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(pieces: &[Piece], local_slice: u64, remote_slice: u64) -> Vec<Vec<Descriptor>> {
        let (mut cursor, mut out, mut requests) = (Cursor::default(), Vec::new(), Vec::new());
        loop {
            let limits = Limits { bytes: MAX_BYTES, local_slice, remote_slice };
            next_request(pieces, &mut cursor, limits, &mut out);
            if out.is_empty() {
                assert_eq!(cursor, Cursor { piece: pieces.len(), offset: 0 });
                return requests;
            }
            requests.push(out.clone());
        }
    }

    #[test]
    fn neighbours_are_merged_and_large_pieces_cut() {
        let page = |i: u64| Piece { local_offset: i * 4096, remote_offset: i * 4096, len: 4096 };
        let ordered: Vec<Piece> = (0..64).map(page).collect();
        assert_eq!(plan(&ordered, 1 << 30, 1 << 30), [[Descriptor { local: 0, remote: 0, len: 64 * 4096 }]]);
        let large = [Piece { local_offset: 0, remote_offset: 0, len: 2 * MAX_BYTES + 1 }];
        let lens: Vec<u64> = plan(&large, 1 << 40, 1 << 40).iter().map(|r| r[0].len).collect();
        assert_eq!(lens, [MAX_BYTES, MAX_BYTES, 1]);
    }

    proptest! {
        #[test]
        fn every_byte_once_within_limits_and_registrations(
            shape in proptest::collection::vec((0u64..5000, 0u64..5000, 1u64..9000, any::<bool>()), 1..40),
            local_slice in 1000u64..20_000,
            remote_slice in 1000u64..20_000,
        ) {
            let (mut l, mut r) = (0, 0);
            let pieces: Vec<Piece> = shape
                .iter()
                .map(|&(gap_l, gap_r, len, adjacent)| {
                    if !adjacent {
                        l += gap_l;
                        r += gap_r;
                    }
                    let piece = Piece { local_offset: l, remote_offset: r, len };
                    l += len;
                    r += len;
                    piece
                })
                .collect();
            let mut planned: Vec<(u64, u64)> = Vec::new();
            for request in plan(&pieces, local_slice, remote_slice) {
                prop_assert!(request.len() <= MAX_DESCRIPTORS);
                prop_assert!(request.iter().map(|d| d.len).sum::<u64>() <= MAX_BYTES);
                for d in request {
                    prop_assert_eq!(d.local / local_slice, (d.local + d.len - 1) / local_slice);
                    prop_assert_eq!(d.remote / remote_slice, (d.remote + d.len - 1) / remote_slice);
                    planned.extend((0..d.len).map(|i| (d.local + i, d.remote + i)));
                }
            }
            let wanted: Vec<(u64, u64)> = pieces
                .iter()
                .flat_map(|p| (0..p.len).map(|i| (p.local_offset + i, p.remote_offset + i)))
                .collect();
            prop_assert_eq!(planned, wanted);
        }
    }
}
