use super::*;
use crate::transport::{Op, Piece, Role, Tracker};
use kvxfer_proto::wire::HostIdentity;
use kvxfer_proto::{AgentName, Epoch};
use std::time::Duration;

fn peer(session: u8) -> PeerInfo {
    PeerInfo {
        name: AgentName::new("peer").unwrap(),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: "boot".into(),
            pid_namespace: 1,
            net_namespace: 1,
            pid: std::process::id(),
            process: 7,
            side_socket: String::new(),
        },
        same_host: true,
        same_kernel: true,
        same_process: true,
        role: Role::Initiator,
        address: None,
        session: [session; 16],
    }
}

fn pair(session: u8) -> [(Arc<InprocTransport>, Arc<dyn Link>); 2] {
    let config = AgentConfig::default();
    let [a, b] = [(); 2].map(|()| InprocTransport::new(&config, &Mover::new(&config)).unwrap());
    let peer = peer(session);
    let ab = a.connect(&peer, &b.offer(&peer).unwrap(), Instant::now()).unwrap();
    let ba = b.connect(&peer, &a.offer(&peer).unwrap(), Instant::now()).unwrap();
    [(a, ab), (b, ba)]
}

fn ticket(of: &InprocTransport, region: RegionId, memory: &Arc<Memory>) -> RemoteTicket {
    let ticket = of.ticket(region, memory).unwrap().unwrap();
    RemoteTicket { region, len: memory.len() as u64, payload: ticket.payload, fd: ticket.fd }
}

fn job(op: Op, local: &Arc<Memory>, remote: RemoteKey, len: u64) -> Job {
    Job {
        transfer: TransferId(1),
        op,
        local_region: RegionId(1),
        local: Arc::clone(local),
        remote,
        pieces: [Piece { local_offset: 0, remote_offset: 0, len }].into(),
        integrity: Integrity::Bound,
        after: None,
        digest: None,
        tracker: Arc::new(Tracker::new(1)),
    }
}

#[test]
fn writes_and_reads_between_two_agents() {
    let [(_a, ab), (b, _ba)] = pair(1);
    let (near, far) = (Memory::anonymous(5 << 20).unwrap(), Memory::anonymous(5 << 20).unwrap());
    let key = ab.import(ticket(&b, RegionId(9), &far)).unwrap();
    near.write_at(4 << 20, b"there").unwrap();
    let write = job(Op::Write, &near, key, 5 << 20);
    let tracker = Arc::clone(&write.tracker);
    ab.submit(write).unwrap();
    assert!(tracker.wait_until(Instant::now() + Duration::from_secs(60)));
    let mut out = [0; 5];
    far.read_at(4 << 20, &mut out).unwrap();
    assert_eq!(&out, b"there");
    far.write_at(0, b"back again").unwrap();
    let read = job(Op::Read, &near, key, 10);
    let tracker = Arc::clone(&read.tracker);
    ab.submit(read).unwrap();
    assert!(tracker.is_finished());
    let mut out = [0; 10];
    near.read_at(0, &mut out).unwrap();
    assert_eq!(&out, b"back again");
}

#[test]
fn a_dropped_region_is_an_error() {
    let [(_a, ab), (b, _ba)] = pair(2);
    let (near, far) = (Memory::anonymous(100).unwrap(), Memory::anonymous(100).unwrap());
    let key = ab.import(ticket(&b, RegionId(9), &far)).unwrap();
    assert_eq!(ab.submit(job(Op::Write, &near, RemoteKey(99), 1)).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(ab.submit(job(Op::Write, &near, key, 101)).unwrap_err().code(), ErrorCode::OutOfRange);
    drop(far);
    assert_eq!(ab.submit(job(Op::Write, &near, key, 1)).unwrap_err().code(), ErrorCode::NotFound);
    ab.forget(key);
    b.deregister(RegionId(9));
}

#[test]
fn hostile_offers_and_tickets_are_refused() {
    let [(a, ab), (b, _ba)] = pair(3);
    let memory = Memory::anonymous(100).unwrap();
    assert_eq!(a.connect(&peer(3), b"short", Instant::now()).err().unwrap().code(), ErrorCode::Protocol);
    let stranger = PeerInfo { same_process: false, ..peer(3) };
    assert!(a.offer(&stranger).is_none());
    assert!(a.connect(&stranger, &[0; 8], Instant::now()).is_err());
    let good = || ticket(&b, RegionId(9), &memory);
    for bad in [
        RemoteTicket { len: 101, ..good() },
        RemoteTicket { len: u64::MAX, ..good() },
        RemoteTicket { payload: vec![], ..good() },
        RemoteTicket { payload: u64::MAX.to_le_bytes().to_vec(), ..good() },
    ] {
        assert_eq!(ab.import(bad).unwrap_err().code(), ErrorCode::Protocol);
    }
    let unknown = RemoteTicket { region: RegionId(8), ..good() };
    assert_eq!(ab.import(unknown).unwrap_err().code(), ErrorCode::NotFound);
    ab.import(good()).unwrap();
}

#[test]
fn fenced_only_when_the_far_end_is_closed_and_idle() {
    let [(_a, ab), (b, ba)] = pair(4);
    ab.close();
    assert!(!ab.fenced(), "the peer may still write");
    ba.close();
    assert!(ab.fenced() && ba.fenced());
    assert_eq!(
        ab.submit(job(Op::Write, &Memory::anonymous(1).unwrap(), RemoteKey(1), 1)).unwrap_err().code(),
        ErrorCode::Closed
    );
    drop(ba);
    drop(b);
    assert!(ab.fenced());
}
