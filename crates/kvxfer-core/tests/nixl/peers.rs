//! Two processes: transfers, a peer that is killed or stopped in the middle, sockets underneath.

use crate::support::{End, Other, pattern, piece, remote_ticket, serve, with_nixl};
use kvxfer_core::transport::Transport;
use kvxfer_core::{ErrorCode, Op, Piece};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn in_two_processes(test: &str, body: impl FnOnce()) {
    if !serve() {
        with_nixl(test, body);
    }
}

fn moves_both_ways(test: &str, env: &[(&str, &str)]) {
    let len = 32 << 20;
    let ours = End::new("ours", len);
    ours.fill(1);
    let mut other = Other::start(test, &ours, len, env);
    let key = other.link.import(remote_ticket(other.ticket.clone(), len as u64)).expect("import");
    let pieces: Vec<Piece> = (0..100).map(|i| piece(i * 70_000, (99 - i) * 70_000, 70_000)).collect();
    let tracker = ours.run(&*other.link, Op::Write, key, &pieces);
    assert_eq!((tracker.error(), tracker.bytes_done()), (None, 7_000_000));
    let (sent, got) = (pattern(1, len), other.bytes(0, 7_000_000));
    for p in &pieces {
        let (l, r) = (p.local_offset as usize, p.remote_offset as usize);
        assert!(sent[l..l + 70_000] == got[r..r + 70_000], "{p:?}");
    }
    let tracker = ours.run(&*other.link, Op::Read, key, &[piece(0, 20 << 20, 8 << 20)]);
    assert_eq!(tracker.error(), None);
    assert!(ours.bytes(0, 8 << 20) == pattern(99, len)[20 << 20..28 << 20]);
    for i in 0..200 {
        let tracker = ours.run(&*other.link, Op::Write, key, &[piece(i * 64, i * 64, 64)]);
        assert_eq!(tracker.error(), None);
    }
    assert!(other.bytes(0, 200 * 64) == ours.bytes(0, 200 * 64));
    other.kill();
    other.link.close();
    assert!(other.link.fenced(), "the process of {} is gone", other.info.name);
}

#[test]
fn write_and_read() {
    in_two_processes("peers::write_and_read", || moves_both_ways("peers::write_and_read", &[]));
}

/// Over sockets the other side has to help with every byte, which nobody but its keeper does.
#[test]
fn sockets_underneath() {
    const TCP: (&str, &str) = ("UCX_TLS", "tcp");
    in_two_processes("peers::sockets_underneath", || {
        // SAFETY: this process has one test thread, which is the only one that reads or writes the environment.
        unsafe { std::env::set_var(TCP.0, TCP.1) };
        moves_both_ways("peers::sockets_underneath", &[TCP]);
    });
}

fn ends_after(test: &str, tcp: bool, harm: impl FnOnce(&mut Other), closes: bool) -> Option<ErrorCode> {
    let env: &[(&str, &str)] = if tcp { &[("UCX_TLS", "tcp")] } else { &[] };
    let len = 512 << 20;
    let ours = End::new("ours", len);
    let mut other = Other::start(test, &ours, len, env);
    let key = other.link.import(remote_ticket(other.ticket.clone(), len as u64)).expect("import");
    let pieces: Vec<Piece> = (0..512).map(|i| piece(i << 20, i << 20, 1 << 20)).collect();
    let job = ours.job(Op::Write, key, &pieces);
    let (id, tracker) = (job.transfer, Arc::clone(&job.tracker));
    other.link.submit(job).expect("accepted");
    for _ in 0..4 {
        other.link.assist(id);
    }
    harm(&mut other);
    let start = Instant::now();
    let mut asked = false;
    while !tracker.is_finished() {
        ours.transport.poll();
        // What an agent does when the transfer's deadline passes, or when it learns of the peer's end.
        if !asked && start.elapsed() > Duration::from_millis(300) {
            asked = true;
            if closes {
                other.link.close();
            } else {
                tracker.request_cancel(ErrorCode::TimedOut);
                other.link.cancel(id);
            }
        }
        assert!(start.elapsed() < Duration::from_secs(20), "the transfer does not end: {tracker:?}");
    }
    assert!(tracker.all_decided());
    let next = other.link.submit(ours.job(Op::Write, key, &[piece(0, 0, 64)]));
    if tracker.error() != Some(ErrorCode::TimedOut) {
        assert!(next.is_err(), "a link that has failed takes no more");
    }
    // This side goes on: a new peer is served by the same agent.
    let mut fresh = Other::start(test, &ours, 1 << 20, env);
    let key = fresh.link.import(remote_ticket(fresh.ticket.clone(), 1 << 20)).expect("import");
    ours.fill(4);
    assert_eq!(ours.run(&*fresh.link, Op::Write, key, &[piece(0, 0, 1 << 20)]).error(), None);
    assert!(fresh.bytes(0, 1 << 20) == pattern(4, 1 << 20));
    tracker.error()
}

#[test]
fn killed_in_the_middle() {
    const NAME: &str = "peers::killed_in_the_middle";
    in_two_processes(NAME, || {
        let error = ends_after(NAME, false, Other::kill, true);
        // The socket may report it before the process has quite ended.
        assert!(matches!(error, Some(ErrorCode::PeerGone | ErrorCode::Transport)), "{error:?}");
    });
}

#[test]
fn killed_in_the_middle_over_sockets() {
    const NAME: &str = "peers::killed_in_the_middle_over_sockets";
    in_two_processes(NAME, || {
        // SAFETY: as in `sockets_underneath`.
        unsafe { std::env::set_var("UCX_TLS", "tcp") };
        let error = ends_after(NAME, true, Other::kill, true);
        // The socket may report it before the process has quite ended.
        assert!(matches!(error, Some(ErrorCode::PeerGone | ErrorCode::Transport)), "{error:?}");
    });
}

fn stop(other: &mut Other) {
    let pid = rustix::process::Pid::from_raw(other.pid() as i32).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("the child is ours");
}

#[test]
fn stopped_in_the_middle_over_sockets() {
    const NAME: &str = "peers::stopped_in_the_middle_over_sockets";
    in_two_processes(NAME, || {
        // SAFETY: as in `sockets_underneath`.
        unsafe { std::env::set_var("UCX_TLS", "tcp") };
        let error = ends_after(NAME, true, stop, false);
        assert!(matches!(error, Some(ErrorCode::TimedOut | ErrorCode::Transport)), "{error:?}");
    });
}
