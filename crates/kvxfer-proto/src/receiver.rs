//! The receiver's machine: what senders say goes in, answers, checks to make and events come out.
//!
//! ```text
//! Reserve -> queued -> admitted (Grant) -> Commit -> check -> published ... -> all published (Ready)
//!                |          |
//!                |          +-- abort, revoke, lease over, peer gone -> pages in quarantine -> quiet or fenced -> free
//!                +-- refused, deadline, abort
//! ```
//!
//! The machine owns the [`Pool`] and the admission [`Queue`]. It reads no memory: it asks for a check with
//! [`Output::Verify`] and is told the answer with [`Receiver::verified`]. A chunk becomes visible there and nowhere else.
//! Requests are told apart by peer (name, epoch and connection), channel and serial, so two senders may use the same request id.
//! A peer may also ask for chunks and read them back from their pages; see `loans`.
//! Whatever a peer says is either a step that fits the state, a repetition that is answered again, or ignored.

mod advance;
mod extend;
mod loans;
mod requests;

use crate::admission::{Attempt, Queue};
use crate::integrity::{Binding, Integrity};
use crate::layout::Layout;
use crate::plan::check_chunks;
use crate::pool::{Hold, Known, Owner, Placement, Pool, Source};
use crate::wire::{Check, ChunkSpec, MAX_TEXT, Message, Slot};
use crate::{AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, RequestId, Time};
use advance::Advances;
use loans::Loans;
use requests::{ChunkState, Phase, Request};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// How often one chunk may fail its check before the request ends.
pub const MAX_ATTEMPTS: u32 = 3;
/// Most channels one connection may open to a pool.
const MAX_CHANNELS: usize = 1024;

/// One connection of one remote agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId {
    /// Its name.
    pub name: AgentName,
    /// Its epoch.
    pub epoch: Epoch,
    /// Tells connections of the same epoch apart; the caller's number.
    pub connection: u64,
}

/// Settings of a receiver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name senders attach to.
    pub pool: String,
    /// The pages.
    pub layout: Layout,
    /// What senders must state.
    pub geometry: Geometry,
    /// A sender that neither commits nor renews for this long loses its lease.
    pub lease: Duration,
    /// A request not admitted for this long is refused.
    pub admission_timeout: Duration,
    /// Longest queue.
    pub max_queue: usize,
    /// See [`Pool`].
    pub retention: Duration,
    /// Most pages that senders have in advance of their requests; 0 gives none.
    pub advance: u32,
}

/// A check to make: read the page's first `binding.len` bytes and compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verify {
    /// To be named in [`Receiver::verified`].
    pub token: VerifyToken,
    /// What the bytes are supposed to be; names page and length.
    pub binding: Binding,
    /// What the sender says of them; never [`Check::None`].
    pub check: Check,
}

/// Which chunk a check is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyToken {
    owner: Owner,
    chunk: u32,
    generation: Generation,
}

/// What the machine wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a message. `Attached` with [`ErrorCode::Ok`] still wants the pool's region filled in.
    Send(PeerId, Message),
    /// Make a check.
    Verify(Verify),
    /// Tell whoever waits.
    Event(Event),
}

/// The life of a request as the engine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Declared: an earlier end of the same id is history.
    Started {
        /// From whom.
        peer: PeerId,
        /// The request.
        request: RequestId,
    },
    /// Every chunk is published.
    Ready {
        /// From whom.
        peer: PeerId,
        /// The request.
        request: RequestId,
        /// Valid bytes of all its chunks.
        bytes: u64,
        /// From declaration to now.
        took: Duration,
    },
    /// It ended otherwise.
    Failed {
        /// From whom.
        peer: PeerId,
        /// The request.
        request: RequestId,
        /// Why.
        code: ErrorCode,
        /// In words.
        text: String,
    },
}

/// Pages by state, and the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages by state.
    pub pages: crate::pool::Counts,
    /// Pages admission could have now.
    pub available: u32,
    /// Requests waiting for pages.
    pub queued: u32,
    /// Requests admitted and not ended.
    pub active: u32,
    /// Ended requests whose pages wait until no write can land any more.
    pub quarantined_requests: u32,
}

#[derive(Default)]
struct Channel {
    /// The sender has closed it; it is kept until the writes of its last request have ended.
    closing: bool,
    last_serial: u64,
    last_query: u64,
    live: HashMap<u64, Owner>,
}

