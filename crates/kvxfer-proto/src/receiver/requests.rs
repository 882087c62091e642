//! The life of one request inside the receiver's machine: admission, publication, end, quarantine.

use super::{
    Attempt, BTreeSet, ErrorCode, Event, Hold, Integrity, Message, Output, Owner, PeerId, Placement,
    Receiver, RequestId, Slot, Source, Time, VecDeque, clip, slot_of,
};
use crate::pool::Origin;
use crate::wire::{Check, ChunkSpec};
use std::collections::HashMap;

pub(super) struct Request {
    pub(super) peer: PeerId,
    pub(super) channel: u64,
    pub(super) serial: u64,
    pub(super) id: RequestId,
    pub(super) specs: Vec<ChunkSpec>,
    pub(super) chunks: Vec<ChunkState>,
    pub(super) attempts: Vec<u32>,
    /// What the sender said of the bytes of those that are committed.
    pub(super) checks: Vec<Check>,
    pub(super) integrity: Integrity,
    pub(super) phase: Phase,
    pub(super) deadline: Time,
    /// Chunks announced but not named yet, and the pages kept for them once admitted.
    pub(super) more: u32,
    pub(super) spares: Vec<Hold>,
    /// The pages out of its sender's advance, one for each chunk; empty where it came without.
    places: Vec<Hold>,
    /// What was committed of chunks whose write is still somebody else's.
    pub(super) early: HashMap<u32, Check>,
    declared: Time,
    timer: Option<Time>,
    /// Named chunks not published yet.
    pub(super) undone: u32,
    /// Pages that wait for the end of the sender's writes; only once ended.
    quarantine: Vec<Hold>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waits for pages.
    Queued,
    /// Admitted.
    Active,
    /// Ended, with pages in quarantine.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkState {
    /// Not admitted yet, or ended.
    None,
    /// Found published.
    Present(Hold),
    /// Another request writes it; the hold is the spare.
    Pending(Hold),
    /// The sender may write.
    Granted(Hold),
    /// Committed, being checked.
    Verifying(Hold),
    /// Published by this request.
    Done(Hold),
}

impl ChunkState {
    /// What the sender is told of it.
    pub(super) fn slot(&self) -> Slot {
        match *self {
            Self::Granted(h) | Self::Verifying(h) => slot_of(h),
            Self::Present(_) | Self::Done(_) => Slot::Present,
            Self::Pending(_) | Self::None => Slot::Pending,
        }
    }
}

impl Request {
    pub(super) fn new(
        now: Time,
        peer: PeerId,
        (channel, serial): (u64, u64),
        id: RequestId,
        specs: &[ChunkSpec],
        deadline: Time,
        integrity: Integrity,
    ) -> Self {
        Self {
            peer,
            channel,
            serial,
            id,
            specs: specs.to_vec(),
            chunks: vec![ChunkState::None; specs.len()],
            attempts: vec![0; specs.len()],
            checks: vec![Check::None; specs.len()],
            integrity,
            phase: Phase::Queued,
            deadline,
            more: 0,
            spares: Vec::new(),
            places: Vec::new(),
            early: HashMap::new(),
            declared: now,
            timer: None,
            undone: specs.len() as u32,
            quarantine: Vec::new(),
        }
    }

    /// Under way, of this peer and id.
    pub(super) fn is(&self, peer: &PeerId, id: &RequestId) -> bool {
        self.phase != Phase::Ended && self.id == *id && self.peer == *peer
    }

    /// Whether that page of a chunk's came out of the sender's advance.
    pub(super) fn is_place(&self, chunk: u32, hold: Hold) -> bool {
        self.places.get(chunk as usize) == Some(&hold)
    }

    pub(super) fn send(&self, outputs: &mut VecDeque<Output>, message: Message) {
        outputs.push_back(Output::Send(self.peer.clone(), message));
    }
}

impl Receiver {
    pub(super) fn owners(&self, mut which: impl FnMut(&Request) -> bool) -> BTreeSet<Owner> {
        self.requests.iter().filter(|(_, r)| which(r)).map(|(o, _)| *o).collect()
    }

    pub(super) fn set_timer(&mut self, owner: Owner, at: Time) {
        if let Some(r) = self.requests.get_mut(&owner) {
            if let Some(old) = r.timer.replace(at) {
                self.timers.remove(&(old, owner));
            }
            self.timers.insert((at, owner));
        }
    }

