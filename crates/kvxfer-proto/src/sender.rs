//! The sender's machine: one channel to one pool, with all its requests.
//!
//! ```text
//! reserve -> waiting -> admitted (Grant) -> per chunk: write -> Commit -> Committed -> done
//!               |           |                             ^        |
//!               |           |                             +--------+ damaged: a fresh generation, written again
//!               |           +-- abort, revoke, deadline, failed write -> closing: Abort, and Abort{quiet} once all writes have ended
//!               +-- refused, abort, deadline
//! ```
//!
//! The machine moves no bytes: it says with [`Output::Write`] which chunk may be written to which page now, and is told the end
//! of that write with [`Sender::written`]. The caller of a request hears its end at once ([`Output::Ended`]); its pages are given
//! back to the receiver only when the last write has really ended (Contract line 2).
//!
//! A request whose caller wants to write at once may get its pages out of the channel's *advance*; see `advance`.

mod advance;

use self::advance::Advance;
use crate::integrity::Integrity;
use crate::layout::Layout;
use crate::plan::{RequestError, check_chunks};
use crate::receiver::MAX_ATTEMPTS;
use crate::wire::{Check, ChunkSpec, Message, Slot};
use crate::{ErrorCode, Generation, Hold, PageIndex, RequestId, Time};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// Shortest time between two renewals of a lease, whatever the receiver grants.
const MIN_RENEWAL: Duration = Duration::from_millis(10);

/// A request to be made.
#[derive(Clone, Debug)]
pub struct Declaration {
    /// Its id.
    pub request: RequestId,
    /// The chunks that are known.
    pub specs: Vec<ChunkSpec>,
    /// Most chunks that [`Sender::extend`] will still name.
    pub more: u32,
    /// When it must have ended.
    pub deadline: Time,
    /// Level of the digests.
    pub integrity: Integrity,
    /// Its caller would write before the receiver has answered. It gets pages in advance if there are enough, and as many are asked for,
    /// so that the next one does. One that has `more` to name does not: its pages are granted together.
    pub at_once: bool,
}

/// A chunk may be written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// The reservation.
    pub serial: u64,
    /// Index of the chunk in the request.
    pub chunk: u32,
    /// Where to.
    pub page: PageIndex,
    /// Generation of the page; part of the digest and named when the write has ended.
    pub generation: Generation,
}

/// What the machine wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a message.
    Send(Message),
    /// Start a write; end it with [`Sender::written`].
    Write(Write),
    /// Cancel every write of the reservation; each still ends with [`Sender::written`].
    Cancel {
        /// The reservation.
        serial: u64,
    },
    /// The request has its pages.
    Admitted {
        /// The reservation.
        serial: u64,
    },
    /// The chunk is published: its source is not needed any more.
    ChunkDone {
        /// The reservation.
        serial: u64,
        /// Index of the chunk in the request.
        chunk: u32,
    },
    /// The request has ended for its caller.
    Ended {
        /// The reservation.
        serial: u64,
        /// How.
        result: Result<Summary, Failure>,
    },
}

/// How a request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Valid bytes of the chunks written.
    pub bytes: u64,
    /// Chunks written.
    pub written: u32,
    /// Chunks that were there, or came by another request.
    pub present: u32,
    /// Wait for admission.
    pub queued: Duration,
    /// From admission to the end.
    pub moved: Duration,
}

/// Why a request ended without success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The code.
    pub code: ErrorCode,
    /// In words.
    pub text: String,
}

