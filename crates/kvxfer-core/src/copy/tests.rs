use super::xxh3::{STRIPE, Store, Xxh3};
use super::*;
use crate::Memory;
use crate::transport::{Outcome, Piece, RemoteKey, SegmentDigests, Tracker};
use kvxfer_proto::integrity::SEGMENT;
use kvxfer_proto::{RegionId, TransferId};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

fn memory(bytes: &[u8]) -> Arc<Memory> {
    let memory = Memory::anonymous(bytes.len()).unwrap();
    memory.write_at(0, bytes).unwrap();
    memory
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut out = vec![0; memory.len()];
    memory.read_at(0, &mut out).unwrap();
    out
}

fn job(op: Op, local: &Arc<Memory>, pieces: Vec<Piece>, integrity: Integrity) -> Job {
    Job {
        transfer: TransferId(5),
        op,
        local_region: RegionId(1),
        local: Arc::clone(local),
        remote: RemoteKey(1),
        tracker: Arc::new(Tracker::new(pieces.len())),
        pieces: pieces.into(),
        integrity,
        after: None,
        digest: None,
    }
}

/// Runs a job through a mover, as the transports do.
fn run(job: &Job, remote: &Arc<Memory>) {
    struct Mapped(Arc<Memory>);
    impl crate::transport::mover::Carrier for Mapped {
        fn carry(&self, job: &Job, slice: &Slice) -> Report {
            // SAFETY: submit checked the ranges against this memory's length; `self` keeps it.
            unsafe { carry(job, slice, self.0.as_ptr()) }
        }
    }
    let mover = crate::transport::mover::Mover::new(&crate::AgentConfig::default());
    let lane = mover.lane();
    lane.submit(job.clone(), Arc::new(Mapped(Arc::clone(remote))), remote.len() as u64).unwrap();
    assert!(job.tracker.wait_until(Instant::now() + Duration::from_secs(60)));
}

/// Pieces that fill `total` remote bytes in order from scattered local places.
fn scattered(total: usize, lens: &[usize]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for len in lens.iter().cycle() {
        let len = (*len).min(total - at);
        pieces.push(Piece { local_offset: 0, remote_offset: at as u64, len: len as u64 });
        at += len;
        if at == total {
            break;
        }
    }
    let mut local = 3;
    for piece in pieces.iter_mut().rev() {
        piece.local_offset = local;
        local += piece.len + 1;
    }
    pieces
}

#[test]
fn every_alignment_and_length_is_copied_exactly() {
    let source = noise(9000, 7);
    for to_offset in [0, 1, 31, 63, 64] {
        for from_offset in [0, 1, 33] {
            for len in (0..300).chain([1000, 4095, 4096, 4097, 8191]) {
                let mut target = vec![0xAA_u8; 9000];
                // SAFETY: both ranges lie inside the vectors.
                unsafe {
                    let from = source.as_ptr().add(from_offset);
                    stream::copy(target.as_mut_ptr().add(to_offset), from, len, from);
                }
                stream::fence();
                assert!(target[to_offset..to_offset + len] == source[from_offset..from_offset + len]);
                assert!(target[..to_offset].iter().all(|b| *b == 0xAA));
                assert!(target[to_offset + len..].iter().all(|b| *b == 0xAA));
            }
        }
    }
}

