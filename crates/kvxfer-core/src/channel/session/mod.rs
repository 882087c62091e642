//! One attachment of a sender to a pool, over one connection: it drives the sender's machine.
//!
//! Called by the agent's progress thread (messages, time), by whichever thread ends a transfer, by the hashing thread and by
//! the user, who takes messages too while waiting. Threads that end transfers belong to transports and must not deregister memory: what they let go of goes to
//! `trash`, which the progress thread empties.

mod placing;

use super::anchor::Anchor;
use super::sender::{ChunkSource, DeliveryReport, SenderConfig};
use super::ticket::Ticket;
use super::worker::Worker;
use super::write::{How, WriteJob, choose};
use crate::agent::PeerState;
use crate::agent::host::{self, Host};
use crate::transport::{Capabilities, TransportKind};
use crate::{Agent, Error, Peer, Piece, RemoteRegion, Result, Transfer, TransferOptions};
use kvxfer_proto::integrity::Binding;
use kvxfer_proto::layout::Layout;
use kvxfer_proto::plan::{PlanChunk, Striping, plan};
use kvxfer_proto::query::Asker;
use kvxfer_proto::sender::{self as machine, Declaration, Failure, Output, SenderError, Write};
use kvxfer_proto::wire::{Check, ChunkSpec, Message, RegionAdvert};
use kvxfer_proto::{ErrorCode, Integrity, RequestId, Time};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Numbers of channels; unique within the process, so within each agent's epoch.
static NEXT_CHANNEL: AtomicU64 = AtomicU64::new(1);

/// In the past, as every clock sees it.
const NOW: Time = Time(0);

pub(super) struct Session {
    me: Weak<Self>,
    anchor: Anchor,
    peer: Peer,
    channel: u64,
    pool: String,
    page_bytes: u64,
    integrity: Option<Integrity>,
    hasher: Worker,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    attached: Option<Result<Attached>>,
    requests: HashMap<u64, Request>,
    announced: Time,
    trash: Vec<Trash>,
}

/// What an attachment brings.
struct Attached {
    machine: machine::Sender,
    asker: Asker,
    layout: Layout,
    remote: RemoteRegion,
    /// Level of checking unless a write's transport asks for more.
    level: Integrity,
}

/// Dropped by the progress thread.
pub(super) type Trash = Box<dyn Send>;

struct Request {
    ticket: Arc<Ticket>,
    sources: Vec<Option<Arc<ChunkSource>>>,
    /// A chunk whose bytes are made in its place, just being looked up, and its write.
    placing: Option<(u32, Option<Write>)>,
    transfers: HashMap<u32, Transfer>,
    in_flight: u32,
    /// For its caller. Writes may still end.
    ended: bool,
    cancelled: bool,
    deadline: Instant,
    carried: Option<TransportKind>,
    span: tracing::Span,
}

/// What is done after the lock is released.
#[derive(Default)]
struct Todo {
    writes: Vec<Write>,
    cancels: Vec<Transfer>,
    ends: Vec<(Arc<Ticket>, Result<DeliveryReport>)>,
    /// When the progress thread is to look after this at the latest.
    look: Option<Time>,
}

pub(super) fn failed(code: ErrorCode, text: impl Into<String>) -> Failure {
    Failure { code, text: text.into() }
}

/// What a write's digest is bound to.
fn binding(request: &RequestId, spec: ChunkSpec, write: Write) -> Binding {
    let Write { page, generation, .. } = write;
    Binding { request: request.clone(), key: spec.key, len: spec.len, page, generation }
}

fn error(f: &Failure) -> Error {
    Error::failed(f.code, f.text.clone())
}

impl From<SenderError> for Error {
    fn from(e: SenderError) -> Self {
        Self::failed(e.code(), e.to_string())
    }
}

