//! A job on its way: what has been handed out, what has come back, and the outcome of each piece.
//!
//! Jobs are cut into [`Cut`]s, runs of consecutive pieces (or a part of a large one) that fit one frame. Cuts are
//! made on demand when a stream can send, so striping over streams and stopping early cost nothing in advance.

use super::frame::MAX_PIECES;
use crate::transport::{Job, Op, Piece};
use kvxfer_proto::{ErrorCode, RegionId};
use std::collections::HashMap;
use std::sync::Arc;

/// A remote region as a link knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remote {
    pub(super) region: RegionId,
    pub(super) capability: u64,
    pub(super) len: u64,
}

/// A run of bytes of a job that travels in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Index of the first piece.
    pub(super) first: u32,
    /// Where in the first piece it starts.
    pub(super) offset: u64,
    /// Pieces touched.
    pub(super) count: u32,
    /// Bytes.
    pub(super) bytes: u32,
}

impl Cut {
    /// The parts of the job's pieces in this cut.
    pub(super) fn parts(self, pieces: &[Piece]) -> impl Iterator<Item = Piece> + '_ {
        let (mut offset, mut left) = (self.offset, u64::from(self.bytes));
        pieces[self.first as usize..][..self.count as usize].iter().map(move |p| {
            let len = (p.len - offset).min(left);
            let part =
                Piece { local_offset: p.local_offset + offset, remote_offset: p.remote_offset + offset, len };
            offset = 0;
            left -= len;
            part
        })
    }
}

/// A job under way on a link.
pub(super) struct Active {
    pub(super) job: Arc<Job>,
    pub(super) remote: Remote,
    /// Next piece to hand out, and where in it.
    next: (u32, u64),
    seq: u32,
    /// Cuts handed out whose outcome is not known.
    pub(super) outstanding: u32,
    /// Streams that are writing into the local memory right now (reads).
    pub(super) receiving: u32,
    /// Why nothing more is handed out.
    pub(super) stopped: Option<ErrorCode>,
    /// Bytes still undecided of pieces that travel in several cuts.
    partial: HashMap<u32, u64>,
}

impl Active {
    pub(super) fn new(job: Job, remote: Remote) -> Self {
        Self {
            job: Arc::new(job),
            remote,
            next: (0, 0),
            seq: 0,
            outstanding: 0,
            receiving: 0,
            stopped: None,
            partial: HashMap::new(),
        }
    }

    /// True when there is nothing more to hand out.
    pub(super) fn exhausted(&self) -> bool {
        self.stopped.is_some() || self.next.0 as usize >= self.job.pieces.len()
    }

    /// True when no stream will touch this job's memory any more.
    pub(super) fn quiet(&self) -> bool {
        match self.job.op {
            // A stopped read does not wait for answers: they are thrown away when they come.
            Op::Read if self.stopped.is_some() => self.receiving == 0,
            _ => self.exhausted() && self.outstanding == 0,
        }
    }

    /// Takes the next cut of at most `limit` bytes, with its number.
    pub(super) fn cut(&mut self, limit: u32) -> Option<(u32, Cut)> {
        if self.exhausted() {
            return None;
        }
        let pieces = &self.job.pieces;
        let (first, offset) = self.next;
        let (mut at, mut skip, mut bytes) = (first, offset, 0u32);
        while (at as usize) < pieces.len() && ((at - first) as usize) < MAX_PIECES && bytes < limit {
            let here = pieces[at as usize].len - skip;
            let room = u64::from(limit - bytes);
            // A piece that fits a frame of its own is not torn apart only to fill this one.
            if here > room && bytes > 0 && here <= u64::from(limit) {
                break;
            }
            let n = here.min(room);
            bytes += n as u32;
            if n < here {
                skip += n;
                break;
            }
            at += 1;
            skip = 0;
        }
        let count = at - first + u32::from(skip > 0);
        self.next = (at, skip);
        self.outstanding += 1;
        let seq = self.seq;
        self.seq = self.seq.wrapping_add(1);
        Some((seq, Cut { first, offset, count, bytes }))
    }

