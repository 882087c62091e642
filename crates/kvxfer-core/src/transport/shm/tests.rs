use super::*;
use crate::memory::HugePages;
use crate::transport::testing::{PeerProcess, backwards, bytes, digests, job, noise, peer_info, soon, whole};
use crate::transport::{Op, Outcome, Piece};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Signal;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

fn transport() -> Arc<ShmTransport> {
    let config = AgentConfig::default();
    ShmTransport::new(&config, &Mover::new(&config)).unwrap()
}

fn connect(peer: &PeerProcess) -> Arc<dyn Link> {
    transport().connect(&peer.info(), &peer.shm_offer, soon()).unwrap()
}

fn filled(len: u64, seed: u64) -> Arc<Memory> {
    let memory = Memory::shared(len as usize, HugePages::Try).unwrap();
    memory.write_at(0, &noise(len as usize, seed)).unwrap();
    memory
}

/// What arrives when pieces of `size` are laid down backwards.
fn turned(bytes: &[u8], size: usize) -> Vec<u8> {
    bytes.chunks(size).rev().flatten().copied().collect()
}

#[test]
fn writes_and_reads_another_process_at_every_level() {
    let len = 12 << 20;
    let peer = PeerProcess::start("shared", len);
    let link = connect(&peer);
    let key = link.import(peer.shm_ticket()).unwrap();
    for (i, integrity) in [Integrity::Off, Integrity::Bound, Integrity::Full].into_iter().enumerate() {
        for size in [4096, 16 << 10, 3 << 20] {
            let seed = 10 * i as u64 + size;
            let near = filled(len, seed);
            let write = job(Op::Write, &near, key, backwards(len, size), integrity);
            let (tracker, transfer) = (Arc::clone(&write.tracker), write.transfer);
            link.submit(write).unwrap();
            while size > 4096 && link.assist(transfer) {}
            assert!(tracker.wait_until(soon()));
            assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
            let sent = turned(&bytes(&near), size as usize);
            assert_eq!(peer.hash(), xxhash_rust::xxh3::xxh3_64(&sent), "{integrity:?} {size}");

            assert_eq!(peer.ask(&format!("fill {}", seed + 1)), b"ok");
            let read = job(Op::Read, &near, key, backwards(len, size), integrity);
            let tracker = Arc::clone(&read.tracker);
            link.submit(read).unwrap();
            assert!(tracker.wait_until(soon()));
            assert_eq!(tracker.error(), None);
            assert!(bytes(&near) == turned(&noise(len as usize, seed + 1), size as usize));
        }
    }
}

#[test]
fn digests_fit_what_the_peer_sees() {
    let len = (5 << 20) + 12_345;
    let peer = PeerProcess::start("shared", len);
    let link = connect(&peer);
    let key = link.import(peer.shm_ticket()).unwrap();
    let near = filled(len, 5);
    let mut write = job(Op::Write, &near, key, whole(len), Integrity::Full);
    let digests = digests(len);
    write.digest = Some(Arc::clone(&digests));
    let tracker = Arc::clone(&write.tracker);
    link.submit(write).unwrap();
    assert!(tracker.wait_until(soon()));
    let theirs = Memory::from_fd(peer.shm_ticket().fd.unwrap(), len as usize).unwrap();
    for (hash, segment) in digests.hashes.iter().zip(bytes(&theirs).chunks(256 << 10)) {
        assert_eq!(hash.load(Ordering::Acquire), xxhash_rust::xxh3::xxh3_64(segment));
    }
}

#[test]
fn a_region_is_mapped_once_and_unmapped_with_the_last_user() {
    let peer = PeerProcess::start("shared", 1 << 20);
    let link = connect(&peer);
    let key = link.import(peer.shm_ticket()).unwrap();
    assert_eq!(link.import(peer.shm_ticket()).unwrap(), key);
    assert!(link.describe().contains("1 pools mapped, 1048576 bytes"), "{}", link.describe());
    let near = filled(1 << 20, 1);
    link.forget(key);
    link.submit(job(Op::Write, &near, key, whole(100), Integrity::Bound)).unwrap();
    link.forget(key);
    let e = link.submit(job(Op::Write, &near, key, whole(100), Integrity::Bound)).unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotFound);
    link.forget(key);
    // Another file under the same id is another mapping.
    let other = RemoteTicket { fd: Some(sealed(1 << 20)), ..peer.shm_ticket() };
    let first = link.import(peer.shm_ticket()).unwrap();
    assert_ne!(link.import(other).unwrap(), first);
    assert!(link.describe().contains("2 pools"));
    link.close();
    assert!(link.describe().contains("0 pools"));
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn sealed(len: u64) -> OwnedFd {
    memfd(len, SealFlags::SHRINK | SealFlags::GROW)
}

#[test]
fn hostile_tickets_are_refused() {
    let peer = PeerProcess::start("shared", 1 << 20);
    let link = connect(&peer);
    let good = || peer.shm_ticket();
    let lengthened = |len: u64, fd: Option<OwnedFd>| {
        let mut payload = vec![VERSION];
        payload.extend_from_slice(&len.to_le_bytes());
        RemoteTicket { len, payload, fd, ..good() }
    };
    let bad = [
        RemoteTicket { fd: None, ..good() },
        RemoteTicket { payload: vec![], ..good() },
        RemoteTicket { payload: vec![9; 9], ..good() },
        RemoteTicket { payload: vec![VERSION; 4000], ..good() },
        RemoteTicket { len: good().len + 1, ..good() },
        RemoteTicket { fd: Some(memfd(1 << 20, SealFlags::empty())), ..good() },
        RemoteTicket { fd: Some(sealed((1 << 20) - 1)), ..good() },
        RemoteTicket { fd: Some(tempfile::tempfile().unwrap().into()), ..good() },
        RemoteTicket { fd: Some(rustix::pipe::pipe().unwrap().0), ..good() },
        lengthened(1 << 40, Some(sealed(1 << 20))),
    ];
    for ticket in bad {
        let text = format!("{ticket:?}");
        let e = link.import(ticket).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Protocol, "{text}: {e}");
    }
    for len in [0, u64::MAX] {
        assert_eq!(
            link.import(lengthened(len, Some(sealed(4096)))).unwrap_err().code(),
            ErrorCode::InvalidArgument
        );
    }
    // The link goes on.
    link.import(good()).unwrap();
}

