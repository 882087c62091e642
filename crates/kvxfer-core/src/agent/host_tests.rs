//! The seam as a channel sees it: who comes, who goes, and when nothing of a peer can land any more.

use super::{Host, now};
use crate::agent::{Agent, Peer};
use crate::config::AgentConfig;
use crate::transport::TransportKind;
use child::{Process, hear, role, tell};
use kvxfer_proto::wire::Message;
use kvxfer_proto::{ErrorCode, Geometry, Time};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "../../tests/common/child.rs"]
mod child;

pub(crate) const LONG: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<String>>,
    ticks: Mutex<Vec<Time>>,
    next_tick: Mutex<Option<Time>>,
}

impl Recorder {
    fn on(agent: &Agent) -> Arc<Self> {
        let r = Arc::new(Self::default());
        let host: Arc<dyn Host> = r.clone();
        agent.add_host(Arc::downgrade(&host)).expect("no pool, no clash");
        r
    }
    fn note(&self, what: &str, peer: &Peer) {
        self.seen.lock().push(format!("{what} {}", peer.name()));
    }
    fn count(&self, what: &str) -> usize {
        self.seen.lock().iter().filter(|s| s.starts_with(what)).count()
    }
}

impl Host for Recorder {
    fn message(&self, peer: &Peer, message: &Message) -> bool {
        if let Message::Attached { text, code, .. } = message {
            self.note(&format!("attached {code} {text}"), peer);
            return true;
        }
        false
    }
    fn peer_up(&self, peer: &Peer) {
        self.note("up", peer);
    }
    fn peer_gone(&self, peer: &Peer, code: ErrorCode) {
        self.note(&format!("gone {code}"), peer);
    }
    fn peer_fenced(&self, peer: &Peer) {
        self.note("fenced", peer);
    }
    fn tick(&self, now: Time) -> Option<Time> {
        self.ticks.lock().push(now);
        self.next_tick.lock().take()
    }
    fn closed(&self) {
        self.seen.lock().push("closed".into());
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < limit, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn agent(name: &str, kinds: &[TransportKind]) -> Agent {
    let config = AgentConfig { peer_timeout: Duration::from_millis(400), ..AgentConfig::default() };
    Agent::builder()
        .config(config)
        .name(format!("{name}-{}", std::process::id()))
        .allow(kinds.iter().copied())
        .listen("tcp://127.0.0.1:0")
        .build()
        .unwrap()
}

#[test]
fn a_channel_sees_peers_come_go_and_be_fenced_in_order() {
    for kind in [TransportKind::Inproc, TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp] {
        let (a, b) = (agent("host-a", &[kind]), agent("host-b", &[kind]));
        let early = Recorder::on(&b);
        let peer = a.connect(&b.addresses()[0], LONG).unwrap();
        let late = Recorder::on(&a);
        eventually("both know", || early.count("up") == 1 && late.count("up") == 1);
        peer.disconnect();
        eventually("both are fenced without anybody's death", || {
            early.count("fenced") == 1 && late.count("fenced") == 1
        });
        let seen = early.seen.lock().clone();
        let order: Vec<_> = seen.iter().map(|s| s.split(' ').next().unwrap()).collect();
        assert_eq!(order, ["up", "gone", "fenced"], "{kind}");
        a.shutdown(LONG).unwrap();
        assert_eq!(late.count("closed"), 1);
        assert_eq!((late.count("gone"), late.count("fenced")), (1, 1), "each once");
    }
}

#[test]
fn ticks_come_when_asked_for() {
    let a = agent("ticker", &[]);
    let r = Recorder::on(&a);
    a.schedule(Instant::now());
    eventually("a tick", || !r.ticks.lock().is_empty());
    let at = now() + Duration::from_millis(30);
    *r.next_tick.lock() = Some(at);
    a.schedule(Instant::now());
    eventually("the tick it asked for", || r.ticks.lock().iter().any(|t| *t >= at));
}

#[test]
fn a_message_nobody_takes_is_answered() {
    let (a, b) = (agent("asker", &[]), agent("empty", &[]));
    let r = Recorder::on(&a);
    let peer = a.connect(&b.addresses()[0], LONG).unwrap();
    peer.send(Message::Attach { channel: 1, pool: "kv".into(), geometry: Geometry::default() }).unwrap();
    eventually("an answer", || r.count("attached not_found") == 1);
    assert!(r.seen.lock().iter().any(|s| s.contains("no pool \"kv\"")));
}

/// What child processes do; an ordinary run passes at once.
#[test]
fn child_process() {
    if role().as_deref() == Some("visitor") {
        let kind = std::env::var("TEST_KIND").unwrap().parse().unwrap();
        let a = agent("visitor", &[kind]);
        a.connect(&std::env::var("TEST_ADDRESS").unwrap(), LONG).unwrap();
        tell("connected");
        hear();
    }
}

#[test]
fn a_stopped_peer_is_fenced_only_when_it_continues_or_dies() {
    for kind in [TransportKind::Shm, TransportKind::Cma] {
        for dies in [false, true] {
            let a = agent("watcher", &[kind]);
            let r = Recorder::on(&a);
            let env = [("TEST_KIND", kind.as_str()), ("TEST_ADDRESS", &*a.addresses()[0].clone())];
            let mut visitor = Process::start("agent::host::tests::child_process", "visitor", &env);
            visitor.hear();
            visitor.signal(libc::SIGSTOP);
            eventually("silence is noticed", || r.count("gone") == 1);
            // It could still write to shared memory the moment it continues: never fenced while it is stopped.
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(r.count("fenced"), 0, "{kind}");
            if dies {
                visitor.kill();
            } else {
                visitor.signal(libc::SIGCONT);
            }
            eventually("it is fenced", || r.count("fenced") == 1);
        }
    }
}
