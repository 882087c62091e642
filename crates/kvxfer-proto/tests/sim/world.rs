//! A virtual world: one receiver, some senders, links between them, memory that is written slowly, and a clock that jumps.
//!
//! After every step the oracle looks at everything: who owns which page, what is visible, which bytes are there.

use kvxfer_proto::pool::{Hold, Known, Use};
use kvxfer_proto::query::Asker;
use kvxfer_proto::receiver::{self, Event, PeerId, Receiver, Settings, Verify};
use kvxfer_proto::sender::{self, Declaration, Failure, Sender, Write};
use kvxfer_proto::wire::{Check, ChunkSpec, FoundChunk, Message, Slot};
use kvxfer_proto::{
    AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, Integrity, PageIndex, RequestId, Time,
    layout::Layout,
};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use std::time::Duration;

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const LEN: u64 = 100;

/// What may go wrong. All decisions come from `choices`, so a failing case shrinks towards none.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches of a test")]
pub(crate) struct Faults {
    /// Consumed round and round; 0 always means that nothing goes wrong.
    pub(crate) choices: Vec<u8>,
    /// Messages may be lost.
    pub(crate) drop: bool,
    /// Messages may come twice.
    pub(crate) duplicate: bool,
    /// Messages may overtake one another.
    pub(crate) reorder: bool,
    /// Writes may claim success and leave damage.
    pub(crate) corrupt: bool,
    /// Writes may fail.
    pub(crate) fail: bool,
    /// Writes may take a hundred times as long.
    pub(crate) slow: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Request {
        sender: usize,
        first: u32,
        count: u32,
        deadline_ms: u64,
        supply_after_ms: u64,
    },
    /// The same, but only `named` chunks are known when it is declared; the others are named one by one, each just before its
    /// bytes are there. `extra` more are announced than ever come.
    Stepwise {
        sender: usize,
        first: u32,
        count: u32,
        named: u32,
        extra: u32,
        deadline_ms: u64,
        supply_after_ms: u64,
    },
    Abort {
        sender: usize,
    },
    Kill {
        sender: usize,
        silent_ms: u64,
    },
    Stop {
        sender: usize,
        ms: u64,
    },
    Disconnect {
        sender: usize,
    },
    Consume {
        key: u32,
        hold_ms: u64,
        remove: bool,
    },
    /// Asks for chunks and reads back what is found, which takes a while.
    ReadBack {
        sender: usize,
        first: u32,
        count: u32,
        lease_ms: u64,
        read_ms: u64,
    },
    /// From now on this sender's requests want pages in advance.
    AtOnce {
        sender: usize,
    },
    RestartReceiver,
}

/// A query and what became of it.
pub(crate) struct ReadBack {
    peer: PeerId,
    query: u64,
    first: u32,
    read_ms: u64,
    seen: Vec<(FoundChunk, Content)>,
    /// Chunks read, and whether what was read counts.
    pub(crate) result: Option<Result<usize, ErrorCode>>,
}

enum Ev {
    Action(Action),
    ToReceiver { from: PeerId, message: Message },
    ToSender { to: PeerId, message: Message },
    WriteStarts(PeerId, Write),
    WriteEnds(PeerId, Write, Landing),
    Supply { peer: PeerId, serial: u64, chunk: u32 },
    Extend { peer: PeerId, serial: u64, spec: ChunkSpec, last: bool },
    Verify(u64, Box<Verify>),
    Unpin(u64, Hold, ChunkKey),
    Fenced(u64, PeerId),
    Connect(usize),
    Resume(usize),
    ReadEnds(usize),
    Wake,
}

#[derive(Clone, Copy, PartialEq)]
enum Landing {
    Good,
    Damaged,
    Failed,
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Garbage,
    Chunk(ChunkKey),
}

pub(crate) struct Request {
    pub(crate) name: RequestId,
    pub(crate) peer: PeerId,
    pub(crate) serial: u64,
    pub(crate) deadline: Time,
    pub(crate) result: Option<(Time, Result<sender::Summary, Failure>)>,
    specs: Vec<ChunkSpec>,
}

