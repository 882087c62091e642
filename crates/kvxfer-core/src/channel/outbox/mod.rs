//! The prefiller's whole side: requests of many prompts, in steps, to any number of receivers, with word to the proxy.
//!
//! ```text
//! put(batch) ─► its request ─ open receiver: here and now ───────────► reserve | extend, write ─► … ─► Ended ─► proxy
//!                         └─ not connected yet: the receiver's thread ─┘                └─► Released (per batch)
//! ```
//!
//! [`Outbox::put`] never waits: a receiver that is connected is spoken to at once, one that is not has a thread of its own that
//! connects, so neither a slow receiver nor a dead one holds up the engine or another receiver. All of a request's pages are asked
//! for with its first batch (`total`); later batches name further chunks. A batch is released when nothing reads its bytes any more,
//! however its request ends. Every request ends, by its deadline at the latest, and its end goes to the proxy, good or bad.
//!
//! Where a receiver's pool is mapped in this process, the engine can have the pages first ([`Outbox::place`]), fill them, and put the batch
//! then: its bytes are where they belong. Anything that stands in the way of that (not connected, not admitted soon, another transport)
//! is no failure: what has no place is put from the engine's own memory.
//!
//! Memory for batches is the engine's, and it is short: a request that waits for pages at its receiver keeps memory that the next
//! step of an admitted one may need, while the pages it waits for are that one's. [`Outbox::shed`] breaks such a circle.

mod events;
mod place;

use self::events::Events;
pub use self::events::OutboxEvent;
use self::place::Named;
use super::place::Place;
use super::sender::{ChunkSource, Delivery, DeliveryReport, Reservation, Sender, SenderConfig};
use crate::cuda::Fence;
use crate::notify::Notifier;
use crate::{Agent, Error, Result};
use crossbeam::channel as queue;
use kvxfer_proto::notify::Notification;
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ErrorCode, RequestId};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pause between two attempts to reach a receiver.
const RETRY: Duration = Duration::from_millis(50);

/// Settings of an outbox.
#[derive(Clone, Debug)]
pub struct OutboxConfig {
    /// Pool, geometry, integrity, and the deadline of a request from its first batch on.
    pub sender: SenderConfig,
    /// How long a receiver that cannot be reached is waited for.
    pub patience: Duration,
    /// The proxy's notification socket, `tcp://host:port`; `None` tells nobody.
    pub proxy: Option<String>,
}

/// Part of a request.
pub struct Batch {
    /// The request, as the proxy knows it.
    pub request: RequestId,
    /// Where its chunks go, `tcp://host:port`.
    pub receiver: String,
    /// It begins the request: an earlier one of that name is over.
    pub first: bool,
    /// Chunks of the whole request, as far as that is known with the first batch; smaller than what is in it means: no more.
    pub total: u32,
    /// No further batch follows.
    pub last: bool,
    /// The chunks and their bytes, which must stay as they are until the batch is released. `None`: in the place that
    /// [`Outbox::place`] gave; a source for such a chunk means that the place was not used.
    pub chunks: Vec<(ChunkSpec, Option<ChunkSource>)>,
    /// All of them are complete at this point of a CUDA stream; not read before.
    pub after: Option<Fence>,
}

/// Sends requests. Dropping it gives up what is under way, places included: nobody may be writing to those then.
pub struct Outbox {
    shared: Arc<Shared>,
}

struct Shared {
    /// Until the outbox is dropped, by whose thread the agent may be shut down; others that end requests are the agent's own.
    agent: Mutex<Option<Agent>>,
    config: OutboxConfig,
    notifier: Option<Notifier>,
    next_batch: AtomicU64,
    state: Mutex<State>,
    events: Arc<Events>,
}

