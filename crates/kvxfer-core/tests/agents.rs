//! Two agents: connecting, exporting, moving bytes, notifying; over every transport that carries between them.

mod common;

use common::{LONG, pair_with, pattern};
use kvxfer_core::transport::fault::FaultPlan;
use kvxfer_core::transport::{Outcome, Piece};
use kvxfer_core::{
    Access, Agent, AgentConfig, Error, ErrorCode, Memory, Peer, PeerState, Region, RemoteRegion,
    TransferOptions, TransportKind,
};
use std::time::Duration;

const LEN: usize = 1 << 20;

#[test]
fn write_read_and_notify_over_every_transport_in_one_process() {
    for kind in [TransportKind::Inproc, TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp] {
        let Some((a, b, peer)) = pair_with(&[kind]) else { continue };
        let source = a.allocate(LEN).unwrap();
        let target = b.allocate(LEN).unwrap();
        source.memory().write_at(0, &pattern(LEN, 1)).unwrap();
        b.export(&target, "pool", Access::ReadWrite).unwrap();
        let remote = peer.region("pool", LONG).unwrap();
        assert_eq!(remote.len(), LEN as u64);
        assert_eq!(remote.transports(), [kind]);

        let pieces: Vec<Piece> = (0..16u64)
            .map(|i| Piece { local_offset: i << 16, remote_offset: (15 - i) << 16, len: 1 << 16 })
            .collect();
        let options = TransferOptions { notify: Some(b"done".to_vec()), ..TransferOptions::default() };
        let transfer = peer.write(&source, &remote, &pieces, options).unwrap();
        let report = transfer.wait(LONG).unwrap();
        report.ok().unwrap();
        assert_eq!((report.transport, report.bytes, report.pieces, report.failed), (kind, LEN as u64, 16, 0));
        assert!((0..16).all(|i| transfer.outcome(i) == Some(Outcome::Done)));
        assert_eq!(transfer.outcome(16), None);
        let told = b.notification(LONG).unwrap().unwrap();
        assert_eq!((told.peer.as_str(), told.payload.as_slice()), (a.name().as_str(), &b"done"[..]));
        for p in &pieces {
            let mut got = vec![0; p.len as usize];
            let mut sent = got.clone();
            target.memory().read_at(p.remote_offset, &mut got).unwrap();
            source.memory().read_at(p.local_offset, &mut sent).unwrap();
            assert!(got == sent, "{kind}: piece {p:?}");
        }

        let back = a.allocate(LEN).unwrap();
        let all = [Piece { local_offset: 0, remote_offset: 0, len: LEN as u64 }];
        peer.read(&back, &remote, &all, TransferOptions::default())
            .unwrap()
            .wait(LONG)
            .unwrap()
            .ok()
            .unwrap();
        let (mut x, mut y) = (vec![0; LEN], vec![0; LEN]);
        back.memory().read_at(0, &mut x).unwrap();
        target.memory().read_at(0, &mut y).unwrap();
        assert!(x == y, "{kind}");

        // The other direction, over the connection that b did not open.
        let to_a = b.peer(a.name().as_str()).unwrap();
        to_a.notify(b"hello").unwrap();
        assert_eq!(a.notification(LONG).unwrap().unwrap().payload, b"hello");
        let stats = peer.stats();
        assert_eq!((stats.paths[0].write.bytes, stats.paths[0].read.bytes), (LEN as u64, LEN as u64));
        assert!(a.metrics().contains(&format!("transport=\"{kind}\"")));
        a.shutdown(LONG).unwrap();
        b.shutdown(LONG).unwrap();
    }
}