struct Tx {
    peer: PeerId,
    machine: Option<Sender>,
    asker: Option<Asker>,
    stopped: bool,
    at_once: bool,
    named: u32,
    held: Vec<Message>,
    last_arrival: [Time; 2],
}

/// A write under way, in the order of their start.
struct Flight {
    write: Write,
    key: ChunkKey,
    cancelled: bool,
    ends: Time,
}

pub(crate) struct World {
    pub(crate) now: Time,
    pub(crate) receiver: Receiver,
    pub(crate) requests: Vec<Request>,
    pub(crate) events: Vec<Event>,
    pub(crate) read_backs: Vec<ReadBack>,
    /// Milliseconds that every message takes, instead of what the faults choose.
    pub(crate) delay: Option<u64>,
    settings: Settings,
    generation_of_receiver: u64,
    senders: Vec<Tx>,
    agenda: BinaryHeap<Reverse<(Time, u64)>>,
    bodies: HashMap<u64, Ev>,
    next: u64,
    faults: Faults,
    choice: usize,
    pages: Vec<Content>,
    flights: BTreeMap<(PeerId, u64, u32), Flight>,
    verified: HashSet<ChunkKey>,
    handed_out: HashMap<(PageIndex, Generation), (PeerId, u64, u32)>,
    pins: Vec<(Hold, ChunkKey)>,
    connections: u64,
    gone: BTreeSet<PeerId>,
    last_generation: HashMap<PageIndex, Generation>,
    advanced: HashSet<(PageIndex, Generation)>,
}

pub(crate) fn key(n: u32) -> ChunkKey {
    ChunkKey::new(format!("chunk-{n}")).expect("valid")
}

pub(crate) fn settings(pages: u32) -> Settings {
    Settings {
        pool: "kv".into(),
        layout: Layout::new(LEN, pages).expect("valid"),
        geometry: Geometry { page_bytes: LEN, ..Geometry::default() },
        lease: Duration::from_millis(300),
        admission_timeout: Duration::from_secs(2),
        max_queue: 64,
        retention: Duration::from_secs(3),
        advance: pages / 3,
    }
}

impl World {
    pub(crate) fn new(settings: Settings, senders: usize, faults: Faults) -> Self {
        let pages = settings.layout.pages() as usize;
        let mut world = Self {
            now: Time(0),
            receiver: Receiver::new(settings.clone()),
            requests: Vec::new(),
            events: Vec::new(),
            read_backs: Vec::new(),
            delay: None,
            settings,
            generation_of_receiver: 0,
            senders: Vec::new(),
            agenda: BinaryHeap::new(),
            bodies: HashMap::new(),
            next: 0,
            faults,
            choice: 0,
            pages: vec![Content::Garbage; pages],
            flights: BTreeMap::new(),
            verified: HashSet::new(),
            handed_out: HashMap::new(),
            pins: Vec::new(),
            connections: 0,
            gone: BTreeSet::new(),
            last_generation: HashMap::new(),
            advanced: HashSet::new(),
        };
        for i in 0..senders {
            let peer = world.new_peer(i);
            let tx = Tx {
                peer,
                machine: None,
                asker: None,
                stopped: false,
                at_once: false,
                named: 0,
                held: Vec::new(),
                last_arrival: [Time(0); 2],
            };
            world.senders.push(tx);
            world.connect(i);
        }
        world
    }

    pub(crate) fn schedule(&mut self, at_ms: u64, action: Action) {
        self.at(Time(at_ms * MS), Ev::Action(action));
    }