/// A call that makes no sense now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SenderError {
    /// The request is not one a pool could take.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// More chunks than the receiver's pool has pages.
    #[error(
        "the request has {chunks} chunks, the receiver's pool {pages} pages; enlarge the pool or split the request"
    )]
    TooLarge {
        /// Chunks.
        chunks: usize,
        /// Pages.
        pages: u32,
    },
    /// A request of that name is under way, or its last writes are just being stopped.
    #[error("request {request} is under way already")]
    Busy {
        /// Its id.
        request: RequestId,
    },
    /// The channel has ended.
    #[error("the channel to the receiver has ended: {text}")]
    Closed {
        /// Why.
        code: ErrorCode,
        /// In words.
        text: String,
    },
    /// No such chunk.
    #[error("chunk {chunk} of a request of {chunks} chunks")]
    NoSuchChunk {
        /// Named index.
        chunk: u32,
        /// Chunks of the request.
        chunks: usize,
    },
    /// More further chunks than were announced.
    #[error("{named} further chunks, {announced} were announced")]
    TooMany {
        /// Further chunks named.
        named: usize,
        /// What is left of the announcement.
        announced: u32,
    },
    /// The chunk was supplied before.
    #[error("chunk {chunk} was supplied before")]
    Twice {
        /// Its index.
        chunk: u32,
    },
    /// The request has ended.
    #[error("the request has ended")]
    Ended,
}

impl SenderError {
    /// The code for the caller.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Request(_) | Self::Twice { .. } | Self::TooMany { .. } => ErrorCode::InvalidArgument,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Busy { .. } => ErrorCode::Busy,
            Self::Closed { code, .. } => *code,
            Self::NoSuchChunk { .. } => ErrorCode::OutOfRange,
            Self::Ended => ErrorCode::Cancelled,
        }
    }
}

/// How a chunk stands before its bytes are supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The receiver has not said yet.
    Unknown,
    /// It has a page: supplied now, it is written at once.
    HasPage,
    /// It is there already, or comes by another request, or its own has ended.
    NoPage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Active,
    /// Ended for the caller; writes still end.
    Closing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Not known, or being decided by the receiver.
    None,
    Page(PageIndex, Generation),
    Writing(PageIndex, Generation),
    Committed(Generation),
    /// Published by this request.
    Done,
    /// Published by another.
    Present,
}

struct Chunk {
    place: Place,
    /// The last page named for it: a repetition of an earlier word must not start a write.
    last: Option<(PageIndex, Generation)>,
    /// The page that this side has chosen, until the receiver's word that it is the chunk's.
    chosen: Option<Hold>,
    supplied: bool,
    /// Another request is writing it, as the receiver last said.
    pending: bool,
    attempts: u32,
}

impl Chunk {
    const NEW: Self =
        Self { place: Place::None, last: None, chosen: None, supplied: false, pending: false, attempts: 0 };
}

struct Request {
    id: RequestId,
    specs: Vec<ChunkSpec>,
    chunks: Vec<Chunk>,
    phase: Phase,
    code: ErrorCode,
    in_flight: u32,
    undone: u32,
    /// Chunks in the declaration, and those announced there that have no name yet.
    declared: usize,
    more: u32,
    reserved: Time,
    admitted: Time,
    deadline: Time,
    renewal: Duration,
    timer: Time,
}

/// The machine.
pub struct Sender {
    channel: u64,
    layout: Layout,
    next_serial: u64,
    requests: HashMap<u64, Request>,
    ids: HashMap<RequestId, u64>,
    timers: BTreeSet<(Time, u64)>,
    advance: Advance,
    outputs: VecDeque<Output>,
    closed: Option<Failure>,
}

impl Sender {
    /// For an attached channel and the layout the receiver stated.
    pub fn new(channel: u64, layout: Layout) -> Self {
        Self {
            channel,
            layout,
            next_serial: 1,
            requests: HashMap::new(),
            ids: HashMap::new(),
            timers: BTreeSet::new(),
            advance: Advance::default(),
            outputs: VecDeque::new(),
            closed: None,
        }
    }

