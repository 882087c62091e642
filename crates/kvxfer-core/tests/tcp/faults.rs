//! What goes wrong between two sides that mean well: cancelling, damage, loss, nobody there.

use crate::harness::*;
use crate::proxy::{Proxy, Way};
use kvxfer_core::agent::Access;
use kvxfer_core::config::TcpConfig;
use kvxfer_core::transport::tcp::frame::{HEADER_LEN, PIECE_LEN, PREAMBLE_LEN};
use kvxfer_core::transport::{Op, Outcome, Piece, Role, Transport};
use kvxfer_core::{ErrorCode, Integrity};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn small_frames(streams: u16) -> TcpConfig {
    TcpConfig { streams, io_threads: 1, frame_bytes: 64 << 10, ..TcpConfig::default() }
}

fn megabytes(n: u64) -> Vec<Piece> {
    (0..n).map(|i| Piece { local_offset: i * MIB, remote_offset: i * MIB, len: MIB }).collect()
}

/// Gives a late write the chance to show itself.
fn settle() {
    std::thread::sleep(Duration::from_millis(150));
}

#[test]
fn after_a_cancelled_write_has_ended_no_byte_changes() {
    let (a, b) = (Node::new(&small_frames(2)), Node::new(&small_frames(2)));
    let proxy = Proxy::new(b.address);
    proxy.control.hold(Way::There, 3 * MIB);
    let (link, _keep) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (filled(64 << 20, 1), zeroed(64 << 20));
    let key = b.export(&theirs).import(&link);
    let (id, t) = start(&link, Op::Write, &mine, key, &megabytes(64), Integrity::Full);
    until("the relay to hold both streams", || proxy.control.held(Way::There) == 2);
    t.request_cancel(ErrorCode::Cancelled);
    link.cancel(id);
    settle();
    assert!(!t.is_finished(), "bytes that are on their way could still land");
    proxy.control.release(Way::There);
    wait(&t);
    let after = bytes(&theirs);
    assert_eq!(t.error(), Some(ErrorCode::Cancelled));
    let source = bytes(&mine);
    for i in 0..64 {
        let range = i * (MIB as usize)..(i + 1) * (MIB as usize);
        match t.outcome(i).unwrap() {
            Outcome::Done => assert!(after[range.clone()] == source[range]),
            other => assert_eq!(other, Outcome::Failed(ErrorCode::Cancelled)),
        }
    }
    assert_eq!(t.outcome(63), Some(Outcome::Failed(ErrorCode::Cancelled)));
    assert!(after[63 << 20..].iter().all(|&b| b == 0));
    settle();
    assert!(bytes(&theirs) == after, "a byte changed after the end");
    // The streams are still good.
    let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(64), Integrity::Full);
    good(&t);
    assert!(bytes(&theirs) == source);
}

#[test]
fn a_cancelled_read_ends_at_once_and_no_byte_changes() {
    let (a, b) = (Node::new(&small_frames(2)), Node::new(&small_frames(2)));
    let proxy = Proxy::new(b.address);
    proxy.control.hold(Way::Back, 2 * MIB);
    let (link, _keep) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (zeroed(64 << 20), filled(64 << 20, 1));
    let key = b.export(&theirs).import(&link);
    let (id, t) = start(&link, Op::Read, &mine, key, &megabytes(64), Integrity::Full);
    until("the relay to hold both streams", || proxy.control.held(Way::Back) == 2);
    t.request_cancel(ErrorCode::TimedOut);
    link.cancel(id);
    wait(&t);
    assert_eq!(t.error(), Some(ErrorCode::TimedOut));
    let after = bytes(&mine);
    proxy.control.release(Way::Back);
    // The rest of the answers comes, and after it a transfer that is wanted.
    let other = zeroed(64 << 20);
    let (_, t) = start(&link, Op::Read, &other, key, &megabytes(64), Integrity::Full);
    good(&t);
    assert!(bytes(&other) == bytes(&theirs));
    assert!(bytes(&mine) == after, "a byte changed after the end");
}

#[test]
fn cancelling_before_anything_was_sent_ends_at_once() {
    let b = Node::new(&config(2));
    let info = peer(Role::Acceptor, b.address, session());
    let offer = b.transport.offer(&info).unwrap();
    let link = b.transport.connect(&info, &offer, soon()).unwrap();
    let mine = filled(4096, 1);
    let key = b.export(&mine).import(&link);
    let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    for op in [Op::Write, Op::Read] {
        let (id, t) = start(&link, op, &mine, key, &pieces, Integrity::Full);
        t.request_cancel(ErrorCode::Cancelled);
        link.cancel(id);
        assert!(t.is_finished());
        assert_eq!(t.error(), Some(ErrorCode::Cancelled));
    }
}