    /// Runs until nothing is left to do; then everything is cut off and the last pages must come back.
    pub(crate) fn run(&mut self) {
        self.run_agenda(Time::NEVER);
        for r in self.read_backs.iter().filter(|r| !self.faults.drop && !self.gone.contains(&r.peer)) {
            assert!(r.result.is_some(), "query {} of {:?} never ended", r.query, r.peer);
        }
        for i in 0..self.senders.len() {
            self.kill(i, 0);
        }
        self.run_agenda(Time::NEVER);
        let stats = self.receiver.stats();
        let pages = self.settings.layout.pages();
        assert_eq!(
            (stats.queued, stats.active, stats.quarantined_requests),
            (0, 0, 0),
            "left over: {stats:?}"
        );
        assert_eq!(stats.pages.free + stats.pages.published, pages, "pages were lost: {stats:?}");
        assert_eq!(stats.pages.pinned, 0, "{stats:?}");
        for r in &self.requests {
            assert!(r.result.is_some() || self.gone.contains(&r.peer), "request {} never ended", r.name);
        }
    }

    fn run_agenda(&mut self, until: Time) {
        for step in 0.. {
            if self.now >= until {
                return;
            }
            assert!(step < 2_000_000, "the world does not come to rest");
            let due = [self.receiver.next_timeout()]
                .into_iter()
                .chain(self.senders.iter().map(|t| {
                    if t.stopped { None } else { t.machine.as_ref().and_then(Sender::next_timeout) }
                }))
                .flatten()
                .min();
            let event = self.agenda.peek().map(|Reverse(e)| e.0);
            match (event, due) {
                (None, None) => return,
                (Some(at), due) if due.is_none_or(|d| at <= d) => {
                    let Some(Reverse((at, id))) = self.agenda.pop() else { return };
                    self.now = self.now.max(at);
                    if let Some(ev) = self.bodies.remove(&id) {
                        self.event(ev);
                    }
                }
                (_, Some(due)) => {
                    self.now = self.now.max(due);
                    self.receiver.tick(self.now);
                    let now = self.now;
                    for tx in self.senders.iter_mut().filter(|t| !t.stopped) {
                        if let Some(m) = &mut tx.machine {
                            m.tick(now);
                        }
                    }
                }
                (Some(_), None) => unreachable!("covered by the second arm"),
            }
            self.settle();
        }
    }

    // ---- steps ----

    fn event(&mut self, ev: Ev) {
        match ev {
            Ev::Wake => {}
            Ev::ReadEnds(i) => self.read_ends(i),
            Ev::Action(action) => self.action(action),
            Ev::ToReceiver { from, message } => {
                if !self.gone.contains(&from) {
                    assert!(self.receiver.message(self.now, &from, &message), "not taken: {message:?}");
                }
            }
            Ev::ToSender { to, message } => self.deliver(&to, message),
            Ev::WriteStarts(peer, write) => self.write_starts(&peer, write),
            Ev::WriteEnds(peer, write, landing) => self.write_ends(&peer, write, landing),
            Ev::Supply { peer, serial, chunk } => {
                if let Some(m) = self.machine(&peer) {
                    // The request may have ended meanwhile.
                    let _ = m.supply(serial, chunk);
                }
            }
            Ev::Extend { peer, serial, spec, last } => {
                let named = self.machine(&peer).and_then(|m| m.extend(serial, vec![spec.clone()], last).ok());
                if let Some(chunk) = named {
                    let r = self.requests.iter_mut().find(|r| r.peer == peer && r.serial == serial);
                    r.expect("known").specs.push(spec);
                    self.at(self.now, Ev::Supply { peer, serial, chunk });
                }
            }
            Ev::Verify(incarnation, verify) => {
                if incarnation == self.generation_of_receiver {
                    let b = &verify.binding;
                    let good = self.pages[b.page.0 as usize] == Content::Chunk(b.key.clone());
                    if good {
                        self.verified.insert(b.key.clone());
                    }
                    self.receiver.verified(self.now, verify.token, good);
                }
            }
            Ev::Unpin(incarnation, hold, key) => {
                if incarnation == self.generation_of_receiver {
                    let at = self.pins.iter().position(|p| *p == (hold, key.clone())).expect("pinned");
                    self.pins.swap_remove(at);
                    self.receiver.unpin(self.now, hold);
                }
            }
            Ev::Fenced(incarnation, peer) => {
                // Its process has ended: what was in flight stops where it is.
                self.flights.retain(|(p, ..), _| *p != peer);
                if incarnation == self.generation_of_receiver {
                    self.receiver.peer_fenced(self.now, &peer);
                }
            }
            Ev::Connect(i) => self.connect(i),
            Ev::Resume(i) => {
                self.senders[i].stopped = false;
                let peer = self.senders[i].peer.clone();
                let now = self.now;
                if let Some(m) = &mut self.senders[i].machine {
                    m.tick(now);
                }
                for message in std::mem::take(&mut self.senders[i].held) {
                    self.deliver(&peer, message);
                    self.settle();
                }
            }
        }
    }

