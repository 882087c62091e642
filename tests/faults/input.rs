//! Wrong input to the public API: the error names the value, and the next right call succeeds.

use crate::actors::unique;
use kvxfer::agent::Access;
use kvxfer::{Agent, Error, ErrorCode, Peer, Piece, Region, RemoteRegion, TransferOptions};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const LEN: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

struct Pair {
    passive: Agent,
    target: Region,
    active: Agent,
    source: Region,
    peer: Peer,
    remote: RemoteRegion,
}

fn pair() -> Pair {
    let passive = Agent::builder().name(unique("passive")).listen("tcp://127.0.0.1:0").build().unwrap();
    let target = passive.allocate(LEN as usize).unwrap();
    passive.export(&target, "target", Access::ReadWrite).unwrap();
    let active = Agent::builder().name(unique("active")).build().unwrap();
    let source = active.allocate(LEN as usize).unwrap();
    let peer = active.connect(&passive.addresses()[0], SOON).unwrap();
    let remote = peer.region("target", SOON).unwrap();
    Pair { passive, target, active, source, peer, remote }
}

impl Pair {
    fn write(&self, pieces: &[Piece]) -> Result<(), Error> {
        let transfer = self.peer.write(&self.source, &self.remote, pieces, TransferOptions::default())?;
        let report = transfer.wait(SOON)?;
        assert_eq!(report.error, None);
        Ok(())
    }

    fn still_works(&self) {
        self.source.memory().write_at(7, b"kvxfer").unwrap();
        self.write(&[Piece { local_offset: 7, remote_offset: 9, len: 6 }]).unwrap();
        let mut seen = [0; 6];
        self.target.memory().read_at(9, &mut seen).unwrap();
        assert_eq!(&seen, b"kvxfer");
    }
}

fn piece(local_offset: u64, remote_offset: u64, len: u64) -> Piece {
    Piece { local_offset, remote_offset, len }
}

#[test]
fn pieces_outside_a_region_are_refused_before_anything_moves() {
    let pair = pair();
    let good = piece(0, 0, 4096);
    for (bad, names) in [
        (piece(LEN, 0, 1), LEN),
        (piece(0, LEN - 1, 2), LEN - 1),
        (piece(u64::MAX, 0, 2), u64::MAX),
        (piece(0, u64::MAX - 1, 4), u64::MAX - 1),
        (piece(1, 1, LEN), LEN),
    ] {
        let error = pair.write(&[good, bad]).unwrap_err();
        assert_eq!(error.code(), ErrorCode::OutOfRange, "{bad:?}: {error}");
        let text = error.to_string();
        assert!(text.contains(&names.to_string()), "{bad:?} does not name {names}: {text}");
        assert!(text.contains('1'), "the piece's index: {text}");
    }
    pair.still_works();
}

