//! Two agents in one process: write, read, many descriptors, cancel, bad input, shutdown.

use crate::support::{End, REGION, pair, pattern, piece, remote_ticket, with_nixl};
use kvxfer_core::proto::RegionId;
use kvxfer_core::transport::{Outcome, RemoteKey, Transport};
use kvxfer_core::{ErrorCode, Memory, Op, Piece};
use std::sync::Arc;

#[test]
fn write_and_read() {
    with_nixl("transfers::write_and_read", || {
        let (a, b) = (End::new("a", 8 << 20), End::new("b", 8 << 20));
        a.fill(1);
        b.fill(2);
        let (to_b, to_a) = pair(&a, &b, 1);
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import");
        // Small enough to end within submit, odd offsets.
        let tracker = a.run(&*to_b, Op::Write, key, &[piece(3, 1001, 64)]);
        assert_eq!((tracker.error(), tracker.bytes_done()), (None, 64));
        assert_eq!(b.bytes(1001, 64), &pattern(1, 8 << 20)[3..67]);
        assert_eq!(b.bytes(1065, 64), &pattern(2, 8 << 20)[1065..1129], "bytes behind it are untouched");
        // Large.
        let tracker = a.run(&*to_b, Op::Write, key, &[piece(0, 0, 8 << 20)]);
        assert_eq!((tracker.error(), tracker.outcome(0)), (None, Some(Outcome::Done)));
        assert_eq!(b.bytes(0, 8 << 20), pattern(1, 8 << 20));
        // The other direction over the other link, as a read.
        a.fill(3);
        let key = to_a.import(remote_ticket(a.ticket(), a.len)).expect("import");
        let tracker = b.run(&*to_a, Op::Read, key, &[piece(4096, 0, 1 << 20)]);
        assert_eq!(tracker.error(), None);
        assert_eq!(b.bytes(4096, 1 << 20), &pattern(3, 8 << 20)[..1 << 20]);
    });
}

#[test]
fn many_descriptors_in_random_order() {
    with_nixl("transfers::many_descriptors_in_random_order", || {
        let (count, size) = (10_000u64, 4096u64);
        let (a, b) = (End::new("a", (count * size) as usize), End::new("b", (count * size) as usize));
        a.fill(5);
        let (to_b, _to_a) = pair(&a, &b, 1);
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import");
        // Both sides in another order, so that nothing can be merged; the last 100 are left out.
        let at = |i: u64, step: u64| (i * step) % count * size;
        let pieces: Vec<Piece> = (0..count - 100).map(|i| piece(at(i, 7919), at(i, 3571), size)).collect();
        let tracker = a.run(&*to_b, Op::Write, key, &pieces);
        assert_eq!((tracker.error(), tracker.bytes_done()), (None, (count - 100) * size));
        let (sent, got) = (pattern(5, a.len as usize), b.bytes(0, b.len as usize));
        for p in &pieces {
            let (l, r) = (p.local_offset as usize, p.remote_offset as usize);
            assert!(sent[l..l + size as usize] == got[r..r + size as usize], "{p:?}");
        }
        for i in count - 100..count {
            let r = at(i, 3571) as usize;
            assert!(got[r..r + size as usize].iter().all(|b| *b == 0), "a page nobody wrote to has changed");
        }
    });
}

#[test]
fn cancelled_ends_and_nothing_changes_afterwards() {
    with_nixl("transfers::cancelled_ends_and_nothing_changes_afterwards", || {
        let len = 256 << 20;
        let (a, b) = (End::new("a", len), End::new("b", len));
        a.fill(7);
        let (to_b, _to_a) = pair(&a, &b, 1);
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import");
        let pieces: Vec<Piece> = (0..256).map(|i| piece(i << 20, i << 20, 1 << 20)).collect();
        let job = a.job(Op::Write, key, &pieces);
        let (id, tracker) = (job.transfer, Arc::clone(&job.tracker));
        to_b.submit(job).expect("accepted");
        // A few requests' worth, then the caller changes its mind.
        for _ in 0..3 {
            to_b.assist(id);
        }
        assert!(!tracker.is_finished());
        tracker.request_cancel(ErrorCode::Cancelled);
        to_b.cancel(id);
        a.wait(&*to_b, id, &tracker);
        assert_eq!(tracker.error(), Some(ErrorCode::Cancelled));
        let after = b.bytes(0, len);
        let sent = pattern(7, len);
        for (i, chunk) in after.chunks(1 << 20).enumerate() {
            match tracker.outcome(i) {
                Some(Outcome::Done) => assert!(chunk == &sent[i << 20..(i + 1) << 20], "piece {i} is whole"),
                Some(Outcome::Failed(code)) => assert_eq!(code, ErrorCode::Cancelled),
                other => panic!("piece {i} has no outcome: {other:?}"),
            }
        }
        assert!(tracker.failed_pieces() > 0 && tracker.bytes_done() > 0, "{tracker:?}");
        a.transport.poll();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(b.bytes(0, len) == after, "a byte changed after the end");
        // The link goes on.
        assert_eq!(a.run(&*to_b, Op::Write, key, &[piece(0, 0, len as u64)]).error(), None);
        assert!(b.bytes(0, len) == sent);
    });
}