    fn action(&mut self, action: Action) {
        match action {
            Action::Request { sender, first, count, deadline_ms, supply_after_ms } => {
                self.request(sender, (first, count), (count, 0), deadline_ms, supply_after_ms);
            }
            Action::Stepwise { sender, first, count, named, extra, deadline_ms, supply_after_ms } => {
                self.request(sender, (first, count), (named.min(count), extra), deadline_ms, supply_after_ms);
            }
            Action::Abort { sender } => {
                let peer = self.senders[sender].peer.clone();
                let serial = self.requests.iter().rev().find(|r| r.peer == peer && r.result.is_none());
                if let Some(serial) = serial.map(|r| r.serial)
                    && let Some(m) = self.machine(&peer)
                {
                    m.abort(serial, ErrorCode::Cancelled);
                }
            }
            Action::Kill { sender, silent_ms } => {
                self.kill(sender, silent_ms);
                self.at(self.now + Duration::from_millis(silent_ms + 50), Ev::Connect(sender));
            }
            Action::Stop { sender, ms } => {
                self.senders[sender].stopped = true;
                self.at(self.now + Duration::from_millis(ms), Ev::Resume(sender));
            }
            Action::Disconnect { sender } => {
                self.disconnect(sender);
                self.at(self.now + Duration::from_millis(50), Ev::Connect(sender));
            }
            Action::Consume { key: n, hold_ms, remove } => {
                let k = key(n);
                if let Some((hold, len)) = self.receiver.pin(&k) {
                    assert_eq!(len, LEN);
                    self.pins.push((hold, k.clone()));
                    let incarnation = self.generation_of_receiver;
                    let until = self.now + Duration::from_millis(hold_ms);
                    if remove {
                        assert!(self.receiver.remove(self.now, &k));
                    }
                    self.at(until, Ev::Unpin(incarnation, hold, k));
                }
            }
            Action::ReadBack { sender, first, count, lease_ms, read_ms } => {
                let tx = &mut self.senders[sender];
                let (peer, stopped) = (tx.peer.clone(), tx.stopped);
                let Some(asker) = tx.asker.as_mut().filter(|_| !stopped) else { return };
                let keys = (first..first + count).map(key).collect();
                let answer = asker.ask(keys, Duration::from_millis(lease_ms));
                let (query, message) = answer.expect("the channel is open");
                self.post(&peer, 0, |message| Ev::ToReceiver { from: peer.clone(), message }, &message);
                let seen = Vec::new();
                self.read_backs.push(ReadBack { peer, query, first, read_ms, seen, result: None });
            }
            Action::AtOnce { sender } => self.senders[sender].at_once = true,
            Action::RestartReceiver => {
                for i in 0..self.senders.len() {
                    self.disconnect(i);
                }
                self.flights.clear();
                self.receiver = Receiver::new(self.settings.clone());
                self.generation_of_receiver += 1;
                self.pages.fill(Content::Garbage);
                self.verified.clear();
                self.handed_out.clear();
                self.last_generation.clear();
                self.advanced.clear();
                self.pins.clear();
                for i in 0..self.senders.len() {
                    self.at(self.now + Duration::from_millis(50), Ev::Connect(i));
                }
            }
        }
    }

