use super::*;
use crate::AgentConfig;
use crate::transport::inproc::InprocTransport;
use crate::transport::mover::Mover;
use crate::transport::testing::{backwards, bytes, digests, job, noise, peer_info, soon, whole};

const LEN: u64 = 1 << 20;

struct Rig {
    link: Arc<dyn Link>,
    near: Arc<Memory>,
    far: Arc<Memory>,
    key: RemoteKey,
    transport: Arc<FaultTransport>,
    _other: Arc<InprocTransport>,
}

fn rig(plan: FaultPlan) -> Rig {
    let config = AgentConfig::default();
    let [a, b] = [(); 2].map(|()| InprocTransport::new(&config, &Mover::new(&config)).unwrap());
    let transport = FaultTransport::new(a, plan);
    let peer = peer_info(std::process::id());
    let link = transport.connect(&peer, &b.offer(&peer).unwrap(), soon()).unwrap();
    let (near, far) = (Memory::anonymous(LEN as usize).unwrap(), Memory::anonymous(LEN as usize).unwrap());
    near.write_at(0, &noise(LEN as usize, 1)).unwrap();
    let ticket = b.ticket(RegionId(5), &far).unwrap().unwrap();
    let key = link
        .import(RemoteTicket { region: RegionId(5), len: LEN, payload: ticket.payload, fd: ticket.fd })
        .unwrap();
    Rig { link, near, far, key, transport, _other: b }
}

impl Rig {
    fn write(&self, pieces: Vec<Piece>) -> (TransferId, Arc<Tracker>) {
        let job = job(Op::Write, &self.near, self.key, pieces, Integrity::Bound);
        let out = (job.transfer, Arc::clone(&job.tracker));
        self.link.submit(job).unwrap();
        out
    }
    fn arrived(&self) -> bool {
        bytes(&self.near) == bytes(&self.far)
    }
    fn clear(&self) {
        self.far.write_at(0, &vec![0; LEN as usize]).unwrap();
    }
}

#[test]
fn without_faults_everything_passes() {
    let rig = rig(FaultPlan::default());
    let (_, tracker) = rig.write(whole(LEN));
    assert!(tracker.wait_until(soon()));
    assert!(rig.arrived() && tracker.error().is_none());
    assert_eq!(rig.transport.kind(), TransportKind::Inproc);
    assert!(rig.link.describe().contains("with faults"));
}

#[test]
fn a_failing_job_moves_the_pieces_before_the_planned_one() {
    let rig = rig(FaultPlan { fail_after: Some(1), fail_at_piece: 3, ..FaultPlan::default() });
    let (_, first) = rig.write(whole(LEN));
    assert!(first.wait_until(soon()) && first.error().is_none());
    rig.clear();
    let pieces: Vec<_> =
        backwards(LEN, LEN / 8).into_iter().map(|p| Piece { remote_offset: p.local_offset, ..p }).collect();
    let (_, second) = rig.write(pieces);
    assert!(second.wait_until(soon()));
    assert_eq!(second.error(), Some(ErrorCode::Transport));
    assert_eq!(second.failed_pieces(), 5);
    assert_eq!(second.outcome(2), Some(Outcome::Done));
    let (near, far) = (bytes(&rig.near), bytes(&rig.far));
    let border = LEN as usize / 8 * 3;
    assert!(near[..border] == far[..border] && far[border..].iter().all(|b| *b == 0));
}

#[test]
fn a_dropped_job_claims_success_and_leaves_no_byte_and_no_digest() {
    let rig = rig(FaultPlan { drop_every: Some(2), ..FaultPlan::default() });
    for n in 1..=4 {
        rig.clear();
        let mut write = job(Op::Write, &rig.near, rig.key, whole(LEN), Integrity::Full);
        let digests = digests(LEN);
        write.digest = Some(Arc::clone(&digests));
        let tracker = Arc::clone(&write.tracker);
        rig.link.submit(write).unwrap();
        assert!(tracker.wait_until(soon()));
        assert_eq!((tracker.error(), tracker.bytes_done()), (None, LEN));
        assert_eq!(rig.arrived(), n % 2 == 1);
        assert_eq!(digests.hashes[0].load(Ordering::Acquire) != 0, n % 2 == 1);
    }
}

