//! Device memory that goes through slots, between two processes, and what remains of the slots when the other one is killed or stopped.

use crate::support::{End, Other, REGION, nixl_is_here, pattern, piece, remote_ticket, serve};
use crate::{harness, standin};
use kvxfer_core::config::{AgentConfig, NixlConfig};
use kvxfer_core::cuda::Device;
use kvxfer_core::proto::TransferId;
use kvxfer_core::transport::{Outcome, Tracker, Transport};
use kvxfer_core::{ErrorCode, Memory, Op, Piece};
use rustix::process::Signal;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEPTH: i64 = 4;
const SLOT: u64 = 4 << 20;
const TCP: (&str, &str) = ("UCX_TLS", "tcp");

/// Runs `body` in a process with the stand-in driver; the other process needs none.
fn on_a_device(test: &str, body: fn()) {
    if std::env::var_os(harness::UNDER).is_some() || nixl_is_here(test) {
        harness::run(test, &[TCP], body);
    }
}

fn device_end(len: u64) -> End {
    let nixl = NixlConfig { same_host: true, ..NixlConfig::default() };
    let device = Device::get(0).expect("a device");
    let memory = Memory::device(&device, len as usize).expect("device memory");
    End::over("ours", memory, &AgentConfig { nixl, ..AgentConfig::default() })
}

/// Slots made so far: nothing else here is pinned.
fn slots() -> i64 {
    standin::calls("cuMemHostRegister_v2").expect("the stand-in driver")
}

#[test]
fn write_and_read() {
    const NAME: &str = "staging::write_and_read";
    on_a_device(NAME, || {
        if serve() {
            return;
        }
        let len = 10 * SLOT;
        let ours = device_end(len);
        assert!(ours.transport.ticket(REGION, &ours.memory).expect("an answer").is_none());
        ours.fill(1);
        let mut other = Other::start(NAME, &ours, len as usize, &[]);
        let key = other.link.import(remote_ticket(other.ticket.clone(), len)).expect("import");
        let pieces: Vec<Piece> = (0..100).map(|i| piece(i * 70_000, (99 - i) * 70_000, 70_000)).collect();
        let tracker = ours.run(&*other.link, Op::Write, key, &pieces);
        assert_eq!((tracker.error(), tracker.bytes_done()), (None, 7_000_000));
        let (sent, got) = (pattern(1, len as usize), other.bytes(0, 7_000_000));
        for p in &pieces {
            let (l, r) = (p.local_offset as usize, p.remote_offset as usize);
            assert!(sent[l..l + 70_000] == got[r..r + 70_000], "{p:?}");
        }
        let tracker = ours.run(&*other.link, Op::Read, key, &[piece(0, SLOT * 2, SLOT * 8)]);
        assert_eq!(tracker.error(), None);
        let end = (10 * SLOT) as usize;
        assert!(ours.bytes(0, 8 * SLOT as usize) == pattern(99, len as usize)[2 * SLOT as usize..end]);
        for i in 0..200 {
            let tracker = ours.run(&*other.link, Op::Write, key, &[piece(i * 64, i * 64, 64)]);
            assert_eq!(tracker.error(), None);
        }
        assert!(other.bytes(0, 200 * 64) == ours.bytes(0, 200 * 64));
        assert_eq!(slots(), DEPTH);
    });
}

/// A transfer of device memory that has begun.
struct UnderWay {
    id: TransferId,
    tracker: Arc<Tracker>,
    pieces: Vec<Piece>,
}

const LEN: u64 = 12 * SLOT;

fn begin(ours: &End, other: &Other, op: Op) -> UnderWay {
    let key = other.link.import(remote_ticket(other.ticket.clone(), LEN)).expect("import");
    ours.fill(3);
    let pieces: Vec<Piece> = (0..LEN >> 20).map(|i| piece(i << 20, i << 20, 1 << 20)).collect();
    let job = ours.job(op, key, &pieces);
    let (id, tracker) = (job.transfer, Arc::clone(&job.tracker));
    other.link.submit(job).expect("accepted");
    while tracker.bytes_done() == 0 {
        other.link.assist(id);
    }
    UnderWay { id, tracker, pieces }
}

/// Drives it to its end, which must come; what counts as read is on the device.
fn end(ours: &End, op: Op, transfer: &UnderWay) {
    let UnderWay { tracker, pieces, .. } = transfer;
    let start = Instant::now();
    while !tracker.is_finished() {
        ours.transport.poll();
        assert!(start.elapsed() < Duration::from_secs(20), "the transfer does not end: {tracker:?}");
    }
    assert!(tracker.all_decided() && tracker.failed_pieces() > 0, "{tracker:?}");
    if op == Op::Read {
        let (got, sent) = (ours.bytes(0, LEN as usize), pattern(99, LEN as usize));
        for (i, p) in pieces.iter().enumerate() {
            let range = p.local_offset as usize..(p.local_offset + p.len) as usize;
            assert!(tracker.outcome(i) != Some(Outcome::Done) || got[range.clone()] == sent[range], "{i}");
        }
    }
}