    fn request(
        &mut self,
        i: usize,
        (first, count): (u32, u32),
        (named, extra): (u32, u32),
        deadline_ms: u64,
        supply_after_ms: u64,
    ) {
        let peer = self.senders[i].peer.clone();
        let (now, deadline) = (self.now, self.now + Duration::from_millis(deadline_ms));
        // Ids are shared by all senders on purpose.
        let name = RequestId::new(format!("request-{}", self.senders[i].named)).expect("valid");
        self.senders[i].named += 1;
        let mut specs: Vec<_> = (first..first + count).map(|n| ChunkSpec { key: key(n), len: LEN }).collect();
        let Tx { stopped, at_once, .. } = self.senders[i];
        let Some(m) = self.machine(&peer).filter(|_| !stopped) else { return };
        let later = specs.split_off(named.clamp(1, count) as usize);
        let more = later.len() as u32 + if later.is_empty() { 0 } else { extra };
        let (request, specs_, integrity) = (name.clone(), specs.clone(), Integrity::Full);
        let declaration = Declaration { request, specs: specs_, more, deadline, integrity, at_once };
        if let Ok(serial) = m.reserve(now, declaration) {
            let at = |chunk: u32| {
                now + Duration::from_millis(supply_after_ms * u64::from(chunk + 1) / u64::from(count))
            };
            for chunk in 0..specs.len() as u32 {
                self.at(at(chunk), Ev::Supply { peer: peer.clone(), serial, chunk });
            }
            for (spec, chunk) in later.into_iter().zip(specs.len() as u32..) {
                let last = chunk + 1 == count;
                self.at(at(chunk), Ev::Extend { peer: peer.clone(), serial, spec, last });
            }
            self.requests.push(Request { name, peer, serial, deadline, result: None, specs });
        }
    }

    fn connect(&mut self, i: usize) {
        if self.senders[i].machine.is_some() || self.senders[i].stopped {
            if self.senders[i].stopped {
                self.at(self.now + Duration::from_millis(50), Ev::Connect(i));
            }
            return;
        }
        let peer = self.new_peer(i);
        self.senders[i].peer = peer.clone();
        self.senders[i].last_arrival = [self.now; 2];
        // Attaching is not what is tested here: it has happened when the connection counts as up.
        let geometry = self.settings.geometry.clone();
        let attach = Message::Attach { channel: 1, pool: "kv".into(), geometry };
        assert!(self.receiver.message(self.now, &peer, &attach));
        self.senders[i].machine = Some(Sender::new(1, self.settings.layout));
        self.senders[i].asker = Some(Asker::new(1, self.settings.layout));
    }

    fn disconnect(&mut self, i: usize) {
        let peer = self.senders[i].peer.clone();
        let Some(mut m) = self.senders[i].machine.take() else { return };
        self.gone.insert(peer.clone());
        let text = String::new();
        if let Some(mut asker) = self.senders[i].asker.take() {
            asker.close(&Failure { code: ErrorCode::PeerGone, text });
            self.drain_asker(&peer, &mut asker);
        }
        m.close(&Failure { code: ErrorCode::PeerGone, text: "connection lost".into() });
        self.drain_sender(&peer, &mut m);
        self.receiver.peer_gone(self.now, &peer, ErrorCode::PeerGone);
        // The link closes its data paths on this side: soon nothing of that connection can land.
        self.at(self.now + Duration::from_millis(5), Ev::Fenced(self.generation_of_receiver, peer));
    }

    fn kill(&mut self, i: usize, silent_ms: u64) {
        let peer = self.senders[i].peer.clone();
        if self.senders[i].machine.take().is_none() {
            return;
        }
        self.senders[i].asker = None;
        self.gone.insert(peer.clone());
        self.receiver.peer_gone(self.now, &peer, ErrorCode::PeerGone);
        let fenced = self.now + Duration::from_millis(silent_ms);
        self.at(fenced, Ev::Fenced(self.generation_of_receiver, peer));
    }

    fn deliver(&mut self, to: &PeerId, message: Message) {
        let now = self.now;
        let Some(tx) = self.senders.iter_mut().find(|t| t.peer == *to) else { return };
        if tx.stopped {
            tx.held.push(message);
        } else if let (Some(m), Some(a)) = (&mut tx.machine, &mut tx.asker) {
            let taken = m.message(now, &message) || a.message(&message);
            assert!(taken || matches!(message, Message::Attached { .. }), "not taken: {message:?}");
        }
    }