#[derive(Default)]
struct State {
    requests: HashMap<RequestId, Arc<Request>>,
    /// Chunks named ahead of their batches, by request. Their places are the engine's until it has put or given up the batch, whatever
    /// becomes of the request.
    named: HashMap<RequestId, Named>,
    routes: HashMap<String, Arc<Route>>,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

/// One receiver.
struct Route {
    address: String,
    sender: Mutex<Option<Sender>>,
    work: queue::Sender<Arc<Request>>,
}

struct Request {
    id: RequestId,
    route: Arc<Route>,
    started: Instant,
    /// Held while a batch is being handed over, so that batches stay in order.
    work: Mutex<Work>,
    end: Mutex<End>,
}

#[derive(Default)]
struct Work {
    /// Batches that wait for the connection.
    waiting: VecDeque<Part>,
    reservation: Option<Reservation>,
    /// What is left of the reservation once the last batch has been handed over.
    delivery: Option<Delivery>,
}

#[derive(Default)]
struct End {
    ended: bool,
    last_put: Option<Instant>,
}

struct Part {
    total: u32,
    last: bool,
    chunks: Vec<(ChunkSpec, Bytes)>,
    /// Index of the first chunk in the request, where they were named ahead.
    named: Option<usize>,
    after: Option<Fence>,
}

/// A chunk's bytes.
enum Bytes {
    /// To be written.
    At(ChunkSource),
    /// In their place.
    Here(Place),
    /// To be written to a place that the engine did not use.
    Instead(Place, ChunkSource),
}

impl Outbox {
    /// An outbox on `agent`. Nothing is connected before the first batch.
    pub fn new(agent: &Agent, config: OutboxConfig) -> Result<Self> {
        let notifier = config.proxy.as_deref().map(Notifier::new).transpose()?;
        Ok(Self {
            shared: Arc::new(Shared {
                agent: Mutex::new(Some(agent.clone())),
                config,
                notifier,
                next_batch: AtomicU64::new(1),
                state: Mutex::default(),
                events: Arc::default(),
            }),
        })
    }

    /// Takes a batch and returns its number, which its release will name, or `None` when nothing of it is read: its bytes are all in
    /// their places. Never waits. What is wrong with the batch itself is the error, and then nothing was taken; whatever happens to its
    /// request afterwards is an event. Batches of a request that has failed are released at once.
    pub fn put(&self, batch: Batch) -> Result<Option<u64>> {
        let Batch { request: id, receiver, first, total, last, chunks, after } = batch;
        let named = self.shared.state.lock().named.remove(&id);
        if chunks.is_empty() && !last && named.is_none() {
            return Err(Error::InvalidArgument {
                argument: "batch.chunks",
                problem: format!("a batch of request {id} without chunks that is not its last"),
            });
        }
        let (request, named, mut chunks) = if let Some(named) = named {
            if let Err(e) = named.check(&receiver, &chunks) {
                named.fail(&self.shared, &e, after.as_ref());
                return Err(e);
            }
            (named.request.clone(), Some(named.first), named.join(chunks))
        } else {
            let chunks = place::sourced(chunks)?;
            (self.shared.request(&id, &receiver, first, last)?, None, chunks)
        };
        let number = self.shared.keep_until_released(&mut chunks, after.as_ref());
        self.shared.take(request, Part { total, last, chunks, named, after });
        Ok(number)
    }

    /// Gives a request up. False when none of that name is under way.
    pub fn abort(&self, request: &RequestId, why: ErrorCode) -> bool {
        let Some(request) = self.shared.state.lock().requests.get(request).cloned() else { return false };
        self.shared.abort(&request, &Error::failed(why, "given up by the engine"));
        true
    }

    /// Gives up the youngest request that has not been admitted, to have the memory of its batches back; `None` when all are. For
    /// an engine that has no memory left for the next step of another one.
    pub fn shed(&self) -> Option<RequestId> {
        let requests: Vec<_> = self.shared.state.lock().requests.values().cloned().collect();
        let waits = |r: &&Arc<Request>| !r.end.lock().ended && r.is_waiting();
        let youngest = requests.iter().filter(waits).max_by_key(|r| r.started)?;
        let text = "gave way: it waited for pages at its receiver while others needed its memory; enlarge the buffers";
        self.shared.abort(youngest, &Error::failed(ErrorCode::NoCapacity, text));
        Some(youngest.id.clone())
    }

    /// The next event; `None` when the time is over, or the outbox is closed and nothing is left. Of several threads that wait here the
    /// one that came last is woken first.
    pub fn next_event(&self, timeout: Duration) -> Option<OutboxEvent> {
        self.shared.events.next(timeout)
    }

    /// The next event for a thread that has nothing to do but wait for it: it looks after the receivers' answers itself, at most so
    /// long, which spares the time until other threads have been woken for them. No other thread is woken for events that come
    /// meanwhile: take them until there are none.
    pub fn attend(&self, at_most: Duration) -> Option<OutboxEvent> {
        let events = &self.shared.events;
        if let Some(agent) = self.shared.agent.lock().clone() {
            events.attended(|| agent.attend(at_most, || events.len() > 0));
        }
        events.next(Duration::ZERO)
    }