    /// Records the outcome of a cut. Damage concerns its pieces only; any other failure stops the job.
    pub(super) fn decide(&mut self, cut: Cut, code: ErrorCode) {
        let tracker = &self.job.tracker;
        let (mut run, mut run_len, mut run_bytes) = (cut.first as usize, 0, 0);
        for (i, part) in (cut.first..).zip(cut.parts(&self.job.pieces)) {
            let whole = self.job.pieces[i as usize].len;
            if code != ErrorCode::Ok {
                tracker.fail(i as usize, code);
                continue;
            }
            let complete = part.len == whole || {
                let left = self.partial.entry(i).or_insert(whole);
                *left -= part.len;
                *left == 0 && self.partial.remove(&i).is_some()
            };
            if complete {
                if run_len == 0 {
                    run = i as usize;
                }
                run_len += 1;
                run_bytes += whole;
            } else if run_len > 0 {
                tracker.done(run, run_len, run_bytes);
                (run_len, run_bytes) = (0, 0);
            }
        }
        if run_len > 0 {
            tracker.done(run, run_len, run_bytes);
        }
        match code {
            ErrorCode::Ok => {}
            ErrorCode::Corrupt => {
                tracker.explain("bytes arrived damaged: their digest differs from the sender's");
            }
            _ => {
                tracker.explain(format!("the peer refused region {}: {code}", self.remote.region));
                self.stopped.get_or_insert(code);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;
    use crate::transport::{Outcome, RemoteKey, Tracker};
    use kvxfer_proto::{Integrity, TransferId};

    fn active(lens: &[u64]) -> Active {
        let mut at = 0;
        let pieces: Vec<Piece> = lens
            .iter()
            .map(|&len| {
                let p = Piece { local_offset: at, remote_offset: at * 2, len };
                at += len;
                p
            })
            .collect();
        Active::new(
            Job {
                transfer: TransferId(1),
                op: Op::Write,
                local_region: RegionId(1),
                local: Memory::anonymous(4096).unwrap(),
                remote: RemoteKey(1),
                tracker: Arc::new(Tracker::new(pieces.len())),
                pieces: pieces.into(),
                integrity: Integrity::Off,
                after: None,
                digest: None,
            },
            Remote { region: RegionId(1), capability: 0, len: u64::MAX },
        )
    }

    #[test]
    fn cuts_cover_every_byte_once_and_respect_the_limit() {
        for lens in [&[1u64][..], &[100, 1, 7, 100, 300, 2], &[1; 2000], &[1000], &[99, 100, 101]] {
            let mut a = active(lens);
            let mut covered = vec![0; lens.len()];
            let mut cuts = Vec::new();
            while let Some((seq, cut)) = a.cut(100) {
                assert_eq!(seq as usize, cuts.len());
                assert!(cut.bytes > 0 && cut.bytes <= 100 && cut.count as usize <= MAX_PIECES);
                for (i, p) in (cut.first as usize..).zip(cut.parts(&a.job.pieces)) {
                    assert_eq!(p.local_offset, a.job.pieces[i].local_offset + covered[i]);
                    assert_eq!(p.remote_offset, a.job.pieces[i].remote_offset + covered[i]);
                    covered[i] += p.len;
                }
                cuts.push(cut);
            }
            assert_eq!(covered, lens);
            // Outcomes may come in any order.
            cuts.reverse();
            for cut in cuts {
                assert!(!a.job.tracker.all_decided());
                a.decide(cut, ErrorCode::Ok);
                a.outstanding -= 1;
            }
            assert!(a.job.tracker.all_decided() && a.quiet());
            assert_eq!(a.job.tracker.bytes_done(), lens.iter().sum::<u64>());
        }
    }

    #[test]
    fn a_damaged_cut_fails_its_pieces_only() {
        let mut a = active(&[50, 50, 250]);
        let cuts: Vec<_> = std::iter::from_fn(|| a.cut(100)).map(|c| c.1).collect();
        for (i, cut) in cuts.iter().enumerate() {
            a.decide(*cut, if i == 1 { ErrorCode::Corrupt } else { ErrorCode::Ok });
        }
        assert_eq!(a.job.tracker.outcome(1), Some(Outcome::Done));
        assert_eq!(a.job.tracker.outcome(2), Some(Outcome::Failed(ErrorCode::Corrupt)));
        assert!(a.stopped.is_none());
    }
}