    fn write_starts(&mut self, peer: &PeerId, write: Write) {
        let key =
            self.requests.iter().find(|r| r.peer == *peer && r.serial == write.serial).expect("known").specs
                [write.chunk as usize]
                .key
                .clone();
        let (slow, fail, corrupt) = (self.faults.slow, self.faults.fail, self.faults.corrupt);
        let millis = if slow && self.chance(40) { 400 } else { 1 + u64::from(self.choose() % 8) };
        let landing = if fail && self.chance(16) {
            Landing::Failed
        } else if corrupt && self.chance(30) {
            Landing::Damaged
        } else {
            Landing::Good
        };
        let ends = self.now + Duration::from_millis(millis);
        self.pages[write.page.0 as usize] = Content::Garbage;
        let flight = Flight { write, key, cancelled: false, ends };
        let id = (peer.clone(), write.serial, write.chunk);
        assert!(self.flights.insert(id, flight).is_none(), "two writes of one chunk at a time");
        self.at(ends, Ev::WriteEnds(peer.clone(), write, landing));
    }

    fn write_ends(&mut self, peer: &PeerId, write: Write, landing: Landing) {
        let id = (peer.clone(), write.serial, write.chunk);
        let Some(flight) = self.flights.get(&id) else { return };
        if flight.write != write || flight.ends > self.now {
            return;
        }
        let flight = self.flights.remove(&id).expect("just seen");
        let result = match landing {
            _ if flight.cancelled => Err(ErrorCode::Cancelled),
            Landing::Failed => Err(ErrorCode::Transport),
            Landing::Good | Landing::Damaged => Ok(Check::Full(1)),
        };
        if result.is_ok() && landing == Landing::Good {
            self.pages[write.page.0 as usize] = Content::Chunk(flight.key);
        }
        let result = result.map_err(|code| Failure { code, text: "fault".into() });
        if let Some(m) = self.machine(peer) {
            m.written(write, result);
        }
    }

    // ---- outputs ----

    /// Carries out what the machines want, then looks at everything.
    fn settle(&mut self) {
        for i in 0..self.senders.len() {
            if let Some(mut m) = self.senders[i].machine.take() {
                let peer = self.senders[i].peer.clone();
                self.drain_sender(&peer, &mut m);
                self.senders[i].machine = Some(m);
            }
            if let Some(mut asker) = self.senders[i].asker.take() {
                let peer = self.senders[i].peer.clone();
                self.drain_asker(&peer, &mut asker);
                self.senders[i].asker = Some(asker);
            }
        }
        while let Some(output) = self.receiver.poll() {
            match output {
                receiver::Output::Send(to, message) => {
                    self.see_grant(&to, &message);
                    self.post(&to.clone(), 1, |message| Ev::ToSender { to: to.clone(), message }, &message);
                }
                receiver::Output::Verify(verify) => {
                    let at = self.now + Duration::from_micros(u64::from(self.choose()) * 10);
                    self.at(at, Ev::Verify(self.generation_of_receiver, Box::new(verify)));
                }
                receiver::Output::Event(event) => self.events.push(event),
            }
        }
        self.oracle();
    }

    fn drain_sender(&mut self, peer: &PeerId, m: &mut Sender) {
        while let Some(output) = m.poll() {
            match output {
                sender::Output::Send(message) => {
                    self.post(peer, 0, |message| Ev::ToReceiver { from: peer.clone(), message }, &message);
                }
                sender::Output::Write(write) => self.at(self.now, Ev::WriteStarts(peer.clone(), write)),
                sender::Output::Cancel { serial } => {
                    // A write stops at its next slice: a little later.
                    let soon = self.now + Duration::from_millis(1);
                    let mut ends = Vec::new();
                    for ((p, s, _), f) in &mut self.flights {
                        if p == peer && *s == serial {
                            f.cancelled = true;
                            f.ends = f.ends.min(soon);
                            ends.push((f.ends, f.write));
                        }
                    }
                    for (at, write) in ends {
                        self.at(at, Ev::WriteEnds(peer.clone(), write, Landing::Failed));
                    }
                }
                sender::Output::Ended { serial, result } => {
                    let now = self.now;
                    let r = self
                        .requests
                        .iter_mut()
                        .find(|r| r.peer == *peer && r.serial == serial)
                        .expect("known");
                    assert!(r.result.is_none(), "{} ended twice", r.name);
                    r.result = Some((now, result));
                }
                sender::Output::Admitted { .. } | sender::Output::ChunkDone { .. } => {}
            }
        }
    }