    /// Events that wait to be taken.
    pub fn waiting_events(&self) -> usize {
        self.shared.events.len()
    }

    /// Requests under way.
    pub fn active(&self) -> usize {
        self.shared.state.lock().requests.values().filter(|r| !r.end.lock().ended).count()
    }

    /// Gives everything up, waits until no batch's bytes are read any more and the proxy has been told, at most `timeout`.
    /// Releases are still to be taken with [`Outbox::next_event`].
    pub fn close(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        self.shared.close();
        self.shared.events.wait_released(deadline).map_err(|open| Error::TimedOut {
            operation: format!("closing: {open} batches are still being read"),
            after: timeout,
        })?;
        if let Some(notifier) = &self.shared.notifier {
            notifier.flush(deadline.saturating_duration_since(Instant::now()));
        }
        Ok(())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.shared.close();
        let (named, threads) = {
            let mut state = self.shared.state.lock();
            (std::mem::take(&mut state.named), std::mem::take(&mut state.threads))
        };
        // Places that nobody has put: who drops the outbox writes to them no more. Their requests keep routes, and so threads, alive.
        drop(named);
        for thread in threads {
            // Each ends within one attempt to connect.
            let _ = thread.join();
        }
        let agent = self.shared.agent.lock().take();
        drop(agent);
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("active", &self.active()).finish_non_exhaustive()
    }
}

impl Request {
    /// True when it is not admitted. Who is being handed over just now is about to be decided, and does not count.
    fn is_waiting(&self) -> bool {
        self.work.try_lock().is_some_and(|w| match (&w.reservation, &w.delivery) {
            (Some(reservation), _) => !reservation.is_admitted(),
            (None, Some(delivery)) => !delivery.is_admitted(),
            (None, None) => true,
        })
    }
}

impl Route {
    fn is_open(&self) -> bool {
        // Locked only while its thread connects.
        self.sender.try_lock().is_some_and(|s| s.as_ref().is_some_and(Sender::is_open))
    }
}

impl Shared {
    /// Hands part of a request over now, or has it done once that is possible.
    fn take(self: &Arc<Self>, request: Arc<Request>, part: Part) {
        {
            let mut end = request.end.lock();
            if part.last {
                end.last_put = Some(Instant::now());
            }
            if end.ended {
                drop(end);
                place::give_up(part.chunks, part.after.as_ref());
                return;
            }
        }
        let ready = {
            let mut work = request.work.lock();
            work.waiting.push_back(part);
            // The order is kept: what waits already goes first, on the thread that is at it.
            work.waiting.len() == 1 && request.route.is_open()
        };
        if ready {
            self.hand_over(&request);
        } else {
            // The thread lives as long as the route.
            let route = request.route.clone();
            let _ = route.work.send(request);
        }
    }

    /// Numbers a batch whose bytes will be read.
    fn keep_until_released(&self, chunks: &mut [(ChunkSpec, Bytes)], after: Option<&Fence>) -> Option<u64> {
        let sources: Vec<_> = chunks.iter_mut().filter_map(|(_, bytes)| bytes.source()).collect();
        if sources.is_empty() {
            return None;
        }
        let number = self.next_batch.fetch_add(1, Ordering::Relaxed);
        let release = self.events.open(number);
        for source in sources {
            source.keep = Some(release.clone());
            if after.is_some() {
                source.after = after.cloned();
            }
        }
        Some(number)
    }

