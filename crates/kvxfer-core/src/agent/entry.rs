//! The life of a peer as the progress thread sees it: up, ending, fenced.
//!
//! A peer that is gone may still write to our memory (Contract line 2). Each side ends its own transfers first and only
//! then closes its half of the control connection, so the end of the peer's stream is its word that nothing more
//! comes. A process that has died needs no word. A stopped one is fenced when it dies or continues, not before. For a
//! peer on another host the data connections decide, which our transports have closed.

use super::Peer;
use super::links::Path;
use super::peer::PeerInner;
use super::progress::Progress;
use crate::transport::TransportKind;
use kvxfer_proto::ErrorCode;
use kvxfer_proto::handshake::printable;
use kvxfer_proto::wire::Message;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A peer and what the progress thread knows of it.
pub(crate) struct Entry {
    pub(super) peer: Arc<PeerInner>,
    pinged: Option<Instant>,
    draining: bool,
    /// Its stream has ended: it has nothing under way any more.
    quiet: bool,
    dead: bool,
}

impl Entry {
    pub(super) fn new(peer: Arc<PeerInner>) -> Self {
        Self { peer, pinged: None, draining: false, quiet: false, dead: false }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining
    }

    /// Pings a silent peer; an error when it has been silent for too long. Gives the time of the next look.
    pub(super) fn check(&mut self, now: Instant, timeout: Duration) -> Result<Instant, String> {
        if self.peer.mailbox.as_ref().is_some_and(|m| m.violated.load(Ordering::Acquire)) {
            return Err("wrote nonsense into its mailbox".into());
        }
        let heard = self.peer.last_heard();
        self.pinged = self.pinged.filter(|t| *t > heard);
        let silent = now.saturating_duration_since(heard);
        let interval = timeout / 3;
        // Measured from the last ping too: after a pause of this process the peer gets its chance to answer.
        if silent >= timeout && self.pinged.is_some_and(|t| now.saturating_duration_since(t) >= interval) {
            return Err(format!("silent for {silent:?} (peer_timeout {timeout:?})"));
        }
        if silent >= interval && self.pinged.is_none_or(|t| now.saturating_duration_since(t) >= interval) {
            // A full queue needs no ping: the answer to what is in it will do.
            let _ = self.peer.conn.send(&Message::Ping { nonce: silent.as_nanos() as u64 });
            self.pinged = Some(now);
        }
        Ok(self.pinged.unwrap_or(heard) + interval.max(Duration::from_millis(1)))
    }
}

impl Progress {
    /// The peer's stream has ended.
    pub(super) fn ended(&mut self, id: u64, how: &str) {
        self.gone(id, ErrorCode::PeerGone, how, false);
        if let Some(entry) = self.peers.get_mut(&id) {
            entry.quiet = true;
            entry.peer.conn.unwatch();
        }
        self.drain(id);
    }

    /// The peer's process has died.
    pub(super) fn process_died(&mut self, id: u64, token: u64) {
        if let Some(entry) = self.peers.get_mut(&id) {
            entry.dead = true;
            if let Some(pidfd) = &*entry.peer.pidfd.lock() {
                self.inner.reactor.unwatch(pidfd);
            }
            let pid = entry.peer.info.host.pid;
            self.forget_source(token);
            self.gone(id, ErrorCode::PeerGone, &format!("process {pid} has ended"), false);
            self.drain(id);
        }
    }

    /// Ends a peer: everything of it fails from now on, links are closed, channels are told. `tell`: say goodbye.
    pub(super) fn gone(&mut self, id: u64, code: ErrorCode, text: &str, tell: bool) {
        let Some(entry) = self.peers.get_mut(&id) else { return };
        if entry.draining {
            return;
        }
        entry.draining = true;
        let peer = entry.peer.clone();
        peer.mark_gone(code, text);
        peer.stop_listening();
        tracing::info!(agent = %self.inner.name, peer = %peer.info.name, epoch = %peer.info.epoch, %code, reason = text, "peer gone");
        self.inner.forget(&peer);
        self.inner.metrics.peer_gone(&peer.info.name);
        if tell {
            let _ = peer.conn.send(&Message::Bye { reason: printable(text) });
        }
        peer.fail_queries();
        for path in &peer.paths {
            path.link.close();
        }
        if let Some(mailbox) = &peer.mailbox {
            self.inner.inbox.close(mailbox);
        }
        let handle = Peer::from_inner(&self.inner, &peer);
        self.inner.hosts().iter().for_each(|h| h.peer_gone(&handle, code));
        self.drain(id);
    }

    /// Brings a peer that is gone a step nearer to its end; true once it is fenced and forgotten.
    pub(super) fn drain(&mut self, id: u64) -> bool {
        let Some(entry) = self.peers.get_mut(&id) else { return true };
        if !entry.draining {
            return false;
        }
        let peer = entry.peer.clone();
        peer.conn.flush();
        let idle = peer.in_flight.load(Ordering::Acquire) == 0;
        if idle {
            peer.conn.finish();
        }
        let their_word = entry.quiet || entry.dead;
        // NIXL tells nothing about its connections, so there the peer's word counts from other hosts as well: its requests
        // have ended, or the kernel that closed its control connection has closed its data connections too.
        let by_word = |p: &Path| p.caps.same_host || p.candidate.kind == TransportKind::Nixl;
        if !(idle && peer.paths.iter().all(|p| p.link.fenced() || (their_word && by_word(p)))) {
            return false;
        }
        self.peers.remove(&id);
        self.forget_sources(&peer);
        peer.let_go();
        self.inner.reactor.purge_deadlines();
        tracing::debug!(peer = %peer.info.name, epoch = %peer.info.epoch, "peer fenced");
        let handle = Peer::from_inner(&self.inner, &peer);
        self.inner.hosts().iter().for_each(|h| h.peer_fenced(&handle));
        true
    }
}
