//! Transfers: checking them, submitting them, waiting for them, ending them.

use super::inbox::Inbox;
use super::links::Path;
use super::peer::{PeerInner, check_notification, release};
use super::region::{RegionInner, RemoteInner};
use super::state::Inner;
use super::{Peer, Region, RemoteRegion, Transfer, TransferOptions, TransferReport, identity};
use crate::transport::{Job, Link, Op, Outcome, Piece, RemoteKey, SegmentDigests, Tracker, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::{AgentName, ErrorCode, TransferId};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Most pieces in one transfer.
pub const MAX_PIECES: usize = 1 << 20;

/// A transfer as its handle keeps it.
pub(crate) struct TransferInner {
    id: TransferId,
    tracker: Arc<Tracker>,
    link: Arc<dyn Link>,
    kind: TransportKind,
    peer: AgentName,
    timeout: Duration,
    spin: Duration,
    agent: Arc<Inner>,
}

/// Does what must happen at a transfer's end, exactly once, also when it never started.
struct Completion {
    agent: Arc<Inner>,
    peer: Arc<PeerInner>,
    local: Option<Arc<RegionInner>>,
    remote: Arc<RemoteInner>,
    path: usize,
    op: Op,
    notify: Option<Vec<u8>>,
}

impl Completion {
    /// Runs when the last byte has landed (or never will), before anybody sees the end.
    fn run(mut self, t: &Tracker) {
        let error = t.error();
        if let (None, Some(payload)) = (error, self.notify.take())
            && let Err(e) = self.peer.send_notification(&self.agent, &payload, true)
        {
            // Only a peer that is gone refuses it, and everybody is told of that elsewhere.
            tracing::debug!(peer = %self.peer.info.name, error = %e, "notification after a transfer not sent");
        }
        self.peer.paths[self.path].metrics.ended(self.op, t.bytes_done(), t.duration(), error);
    }
}

/// Signals the agent's event descriptor. A waker and no hook: hooks run before the end is visible, and whoever is woken by the
/// descriptor, clears it and looks, must find the transfer finished.
pub(crate) struct EndEvent(pub(crate) Arc<Inbox>);

impl std::task::Wake for EndEvent {
    fn wake(self: Arc<Self>) {
        self.0.transfer_ended();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.0.transfer_ended();
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.peer.in_flight.fetch_sub(1, Ordering::AcqRel);
        if let Some(local) = self.local.take() {
            // The thread that runs this belongs to a transport: it must not call back into it to deregister.
            release(&self.agent, local);
        }
        let _ = &self.remote;
    }
}

/// Starts a transfer. Everything is checked before anything moves; nothing here waits.
pub(crate) fn submit(
    peer: &Peer,
    op: Op,
    local: &Region,
    remote: &RemoteRegion,
    pieces: &[Piece],
    options: TransferOptions,
    digest: Option<Arc<SegmentDigests>>,
) -> Result<Transfer> {
    let agent = &peer.agent;
    agent.check()?;
    let (local, remote) = (&local.inner, &remote.inner);
    if !Arc::ptr_eq(&local.agent, agent) {
        return Err(Error::InvalidArgument {
            argument: "local region",
            problem: format!("region {} belongs to another agent", local.id),
        });
    }
    if !Arc::ptr_eq(&remote.peer, &peer.inner) {
        return Err(Error::InvalidArgument {
            argument: "remote region",
            problem: format!(
                "{:?} was imported from agent {:?} of epoch {}, not over this connection; look it up again",
                remote.name,
                remote.peer.info.name.as_str(),
                remote.peer.info.epoch
            ),
        });
    }
    let total = check_pieces(pieces, local.len(), remote.len)?;
    let allowed = match op {
        Op::Write => remote.writable,
        Op::Read => remote.readable,
    };
    if !allowed {
        return Err(Error::InvalidArgument {
            argument: "remote region",
            problem: format!("the peer exports {:?} without the right to {op:?}", remote.name),
        });
    }
    peer.inner.check_up()?;
    if remote.revoked.load(Ordering::Acquire) {
        return Err(Error::NotFound { what: "exported region", name: remote.name.clone() });
    }
    if let Some(payload) = &options.notify {
        check_notification(payload)?;
        peer.inner.check_room()?;
    }
    let (path, key) = pick(&peer.inner, local, remote, options.transport)?;
    let index = peer.inner.paths.iter().position(|p| std::ptr::eq(p, path)).unwrap_or(0);
    let timeout = options.timeout.unwrap_or(agent.config.transfer_timeout);
    let id = TransferId(agent.id());
    let tracker = Arc::new(Tracker::new(pieces.len()));
    peer.inner.in_flight.fetch_add(1, Ordering::AcqRel);
    let completion = Completion {
        agent: agent.clone(),
        peer: peer.inner.clone(),
        local: Some(local.clone()),
        remote: remote.clone(),
        path: index,
        op,
        notify: options.notify,
    };
    tracker.on_finish(move |t| completion.run(t));
    tracker.register(&agent.end_event);
    let integrity = options.integrity.or(agent.config.integrity).unwrap_or(path.caps.default_integrity);
    tracing::trace!(peer = %peer.inner.info.name, transfer = %id, transport = %path.candidate.kind, bytes = total, "submit");
    let after = options.after;
    let held = !path.caps.follows_streams && after.as_ref().is_some_and(|f| !matches!(f.is_done(), Ok(true)));
    let job = Job {
        transfer: id,
        op,
        local_region: local.id,
        local: local.memory.clone(),
        remote: key,
        pieces: pieces.into(),
        integrity,
        after,
        digest: digest.filter(|_| path.caps.fuses_digest),
        tracker: tracker.clone(),
    };
    if held {
        agent.held.hold(path.link.clone(), job);
    } else {
        path.link.submit(job)?;
    }
    if !tracker.is_finished() {
        agent.reactor.add_deadline(Instant::now() + timeout, id, &tracker, &path.link, &peer.inner);
        if (held || path.caps.needs_poll) && !agent.reactor.poll_wanted.swap(true, Ordering::AcqRel) {
            agent.reactor.wake();
        }
    }
    Ok(Transfer {
        inner: Arc::new(TransferInner {
            id,
            tracker,
            link: path.link.clone(),
            kind: path.candidate.kind,
            peer: peer.inner.info.name.clone(),
            timeout,
            spin: agent.config.spin,
            agent: agent.clone(),
        }),
    })
}

/// Checks every piece against both regions; gives the sum of their lengths. The error names the first bad piece.
fn check_pieces(pieces: &[Piece], local: u64, remote: u64) -> Result<u64> {
    if pieces.is_empty() || pieces.len() > MAX_PIECES {
        return Err(Error::InvalidArgument {
            argument: "pieces",
            problem: format!("{} pieces; 1 to {MAX_PIECES} are allowed", pieces.len()),
        });
    }
    let inside = |offset: u64, len: u64, limit: u64| offset <= limit && len <= limit - offset;
    let mut total = 0u64;
    for (i, p) in pieces.iter().enumerate() {
        if p.len == 0 {
            return Err(Error::InvalidArgument {
                argument: "pieces",
                problem: format!("piece {i} has length 0"),
            });
        }
        for (side, offset, limit) in [("local", p.local_offset, local), ("remote", p.remote_offset, remote)] {
            if !inside(offset, p.len, limit) {
                return Err(Error::OutOfRange {
                    what: format!("piece {i}, {side} region"),
                    offset,
                    len: p.len,
                    limit,
                });
            }
        }
        total = total.checked_add(p.len).ok_or_else(|| Error::InvalidArgument {
            argument: "pieces",
            problem: format!("the lengths of pieces 0 to {i} add up to more than 2^64 bytes"),
        })?;
    }
    Ok(total)
}

/// The best path that reaches both regions; the error says which there are.
pub(crate) fn pick<'p>(
    peer: &'p PeerInner,
    local: &RegionInner,
    remote: &RemoteInner,
    only: Option<TransportKind>,
) -> Result<(&'p Path, RemoteKey)> {
    remote
        .keys
        .iter()
        .map(|(i, key)| (&peer.paths[*i], *key))
        .find(|(p, key)| {
            only.is_none_or(|k| k == p.candidate.kind)
                && local.usable.contains(&p.candidate.kind)
                && p.link.carries(local.id, &local.memory, *key)
        })
        .ok_or_else(|| {
            let reach: Vec<_> = remote.keys.iter().map(|(i, _)| peer.paths[*i].candidate.kind.as_str()).collect();
            let here: Vec<_> = local.usable.iter().map(|k| k.as_str()).collect();
            Error::failed(
                ErrorCode::NotAvailable,
                format!(
                    "no transport{} carries this transfer: region {:?} of agent {:?} is reached by {reach:?}, the local \
                     region by {here:?}",
                    only.map_or_else(String::new, |k| format!(" named {k}")),
                    remote.name,
                    peer.info.name.as_str()
                ),
            )
        })
}

