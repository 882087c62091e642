use super::*;
use crate::Memory;
use crate::memory::HugePages;
use crate::transport::{Op, Piece, RemoteKey, Tracker};
use kvxfer_proto::{Integrity, RegionId};
use std::sync::atomic::{AtomicBool, AtomicU64};

struct Plain(Arc<Memory>);

impl Carrier for Plain {
    fn carry(&self, job: &Job, slice: &Slice) -> Report {
        // SAFETY: submit checked the ranges against this memory's length; `self` keeps it.
        unsafe { crate::copy::carry(job, slice, self.0.as_ptr()) }
    }
}

/// Holds every slice until told to go on.
struct Gate {
    inner: Plain,
    entered: AtomicUsize,
    open: AtomicBool,
}

impl Carrier for Gate {
    fn carry(&self, job: &Job, slice: &Slice) -> Report {
        self.entered.fetch_add(1, Ordering::AcqRel);
        while !self.open.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        self.inner.carry(job, slice)
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

fn job(local: &Arc<Memory>, pieces: &[Piece]) -> Job {
    Job {
        transfer: TransferId(NEXT.fetch_add(1, Ordering::Relaxed)),
        op: Op::Write,
        local_region: RegionId(1),
        local: Arc::clone(local),
        remote: RemoteKey(1),
        pieces: pieces.into(),
        integrity: Integrity::Off,
        after: None,
        digest: None,
        tracker: Arc::new(Tracker::new(pieces.len())),
    }
}

fn one(len: u64) -> Vec<Piece> {
    vec![Piece { local_offset: 0, remote_offset: 0, len }]
}

fn filled(len: usize, seed: u8) -> Arc<Memory> {
    let memory = Memory::anonymous(len).unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761) as u8 ^ seed).collect();
    memory.write_at(0, &bytes).unwrap();
    memory
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut out = vec![0; memory.len()];
    memory.read_at(0, &mut out).unwrap();
    out
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn mover(threads: usize) -> Arc<Mover> {
    Mover::new(&AgentConfig { copy_threads: threads, ..AgentConfig::default() })
}

#[test]
fn small_jobs_end_within_submit_and_start_no_thread() {
    let (mover, from, to) = (mover(2), filled(64 << 10, 1), Memory::anonymous(64 << 10).unwrap());
    let lane = mover.lane();
    let job = job(&from, &one(64 << 10));
    let tracker = Arc::clone(&job.tracker);
    lane.submit(job, Arc::new(Plain(Arc::clone(&to))), to.len() as u64).unwrap();
    assert!(tracker.is_finished() && tracker.error().is_none());
    assert_eq!(bytes(&from), bytes(&to));
    assert!(mover.shared.queue.lock().threads.is_empty());
}

#[test]
fn many_jobs_of_many_lanes_all_arrive() {
    let mover = mover(3);
    let total = 9 << 20;
    let from = filled(total, 3);
    let lanes: Vec<_> = (0..4).map(|_| mover.lane()).collect();
    let mut waiting = Vec::new();
    for round in 0..3 {
        for lane in &lanes {
            let to = Memory::anonymous(total).unwrap();
            // Backwards in odd pieces, so that order matters.
            let size = 100_003 + round * 1000;
            let count = total as u64 / size;
            let pieces: Vec<_> = (0..count)
                .map(|i| Piece { local_offset: i * size, remote_offset: (count - 1 - i) * size, len: size })
                .collect();
            let job = job(&from, &pieces);
            let (tracker, transfer) = (Arc::clone(&job.tracker), job.transfer);
            lane.submit(job, Arc::new(Plain(Arc::clone(&to))), to.len() as u64).unwrap();
            waiting.push((tracker, transfer, to, pieces));
        }
    }
    let source = bytes(&from);
    for (i, (tracker, transfer, to, pieces)) in waiting.into_iter().enumerate() {
        while i % 2 == 0 && lanes[i % 4].assist(transfer) {}
        assert!(tracker.wait_until(soon()));
        assert_eq!(tracker.error(), None);
        assert_eq!(tracker.bytes_done(), pieces.iter().map(|p| p.len).sum::<u64>());
        let arrived = bytes(&to);
        for p in pieces {
            let (l, r, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            assert!(source[l..l + n] == arrived[r..r + n]);
        }
    }
}

#[test]
fn no_late_write_after_cancel() {
    let (mover, total) = (mover(2), 16 << 20);
    let (ones, twos) = (filled(total, 0x11), filled(total, 0x22));
    let to = Memory::shared(total, HugePages::Try).unwrap();
    let lane = mover.lane();
    let (mut cut_short, mut rounds) = (0, 0);
    while rounds < 40 || (cut_short == 0 && rounds < 2000) {
        let from = if rounds % 2 == 0 { &ones } else { &twos };
        let job = job(from, &one(total as u64));
        let (tracker, transfer) = (Arc::clone(&job.tracker), job.transfer);
        lane.submit(job, Arc::new(Plain(Arc::clone(&to))), total as u64).unwrap();
        for _ in 0..rounds * 97 % 4000 {
            std::hint::spin_loop();
        }
        tracker.request_cancel(ErrorCode::Cancelled);
        lane.cancel(transfer);
        assert!(tracker.wait_until(soon()));
        let then = bytes(&to);
        cut_short += u32::from(tracker.error() == Some(ErrorCode::Cancelled));
        // The memory belongs to somebody else now.
        to.write_at(0, &[rounds as u8; 4096]).unwrap();
        std::thread::sleep(Duration::from_micros(300));
        let now = bytes(&to);
        assert!(now[..4096].iter().all(|b| *b == rounds as u8), "a cancelled transfer wrote late");
        assert!(now[4096..] == then[4096..], "a cancelled transfer wrote late");
        rounds += 1;
    }
    assert!(cut_short > 0, "no cancel ever came in time");
}

#[test]
fn cancel_waits_for_the_slice_in_progress() {
    let (mover, total) = (mover(1), 8 << 20);
    let (from, to) = (filled(total, 5), Memory::anonymous(total).unwrap());
    let gate = Arc::new(Gate {
        inner: Plain(Arc::clone(&to)),
        entered: AtomicUsize::new(0),
        open: AtomicBool::new(false),
    });
    let lane = mover.lane();
    let (first, second) = (job(&from, &one(total as u64)), job(&from, &one(total as u64)));
    let (a, b) = (Arc::clone(&first.tracker), Arc::clone(&second.tracker));
    let (ta, tb) = (first.transfer, second.transfer);
    lane.submit(first, Arc::clone(&gate) as Arc<dyn Carrier>, total as u64).unwrap();
    lane.submit(second, Arc::clone(&gate) as Arc<dyn Carrier>, total as u64).unwrap();
    while gate.entered.load(Ordering::Acquire) == 0 {
        std::thread::yield_now();
    }
    // The one that has not begun ends at once, the one under way only after its slice.
    b.request_cancel(ErrorCode::TimedOut);
    lane.cancel(tb);
    assert!(b.is_finished());
    assert_eq!(b.error(), Some(ErrorCode::TimedOut));
    a.request_cancel(ErrorCode::Cancelled);
    lane.cancel(ta);
    assert!(!a.is_finished());
    lane.close();
    assert!(!a.is_finished() && !lane.is_quiet());
    gate.open.store(true, Ordering::Release);
    assert!(a.wait_until(soon()));
    assert_eq!(a.error(), Some(ErrorCode::Cancelled));
    assert!(lane.is_quiet());
    assert_eq!(gate.entered.load(Ordering::Acquire), 1);
}

#[test]
fn a_big_job_does_not_starve_another_peer() {
    let (mover, total) = (mover(1), 64 << 20);
    let (from, to) = (filled(total, 5), Memory::anonymous(total).unwrap());
    let gate = Arc::new(Gate {
        inner: Plain(Arc::clone(&to)),
        entered: AtomicUsize::new(0),
        open: AtomicBool::new(false),
    });
    let (big_lane, small_lane) = (mover.lane(), mover.lane());
    let big = job(&from, &one(total as u64));
    let small = job(&from, &one(1 << 20));
    let (big_tracker, small_tracker) = (Arc::clone(&big.tracker), Arc::clone(&small.tracker));
    let bytes_before = Arc::new(AtomicU64::new(u64::MAX));
    let (seen, of) = (Arc::clone(&bytes_before), Arc::clone(&big_tracker));
    small_tracker.on_finish(move |_| seen.store(u64::from(of.is_finished()), Ordering::Release));
    big_lane.submit(big, Arc::clone(&gate) as Arc<dyn Carrier>, total as u64).unwrap();
    small_lane.submit(small, Arc::clone(&gate) as Arc<dyn Carrier>, total as u64).unwrap();
    gate.open.store(true, Ordering::Release);
    assert!(small_tracker.wait_until(soon()) && big_tracker.wait_until(soon()));
    assert_eq!(bytes_before.load(Ordering::Acquire), 0, "the small job waited for the big one");
}

#[test]
fn close_and_shutdown_end_everything() {
    let (mover, total) = (mover(2), 32 << 20);
    let (from, to) = (filled(total, 5), Memory::anonymous(total).unwrap());
    let (closing, other) = (mover.lane(), mover.lane());
    let submit = |lane: &Lane| {
        let job = job(&from, &one(total as u64));
        let tracker = Arc::clone(&job.tracker);
        lane.submit(job, Arc::new(Plain(Arc::clone(&to))), total as u64).map(|()| tracker)
    };
    let ours: Vec<_> = (0..8).map(|_| submit(&closing).unwrap()).collect();
    let theirs: Vec<_> = (0..8).map(|_| submit(&other).unwrap()).collect();
    closing.close();
    for tracker in &ours {
        assert!(tracker.wait_until(soon()));
    }
    assert_eq!(ours.last().unwrap().error(), Some(ErrorCode::PeerGone));
    assert_eq!(submit(&closing).unwrap_err().code(), ErrorCode::Closed);
    mover.shutdown();
    for tracker in &theirs {
        assert!(tracker.is_finished());
        assert!([None, Some(ErrorCode::Closed)].contains(&tracker.error()));
    }
    assert_eq!(submit(&other).unwrap_err().code(), ErrorCode::Closed);
    let small = job(&from, &one(10));
    assert_eq!(other.submit(small, Arc::new(Plain(to)), total as u64).unwrap_err().code(), ErrorCode::Closed);
    mover.shutdown();
}

#[test]
fn bad_pieces_are_refused_before_anything_moves() {
    let (mover, from, to) = (mover(1), filled(4096, 1), Memory::anonymous(8192).unwrap());
    let lane = mover.lane();
    let try_one = |local_offset, remote_offset, len| {
        let good = Piece { local_offset: 0, remote_offset: 0, len: 64 };
        let job = job(&from, &[good, Piece { local_offset, remote_offset, len }]);
        let tracker = Arc::clone(&job.tracker);
        let e = lane.submit(job, Arc::new(Plain(Arc::clone(&to))), 8192).unwrap_err();
        assert!(!tracker.is_finished());
        e
    };
    for (l, r, n) in [(4096, 0, 1), (0, 8192, 1), (1, 0, 4096), (u64::MAX, 0, 2), (0, u64::MAX - 1, 4)] {
        let e = try_one(l, r, n);
        assert_eq!(e.code(), ErrorCode::OutOfRange);
        assert!(e.to_string().contains("piece 1"), "{e}");
    }
    assert_eq!(try_one(0, 0, 0).code(), ErrorCode::InvalidArgument);
    assert!(bytes(&to).iter().all(|b| *b == 0));
}

#[test]
fn a_hook_may_drop_the_mover() {
    let (mover, total) = (mover(1), 4 << 20);
    let (from, to) = (filled(total, 5), Memory::anonymous(total).unwrap());
    let lane = Arc::new(mover.lane());
    let job = job(&from, &one(total as u64));
    let tracker = Arc::clone(&job.tracker);
    let (held, of_lane) = (Arc::clone(&lane), mover);
    tracker.on_finish(move |_| drop((held, of_lane)));
    lane.submit(job, Arc::new(Plain(to)), total as u64).unwrap();
    drop(lane);
    assert!(tracker.wait_until(soon()));
}
