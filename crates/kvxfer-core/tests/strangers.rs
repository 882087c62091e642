//! Who may connect, and what strangers can do to an agent: nothing.

mod common;

use common::{LONG, eventually};
use kvxfer_core::config::TransportPolicy;
use kvxfer_core::{Agent, AgentConfig, ErrorCode, TransportKind};
use kvxfer_proto::frame::{PREAMBLE_CONTROL, PREAMBLE_DATA, encode};
use kvxfer_proto::wire::{Hello, HostIdentity, Message};
use kvxfer_proto::{AgentName, Epoch};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

fn keyed(key: Option<&str>) -> Agent {
    let b = common::builder(&[]).listen("tcp://127.0.0.1:0");
    match key {
        Some(k) => b.auth_key(k),
        None => b,
    }
    .build()
    .unwrap()
}

#[test]
fn no_stranger_connects() {
    for (ours, theirs) in
        [(None, None), (Some("k"), Some("k")), (Some("k"), Some("x")), (Some("k"), None), (None, Some("k"))]
    {
        let (a, b) = (keyed(ours), keyed(theirs));
        let result = a.connect(&b.addresses()[0], LONG);
        if ours == theirs {
            result.unwrap().notify(b"in").unwrap();
            assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"in");
        } else {
            let e = result.unwrap_err();
            assert_eq!(e.code(), ErrorCode::Unauthenticated, "{e}");
            assert!(
                e.to_string().contains(a.name().as_str()) && e.to_string().contains(b.name().as_str()),
                "{e}"
            );
            assert!(!e.is_retryable());
            assert!(a.peers().is_empty() && b.peers().is_empty());
        }
    }
}

#[test]
fn names_and_epochs_decide_who_is_who() {
    let keeper = common::agent(&[]);
    let named = || Agent::builder().name("twin").build().unwrap();
    let (older, newer) = (named(), named());
    assert!(newer.epoch() > older.epoch());
    newer.connect(&keeper.addresses()[0], LONG).unwrap();
    let e = older.connect(&keeper.addresses()[0], LONG).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Mismatch);
    assert!(
        e.to_string().contains(&older.epoch().to_string())
            && e.to_string().contains(&newer.epoch().to_string()),
        "{e}"
    );
    assert_eq!(keeper.peer("twin").unwrap().epoch(), newer.epoch());

    let same = Agent::builder().name(keeper.name().as_str()).build().unwrap();
    let e = same.connect(&keeper.addresses()[0], LONG).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Mismatch);
    let e = keeper.connect(&keeper.addresses()[0], LONG).unwrap_err();
    assert!(e.to_string().contains("itself"), "{e}");
}

fn with_policy(policy: TransportPolicy) -> Agent {
    let config = AgentConfig { transports: policy, ..AgentConfig::default() };
    Agent::builder()
        .config(config)
        .name(common::agent(&[]).name().as_str())
        .listen("tcp://127.0.0.1:0")
        .build()
        .unwrap()
}

#[test]
fn requirements_and_prohibitions_are_kept_or_said() {
    use TransportKind::{Inproc, Shm, Tcp};
    let require = |r: &[&str]| TransportPolicy {
        require: r.iter().map(|s| (*s).to_owned()).collect(),
        ..TransportPolicy::default()
    };
    let forbid = |f: &[TransportKind]| TransportPolicy { forbid: f.to_vec(), ..TransportPolicy::default() };

    let (a, b) = (with_policy(require(&["rdma", "nvlink"])), common::agent(&[]));
    let e = a.connect(&b.addresses()[0], LONG).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Requirement);
    assert!(e.to_string().contains("rdma") && e.to_string().contains("inproc"), "{e}");
    // The acceptor's requirement counts as much.
    let e = b.connect(&a.addresses()[0], LONG).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Requirement, "{e}");

    let (a, b) = (with_policy(require(&["tcp"])), common::agent(&[]));
    let peer = a.connect(&b.addresses()[0], LONG).unwrap();
    let region = b.allocate(64).unwrap();
    b.export(&region, "r", kvxfer_core::Access::ReadWrite).unwrap();
    assert_eq!(
        peer.region("r", LONG).unwrap().transports(),
        [Tcp],
        "nothing but what is required carries bytes"
    );

    let (a, b) = (with_policy(forbid(&[Inproc, Shm])), common::agent(&[]));
    let peer = a.connect(&b.addresses()[0], LONG).unwrap();
    assert!(peer.paths().iter().all(|(k, _)| ![Inproc, Shm].contains(k)), "{:?}", peer.paths());
    assert!(peer.skipped().iter().any(|(k, r)| *k == Shm && r.contains("forbid")));

    let (a, b) = (common::agent(&[Tcp]), common::agent(&[Inproc]));
    let e = a.connect(&b.addresses()[0], LONG).unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotAvailable);
    assert!(e.to_string().contains("tcp") && e.to_string().contains(b.name().as_str()), "{e}");
    assert!(a.peers().is_empty() && b.peers().is_empty());
}

fn hello(name: &str) -> Hello {
    Hello {
        protocol_min: 1,
        protocol_max: 1,
        library: "test".into(),
        agent: AgentName::new(name).unwrap(),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: "x".into(),
            pid_namespace: 1,
            net_namespace: 1,
            pid: 1,
            process: 1,
            side_socket: String::new(),
        },
        challenge: vec![7; 32],
        auth_required: false,
    }
}

fn raw(agent: &Agent) -> TcpStream {
    let s = TcpStream::connect(agent.addresses()[0].strip_prefix("tcp://").unwrap()).unwrap();
    s.set_read_timeout(Some(LONG)).unwrap();
    s
}