impl Transfer {
    /// Its id.
    pub fn id(&self) -> TransferId {
        self.inner.id
    }
    /// What carries it.
    pub fn transport(&self) -> TransportKind {
        self.inner.kind
    }
    /// True when it has ended; its memory is not touched any more.
    pub fn is_finished(&self) -> bool {
        self.inner.tracker.is_finished()
    }
    /// Waits for the end and tells how it went; [`crate::Error::TimedOut`] when `timeout` passes first (the transfer goes on until its own deadline).
    pub fn wait(&self, timeout: Duration) -> Result<TransferReport> {
        let t = &self.inner;
        if let Some(report) = self.report() {
            return Ok(report);
        }
        if identity::forked_since(t.agent.made_in) {
            return Err(identity::forked_error());
        }
        t.agent.check_may_wait("Transfer::wait")?;
        let start = Instant::now();
        let deadline = start + timeout;
        // Lend a hand as long as there is something to do, spin a little, then sleep.
        while !t.tracker.is_finished() && t.link.assist(t.id) && Instant::now() < deadline {}
        let spin = Instant::now();
        while !t.tracker.is_finished() && spin.elapsed() < t.spin {
            std::hint::spin_loop();
        }
        t.tracker.wait_until(deadline);
        self.report().ok_or_else(|| Error::TimedOut {
            operation: format!("transfer {} with agent {:?} over {}", t.id, t.peer.as_str(), t.kind),
            after: timeout,
        })
    }
    /// The report, once finished.
    pub fn report(&self) -> Option<TransferReport> {
        let t = &self.inner.tracker;
        t.is_finished().then(|| {
            let error = t.error();
            TransferReport {
                transport: self.inner.kind,
                bytes: t.bytes_done(),
                pieces: t.pieces(),
                failed: t.failed_pieces(),
                duration: t.duration(),
                error,
                detail: error.map(|e| self.explain(e)),
            }
        })
    }

