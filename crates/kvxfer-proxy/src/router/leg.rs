//! One prompt's way through the router, and what the router answers about it.

use super::node::InstanceId;
use super::policy::Demand;
use crate::config::Instance;
use kvxfer_proto::Time;
use kvxfer_proto::notify::Notification;
use std::sync::Arc;

/// A leg's number; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LegId(pub u64);

/// Where a leg is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for its turn.
    Queued,
    /// May go on; its tokens are being found out.
    Admitted,
    /// Waits for an instance with room.
    Waiting,
    /// At a prefiller.
    Prefill,
    /// The cache is on its way.
    Kv,
    /// At a decoder.
    Decode,
}

/// What became of a leg that wants to come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It may go on.
    Admitted(LegId),
    /// It waits, at most until then; it is woken when it may go on.
    Queued(LegId, Time),
    /// The queue is full. Seconds after which trying again makes sense.
    Full(u64),
    /// The proxy is ending.
    Ending,
}

/// Where a leg goes.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The prefiller; `None` when the decoder computes the prompt itself.
    pub prefiller: Option<(InstanceId, Arc<Instance>)>,
    /// The decoder.
    pub decoder: (InstanceId, Arc<Instance>),
    /// Id of this attempt's transfer.
    pub transfer: String,
}

/// The answer to a wish for instances.
#[derive(Clone, Debug)]
pub enum Routed {
    /// There.
    Go(Assignment),
    /// Every instance that could has its fill; it is woken when that changes, and waits at most until then.
    Wait(Time),
    /// No decoder can be used. The reason, and seconds after which trying again makes sense.
    NoDecoder(String, u64),
}

/// What follows a failed prefill.
#[derive(Clone, Debug)]
pub enum AfterPrefill {
    /// Another prefiller.
    Retry(Assignment),
    /// The decoder computes the prompt itself.
    Alone,
    /// The failure goes to the client.
    GiveUp,
}

/// What follows a failed decode.
#[derive(Clone, Debug)]
pub enum AfterDecode {
    /// Another decoder, which computes the prompt itself.
    Retry(Arc<Instance>),
    /// The failure goes to the client.
    GiveUp,
}

/// Whether the cache has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kv {
    /// Not yet; at most until then.
    Waiting(Time),
    /// All ranks have it.
    Ready {
        /// Bytes moved, where the engines said so.
        bytes: u64,
        /// Microseconds of the slowest rank, where the engines said so.
        took_us: u64,
    },
    /// It will not arrive.
    Failed {
        /// A short name.
        code: String,
        /// For humans.
        message: String,
    },
}

/// What a notification meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// One rank more; others are missing.
    Progress,
    /// The last rank: the cache is there.
    Ready,
    /// It will not come.
    Failed,
    /// Said before.
    Duplicate,
    /// About a request that has ended, or an attempt that was given up.
    Late,
    /// About a request that this proxy never made.
    Unknown,
}

/// One attempt to move a cache.
#[derive(Clone, Debug)]
pub(super) struct Transfer {
    pub(super) number: u64,
    pub(super) needed: u32,
    /// Notifications without a rank.
    plain: u32,
    /// Ranks that were named.
    ranks: Vec<u32>,
    bytes: u64,
    took_us: u64,
    pub(super) failed: Option<(String, String)>,
}

impl Transfer {
    pub(super) fn new(number: u64, needed: u32) -> Self {
        Self { number, needed, plain: 0, ranks: Vec::new(), bytes: 0, took_us: 0, failed: None }
    }

    pub(super) fn ready(&self) -> bool {
        self.failed.is_none() && self.plain + self.ranks.len() as u32 >= self.needed
    }

    pub(super) fn state(&self, until: Time) -> Kv {
        match &self.failed {
            Some((code, message)) => Kv::Failed { code: code.clone(), message: message.clone() },
            None if self.ready() => Kv::Ready { bytes: self.bytes, took_us: self.took_us },
            None => Kv::Waiting(until),
        }
    }

    pub(super) fn note(&mut self, notification: &Notification) -> Noted {
        if self.failed.is_some() || self.ready() {
            return Noted::Duplicate;
        }
        match notification {
            Notification::KvReady { tp_rank, bytes, took_us, .. } => {
                if self.ranks.contains(tp_rank) {
                    return Noted::Duplicate;
                }
                self.ranks.push(*tp_rank);
                self.bytes = self.bytes.saturating_add(*bytes);
                self.took_us = self.took_us.max(*took_us);
            }
            Notification::KvFailed { tp_rank, code, message, .. } => {
                self.failed = Some((code.clone(), format!("rank {tp_rank}: {message}")));
                return Noted::Failed;
            }
            _ => self.plain += 1,
        }
        if self.ready() { Noted::Ready } else { Noted::Progress }
    }
}

/// A leg.
#[derive(Debug)]
pub(super) struct Leg<W> {
    pub(super) waker: W,
    pub(super) phase: Phase,
    /// End of the present wait.
    pub(super) until: Time,
    pub(super) demand: Demand,
    pub(super) wants_prefill: bool,
    /// The answer to its wish, when it had to wait for one.
    pub(super) routed: Option<Routed>,
    /// The prefiller it is at.
    pub(super) prefiller: Option<InstanceId>,
    /// The prefiller its cache comes from.
    pub(super) sender: Option<InstanceId>,
    pub(super) decoder: Option<InstanceId>,
    pub(super) transfer: Option<Transfer>,
    /// Instances that have failed it.
    pub(super) tried: Vec<InstanceId>,
    pub(super) prefills: u32,
    pub(super) decodes: u32,
    /// The instance it is at has gone down.
    pub(super) lost: bool,
}