#[test]
fn bad_input_is_refused_before_anything_moves() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let region = a.allocate(4096).unwrap();
    let target = b.allocate(4096).unwrap();
    b.export(&target, "r", Access::Write).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    let piece = |l, r, n| [Piece { local_offset: l, remote_offset: r, len: n }];
    let submit = |pieces: &[Piece], o| peer.write(&region, &remote, pieces, o).map(|_| ());
    let o = TransferOptions::default;
    for (pieces, code) in [
        (&[][..], ErrorCode::InvalidArgument),
        (&piece(0, 0, 0), ErrorCode::InvalidArgument),
        (&piece(1, 0, 4096), ErrorCode::OutOfRange),
        (&piece(0, 4097, 1), ErrorCode::OutOfRange),
        (&piece(0, u64::MAX, 2), ErrorCode::OutOfRange),
        (&piece(u64::MAX, 0, u64::MAX), ErrorCode::OutOfRange),
    ] {
        assert_eq!(submit(pieces, o()).unwrap_err().code(), code, "{pieces:?}");
    }
    let e = submit(&piece(0, 0, 1), TransferOptions { notify: Some(vec![0; 5000]), ..o() }).unwrap_err();
    assert!(e.to_string().contains("5000"), "{e}");
    let e = submit(&piece(0, 0, 1), TransferOptions { transport: Some(TransportKind::CudaIpc), ..o() })
        .unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotAvailable);
    // Exported for writing only.
    assert_eq!(
        peer.read(&region, &remote, &piece(0, 0, 1), o()).unwrap_err().code(),
        ErrorCode::InvalidArgument
    );
    // A region of another agent.
    assert_eq!(
        peer.write(&target, &remote, &piece(0, 0, 1), o()).unwrap_err().code(),
        ErrorCode::InvalidArgument
    );
    assert_eq!(peer.region("nothing", LONG).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(peer.region("bad\nname", LONG).unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(b.export(&target, "r", Access::Read).unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(b.unexport("nothing").unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(peer.notify(&[0; 4097]).unwrap_err().code(), ErrorCode::InvalidArgument);
    assert!(a.try_notification().is_none() && b.try_notification().is_none());
    let mut bytes = [1u8; 4096];
    target.memory().read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn an_unexported_region_is_out_of_reach() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let (region, target) = (a.allocate(64).unwrap(), b.allocate(64).unwrap());
    b.export(&target, "r", Access::ReadWrite).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    b.unexport("r").unwrap();
    common::eventually("the export is taken back", || !remote.is_valid());
    let e = peer
        .write(
            &region,
            &remote,
            &[Piece { local_offset: 0, remote_offset: 0, len: 1 }],
            TransferOptions::default(),
        )
        .unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotFound);
    assert_eq!(peer.region("r", LONG).unwrap_err().code(), ErrorCode::NotFound);
}

#[test]
fn connecting_again_gives_the_same_peer_and_crossing_calls_give_one() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let again = a.connect(&b.addresses()[0], LONG).unwrap();
    assert_eq!((again.name(), again.epoch()), (peer.name(), peer.epoch()));
    assert_eq!((a.peers().len(), b.peers().len()), (1, 1));
    for _ in 0..20 {
        let (x, y) = (common::agent(&[]), common::agent(&[]));
        let (ax, ay) = (x.addresses()[0].clone(), y.addresses()[0].clone());
        std::thread::scope(|s| {
            let calls = [s.spawn(|| x.connect(&ay, LONG)), s.spawn(|| y.connect(&ax, LONG))];
            for call in calls {
                assert_eq!(call.join().unwrap().unwrap().state(), PeerState::Up);
            }
        });
        common::eventually("one peer each", || x.peers().len() == 1 && y.peers().len() == 1);
        x.peers()[0].notify(b"1").unwrap();
        assert_eq!(y.notification(LONG).unwrap().unwrap().payload, b"1");
    }
}

#[test]
fn a_disconnected_peer_is_gone_on_both_sides_and_can_come_back() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    peer.disconnect();
    assert_eq!(peer.state(), PeerState::Gone(ErrorCode::PeerGone));
    assert_eq!(peer.notify(b"x").unwrap_err().code(), ErrorCode::PeerGone);
    assert_eq!(peer.region("r", LONG).unwrap_err().code(), ErrorCode::PeerGone);
    common::eventually("b forgets a", || b.peers().is_empty());
    let back = a.connect(&b.addresses()[0], LONG).unwrap();
    back.notify(b"again").unwrap();
    assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"again");
}

#[test]
fn a_closed_agent_says_so() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let region = a.allocate(64).unwrap();
    a.shutdown(LONG).unwrap();
    for code in [
        a.connect(&b.addresses()[0], LONG).unwrap_err().code(),
        a.allocate(64).unwrap_err().code(),
        a.export(&region, "x", Access::Read).unwrap_err().code(),
        peer.notify(b"x").unwrap_err().code(),
        a.notification(Duration::ZERO).unwrap_err().code(),
    ] {
        assert_eq!(code, ErrorCode::Closed);
    }
    assert!(a.shutdown(LONG).is_ok(), "twice is fine");
    common::eventually("b is told", || b.peers().is_empty());
}

