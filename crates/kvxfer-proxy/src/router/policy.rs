//! Which of several instances gets a request.

use super::node::{InstanceId, Node};
use crate::config::{Policies, Policy};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// How much more than its share an instance may have before prefix affinity lets a request go elsewhere.
const SLACK: f64 = 1.5;

/// What is known about a request when it is placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens that may follow.
    pub answer: u64,
    /// Digest of the leading chunks; see [`prefix_digest`].
    pub prefix: u64,
}

/// Digest of a prompt's leading chunks, the same on every proxy.
pub fn prefix_digest(tokens: &[u32], policies: &Policies) -> u64 {
    let chunk = policies.chunk_tokens.max(1);
    let whole = tokens.len() / chunk;
    let end = if whole == 0 { tokens.len() } else { whole.min(policies.chunks.max(1)) * chunk };
    let bytes: Vec<u8> = tokens[..end].iter().flat_map(|token| token.to_le_bytes()).collect();
    xxh3_64(&bytes)
}

/// Chooses among `candidates`, which is not empty.
pub(super) fn choose(
    policy: Policy,
    nodes: &mut BTreeMap<InstanceId, Node>,
    candidates: &[InstanceId],
    cost: u64,
    prefix: u64,
) -> InstanceId {
    match policy {
        Policy::RoundRobin => in_turn(nodes, candidates),
        Policy::LeastTokens => least(nodes, candidates, cost),
        Policy::PrefixAffinity => alike(nodes, candidates, cost, prefix),
    }
}

/// Smooth weighted round robin: every candidate gains its weight, the richest is chosen and pays for all.
fn in_turn(nodes: &mut BTreeMap<InstanceId, Node>, candidates: &[InstanceId]) -> InstanceId {
    let mut total = 0;
    let mut best = (candidates[0], i64::MIN);
    for id in candidates {
        let Some(node) = nodes.get_mut(id) else { continue };
        node.turn += i64::from(node.config.weight);
        total += i64::from(node.config.weight);
        if node.turn > best.1 {
            best = (*id, node.turn);
        }
    }
    if let Some(node) = nodes.get_mut(&best.0) {
        node.turn -= total;
    }
    best.0
}

/// The least loaded for its weight; among equals the one that has waited longest.
fn least(nodes: &mut BTreeMap<InstanceId, Node>, candidates: &[InstanceId], cost: u64) -> InstanceId {
    let key = |id: &InstanceId| {
        nodes.get(id).map_or((u128::MAX, u32::MAX, u64::MAX), |node| {
            // Scaled so that a whole division loses nothing that matters.
            let load = (u128::from(node.tokens + cost) << 20) / u128::from(node.config.weight.max(1));
            (load, node.requests, node.chosen)
        })
    };
    candidates.iter().copied().min_by_key(key).unwrap_or(candidates[0])
}

/// Weighted rendezvous hashing with bounded loads: the same prefix prefers the same instances in the same order, also
/// on other proxies, and takes the first that is not much busier than its share.
fn alike(
    nodes: &mut BTreeMap<InstanceId, Node>,
    candidates: &[InstanceId],
    cost: u64,
    prefix: u64,
) -> InstanceId {
    let (mut tokens, mut weights) = (cost, 0_u64);
    let mut order: Vec<(f64, InstanceId)> = Vec::with_capacity(candidates.len());
    for id in candidates {
        let Some(node) = nodes.get(id) else { continue };
        tokens += node.tokens;
        weights += u64::from(node.config.weight);
        let hash = xxh3_64_with_seed(node.config.name.as_bytes(), prefix);
        // In (0, 1): 53 bits, and never an end.
        let unit = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        order.push((-f64::from(node.config.weight) / unit.ln(), *id));
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let share = SLACK * tokens as f64 / weights.max(1) as f64;
    for (_, id) in &order {
        let Some(node) = nodes.get(id) else { continue };
        if node.tokens == 0 || (node.tokens + cost) as f64 <= share * f64::from(node.config.weight) {
            return *id;
        }
    }
    least(nodes, candidates, cost)
}
