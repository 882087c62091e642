//! The data paths to one peer: which transports are offered, connected, left out and why.

use super::choose::{self, Candidate};
use super::identity;
use super::inbox::Mailbox;
use super::lane::Lane;
use super::mailbox::{Consumer, Invitation, Producer};
use super::side::{self, SideChannel};
use super::state::Inner;
use crate::metrics::PathMetrics;
use crate::transport::{Capabilities, Link, PeerInfo, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::wire::Offer;
use kvxfer_proto::{AgentName, ErrorCode};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// One connected transport.
pub(crate) struct Path {
    pub(crate) candidate: Candidate,
    pub(crate) caps: Capabilities,
    pub(crate) link: Arc<dyn Link>,
    pub(crate) metrics: PathMetrics,
}

/// Everything a peer needs beside its control connection.
pub(crate) struct Assembled {
    pub(crate) info: PeerInfo,
    /// Best first.
    pub(crate) paths: Vec<Path>,
    /// Transports left out, with the reason.
    pub(crate) skipped: Vec<(TransportKind, String)>,
    pub(crate) side: Option<Arc<SideChannel>>,
    /// Where we put notifications for the peer.
    pub(crate) outbox: Option<Producer>,
    /// Where we put control messages for the peer.
    pub(crate) lane: Option<Producer>,
    /// Where the peer puts notifications and control messages for us.
    pub(crate) invited: Invited,
    /// The peer's process.
    pub(crate) pidfd: Option<OwnedFd>,
}

/// Rings of ours that a peer on this host has been invited to write to.
#[derive(Clone, Default)]
pub(crate) struct Invited {
    /// Notifications.
    pub(crate) mailbox: Option<Arc<Mailbox>>,
    /// Control messages.
    pub(crate) lane: Option<Arc<Lane>>,
}

/// Why this transport cannot reach that peer, before anything is tried.
fn out_of_reach(caps: Capabilities, info: &PeerInfo, side: &Result<(), String>) -> Option<String> {
    if caps.same_process && !info.same_process {
        Some("the peer is another process".into())
    } else if caps.same_host && !info.same_host && !(caps.other_pid_namespace && info.same_kernel) {
        Some("the peer is on another host (or in another PID namespace)".into())
    } else if caps.same_host
        && !caps.same_process
        && let Err(reason) = side
    {
        Some(reason.clone())
    } else {
        None
    }
}

/// What our transports tell the peer. `side`: whether descriptors can be passed, or why not.
pub(crate) fn offers(inner: &Inner, info: &PeerInfo, side: &Result<(), String>) -> Vec<Offer> {
    inner
        .slots
        .iter()
        .filter(|s| out_of_reach(s.caps, info, side).is_none())
        .filter_map(|s| {
            let payload = s.transport.offer(info)?;
            Some(Offer { transport: s.kind.as_str().into(), payload })
        })
        .collect()
}

/// Connects every transport that both sides offer. Failures are reasons, not errors, as long as one path stands.
fn connect(
    inner: &Inner,
    info: &PeerInfo,
    offers: &[Offer],
    side: &Result<(), String>,
    deadline: Instant,
) -> (Vec<Path>, Vec<(TransportKind, String)>) {
    let mut skipped: Vec<_> =
        inner.status.iter().filter_map(|s| s.reason.clone().map(|r| (s.kind, r))).collect();
    let mut paths = Vec::new();
    for slot in &inner.slots {
        if let Some(reason) = out_of_reach(slot.caps, info, side) {
            skipped.push((slot.kind, reason));
            continue;
        }
        let Some(offer) = offers.iter().find(|o| o.transport == slot.kind.as_str()) else {
            let on_demand = slot.kind == TransportKind::Nixl && info.same_host;
            let hint = if on_demand { " to its own host (nixl.same_host there)" } else { "" };
            skipped.push((slot.kind, format!("the peer does not offer it{hint}")));
            continue;
        };
        match slot.transport.connect(info, &offer.payload, deadline) {
            Ok(link) => {
                let rdma = slot.kind == TransportKind::Nixl && link.describe().contains("rdma");
                paths.push(Path {
                    candidate: Candidate { kind: slot.kind, rdma },
                    caps: slot.caps,
                    link,
                    metrics: inner.metrics.path(&info.name, slot.kind),
                });
            }
            Err(e) => {
                tracing::debug!(peer = %info.name, transport = %slot.kind, error = %e, "transport left out");
                skipped.push((slot.kind, e.to_string()));
            }
        }
    }
    paths.sort_by_key(|p| choose::rank(&inner.config.transports, p.candidate));
    (paths, skipped)
}

/// Connects the data paths, checks them against the policy, and takes the peer's rings over. Blocks until `deadline` at most.
pub(crate) fn assemble(
    inner: &Inner,
    info: PeerInfo,
    offers: &[Offer],
    side: Result<Arc<SideChannel>, String>,
    invited: Invited,
    deadline: Instant,
) -> Result<Assembled> {
    let reachable = side.as_ref().map(|_| ()).map_err(Clone::clone);
    let (paths, skipped) = connect(inner, &info, offers, &reachable, deadline);
    let side = side.ok();
    let done = check(inner, &info, &paths, &skipped).and_then(|()| {
        let (outbox, lane) = match &side {
            Some(side) => (
                take_ring(side, (side::MAILBOX, side::MAILBOX_EVENT), deadline)?,
                take_ring(side, (side::LANE, side::LANE_EVENT), deadline)?,
            ),
            None => (None, None),
        };
        let process = open_process(&info).or_else(|| {
            let elsewhere = info.same_kernel && !info.same_host;
            side.as_ref().filter(|_| elsewhere)?.process()
        });
        Ok((outbox, lane, process))
    });
    match done {
        Ok((outbox, lane, pidfd)) => {
            Ok(Assembled { info, paths, skipped, side, outbox, lane, invited, pidfd })
        }
        Err(e) => {
            close_paths(&paths);
            Err(e)
        }
    }
}

pub(crate) fn close_paths(paths: &[Path]) {
    for path in paths {
        path.link.close();
    }
}

fn check(inner: &Inner, info: &PeerInfo, paths: &[Path], skipped: &[(TransportKind, String)]) -> Result<()> {
    let why = || {
        // What the configuration leaves out is one sentence; the reader wants the reasons of the rest.
        let (excluded, tried): (Vec<_>, Vec<_>) =
            skipped.iter().partition(|(kind, _)| choose::excluded(&inner.config.transports, *kind).is_some());
        let mut reasons: Vec<_> = tried.iter().map(|(kind, reason)| format!("{kind}: {reason}")).collect();
        if reasons.is_empty() {
            reasons.push("none is enabled here".to_owned());
        }
        if !excluded.is_empty() {
            let names: Vec<_> = excluded.iter().map(|(kind, _)| kind.as_str()).collect();
            reasons.push(format!("the configuration leaves out {}", names.join(", ")));
        }
        reasons.join("; ")
    };
    let found: Vec<_> = paths.iter().map(|p| p.candidate).collect();
    if let Some(text) = choose::unmet(&inner.config.transports, &found) {
        return Err(Error::failed(
            ErrorCode::Requirement,
            format!("agent {:?}: {text} ({})", info.name.as_str(), why()),
        ));
    }
    if paths.is_empty() {
        return Err(Error::failed(
            ErrorCode::NotAvailable,
            format!(
                "no transport reaches agent {:?} ({}): {}",
                info.name.as_str(),
                identity::whereabouts(info),
                why()
            ),
        ));
    }
    Ok(())
}

/// Makes our rings for that peer and sends it the invitations (or the word that there are none).
pub(crate) fn invite(inner: &Inner, side: &SideChannel, peer: &AgentName) -> Result<Invited> {
    let mailbox = offer_ring(side, (side::MAILBOX, side::MAILBOX_EVENT), peer)?.map(|ring| {
        Arc::new(Mailbox {
            peer: peer.clone(),
            ring,
            received: inner.metrics.notifications(peer).1,
            closing: AtomicBool::new(false),
            violated: AtomicBool::new(false),
        })
    });
    let lane = offer_ring(side, (side::LANE, side::LANE_EVENT), peer)?.map(|ring| Arc::new(Lane::new(ring)));
    Ok(Invited { mailbox, lane })
}

fn offer_ring(side: &SideChannel, labels: (u64, u64), peer: &AgentName) -> Result<Option<Consumer>> {
    match Consumer::new() {
        Ok((ring, invitation)) => {
            side.send(labels.0, Some(invitation.memory.as_fd()))?;
            side.send(labels.1, Some(invitation.event.as_fd()))?;
            Ok(Some(ring))
        }
        Err(e) => {
            tracing::debug!(%peer, error = %e, "no ring in shared memory: the control connection takes what it was for");
            side.send(labels.0, None)?;
            side.send(labels.1, None)?;
            Ok(None)
        }
    }
}

fn take_ring(side: &SideChannel, labels: (u64, u64), deadline: Instant) -> Result<Option<Producer>> {
    match (side.take(labels.0, deadline)?, side.take(labels.1, deadline)?) {
        (Some(memory), Some(event)) => Producer::new(Invitation { memory, event }).map(Some),
        _ => Ok(None),
    }
}

/// The peer's process, to learn of its death. Its side socket has vouched for the process id.
fn open_process(info: &PeerInfo) -> Option<OwnedFd> {
    if !info.same_host || info.same_process {
        return None;
    }
    let pid = rustix::process::Pid::from_raw(info.host.pid.cast_signed())?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}