/// The machine.
pub struct Receiver {
    settings: Settings,
    pool: Pool,
    queue: Queue,
    channels: HashMap<PeerId, HashMap<u64, Channel>>,
    requests: HashMap<Owner, Request>,
    timers: BTreeSet<(Time, Owner)>,
    loans: Loans,
    advances: Advances,
    next_owner: u64,
    active: u32,
    outputs: VecDeque<Output>,
    closed: Option<(ErrorCode, String)>,
}

impl Receiver {
    /// A receiver with an empty pool.
    pub fn new(settings: Settings) -> Self {
        Self {
            pool: Pool::new(settings.layout.pages(), settings.retention),
            settings,
            queue: Queue::default(),
            channels: HashMap::new(),
            requests: HashMap::new(),
            timers: BTreeSet::new(),
            loans: Loans::default(),
            advances: Advances::new(),
            next_owner: 1,
            active: 0,
            outputs: VecDeque::new(),
            closed: None,
        }
    }

    /// Next thing to do; ask until `None` after every call.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// A message came. False: it is not for this pool.
    pub fn message(&mut self, now: Time, peer: &PeerId, message: &Message) -> bool {
        match message {
            Message::Attach { channel, pool, geometry } => {
                let ours = *pool == self.settings.pool;
                if ours {
                    self.attach(peer, *channel, geometry);
                }
                ours
            }
            Message::Reserve {
                channel,
                serial,
                request,
                chunks,
                deadline_ms,
                integrity,
                more,
                places,
                advance,
            } => {
                let known = self.channel(peer, *channel).is_some_and(|c| !c.closing);
                if known {
                    let deadline = now + Duration::from_millis(*deadline_ms);
                    let wanted = (chunks.as_slice(), *more, places.as_slice());
                    let (id, new) = ((*channel, *serial), self.is_new(peer, *channel, *serial));
                    self.reserve(now, peer, id, request, wanted, deadline, *integrity);
                    if new {
                        self.advance(peer, *channel, *advance);
                    }
                }
                known
            }
            Message::Return { channel, pages } => {
                let known = self.channel(peer, *channel).is_some();
                if known {
                    self.returned(peer, *channel, pages);
                    self.drop_closed_channel(peer, *channel);
                    self.run_queue(now);
                }
                known
            }
            Message::Extend { channel, serial, first, chunks, last } => {
                self.on_request(peer, *channel, *serial, |m, owner| {
                    m.extend(now, owner, *first, chunks, *last);
                })
            }
            Message::Commit { channel, serial, chunk, generation, check } => {
                self.on_request(peer, *channel, *serial, |m, owner| {
                    m.commit(now, owner, *chunk, *generation, *check);
                })
            }
            Message::Renew { channel, serial } => {
                self.on_request(peer, *channel, *serial, |m, owner| m.renew(now, owner))
            }
            Message::Abort { channel, serial, quiet, code } => {
                self.on_request(peer, *channel, *serial, |m, owner| m.aborted(now, owner, *quiet, *code))
            }
            Message::Query { channel, query, keys, lease_ms } => {
                let known = self.channel(peer, *channel).is_some_and(|c| !c.closing);
                if known {
                    self.query(now, (peer, *channel, *query), keys, Duration::from_millis(*lease_ms));
                }
                known
            }
            Message::Release { channel, query } => {
                let known = self.channel(peer, *channel).is_some();
                if known {
                    self.release(now, (peer, *channel, *query));
                }
                known
            }
            Message::Detach { channel, code, text } => {
                let known = self.channel(peer, *channel).is_some();
                if known {
                    self.detach(now, peer, *channel, *code, text);
                }
                known
            }
            _ => false,
        }
    }

    /// The answer to [`Output::Verify`]. An answer that comes after its request has ended changes nothing.
    pub fn verified(&mut self, now: Time, token: VerifyToken, good: bool) {
        let VerifyToken { owner, chunk, generation } = token;
        let Some(r) = self.requests.get_mut(&owner) else { return };
        let ChunkState::Verifying(hold) = r.chunks[chunk as usize] else { return };
        if hold.generation != generation || r.phase != Phase::Active {
            return;
        }
        if good {
            self.publish(now, owner, chunk, hold);
            return;
        }
        r.attempts[chunk as usize] += 1;
        let code = ErrorCode::Corrupt;
        let committed = Message::Committed { channel: r.channel, serial: r.serial, chunk, generation, code };
        r.send(&mut self.outputs, committed);
        let again =
            if r.attempts[chunk as usize] < MAX_ATTEMPTS { self.pool.renew(owner, hold) } else { None };
        let Some(again) = again else {
            let text = format!(
                "chunk {chunk} ({}) arrived damaged {MAX_ATTEMPTS} times",
                r.specs[chunk as usize].key
            );
            self.end(now, owner, code, &text, false);
            return;
        };
        r.chunks[chunk as usize] = ChunkState::Granted(again);
        let resolved =
            Message::Resolved { channel: r.channel, serial: r.serial, chunk, slot: slot_of(again) };
        r.send(&mut self.outputs, resolved);
    }