    /// Next thing to do; ask until `None` after every call.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Declares a request; returns its serial.
    pub fn reserve(&mut self, now: Time, declaration: Declaration) -> Result<u64, SenderError> {
        let Declaration { request, specs, more, deadline, integrity, at_once } = declaration;
        if let Some(Failure { code, text }) = self.closed.clone() {
            return Err(SenderError::Closed { code, text });
        }
        check_chunks(&self.layout, &specs)?;
        let total = specs.len().saturating_add(more as usize);
        if total as u64 > u64::from(self.layout.pages()) {
            return Err(SenderError::TooLarge { chunks: total, pages: self.layout.pages() });
        }
        if self.ids.contains_key(&request) {
            return Err(SenderError::Busy { request });
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let deadline_ms = u64::try_from(deadline.since(now).as_millis()).unwrap_or(u64::MAX);
        let (places, advance) =
            if at_once && more == 0 { self.advance.choose(specs.len()) } else { (Vec::new(), 0) };
        let chosen: Vec<Chunk> = match places.as_slice() {
            [] => specs.iter().map(|_| Chunk::NEW).collect(),
            places => places.iter().map(|hold| Chunk::chosen(*hold)).collect(),
        };
        let chunks = specs.clone();
        let channel = self.channel;
        self.send(Message::Reserve {
            channel,
            serial,
            request: request.clone(),
            chunks,
            deadline_ms,
            integrity,
            more,
            places,
            advance,
        });
        self.ids.insert(request.clone(), serial);
        self.timers.insert((deadline, serial));
        let r = Request {
            id: request,
            chunks: chosen,
            undone: specs.len() as u32,
            declared: specs.len(),
            more,
            specs,
            phase: Phase::Waiting,
            code: ErrorCode::Ok,
            in_flight: 0,
            reserved: now,
            admitted: now,
            deadline,
            renewal: Duration::MAX,
            timer: deadline,
        };
        if r.chunks.first().is_some_and(|c| c.chosen.is_some()) {
            self.outputs.push_back(Output::Admitted { serial });
        }
        self.requests.insert(serial, r);
        Ok(serial)
    }

    /// Names further chunks of a request; `last` says that none will follow. Returns the index of the first.
    pub fn extend(&mut self, serial: u64, specs: Vec<ChunkSpec>, last: bool) -> Result<u32, SenderError> {
        let r =
            self.requests.get_mut(&serial).filter(|r| r.phase != Phase::Closing).ok_or(SenderError::Ended)?;
        if specs.len() > r.more as usize {
            return Err(SenderError::TooMany { named: specs.len(), announced: r.more });
        }
        if !specs.is_empty() {
            check_chunks(&self.layout, &specs)?;
        }
        if let Some(twice) = specs.iter().position(|c| r.specs.iter().any(|s| s.key == c.key)) {
            let chunk = (r.specs.len() + twice) as u32;
            return Err(RequestError::Twice { chunk, key: specs[twice].key.clone() }.into());
        }
        let first = r.specs.len() as u32;
        r.more = if last { 0 } else { r.more - specs.len() as u32 };
        r.undone += specs.len() as u32;
        r.chunks.extend(specs.iter().map(|_| Chunk::NEW));
        r.specs.extend_from_slice(&specs);
        let channel = self.channel;
        self.send(Message::Extend { channel, serial, first, chunks: specs, last });
        Ok(first)
    }

    /// The bytes of a chunk are final: it is written as soon as it has a page.
    pub fn supply(&mut self, serial: u64, chunk: u32) -> Result<(), SenderError> {
        let r =
            self.requests.get_mut(&serial).filter(|r| r.phase != Phase::Closing).ok_or(SenderError::Ended)?;
        let chunks = r.chunks.len();
        let c = r.chunks.get_mut(chunk as usize).ok_or(SenderError::NoSuchChunk { chunk, chunks })?;
        if std::mem::replace(&mut c.supplied, true) {
            return Err(SenderError::Twice { chunk });
        }
        match c.place {
            // Nothing to write: the source can go.
            Place::Present => self.outputs.push_back(Output::ChunkDone { serial, chunk }),
            _ => self.start(serial, chunk),
        }
        Ok(())
    }

    /// How a chunk stands that has not been supplied.
    pub fn standing(&self, serial: u64, chunk: u32) -> Standing {
        let chunk = self
            .requests
            .get(&serial)
            .filter(|r| r.phase != Phase::Closing)
            .and_then(|r| r.chunks.get(chunk as usize));
        match chunk {
            Some(Chunk { supplied: false, place: Place::Page(..), .. }) => Standing::HasPage,
            Some(Chunk { supplied: false, place: Place::None, pending: false, .. }) => Standing::Unknown,
            _ => Standing::NoPage,
        }
    }

    /// A write has ended, and no byte of it moves any more: with the digest to commit, or with a failure.
    pub fn written(&mut self, write: Write, result: Result<Check, Failure>) {
        let Write { serial, chunk, page, generation } = write;
        if self.advance.is_stray(&write) {
            self.give_back(vec![Hold { page, generation }]);
            return;
        }
        let Some(r) = self.requests.get_mut(&serial) else { return };
        let place = &mut r.chunks[chunk as usize].place;
        if *place != Place::Writing(page, generation) {
            return;
        }
        r.in_flight -= 1;
        if r.phase == Phase::Closing {
            *place = Place::None;
            if r.in_flight == 0 {
                self.finish_closing(serial);
            }
            return;
        }
        match result {
            Ok(check) => {
                *place = Place::Committed(generation);
                let channel = self.channel;
                self.send(Message::Commit { channel, serial, chunk, generation, check });
            }
            Err(failure) => {
                *place = Place::Page(page, generation);
                let attempts = &mut r.chunks[chunk as usize].attempts;
                *attempts += 1;
                if failure.code == ErrorCode::Corrupt && *attempts < MAX_ATTEMPTS {
                    self.start(serial, chunk);
                } else {
                    self.end(serial, failure);
                }
            }
        }
    }

    /// The caller gives the request up.
    pub fn abort(&mut self, serial: u64, code: ErrorCode) {
        // An abort is never a success, whatever the caller names.
        let code = if code == ErrorCode::Ok { ErrorCode::Cancelled } else { code };
        self.end(serial, Failure { code, text: "given up by the caller".into() });
    }

    /// A message came. False: it is not for this channel.
    pub fn message(&mut self, now: Time, message: &Message) -> bool {
        if message.channel() != Some(self.channel) {
            return false;
        }
        match message {
            Message::Grant { serial, slots, lease_ms, .. } => {
                self.grant(now, *serial, slots, Duration::from_millis(*lease_ms));
            }
            Message::Extended { serial, first, slots, .. } => {
                for (i, slot) in slots.iter().enumerate() {
                    self.resolved(*serial, first.saturating_add(i as u32), *slot);
                }
            }
            Message::Resolved { serial, chunk, slot, .. } => self.resolved(*serial, *chunk, *slot),
            Message::Advance { number, pages, .. } => self.advanced(*number, pages),
            Message::Recall { .. } => self.give_back_unused(),
            Message::Committed { serial, chunk, generation, code, .. } => {
                self.committed(*serial, *chunk, *generation, *code);
            }
            Message::Ready { serial, .. } => self.ready(now, *serial),
            Message::Refused { serial, code, text, .. } | Message::Revoke { serial, code, text, .. } => {
                let code = if *code == ErrorCode::Ok { ErrorCode::Protocol } else { *code };
                if self.requests.contains_key(serial) {
                    self.end(*serial, Failure { code, text: text.clone() });
                } else if matches!(message, Message::Revoke { .. }) {
                    // Ended here already: nothing is under way.
                    let (channel, serial) = (self.channel, *serial);
                    self.send(Message::Abort { channel, serial, quiet: true, code });
                }
            }
            Message::Detach { code, text, .. } => {
                self.close(&Failure { code: *code, text: format!("the receiver closed its pool: {text}") });
            }
            _ => return false,
        }
        true
    }

    /// The channel has ended (peer gone, sender dropped): every request ends, nothing new is taken.
    pub fn close(&mut self, failure: &Failure) {
        self.closed.get_or_insert_with(|| failure.clone());
        let serials: BTreeSet<u64> = self.requests.keys().copied().collect();
        for serial in serials {
            self.end(serial, failure.clone());
        }
        self.give_back_unused();
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, now: Time) {
        while let Some(&(at, serial)) = self.timers.first() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            let Some(r) = self.requests.get_mut(&serial) else { continue };
            if now >= r.deadline {
                let text = if r.phase == Phase::Waiting {
                    format!("request {} was not admitted by its deadline", r.id)
                } else {
                    let n = r.chunks.len();
                    format!("request {}: {} of {n} chunks were not confirmed by its deadline", r.id, r.undone)
                };
                self.end(serial, Failure { code: ErrorCode::TimedOut, text });
            } else {
                r.timer = r.deadline.min(now + r.renewal);
                self.timers.insert((r.timer, serial));
                let channel = self.channel;
                self.send(Message::Renew { channel, serial });
            }
        }
    }