#[test]
fn after_close_no_byte_of_the_peer_lands() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let (link_a, link_b) = connect(&a, &b, None);
    let (mine, theirs) = (filled(64 << 20, 1), zeroed(64 << 20));
    let key = b.export(&theirs).import(&link_a);
    let trackers: Vec<_> =
        (0..16).map(|_| start(&link_a, Op::Write, &mine, key, &megabytes(64), Integrity::Off).1).collect();
    until("some bytes", || trackers[0].bytes_done() > 0);
    assert!(!link_b.fenced());
    link_b.close();
    let after = bytes(&theirs);
    assert!(link_b.fenced());
    for t in &trackers {
        wait(t);
    }
    assert_eq!(trackers[15].error(), Some(ErrorCode::PeerGone));
    settle();
    assert!(bytes(&theirs) == after, "a byte changed after close");
    assert!(link_a.broken().is_some(), "the other side noticed");
}

#[test]
fn damage_to_a_write_is_reported_for_the_piece_it_hit() {
    let (a, b) = (Node::new(&small_frames(1)), Node::new(&small_frames(1)));
    let proxy = Proxy::new(b.address);
    proxy.control.flip(Way::There, 3 * MIB / 2);
    let (link, link_b) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (filled(4 << 20, 1), zeroed(4 << 20));
    let key = b.export(&theirs).import(&link);
    let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(4), Integrity::Full);
    wait(&t);
    assert_eq!(t.outcome(1), Some(Outcome::Failed(ErrorCode::Corrupt)));
    assert_eq!((t.failed_pieces(), t.bytes_done()), (1, 3 * MIB));
    assert!(t.detail().unwrap().contains("damaged"));
    assert_eq!((link.broken(), link_b.broken()), (None, None));
    let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(4), Integrity::Full);
    good(&t);
    assert!(bytes(&theirs) == bytes(&mine));
}

#[test]
fn damage_to_a_read_is_reported_for_the_piece_it_hit() {
    let (a, b) = (Node::new(&small_frames(1)), Node::new(&small_frames(1)));
    let proxy = Proxy::new(b.address);
    proxy.control.flip(Way::Back, 5 * MIB / 2);
    let (link, _keep) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (zeroed(4 << 20), filled(4 << 20, 1));
    let key = b.export(&theirs).import(&link);
    let (_, t) = start(&link, Op::Read, &mine, key, &megabytes(4), Integrity::Full);
    wait(&t);
    assert_eq!(t.outcome(2), Some(Outcome::Failed(ErrorCode::Corrupt)));
    assert_eq!((t.failed_pieces(), t.bytes_done()), (1, 3 * MIB));
    let (_, t) = start(&link, Op::Read, &mine, key, &megabytes(4), Integrity::Full);
    good(&t);
    assert!(bytes(&theirs) == bytes(&mine));
}

#[test]
fn bound_notices_damage_in_a_sampled_line() {
    let (a, b) = (Node::new(&config(1)), Node::new(&config(1)));
    let proxy = Proxy::new(b.address);
    proxy.control.flip(Way::There, (PREAMBLE_LEN + HEADER_LEN + PIECE_LEN + 10) as u64);
    let (link, _keep) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (filled(4096, 1), zeroed(4096));
    let key = b.export(&theirs).import(&link);
    let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    let (_, t) = start(&link, Op::Write, &mine, key, &pieces, Integrity::Bound);
    wait(&t);
    assert_eq!(t.error(), Some(ErrorCode::Corrupt));
}

#[test]
fn a_damaged_header_ends_the_link_before_a_byte_lands() {
    let (a, b) = (Node::new(&config(1)), Node::new(&config(1)));
    // One run damages a field, one the table.
    for at in [PREAMBLE_LEN + 20, PREAMBLE_LEN + HEADER_LEN + 3] {
        let proxy = Proxy::new(b.address);
        proxy.control.flip(Way::There, at as u64);
        let (link, link_b) = connect(&a, &b, Some(proxy.address));
        let (mine, theirs) = (filled(4096, 1), zeroed(4096));
        let key = b.export(&theirs).import(&link);
        let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
        let (_, t) = start(&link, Op::Write, &mine, key, &pieces, Integrity::Off);
        wait(&t);
        assert_eq!(t.error(), Some(ErrorCode::PeerGone));
        assert_eq!(link_b.broken(), Some(ErrorCode::Protocol));
        assert!(bytes(&theirs).iter().all(|&b| b == 0));
    }
}