    /// The connection has ended; writes of the peer may still land.
    pub fn peer_gone(&mut self, now: Time, peer: &PeerId, code: ErrorCode) {
        self.channels.remove(peer);
        self.end_loans(peer, None);
        let text = format!("sender {} is gone: {code}", peer.name);
        for owner in self.owners(|r| r.peer == *peer && r.phase != Phase::Ended) {
            self.end(now, owner, code, &text, true);
        }
        self.quarantine_advances(|p, _| p == peer);
        self.run_queue(now);
    }

    /// No write of that peer over that connection can land any more.
    pub fn peer_fenced(&mut self, now: Time, peer: &PeerId) {
        self.peer_gone(now, peer, ErrorCode::PeerGone);
        for owner in self.owners(|r| r.peer == *peer) {
            self.quiet(owner);
        }
        self.end_advances(peer);
        self.run_queue(now);
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, now: Time) {
        self.end_leases(now);
        self.pool.expire(now);
        while let Some(&(at, owner)) = self.timers.first() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.timer(now, owner);
        }
        self.run_queue(now);
    }

    /// When [`Receiver::tick`] has something to do next.
    pub fn next_timeout(&self) -> Option<Time> {
        let timer = self.timers.first().map(|t| t.0);
        [timer, self.loans.next_end(), self.pool.next_expiry()].into_iter().flatten().min()
    }

    // ---- the engine's side ----

    /// What is known of a key.
    pub fn known(&self, key: &ChunkKey) -> Known {
        self.pool.known(key)
    }
    /// What a page is used for, and its generation.
    pub fn page(&self, page: crate::PageIndex) -> Option<(crate::pool::Use, Generation)> {
        self.pool.page(page)
    }
    /// Pins a published chunk: its hold and valid bytes.
    pub fn pin(&mut self, key: &ChunkKey) -> Option<(Hold, u64)> {
        self.pool.pin(key)
    }
    /// Takes a pin back.
    pub fn unpin(&mut self, now: Time, hold: Hold) {
        self.pool.unpin(hold);
        self.run_queue(now);
    }
    /// Gives a consumer's claim on a chunk back; see [`Pool`].
    pub fn remove(&mut self, now: Time, key: &ChunkKey) -> bool {
        let known = self.pool.remove(now, key);
        self.run_queue(now);
        known
    }
    /// Pages by state, and the queue.
    pub fn stats(&self) -> Stats {
        let (queued, active) = (self.queue.len() as u32, self.active);
        Stats {
            pages: self.pool.counts(),
            available: self.pool.available(),
            queued,
            active,
            quarantined_requests: self.requests.len() as u32 - queued - active,
        }
    }
    /// Refuses everything new, ends everything under way and closes all channels; published chunks stay.
    pub fn close(&mut self, now: Time, code: ErrorCode, text: &str) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some((code, text.to_owned()));
        self.end_all_loans();
        for owner in self.owners(|r| r.phase != Phase::Ended) {
            self.end(now, owner, code, text, false);
        }
        self.quarantine_advances(|_, _| true);
        for (peer, channels) in &self.channels {
            for channel in channels.keys() {
                let detach = Message::Detach { channel: *channel, code, text: text.to_owned() };
                self.outputs.push_back(Output::Send(peer.clone(), detach));
            }
        }
    }
    /// Checks all bookkeeping; the text says what differs. For tests: it looks at every page and request.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check()?;
        self.loans.check()?;
        self.check_requests()
    }

    // ---- messages ----

    fn channel(&mut self, peer: &PeerId, channel: u64) -> Option<&mut Channel> {
        self.channels.get_mut(peer)?.get_mut(&channel)
    }

    /// Runs `f` for a live request; true when the channel is ours (a request that has ended needs no answer: its end was told).
    fn on_request(
        &mut self,
        peer: &PeerId,
        channel: u64,
        serial: u64,
        f: impl FnOnce(&mut Self, Owner),
    ) -> bool {
        let Some(c) = self.channel(peer, channel) else { return false };
        if let Some(&owner) = c.live.get(&serial) {
            f(self, owner);
        }
        true
    }

    fn attach(&mut self, peer: &PeerId, channel: u64, geometry: &Geometry) {
        let open = self.channels.get(peer).map_or(0, HashMap::len);
        let problem = if let Some((code, text)) = &self.closed {
            Some((*code, text.clone()))
        } else if let Some(m) = self.settings.geometry.mismatch(geometry) {
            let text = format!(
                "pool {:?}: {} differs: the receiver has {:?}, the sender {:?}; both must be configured alike",
                self.settings.pool, m.field, m.ours, m.theirs
            );
            Some((ErrorCode::Mismatch, clip(&text)))
        } else if open >= MAX_CHANNELS {
            Some((ErrorCode::NoCapacity, format!("{open} channels are open; at most {MAX_CHANNELS} may be")))
        } else {
            None
        };
        let (code, text) = problem.unwrap_or((ErrorCode::Ok, String::new()));
        if code == ErrorCode::Ok {
            self.channels.entry(peer.clone()).or_default().entry(channel).or_default();
        }
        let pages = self.settings.layout.pages();
        let answer = Message::Attached { channel, region: None, pages, code, text };
        self.outputs.push_back(Output::Send(peer.clone(), answer));
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    fn reserve(
        &mut self,
        now: Time,
        peer: &PeerId,
        (channel, serial): (u64, u64),
        request: &RequestId,
        (chunks, more, places): (&[ChunkSpec], u32, &[Hold]),
        deadline: Time,
        integrity: Integrity,
    ) {
        let places = self.places(peer, channel, places);
        let Some(c) = self.channel(peer, channel) else { return };
        if let Some(&owner) = c.live.get(&serial) {
            self.grant(owner);
            return;
        }
        let stale = serial <= c.last_serial;
        c.last_serial = c.last_serial.max(serial);
        let pages = self.settings.layout.pages();
        let refusal = if stale {
            Some((ErrorCode::Stale, format!("serial {serial} has been used before")))
        } else if let Some((code, text)) = &self.closed {
            Some((*code, text.clone()))
        } else if let Err(e) = check_chunks(&self.settings.layout, chunks) {
            Some((ErrorCode::InvalidArgument, e.to_string()))
        } else if chunks.len() as u64 + u64::from(more) > u64::from(pages) {
            let text = format!(
                "request {request} has {} chunks, the pool {:?} {pages} pages; enlarge the pool or split the request",
                chunks.len() as u64 + u64::from(more),
                self.settings.pool
            );
            Some((ErrorCode::TooLarge, text))
        } else if self.requests.values().any(|r| r.is(peer, request)) {
            Some((ErrorCode::Busy, format!("request {request} of {} is under way already", peer.name)))
        } else if let Err(wrong) = &places {
            Some(wrong.clone())
        } else if let Ok(Some((_, places))) = &places
            && (places.len() != chunks.len() || more > 0)
        {
            let text = format!(
                "request {request}: pages in advance are named for all of a request's chunks or for none"
            );
            Some((ErrorCode::Protocol, text))
        } else if matches!(places, Ok(None)) && self.queue.len() >= self.settings.max_queue {
            Some((ErrorCode::NoCapacity, format!("{} requests wait for pages already", self.queue.len())))
        } else {
            None
        };
        if let Some((code, text)) = refusal {
            let text = clip(&text);
            let refused = Message::Refused { channel, serial, code, text: text.clone() };
            self.outputs.push_back(Output::Send(peer.clone(), refused));
            // The consumer of a request that is under way, or was, is not told of a repetition.
            if !matches!(code, ErrorCode::Busy | ErrorCode::Stale) {
                let (peer, request) = (peer.clone(), request.clone());
                self.outputs.push_back(Output::Event(Event::Failed { peer, request, code, text }));
            }
            return;
        }
        let owner = self.new_owner();
        if let Some(c) = self.channel(peer, channel) {
            c.live.insert(serial, owner);
        }
        let waits_until = deadline.min(now + self.settings.admission_timeout);
        let mut r =
            Request::new(now, peer.clone(), (channel, serial), request.clone(), chunks, deadline, integrity);
        r.more = more;
        self.requests.insert(owner, r);
        let started = Event::Started { peer: peer.clone(), request: request.clone() };
        self.outputs.push_back(Output::Event(started));
        if let Ok(Some((channel, places))) = places {
            if !self.admit(now, owner, Source::Advance(channel, &places)) {
                self.end(now, owner, ErrorCode::Stale, "its pages are not the channel's", false);
            }
            return;
        }
        self.queue.push(owner, waits_until);
        self.set_timer(owner, waits_until);
        self.run_queue(now);
    }

    fn new_owner(&mut self) -> Owner {
        let owner = Owner(self.next_owner);
        self.next_owner += 1;
        owner
    }

    /// Whether a serial is the next one of its channel.
    fn is_new(&mut self, peer: &PeerId, channel: u64, serial: u64) -> bool {
        self.channel(peer, channel).is_some_and(|c| serial > c.last_serial)
    }

    pub(super) fn commit(
        &mut self,
        now: Time,
        owner: Owner,
        chunk: u32,
        generation: Generation,
        check: Check,
    ) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        if r.phase != Phase::Active {
            return;
        }
        let answer =
            |code| Message::Committed { channel: r.channel, serial: r.serial, chunk, generation, code };
        match r.chunks.get(chunk as usize).copied() {
            None => r.send(&mut self.outputs, answer(ErrorCode::OutOfRange)),
            Some(ChunkState::Granted(hold)) if hold.generation == generation => {
                let enough = match r.integrity {
                    Integrity::Off => true,
                    Integrity::Bound | Integrity::Full => check != Check::None,
                };
                if !enough {
                    let text = format!(
                        "chunk {chunk} was committed without a digest, the level is {:?}",
                        r.integrity
                    );
                    self.end(now, owner, ErrorCode::Protocol, &text, false);
                    return;
                }
                r.chunks[chunk as usize] = ChunkState::Verifying(hold);
                r.checks[chunk as usize] = check;
                let spec = &r.specs[chunk as usize];
                if check == Check::None {
                    self.publish(now, owner, chunk, hold);
                } else {
                    let binding = Binding {
                        request: r.id.clone(),
                        key: spec.key.clone(),
                        len: spec.len,
                        page: hold.page,
                        generation,
                    };
                    let token = VerifyToken { owner, chunk, generation };
                    self.outputs.push_back(Output::Verify(Verify { token, binding, check }));
                }
                self.renew(now, owner);
            }
            Some(ChunkState::Verifying(hold)) if hold.generation == generation => {}
            Some(ChunkState::Done(hold)) if hold.generation == generation => {
                r.send(&mut self.outputs, answer(ErrorCode::Ok));
            }
            // Written in advance of the word whether it is to be: kept until that is known.
            Some(ChunkState::Pending(hold)) if r.is_place(chunk, hold) && hold.generation == generation => {
                r.early.insert(chunk, check);
                self.renew(now, owner);
            }
            Some(_) => r.send(&mut self.outputs, answer(ErrorCode::Stale)),
        }
    }

    fn renew(&mut self, now: Time, owner: Owner) {
        let Some(r) = self.requests.get(&owner) else { return };
        if r.phase == Phase::Active {
            let latest = r.deadline + self.settings.lease;
            self.set_timer(owner, latest.min(now + self.settings.lease));
        }
    }

    fn aborted(&mut self, now: Time, owner: Owner, quiet: bool, code: ErrorCode) {
        // An abort must not read as success, whatever the peer says.
        let code = if code == ErrorCode::Ok { ErrorCode::Cancelled } else { code };
        self.end(now, owner, code, &format!("the sender gave the request up: {code}"), true);
        if quiet {
            self.quiet(owner);
        }
        self.run_queue(now);
    }

    fn detach(&mut self, now: Time, peer: &PeerId, channel: u64, code: ErrorCode, text: &str) {
        self.end_loans(peer, Some(channel));
        for owner in self.owners(|r| r.peer == *peer && r.channel == channel && r.phase != Phase::Ended) {
            self.end(now, owner, code, text, true);
        }
        if let Some(c) = self.channel(peer, channel) {
            c.closing = true;
        }
        self.quarantine_advances(|p, c| p == peer && c == channel);
        self.drop_closed_channel(peer, channel);
        self.run_queue(now);
    }
}

impl Receiver {
    /// A closed channel is kept while writes of its requests may still land: their end is told over it.
    fn drop_closed_channel(&mut self, peer: &PeerId, channel: u64) {
        if !self.nothing_in_advance(peer, channel) {
            return;
        }
        if let Some(channels) = self.channels.get_mut(peer)
            && channels.get(&channel).is_some_and(|c| c.closing && c.live.is_empty())
        {
            channels.remove(&channel);
            self.advances.remove(&(peer.clone(), channel));
        }
    }
}

fn slot_of(hold: Hold) -> Slot {
    Slot::Page { page: hold.page, generation: hold.generation }
}

/// Text for a message, within its limit.
fn clip(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
