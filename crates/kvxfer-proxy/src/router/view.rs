//! What the router knows, for people and programs to look at.

use super::Router;
use super::leg::Phase;
use super::node::{Admin, Breaker, HealthState, InstanceId, Node};
use crate::config::Role;
use kvxfer_proto::Time;
use serde::Serialize;

/// The proxy at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct View {
    /// Instances, prefillers first, in the order they came.
    pub instances: Vec<InstanceView>,
    /// Legs that wait for their turn.
    pub queued: usize,
    /// Legs admitted whose tokens are being found out.
    pub admitted: usize,
    /// Legs that wait for an instance with room.
    pub waiting: usize,
    /// Legs at prefillers.
    pub prefill: usize,
    /// Legs whose cache is on its way.
    pub kv: usize,
    /// Legs at decoders.
    pub decode: usize,
    /// The proxy takes no new requests.
    pub ending: bool,
}

/// One instance at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InstanceView {
    /// Its number.
    #[serde(skip)]
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// `host:port`.
    pub address: String,
    /// `unknown`, `up` or `down`.
    pub health: &'static str,
    /// Why it is down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How long it has been down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_ms: Option<u64>,
    /// `closed`, `open` or `trial`.
    pub breaker: &'static str,
    /// `active`, `draining` or `removing`.
    pub admin: &'static str,
    /// Whether it may get requests now.
    pub usable: bool,
    /// Its share.
    pub weight: u32,
    /// Its limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// Tensor-parallel ranks, for decoders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tp_ranks: Option<u32>,
    /// Requests under way.
    pub requests: u32,
    /// Tokens of those.
    pub tokens: u64,
    /// Requests ever sent there.
    pub started: u64,
    /// Requests that failed there.
    pub failed: u64,
}

impl InstanceView {
    fn new(id: InstanceId, node: &Node, now: Time) -> Self {
        let (health, why, down_ms) = match &node.health {
            HealthState::Unknown => ("unknown", None, None),
            HealthState::Up => ("up", None, None),
            HealthState::Down { since, why } => {
                ("down", Some(why.clone()), Some(now.since(*since).as_millis() as u64))
            }
        };
        Self {
            id,
            name: node.config.name.clone(),
            role: node.config.role,
            address: node.config.authority(),
            health,
            why,
            down_ms,
            breaker: match node.breaker {
                Breaker::Closed => "closed",
                Breaker::Open { .. } => "open",
                Breaker::Trial => "trial",
            },
            admin: match node.admin {
                Admin::Active => "active",
                Admin::Draining => "draining",
                Admin::Removing => "removing",
            },
            usable: node.usable(now),
            weight: node.config.weight,
            max_requests: node.config.max_requests,
            tp_ranks: (node.config.role == Role::Decoder).then(|| node.config.tp_ranks()),
            requests: node.requests,
            tokens: node.tokens,
            started: node.started,
            failed: node.failed,
        }
    }
}

impl<W: Clone> Router<W> {
    /// What the router knows now.
    pub fn view(&self, now: Time) -> View {
        let count = |phase| self.legs.values().filter(|leg| leg.phase == phase).count();
        let mut instances: Vec<InstanceView> =
            self.nodes.iter().map(|(id, node)| InstanceView::new(*id, node, now)).collect();
        instances.sort_by_key(|view| (view.role, view.id));
        View {
            instances,
            queued: self.queued,
            admitted: count(Phase::Admitted),
            waiting: count(Phase::Waiting),
            prefill: count(Phase::Prefill),
            kv: count(Phase::Kv),
            decode: count(Phase::Decode),
            ending: self.ending,
        }
    }

    /// Whether a request could be served now.
    pub fn can_serve(&self, now: Time) -> bool {
        !self.ending && self.nodes.values().any(|node| node.is(Role::Decoder) && node.usable(now))
    }
}