/// Everything the agent says until it closes.
fn until_closed(mut s: TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    match s.read_to_end(&mut got) {
        Ok(_) => got,
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => got,
        Err(e) => panic!("the agent did not close the connection: {e}"),
    }
}

#[test]
fn hostile_connections_are_closed_and_others_are_served() {
    let (a, b, peer) = common::pair_with(&[]).unwrap();
    let before = {
        peer.notify(b"warm").unwrap();
        b.notification(LONG).unwrap().unwrap();
        common::resources()
    };
    let control = PREAMBLE_CONTROL.to_vec();
    let frame = |m: &Message| [&control[..], &encode(m).unwrap()].concat();
    let mut wrong_version = hello("v");
    (wrong_version.protocol_min, wrong_version.protocol_max) = (77, 78);
    let mut short = hello("s");
    short.challenge.truncate(3);
    let attacks: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 64],
        [&control[..], &u32::MAX.to_le_bytes()].concat(),
        [&control[..], &(65u32 << 10).to_le_bytes()].concat(),
        [&control[..], &5u32.to_le_bytes(), b"xxxxx"].concat(),
        [&control[..], &common::pattern(2000, 9)].concat(),
        frame(&Message::Welcome),
        frame(&Message::Hello(wrong_version)),
        frame(&Message::Hello(short)),
        frame(&Message::Reserve {
            channel: 1,
            serial: 1,
            request: kvxfer_core::RequestId::new("r").unwrap(),
            chunks: vec![],
            deadline_ms: 1,
            integrity: kvxfer_core::Integrity::Off,
            more: 0,
            places: vec![],
            advance: 0,
        }),
        // A hello and then an answer that proves nothing.
        [frame(&Message::Hello(hello("liar"))), encode(&Message::Auth { mac: vec![1; 32] }).unwrap()]
            .concat(),
        // A data connection for a session nobody has.
        [&PREAMBLE_DATA[..], &[9; 16], &[0, 0]].concat(),
    ];
    for (i, attack) in attacks.iter().enumerate() {
        let mut s = raw(&b);
        let _ = s.write_all(attack);
        let said = until_closed(s);
        if i == 7 {
            let text = String::from_utf8_lossy(&said);
            assert!(text.contains("77") && text.contains("protocol"), "both versions are named: {text}");
        }
        peer.notify(&[i as u8]).unwrap();
        assert_eq!(b.notification(LONG).unwrap().unwrap().payload, [i as u8], "the peer is still served");
    }
    assert_eq!(b.peers().len(), 1);
    eventually("no descriptor and no thread is left", || {
        let now = common::resources();
        now.0 <= before.0 && now.1 <= before.1
    });
    drop(a);
}

#[test]
fn slow_strangers_neither_stay_nor_keep_others_out() {
    let config = AgentConfig { connect_timeout: Duration::from_millis(700), ..AgentConfig::default() };
    let b = Agent::builder().config(config).name("patient").listen("tcp://127.0.0.1:0").build().unwrap();
    // Many that say a little and then nothing; one that drips.
    let crowd: Vec<_> = (0..200)
        .filter_map(|i| {
            let mut s = TcpStream::connect(b.addresses()[0].strip_prefix("tcp://").unwrap()).ok()?;
            s.write_all(&PREAMBLE_CONTROL[..i % 9]).ok()?;
            Some(s)
        })
        .collect();
    let drip = raw(&b);
    let mut dripping = drip.try_clone().unwrap();
    let dripper = std::thread::spawn(move || {
        let bytes = [&PREAMBLE_CONTROL[..], &[200, 0, 0, 0], &[0; 200]].concat();
        for byte in bytes {
            if dripping.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let a = common::agent(&[]);
    a.connect(&b.addresses()[0], LONG).unwrap().notify(b"through").unwrap();
    assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"through");
    until_closed(drip);
    dripper.join().unwrap();
    for s in crowd {
        s.set_read_timeout(Some(LONG)).unwrap();
        until_closed(s);
    }
    assert_eq!(b.peers().len(), 1);
}

#[test]
fn a_peer_that_does_not_fetch_notifications_stops_its_sender_not_the_agent() {
    let (a, b, peer) = common::pair_with(&[]).unwrap();
    let mut sent = 0u32;
    let refused = loop {
        match peer.notify(&[&sent.to_le_bytes()[..], &[0; 1020]].concat()) {
            Ok(()) => sent += 1,
            Err(e) => break e,
        }
        assert!(sent < 10_000_000);
    };
    assert_eq!(refused.code(), ErrorCode::NoCapacity);
    assert!(refused.is_retryable());
    for i in 0..sent {
        let n = b.notification(LONG).unwrap().expect("every accepted notification arrives");
        assert_eq!(n.payload[..4], i.to_le_bytes(), "in order");
    }
    peer.notify(b"room again").unwrap();
    assert_eq!(b.notification(LONG).unwrap().unwrap().payload, b"room again");
    drop(a);
}

#[test]
fn many_agents_come_and_go_without_a_trace() {
    let b = common::agent(&[]);
    let visit = || {
        let a = common::agent(&[]);
        let peer = a.connect(&b.addresses()[0], LONG).unwrap();
        peer.notify(b"hi").unwrap();
        b.notification(LONG).unwrap().unwrap();
        a.shutdown(LONG).unwrap();
    };
    visit();
    eventually("gone", || b.peers().is_empty());
    std::thread::sleep(Duration::from_millis(200));
    let before = common::resources();
    (0..30).for_each(|_| visit());
    eventually("descriptors and threads are as before", || {
        let now = common::resources();
        now.0 <= before.0 && now.1 <= before.1
    });
}