#[test]
fn empty_transfers_and_zero_lengths_are_refused() {
    let pair = pair();
    assert_eq!(pair.write(&[]).unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(pair.write(&[piece(0, 0, 0)]).unwrap_err().code(), ErrorCode::InvalidArgument);
    let notify = Some(vec![0; kvxfer::proto::wire::MAX_NOTIFICATION + 1]);
    let options = TransferOptions { notify, ..TransferOptions::default() };
    let error = pair.peer.write(&pair.source, &pair.remote, &[piece(0, 0, 1)], options).err().unwrap();
    assert!(!error.is_retryable() && error.to_string().contains("4097"), "{error}");
    pair.still_works();
}

#[test]
fn another_agents_region_is_refused() {
    let pair = pair();
    let stranger = Agent::builder().name(unique("stranger")).build().unwrap();
    let foreign = stranger.allocate(4096).unwrap();
    let error =
        pair.peer.write(&foreign, &pair.remote, &[piece(0, 0, 1)], TransferOptions::default()).err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    pair.still_works();
}

#[test]
fn access_rights_are_kept() {
    let pair = pair();
    let secret = pair.passive.allocate(4096).unwrap();
    pair.passive.export(&secret, "read-only", Access::Read).unwrap();
    let remote = pair.peer.region("read-only", SOON).unwrap();
    let write = pair.peer.write(&pair.source, &remote, &[piece(0, 0, 1)], TransferOptions::default());
    let error = write.map(|_| ()).expect_err("a write to a region exported for reading");
    assert!(!error.is_retryable() && error.to_string().contains("read-only"), "{error}");
    let read = pair.peer.read(&pair.source, &remote, &[piece(0, 0, 1)], TransferOptions::default()).unwrap();
    assert_eq!(read.wait(SOON).unwrap().error, None);
    pair.still_works();
}

#[test]
fn a_region_that_is_not_exported_is_not_found() {
    let pair = pair();
    let error = pair.peer.region("nothing", SOON).err().unwrap();
    assert_eq!(error.code(), ErrorCode::NotFound);
    assert!(error.to_string().contains("nothing"), "{error}");
    assert_eq!(pair.passive.unexport("nothing").unwrap_err().code(), ErrorCode::NotFound);
    pair.still_works();
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", taken.local_addr().unwrap());
    let error = Agent::builder().name(unique("second")).listen(&address).build().err().unwrap();
    assert_eq!(error.code(), ErrorCode::AddressInUse);
    assert!(error.to_string().contains(&taken.local_addr().unwrap().to_string()), "{error}");
}

#[test]
fn unreachable_addresses_end_with_their_reason() {
    let agent = Agent::builder().name(unique("lonely")).build().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (address, codes) in [
        (format!("tcp://{free}"), &[ErrorCode::Unreachable][..]),
        ("tcp://no-such-host.invalid:7300".into(), &[ErrorCode::Unreachable]),
        ("unix:///no/such/socket".into(), &[ErrorCode::Unreachable, ErrorCode::System, ErrorCode::NotFound]),
        ("udp://127.0.0.1:1".into(), &[ErrorCode::InvalidArgument]),
        ("tcp://127.0.0.1".into(), &[ErrorCode::InvalidArgument]),
        ("tcp://127.0.0.1:70000".into(), &[ErrorCode::InvalidArgument]),
        (String::new(), &[ErrorCode::InvalidArgument]),
    ] {
        let error = agent.connect(&address, SOON).err().unwrap_or_else(|| panic!("connected to {address:?}"));
        assert!(codes.contains(&error.code()), "{address}: {:?} {error}", error.code());
    }
}

#[test]
fn a_peer_that_accepts_and_says_nothing_ends_with_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let agent = Agent::builder().name(unique("patient")).build().unwrap();
    let started = Instant::now();
    let address = format!("tcp://{}", silent.local_addr().unwrap());
    let error = agent.connect(&address, Duration::from_millis(300)).err().unwrap();
    assert_eq!(error.code(), ErrorCode::TimedOut, "{error}");
    assert!(error.to_string().contains(&address[6..]), "{error}");
    assert!(started.elapsed() < SOON, "far beyond the deadline");
}

#[test]
fn a_closed_agent_answers_closed() {
    let pair = pair();
    pair.active.shutdown(SOON).unwrap();
    assert_eq!(pair.active.allocate(4096).err().unwrap().code(), ErrorCode::Closed);
    let error = pair.write(&[piece(0, 0, 1)]).unwrap_err();
    assert!([ErrorCode::Closed, ErrorCode::PeerGone].contains(&error.code()), "{error}");
    pair.active.shutdown(SOON).unwrap();
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let agent = Agent::builder().name(unique("greedy")).build().unwrap();
    let error = agent.allocate(1 << 50).err().unwrap();
    assert!(error.to_string().contains(&(1_u64 << 50).to_string()), "{error}");
    assert_eq!(agent.allocate(0).err().unwrap().code(), ErrorCode::InvalidArgument);
    agent.allocate(4096).unwrap();
}