impl Session {
    /// Opens a channel to the pool at `peer` and waits for its answer.
    pub(super) fn attach(
        agent: &Agent,
        peer: &Peer,
        config: &SenderConfig,
        deadline: Instant,
    ) -> Result<Arc<Self>> {
        let session = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            anchor: Anchor::new(agent),
            peer: peer.clone(),
            channel: NEXT_CHANNEL.fetch_add(1, Ordering::Relaxed),
            pool: config.pool.clone(),
            page_bytes: config.geometry.page_bytes,
            integrity: config.integrity.or(agent.config().integrity),
            hasher: Worker::new("kvxfer-hash"),
            state: Mutex::new(State {
                attached: None,
                requests: HashMap::new(),
                announced: Time::NEVER,
                trash: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let host: Weak<Self> = Arc::downgrade(&session);
        agent.add_host(host)?;
        let (channel, pool, geometry) = (session.channel, config.pool.clone(), config.geometry.clone());
        let result = peer
            .send(Message::Attach { channel, pool, geometry })
            .and_then(|()| session.wait_attached(deadline));
        if let Err(e) = result {
            session.release();
            return Err(e);
        }
        Ok(session)
    }

    /// Looks after the receiver's answers on this thread for a moment, until `done`. No lock of the session is held.
    pub(super) fn attend(&self, done: impl FnMut() -> bool) {
        self.peer.attend(done);
    }

    fn wait_attached(&self, deadline: Instant) -> Result<()> {
        let started = Instant::now();
        self.attend(|| self.state.lock().attached.is_some());
        let mut state = self.state.lock();
        loop {
            match &state.attached {
                Some(Ok(_)) => return Ok(()),
                Some(Err(e)) => return Err(e.clone()),
                None => {}
            }
            if let PeerState::Gone(code) = self.peer.state() {
                return Err(Error::failed(code, format!("agent {} went away", self.peer.name())));
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() && state.attached.is_none() {
                return Err(Error::TimedOut {
                    operation: format!("attaching to pool {:?} of agent {}", self.pool, self.peer.name()),
                    after: started.elapsed(),
                });
            }
        }
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// True while new requests can be made over it.
    pub(super) fn is_open(&self) -> bool {
        let open = matches!(&self.state.lock().attached, Some(Ok(a)) if a.machine.closed().is_none());
        open && self.peer.state() == PeerState::Up
    }

    pub(super) fn layout(&self) -> Result<Layout> {
        match &self.state.lock().attached {
            Some(Ok(a)) => Ok(a.layout),
            Some(Err(e)) => Err(e.clone()),
            None => Err(Error::failed(ErrorCode::InProgress, "not attached yet")),
        }
    }

    pub(super) fn reserve(
        &self,
        request: RequestId,
        (specs, more): (Vec<ChunkSpec>, u32),
        deadline: Instant,
        at_once: bool,
    ) -> Result<Arc<Ticket>> {
        let mut state = self.state.lock();
        let State { attached, requests, .. } = &mut *state;
        let Some(Ok(a)) = attached else {
            return Err(Error::failed(ErrorCode::PeerGone, "not attached to the pool"));
        };
        let declaration = Declaration {
            request: request.clone(),
            specs: specs.clone(),
            more,
            deadline: host::to_time(deadline),
            integrity: a.level,
            at_once,
        };
        let serial = a.machine.reserve(host::now(), declaration)?;
        let bytes = specs.iter().map(|s| s.len).sum::<u64>();
        let span = tracing::info_span!(
            "request", side = "sender", %request, receiver = %self.peer.name(), pool = self.pool, chunks = specs.len(), more, bytes
        );
        let sources = specs.iter().map(|_| None).collect();
        let ticket = Arc::new(Ticket::new(request, serial, specs));
        let r = Request {
            ticket: ticket.clone(),
            sources,
            placing: None,
            transfers: HashMap::new(),
            in_flight: 0,
            ended: false,
            cancelled: false,
            deadline,
            carried: None,
            span,
        };
        requests.insert(serial, r);
        self.carry_out(state);
        Ok(ticket)
    }

    /// Names further chunks of a request; returns the index of the first.
    pub(super) fn extend(&self, ticket: &Ticket, specs: Vec<ChunkSpec>, last: bool) -> Result<usize> {
        let mut state = self.state.lock();
        let State { attached, requests, .. } = &mut *state;
        let (Some(Ok(a)), Some(r)) = (attached, requests.get_mut(&ticket.serial)) else {
            return Err(ticket.error());
        };
        let first = match a.machine.extend(ticket.serial, specs.clone(), last) {
            Ok(first) => first as usize,
            Err(SenderError::Ended) => return Err(ticket.error()),
            Err(e) => return Err(e.into()),
        };
        r.sources.extend(specs.iter().map(|_| None));
        ticket.name(specs);
        self.carry_out(state);
        Ok(first)
    }

    pub(super) fn supply(&self, ticket: &Ticket, chunk: u32, source: ChunkSource) -> Result<()> {
        let mut state = self.state.lock();
        let State { attached, requests, .. } = &mut *state;
        let Some(Ok(a)) = attached else { return Err(ticket.error()) };
        // The machine asks for the write as soon as it knows of the source: it must be there.
        let before =
            requests.get_mut(&ticket.serial).map(|r| r.sources[chunk as usize].replace(Arc::new(source)));
        match a.machine.supply(ticket.serial, chunk) {
            Ok(()) => {}
            Err(SenderError::Ended) => return Err(ticket.error()),
            Err(e) => {
                if let (Some(before), Some(r)) = (before, requests.get_mut(&ticket.serial)) {
                    r.sources[chunk as usize] = before;
                }
                return Err(e.into());
            }
        }
        self.carry_out(state);
        Ok(())
    }

    /// The level of checking of a write: the configured one, or the pool's raised to what the transport needs.
    fn level(&self, level: Integrity, caps: Capabilities, device: bool) -> Integrity {
        // Every byte of a device's memory is read back through the host: only where the path does not check them and somebody wants it.
        let floor = if device && !caps.verifies_arrival { Integrity::Bound } else { caps.default_integrity };
        self.integrity.unwrap_or(level.max(floor))
    }

    /// The thread for what takes long.
    pub(super) fn aside(&self, f: impl FnOnce() + Send + 'static) -> Result<()> {
        self.hasher.run(f)
    }

    pub(super) fn abort(&self, ticket: &Ticket, why: ErrorCode) {
        self.with(|m| m.abort(ticket.serial, why));
    }

    /// Ends every request and closes the channel.
    pub(super) fn close(&self, failure: &Failure) {
        self.end(failure);
        let (channel, code, text) = (self.channel, failure.code, failure.text.clone());
        // A peer that is gone needs no word.
        let _ = self.peer.send(Message::Detach { channel, code, text });
    }

    /// Lets go of the agent; called on a thread of the user. Transfers that still end keep the rest alive.
    pub(super) fn release(&self) {
        self.anchor.release();
    }

    // ---- queries ----

    /// Tells the asking machine something; an error when there is no attachment.
    pub(super) fn ask<T>(&self, f: impl FnOnce(&mut Asker) -> T) -> Result<T> {
        match &mut self.state.lock().attached {
            Some(Ok(a)) => Ok(f(&mut a.asker)),
            Some(Err(e)) => Err(e.clone()),
            None => Err(Error::failed(ErrorCode::InProgress, "not attached yet")),
        }
    }

    /// Has the asking machine say something, in the order in which it decides.
    pub(super) fn say<T>(&self, f: impl FnOnce(&mut Asker) -> Result<(T, Option<Message>)>) -> Result<T> {
        self.ask(|a| {
            let (result, message) = f(a)?;
            message.map_or(Ok(()), |m| self.peer.send(m))?;
            Ok(result)
        })?
    }

    /// Waits until the asking machine knows something; `None` when the time is over first.
    pub(super) fn wait_for<T>(
        &self,
        deadline: Instant,
        mut f: impl FnMut(&mut Asker) -> Option<T>,
    ) -> Option<T> {
        // What there is to return, once it is time to.
        let mut look = |state: &mut State| match &mut state.attached {
            Some(Ok(a)) => f(&mut a.asker).map(Some),
            _ => Some(None),
        };
        let mut known = None;
        self.attend(|| {
            known = look(&mut self.state.lock());
            known.is_some()
        });
        if let Some(known) = known {
            return known;
        }
        let mut state = self.state.lock();
        loop {
            if let Some(known) = look(&mut state) {
                return known;
            }
            if Instant::now() >= deadline {
                return None;
            }
            self.changed.wait_until(&mut state, deadline);
        }
    }

    /// The pool as this side sees it: its memory, its layout, and the level of checking unless a transport asks for more.
    pub(super) fn pool(&self) -> Result<(RemoteRegion, Layout, Integrity)> {
        match &self.state.lock().attached {
            Some(Ok(a)) => Ok((a.remote.clone(), a.layout, a.level)),
            Some(Err(e)) => Err(e.clone()),
            None => Err(Error::failed(ErrorCode::InProgress, "not attached yet")),
        }
    }

    /// The level of checking that the configuration names.
    pub(super) fn stated_integrity(&self) -> Option<Integrity> {
        self.integrity
    }

    // ---- driving the machines ----

    /// The channel has ended.
    fn end(&self, failure: &Failure) {
        let _ = self.ask(|a| a.close(failure));
        self.with(|m| m.close(failure));
        self.changed.notify_all();
    }

    fn with(&self, f: impl FnOnce(&mut machine::Sender)) {
        let mut state = self.state.lock();
        if let Some(Ok(a)) = &mut state.attached {
            f(&mut a.machine);
        }
        self.carry_out(state);
    }

    fn carry_out(&self, mut state: MutexGuard<'_, State>) {
        let mut todo = self.decide(&mut state);
        if !state.trash.is_empty() {
            todo.look = Some(NOW);
        }
        drop(state);
        self.perform(todo);
    }

    /// The same on a thread that may deregister memory: what is over goes at once, and nobody is woken for it.
    fn carry_out_and_clear(&self, mut state: MutexGuard<'_, State>) {
        let todo = self.decide(&mut state);
        let trash = std::mem::take(&mut state.trash);
        drop(state);
        self.perform(todo);
        drop(trash);
    }

    /// What the machine wants done.
    fn decide(&self, state: &mut State) -> Todo {
        let mut todo = Todo::default();
        let State { attached: Some(Ok(a)), requests, announced, trash } = state else { return todo };
        while let Some(output) = a.machine.poll() {
            match output {
                Output::Send(message) => {
                    if let Err(e) = self.peer.send(message)
                        && !matches!(e.code(), ErrorCode::PeerGone | ErrorCode::Closed)
                    {
                        tracing::warn!(peer = %self.peer.name(), error = %e, "cannot speak to the receiver; disconnecting");
                        self.peer.disconnect();
                    }
                }
                Output::Write(write) => {
                    if let Some(r) = requests.get_mut(&write.serial) {
                        r.in_flight += 1;
                        match &mut r.placing {
                            Some((chunk, place @ None)) if *chunk == write.chunk => *place = Some(write),
                            _ => todo.writes.push(write),
                        }
                    }
                }
                Output::Cancel { serial } => {
                    if let Some(r) = requests.get_mut(&serial) {
                        r.cancelled = true;
                        todo.cancels.extend(r.transfers.values().cloned());
                    }
                }
                Output::Admitted { serial } => {
                    if let Some(r) = requests.get(&serial) {
                        r.span.in_scope(|| tracing::debug!("admitted"));
                        r.ticket.admit();
                    }
                }
                Output::ChunkDone { serial, chunk } => {
                    if let Some(r) = requests.get_mut(&serial)
                        && let Some(source) = r.sources[chunk as usize].take()
                    {
                        trash.push(Box::new(source));
                    }
                }
                Output::Ended { serial, result } => {
                    if let Some(r) = requests.get_mut(&serial) {
                        r.ended = true;
                        let result = self.report(r, result);
                        todo.ends.push((r.ticket.clone(), result));
                        if r.in_flight == 0 {
                            trash.extend(requests.remove(&serial).map(|r| Box::new(r) as Trash));
                        }
                    }
                }
            }
        }
        let next = a.machine.next_timeout().unwrap_or(Time::NEVER);
        todo.look = (next < *announced).then_some(next);
        *announced = next.min(*announced);
        todo
    }

    fn perform(&self, todo: Todo) {
        for (ticket, result) in todo.ends {
            ticket.end(&result);
        }
        for transfer in todo.cancels {
            transfer.cancel();
        }
        for write in todo.writes {
            self.start(write);
        }
        if let Some(at) = todo.look {
            self.anchor.schedule(at);
        }
    }

    fn report(&self, r: &Request, result: Result<machine::Summary, Failure>) -> Result<DeliveryReport> {
        match result {
            Ok(s) => {
                tracing::debug!(parent: &r.span, bytes = s.bytes, queued = ?s.queued, moved = ?s.moved, "delivered");
                let first = || self.peer.paths().first().map(|p| p.0);
                Ok(DeliveryReport {
                    bytes: s.bytes,
                    written: s.written,
                    present: s.present,
                    queued: s.queued,
                    moved: s.moved,
                    transport: r.carried.or_else(first).unwrap_or(TransportKind::Inproc),
                })
            }
            Err(f) => {
                tracing::warn!(parent: &r.span, request = %r.ticket.request, code = %f.code, text = f.text, "request failed");
                Err(error(&f))
            }
        }
    }

    // ---- writes ----

    fn start(&self, write: Write) {
        let Some(me) = self.me.upgrade() else { return };
        if let Err(e) = me.clone().submit(write) {
            me.write_ended(write, Err(failed(e.code(), e.to_string())));
        }
        part(me);
    }

    /// Submits one chunk's transfer. An error means that nothing has been or will be moved.
    fn submit(self: Arc<Self>, write: Write) -> Result<()> {
        let gone = || Error::failed(ErrorCode::Cancelled, "the request has ended");
        let (source, binding, deadline, layout, remote, level) = {
            let state = self.state.lock();
            let (Some(r), Some(Ok(a))) = (state.requests.get(&write.serial), &state.attached) else {
                return Err(gone());
            };
            let i = write.chunk as usize;
            if r.cancelled {
                return Err(gone());
            }
            let source = r.sources[i].clone().ok_or_else(|| {
                Error::failed(
                    ErrorCode::Corrupt,
                    "the bytes were made in the receiver's page and are damaged there",
                )
            })?;
            let spec = r.ticket.spec(i).ok_or_else(gone)?;
            let binding = binding(&r.ticket.request, spec, write);
            (source, binding, r.deadline, a.layout, a.remote.clone(), a.level)
        };
        let chunk = PlanChunk {
            chunk: write.chunk,
            page: write.page,
            len: binding.len,
            source_len: source.region.len(),
            runs: &source.runs,
        };
        let pieces: Vec<Piece> = plan(&layout, &[chunk], Striping::NONE)
            .map_err(|e| Error::InvalidArgument { argument: "source", problem: e.to_string() })?
            .into_iter()
            .map(|p| Piece { local_offset: p.source, remote_offset: p.destination, len: p.len })
            .collect();
        let (kind, caps) = self.peer.carrier(&source.region, &remote).ok_or_else(|| {
            let paths = self.peer.paths();
            Error::failed(
                ErrorCode::NotAvailable,
                format!("no transport carries the chunk from this memory to the pool; connected: {paths:?}"),
            )
        })?;
        let device = source.region.memory().is_device();
        let level = self.level(level, caps, device);
        let base = layout.offset(write.page).unwrap_or(0);
        let (how, on_the_way) = choose(level, caps, device, base, binding.len);
        let digests = if let How::Fused(d) = &how { Some(d.clone()) } else { None };
        let job = Arc::new(WriteJob { session: self, write, binding, source, how, parts: Mutex::default() });
        if matches!(job.how, How::Hashed | How::Sampled) {
            let hashing = job.clone();
            job.session.hasher.run(move || WriteJob::hash(hashing))?;
        }
        let options = TransferOptions {
            timeout: Some(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))),
            integrity: Some(on_the_way),
            after: job.source.after.clone(),
            ..TransferOptions::default()
        };
        let submitted =
            job.session.peer.write_with_digests(&job.source.region, &remote, &pieces, options, digests);
        let transfer = match submitted {
            Ok(transfer) => transfer,
            Err(e) => {
                // A hash may be under way: it finds that the write is over.
                job.parts.lock().over = true;
                return Err(e);
            }
        };
        {
            let mut state = job.session.state.lock();
            if let Some(r) = state.requests.get_mut(&write.serial) {
                r.carried = Some(kind);
                if r.cancelled {
                    drop(state);
                    transfer.cancel();
                } else {
                    r.transfers.insert(write.chunk, transfer.clone());
                }
            }
        }
        let ended = job.clone();
        transfer.on_finish(move |tracker| WriteJob::moved(ended, tracker));
        job.let_go();
        Ok(())
    }

    /// Has something dropped by the progress thread.
    pub(super) fn throw_away(&self, what: Trash) {
        self.state.lock().trash.push(what);
        self.anchor.schedule(NOW);
    }

    /// A write is over: `Ok` with what to commit.
    pub(super) fn write_ended(&self, write: Write, result: Result<Check, Failure>) {
        let mut state = self.state.lock();
        let State { attached, requests, trash, .. } = &mut *state;
        if let Some(r) = requests.get_mut(&write.serial) {
            r.in_flight -= 1;
            trash.extend(r.transfers.remove(&write.chunk).map(|t| Box::new(t) as Trash));
            let over = r.in_flight == 0 && r.ended;
            if over {
                trash.extend(requests.remove(&write.serial).map(|r| Box::new(r) as Trash));
            }
        }
        if let Some(Ok(a)) = attached {
            a.machine.written(write, result);
        }
        self.carry_out(state);
    }

    /// The pool's answer to our attachment.
    fn answered(
        &self,
        region: Option<&RegionAdvert>,
        pages: u32,
        code: ErrorCode,
        text: &str,
    ) -> Result<Attached> {
        if code != ErrorCode::Ok {
            let text = if text.is_empty() { code.as_str() } else { text };
            return Err(Error::failed(
                code,
                format!("pool {:?} of agent {}: {text}", self.pool, self.peer.name()),
            ));
        }
        let broken = |text: String| Error::failed(ErrorCode::Protocol, text);
        let region = region.ok_or_else(|| broken("the receiver named no region for its pool".into()))?;
        let layout = Layout::new(self.page_bytes, pages).map_err(|e| broken(e.to_string()))?;
        if layout.total_bytes() > region.len {
            return Err(broken(format!(
                "{pages} pages of {} bytes in a region of {}",
                self.page_bytes, region.len
            )));
        }
        let remote = self.peer.import(region)?;
        let by_transport = |kind: TransportKind| match kind {
            TransportKind::Tcp | TransportKind::Nixl => Integrity::Full,
            _ => Integrity::Bound,
        };
        let level = self
            .integrity
            .unwrap_or_else(|| remote.transports().first().map_or(Integrity::Full, |k| by_transport(*k)));
        let machine = machine::Sender::new(self.channel, layout);
        let asker = Asker::new(self.channel, layout);
        Ok(Attached { machine, asker, layout, remote, level })
    }

    fn is_peer(&self, peer: &Peer) -> bool {
        peer.connection() == self.peer.connection()
    }
}

/// Lets go of a session on a thread that may belong to a transport.
pub(super) fn part(session: Arc<Session>) {
    if let Some(last) = Arc::into_inner(session) {
        std::thread::spawn(move || drop(last));
    }
}

impl Host for Session {
    fn message(&self, peer: &Peer, message: &Message) -> bool {
        if message.channel() != Some(self.channel) || !self.is_peer(peer) {
            return false;
        }
        if let Message::Attached { region, pages, code, text, .. } = message {
            let mut state = self.state.lock();
            if state.attached.is_none() {
                state.attached = Some(self.answered(region.as_ref(), *pages, *code, text));
                self.changed.notify_all();
            }
            return true;
        }
        let mut state = self.state.lock();
        let mut taken = false;
        if let Some(Ok(a)) = &mut state.attached {
            taken = a.asker.message(message);
            taken |= a.machine.message(host::now(), message);
        }
        self.carry_out_and_clear(state);
        match message {
            Message::Refused { code: ErrorCode::NotFound, .. }
            | Message::Found { code: ErrorCode::NotFound, .. }
            | Message::Released { code: ErrorCode::NotFound, .. } => {
                self.end(&failed(ErrorCode::PeerGone, "the receiver does not know this channel any more"));
            }
            Message::Detach { code, text, .. } => {
                self.end(&failed(*code, format!("the receiver closed its pool: {text}")));
            }
            _ => {
                self.changed.notify_all();
            }
        }
        taken
    }

    fn peer_gone(&self, peer: &Peer, code: ErrorCode) {
        if self.is_peer(peer) {
            let failure = failed(ErrorCode::PeerGone, format!("receiver {} is gone: {code}", peer.name()));
            self.end(&failure);
        }
    }

    fn peer_fenced(&self, _peer: &Peer) {}

    fn tick(&self, now: Time) -> Option<Time> {
        let mut state = self.state.lock();
        let trash = std::mem::take(&mut state.trash);
        if let Some(Ok(a)) = &mut state.attached {
            a.machine.tick(now);
        }
        // Told by the return value: no need to be asked again for it.
        state.announced = Time(0);
        self.carry_out(state);
        drop(trash);
        let mut state = self.state.lock();
        let next = match &state.attached {
            Some(Ok(a)) => a.machine.next_timeout(),
            _ => None,
        };
        state.announced = next.unwrap_or(Time::NEVER);
        next
    }

    fn closed(&self) {
        self.end(&failed(ErrorCode::Closed, "the agent was shut down"));
    }
}