    /// When [`Sender::tick`] has something to do next.
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.first().map(|t| t.0)
    }

    /// True when no request is under way and no write either.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && !self.advance.has_strays()
    }

    /// The end of the channel, once it has ended.
    pub fn closed(&self) -> Option<&Failure> {
        self.closed.as_ref()
    }

    // ---- messages ----

    fn grant(&mut self, now: Time, serial: u64, slots: &[Slot], lease: Duration) {
        let pages = self.layout.pages();
        let Some(r) = self.requests.get_mut(&serial).filter(|r| r.phase == Phase::Waiting) else { return };
        let inside = |s: &Slot| !matches!(s, Slot::Page { page, .. } if page.0 >= pages);
        // Chunks that were named after the declaration may have come too late for this answer: theirs follows.
        if slots.len() < r.declared || slots.len() > r.chunks.len() || !slots.iter().all(inside) {
            let text = format!(
                "the receiver granted {} slots for {} chunks, or a page beyond {pages}",
                slots.len(),
                r.chunks.len()
            );
            self.end(serial, Failure { code: ErrorCode::Protocol, text });
            return;
        }
        let at_once = r.chunks.first().is_some_and(|c| c.chosen.is_some());
        r.phase = Phase::Active;
        if !at_once {
            r.admitted = now;
            self.outputs.push_back(Output::Admitted { serial });
        }
        // Three renewals a lease: two may be lost.
        r.renewal = (lease / 3).max(MIN_RENEWAL);
        self.timers.remove(&(r.timer, serial));
        r.timer = r.deadline.min(now + r.renewal);
        self.timers.insert((r.timer, serial));
        for (i, slot) in slots.iter().enumerate() {
            self.place(serial, i as u32, *slot);
        }
    }

    fn resolved(&mut self, serial: u64, chunk: u32, slot: Slot) {
        let pages = self.layout.pages();
        let Some(r) = self.requests.get_mut(&serial).filter(|r| r.phase == Phase::Active) else { return };
        let Some(c) = r.chunks.get(chunk as usize) else { return };
        if c.pending && c.chosen.is_some() {
            self.answered(serial, chunk, slot);
            return;
        }
        // A chunk that is being written or done is not moved: that would be a repetition.
        if c.place != Place::None {
            return;
        }
        if let Slot::Page { page, .. } = slot
            && page.0 >= pages
        {
            let text = format!("the receiver granted page {page} of {pages}");
            self.end(serial, Failure { code: ErrorCode::Protocol, text });
            return;
        }
        self.place(serial, chunk, slot);
    }

    fn place(&mut self, serial: u64, chunk: u32, slot: Slot) {
        let Some(r) = self.requests.get_mut(&serial) else { return };
        let c = &mut r.chunks[chunk as usize];
        if c.chosen.is_some() {
            self.answered(serial, chunk, slot);
            return;
        }
        match slot {
            Slot::Page { page, generation } => {
                if c.last.is_some_and(|(p, g)| p != page || g >= generation) {
                    return;
                }
                c.last = Some((page, generation));
                c.place = Place::Page(page, generation);
                self.start(serial, chunk);
            }
            Slot::Present => {
                c.place = Place::Present;
                r.undone -= 1;
                if c.supplied {
                    self.outputs.push_back(Output::ChunkDone { serial, chunk });
                }
            }
            Slot::Pending => c.pending = true,
        }
    }

    /// Starts the write of a chunk that has a page and its bytes.
    fn start(&mut self, serial: u64, chunk: u32) {
        let Some(r) = self.requests.get_mut(&serial) else { return };
        let c = &mut r.chunks[chunk as usize];
        if let Place::Page(page, generation) = c.place
            && c.supplied
        {
            c.place = Place::Writing(page, generation);
            r.in_flight += 1;
            self.outputs.push_back(Output::Write(Write { serial, chunk, page, generation }));
        }
    }

    fn committed(&mut self, serial: u64, chunk: u32, generation: Generation, code: ErrorCode) {
        let Some(r) = self.requests.get_mut(&serial).filter(|r| r.phase == Phase::Active) else { return };
        let Some(c) = r.chunks.get_mut(chunk as usize) else { return };
        if c.place != Place::Committed(generation) {
            return;
        }
        match code {
            ErrorCode::Ok => {
                c.place = Place::Done;
                r.undone -= 1;
                self.outputs.push_back(Output::ChunkDone { serial, chunk });
            }
            // The receiver follows with a fresh generation, or ends the request when it has had enough.
            ErrorCode::Corrupt => c.place = Place::None,
            code => {
                let text = format!("the receiver refused chunk {chunk}: {code}");
                self.end(serial, Failure { code, text });
            }
        }
    }

    fn ready(&mut self, now: Time, serial: u64) {
        let Some(r) = self.requests.get(&serial).filter(|r| r.phase != Phase::Closing) else { return };
        if r.undone + r.more > 0 {
            let open = r.undone + r.more;
            let text = format!("the receiver called request {} ready with {open} chunks open", r.id);
            self.end(serial, Failure { code: ErrorCode::Protocol, text });
            return;
        }
        let Some(r) = self.forget(serial) else { return };
        let mut summary = Summary {
            queued: r.admitted.since(r.reserved),
            moved: now.since(r.admitted),
            ..Summary::default()
        };
        for (c, spec) in r.chunks.iter().zip(&r.specs) {
            if c.place == Place::Done {
                summary.written += 1;
                summary.bytes += spec.len;
            } else {
                summary.present += 1;
            }
        }
        self.outputs.push_back(Output::Ended { serial, result: Ok(summary) });
    }

    // ---- ends ----

    /// Ends a request for its caller, and for the receiver as soon as no write is under way.
    fn end(&mut self, serial: u64, failure: Failure) {
        let Some(r) = self.requests.get_mut(&serial).filter(|r| r.phase != Phase::Closing) else { return };
        r.phase = Phase::Closing;
        r.code = failure.code;
        let (in_flight, timer, code, channel) = (r.in_flight, r.timer, r.code, self.channel);
        self.timers.remove(&(timer, serial));
        self.outputs.push_back(Output::Ended { serial, result: Err(failure) });
        if in_flight == 0 {
            self.finish_closing(serial);
        } else {
            self.send(Message::Abort { channel, serial, quiet: false, code });
            self.outputs.push_back(Output::Cancel { serial });
        }
    }

    fn finish_closing(&mut self, serial: u64) {
        let Some(r) = self.forget(serial) else { return };
        let (channel, code) = (self.channel, r.code);
        self.send(Message::Abort { channel, serial, quiet: true, code });
        // What the receiver has not taken for the request.
        self.give_back(r.chunks.into_iter().filter_map(|c| c.chosen).collect());
    }

    fn forget(&mut self, serial: u64) -> Option<Request> {
        let r = self.requests.remove(&serial)?;
        self.timers.remove(&(r.timer, serial));
        self.ids.remove(&r.id);
        Some(r)
    }

    fn send(&mut self, message: Message) {
        self.outputs.push_back(Output::Send(message));
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
