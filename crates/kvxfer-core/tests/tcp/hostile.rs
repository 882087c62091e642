//! A peer that breaks the rules loses its link; nobody else notices, and no byte lands where it should not.

use crate::harness::*;
use kvxfer_core::proto::RegionId;
use kvxfer_core::transport::tcp::frame::{
    self, Ack, HEADER_LEN, Header, Kind, Preamble, TablePiece, Ticket, push_ack, push_piece,
};
use kvxfer_core::transport::{Link, Op, Piece, Role, Transport};
use kvxfer_core::{ErrorCode, Integrity, Memory};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 1 << 20;

/// A victim with one exported region and one honest peer.
struct Victim {
    node: Node,
    memory: Arc<Memory>,
    exported: Exported,
    honest: Node,
    honest_link: Arc<dyn Link>,
    _keep: Arc<dyn Link>,
}

impl Victim {
    fn new() -> Self {
        let (node, honest) = (Node::new(&config(1)), Node::new(&config(1)));
        let memory = filled(LEN, 1);
        let exported = node.export(&memory);
        let (honest_link, keep) = connect(&honest, &node, None);
        Self { node, memory, exported, honest, honest_link, _keep: keep }
    }

    /// A fresh link of the victim, and a raw socket in the place of its only stream.
    fn intruder(&self) -> (Arc<dyn Link>, TcpStream) {
        let session = session();
        let info = peer(Role::Acceptor, self.honest.address, session);
        let offer = self.honest.transport.offer(&info).unwrap();
        let link = self.node.transport.connect(&info, &offer, soon()).unwrap();
        let mut s = TcpStream::connect(self.node.address).unwrap();
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.write_all(&Preamble { session, lane: 0 }.encode()).unwrap();
        (link, s)
    }

    fn capability(&self) -> u64 {
        Ticket::decode(&self.exported.payload).unwrap().capability
    }

    fn header(&self, kind: Kind, count: u32, payload: u32) -> Header {
        Header {
            kind,
            integrity: Integrity::Off,
            code: ErrorCode::Ok,
            job: 1,
            seq: 0,
            count,
            payload,
            region: self.exported.region,
            capability: self.capability(),
        }
    }

    /// Sends bytes and expects the link to end for breaking the protocol, with the memory as it was.
    fn refuses(&self, what: &str, bytes_to_send: &[u8]) {
        let before = bytes(&self.memory);
        let (link, mut s) = self.intruder();
        // The victim may close before it has taken all of it.
        let _ = s.write_all(bytes_to_send);
        until(what, || link.broken().is_some());
        assert_eq!(link.broken(), Some(ErrorCode::Protocol), "{what}: {}", link.describe());
        let mut rest = Vec::new();
        let _ = s.read_to_end(&mut rest);
        assert!(bytes(&self.memory) == before, "{what}: bytes changed");
        self.serves();
    }

    /// The honest peer is served as ever.
    fn serves(&self) {
        let source = filled(LEN, fresh());
        let key = self.exported.import(&self.honest_link);
        let pieces = [Piece { local_offset: 0, remote_offset: 0, len: LEN as u64 }];
        let (_, t) = start(&self.honest_link, Op::Write, &source, key, &pieces, Integrity::Full);
        good(&t);
        assert!(bytes(&self.memory) == bytes(&source));
    }
}

fn framed(header: Header, pieces: &[(u64, u32)]) -> Vec<u8> {
    let mut table = Vec::new();
    for &(offset, len) in pieces {
        push_piece(&mut table, TablePiece { offset, len });
    }
    let mut out = Vec::new();
    header.encode(&table, &mut out);
    out
}