#[test]
fn one_byte_is_flipped_behind_the_back_of_the_check() {
    let rig = rig(FaultPlan { corrupt_every: Some(3), ..FaultPlan::default() });
    for n in 1..=6 {
        rig.clear();
        let (_, tracker) = rig.write(whole(LEN));
        assert!(tracker.wait_until(soon()));
        assert_eq!(tracker.error(), None);
        let (near, far) = (bytes(&rig.near), bytes(&rig.far));
        let wrong: Vec<_> = (0..near.len()).filter(|i| near[*i] != far[*i]).collect();
        assert_eq!(wrong, if n % 3 == 0 { vec![LEN as usize / 2] } else { vec![] });
    }
    let read = job(Op::Read, &rig.near, rig.key, whole(LEN), Integrity::Bound);
    let tracker = Arc::clone(&read.tracker);
    rig.link.submit(read).unwrap();
    assert!(tracker.wait_until(soon()) && tracker.error().is_none());
}

#[test]
fn a_duplicated_job_ends_once_after_both() {
    let rig = rig(FaultPlan { duplicate_every: Some(1), ..FaultPlan::default() });
    for pieces in [whole(LEN), backwards(LEN, 4096), whole(100)] {
        let bytes: u64 = pieces.iter().map(|p| p.len).sum();
        let (_, tracker) = rig.write(pieces);
        assert!(tracker.wait_until(soon()));
        assert_eq!((tracker.error(), tracker.bytes_done()), (None, bytes));
    }
}

#[test]
fn a_stalled_job_ends_by_cancel_close_or_shutdown() {
    let plan = FaultPlan { stall_after: Some(0), ..FaultPlan::default() };
    for end in 0..4 {
        let rig = rig(plan.clone());
        let (transfer, tracker) = rig.write(whole(LEN));
        // The one after it is not affected.
        let (_, next) = rig.write(whole(LEN));
        assert!(next.wait_until(soon()));
        assert!(!tracker.is_finished());
        assert!(!rig.link.assist(transfer));
        let expected = match end {
            0 => {
                tracker.request_cancel(ErrorCode::TimedOut);
                rig.link.cancel(transfer);
                ErrorCode::TimedOut
            }
            1 => {
                rig.link.close();
                ErrorCode::PeerGone
            }
            2 => {
                rig.transport.shutdown();
                ErrorCode::Closed
            }
            _ => {
                drop(rig);
                ErrorCode::PeerGone
            }
        };
        assert!(tracker.is_finished());
        assert_eq!(tracker.error(), Some(expected));
    }
}

#[test]
fn delayed_jobs_start_later_and_can_be_cancelled_at_any_moment() {
    let delay = Duration::from_millis(20);
    let rig = rig(FaultPlan { delay, corrupt_every: Some(2), ..FaultPlan::default() });
    let begun = Instant::now();
    let (_, tracker) = rig.write(whole(100));
    assert!(!tracker.is_finished());
    assert!(tracker.wait_until(soon()));
    assert!(begun.elapsed() >= delay && tracker.error().is_none());
    let under_way: Vec<_> = (0..60)
        .map(|i| {
            let (transfer, tracker) = rig.write(whole(LEN));
            std::thread::sleep(Duration::from_micros(i * 20));
            (transfer, tracker)
        })
        .collect();
    std::thread::sleep(delay / 2);
    for (transfer, tracker) in &under_way {
        tracker.request_cancel(ErrorCode::Cancelled);
        rig.link.cancel(*transfer);
        assert!(tracker.wait_until(soon()));
        assert!([None, Some(ErrorCode::Cancelled)].contains(&tracker.error()));
    }
    let (_, last) = rig.write(whole(LEN));
    rig.link.close();
    assert!(last.wait_until(soon()));
    assert_eq!(last.error(), Some(ErrorCode::PeerGone));
    let refused = job(Op::Write, &rig.near, rig.key, whole(1), Integrity::Off);
    assert_eq!(rig.link.submit(refused).unwrap_err().code(), ErrorCode::Closed);
}