/// A peer is served, with more than all its slots hold.
fn serves(ours: &End, peer: &mut Other) {
    let key = peer.link.import(remote_ticket(peer.ticket.clone(), LEN)).expect("import");
    ours.fill(4);
    assert_eq!(ours.run(&*peer.link, Op::Write, key, &[piece(0, 0, 8 * SLOT)]).error(), None);
    assert!(peer.bytes(0, 8 * SLOT as usize) == pattern(4, LEN as usize)[..8 * SLOT as usize]);
}

fn signal(other: &Other, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(other.pid() as i32).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the child is ours");
}

fn stopped(test: &str, op: Op) {
    if serve() {
        return;
    }
    let ours = device_end(LEN);
    let mut other = Other::start(test, &ours, LEN as usize, &[]);
    let transfer = begin(&ours, &other, op);
    signal(&other, Signal::STOP);
    // What is on the network still arrives; then nothing moves.
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        ours.transport.poll();
    }
    transfer.tracker.request_cancel(ErrorCode::TimedOut);
    other.link.cancel(transfer.id);
    end(&ours, op, &transfer);
    let error = transfer.tracker.error();
    assert!(matches!(error, Some(ErrorCode::TimedOut | ErrorCode::Transport)), "{error:?}");
    serves(&ours, &mut Other::start(test, &ours, LEN as usize, &[]));
    assert!(slots() > DEPTH, "a slot was used again whose request had not ended");
    assert!(slots() <= 2 * DEPTH, "{} slots", slots());
    // What still reaches it when it goes on is what was sent to it, not what slots were used for since.
    let at_end = ours.bytes(0, LEN as usize);
    signal(&other, Signal::CONT);
    let until = Instant::now() + Duration::from_millis(100);
    while Instant::now() < until {
        ours.transport.poll();
    }
    let got = other.bytes(0, LEN as usize);
    let (sent, before) = (pattern(3, got.len()), pattern(99, got.len()));
    let strange = (0..got.len()).find(|i| got[*i] != sent[*i] && got[*i] != before[*i]);
    assert_eq!(strange, None, "a byte of another transfer arrived");
    assert!(ours.bytes(0, LEN as usize) == at_end, "a byte of device memory changed after the end");
}

fn killed(test: &str, op: Op) {
    if serve() {
        return;
    }
    let ours = device_end(LEN);
    let mut other = Other::start(test, &ours, LEN as usize, &[]);
    let transfer = begin(&ours, &other, op);
    other.kill();
    end(&ours, op, &transfer);
    let error = transfer.tracker.error();
    // The socket may report it before the process has quite ended.
    assert!(matches!(error, Some(ErrorCode::PeerGone | ErrorCode::Transport)), "{error:?}");
    serves(&ours, &mut Other::start(test, &ours, LEN as usize, &[]));
}

fn another_peer_is_served(test: &str, op: Op) {
    if serve() {
        return;
    }
    let ours = device_end(LEN);
    let mut fresh = Other::start(test, &ours, LEN as usize, &[]);
    let other = Other::start(test, &ours, LEN as usize, &[]);
    let transfer = begin(&ours, &other, op);
    signal(&other, Signal::STOP);
    serves(&ours, &mut fresh);
    assert!(!transfer.tracker.is_finished());
    assert!(slots() <= 2 * DEPTH, "{} slots", slots());
    ours.transport.shutdown();
    end(&ours, op, &transfer);
}

macro_rules! harmed {
    ($($name:ident: $how:ident, $op:ident;)*) => {$(
        #[test]
        fn $name() {
            const NAME: &str = concat!("staging::", stringify!($name));
            on_a_device(NAME, || $how(NAME, Op::$op));
        }
    )*};
}

harmed! {
    stopped_in_the_middle_of_a_write: stopped, Write;
    stopped_in_the_middle_of_a_read: stopped, Read;
    killed_in_the_middle_of_a_write: killed, Write;
    killed_in_the_middle_of_a_read: killed, Read;
    while_one_peer_is_stopped_another_is_served: another_peer_is_served, Write;
}

#[test]
fn shutdown_ends_what_is_under_way() {
    const NAME: &str = "staging::shutdown_ends_what_is_under_way";
    on_a_device(NAME, || {
        if serve() {
            return;
        }
        let len = 24 * SLOT;
        let ours = device_end(len);
        let other = Other::start(NAME, &ours, len as usize, &[]);
        let key = other.link.import(remote_ticket(other.ticket.clone(), len)).expect("import");
        let under_way: Vec<_> = [Op::Write, Op::Read]
            .into_iter()
            .map(|op| {
                let job = ours.job(op, key, &[piece(0, 0, len)]);
                let (id, tracker) = (job.transfer, Arc::clone(&job.tracker));
                other.link.submit(job).expect("accepted");
                other.link.assist(id);
                tracker
            })
            .collect();
        ours.transport.shutdown();
        for tracker in under_way {
            assert!(tracker.is_finished());
            assert_eq!(tracker.error(), Some(ErrorCode::Closed));
        }
    });
}
