//! Every order of taking, ending and stopping slices, tried one after the other.
//!
//! All steps of a task happen under its lock, so an interleaving of threads is a sequence of steps; this enumerates
//! the sequences for a few job shapes and checks each step and each end.

use super::*;
use crate::transport::Outcome;

/// Enumerates choices: replays a path of decisions, then goes on to the next path.
#[derive(Default)]
struct Choices {
    path: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&mut self, options: usize) -> usize {
        if self.at == self.path.len() {
            self.path.push((0, options));
        }
        let (choice, known) = self.path[self.at];
        assert_eq!(known, options, "the model is not deterministic");
        self.at += 1;
        choice
    }
    fn next_path(&mut self) -> bool {
        self.at = 0;
        while let Some((choice, options)) = self.path.pop() {
            if choice + 1 < options {
                self.path.push((choice + 1, options));
                return true;
            }
        }
        false
    }
}

fn pieces(lens: &[u64]) -> Vec<Piece> {
    let mut at = 0;
    lens.iter()
        .map(|&len| {
            let piece = Piece { local_offset: at, remote_offset: at, len };
            at += len;
            piece
        })
        .collect()
}

fn one_run(pieces: &[Piece], exact: bool, choices: &mut Choices) {
    let tracker = Tracker::new(pieces.len());
    let total: u64 = pieces.iter().map(|p| p.len).sum();
    let mut progress = Progress::default();
    let mut running: Vec<Slice> = Vec::new();
    let mut taken = Vec::new();
    let (mut stop_used, mut ended, mut stopped, mut failed_pieces) = (false, false, false, Vec::new());
    while !ended {
        let may_take = running.len() < 3 && progress.clone().grab(pieces, exact).is_some();
        let options = usize::from(may_take) + usize::from(!stop_used) + 3 * running.len();
        if options == 0 {
            break;
        }
        let choice = choices.choose(options);
        if choice < 3 * running.len() {
            let slice = running.remove(choice / 3);
            let mut report = Report::default();
            match choice % 3 {
                0 => {}
                1 => {
                    report.fail(slice.first, ErrorCode::Corrupt, || "damaged".into());
                    failed_pieces.push(slice.first);
                }
                _ => {
                    report.stop(slice.first, ErrorCode::PeerGone, "gone".into());
                    stopped = true;
                }
            }
            decide_whole(&tracker, pieces, &slice, &report);
            ended = progress.complete(&tracker, pieces, &slice, report);
        } else if may_take && choice == 3 * running.len() {
            assert!(!stopped, "a slice started after a stop");
            let slice = progress.grab(pieces, exact).unwrap();
            running.push(slice);
            taken.push(slice);
        } else {
            stop_used = true;
            stopped = true;
            progress.stopped.get_or_insert(ErrorCode::Cancelled);
            ended = progress.end(pieces.len());
        }
        assert!(!ended || running.is_empty(), "ended while a slice was in progress");
    }
    assert!(ended, "nothing left to do, and not ended");
    assert!(!progress.end(pieces.len()), "ended twice");
    assert!(progress.grab(pieces, exact).is_none());
    // What was handed out is a gapless run from the start.
    let mut at = 0;
    for slice in &taken {
        assert_eq!(slice.position, at);
        assert_eq!(slice.runs(pieces).map(|r| r.len).sum::<u64>(), slice.bytes);
        assert!(!exact || at % SEGMENT == 0);
        at += slice.bytes;
    }
    assert!(stopped || at == total, "{at} of {total} bytes handed out");
    let undecided = (0..pieces.len()).filter(|i| tracker.outcome(*i) == Some(Outcome::Pending)).count();
    assert!(stopped || undecided == 0, "a piece was forgotten");
    end_tracker(&tracker, progress.stopped, None);
    assert!(tracker.is_finished() && tracker.all_decided());
    for piece in failed_pieces {
        assert_ne!(tracker.outcome(piece), Some(Outcome::Done), "a damaged piece counts as moved");
    }
    if !stopped && tracker.error().is_none() {
        assert_eq!(tracker.bytes_done(), total);
    }
}

#[test]
fn every_order_of_steps_ends_once_and_decides_every_piece() {
    let s = SLICE;
    let shapes: [(&[u64], bool); 6] = [
        (&[3 * s], false),
        (&[100, 2 * s, 100], false),
        (&[s, s + 4096], false),
        (&[s / 2 + 5, s, 7], true),
        (&[1; 3], false),
        (&[2 * s + 1], true),
    ];
    for (lens, exact) in shapes {
        let pieces = pieces(lens);
        let mut choices = Choices::default();
        let mut runs = 0_u32;
        loop {
            one_run(&pieces, exact, &mut choices);
            runs += 1;
            if !choices.next_path() {
                break;
            }
        }
        assert!(runs > 5, "{lens:?}: {runs} sequences");
    }
}

#[test]
fn slices_are_bounded_in_bytes_and_pieces() {
    let many = pieces(&vec![64; 3 * SLICE_PIECES]);
    let mut progress = Progress::default();
    let mut slices = 0;
    while let Some(slice) = progress.grab(&many, false) {
        assert!(slice.end - slice.first <= SLICE_PIECES);
        slices += 1;
    }
    assert_eq!(slices, 3);
    let big = pieces(&[100 * SLICE]);
    let mut progress = Progress::default();
    while let Some(slice) = progress.grab(&big, false) {
        assert!(slice.bytes <= SLICE + SLICE / 2);
    }
    assert_eq!(progress.position, 100 * SLICE);
}
