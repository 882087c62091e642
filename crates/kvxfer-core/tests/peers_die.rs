//! Peers that are killed, stopped and restarted: every operation ends, nothing leaks, the others go on.

mod common;

use common::child::{Process, hear, role, tell};
use common::{LONG, eventually, pattern};
use kvxfer_core::transport::Piece;
use kvxfer_core::{Access, Agent, AgentConfig, ErrorCode, PeerState, TransferOptions, TransportKind};
use std::time::Duration;

const LEN: usize = 64 << 20;

/// What child processes do; an ordinary run passes at once.
#[test]
fn child() {
    match role().as_deref() {
        None => {}
        Some("receiver") => receiver(),
        Some("caller") => caller(),
        Some("forker") => forker(),
        Some("poor") => poor(),
        Some(other) => panic!("no role {other}"),
    }
}

fn kinds_of(text: &str) -> Vec<TransportKind> {
    text.split(',').map(|k| k.parse().unwrap()).collect()
}

fn from_env() -> Agent {
    let config = AgentConfig {
        name: std::env::var("TEST_NAME").ok(),
        peer_timeout: Duration::from_secs(1),
        ..AgentConfig::default()
    };
    let kinds = std::env::var("TEST_KINDS").unwrap_or_default();
    let kinds = if kinds.is_empty() { vec![] } else { kinds_of(&kinds) };
    Agent::builder().config(config).allow(kinds).listen("tcp://127.0.0.1:0").build().unwrap()
}

/// Exports a pool and lives as long as the parent.
fn receiver() {
    let agent = from_env();
    let pool = agent.allocate(LEN).unwrap();
    agent.export(&pool, "pool", Access::ReadWrite).unwrap();
    tell(&agent.addresses()[0]);
    while hear() != "end" {
        tell(&agent.peers().len().to_string());
    }
    agent.shutdown(LONG).unwrap();
    tell("ended");
}

/// Calls the parent.
fn caller() {
    let agent = from_env();
    let peer = agent.connect(&std::env::var("TEST_ADDRESS").unwrap(), LONG).unwrap();
    tell(&peer.epoch().to_string());
    hear();
}

fn parent(kind: TransportKind) -> Agent {
    let config = AgentConfig { peer_timeout: Duration::from_secs(1), ..AgentConfig::default() };
    common::builder(&[kind])
        .config(config)
        .name(format!("parent-{kind}-{}", std::process::id()))
        .allow([kind])
        .build()
        .unwrap()
}

const BETWEEN_PROCESSES: [TransportKind; 3] = [TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp];

fn all() -> Vec<Piece> {
    (0..64u64).map(|i| Piece { local_offset: i << 20, remote_offset: i << 20, len: 1 << 20 }).collect()
}

#[test]
fn a_killed_peer_ends_everything_and_its_restart_is_normal() {
    for kind in BETWEEN_PROCESSES {
        let a = parent(kind);
        let local = a.allocate(LEN).unwrap();
        local.memory().write_at(0, &pattern(LEN, 3)).unwrap();
        let name = format!("victim-{kind}-{}", std::process::id());
        let env = [("TEST_NAME", name.as_str()), ("TEST_KINDS", kind.as_str())];
        let mut before = None;
        let mut epoch = None;
        for round in 0..3 {
            let mut b = Process::start("child", "receiver", &env);
            let address = b.hear();
            let peer = match a.connect(&address, LONG) {
                Err(e) if e.code() == ErrorCode::NotAvailable => {
                    eprintln!("SKIPPED {kind}: {e}");
                    break;
                }
                done => done.unwrap(),
            };
            assert!(epoch.is_none_or(|e| peer.epoch() > e), "a restart has a newer epoch");
            epoch = Some(peer.epoch());
            let remote = peer.region("pool", LONG).unwrap();
            peer.write(&local, &remote, &all(), TransferOptions::default())
                .unwrap()
                .wait(LONG)
                .unwrap()
                .ok()
                .unwrap();
            // Killed with transfers under way.
            let under_way: Vec<_> = (0..8)
                .filter_map(|_| peer.write(&local, &remote, &all(), TransferOptions::default()).ok())
                .collect();
            b.kill();
            for t in under_way {
                let report = t.wait(LONG).unwrap();
                if let Some(code) = report.error {
                    assert!(matches!(code, ErrorCode::PeerGone | ErrorCode::Transport), "{kind}: {report:?}");
                }
            }
            eventually("the peer is gone", || peer.state() != PeerState::Up);
            assert_eq!(
                peer.write(&local, &remote, &all(), TransferOptions::default()).unwrap_err().code(),
                ErrorCode::PeerGone
            );
            assert_eq!(peer.region("pool", LONG).unwrap_err().code(), ErrorCode::PeerGone);
            assert!(a.peer(&name).is_none());
            drop((peer, remote, b));
            // The first round has started threads that stay.
            if round == 0 {
                settle();
                before = Some(common::resources());
            } else if let Some(before) = before {
                eventually("descriptors and threads are as before", || {
                    let now = common::resources();
                    now.0 <= before.0 && now.1 <= before.1
                });
            }
        }
    }
}

/// Lets what ends in the background end.
fn settle() {
    let mut last = common::resources();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        let now = common::resources();
        if now == last {
            return;
        }
        last = now;
    }
}

