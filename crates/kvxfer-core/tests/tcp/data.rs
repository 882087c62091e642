//! Bytes arrive where they belong: both operations, all levels, all shapes.

use crate::harness::*;
use kvxfer_core::transport::{Op, Piece, Transport};
use kvxfer_core::{Integrity, Memory};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const LEVELS: [Integrity; 3] = [Integrity::Off, Integrity::Bound, Integrity::Full];

fn mirrored(pieces: &mut [Piece]) {
    for p in pieces {
        std::mem::swap(&mut p.local_offset, &mut p.remote_offset);
    }
}

fn piece(local_offset: u64, remote_offset: u64, len: u64) -> Piece {
    Piece { local_offset, remote_offset, len }
}

/// Random pieces whose destinations do not overlap.
fn scattered(rng: &mut Rng, slots: u64, count: u64, len: u64) -> Vec<Piece> {
    let mut order: Vec<u64> = (0..slots).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order.iter().take(count as usize).map(|&to| piece(rng.below(slots) * len, to * len, len)).collect()
}

#[test]
fn every_size_arrives_at_every_level_in_both_directions() {
    for streams in [1, 3] {
        let (a, b) = (Node::new(&config(streams)), Node::new(&config(streams)));
        let (link, _keep) = connect(&a, &b, None);
        for len in [1u64, 2, 63, 64, 65, 4095, 4096, 16_384, 65_537, 262_144, 262_145, 1 << 20, 3_145_735] {
            for integrity in LEVELS {
                for op in [Op::Write, Op::Read] {
                    let size = len as usize + 100;
                    let (mine, theirs) = (filled(size, len), filled(size, !len));
                    let key = b.export(&theirs).import(&link);
                    let pieces = [piece(3, 37, len)];
                    let want = expect(op, &bytes(&mine), &bytes(&theirs), &pieces);
                    let (_, t) = start(&link, op, &mine, key, &pieces, integrity);
                    good(&t);
                    assert_eq!(t.bytes_done(), len);
                    let got = bytes(if op == Op::Write { &theirs } else { &mine });
                    assert!(got == want, "{op:?} {len} {integrity:?} over {streams}");
                    link.forget(key);
                }
            }
        }
    }
}

#[test]
fn ten_thousand_random_pieces() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let (link, _keep) = connect(&a, &b, None);
    for op in [Op::Write, Op::Read] {
        for integrity in LEVELS {
            let (mine, theirs) = (filled(10_000 * 4096, 1), filled(10_000 * 4096, 2));
            let key = b.export(&theirs).import(&link);
            let mut pieces = scattered(&mut Rng(5), 10_000, 10_000, 4096);
            if op == Op::Read {
                mirrored(&mut pieces);
            }
            let want = expect(op, &bytes(&mine), &bytes(&theirs), &pieces);
            let (_, t) = start(&link, op, &mine, key, &pieces, integrity);
            good(&t);
            assert!(bytes(if op == Op::Write { &theirs } else { &mine }) == want);
        }
    }
}

#[test]
fn odd_lengths_and_offsets_in_one_transfer() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let (link, _keep) = connect(&a, &b, None);
    let mut rng = Rng(99);
    for op in [Op::Write, Op::Read] {
        let (mine, theirs) = (filled(8 << 20, 3), filled(8 << 20, 4));
        let key = b.export(&theirs).import(&link);
        let mut at = 1;
        let mut pieces = Vec::new();
        while at < (7 << 20) {
            let len = 1 + match rng.below(3) {
                0 => rng.below(8),
                1 => rng.below(5000),
                _ => rng.below(600_000),
            };
            let other = rng.below((8 << 20) - len);
            pieces.push(if op == Op::Write { piece(other, at, len) } else { piece(at, other, len) });
            at += len + rng.below(3);
        }
        pieces.retain(|p| p.local_offset + p.len <= 8 << 20 && p.remote_offset + p.len <= 8 << 20);
        let want = expect(op, &bytes(&mine), &bytes(&theirs), &pieces);
        let (_, t) = start(&link, op, &mine, key, &pieces, Integrity::Full);
        good(&t);
        assert!(bytes(if op == Op::Write { &theirs } else { &mine }) == want);
    }
}

#[test]
fn overlapping_reads_see_the_same_bytes() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let (link, _keep) = connect(&a, &b, None);
    let theirs = filled(1 << 20, 7);
    let key = b.export(&theirs).import(&link);
    let jobs: Vec<_> = (0..8u64)
        .map(|i| {
            let mine = zeroed(1 << 20);
            let pieces: Vec<_> = (0..16).map(|k| piece(k * 50_000, i * 1000 + k * 1000, 50_000)).collect();
            let want = expect(Op::Read, &bytes(&mine), &bytes(&theirs), &pieces);
            let (_, t) = start(&link, Op::Read, &mine, key, &pieces, Integrity::Full);
            (mine, want, t)
        })
        .collect();
    for (mine, want, t) in jobs {
        good(&t);
        assert!(bytes(&mine) == want);
    }
}