#[test]
fn hostile_offers_are_refused() {
    let peer = PeerProcess::start("shared", 4096);
    let shm = transport();
    let refused = |info: &PeerInfo, offer: &[u8]| shm.connect(info, offer, soon()).err().unwrap().code();
    let good = peer.shm_offer.clone();
    assert_eq!(refused(&peer.info(), b""), ErrorCode::Protocol);
    assert_eq!(refused(&peer.info(), &good[..5]), ErrorCode::Protocol);
    assert_eq!(refused(&peer.info(), &[good.clone(), vec![0]].concat()), ErrorCode::Protocol);
    assert_eq!(refused(&peer.info(), &[&[2], &good[1..]].concat()), ErrorCode::Protocol);
    // The id of another process, or of a process that has taken the id over.
    assert_eq!(refused(&peer_info(std::process::id()), &good), ErrorCode::Protocol);
    let mut later = good.clone();
    later[5] ^= 1;
    assert_eq!(refused(&peer.info(), &later), ErrorCode::Unreachable);
    let elsewhere = PeerInfo { same_host: false, ..peer.info() };
    assert_eq!(refused(&elsewhere, &good), ErrorCode::Unreachable);
    assert!(shm.offer(&elsewhere).is_none());
}

#[test]
fn a_pool_in_use_cannot_be_pulled_away() {
    let peer = PeerProcess::start("shared", 4 << 20);
    let link = connect(&peer);
    let ticket = peer.shm_ticket();
    let fd = ticket.fd.as_ref().unwrap().try_clone().unwrap();
    let key = link.import(ticket).unwrap();
    assert_eq!(rustix::fs::ftruncate(&fd, 0), Err(rustix::io::Errno::PERM));
    // A hole is allowed to the owner; it reads as zeroes and is written like any page.
    rustix::fs::fallocate(
        &fd,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        0,
        4 << 20,
    )
    .unwrap();
    let near = filled(4 << 20, 9);
    let write = job(Op::Write, &near, key, whole(4 << 20), Integrity::Full);
    let tracker = Arc::clone(&write.tracker);
    link.submit(write).unwrap();
    assert!(tracker.wait_until(soon()));
    assert_eq!(tracker.error(), None);
    assert_eq!(peer.hash(), xxhash_rust::xxh3::xxh3_64(&bytes(&near)));
}

#[test]
fn a_peer_killed_or_stopped_in_the_middle_ends_every_job() {
    for signal in [Signal::KILL, Signal::STOP] {
        let len = 64 << 20;
        let peer = PeerProcess::start("shared", len);
        let link = connect(&peer);
        let key = link.import(peer.shm_ticket()).unwrap();
        let near = filled(len, 3);
        let trackers: Vec<_> = (0..6)
            .map(|_| {
                let write = job(Op::Write, &near, key, backwards(len, 64 << 10), Integrity::Bound);
                let tracker = Arc::clone(&write.tracker);
                link.submit(write).unwrap();
                tracker
            })
            .collect();
        assert!(!link.fenced());
        peer.signal(signal);
        link.close();
        for tracker in &trackers {
            assert!(tracker.wait_until(soon()));
            for i in 0..tracker.pieces() {
                let outcome = tracker.outcome(i).unwrap();
                assert!([Outcome::Done, Outcome::Failed(ErrorCode::PeerGone)].contains(&outcome));
            }
        }
        // A stopped process may go on: only its end fences it.
        if signal == Signal::STOP {
            assert!(!link.fenced());
            peer.signal(Signal::KILL);
        }
        while !link.fenced() {
            assert!(Instant::now() < soon());
            std::thread::yield_now();
        }
        let piece = Piece { local_offset: 0, remote_offset: 0, len: 1 };
        let e = link.submit(job(Op::Write, &near, key, vec![piece], Integrity::Off)).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Closed);
    }
}

#[test]
fn limits_of_the_process_are_errors_with_a_remedy() {
    let peer = PeerProcess::start("shared", 4096);
    let text = String::from_utf8(peer.ask("no-descriptors")).unwrap();
    for part in text.split('|') {
        assert!(part.contains("ulimit -n"), "{text}");
    }
    let text = String::from_utf8(peer.ask("small-files")).unwrap();
    assert!(text.contains("2097152") && text.contains("1048576") && text.contains("ulimit -f"), "{text}");
    let peer = PeerProcess::start("shared", 4096);
    let text = String::from_utf8(peer.ask("small-address-space")).unwrap();
    for part in text.split('|') {
        assert!(part.contains("536870912"), "{text}");
    }
}

#[test]
fn only_memfds_get_a_ticket() {
    let shm = transport();
    assert!(shm.ticket(RegionId(1), &Memory::anonymous(10).unwrap()).unwrap().is_none());
    let ticket = shm.ticket(RegionId(1), &filled(10, 1)).unwrap().unwrap();
    assert!(ticket.fd.is_some());
}
