//! One instance as the router sees it: whether it may get requests, and what it has.

use crate::config::{Health, Instance, Role};
use kvxfer_proto::Time;
use std::sync::Arc;
use std::time::Duration;

/// An instance's number; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub u32);

/// What an operator wants of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    /// Gets requests.
    Active,
    /// Gets no new ones.
    Draining,
    /// Gets no new ones and goes when the last has ended.
    Removing,
}

/// What probes and connections say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthState {
    /// Not probed yet; counts as healthy.
    Unknown,
    /// The last probe succeeded.
    Up,
    /// It does not answer.
    Down {
        /// Since when.
        since: Time,
        /// What the last attempt said.
        why: String,
    },
}

/// The circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Requests pass.
    Closed,
    /// Requests stay away until then.
    Open {
        /// When one may try.
        until: Time,
    },
    /// One request tries; its end decides.
    Trial,
}

/// How an attempt at an instance ended, as far as the instance is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Refused, reset or broken off: nobody is there, or not any more.
    Unreachable,
    /// A deadline passed.
    TimedOut,
    /// An answer of 5xx, or one that cannot be read.
    Broken,
    /// It said that it has too much to do.
    Busy,
    /// The request's own fault; another instance would say the same.
    Request,
}

impl Failure {
    /// Whether the instance is to blame.
    pub fn counts(self) -> bool {
        matches!(self, Self::Unreachable | Self::TimedOut | Self::Broken)
    }

    /// Whether another instance may do better.
    pub fn retryable(self) -> bool {
        self != Self::Request
    }
}

/// An instance.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) config: Arc<Instance>,
    pub(super) admin: Admin,
    pub(super) health: HealthState,
    pub(super) breaker: Breaker,
    /// Failed requests in a row.
    pub(super) failures: u32,
    /// Caches in a row that did not arrive.
    pub(super) kv_failures: u32,
    /// The next pause of the breaker.
    pub(super) pause: Duration,
    /// Failed probes in a row.
    pub(super) missed: u32,
    /// Requests under way.
    pub(super) requests: u32,
    /// Tokens of those.
    pub(super) tokens: u64,
    /// Requests ever started, and failed.
    pub(super) started: u64,
    pub(super) failed: u64,
    /// Smooth weighted round robin's running value.
    pub(super) turn: i64,
    /// When it was chosen last, as a counter.
    pub(super) chosen: u64,
}

/// Longest pause of a breaker.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Node {
    pub(super) fn new(config: Instance, rules: &Health) -> Self {
        Self {
            config: Arc::new(config),
            admin: Admin::Active,
            health: HealthState::Unknown,
            breaker: Breaker::Closed,
            failures: 0,
            kv_failures: 0,
            pause: rules.breaker_pause,
            missed: 0,
            requests: 0,
            tokens: 0,
            started: 0,
            failed: 0,
            turn: 0,
            chosen: 0,
        }
    }

    pub(super) fn is(&self, role: Role) -> bool {
        self.config.role == role
    }

    /// May get a request now, if it has room.
    pub(super) fn usable(&self, now: Time) -> bool {
        self.admin == Admin::Active
            && !matches!(self.health, HealthState::Down { .. })
            && match self.breaker {
                Breaker::Closed => true,
                Breaker::Open { until } => until <= now,
                Breaker::Trial => false,
            }
    }

    pub(super) fn has_room(&self) -> bool {
        self.config.max_requests.is_none_or(|most| self.requests < most)
    }

    /// A request goes there.
    pub(super) fn take(&mut self, tokens: u64) {
        if matches!(self.breaker, Breaker::Open { .. }) {
            self.breaker = Breaker::Trial;
        }
        self.requests += 1;
        self.tokens += tokens;
        self.started += 1;
    }

    /// That request has left it.
    pub(super) fn put(&mut self, tokens: u64) {
        self.requests = self.requests.saturating_sub(1);
        self.tokens = self.tokens.saturating_sub(tokens);
    }

    /// A request succeeded there.
    pub(super) fn succeeded(&mut self, rules: &Health) {
        self.failures = 0;
        self.breaker = Breaker::Closed;
        self.pause = rules.breaker_pause;
    }

    /// A request failed there. True when it is down from now on.
    pub(super) fn failed(&mut self, now: Time, failure: Failure, why: &str, rules: &Health) -> bool {
        if !failure.counts() {
            self.unsettled(now);
            return false;
        }
        self.failed += 1;
        self.failures += 1;
        if self.breaker == Breaker::Trial || self.failures >= rules.breaker_failures {
            self.breaker = Breaker::Open { until: now + self.pause };
            self.pause = (self.pause * 2).min(LONGEST_PAUSE.max(rules.breaker_pause));
        }
        failure == Failure::Unreachable && self.down(now, why)
    }

    /// A cache did not arrive although the prefill succeeded: after several in a row it is of no use as a prefiller.
    pub(super) fn kv_missed(&mut self, now: Time, rules: &Health) {
        self.kv_failures += 1;
        if self.kv_failures >= rules.breaker_failures {
            self.breaker = Breaker::Open { until: now + self.pause };
            self.pause = (self.pause * 2).min(LONGEST_PAUSE.max(rules.breaker_pause));
        }
    }

    /// A request ended there without saying anything about it; a trial leaves the question open.
    pub(super) fn unsettled(&mut self, now: Time) {
        if self.breaker == Breaker::Trial {
            self.breaker = Breaker::Open { until: now };
        }
    }

    /// A probe succeeded. True when it was down.
    pub(super) fn up(&mut self, rules: &Health) -> bool {
        self.missed = 0;
        let was_down = matches!(self.health, HealthState::Down { .. });
        self.health = HealthState::Up;
        if was_down {
            // It was started again, or could be reached again: what it did before says nothing any more.
            self.succeeded(rules);
        }
        was_down
    }

    /// A probe failed. True when it is down from now on.
    pub(super) fn missed(&mut self, now: Time, refused: bool, why: &str, rules: &Health) -> bool {
        self.missed += 1;
        (refused || self.missed >= rules.failures) && self.down(now, why)
    }

    fn down(&mut self, now: Time, why: &str) -> bool {
        let why = why.to_owned();
        match &mut self.health {
            HealthState::Down { why: old, .. } => {
                *old = why;
                false
            }
            state => {
                *state = HealthState::Down { since: now, why };
                true
            }
        }
    }
}