    /// What was found is looked at twice, when the read begins and when it ends: a one-sided read sees something in between.
    fn drain_asker(&mut self, peer: &PeerId, asker: &mut Asker) {
        for i in 0..self.read_backs.len() {
            let r = &mut self.read_backs[i];
            if r.peer != *peer || r.result.is_some() {
                continue;
            }
            match asker.found(r.query) {
                Some(Ok(found)) if found.lease.is_zero() => r.result = Some(Ok(0)),
                Some(Ok(found)) => {
                    r.seen = found
                        .chunks
                        .into_iter()
                        .map(|c| (c.clone(), self.pages[c.page.0 as usize].clone()))
                        .collect();
                    let ends = self.now + Duration::from_millis(r.read_ms);
                    self.at(ends, Ev::ReadEnds(i));
                }
                Some(Err(failure)) => r.result = Some(Err(failure.code)),
                None => {}
            }
            let r = &mut self.read_backs[i];
            match asker.released(r.query) {
                Some(Ok(())) => {
                    for (c, content) in &r.seen {
                        let wanted = Content::Chunk(key(r.first + c.index));
                        assert_eq!(*content, wanted, "a read was confirmed whose page was reused: {c:?}");
                    }
                    r.result = Some(Ok(r.seen.len()));
                }
                Some(Err(failure)) => r.result = Some(Err(failure.code)),
                None => {}
            }
        }
    }

    fn read_ends(&mut self, i: usize) {
        let r = &mut self.read_backs[i];
        if self.senders.iter().any(|t| t.peer == r.peer && t.stopped) {
            self.at(self.now + Duration::from_millis(50), Ev::ReadEnds(i));
            return;
        }
        for (c, content) in &mut r.seen {
            if self.pages[c.page.0 as usize] != *content {
                *content = Content::Garbage;
            }
        }
        let (peer, query) = (r.peer.clone(), r.query);
        let Some(tx) = self.senders.iter_mut().find(|t| t.peer == peer) else { return };
        if let Some(message) = tx.asker.as_mut().and_then(|a| a.release(query)) {
            self.post(&peer, 0, |message| Ev::ToReceiver { from: peer.clone(), message }, &message);
        }
    }

    /// A generation is handed out once.
    fn see_grant(&mut self, to: &PeerId, message: &Message) {
        let mut see = |serial, chunk, slot: &Slot| {
            if let Slot::Page { page, generation } = *slot {
                let mine = (to.clone(), serial, chunk);
                let owner = self.handed_out.entry((page, generation)).or_insert_with(|| mine.clone());
                assert_eq!(*owner, mine, "page {page} generation {generation} was handed out twice");
            }
        };
        match message {
            Message::Grant { serial, slots, .. } => {
                slots.iter().enumerate().for_each(|(i, s)| see(*serial, i as u32, s));
            }
            Message::Extended { serial, first, slots, .. } => {
                slots.iter().zip(*first..).for_each(|(s, chunk)| see(*serial, chunk, s));
            }
            Message::Resolved { serial, chunk, slot, .. } => see(*serial, *chunk, slot),
            Message::Advance { pages, .. } => {
                for h in pages {
                    let fresh = !self.handed_out.contains_key(&(h.page, h.generation));
                    assert!(
                        self.advanced.insert((h.page, h.generation)) && fresh,
                        "{h:?} was handed out twice"
                    );
                }
            }
            _ => {}
        }
    }

