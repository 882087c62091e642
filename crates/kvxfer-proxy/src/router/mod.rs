//! The router: who gets which request, and what happens when something fails. It has no socket and no clock.
//!
//! Every prompt is a *leg*: it is admitted (or queued, or refused), gets a prefiller and a decoder, is prefilled, waits
//! for its cache, is decoded, ends. The server tells the router what happened and does what it says; time is an argument.
//! What concerns a leg while it waits (its turn has come, its cache has arrived, its instance has gone) is announced by
//! handing out the waker the leg came with ([`Router::take_wakes`]); the leg then asks.

mod ids;
mod leg;
mod node;
mod place;
mod policy;
#[cfg(test)]
mod tests;
mod view;

pub use ids::Ids;
pub use leg::{AfterDecode, AfterPrefill, Assignment, Entry, Kv, LegId, Noted, Phase, Routed};
pub use node::{Admin, Breaker, Failure, HealthState, InstanceId};
pub use policy::{Demand, prefix_digest};
pub use view::{InstanceView, View};

use crate::config::{Deadlines, Health, Instance, KvPath, Limits, Policies, Role, Settings};
use kvxfer_proto::Time;
use kvxfer_proto::notify::Notification;
use leg::Leg;
use node::Node;
use place::{Choice, ended};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// What the router goes by; replaced by a reload.
#[derive(Clone, Debug)]
struct Rules {
    policy: Policies,
    kv: KvPath,
    limits: Limits,
    deadlines: Deadlines,
    health: Health,
}

impl From<&Settings> for Rules {
    fn from(settings: &Settings) -> Self {
        Self {
            policy: settings.policy.clone(),
            kv: settings.kv,
            limits: settings.limits.clone(),
            deadlines: settings.deadlines.clone(),
            health: settings.health.clone(),
        }
    }
}

/// The state of all instances and legs. `W` is what wakes a leg.
#[derive(Debug)]
pub struct Router<W> {
    rules: Rules,
    ids: Ids,
    next_leg: u64,
    next_instance: u32,
    choices: u64,
    nodes: BTreeMap<InstanceId, Node>,
    legs: HashMap<LegId, Leg<W>>,
    transfers: HashMap<u64, LegId>,
    /// Legs that wait for their turn; those that left stay until they are met.
    for_turn: VecDeque<LegId>,
    /// Legs that wait for an instance with room; likewise.
    for_room: VecDeque<LegId>,
    queued: usize,
    running: usize,
    ending: bool,
    wakes: Vec<W>,
    /// Seconds between two ends of legs, smoothed.
    pace: f64,
    last_end: Option<Time>,
}

impl<W: Clone> Router<W> {
    /// A router for these instances. `ids` makes its transfers unique.
    pub fn new(settings: &Settings, instances: impl IntoIterator<Item = Instance>, ids: Ids) -> Self {
        let mut router = Self {
            rules: settings.into(),
            ids,
            next_leg: 1,
            next_instance: 1,
            choices: 0,
            nodes: BTreeMap::new(),
            legs: HashMap::new(),
            transfers: HashMap::new(),
            for_turn: VecDeque::new(),
            for_room: VecDeque::new(),
            queued: 0,
            running: 0,
            ending: false,
            wakes: Vec::new(),
            pace: 0.1,
            last_end: None,
        };
        for instance in instances {
            router.add(Time(0), instance);
        }
        router
    }

    /// The wakers of legs that have something to ask about.
    pub fn take_wakes(&mut self) -> Vec<W> {
        std::mem::take(&mut self.wakes)
    }

    /// A leg comes. It must be ended with [`finish`](Self::finish), whatever becomes of it.
    pub fn enter(&mut self, now: Time, waker: W) -> Entry {
        if self.ending {
            return Entry::Ending;
        }
        let admitted = self.running < self.rules.limits.requests && self.queued == 0;
        if !admitted && self.queued >= self.rules.limits.queue {
            return Entry::Full(self.retry_after());
        }
        let id = LegId(self.next_leg);
        self.next_leg += 1;
        let until = now + self.rules.limits.queue_wait;
        self.legs.insert(
            id,
            Leg {
                waker,
                phase: if admitted { Phase::Admitted } else { Phase::Queued },
                until,
                demand: Demand::default(),
                wants_prefill: false,
                routed: None,
                prefiller: None,
                decoder: None,
                transfer: None,
                tried: Vec::new(),
                prefills: 0,
                decodes: 0,
                lost: false,
                sender: None,
            },
        );
        if admitted {
            self.running += 1;
            Entry::Admitted(id)
        } else {
            self.queued += 1;
            self.for_turn.push_back(id);
            Entry::Queued(id, until)
        }
    }