#[test]
fn a_lost_stream_ends_the_link_and_a_new_one_works() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let (mine, theirs) = (filled(64 << 20, 1), zeroed(64 << 20));
    let exported = b.export(&theirs);
    {
        let proxy = Proxy::new(b.address);
        proxy.control.hold(Way::There, 4 * MIB);
        let (link, link_b) = connect(&a, &b, Some(proxy.address));
        let key = exported.import(&link);
        let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(64), Integrity::Full);
        until("the relay to hold", || proxy.control.held(Way::There) == 2);
        proxy.control.cut();
        wait(&t);
        assert!(t.error().unwrap().is_retryable(), "{:?}", t.error());
        assert!(link.broken().is_some());
        until("the other side to notice", || link_b.broken().is_some());
        let key = exported.import(&link);
        let e = submit(&link, Op::Write, &mine, key, &megabytes(1), Integrity::Full).map(drop).unwrap_err();
        assert!(e.is_retryable(), "{e}");
    }
    let (link, _keep) = connect(&a, &b, None);
    let (_, t) = start(&link, Op::Write, &mine, exported.import(&link), &megabytes(64), Integrity::Full);
    good(&t);
    assert!(bytes(&theirs) == bytes(&mine));
}

#[test]
fn nobody_listens_there() {
    let a = Node::new(&config(2));
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let info = peer(Role::Initiator, free, session());
    let offer = a.transport.offer(&info).unwrap();
    let e = a.transport.connect(&info, &offer, soon()).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Unreachable, "{e}");
    assert!(e.to_string().contains(&free.to_string()), "{e}");
}

#[test]
fn connecting_ends_at_its_deadline() {
    let a = Node::new(&config(2));
    // A listener whose queue is full answers no further attempt.
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    silent.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    silent.listen(0).unwrap();
    let address = silent.local_addr().unwrap().as_socket().unwrap();
    let _queued: Vec<_> = (0..4)
        .map_while(|_| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok())
        .collect();
    let info = peer(Role::Initiator, address, session());
    let offer = a.transport.offer(&info).unwrap();
    let deadline = Instant::now() + Duration::from_millis(300);
    let e = a.transport.connect(&info, &offer, deadline).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::TimedOut, "{e}");
}

#[test]
fn streams_that_never_come_end_the_link() {
    let b = Node::new(&config(2));
    let info = peer(Role::Acceptor, b.address, session());
    let offer = b.transport.offer(&info).unwrap();
    let link = b.transport.connect(&info, &offer, Instant::now() + Duration::from_millis(100)).unwrap();
    let mine = filled(4096, 1);
    let key = b.export(&mine).import(&link);
    let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    let (_, t) = start(&link, Op::Write, &mine, key, &pieces, Integrity::Full);
    wait(&t);
    assert_eq!(t.error(), Some(ErrorCode::Unreachable));
    assert_eq!(link.broken(), Some(ErrorCode::Unreachable));
}

#[test]
fn shutdown_ends_jobs_and_refuses_new_links() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let proxy = Proxy::new(b.address);
    proxy.control.hold(Way::There, MIB);
    let (link, _keep) = connect(&a, &b, Some(proxy.address));
    let (mine, theirs) = (filled(64 << 20, 1), zeroed(64 << 20));
    let key = b.export(&theirs).import(&link);
    let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(64), Integrity::Full);
    until("the relay to hold", || proxy.control.held(Way::There) == 2);
    a.transport.shutdown();
    assert!(t.is_finished());
    assert_eq!(t.error(), Some(ErrorCode::Closed));
    let info = peer(Role::Initiator, b.address, session());
    let offer = a.transport.offer(&info).unwrap();
    let e = a.transport.connect(&info, &offer, soon()).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Closed);
}

#[test]
fn a_hook_may_close_the_link_or_shut_the_transport_down() {
    for shut_down in [false, true] {
        let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
        let (link, _keep) = connect(&a, &b, None);
        let (mine, theirs) = (filled(4096, 1), zeroed(4096));
        let key = b.export(&theirs).import(&link);
        let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
        let (_, t) = start(&link, Op::Write, &mine, key, &pieces, Integrity::Full);
        let (closer, transport) = (link.clone(), a.transport.clone());
        t.on_finish(move |_| if shut_down { transport.shutdown() } else { closer.close() });
        good(&t);
        until("the link to end", || link.broken().is_some());
    }
}

