//! Finding places: who waits is let in, legs get instances and leave them.

use super::Router;
use super::leg::{Assignment, LegId, Phase, Routed, Transfer};
use super::node::{Admin, Breaker, HealthState, InstanceId};
use super::policy::{self, Demand};
use crate::config::{KvPath, Role};
use kvxfer_proto::Time;
use std::sync::Arc;

impl<W: Clone> Router<W> {
    /// Lets in who waits, as far as there is room.
    pub(super) fn pump(&mut self, now: Time) {
        while let Some(&leg) = self.for_room.front() {
            if self.legs.get(&leg).is_some_and(|state| state.phase == Phase::Waiting) {
                let Some(routed) = self.place(now, leg) else { break };
                if let Some(state) = self.legs.get_mut(&leg) {
                    if !matches!(routed, Routed::Go(_)) {
                        state.phase = Phase::Admitted;
                    }
                    state.routed = Some(routed);
                    self.wakes.push(state.waker.clone());
                }
            }
            self.for_room.pop_front();
        }
        while self.running < self.rules.limits.requests {
            let Some(leg) = self.for_turn.pop_front() else { break };
            if let Some(state) = self.legs.get_mut(&leg) {
                state.phase = Phase::Admitted;
                self.queued -= 1;
                self.running += 1;
                self.wakes.push(state.waker.clone());
            }
        }
    }

    /// Instances for a leg, or `None` when it has to wait for room.
    pub(super) fn place(&mut self, now: Time, leg: LegId) -> Option<Routed> {
        let Some(state) = self.legs.get(&leg) else { return Some(ended()) };
        let wants_prefill = state.wants_prefill;
        // Looks before it chooses: a choice counts as a turn.
        if matches!(self.candidates(now, Role::Decoder, leg, true), Candidates::Full)
            || wants_prefill && matches!(self.candidates(now, Role::Prefiller, leg, true), Candidates::Full)
        {
            return None;
        }
        let Choice::One(decoder) = self.pick(now, Role::Decoder, leg, true) else {
            return Some(self.no_decoder(now));
        };
        let prefiller = match wants_prefill.then(|| self.pick(now, Role::Prefiller, leg, true)) {
            Some(Choice::One(id)) => Some(id),
            Some(_) if !self.rules.health.decode_alone => {
                return Some(Routed::NoDecoder("no prefiller can be used".into(), self.retry_after()));
            }
            _ => None,
        };
        self.enter_decoder(leg, decoder);
        self.assign(leg, prefiller).map(Routed::Go)
    }

    /// The leg goes to this prefiller (or straight to its decoder), with a transfer of its own.
    pub(super) fn assign(&mut self, leg: LegId, prefiller: Option<InstanceId>) -> Option<Assignment> {
        let number = self.ids.fresh();
        let state = self.legs.get_mut(&leg)?;
        let decoder_id = state.decoder?;
        let decoder = Arc::clone(&self.nodes.get(&decoder_id)?.config);
        let needed = if self.rules.kv == KvPath::Mp { 1 } else { decoder.tp_ranks() };
        state.phase = if prefiller.is_some() { Phase::Prefill } else { Phase::Decode };
        state.prefiller = prefiller;
        state.sender = prefiller;
        state.lost = false;
        let mut placed = None;
        if let Some(id) = prefiller {
            state.prefills += 1;
            state.transfer = Some(Transfer::new(number, needed));
            self.transfers.insert(number, leg);
            let node = self.nodes.get_mut(&id)?;
            node.take(state.demand.prompt);
            self.choices += 1;
            node.chosen = self.choices;
            placed = Some((id, Arc::clone(&node.config)));
        }
        Some(Assignment {
            prefiller: placed,
            decoder: (decoder_id, decoder),
            transfer: self.ids.text(number),
        })
    }

    pub(super) fn pick(&mut self, now: Time, role: Role, leg: LegId, mind_room: bool) -> Choice {
        let candidates = match self.candidates(now, role, leg, mind_room) {
            Candidates::Some(candidates) => candidates,
            Candidates::Full => return Choice::Full,
            Candidates::Nobody => return Choice::Nobody,
        };
        let demand = self.legs.get(&leg).map(|leg| leg.demand).unwrap_or_default();
        let policy =
            if role == Role::Prefiller { self.rules.policy.prefill } else { self.rules.policy.decode };
        Choice::One(policy::choose(policy, &mut self.nodes, &candidates, cost(role, demand), demand.prefix))
    }