#[test]
fn bad_input_is_refused_and_the_link_goes_on() {
    with_nixl("transfers::bad_input_is_refused_and_the_link_goes_on", || {
        let (a, b) = (End::new("a", 1 << 20), End::new("b", 1 << 20));
        let (to_b, _to_a) = pair(&a, &b, 1);
        let code = |e: kvxfer_core::Error| e.code();
        assert_eq!(to_b.import(remote_ticket(b.ticket(), 77)).map_err(code), Err(ErrorCode::Protocol));
        assert_eq!(to_b.import(remote_ticket(a.ticket(), a.len)).map_err(code), Err(ErrorCode::Protocol));
        assert_eq!(
            to_b.import(remote_ticket(vec![1, 2, 3], 1 << 20)).map_err(code),
            Err(ErrorCode::Protocol)
        );
        // The outside is right, NIXL's own part is cut off.
        let mut cut = b.ticket();
        cut.truncate(cut.len() - 40);
        assert!(to_b.import(remote_ticket(cut, b.len)).is_err());
        let whole = [piece(0, 0, 1 << 20)];
        assert_eq!(
            to_b.submit(a.job(Op::Write, RemoteKey(55), &whole)).map_err(code),
            Err(ErrorCode::NotFound)
        );
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import");
        let mut job = a.job(Op::Write, key, &whole);
        job.local_region = RegionId(12);
        assert_eq!(to_b.submit(job).map_err(code), Err(ErrorCode::NotFound));
        to_b.forget(key);
        assert_eq!(to_b.submit(a.job(Op::Write, key, &whole)).map_err(code), Err(ErrorCode::NotFound));
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import again");
        assert_eq!(a.run(&*to_b, Op::Write, key, &whole).error(), None);
    });
}

#[test]
fn regions_come_and_go() {
    with_nixl("transfers::regions_come_and_go", || {
        let (a, b) = (End::new("a", 1 << 20), End::new("b", 1 << 20));
        let (to_b, _to_a) = pair(&a, &b, 1);
        for round in 0..20u64 {
            // Likely at the same address each time: what NIXL remembers of the old one must not be used.
            let memory = Memory::anonymous(3 << 20).expect("memory");
            let region = RegionId(100 + round);
            b.transport.register(region, &memory).expect("register");
            // The same memory under a second id, which goes first.
            b.transport.register(RegionId(500), &memory).expect("register");
            b.transport.deregister(RegionId(500));
            let ticket = b.transport.ticket(region, &memory).expect("ticket").expect("reachable");
            let key = to_b.import(remote_ticket(ticket.payload, 3 << 20)).expect("import");
            a.fill(round);
            assert_eq!(a.run(&*to_b, Op::Write, key, &[piece(0, 2 << 20, 1 << 20)]).error(), None);
            let mut got = vec![0; 1 << 20];
            memory.read_at(2 << 20, &mut got).expect("in range");
            assert!(got == pattern(round, 1 << 20), "round {round}");
            to_b.forget(key);
            b.transport.deregister(region);
        }
        assert!(b.transport.ticket(REGION, &b.memory).expect("ticket").is_some());
    });
}

#[test]
fn shutdown_ends_what_is_under_way() {
    with_nixl("transfers::shutdown_ends_what_is_under_way", || {
        let len = 64 << 20;
        let (a, b) = (End::new("a", len), End::new("b", len));
        let (to_b, to_a) = pair(&a, &b, 1);
        let key = to_b.import(remote_ticket(b.ticket(), b.len)).expect("import");
        let job = a.job(Op::Write, key, &[piece(0, 0, len as u64)]);
        let tracker = Arc::clone(&job.tracker);
        to_b.submit(job).expect("accepted");
        a.transport.shutdown();
        assert!(tracker.is_finished());
        assert_eq!(tracker.error(), Some(ErrorCode::Closed));
        assert!(to_b.fenced(), "no NIXL agent, no way in");
        let refused = to_b.submit(a.job(Op::Write, key, &[piece(0, 0, 1)])).map_err(|e| e.code());
        assert_eq!(refused, Err(ErrorCode::Closed));
        to_b.close();
        to_a.close();
        assert!(!to_a.fenced(), "the peer's process lives");
        drop((to_b, to_a));
        b.transport.shutdown();
        let threads = std::fs::read_dir("/proc/self/task").expect("readable").flatten().filter(|t| {
            std::fs::read_to_string(t.path().join("comm")).is_ok_and(|c| c.starts_with("kvxfer-nixl"))
        });
        assert_eq!(threads.count(), 0, "a thread is left");
    });
}