    fn post(&mut self, peer: &PeerId, direction: usize, ev: impl Fn(Message) -> Ev, message: &Message) {
        let Faults { drop, duplicate, reorder, .. } = self.faults;
        if drop && self.chance(12) {
            return;
        }
        let copies = if duplicate && self.chance(24) { 2 } else { 1 };
        for _ in 0..copies {
            let chosen = Duration::from_micros(50 + 100 * u64::from(self.choose()));
            let mut at = self.now + self.delay.map_or(chosen, Duration::from_millis);
            if let Some(tx) = self.senders.iter_mut().find(|t| t.peer == *peer)
                && !reorder
            {
                at = at.max(tx.last_arrival[direction]);
                tx.last_arrival[direction] = at;
            }
            self.at(at, ev(message.clone()));
        }
    }

    // ---- the oracle ----

    fn oracle(&mut self) {
        self.receiver.check().unwrap_or_else(|e| panic!("bookkeeping: {e}"));
        let stats = self.receiver.stats().pages;
        let sum = stats.free + stats.writing + stats.advanced + stats.published + stats.quarantined;
        assert_eq!(sum, self.settings.layout.pages(), "{stats:?}");
        for page in (0..self.settings.layout.pages()).map(PageIndex) {
            let (_, generation) = self.receiver.page(page).expect("in the pool");
            let last = self.last_generation.insert(page, generation);
            assert!(last.is_none_or(|l| l <= generation), "the generation of page {page} went back");
        }
        for ((peer, ..), f) in &self.flights {
            let (usage, generation) = self.receiver.page(f.write.page).expect("in the pool");
            assert!(
                generation == f.write.generation
                    && matches!(usage, Use::Held | Use::Advanced | Use::Quarantined),
                "{peer:?} writes {:?}, the page is {usage:?} of generation {generation}",
                f.write
            );
        }
        for n in 0..64 {
            let k = key(n);
            if let Known::Published(_) = self.receiver.known(&k) {
                assert!(self.verified.contains(&k), "{k} is visible without a check");
            } else {
                self.verified.remove(&k);
            }
        }
        for (hold, k) in &self.pins {
            assert_eq!(self.pages[hold.page.0 as usize], Content::Chunk(k.clone()), "pinned bytes changed");
        }
        let now = self.now;
        for r in self.requests.iter().filter(|r| r.result.is_none() && !self.gone.contains(&r.peer)) {
            let stopped = self.senders.iter().any(|t| t.peer == r.peer && t.stopped);
            assert!(stopped || now <= r.deadline, "{} is still open after its deadline", r.name);
        }
    }

    // ---- helpers ----

    fn machine(&mut self, peer: &PeerId) -> Option<&mut Sender> {
        self.senders.iter_mut().find(|t| t.peer == *peer)?.machine.as_mut()
    }

    fn new_peer(&mut self, i: usize) -> PeerId {
        self.connections += 1;
        let name = AgentName::new(format!("sender-{i}")).expect("valid");
        PeerId { name, epoch: Epoch(self.connections), connection: self.connections }
    }

    fn choose(&mut self) -> u8 {
        self.choice += 1;
        let n = self.faults.choices.len();
        if n == 0 { 0 } else { self.faults.choices[self.choice % n] }
    }

    fn chance(&mut self, of_256: u8) -> bool {
        self.choose() > 255 - of_256
    }

    fn at(&mut self, at: Time, ev: Ev) {
        self.next += 1;
        self.bodies.insert(self.next, ev);
        self.agenda.push(Reverse((at, self.next)));
    }

    /// Lets time pass.
    pub(crate) fn run_until(&mut self, ms: u64) {
        self.at(Time(ms * MS), Ev::Wake);
        self.run_agenda(Time(ms * MS));
    }

    /// How many of these chunks' bytes lie in some page, whether the receiver knows or not.
    pub(crate) fn landed(&self, keys: std::ops::Range<u32>) -> usize {
        keys.map(key).filter(|k| self.pages.contains(&Content::Chunk(k.clone()))).count()
    }

    pub(crate) fn result(&self, i: usize) -> Option<&Result<sender::Summary, Failure>> {
        self.requests[i].result.as_ref().map(|r| &r.1)
    }
}