    /// The timer of a request has run out: its admission deadline or its lease.
    pub(super) fn timer(&mut self, now: Time, owner: Owner) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        r.timer = None;
        match r.phase {
            Phase::Queued => {
                let text = format!(
                    "request {} waited {:?} for {} pages; {} of {} are available (enlarge the pool, or let consumers release)",
                    r.id,
                    now.since(r.declared),
                    self.pool.need(&r.specs) + r.more,
                    self.pool.available(),
                    self.pool.pages()
                );
                self.end(now, owner, ErrorCode::NoCapacity, &text, false);
            }
            Phase::Active => {
                let text = if now >= r.deadline {
                    format!("request {} was not complete at its deadline", r.id)
                } else {
                    format!(
                        "request {}: the sender has neither committed nor renewed for {:?}",
                        r.id, self.settings.lease
                    )
                };
                self.end(now, owner, ErrorCode::TimedOut, &text, false);
            }
            Phase::Ended => {}
        }
    }

    /// Admits what fits. Runs after everything that frees, publishes or quarantines pages.
    pub(super) fn run_queue(&mut self, now: Time) {
        if self.queue.is_empty() {
            return;
        }
        let mut queue = std::mem::take(&mut self.queue);
        queue.run(|owner, pages_allowed| {
            let Some(r) = self.requests.get_mut(&owner) else { return Attempt::LeftFree };
            let need = self.pool.need(&r.specs) + r.more;
            if need > 0 && !pages_allowed {
                return Attempt::Waits;
            }
            let more = r.more;
            match self.admit(now, owner, Source::Room(more)) {
                false => Attempt::Waits,
                true if need == 0 => Attempt::LeftFree,
                true => Attempt::Left,
            }
        });
        debug_assert!(self.queue.is_empty(), "nothing is declared while the queue is run");
        self.queue = queue;
        self.recall();
    }

    /// Admits a request or refuses it for good; false when there is no room for it now.
    pub(super) fn admit(&mut self, now: Time, owner: Owner, source: Source<'_>) -> bool {
        let Some(r) = self.requests.get_mut(&owner) else { return true };
        let placements = match self.pool.admit(owner, &r.specs, source) {
            Ok(None) => return false,
            Ok(Some(admitted)) => {
                r.spares = admitted.spares;
                admitted.placements
            }
            Err(conflict) => {
                self.end(now, owner, ErrorCode::Mismatch, &conflict.to_string(), false);
                return true;
            }
        };
        for (state, placement) in r.chunks.iter_mut().zip(&placements) {
            *state = match *placement {
                Placement::Write(hold) => ChunkState::Granted(hold),
                Placement::Pending(hold) => ChunkState::Pending(hold),
                Placement::Present(hold) => {
                    r.undone -= 1;
                    ChunkState::Present(hold)
                }
            };
        }
        r.phase = Phase::Active;
        if let Source::Advance(_, places) = source {
            r.places = places.to_vec();
            let (peer, channel) = (r.peer.clone(), r.channel);
            let taken = placements.into_iter().filter_map(|p| match p {
                Placement::Write(hold) | Placement::Pending(hold) => Some(hold),
                Placement::Present(_) => None,
            });
            self.taken_from(&peer, channel, taken);
        }
        self.active += 1;
        self.renew(now, owner);
        self.grant(owner);
        self.finish_if_done(now, owner);
        true
    }

    /// A page that was kept for a chunk is not needed. The sender may be writing to one of its advance.
    fn let_go(&mut self, owner: Owner, chunk: u32, hold: Hold) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        r.early.remove(&chunk);
        if r.is_place(chunk, hold) {
            let (peer, channel) = (r.peer.clone(), r.channel);
            self.back_to(&peer, channel, owner, hold);
        } else {
            self.pool.give_back(owner, hold);
        }
    }

    /// Tells the sender where its chunks go; also the answer to a repeated declaration.
    pub(super) fn grant(&mut self, owner: Owner) {
        let Some(r) = self.requests.get(&owner) else { return };
        if r.phase != Phase::Active {
            return;
        }
        let slots = r.chunks.iter().map(ChunkState::slot).collect();
        let lease_ms = u64::try_from(self.settings.lease.as_millis()).unwrap_or(u64::MAX);
        let grant = Message::Grant { channel: r.channel, serial: r.serial, slots, lease_ms };
        r.send(&mut self.outputs, grant);
    }

    /// A chunk has passed its check: it becomes visible, and everybody who waited for it has it.
    pub(super) fn publish(&mut self, now: Time, owner: Owner, chunk: u32, hold: Hold) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        let origin = Origin { request: r.id.clone(), check: r.checks[chunk as usize] };
        let key = &r.specs[chunk as usize].key;
        let Some(waiters) = self.pool.publish(owner, key, hold, origin) else { return };
        r.chunks[chunk as usize] = ChunkState::Done(hold);
        r.undone -= 1;
        let (channel, serial, generation) = (r.channel, r.serial, hold.generation);
        let committed = Message::Committed { channel, serial, chunk, generation, code: ErrorCode::Ok };
        r.send(&mut self.outputs, committed);
        let waited = !waiters.is_empty();
        for (waiter, chunk) in waiters {
            let Some(w) = self.requests.get_mut(&waiter) else { continue };
            if let ChunkState::Pending(spare) = w.chunks[chunk as usize] {
                w.chunks[chunk as usize] = ChunkState::Present(hold);
                w.undone -= 1;
                let (channel, serial) = (w.channel, w.serial);
                let resolved = Message::Resolved { channel, serial, chunk, slot: Slot::Present };
                w.send(&mut self.outputs, resolved);
                self.let_go(waiter, chunk, spare);
                self.finish_if_done(now, waiter);
            }
        }
        self.finish_if_done(now, owner);
        if waited || !self.queue.is_empty() {
            self.run_queue(now);
        }
    }

    pub(super) fn finish_if_done(&mut self, now: Time, owner: Owner) {
        let done = |r: &Request| r.phase == Phase::Active && r.undone == 0 && r.more == 0;
        if !self.requests.get(&owner).is_some_and(done) {
            return;
        }
        let Some(r) = self.forget(owner) else { return };
        self.active -= 1;
        let mut announced = Vec::with_capacity(r.chunks.len());
        for state in &r.chunks {
            if let ChunkState::Present(hold) | ChunkState::Done(hold) = *state {
                self.pool.settle(hold, true, now);
                announced.push(hold);
            }
        }
        self.pool.announce(owner, announced);
        r.send(&mut self.outputs, Message::Ready { channel: r.channel, serial: r.serial });
        let bytes = r.specs.iter().map(|s| s.len).sum();
        let took = now.since(r.declared);
        self.outputs.push_back(Output::Event(Event::Ready { peer: r.peer, request: r.id, bytes, took }));
    }

    /// Ends a request that has not succeeded. Nothing of it stays visible; pages it may still write go to quarantine.
    /// `told_by_sender`: it knows already and needs no word from here.
    pub(super) fn end(&mut self, now: Time, owner: Owner, code: ErrorCode, text: &str, told_by_sender: bool) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        let was = std::mem::replace(&mut r.phase, Phase::Ended);
        if was == Phase::Ended {
            return;
        }
        if let Some(at) = r.timer.take() {
            self.timers.remove(&(at, owner));
        }
        let chunks = std::mem::take(&mut r.chunks);
        r.chunks = vec![ChunkState::None; chunks.len()];
        let (channel, serial, text) = (r.channel, r.serial, clip(text));
        let word = match was {
            Phase::Queued => Message::Refused { channel, serial, code, text: text.clone() },
            _ => Message::Revoke { channel, serial, code, text: text.clone() },
        };
        if !told_by_sender {
            r.send(&mut self.outputs, word);
        }
        let (peer, request) = (r.peer.clone(), r.id.clone());
        self.outputs.push_back(Output::Event(Event::Failed { peer, request, code, text }));
        if was == Phase::Queued {
            self.queue.remove(owner);
            self.forget(owner);
            return;
        }
        self.active -= 1;
        for spare in std::mem::take(&mut r.spares) {
            self.pool.give_back(owner, spare);
        }
        for (i, state) in chunks.into_iter().enumerate() {
            let Some(r) = self.requests.get_mut(&owner) else { return };
            let key = &r.specs[i].key;
            match state {
                ChunkState::None => {}
                ChunkState::Present(hold) | ChunkState::Done(hold) => self.pool.settle(hold, false, now),
                ChunkState::Pending(spare) => {
                    self.pool.stop_waiting(owner, key);
                    self.let_go(owner, i as u32, spare);
                }
                ChunkState::Granted(hold) | ChunkState::Verifying(hold) => {
                    let next = self.pool.fail_write(owner, key);
                    if matches!(state, ChunkState::Verifying(_)) {
                        // Committed: by the sender's own word its writes have ended.
                        self.pool.give_back(owner, hold);
                    } else {
                        self.pool.quarantine(owner, hold);
                        r.quarantine.push(hold);
                    }
                    if let Some((waiter, chunk)) = next {
                        self.take_over(now, waiter, chunk);
                    }
                }
            }
        }
        if self.requests.get(&owner).is_some_and(|r| r.quarantine.is_empty()) {
            self.forget(owner);
        }
        // The caller runs the queue where pages may have become free; a timer or a check does it here.
        self.run_queue(now);
    }

    /// The write a request waited for has failed: it writes the chunk itself, to the spare it has held for that.
    fn take_over(&mut self, now: Time, waiter: Owner, chunk: u32) {
        let Some(w) = self.requests.get_mut(&waiter) else { return };
        if let ChunkState::Pending(spare) = w.chunks[chunk as usize] {
            w.chunks[chunk as usize] = ChunkState::Granted(spare);
            let (channel, serial) = (w.channel, w.serial);
            let resolved = Message::Resolved { channel, serial, chunk, slot: slot_of(spare) };
            w.send(&mut self.outputs, resolved);
            if let Some(check) = w.early.remove(&chunk) {
                self.commit(now, waiter, chunk, spare.generation, check);
            }
        }
    }

    /// No write of an ended request can land any more: its pages are free.
    pub(super) fn quiet(&mut self, owner: Owner) {
        if !self.requests.get(&owner).is_some_and(|r| r.phase == Phase::Ended) {
            return;
        }
        if let Some(r) = self.forget(owner) {
            for hold in r.quarantine {
                self.pool.end_quarantine(owner, hold.page);
            }
        }
    }

    /// Drops all that is known of a request.
    fn forget(&mut self, owner: Owner) -> Option<Request> {
        let r = self.requests.remove(&owner)?;
        if let Some(at) = r.timer {
            self.timers.remove(&(at, owner));
        }
        if let Some(channel) = self.channel(&r.peer, r.channel) {
            channel.live.remove(&r.serial);
        }
        self.drop_closed_channel(&r.peer, r.channel);
        Some(r)
    }

    pub(super) fn check_requests(&self) -> Result<(), String> {
        let count = |phase| self.requests.values().filter(|r| r.phase == phase).count();
        let (queued, active) = (count(Phase::Queued), count(Phase::Active));
        if queued != self.queue.len() || active != self.active as usize {
            return Err(format!(
                "{queued} queued, {active} active; kept {} and {}",
                self.queue.len(),
                self.active
            ));
        }
        for (owner, r) in &self.requests {
            let undone = r
                .chunks
                .iter()
                .filter(|c| !matches!(c, ChunkState::Present(_) | ChunkState::Done(_)))
                .count();
            let over = undone == 0 && r.more == 0;
            if r.phase == Phase::Active && (undone != r.undone as usize || over || r.timer.is_none()) {
                return Err(format!("{owner:?} counts {} undone chunks of {undone}", r.undone));
            }
            if r.spares.len() != if r.phase == Phase::Active { r.more as usize } else { 0 } {
                return Err(format!("{owner:?} keeps {} pages for {} chunks", r.spares.len(), r.more));
            }
            if r.phase == Phase::Ended && r.quarantine.is_empty() {
                return Err(format!("{owner:?} has ended and is kept for nothing"));
            }
            if r.timer.is_some_and(|t| !self.timers.contains(&(t, *owner))) {
                return Err(format!("{owner:?} has lost its timer"));
            }
        }
        let held: usize = self
            .requests
            .values()
            .flat_map(|r| &r.chunks)
            .filter(|c| {
                matches!(c, ChunkState::Pending(_) | ChunkState::Granted(_) | ChunkState::Verifying(_))
            })
            .count()
            + self.requests.values().map(|r| r.spares.len()).sum::<usize>();
        let (advanced, late) = self.check_advances()?;
        let quarantined = self.requests.values().map(|r| r.quarantine.len()).sum::<usize>() + late as usize;
        let counts = self.pool.counts();
        if (held, quarantined, advanced)
            != (counts.writing as usize, counts.quarantined as usize, counts.advanced)
        {
            return Err(format!(
                "requests hold {held} pages, {quarantined} in quarantine, {advanced} in advance; the pool says {counts:?}"
            ));
        }
        Ok(())
    }
}