#[test]
fn unreachable_addresses_are_named() {
    let a = common::agent(&[]);
    let free = {
        let l = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("tcp://{}", l.local_addr().unwrap())
    };
    for (address, code) in [
        (free.as_str(), ErrorCode::Unreachable),
        ("tcp://no-such-host.invalid:1", ErrorCode::Unreachable),
        ("unix:///nonexistent/kvxfer.sock", ErrorCode::Unreachable),
        ("carrier-pigeon://x", ErrorCode::InvalidArgument),
    ] {
        let e = a.connect(address, Duration::from_secs(20)).unwrap_err();
        assert!(e.code() == code || e.code() == ErrorCode::TimedOut, "{e}");
        assert!(
            e.to_string().contains(address.rsplit("//").next().unwrap().split(':').next().unwrap()),
            "{e}"
        );
    }
    // Somebody listens and never answers.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", mute.local_addr().unwrap());
    let e = a.connect(&address, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(e, Error::TimedOut { .. }) && e.to_string().contains(&address), "{e}");
}

#[test]
fn unix_sockets_files_and_abstract_names_work() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("unix://@kvxfer-test-{}", std::process::id());
    let file = format!("unix://{}/s", dir.path().display());
    for address in [name, file] {
        let b = common::builder(&[]).listen(&address).build().unwrap();
        let a = common::agent(&[]);
        let peer = a.connect(&address, LONG).unwrap();
        peer.notify(b"x").unwrap();
        assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"x");
        b.shutdown(LONG).unwrap();
    }
    assert!(!dir.path().join("s").exists(), "the socket file goes with the agent");
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let a = common::agent(&[]);
    let address = a.addresses()[0].clone();
    let e = Agent::builder().listen(&address).build().unwrap_err();
    assert_eq!(e.code(), ErrorCode::AddressInUse);
    assert!(e.to_string().contains(&address), "{e}");
}

#[test]
fn regions_keep_their_memory_and_tell_when_they_are_shared() {
    let a = common::agent(&[]);
    let memory = Memory::anonymous(4096).unwrap();
    let region = a.register(memory.clone()).unwrap();
    assert!(!region.is_shared());
    a.export(&region, "m", Access::Read).unwrap();
    assert!(region.is_shared());
    a.unexport("m").unwrap();
    drop(region);
    common::eventually("the registration is taken back", || std::sync::Arc::strong_count(&memory) == 1);
}

#[test]
fn submitting_never_blocks_and_results_are_awaitable() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let (local, target) = (a.allocate(8 << 20).unwrap(), b.allocate(8 << 20).unwrap());
    b.export(&target, "r", Access::ReadWrite).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    let all = [Piece { local_offset: 0, remote_offset: 0, len: 8 << 20 }];
    let transfers: Vec<_> =
        (0..8).map(|_| peer.write(&local, &remote, &all, TransferOptions::default()).unwrap()).collect();
    for t in transfers {
        let report = common::block_on(t);
        assert_eq!((report.error, report.bytes), (None, 8 << 20));
    }
}

#[test]
fn the_event_descriptor_tells_of_transfers_and_notifications() {
    let (a, b, peer) = pair_with(&[]).unwrap();
    let (local, target) = (a.allocate(64).unwrap(), b.allocate(64).unwrap());
    b.export(&target, "r", Access::ReadWrite).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    for agent in [&a, &b] {
        assert!(common::readable(agent.event_fd(), LONG), "what was before counts as an event");
        agent.clear_event();
        assert!(!common::readable(agent.event_fd(), Duration::ZERO));
    }
    for i in 0..50u8 {
        let options = TransferOptions { notify: Some(vec![i]), ..TransferOptions::default() };
        let piece = [Piece { local_offset: 0, remote_offset: 0, len: 64 }];
        let t = peer.write(&local, &remote, &piece, options).unwrap();
        assert!(common::readable(a.event_fd(), LONG));
        a.clear_event();
        t.wait(LONG).unwrap().ok().unwrap();
        a.clear_event();
        assert!(common::readable(b.event_fd(), LONG));
        b.clear_event();
        assert_eq!(b.try_notification().unwrap().payload, [i]);
        assert!(b.try_notification().is_none());
        assert!(!common::readable(b.event_fd(), Duration::ZERO));
    }
}

fn faulty(plan: FaultPlan) -> (Agent, Agent, Peer, Region, RemoteRegion, Region) {
    let config = AgentConfig { faults: Some(plan), ..AgentConfig::default() };
    let a = Agent::builder().config(config).name(common::agent(&[]).name().as_str()).build().unwrap();
    let b = common::agent(&[]);
    let peer = a.connect(&b.addresses()[0], LONG).unwrap();
    let (local, target) = (a.allocate(4096).unwrap(), b.allocate(4096).unwrap());
    local.memory().write_at(0, &pattern(4096, 5)).unwrap();
    b.export(&target, "r", Access::ReadWrite).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    (a, b, peer, local, remote, target)
}