    /// Whether a queued leg may go on.
    pub fn admitted(&self, leg: LegId) -> bool {
        self.legs.get(&leg).is_some_and(|leg| leg.phase != Phase::Queued)
    }

    /// Chooses instances for an admitted leg.
    pub fn route(&mut self, now: Time, leg: LegId, demand: Demand, wants_prefill: bool) -> Routed {
        let Some(state) = self.legs.get_mut(&leg) else { return ended() };
        state.demand = demand;
        state.wants_prefill = wants_prefill;
        let routed = if self.for_room.is_empty() { self.place(now, leg) } else { None };
        if let Some(routed) = routed {
            return routed;
        }
        let until = now + self.rules.limits.queue_wait;
        if let Some(state) = self.legs.get_mut(&leg) {
            state.phase = Phase::Waiting;
            state.until = until;
        }
        self.for_room.push_back(leg);
        // Somebody else may be waiting only because nobody has asked since.
        self.pump(now);
        self.take_routed(leg).unwrap_or(Routed::Wait(until))
    }

    /// The answer for a leg that had to wait for an instance.
    pub fn take_routed(&mut self, leg: LegId) -> Option<Routed> {
        self.legs.get_mut(&leg)?.routed.take()
    }

    /// The instance this leg is at has gone down: whatever it is waiting for there will not come.
    pub fn lost(&self, leg: LegId) -> bool {
        self.legs.get(&leg).is_some_and(|leg| leg.lost)
    }

    /// The prefiller has answered. Says whether the cache is there, or until when to wait for it.
    pub fn prefilled(&mut self, now: Time, leg: LegId) -> Kv {
        self.leave_prefiller(now, leg, true);
        let until = now + self.rules.deadlines.kv;
        let Some(state) = self.legs.get_mut(&leg) else { return Kv::Waiting(now) };
        state.phase = Phase::Kv;
        state.until = until;
        self.kv(leg)
    }

    /// Whether a leg's cache has arrived.
    pub fn kv(&self, leg: LegId) -> Kv {
        match self.legs.get(&leg) {
            Some(Leg { transfer: Some(transfer), until, .. }) => transfer.state(*until),
            _ => Kv::Failed { code: "not_found".into(), message: "there is no transfer under way".into() },
        }
    }

    /// The cache has not arrived in time: nobody waits for it any more, and its prefiller has to answer for that.
    pub fn kv_timed_out(&mut self, now: Time, leg: LegId) {
        let Some(Leg { transfer: Some(transfer), sender, .. }) = self.legs.get_mut(&leg) else { return };
        if transfer.failed.is_some() || transfer.ready() {
            return;
        }
        transfer.failed = Some(("timed_out".into(), "the cache did not arrive in time".into()));
        if let Some(node) = sender.and_then(|id| self.nodes.get_mut(&id)) {
            node.kv_missed(now, &self.rules.health);
        }
    }

    /// A notification has arrived.
    pub fn note(&mut self, notification: &Notification) -> Noted {
        let Some(number) = self.ids.parse(notification.req_id()) else { return Noted::Unknown };
        self.note_number(number, None, notification)
    }

    /// MP mode: an engine says that it has stored a request, by its own id for it, which contains ours.
    pub fn note_stored(&mut self, engine_id: &str, kv_rank: u32, world_size: u32) -> Noted {
        let Some(number) = self.ids.find(engine_id) else { return Noted::Unknown };
        let stored =
            Notification::KvReady { req_id: self.ids.text(number), tp_rank: kv_rank, bytes: 0, took_us: 0 };
        self.note_number(number, Some(world_size), &stored)
    }

    fn note_number(&mut self, number: u64, needed: Option<u32>, notification: &Notification) -> Noted {
        let leg = self.transfers.get(&number).and_then(|id| self.legs.get_mut(id));
        let Some(Leg { transfer: Some(transfer), waker, sender, .. }) = leg else {
            return if self.ids.known(number) { Noted::Late } else { Noted::Unknown };
        };
        if let Some(needed) = needed {
            transfer.needed = needed.max(1);
        }
        let noted = transfer.note(notification);
        if noted == Noted::Ready
            && let Some(node) = sender.and_then(|id| self.nodes.get_mut(&id))
        {
            node.kv_failures = 0;
        }
        if matches!(noted, Noted::Ready | Noted::Failed) {
            self.wakes.push(waker.clone());
        }
        noted
    }