#[test]
fn frames_that_break_the_rules_end_their_link_only() {
    let v = Victim::new();
    let mut rng = Rng(3);
    let random: Vec<u8> = (0..4096).map(|_| rng.next() as u8).collect();
    v.refuses("random bytes", &random);
    v.refuses(
        "another protocol",
        b"GET / HTTP/1.1\r\nHost: somewhere.example\r\nAccept: text/html, */*\r\n\r\n",
    );
    for op in [Kind::Write, Kind::Read] {
        v.refuses("beyond the end", &framed(v.header(op, 1, 2), &[(LEN as u64 - 1, 2)]));
        v.refuses("overflowing offset", &framed(v.header(op, 1, 16), &[(u64::MAX - 7, 16)]));
        v.refuses("empty piece", &framed(v.header(op, 2, 4), &[(0, 0), (0, 4)]));
        v.refuses("lengths that do not add up", &framed(v.header(op, 2, 9), &[(0, 4), (0, 4)]));
        let wrong = Header { capability: v.capability() ^ 1, ..v.header(op, 1, 4) };
        v.refuses("wrong capability", &framed(wrong, &[(0, 4)]));
        let none = Header { capability: 0, ..v.header(op, 1, 4) };
        v.refuses("no capability", &framed(none, &[(0, 4)]));
    }
    // Sizes far beyond the limits: refused by the fixed part, before anything is reserved for them.
    let mut huge = framed(v.header(Kind::Write, 1, 4), &[(0, 4)]);
    huge[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    v.refuses("huge count", &huge);
    let mut huge = framed(v.header(Kind::Write, 1, 4), &[(0, 4)]);
    huge[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    v.refuses("huge payload", &huge);
}

#[test]
fn answers_nobody_asked_for_end_the_link() {
    let v = Victim::new();
    let plain = |kind, count, payload| Header {
        region: RegionId(0),
        capability: 0,
        ..v.header(kind, count, payload)
    };
    let mut table = Vec::new();
    push_ack(&mut table, Ack { job: 1, seq: 0, code: ErrorCode::Ok });
    let mut ack = Vec::new();
    plain(Kind::Ack, 1, 0).encode(&table, &mut ack);
    v.refuses("acknowledgement of nothing", &ack);
    let mut data = framed(plain(Kind::Data, 0, 8), &[]);
    data.extend_from_slice(&[0; 8]);
    v.refuses("data for nothing", &data);
}

#[test]
fn a_frame_that_stops_in_the_middle_ends_with_its_connection() {
    let v = Victim::new();
    let (link, mut s) = v.intruder();
    let mut write = framed(v.header(Kind::Write, 1, 4096), &[(0, 4096)]);
    write.extend_from_slice(&[7; 100]);
    s.write_all(&write).unwrap();
    drop(s);
    until("the end", || link.broken().is_some());
    assert_eq!(link.broken(), Some(ErrorCode::PeerGone));
    assert!(link.describe().contains("in the middle of a frame"), "{}", link.describe());
    v.serves();
}

#[test]
fn a_region_that_is_not_there_any_more_is_refused_and_the_link_goes_on() {
    let v = Victim::new();
    let (link, mut s) = v.intruder();
    let before = bytes(&v.memory);
    let gone = Header { region: RegionId(u64::MAX), ..v.header(Kind::Write, 1, 100) };
    let mut write = framed(gone, &[(0, 100)]);
    write.extend_from_slice(&[7; 100]);
    s.write_all(&write).unwrap();
    let mut answer = [0; HEADER_LEN + frame::ACK_LEN];
    s.read_exact(&mut answer).unwrap();
    let acks: Vec<_> = frame::decode_acks(&answer[HEADER_LEN..]).collect();
    assert_eq!(acks, [Ack { job: 1, seq: 0, code: ErrorCode::NotFound }]);
    assert!(bytes(&v.memory) == before);
    assert_eq!(link.broken(), None);
}

#[test]
fn a_peer_that_asks_and_never_listens_is_cut_off() {
    let v = Victim::new();
    let (link, mut s) = v.intruder();
    let ask = framed(v.header(Kind::Read, 1, LEN as u32), &[(0, LEN as u32)]);
    s.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..100_000 {
        if s.write_all(&ask).is_err() {
            break;
        }
    }
    until("the end", || link.broken().is_some());
    assert_eq!(link.broken(), Some(ErrorCode::Protocol));
    v.serves();
}

#[test]
fn strange_streams_are_dropped() {
    let v = Victim::new();
    let ends = |mut s: TcpStream| {
        let n = s.read(&mut [0; 1]);
        assert!(matches!(n, Ok(0) | Err(_)), "{n:?}");
    };
    let (link, first) = v.intruder();
    until("the stream", || link.describe().contains("1 of 1"));
    let session = session();
    let info = peer(Role::Acceptor, v.honest.address, session);
    let offer = v.honest.transport.offer(&info).unwrap();
    let other = v.node.transport.connect(&info, &offer, soon()).unwrap();
    for lane in [1, 7, u16::MAX] {
        let mut s = TcpStream::connect(v.node.address).unwrap();
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.write_all(&Preamble { session, lane }.encode()).unwrap();
        ends(s);
    }
    assert_eq!((link.broken(), other.broken()), (None, None));
    // Twice the same lane: the first one stays.
    let open = |lane| {
        let mut s = TcpStream::connect(v.node.address).unwrap();
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.write_all(&Preamble { session, lane }.encode()).unwrap();
        s
    };
    let _kept = open(0);
    until("the stream", || other.describe().contains("1 of 1"));
    ends(open(0));
    assert_eq!(other.broken(), None);
    drop(first);
    v.serves();
}

#[test]
fn tickets_and_offers_that_make_no_sense_are_refused() {
    use kvxfer_core::transport::RemoteTicket;
    let v = Victim::new();
    let import = |payload: Vec<u8>, len| {
        v.honest_link.import(RemoteTicket { region: RegionId(1), len, payload, fd: None }).unwrap_err().code()
    };
    assert_eq!(import(vec![], 10), ErrorCode::Protocol);
    assert_eq!(import(vec![9; 17], 10), ErrorCode::Protocol);
    assert_eq!(import(Ticket { capability: 1, len: 11 }.encode(), 10), ErrorCode::Protocol);
    let info = peer(Role::Acceptor, v.node.address, session());
    for offer in [&[][..], &[1, 0, 0, 0], &[1, 255, 255, 0], &[9, 1, 0, 0], &[1, 1, 0, 200]] {
        let e = v.honest.transport.connect(&info, offer, soon()).map(drop).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Protocol, "{e}");
    }
}