fn quarters() -> Vec<Piece> {
    (0..4u64).map(|i| Piece { local_offset: i << 10, remote_offset: i << 10, len: 1024 }).collect()
}

#[test]
fn a_transfer_that_hangs_ends_at_its_deadline_and_says_nothing_to_the_peer() {
    let (_a, b, peer, local, remote, _target) =
        faulty(FaultPlan { stall_after: Some(0), ..FaultPlan::default() });
    let options = TransferOptions {
        timeout: Some(Duration::from_millis(50)),
        notify: Some(b"never".to_vec()),
        ..TransferOptions::default()
    };
    let hung = peer.write(&local, &remote, &quarters(), options).unwrap();
    let e = hung.wait(Duration::from_millis(1)).unwrap_err();
    assert!(matches!(e, Error::TimedOut { .. }), "the wait is over, the transfer is not: {e}");
    let report = hung.wait(LONG).unwrap();
    assert_eq!((report.error, report.failed), (Some(ErrorCode::TimedOut), 4));
    assert!(report.detail.unwrap().contains("50ms"));
    assert_eq!(report.bytes, 0);
    peer.notify(b"first").unwrap();
    assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"first");
}

#[test]
fn a_cancelled_transfer_changes_no_byte_any_more() {
    let (_a, b, peer, local, remote, target) =
        faulty(FaultPlan { stall_after: Some(0), ..FaultPlan::default() });
    let hung = peer.write(&local, &remote, &quarters(), TransferOptions::default()).unwrap();
    common::eventually("the cancel is done", || hung.cancel());
    let before = common::bytes(target.memory());
    assert_eq!(hung.report().unwrap().error, Some(ErrorCode::Cancelled));
    local.memory().write_at(0, &[0xee; 4096]).unwrap();
    peer.notify(b"mark").unwrap();
    b.notification(LONG).unwrap().unwrap();
    assert!(before == common::bytes(target.memory()));
    assert!(hung.cancel(), "again is fine");
}

#[test]
fn outcomes_are_told_piece_by_piece() {
    let plan = FaultPlan { fail_after: Some(0), fail_at_piece: 2, ..FaultPlan::default() };
    let (_a, b, peer, local, remote, target) = faulty(plan);
    let options = TransferOptions { notify: Some(b"never".to_vec()), ..TransferOptions::default() };
    let t = peer.write(&local, &remote, &quarters(), options).unwrap();
    let report = t.wait(LONG).unwrap();
    assert_eq!((report.error, report.failed, report.bytes), (Some(ErrorCode::Transport), 2, 2048));
    let outcomes: Vec<_> = (0..4).map(|i| t.outcome(i).unwrap()).collect();
    let failed = Outcome::Failed(ErrorCode::Transport);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, failed, failed]);
    assert!(common::bytes(target.memory())[..2048] == pattern(4096, 5)[..2048]);
    assert!(b.try_notification().is_none());
    assert_eq!(peer.stats().paths.iter().map(|p| p.write.failed).sum::<u64>(), 1);
}

#[test]
fn a_region_lives_as_long_as_its_transfers() {
    let (_a, _b, peer, local, remote, _target) =
        faulty(FaultPlan { stall_after: Some(0), ..FaultPlan::default() });
    let memory = local.memory().clone();
    let hung = peer.write(&local, &remote, &quarters(), TransferOptions::default()).unwrap();
    drop(local);
    assert!(std::sync::Arc::strong_count(&memory) > 1, "the transfer keeps it");
    common::eventually("the cancel is done", || hung.cancel());
    drop(hung);
    common::eventually("the last transfer lets go", || std::sync::Arc::strong_count(&memory) == 1);
}

#[test]
fn shutdown_and_disconnect_end_what_is_under_way_and_wake_who_waits() {
    for disconnect in [true, false] {
        let plan = FaultPlan { stall_after: Some(0), ..FaultPlan::default() };
        let (a, _b, peer, local, remote, _target) = faulty(plan);
        let hung = peer.write(&local, &remote, &quarters(), TransferOptions::default()).unwrap();
        let (agent, transfer) = (a.clone(), hung.clone());
        let listener = std::thread::spawn(move || agent.notification(LONG));
        let waiter = std::thread::spawn(move || transfer.wait(LONG));
        if disconnect {
            peer.disconnect();
        } else {
            a.shutdown(LONG).unwrap();
        }
        let code = waiter.join().unwrap().unwrap().error.unwrap();
        assert!(matches!(code, ErrorCode::PeerGone | ErrorCode::Closed), "{code}");
        a.shutdown(LONG).unwrap();
        assert_eq!(listener.join().unwrap().unwrap_err().code(), ErrorCode::Closed);
    }
}