    /// The prefiller has failed.
    pub fn prefill_failed(&mut self, now: Time, leg: LegId, failure: Failure, why: &str) -> AfterPrefill {
        let prefiller = self.legs.get(&leg).and_then(|leg| leg.prefiller);
        self.leave_prefiller(now, leg, false);
        if let Some(prefiller) = prefiller {
            self.blame(now, prefiller, failure, why);
            if let Some(state) = self.legs.get_mut(&leg) {
                state.tried.push(prefiller);
                state.sender = None;
            }
        }
        let Some(state) = self.legs.get_mut(&leg) else { return AfterPrefill::GiveUp };
        state.lost = false;
        if let Some(transfer) = state.transfer.take() {
            self.transfers.remove(&transfer.number);
        }
        if !failure.retryable() {
            return AfterPrefill::GiveUp;
        }
        if state.prefills < self.rules.health.prefill_attempts
            && let Choice::One(prefiller) = self.pick(now, Role::Prefiller, leg, false)
            && let Some(assignment) = self.assign(leg, Some(prefiller))
        {
            return AfterPrefill::Retry(assignment);
        }
        if self.rules.health.decode_alone { AfterPrefill::Alone } else { AfterPrefill::GiveUp }
    }

    /// The leg turns to its decoder. Another one is named when that has gone since; it does not hold the cache, as the
    /// last value says.
    pub fn decoding(&mut self, now: Time, leg: LegId) -> Option<(InstanceId, Arc<Instance>, bool)> {
        let state = self.legs.get_mut(&leg)?;
        state.phase = Phase::Decode;
        state.lost = false;
        state.decodes += 1;
        let held = state.decoder;
        let well = held.filter(|id| {
            self.nodes.get(id).is_some_and(|node| !matches!(node.health, HealthState::Down { .. }))
        });
        if let Some(id) = well {
            return self.nodes.get(&id).map(|node| (id, Arc::clone(&node.config), true));
        }
        let next = match self.pick(now, Role::Decoder, leg, false) {
            Choice::One(id) => {
                self.leave_decoder(now, leg);
                self.enter_decoder(leg, id);
                id
            }
            // Nothing better: the one it has may have come back in this very moment.
            _ => held?,
        };
        self.nodes.get(&next).map(|node| (next, Arc::clone(&node.config), held == Some(next)))
    }

    /// The decoder has begun to answer.
    pub fn decoded(&mut self, leg: LegId) {
        if let Some(id) = self.legs.get(&leg).and_then(|leg| leg.decoder)
            && let Some(node) = self.nodes.get_mut(&id)
        {
            node.succeeded(&self.rules.health);
        }
    }

    /// The decoder has failed. `passed_on` says that the client has had something of its answer.
    pub fn decode_failed(
        &mut self,
        now: Time,
        leg: LegId,
        failure: Failure,
        why: &str,
        passed_on: bool,
    ) -> AfterDecode {
        let Some(id) = self.legs.get(&leg).and_then(|leg| leg.decoder) else { return AfterDecode::GiveUp };
        self.blame(now, id, failure, why);
        let Some(state) = self.legs.get_mut(&leg) else { return AfterDecode::GiveUp };
        state.lost = false;
        state.tried.push(id);
        if passed_on || !failure.retryable() || state.decodes >= self.rules.health.decode_attempts {
            return AfterDecode::GiveUp;
        }
        let Choice::One(next) = self.pick(now, Role::Decoder, leg, false) else { return AfterDecode::GiveUp };
        self.leave_decoder(now, leg);
        self.enter_decoder(leg, next);
        match self.nodes.get(&next) {
            Some(node) => AfterDecode::Retry(Arc::clone(&node.config)),
            None => AfterDecode::GiveUp,
        }
    }

    /// The leg has ended, in whatever way and phase.
    pub fn finish(&mut self, now: Time, leg: LegId) {
        self.leave_prefiller(now, leg, false);
        self.leave_decoder(now, leg);
        let Some(state) = self.legs.remove(&leg) else { return };
        if let Some(transfer) = state.transfer {
            self.transfers.remove(&transfer.number);
        }
        if state.phase == Phase::Queued {
            self.queued -= 1;
            // Those that left without their turn must not pile up while nobody gets one.
            if self.for_turn.len() > 2 * self.queued + 64 {
                self.for_turn.retain(|id| self.legs.contains_key(id));
            }
        } else {
            self.running -= 1;
            let since = self.last_end.map_or(self.pace, |last| now.since(last).as_secs_f64());
            self.pace += (since.min(60.0) - self.pace) * 0.1;
            self.last_end = Some(now);
        }
        self.pump(now);
    }

