use super::*;
use crate::transport::testing::{PeerProcess, backwards, bytes, digests, job, noise, peer_info, soon, whole};
use crate::transport::{Op, Outcome, Piece};
use rustix::process::Signal;
use std::sync::atomic::Ordering;

fn transport() -> Arc<CmaTransport> {
    let config = AgentConfig::default();
    CmaTransport::new(&config, &Mover::new(&config)).unwrap()
}

fn connect(peer: &PeerProcess) -> Arc<dyn Link> {
    transport().connect(&peer.info(), &peer.cma_offer, soon()).unwrap()
}

fn filled(len: u64, seed: u64) -> Arc<Memory> {
    let memory = Memory::anonymous(len as usize).unwrap();
    memory.write_at(0, &noise(len as usize, seed)).unwrap();
    memory
}

fn turned(bytes: &[u8], size: usize) -> Vec<u8> {
    bytes.chunks(size).rev().flatten().copied().collect()
}

#[test]
fn writes_and_reads_every_kind_of_memory_at_every_level() {
    let len = 6 << 20;
    for kind in ["shared", "anonymous", "foreign"] {
        let peer = PeerProcess::start(kind, len);
        let link = connect(&peer);
        let key = link.import(peer.cma_ticket()).unwrap();
        for (i, integrity) in [Integrity::Off, Integrity::Bound, Integrity::Full].into_iter().enumerate() {
            for size in [1024, 16 << 10, 3 << 20] {
                let seed = 10 * i as u64 + size;
                let near = filled(len, seed);
                let write = job(Op::Write, &near, key, backwards(len, size), integrity);
                let tracker = Arc::clone(&write.tracker);
                link.submit(write).unwrap();
                assert!(tracker.wait_until(soon()));
                assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
                assert_eq!(tracker.bytes_done(), len);
                let sent = turned(&bytes(&near), size as usize);
                assert_eq!(peer.hash(), xxhash_rust::xxh3::xxh3_64(&sent), "{kind} {integrity:?} {size}");

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
}

#[test]
fn neighbours_are_joined_and_odd_pieces_arrive() {
    let len: u64 = 3_000_000;
    let peer = PeerProcess::start("anonymous", len);
    let link = connect(&peer);
    let key = link.import(peer.cma_ticket()).unwrap();
    let near = filled(len, 1);
    // Adjacent here and scattered there, then the other way round, then adjacent on both sides.
    let count = len / 1000;
    let scatter = |i: u64| i * 7 % count * 1000;
    assert_eq!(count % 7, 4);
    let shapes: [Vec<Piece>; 3] = [
        (0..count).map(|i| Piece { local_offset: i * 1000, remote_offset: scatter(i), len: 1000 }).collect(),
        (0..count).map(|i| Piece { local_offset: scatter(i), remote_offset: i * 1000, len: 1000 }).collect(),
        (0..count).map(|i| Piece { local_offset: i * 1000, remote_offset: i * 1000, len: 1000 }).collect(),
    ];
    for pieces in shapes {
        let write = job(Op::Write, &near, key, pieces.clone(), Integrity::Full);
        let tracker = Arc::clone(&write.tracker);
        link.submit(write).unwrap();
        assert!(tracker.wait_until(soon()));
        assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
        let (sent, mut expected) = (bytes(&near), vec![0; len as usize]);
        for p in &pieces {
            let (l, r, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            expected[r..r + n].copy_from_slice(&sent[l..l + n]);
        }
        assert_eq!(peer.hash(), xxhash_rust::xxh3::xxh3_64(&expected));
    }
}

#[test]
fn digests_fit_what_the_peer_sees() {
    let len = (2 << 20) + 777;
    let peer = PeerProcess::start("anonymous", len);
    let link = connect(&peer);
    let key = link.import(peer.cma_ticket()).unwrap();
    let near = filled(len, 5);
    let mut write = job(Op::Write, &near, key, whole(len), Integrity::Full);
    let digests = digests(len);
    write.digest = Some(Arc::clone(&digests));
    let tracker = Arc::clone(&write.tracker);
    link.submit(write).unwrap();
    assert!(tracker.wait_until(soon()));
    let sent = bytes(&near);
    assert_eq!(peer.hash(), xxhash_rust::xxh3::xxh3_64(&sent));
    for (hash, segment) in digests.hashes.iter().zip(sent.chunks(256 << 10)) {
        assert_eq!(hash.load(Ordering::Acquire), xxhash_rust::xxh3::xxh3_64(segment));
    }
}

#[test]
fn memory_that_is_not_there_fails_its_pieces_only() {
    let len: u64 = 4 << 20;
    let peer = PeerProcess::start("anonymous", len);
    let link = connect(&peer);
    // A ticket that promises more than there is; the kernel maps nothing at the end of this address range.
    let mut ticket = peer.cma_ticket();
    let (address, promised) = (0x1000_u64, 1_u64 << 30);
    ticket.payload = [&[VERSION][..], &address.to_le_bytes(), &promised.to_le_bytes()].concat();
    ticket.len = promised;
    let nowhere = link.import(ticket).unwrap();
    let near = filled(len, 1);
    for (integrity, size) in [(Integrity::Off, 1 << 20), (Integrity::Full, 4096), (Integrity::Bound, 64)] {
        let write = job(Op::Write, &near, nowhere, backwards(1 << 20, size), integrity);
        let tracker = Arc::clone(&write.tracker);
        link.submit(write).unwrap();
        assert!(tracker.wait_until(soon()));
        assert_eq!(tracker.error(), Some(ErrorCode::Transport));
        assert_eq!(tracker.failed_pieces() as usize, tracker.pieces());
        assert!(tracker.detail().unwrap().contains("not mapped"), "{:?}", tracker.detail());
    }
    // A hole in our own memory: the pieces around it arrive.
    let page = 4096;
    // SAFETY: a fresh private mapping, and then a hole in the middle of it.
    let base = unsafe {
        let base = libc::mmap(
            std::ptr::null_mut(),
            3 * page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(base, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(base.cast::<u8>().add(page).cast(), page, libc::PROT_NONE), 0);
        base.cast::<u8>()
    };
    // SAFETY: deliberately against the promise (the middle page cannot be read), as a careless caller would; the
    // kernel is the only one to touch it here.
    let holed = unsafe { Memory::foreign(base, 3 * page) }.unwrap();
    let key = link.import(peer.cma_ticket()).unwrap();
    let pieces: Vec<_> = (0..3)
        .map(|i| Piece { local_offset: i * page as u64, remote_offset: (2 - i) * 8192, len: page as u64 })
        .collect();
    let write = job(Op::Write, &holed, key, pieces, Integrity::Off);
    let tracker = Arc::clone(&write.tracker);
    link.submit(write).unwrap();
    assert!(tracker.is_finished());
    let outcomes: Vec<_> = (0..3).map(|i| tracker.outcome(i).unwrap()).collect();
    let hole = Outcome::Failed(ErrorCode::Transport);
    assert_eq!(outcomes, [Outcome::Done, hole, Outcome::Done]);
    drop(holed);
    // SAFETY: the mapping made above, used no more.
    unsafe { libc::munmap(base.cast(), 3 * page) };
}

#[test]
fn hostile_tickets_are_refused() {
    let peer = PeerProcess::start("anonymous", 1 << 20);
    let link = connect(&peer);
    let ticket = |address: u64, len: u64| RemoteTicket {
        len,
        payload: [&[VERSION][..], &address.to_le_bytes(), &len.to_le_bytes()].concat(),
        ..peer.cma_ticket()
    };
    for bad in [
        ticket(0, 4096),
        ticket(4096, 0),
        ticket(u64::MAX - 10, 100),
        ticket(4096, u64::MAX),
        ticket(USER_LIMIT - 1, 2),
        RemoteTicket { len: 1, ..peer.cma_ticket() },
        RemoteTicket { payload: vec![], ..peer.cma_ticket() },
        RemoteTicket { payload: vec![VERSION; 16], ..peer.cma_ticket() },
        RemoteTicket { payload: vec![VERSION; 4000], ..peer.cma_ticket() },
    ] {
        let text = format!("{bad:?}");
        assert_eq!(link.import(bad).unwrap_err().code(), ErrorCode::Protocol, "{text}");
    }
    link.import(peer.cma_ticket()).unwrap();
}

#[test]
fn the_probe_finds_wrong_processes() {
    let mut peer = PeerProcess::start("anonymous", 4096);
    let cma = transport();
    let refused = |info: &PeerInfo, offer: &[u8]| cma.connect(info, offer, soon()).err().unwrap();
    let good = peer.cma_offer.clone();
    for bad in [&good[..good.len() - 1], &[good.clone(), vec![0]].concat(), b"", &[&[2], &good[1..]].concat()]
    {
        assert_eq!(refused(&peer.info(), bad).code(), ErrorCode::Protocol);
    }
    // The right process, another secret; an address where nothing is.
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    assert!(refused(&peer.info(), &other).to_string().contains("another process"));
    let mut nowhere = good.clone();
    nowhere[13..21].copy_from_slice(&8_u64.to_le_bytes());
    assert_eq!(refused(&peer.info(), &nowhere).code(), ErrorCode::Unreachable);
    // Another process under the peer's name.
    let stranger = PeerProcess::start("anonymous", 4096);
    let mut claimed = stranger.cma_offer.clone();
    claimed[13..].copy_from_slice(&good[13..]);
    assert_eq!(refused(&stranger.info(), &claimed).code(), ErrorCode::Unreachable);
    assert_eq!(refused(&peer_info(std::process::id()), &good).code(), ErrorCode::Protocol);
    peer.kill();
    assert_eq!(refused(&peer.info(), &good).code(), ErrorCode::Unreachable);
    assert!(cma.offer(&PeerInfo { same_host: false, ..stranger.info() }).is_none());
}

#[test]
fn forbidden_access_is_found_at_connect() {
    let peer = PeerProcess::start("anonymous", 4096);
    assert_eq!(peer.ask("undumpable"), b"ok");
    let (info, offer) = (peer.info(), peer.cma_offer.clone());
    // Capabilities belong to a thread; this one gives up what lets root reach everything.
    let error = std::thread::spawn(move || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::SYS_PTRACE);
        rustix::thread::set_capabilities(None, sets).unwrap();
        transport().connect(&info, &offer, soon()).err().unwrap()
    })
    .join()
    .unwrap();
    assert_eq!(error.code(), ErrorCode::NotAvailable, "{error}");
    assert!(error.to_string().contains("dumpable") && error.to_string().contains("ptrace_scope"), "{error}");
}

#[test]
fn a_peer_killed_in_the_middle_ends_every_job() {
    let len = 64 << 20;
    for round in 0..4 {
        let peer = PeerProcess::start("anonymous", len);
        let link = connect(&peer);
        let key = link.import(peer.cma_ticket()).unwrap();
        let near = filled(len, 3);
        let trackers: Vec<_> = (0..4)
            .map(|i| {
                let op = if i % 2 == 0 { Op::Write } else { Op::Read };
                let job = job(op, &near, key, backwards(len, 64 << 10), Integrity::Bound);
                let tracker = Arc::clone(&job.tracker);
                link.submit(job).unwrap();
                tracker
            })
            .collect();
        std::thread::sleep(std::time::Duration::from_millis(round));
        peer.signal(Signal::KILL);
        // Nobody tells the link: it finds out by itself.
        for tracker in &trackers {
            assert!(tracker.wait_until(soon()));
        }
        let last = trackers.last().unwrap();
        assert!([None, Some(ErrorCode::PeerGone)].contains(&last.error()), "{:?}", last.detail());
        while !link.fenced() {
            std::thread::yield_now();
        }
        let late = job(Op::Write, &near, key, whole(10), Integrity::Off);
        let tracker = Arc::clone(&late.tracker);
        link.submit(late).unwrap();
        assert_eq!(tracker.error(), Some(ErrorCode::PeerGone));
        link.close();
        let e = link.submit(job(Op::Write, &near, key, whole(10), Integrity::Off)).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Closed);
    }
}