    /// The request that a batch belongs to.
    fn request(
        self: &Arc<Self>,
        id: &RequestId,
        receiver: &str,
        first: bool,
        last: bool,
    ) -> Result<Arc<Request>> {
        if first {
            let before = self.state.lock().requests.remove(id);
            if let Some(before) = before {
                self.abort(
                    &before,
                    &Error::failed(ErrorCode::Cancelled, "another request of that name began"),
                );
            }
        }
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::failed(ErrorCode::Closed, "the outbox is closed"));
        }
        let now = Instant::now();
        let keep = self.config.sender.request_timeout * 2;
        // Failed ones are remembered for their later batches, not for ever.
        state.requests.retain(|_, r| !r.end.lock().ended || now.duration_since(r.started) < keep);
        if let Some(request) = state.requests.get(id).cloned() {
            if request.route.address != receiver {
                return Err(Error::InvalidArgument {
                    argument: "batch.receiver",
                    problem: format!("request {id} goes to {}, not to {receiver}", request.route.address),
                });
            }
            if last && request.end.lock().ended {
                state.requests.remove(id);
            }
            return Ok(request);
        }
        let route = if let Some(route) = state.routes.get(receiver) {
            route.clone()
        } else {
            let (route, thread) = self.route(receiver)?;
            state.routes.insert(receiver.to_owned(), route.clone());
            state.threads.push(thread);
            route
        };
        // What goes on without having begun belongs to a request that is over and forgotten.
        let end = Mutex::new(End { ended: !first, last_put: None });
        let request = Arc::new(Request { id: id.clone(), route, started: now, work: Mutex::default(), end });
        if first {
            state.requests.insert(id.clone(), request.clone());
        }
        Ok(request)
    }

    fn route(self: &Arc<Self>, receiver: &str) -> Result<(Arc<Route>, JoinHandle<()>)> {
        crate::agent::address::Address::parse(receiver).map_err(|problem| Error::InvalidArgument {
            argument: "batch.receiver",
            problem: format!("{receiver:?}: {problem}"),
        })?;
        let (work, todo) = queue::unbounded::<Arc<Request>>();
        let route = Arc::new(Route { address: receiver.to_owned(), sender: Mutex::default(), work });
        let me = Arc::downgrade(self);
        let thread = crate::threads::spawn("kvxfer-outbox", move || {
            while let Ok(request) = todo.recv() {
                let Some(shared) = me.upgrade() else { return };
                shared.connect(&request);
                shared.hand_over(&request);
            }
        })
        .map_err(|e| Error::system("starting a thread for a receiver", e, "raise the limit on threads"))?;
        Ok((route, thread))
    }

    /// Makes sure that the request's receiver is connected, or ends the request. Runs on the receiver's thread.
    fn connect(&self, request: &Request) {
        let route = &request.route;
        if route.is_open() || request.end.lock().ended {
            return;
        }
        // From its own beginning: requests that waited behind one that failed do not begin to wait then.
        let deadline = request.started + self.config.patience;
        let mut sender = route.sender.lock();
        *sender = None;
        let agent = self.agent.lock().clone();
        let failure = loop {
            let Some(agent) = &agent else { break Error::failed(ErrorCode::Closed, "the outbox is closed") };
            let left = deadline.saturating_duration_since(Instant::now()).max(RETRY);
            match Sender::connect(agent, &route.address, self.config.sender.clone(), left) {
                Ok(connected) => {
                    tracing::info!(receiver = route.address, agent = %connected.peer().name(), "connected");
                    *sender = Some(connected);
                    return;
                }
                // What no waiting cures.
                Err(e) if !e.is_retryable() => break e,
                Err(e) if Instant::now() + RETRY >= deadline => break e,
                Err(_) if self.state.lock().closed || request.end.lock().ended => {
                    break Error::failed(ErrorCode::Closed, "given up while connecting");
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        };
        drop(sender);
        self.abort(request, &failure);
    }

    /// Hands over what waits of a request, in order.
    fn hand_over(self: &Arc<Self>, request: &Arc<Request>) {
        let mut work = request.work.lock();
        let result = loop {
            let Some(part) = work.waiting.front_mut() else { break Ok(()) };
            if request.end.lock().ended {
                give_up(std::mem::take(&mut work.waiting));
                break Ok(());
            }
            let part = Part { chunks: std::mem::take(&mut part.chunks), after: part.after.take(), ..*part };
            let last = part.last;
            if let Err(e) = self.hand_over_part(request, &mut work.reservation, part) {
                break Err(e);
            }
            work.waiting.pop_front();
            if last && let Some(reservation) = work.reservation.take() {
                work.delivery = Some(reservation.finish());
            }
        };
        drop(work);
        if let Err(e) = result {
            self.abort(request, &e);
        }
    }

    fn hand_over_part(
        self: &Arc<Self>,
        request: &Arc<Request>,
        reservation: &mut Option<Reservation>,
        part: Part,
    ) -> Result<()> {
        let Part { total, last, chunks, named, after } = part;
        let (specs, bytes): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
        let first = match named {
            Some(first) => first,
            None => self.name(request, reservation, specs, total, last)?,
        };
        let mut result = Ok(());
        for (i, bytes) in bytes.into_iter().enumerate() {
            match (bytes, &reservation) {
                (Bytes::At(source), Some(reservation)) if result.is_ok() => {
                    result = reservation.write(first + i, source);
                }
                (Bytes::Here(place), Some(_)) if result.is_ok() => place.commit(after.clone()),
                (Bytes::Instead(place, source), Some(_)) if result.is_ok() => place.write(source),
                (Bytes::Here(place) | Bytes::Instead(place, _), _) => place.give_up(after.clone()),
                (Bytes::At(_), _) => {}
            }
        }
        result
    }

    /// Names chunks at the receiver, with the request itself where they are its first; returns the index of the first of them.
    fn name(
        self: &Arc<Self>,
        request: &Arc<Request>,
        reservation: &mut Option<Reservation>,
        specs: Vec<ChunkSpec>,
        total: u32,
        last: bool,
    ) -> Result<usize> {
        if let Some(reservation) = reservation {
            return if specs.is_empty() && !last { Ok(0) } else { reservation.extend(specs, last) };
        }
        let more = if last { 0 } else { total.saturating_sub(specs.len() as u32) };
        let sender = request.route.sender.lock().clone().ok_or_else(|| {
            Error::failed(ErrorCode::Unreachable, format!("{} is not connected", request.route.address))
        })?;
        let left = self.config.sender.request_timeout.saturating_sub(request.started.elapsed());
        let new = sender.reserve_at_once(request.id.clone(), specs, more, Some(left))?;
        let (me, ended) = (Arc::downgrade(self), Arc::downgrade(request));
        new.on_end(move |result| Self::told(&me, &ended, result));
        *reservation = Some(new);
        Ok(0)
    }

    /// Runs on whichever thread ends the request.
    fn told(me: &Weak<Self>, request: &Weak<Request>, result: &Result<DeliveryReport>) {
        if let (Some(shared), Some(request)) = (me.upgrade(), request.upgrade()) {
            shared.ended(&request, result.clone());
        }
    }

    /// Gives a request up for its receiver and ends it for everybody else.
    fn abort(&self, request: &Request, why: &Error) {
        self.ended(request, Err(why.clone()));
        // Somebody who is handing over sees that it has ended.
        let (waiting, reservation, delivery) = {
            let mut work = request.work.lock();
            (std::mem::take(&mut work.waiting), work.reservation.take(), work.delivery.take())
        };
        if let Some(reservation) = reservation {
            reservation.abort(why.code());
        }
        if let Some(delivery) = delivery {
            delivery.abort(why.code());
        }
        give_up(waiting);
    }

    /// A request has ended: once, whoever is first to say so.
    fn ended(&self, request: &Request, result: Result<DeliveryReport>) {
        let last_put = {
            let mut end = request.end.lock();
            if std::mem::replace(&mut end.ended, true) {
                return;
            }
            end.last_put
        };
        if last_put.is_some() {
            self.state.lock().requests.remove(&request.id);
        }
        let took = request.started.elapsed();
        if let Some(notifier) = &self.notifier {
            let (req_id, tp_rank) = (request.id.to_string(), self.config.sender.geometry.tp_rank);
            notifier.send(match &result {
                Ok(report) => Notification::KvReady {
                    req_id,
                    tp_rank,
                    bytes: report.bytes,
                    took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                },
                Err(e) => Notification::KvFailed {
                    req_id,
                    tp_rank,
                    code: e.code().as_str().to_owned(),
                    message: e.to_string(),
                    retryable: e.is_retryable(),
                },
            });
        }
        let after_last = last_put.map_or(Duration::ZERO, |at| at.elapsed());
        self.events.push(OutboxEvent::Ended { request: request.id.clone(), result, took, after_last });
    }

    fn close(&self) {
        let (requests, routes) = {
            let mut state = self.state.lock();
            state.closed = true;
            let requests: Vec<_> = state.requests.drain().map(|(_, r)| r).collect();
            (requests, std::mem::take(&mut state.routes))
        };
        for request in requests {
            self.abort(&request, &Error::failed(ErrorCode::Closed, "the outbox was closed"));
        }
        for route in routes.values() {
            if let Some(mut sender) = route.sender.try_lock_for(RETRY) {
                *sender = None;
            }
        }
        // Their threads end with the routes' last holders.
        drop(routes);
        self.events.close();
    }
}

/// Lets go of batches that are not handed over any more.
fn give_up(parts: VecDeque<Part>) {
    for part in parts {
        place::give_up(part.chunks, part.after.as_ref());
    }
}

#[cfg(test)]
mod tests;
