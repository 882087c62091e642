//! Who hands a peer's messages on, and in which order.

use super::super::host::Host;
use super::super::{Agent, Peer};
use super::attend;
use crate::TransportKind;
use crate::config::AgentConfig;
use kvxfer_proto::wire::Message;
use kvxfer_proto::{ErrorCode, Time};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

/// Notes what it is told and by whom.
#[derive(Default)]
struct Listener {
    heard: Mutex<Vec<(u64, ThreadId)>>,
    gone: Mutex<Option<(usize, ErrorCode)>>,
    /// Held by a test, it makes the listener slow.
    gate: Mutex<()>,
}

impl Listener {
    fn on(agent: &Agent) -> Arc<Self> {
        let listener = Arc::new(Self::default());
        let host: Arc<dyn Host> = listener.clone();
        agent.add_host(Arc::downgrade(&host)).expect("no pool, no clash");
        listener
    }
    fn count(&self) -> usize {
        self.heard.lock().len()
    }
    fn serials(&self) -> Vec<u64> {
        self.heard.lock().iter().map(|h| h.0).collect()
    }
}

impl Host for Listener {
    fn message(&self, _: &Peer, message: &Message) -> bool {
        let Message::Renew { serial, .. } = message else { return false };
        drop(self.gate.lock());
        self.heard.lock().push((*serial, std::thread::current().id()));
        true
    }
    fn peer_gone(&self, _: &Peer, code: ErrorCode) {
        *self.gone.lock() = Some((self.count(), code));
    }
    fn peer_fenced(&self, _: &Peer) {}
    fn tick(&self, _: Time) -> Option<Time> {
        None
    }
}

fn agent(name: &str) -> Agent {
    // No ping wakes anybody by the way.
    let config = AgentConfig { peer_timeout: Duration::from_secs(600), ..AgentConfig::default() };
    Agent::builder()
        .config(config)
        .name(format!("{name}-{}", std::process::id()))
        .allow([TransportKind::Shm])
        .listen("tcp://127.0.0.1:0")
        .build()
        .expect("an agent")
}

/// Two agents on this host: what the second listens to, and the first as it knows it and the other way round.
fn pair(name: &str) -> ((Agent, Agent), Arc<Listener>, (Peer, Peer)) {
    let (a, b) = (agent(&format!("{name}-a")), agent(&format!("{name}-b")));
    let listener = Listener::on(&b);
    let to = a.connect(&b.addresses()[0], LONG).expect("connected");
    until("both are up", || b.peer(a.name().as_str()).is_some());
    let from = b.peer(a.name().as_str()).expect("up");
    assert!(to.inner.lane().is_some() && from.inner.lane().is_some(), "lanes both ways");
    ((a, b), listener, (to, from))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < limit, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn say(to: &Peer, serial: u64) {
    to.send(Message::Renew { channel: 1, serial }).expect("said");
}

#[test]
fn a_thread_that_waits_hands_on_what_comes_and_the_progress_thread_what_comes_later() {
    let (_agents, listener, (to, from)) = pair("waits");
    let me = std::thread::current().id();
    let mut mine = 0;
    for serial in 0..20 {
        // The progress thread has gone to sleep.
        std::thread::sleep(Duration::from_millis(5));
        let mut looks = 0;
        attend(&from.agent, [from.inner.clone()], LONG, || {
            looks += 1;
            if looks == 2 {
                say(&to, serial);
            }
            listener.count() as u64 > serial
        });
        mine += usize::from(listener.heard.lock().last().is_some_and(|h| h.1 == me));
    }
    // It may be awake by itself now and then.
    assert!(mine > 10, "handed on here: {mine} of 20");
    say(&to, 20);
    until("it is heard though nobody waits", || listener.count() == 21);
    assert_ne!(listener.heard.lock()[20].1, me);
    assert_eq!(listener.serials(), (0..21).collect::<Vec<_>>());
}

#[test]
fn threads_that_come_and_go_lose_nothing_and_keep_the_order() {
    const MESSAGES: u64 = 20_000;
    let (_agents, listener, (to, from)) = pair("come-and-go");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for pause in [0, 30, 300] {
            let (from, over) = (&from, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    attend(&from.agent, [from.inner.clone()], Duration::from_micros(100), || false);
                    std::thread::sleep(Duration::from_micros(pause));
                }
            });
        }
        for serial in 0..MESSAGES {
            say(&to, serial);
            if serial % 100 == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        until("all are heard", || listener.count() as u64 == MESSAGES);
        over.store(true, Ordering::Relaxed);
    });
    assert!(listener.serials().into_iter().eq(0..MESSAGES), "in order, each once");
}

#[test]
fn more_than_a_lane_holds_waits_and_arrives_in_order() {
    const MESSAGES: u64 = 60_000;
    let (_agents, listener, (to, _from)) = pair("full");
    let gate = listener.gate.lock();
    for serial in 0..MESSAGES {
        say(&to, serial);
    }
    assert!(listener.count() == 0, "nobody listens yet");
    drop(gate);
    until("all are heard", || listener.count() as u64 == MESSAGES);
    assert!(listener.serials().into_iter().eq(0..MESSAGES), "in order, each once");
}

#[test]
fn a_peer_that_does_not_listen_is_told_no_more_than_memory_allows() {
    let (_agents, listener, (to, _from)) = pair("deaf");
    let gate = listener.gate.lock();
    let text = "x".repeat(200);
    let long =
        || to.send(Message::Refused { channel: 1, serial: 1, code: ErrorCode::Busy, text: text.clone() });
    say(&to, 0);
    let refusal = (0..1_000_000).find_map(|_| long().err()).expect("refused in the end");
    assert_eq!(refusal.code(), ErrorCode::NoCapacity);
    drop(gate);
    until("there is room again", || to.send(Message::Renew { channel: 1, serial: 1 }).is_ok());
    until("it is heard", || listener.serials().contains(&1));
}

#[test]
fn what_a_peer_says_before_it_leaves_is_heard_before_its_end() {
    for round in 0..20 {
        let ((a, _b), listener, (to, _from)) = pair(&format!("leaves-{round}"));
        for serial in 0..500 {
            say(&to, serial);
        }
        a.shutdown(LONG).expect("closed");
        until("the end is heard", || listener.gone.lock().is_some());
        assert_eq!(*listener.gone.lock(), Some((500, ErrorCode::PeerGone)));
    }
}

#[test]
fn nonsense_in_a_lane_ends_the_peer_whoever_finds_it() {
    for found_here in [false, true] {
        let (_agents, listener, (to, from)) = pair(&format!("nonsense-{found_here}"));
        say(&to, 0);
        until("it is heard", || listener.count() == 1);
        std::thread::sleep(Duration::from_millis(5));
        to.inner.conn.send_bytes(&[0xff; 64]);
        say(&to, 1);
        if found_here {
            attend(&from.agent, [from.inner.clone()], LONG, || listener.gone.lock().is_some());
        }
        until("the peer is gone", || listener.gone.lock().is_some());
        assert_eq!(*listener.gone.lock(), Some((1, ErrorCode::Protocol)), "nothing is taken after it");
        until("its side hears of it", || to.state() != crate::PeerState::Up);
    }
}