#[test]
fn transfers_with_a_stopped_peer_end_at_their_deadline() {
    for kind in BETWEEN_PROCESSES {
        let a = parent(kind);
        let local = a.allocate(LEN).unwrap();
        let name = format!("sleeper-{kind}-{}", std::process::id());
        let mut b =
            Process::start("child", "receiver", &[("TEST_NAME", &name), ("TEST_KINDS", kind.as_str())]);
        let address = b.hear();
        let Ok(peer) = a.connect(&address, LONG) else {
            eprintln!("SKIPPED {kind}");
            continue;
        };
        let remote = peer.region("pool", LONG).unwrap();
        b.signal(libc::SIGSTOP);
        let options =
            TransferOptions { timeout: Some(Duration::from_millis(200)), ..TransferOptions::default() };
        let mut reports = Vec::new();
        for _ in 0..4 {
            match peer.write(&local, &remote, &all(), options.clone()) {
                Ok(t) => reports.push(t.wait(LONG).unwrap()),
                Err(e) => assert_eq!(e.code(), ErrorCode::PeerGone, "{kind}: {e}"),
            }
        }
        for r in reports {
            // Same-host copies need no help of the peer; sockets do.
            assert!(
                matches!(
                    r.error,
                    None | Some(ErrorCode::TimedOut | ErrorCode::PeerGone | ErrorCode::Transport)
                ),
                "{kind}: {r:?}"
            );
        }
        let e = peer.region("pool", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(e.code(), ErrorCode::TimedOut | ErrorCode::PeerGone), "{e}");
        eventually("a silent peer is gone", || peer.state() != PeerState::Up);
        b.signal(libc::SIGCONT);
        let again = a.connect(&address, LONG).unwrap();
        assert_eq!(again.epoch(), peer.epoch(), "the same process, a new connection");
        let remote = again.region("pool", LONG).unwrap();
        again
            .write(&local, &remote, &all(), TransferOptions::default())
            .unwrap()
            .wait(LONG)
            .unwrap()
            .ok()
            .unwrap();
        b.tell("end");
        while b.hear() != "ended" {}
    }
}

#[test]
fn a_newer_epoch_replaces_a_stopped_one_of_its_name() {
    let config = AgentConfig { peer_timeout: Duration::from_secs(600), ..AgentConfig::default() };
    let a = common::builder(&[]).config(config).name("keeper").listen("tcp://127.0.0.1:0").build().unwrap();
    let address = a.addresses()[0].clone();
    let env = [("TEST_NAME", "restarting"), ("TEST_ADDRESS", address.as_str())];
    let first = Process::start("child", "caller", &env);
    first.hear();
    let old = a.peer("restarting").unwrap();
    first.signal(libc::SIGSTOP);
    let second = Process::start("child", "caller", &env);
    second.hear();
    let new = a.peer("restarting").unwrap();
    assert!(new.epoch() > old.epoch());
    assert_eq!((old.state(), new.state()), (PeerState::Gone(ErrorCode::PeerGone), PeerState::Up));
    assert_eq!(a.peers().len(), 1);
}

#[test]
fn a_child_of_fork_cannot_use_or_end_its_parents_agent() {
    let mut p = Process::start("child", "forker", &[]);
    assert_eq!(p.hear(), "child passed");
    assert_eq!(p.hear(), "parent passed");
    assert!(p.finish());
}

fn forker() {
    let (a, b, peer) = common::pair_with(&[]).unwrap();
    let region = a.allocate(4096).unwrap();
    b.export(&b.allocate(4096).unwrap(), "r", Access::ReadWrite).unwrap();
    let remote = peer.region("r", LONG).unwrap();
    let piece = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    // SAFETY: the child only makes calls that are refused at once, drops its copies and leaves with `_exit`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let refused = [
            a.connect("tcp://127.0.0.1:1", LONG).err(),
            a.allocate(1).err(),
            peer.notify(b"x").err(),
            peer.region("r", LONG).err(),
            peer.write(&region, &remote, &piece, TransferOptions::default()).err(),
            a.notification(LONG).err(),
            a.shutdown(LONG).err(),
        ];
        let good = refused.iter().all(|e| {
            e.as_ref().is_some_and(|e| e.code() == ErrorCode::Closed && e.to_string().contains("fork"))
        });
        drop((a, b, peer, region, remote));
        // SAFETY: ends this process without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: our own child; `status` is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0, "the child's calls were not refused, or it hung");
    tell("child passed");
    peer.write(&region, &remote, &piece, TransferOptions::default())
        .unwrap()
        .wait(LONG)
        .unwrap()
        .ok()
        .unwrap();
    peer.notify(b"still here").unwrap();
    assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"still here");
    a.shutdown(LONG).unwrap();
    tell("parent passed");
}

#[test]
fn an_agent_survives_running_out_of_descriptors() {
    let p = Process::start("child", "poor", &[]);
    let address = p.hear();
    let target = address.strip_prefix("tcp://").unwrap();
    // More connections than it has descriptors for; they send nothing.
    let crowd: Vec<_> = (0..80).filter_map(|_| std::net::TcpStream::connect(target).ok()).collect();
    let a = common::agent(&[TransportKind::Tcp]);
    let e = a.connect(&address, Duration::from_millis(300)).err();
    drop(crowd);
    eprintln!("while descriptors were out: {e:?}");
    eventually("it accepts again", || a.connect(&address, Duration::from_secs(2)).is_ok());
    a.peers()[0].notify(b"hello").unwrap();
    assert_eq!(p.hear(), "hello");
}

fn poor() {
    let agent = common::builder(&[TransportKind::Tcp]).listen("tcp://127.0.0.1:0").build().unwrap();
    let used = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let limit = libc::rlimit { rlim_cur: used + 24, rlim_max: used + 24 };
    // SAFETY: `limit` is valid for the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    tell(&agent.addresses()[0]);
    let n = agent.notification(LONG).unwrap().unwrap();
    tell(std::str::from_utf8(&n.payload).unwrap());
    hear();
}