#[test]
fn both_kernels_copy_the_same() {
    #[cfg(target_arch = "x86_64")]
    for (there, kernel) in stream::kernels() {
        if !there {
            continue;
        }
        let source = memory(&noise(64 << 10, 3));
        for len in [64, 128, 192, 256, 320, 4096, 65536 - 64] {
            let target = Memory::anonymous(64 << 10).unwrap();
            // SAFETY: page-aligned memory, lengths are multiples of 64; the processor has the kernel's features.
            unsafe { kernel(target.as_ptr(), source.as_ptr(), len, source.as_ptr()) };
            stream::fence();
            assert!(bytes(&target)[..len] == bytes(&source)[..len]);
            assert!(bytes(&target)[len..].iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn hash_is_the_public_one() {
    let input = noise(300_000, 11);
    let target = Memory::anonymous(300_000).unwrap();
    for len in (241..600).chain([1024, 1025, 1087, 1088, 1089, 4096, 65_537, 262_144, 300_000]) {
        let expected = xxhash_rust::xxh3::xxh3_64(&input[..len]);
        for store in [Store::None, Store::Cached, Store::Streaming] {
            let Some(mut state) = Xxh3::new() else { return };
            let stripes = (len as u64 - 1) / 64;
            // In two goes, so that the state in between counts.
            let first = stripes / 3;
            let split = first as usize * STRIPE;
            // SAFETY: the vector and the memory hold that many bytes; the memory is aligned to pages.
            unsafe {
                state.consume(target.as_ptr(), input.as_ptr(), first, store);
                let (to, from) = (target.as_ptr().add(split), input.as_ptr().add(split));
                state.consume(to, from, stripes - first, store);
            }
            stream::fence();
            let last: &[u8; STRIPE] = input[len - STRIPE..len].try_into().unwrap();
            assert_eq!(state.finish(len as u64, last), expected, "{len} {store:?}");
            if store != Store::None {
                let done = stripes as usize * STRIPE;
                assert!(bytes(&target)[..done] == input[..done]);
            }
        }
    }
}

#[test]
fn all_hash_kernels_agree_and_store() {
    #[cfg(target_arch = "x86_64")]
    for (there, stores, kernel) in Xxh3::kernels() {
        if !there {
            continue;
        }
        let input = noise(STRIPE * 100, 11);
        let target = Memory::anonymous(input.len()).unwrap();
        let mut state = Xxh3::new().unwrap();
        // SAFETY: input and target have 100 stripes, the target is aligned to pages; the processor has the features.
        unsafe { kernel(&mut state, target.as_ptr(), input.as_ptr(), 99) };
        stream::fence();
        let hash = state.advanced(99).finish(6400, input[6336..].try_into().unwrap());
        assert_eq!(hash, xxhash_rust::xxh3::xxh3_64(&input));
        let stored = bytes(&target);
        assert!(if stores { stored[..6336] == input[..6336] } else { stored.iter().all(|b| *b == 0) });
        assert!(stored[6336..].iter().all(|b| *b == 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn digests_fit_what_arrives(
        total in 1_usize..3_000_000,
        lens in proptest::collection::vec(prop_oneof![1_usize..200, Just(64), Just(16_384), Just(98_304), 1_usize..400_000], 1..6),
        base in prop_oneof![Just(0_u64), Just(64), Just(4096), 0_u64..5000],
        read in any::<bool>(),
    ) {
        prop_assume!(total / lens.iter().min().unwrap() < 40_000);
        let mut pieces = scattered(total, &lens);
        for p in &mut pieces {
            p.remote_offset += base;
        }
        let reach = pieces.iter().map(|p| p.local_offset + p.len).max().unwrap() as usize;
        let op = if read { Op::Read } else { Op::Write };
        let (local, remote) = (noise(reach, 5), noise(total + base as usize, 9));
        let (local, remote) = (memory(&local), memory(&remote));
        let segments = (total as u64).div_ceil(SEGMENT);
        let digests = Arc::new(SegmentDigests {
            base,
            len: total as u64,
            hashes: (0..segments).map(|_| AtomicU64::new(0)).collect(),
        });
        let mut job = job(op, &local, pieces.clone(), Integrity::Full);
        job.digest = Some(Arc::clone(&digests));
        run(&job, &remote);
        prop_assert_eq!(job.tracker.error(), None);
        let (near, far) = (bytes(&local), bytes(&remote));
        for p in &pieces {
            let (l, r, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            prop_assert!(near[l..l + n] == far[r..r + n]);
        }
        let written = &far[base as usize..];
        for (hash, segment) in digests.hashes.iter().zip(written.chunks(SEGMENT as usize)) {
            prop_assert_eq!(hash.load(Ordering::Acquire), xxhash_rust::xxh3::xxh3_64(segment));
        }
        // The same from the local side alone.
        let again = SegmentDigests { base, len: total as u64, hashes: (0..segments).map(|_| AtomicU64::new(0)).collect() };
        let slice = Slice { first: 0, skip: 0, end: pieces.len(), bytes: total as u64, position: 0, cut: false };
        // SAFETY: the pieces lie inside the local memory.
        unsafe { digest_local(&job, &slice, &again) };
        for (a, b) in again.hashes.iter().zip(&digests.hashes) {
            prop_assert_eq!(a.load(Ordering::Acquire), b.load(Ordering::Acquire));
        }
        // And at rest, at the side where they arrived.
        let runs: Vec<_> = pieces.iter().map(|p| (p.local_offset, p.len)).collect();
        let at_rest = segment_hashes(&local, &runs).unwrap();
        prop_assert_eq!(&at_rest, &segment_hashes(&remote, &[(base, total as u64)]).unwrap());
        prop_assert!(at_rest.iter().zip(&digests.hashes).all(|(a, b)| *a == b.load(Ordering::Acquire)));
        prop_assert!(segment_hashes(&remote, &[(base + 1, total as u64)]).is_err());
    }

    #[test]
    fn every_level_moves_every_byte(
        total in 1_usize..6_000_000,
        lens in proptest::collection::vec(1_usize..3_000_000, 1..5),
        level in prop_oneof![Just(Integrity::Off), Just(Integrity::Bound), Just(Integrity::Full)],
        read in any::<bool>(),
    ) {
        prop_assume!(total / lens.iter().min().unwrap() < 40_000);
        let pieces = scattered(total, &lens);
        let reach = pieces.iter().map(|p| p.local_offset + p.len).max().unwrap() as usize;
        let (local, remote) = (memory(&noise(reach, 5)), memory(&noise(total, 9)));
        let before = if read { bytes(&remote) } else { bytes(&local) };
        let job = job(if read { Op::Read } else { Op::Write }, &local, pieces.clone(), level);
        run(&job, &remote);
        prop_assert_eq!(job.tracker.error(), None);
        prop_assert_eq!(job.tracker.bytes_done(), total as u64);
        let (near, far) = (bytes(&local), bytes(&remote));
        let source_is_untouched = if read { before == far } else { before == near };
        prop_assert!(source_is_untouched);
        for p in &pieces {
            let (l, r, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            prop_assert!(near[l..l + n] == far[r..r + n]);
        }
    }
}

#[test]
fn samples_lie_inside_and_cover_both_ends() {
    for lens in [vec![1], vec![64], vec![200, 1, 1, 63], vec![1 << 20; 3], vec![16_384; 128]] {
        let total: usize = lens.iter().sum();
        let pieces = scattered(total, &lens);
        let local = memory(&vec![0; total + 10 + pieces.len()]);
        let job = job(Op::Write, &local, pieces.clone(), Integrity::Bound);
        let slice =
            Slice { first: 0, skip: 0, end: pieces.len(), bytes: total as u64, position: 0, cut: false };
        let samples = samples(&job, &slice);
        assert!(samples.len() as u64 >= slice.bytes / (128 << 10));
        for s in &samples {
            let p = pieces[s.piece];
            assert!(
                s.len > 0 && s.local >= p.local_offset && s.local + s.len as u64 <= p.local_offset + p.len
            );
            assert_eq!(s.local - p.local_offset, s.remote - p.remote_offset);
        }
        assert_eq!(samples[0].remote, 0);
        let last = samples.last().unwrap();
        assert_eq!(last.remote + last.len as u64, total as u64);
    }
}

#[test]
fn bound_notices_destinations_that_overlap() {
    let local = memory(&noise(4 << 20, 1));
    let remote = Memory::anonymous(4 << 20).unwrap();
    let half = 2 << 20;
    let pieces = vec![
        Piece { local_offset: 0, remote_offset: 0, len: half / 2 },
        Piece { local_offset: half, remote_offset: 0, len: half / 2 },
    ];
    let bound = job(Op::Write, &local, pieces.clone(), Integrity::Bound);
    run(&bound, &remote);
    assert_eq!(bound.tracker.outcome(0), Some(Outcome::Failed(ErrorCode::Corrupt)));
    assert_eq!(bound.tracker.outcome(1), Some(Outcome::Done));
    assert!(bound.tracker.detail().unwrap().contains("piece 0"));
    let off = job(Op::Write, &local, pieces, Integrity::Off);
    run(&off, &remote);
    assert_eq!(off.tracker.error(), None);
}

#[test]
fn full_notices_a_source_that_changes() {
    let local = memory(&noise(1 << 20, 1));
    let remote = Memory::anonymous(1 << 20).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (other, end) = (Arc::clone(&local), Arc::clone(&stop));
    let writer = std::thread::spawn(move || {
        let mut n = 0_u8;
        while !end.load(Ordering::Acquire) {
            n = n.wrapping_add(1);
            other.write_at(500_000, &[n; 5000]).unwrap();
        }
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut noticed = false;
    while !noticed && Instant::now() < deadline {
        let piece = Piece { local_offset: 0, remote_offset: 0, len: 1 << 20 };
        let job = job(Op::Write, &local, vec![piece], Integrity::Full);
        run(&job, &remote);
        noticed = job.tracker.error() == Some(ErrorCode::Corrupt);
    }
    stop.store(true, Ordering::Release);
    writer.join().unwrap();
    assert!(noticed);
}