    pub(super) fn candidates(&self, now: Time, role: Role, leg: LegId, mind_room: bool) -> Candidates {
        let Some(state) = self.legs.get(&leg) else { return Candidates::Nobody };
        let usable = || {
            self.nodes
                .iter()
                .filter(move |(id, node)| node.is(role) && node.usable(now) && !state.tried.contains(id))
        };
        let with_room: Vec<InstanceId> =
            usable().filter(|(_, node)| node.has_room()).map(|(id, _)| *id).collect();
        if !with_room.is_empty() {
            return Candidates::Some(with_room);
        }
        let all: Vec<InstanceId> = usable().map(|(id, _)| *id).collect();
        match (all.is_empty(), mind_room) {
            (true, _) => Candidates::Nobody,
            (false, true) => Candidates::Full,
            (false, false) => Candidates::Some(all),
        }
    }

    pub(super) fn enter_decoder(&mut self, leg: LegId, id: InstanceId) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        state.decoder = Some(id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.take(cost(Role::Decoder, state.demand));
            self.choices += 1;
            node.chosen = self.choices;
        }
    }

    pub(super) fn leave_prefiller(&mut self, now: Time, leg: LegId, well: bool) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        let Some(id) = state.prefiller.take() else { return };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.put(state.demand.prompt);
            if well {
                node.succeeded(&self.rules.health);
            } else {
                node.unsettled(now);
            }
        }
        self.sweep(id);
        self.pump(now);
    }

    pub(super) fn leave_decoder(&mut self, now: Time, leg: LegId) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        let Some(id) = state.decoder.take() else { return };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.put(cost(Role::Decoder, state.demand));
            node.unsettled(now);
        }
        self.sweep(id);
    }

    /// An instance that was to be removed goes with its last request.
    pub(super) fn sweep(&mut self, id: InstanceId) {
        if self.nodes.get(&id).is_some_and(|node| node.admin == Admin::Removing && node.requests == 0) {
            self.nodes.remove(&id);
        }
    }

    pub(super) fn no_decoder(&self, now: Time) -> Routed {
        let decoders = || self.nodes.values().filter(|node| node.is(Role::Decoder));
        let reasons: Vec<String> = decoders()
            .map(|node| {
                let state = match (&node.health, node.admin) {
                    (_, Admin::Draining | Admin::Removing) => "draining".to_owned(),
                    (HealthState::Down { why, .. }, _) => format!("down ({why})"),
                    _ => "resting after failures".to_owned(),
                };
                format!("{} is {state}", node.config.name)
            })
            .take(8)
            .collect();
        let why = if reasons.is_empty() {
            "there is no decoder".to_owned()
        } else {
            format!("no decoder can be used: {}", reasons.join(", "))
        };
        let soonest = decoders()
            .filter_map(|node| match node.breaker {
                Breaker::Open { until } => Some(until.since(now).as_secs() + 1),
                _ => None,
            })
            .min();
        Routed::NoDecoder(why, soonest.unwrap_or(2).clamp(1, 60))
    }

    /// Seconds after which the queue has probably moved on.
    pub fn retry_after(&self) -> u64 {
        ((self.queued + 1) as f64 * self.pace).ceil().clamp(1.0, 60.0) as u64
    }
}

pub(super) enum Candidates {
    Some(Vec<InstanceId>),
    /// There are some, and none has room.
    Full,
    Nobody,
}

pub(super) enum Choice {
    One(InstanceId),
    /// There are some, and none has room.
    Full,
    Nobody,
}

pub(super) fn cost(role: Role, demand: Demand) -> u64 {
    match role {
        Role::Prefiller => demand.prompt,
        Role::Decoder => demand.prompt + demand.answer,
    }
}

pub(super) fn ended() -> Routed {
    Routed::NoDecoder("the request has ended".into(), 1)
}