#[test]
fn both_sides_saturate_each_other_without_blocking() {
    const LEN: usize = 16 << 20;
    for threads in [1, 2] {
        let mut c = config(3);
        c.io_threads = threads;
        let (a, b) = (Node::new(&c), Node::new(&c));
        let (link_a, link_b) = connect(&a, &b, None);
        let mut jobs = Vec::new();
        for (i, (link, far)) in [(&link_a, &b), (&link_b, &a)].into_iter().enumerate() {
            for k in 0..4 {
                for op in [Op::Write, Op::Read] {
                    let (mine, theirs): (Arc<Memory>, _) =
                        (filled(LEN, i as u64 * 100 + k), filled(LEN, i as u64 * 100 + k + 50));
                    let key = far.export(&theirs).import(link);
                    let len = [16 << 10, 64 << 10, 1 << 20, LEN as u64][k as usize];
                    let mut pieces = scattered(&mut Rng(k), LEN as u64 / len, LEN as u64 / len, len);
                    if op == Op::Read {
                        mirrored(&mut pieces);
                    }
                    let want = expect(op, &bytes(&mine), &bytes(&theirs), &pieces);
                    jobs.push((link.clone(), op, mine, theirs, key, pieces, want));
                }
            }
        }
        let trackers: Vec<_> = jobs
            .iter()
            .map(|(link, op, mine, _, key, pieces, _)| {
                start(link, *op, mine, *key, pieces, Integrity::Full).1
            })
            .collect();
        for ((_, op, mine, theirs, _, _, want), t) in jobs.iter().zip(trackers) {
            good(&t);
            assert!(&bytes(if *op == Op::Write { theirs } else { mine }) == want);
        }
    }
}

#[test]
fn a_small_transfer_overtakes_a_large_one() {
    let (a, b) = (Node::new(&config(1)), Node::new(&config(1)));
    let (link, _keep) = connect(&a, &b, None);
    let (mine, theirs) = (filled(128 << 20, 1), zeroed(128 << 20));
    let key = b.export(&theirs).import(&link);
    let (_, large) = start(&link, Op::Write, &mine, key, &[piece(0, 0, 128 << 20)], Integrity::Full);
    let (_, small) = start(&link, Op::Write, &mine, key, &[piece(5, 5, 64)], Integrity::Full);
    let first = Arc::new(AtomicBool::new(false));
    let (seen, watched) = (first.clone(), large.clone());
    small.on_finish(move |_| seen.store(!watched.all_decided(), Ordering::Release));
    good(&small);
    assert!(first.load(Ordering::Acquire), "the small transfer waited for the large one");
    good(&large);
}

#[test]
fn the_side_that_accepted_can_submit_before_the_streams_are_there() {
    use kvxfer_core::transport::Role;
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let session = session();
    let from_a = peer(Role::Acceptor, a.address, session);
    let from_b = peer(Role::Initiator, b.address, session);
    let offer = b.transport.offer(&from_a).unwrap();
    let link_b = b.transport.connect(&from_a, &offer, soon()).unwrap();
    let (mine, theirs) = (filled(1 << 20, 1), zeroed(1 << 20));
    let key = a.export(&theirs).import(&link_b);
    let (_, t) = start(&link_b, Op::Write, &mine, key, &[piece(0, 0, 1 << 20)], Integrity::Full);
    assert!(!t.is_finished());
    let _link_a = a.transport.connect(&from_b, &offer, soon()).unwrap();
    good(&t);
    assert!(bytes(&theirs) == bytes(&mine));
}

#[test]
fn streams_that_come_before_the_link_are_kept_for_it() {
    use kvxfer_core::transport::Role;
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let session = session();
    let from_b = peer(Role::Initiator, b.address, session);
    let from_a = peer(Role::Acceptor, a.address, session);
    let offer = a.transport.offer(&from_b).unwrap();
    let link_a = a.transport.connect(&from_b, &offer, soon()).unwrap();
    let (mine, theirs) = (filled(1 << 20, 1), zeroed(1 << 20));
    let key = b.export(&theirs).import(&link_a);
    let (_, t) = start(&link_a, Op::Write, &mine, key, &[piece(0, 0, 1 << 20)], Integrity::Full);
    let link_b = b.transport.connect(&from_a, &offer, soon()).unwrap();
    good(&t);
    assert!(bytes(&theirs) == bytes(&mine));
    until("both streams", || link_b.describe().contains("2 of 2 streams"));
}
