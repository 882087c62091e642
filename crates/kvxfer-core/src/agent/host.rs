//! What the channels get from the agent: messages, peers that come and go, and ticks.
//!
//! A channel registers itself with `Agent::add_host` as a weak reference and is called from the agent's progress
//! thread, or for messages also from a thread that waits for one, with no lock of the agent held: it may call [`Peer::send`], [`Peer::import`], [`Peer::advert`], submit
//! transfers and `Agent::schedule` from within. It must not block: no waiting for transfers, no `Agent::connect`
//! and no `Peer::region` (on the progress thread those answer with `Busy`).

use super::Peer;
use kvxfer_proto::wire::Message;
use kvxfer_proto::{ErrorCode, Time};
use std::sync::OnceLock;
use std::time::Instant;

/// Implemented by the channels. All calls come from the progress thread and must not block, but for [`Host::message`]: that may come
/// from a thread that waits for an answer ([`Peer::attend`]). Of one peer there are never two at a time, and none comes after
/// [`Host::peer_gone`].
pub(crate) trait Host: Send + Sync + 'static {
    /// A channel message (`Attach` … `Renew`, see the wire module) arrived. False: not for this host, ask the next.
    fn message(&self, peer: &Peer, message: &Message) -> bool;
    /// Name of the open pool it serves: no two of an agent may have the same.
    fn pool(&self) -> Option<String> {
        None
    }
    /// A peer is connected (by either side); also called for each peer that is up when the host is added.
    fn peer_up(&self, _peer: &Peer) {}
    /// The peer of this epoch is gone; its writes may still land until [`Host::peer_fenced`].
    fn peer_gone(&self, peer: &Peer, code: ErrorCode);
    /// No write of that peer and epoch can land any more: its process has ended or its data paths are closed on our
    /// side. Comes once, after [`Host::peer_gone`].
    fn peer_fenced(&self, peer: &Peer);
    /// Called at the time it returned last (or earlier); returns when to be called next.
    fn tick(&self, now: Time) -> Option<Time>;
    /// Whether a message is likely to come any moment, worth staying awake for.
    fn expects(&self) -> bool {
        false
    }
    /// The agent is being shut down; no call follows.
    fn closed(&self) {}
}

/// The process's clock, as the machines want it.
pub(crate) fn now() -> Time {
    to_time(Instant::now())
}

/// An instant on that clock.
pub(crate) fn to_time(at: Instant) -> Time {
    Time(at.saturating_duration_since(origin()).as_nanos() as u64)
}

/// Back again.
pub(crate) fn to_instant(time: Time) -> Instant {
    origin() + std::time::Duration::from_nanos(time.0.min(u64::MAX / 4))
}

fn origin() -> Instant {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    *ORIGIN.get_or_init(Instant::now)
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
