//! Which transports may carry a peer's bytes, in which order, and whether that satisfies the configuration.
//!
//! Pure: decided from values, tested as a table. The agent connects every transport both sides offer and the policy
//! allows; each transfer takes the first one in this order that reaches both of its regions.

use crate::config::TransportPolicy;
use crate::transport::TransportKind;

/// A transport towards one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) kind: TransportKind,
    /// `nixl` over RDMA.
    pub(crate) rdma: bool,
}

/// Why the policy keeps a transport out; `None` when it may be used.
pub(crate) fn excluded(policy: &TransportPolicy, kind: TransportKind) -> Option<String> {
    if policy.forbid.contains(&kind) {
        Some("forbidden by the configuration (transports.forbid)".into())
    } else if !policy.allow.is_empty() && !policy.allow.contains(&kind) {
        Some("not among the allowed ones (transports.allow)".into())
    } else {
        None
    }
}

/// Position in the order of preference; smaller is better.
pub(crate) fn rank(policy: &TransportPolicy, c: Candidate) -> usize {
    if let Some(i) = policy.allow.iter().position(|k| *k == c.kind) {
        return i;
    }
    match (c.kind, c.rdma) {
        (TransportKind::Inproc, _) => 100,
        (TransportKind::CudaIpc, _) => 101,
        (TransportKind::Shm, _) => 102,
        (TransportKind::Cma, _) => 103,
        (TransportKind::Nixl, true) => 104,
        (TransportKind::Tcp, _) => 105,
        (TransportKind::Nixl, false) => 106,
    }
}

/// True when `c` is what the requirement names.
pub(crate) fn meets(requirement: &str, c: Candidate) -> bool {
    use TransportKind as K;
    match requirement {
        "nvlink" => c.kind == K::CudaIpc,
        "rdma" => c.kind == K::Nixl && c.rdma,
        "same_host" => matches!(c.kind, K::Inproc | K::Shm | K::Cma | K::CudaIpc),
        name => c.kind.as_str() == name,
    }
}

/// True when no requirement is configured or `c` meets one of them.
pub(crate) fn satisfies(policy: &TransportPolicy, c: Candidate) -> bool {
    policy.require.is_empty() || policy.require.iter().any(|r| meets(r, c))
}

/// What is missing, in words, when none of `found` satisfies the policy.
pub(crate) fn unmet(policy: &TransportPolicy, found: &[Candidate]) -> Option<String> {
    if policy.require.is_empty() || found.iter().any(|c| satisfies(policy, *c)) {
        return None;
    }
    let names: Vec<_> = found
        .iter()
        .map(|c| if c.rdma { format!("{} (rdma)", c.kind) } else { c.kind.to_string() })
        .collect();
    Some(format!(
        "one of {:?} is required (transports.require), found: {}",
        policy.require,
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use TransportKind::{Cma, CudaIpc, Inproc, Nixl, Shm, Tcp};

    fn policy(allow: &[TransportKind], forbid: &[TransportKind], require: &[&str]) -> TransportPolicy {
        TransportPolicy {
            allow: allow.to_vec(),
            forbid: forbid.to_vec(),
            require: require.iter().map(|r| (*r).to_owned()).collect(),
        }
    }

    fn order(policy: &TransportPolicy, found: &[(TransportKind, bool)]) -> Vec<(TransportKind, bool)> {
        let mut v: Vec<Candidate> = found
            .iter()
            .map(|(kind, rdma)| Candidate { kind: *kind, rdma: *rdma })
            .filter(|c| excluded(policy, c.kind).is_none())
            .collect();
        v.sort_by_key(|c| rank(policy, *c));
        v.into_iter().map(|c| (c.kind, c.rdma)).collect()
    }

    #[test]
    fn the_table_of_preference() {
        let all =
            [(Tcp, false), (Nixl, false), (Cma, false), (Shm, false), (CudaIpc, false), (Inproc, false)];
        let none = policy(&[], &[], &[]);
        let kinds = |v: Vec<(TransportKind, bool)>| v.into_iter().map(|c| c.0).collect::<Vec<_>>();
        assert_eq!(kinds(order(&none, &all)), [Inproc, CudaIpc, Shm, Cma, Tcp, Nixl]);
        assert_eq!(order(&none, &[(Tcp, false), (Nixl, true)]), [(Nixl, true), (Tcp, false)]);
        assert_eq!(order(&none, &[(Nixl, false), (Tcp, false)]), [(Tcp, false), (Nixl, false)]);
        assert_eq!(kinds(order(&policy(&[Tcp, Shm], &[], &[]), &all)), [Tcp, Shm]);
        assert_eq!(kinds(order(&policy(&[], &[Shm, Inproc, CudaIpc], &[]), &all)), [Cma, Tcp, Nixl]);
        assert_eq!(kinds(order(&policy(&[], &TransportKind::ALL, &[]), &all)), []);
    }

    #[test]
    fn the_table_of_requirements() {
        for (require, found, met) in [
            (&[][..], &[][..], true),
            (&["rdma"], &[(Nixl, true)], true),
            (&["rdma"], &[(Nixl, false), (Tcp, false)], false),
            (&["nvlink", "rdma"], &[(CudaIpc, false)], true),
            (&["nvlink", "rdma"], &[(Shm, false)], false),
            (&["same_host"], &[(Cma, false)], true),
            (&["same_host"], &[(Tcp, false)], false),
            (&["tcp"], &[(Tcp, false)], true),
            (&["shm"], &[(Cma, false), (Tcp, false)], false),
            (&["shm"], &[], false),
        ] {
            let found: Vec<_> =
                found.iter().map(|(kind, rdma)| Candidate { kind: *kind, rdma: *rdma }).collect();
            let answer = unmet(&policy(&[], &[], require), &found);
            assert_eq!(answer.is_none(), met, "{require:?} {found:?}");
            if let Some(text) = answer {
                assert!(text.contains(require[0]));
                assert!(found.iter().all(|c| text.contains(c.kind.as_str())), "{text}");
            }
        }
    }
}