    /// No new legs from now on.
    pub fn end(&mut self) {
        self.ending = true;
    }

    /// Whether [`end`](Self::end) was called.
    pub fn is_ending(&self) -> bool {
        self.ending
    }

    /// Legs that have not ended.
    pub fn legs(&self) -> usize {
        self.legs.len()
    }

    /// A new instance.
    pub fn add(&mut self, now: Time, instance: Instance) -> InstanceId {
        let id = InstanceId(self.next_instance);
        self.next_instance += 1;
        self.nodes.insert(id, Node::new(instance, &self.rules.health));
        self.pump(now);
        id
    }

    /// The instance of a name, with what it is doing.
    pub fn find(&self, name: &str) -> Option<InstanceId> {
        // One that is being replaced may still be there under the same name.
        let named = self.nodes.iter().filter(|(_, node)| node.config.name == name);
        named.min_by_key(|(_, node)| node.admin == Admin::Removing).map(|(id, _)| *id)
    }

    /// An instance, unless it is gone.
    pub fn instance(&self, id: InstanceId) -> Option<Arc<Instance>> {
        self.nodes.get(&id).map(|node| Arc::clone(&node.config))
    }

    /// All instances.
    pub fn instances(&self) -> Vec<(InstanceId, Arc<Instance>)> {
        self.nodes.iter().map(|(id, node)| (*id, Arc::clone(&node.config))).collect()
    }

    /// An instance that can be asked something that is not a completion, prefillers first.
    pub fn anyone(&self, now: Time, prefer: Role) -> Option<(InstanceId, Arc<Instance>)> {
        let usable = |role| {
            self.nodes
                .iter()
                .filter(move |(_, n)| n.is(role) && n.usable(now))
                .min_by_key(|(_, n)| n.requests)
        };
        let other = if prefer == Role::Prefiller { Role::Decoder } else { Role::Prefiller };
        let (id, node) = usable(prefer).or_else(|| usable(other))?;
        Some((*id, Arc::clone(&node.config)))
    }

    /// An operator's wish. False when there is no such instance. Legs under way go on.
    pub fn set_admin(&mut self, now: Time, id: InstanceId, admin: Admin) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        node.admin = admin;
        self.sweep(id);
        self.pump(now);
        true
    }

    /// New weight, limit or receiving ports of an instance; what is under way goes on as it was.
    pub fn update(&mut self, now: Time, id: InstanceId, instance: Instance) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.config = Arc::new(instance);
            if node.admin == Admin::Removing {
                node.admin = Admin::Active;
            }
        }
        self.pump(now);
    }

    /// New rules.
    pub fn reload(&mut self, now: Time, settings: &Settings) {
        self.rules = settings.into();
        self.pump(now);
    }

    /// A probe has succeeded. True when the instance was down.
    pub fn probe_ok(&mut self, now: Time, id: InstanceId) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        let back = node.up(&self.rules.health);
        if back {
            self.pump(now);
        }
        back
    }

    /// A probe has failed; `refused` says that nobody listens there. True when the instance is down from now on.
    pub fn probe_failed(&mut self, now: Time, id: InstanceId, refused: bool, why: &str) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        let down = node.missed(now, refused, why, &self.rules.health);
        if down {
            self.gone(now, id);
        }
        down
    }

    /// Whether an instance is down.
    pub fn is_down(&self, id: InstanceId) -> bool {
        self.nodes.get(&id).is_some_and(|node| matches!(node.health, HealthState::Down { .. }))
    }

    fn blame(&mut self, now: Time, id: InstanceId, failure: Failure, why: &str) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.failed(now, failure, why, &self.rules.health) {
            self.gone(now, id);
        }
    }

    /// Whoever is at an instance that went down, or expects something from it, hears so.
    fn gone(&mut self, now: Time, id: InstanceId) {
        for leg in self.legs.values_mut() {
            let at = match leg.phase {
                Phase::Prefill => leg.prefiller == Some(id),
                Phase::Decode => leg.decoder == Some(id),
                Phase::Kv => {
                    if (leg.decoder == Some(id) || leg.sender == Some(id))
                        && let Some(transfer) = &mut leg.transfer
                        && transfer.failed.is_none()
                        && !transfer.ready()
                    {
                        transfer.failed =
                            Some(("peer_gone".into(), "one of its two sides has gone down".into()));
                        self.wakes.push(leg.waker.clone());
                    }
                    false
                }
                _ => false,
            };
            if at && !leg.lost {
                leg.lost = true;
                self.wakes.push(leg.waker.clone());
            }
        }
        self.pump(now);
    }
}