    fn explain(&self, error: ErrorCode) -> String {
        let t = &self.inner;
        let what = match error {
            ErrorCode::TimedOut => format!("not finished within its deadline of {:?}", t.timeout),
            other => other.to_string(),
        };
        let reason =
            t.tracker.detail().filter(|d| !d.is_empty()).map_or_else(String::new, |d| format!(": {d}"));
        format!("transfer {} with agent {:?} over {}: {what}{reason}", t.id, t.peer.as_str(), t.kind)
    }

    /// Outcome of piece `i`.
    pub fn outcome(&self, i: usize) -> Option<Outcome> {
        self.inner.tracker.outcome(i)
    }
    /// Asks it to end. `true`: it has ended and no byte changes any more (`Done`). `false`: not yet; wait for it.
    pub fn cancel(&self) -> bool {
        let t = &self.inner;
        if !t.tracker.is_finished() && !identity::forked_since(t.agent.made_in) {
            t.tracker.request_cancel(ErrorCode::Cancelled);
            t.link.cancel(t.id);
        }
        t.tracker.is_finished()
    }
    /// Runs `hook` at the end, on the thread that ends it (at once when it has ended). It must not block.
    pub(crate) fn on_finish(&self, hook: impl FnOnce(&Tracker) + Send + 'static) {
        self.inner.tracker.on_finish(hook);
    }
}

impl std::future::Future for Transfer {
    type Output = TransferReport;
    fn poll(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<TransferReport> {
        self.inner.tracker.register(cx.waker());
        self.report().map_or(std::task::Poll::Pending, std::task::Poll::Ready)
    }
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("id", &self.inner.id)
            .field("transport", &self.inner.kind)
            .field("tracker", &self.inner.tracker)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(local_offset: u64, remote_offset: u64, len: u64) -> Piece {
        Piece { local_offset, remote_offset, len }
    }

    #[test]
    fn bad_pieces_are_named() {
        assert_eq!(check_pieces(&[piece(0, 0, 10), piece(90, 0, 10)], 100, 100).unwrap(), 20);
        for (pieces, says) in [
            (vec![], "0 pieces"),
            (vec![piece(0, 0, 1), piece(0, 0, 0)], "piece 1 has length 0"),
            (vec![piece(0, 0, 1), piece(91, 0, 10)], "piece 1, local region"),
            (vec![piece(0, 100, 1)], "piece 0, remote region"),
            (vec![piece(u64::MAX, 0, 2)], "offset 18446744073709551615"),
            (vec![piece(1, 0, u64::MAX)], "length 18446744073709551615"),
            (vec![piece(0, 0, 1); MAX_PIECES + 1], "1048577 pieces"),
        ] {
            let text = check_pieces(&pieces, 100, 100).unwrap_err().to_string();
            assert!(text.contains(says), "{text}");
        }
    }
}