#[test]
fn access_is_what_was_allowed() {
    let (a, b) = (Node::new(&config(1)), Node::new(&config(1)));
    let (link, _keep) = connect(&a, &b, None);
    let (mine, theirs) = (filled(1 << 20, 1), filled(1 << 20, 2));
    let before = bytes(&theirs);
    let exported = b.export(&theirs);
    let key = exported.import(&link);
    let attempt = |op| {
        let to = filled(1 << 20, 1);
        let (_, t) = start(&link, op, &to, key, &megabytes(1), Integrity::Full);
        wait(&t);
        t.error()
    };
    b.transport.allow(exported.region, Some(Access::Read));
    assert_eq!((attempt(Op::Write), attempt(Op::Read)), (Some(ErrorCode::Unsupported), None));
    assert!(bytes(&theirs) == before);
    b.transport.allow(exported.region, None);
    assert_eq!(
        (attempt(Op::Write), attempt(Op::Read)),
        (Some(ErrorCode::NotFound), Some(ErrorCode::NotFound))
    );
    b.transport.allow(exported.region, Some(Access::Write));
    assert_eq!((attempt(Op::Read), attempt(Op::Write)), (Some(ErrorCode::Unsupported), None));
    assert!(bytes(&theirs) == bytes(&mine));
    b.transport.deregister(exported.region);
    assert_eq!(attempt(Op::Write), Some(ErrorCode::NotFound));
    assert_eq!(link.broken(), None);
}

#[test]
fn pieces_outside_a_region_are_refused_by_number() {
    let (a, b) = (Node::new(&config(1)), Node::new(&config(1)));
    let (link, _keep) = connect(&a, &b, None);
    let mine = filled(4096, 1);
    let key = b.export(&zeroed(2048)).import(&link);
    let piece = |local_offset, remote_offset, len| Piece { local_offset, remote_offset, len };
    for (bad, text) in [
        (piece(4000, 0, 100), "local side of piece 1: offset 4000 + length 100"),
        (piece(0, 2000, 100), "remote side of piece 1: offset 2000 + length 100"),
        (piece(u64::MAX, 0, 100), "local side of piece 1"),
        (piece(0, u64::MAX - 10, 100), "remote side of piece 1"),
        (piece(0, 0, 0), "length 0"),
    ] {
        let pieces = [piece(0, 0, 1), bad];
        let e = submit(&link, Op::Write, &mine, key, &pieces, Integrity::Off).map(drop).unwrap_err();
        assert_eq!(e.code(), ErrorCode::OutOfRange);
        assert!(e.to_string().contains(text), "{e}");
    }
    link.forget(key);
    let e = submit(&link, Op::Write, &mine, key, &megabytes(1), Integrity::Off).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotFound, "{e}");
}

#[test]
fn settings_out_of_range_are_named() {
    for (config, name) in [
        (TcpConfig { streams: 0, ..TcpConfig::default() }, "tcp.streams: 0"),
        (TcpConfig { streams: 65, ..TcpConfig::default() }, "tcp.streams: 65"),
        (TcpConfig { io_threads: 0, ..TcpConfig::default() }, "tcp.io_threads: 0"),
        (TcpConfig { staging_depth: 0, ..TcpConfig::default() }, "tcp.staging_depth: 0"),
        (TcpConfig { frame_bytes: 100, ..TcpConfig::default() }, "tcp.frame_bytes: 100"),
    ] {
        let e = kvxfer_core::transport::tcp::TcpTransport::new(&config, PATIENCE).map(drop).unwrap_err();
        assert!(e.to_string().contains(name), "{e}");
    }
}

#[test]
fn a_listening_address_serves_a_peer_that_came_over_a_unix_socket() {
    let (a, b) = (Node::new(&config(2)), Node::new(&config(2)));
    let session = session();
    let mut from_b = peer(Role::Initiator, b.address, session);
    let mut from_a = peer(Role::Acceptor, a.address, session);
    (from_a.address, from_b.address) = (None, None);
    assert!(b.transport.offer(&from_a).is_none(), "no address to offer");
    let bad = a.transport.offer(&from_b).unwrap();
    let e = a.transport.connect(&from_b, &bad, soon()).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Unreachable, "{e}");
    let any = std::net::SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), b.address.port());
    b.transport.listening(&[any]);
    let offer = b.transport.offer(&from_a).unwrap();
    let link_b = b.transport.connect(&from_a, &a.transport.offer(&from_b).unwrap(), soon()).unwrap();
    let link = a.transport.connect(&from_b, &offer, soon()).unwrap();
    let (mine, theirs) = (filled(1 << 20, 1), zeroed(1 << 20));
    let key = b.export(&theirs).import(&link);
    let (_, t) = start(&link, Op::Write, &mine, key, &megabytes(1), Integrity::Full);
    good(&t);
    assert!(link.describe().contains(&b.address.port().to_string()));
    until("both streams", || link_b.describe().contains("2 of 2"));
}
