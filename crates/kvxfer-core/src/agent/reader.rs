//! What a peer says: taken from its lane or its connection, in order, and given to whom it concerns.
//!
//! Usually by the progress thread. A thread that waits for an answer of a peer on this host looks at its lane itself for a moment
//! ([`attend`]): then nobody has to be woken for it, which takes longer than most answers. Whoever it is, a peer's messages are handed
//! on one at a time.

use super::peer::PeerInner;
use super::reactor::Command;
use super::state::Inner;
use super::{Access, Notification, Peer};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::frame::Decoder;
use kvxfer_proto::handshake::printable;
use kvxfer_proto::wire::Message;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Most notifications of one peer that wait here, when they do not come through a mailbox.
const MAX_WAITING_NOTIFICATIONS: usize = 65_536;
/// Pieces of a lane that are taken at a time, so that one peer cannot keep a thread to itself.
const MAX_PIECES: usize = 64;
/// How long a thread that waits for an answer looks at the lane itself, if threads may spin at all: an answer of a peer that has to be
/// woken first takes about so long.
const ATTENTION: Duration = Duration::from_micros(100);
/// Looks at the lanes between two offers of the core to somebody else.
const LOOKS: u32 = 16;

/// Why a peer ends.
pub(crate) struct End {
    pub(crate) code: ErrorCode,
    pub(crate) text: String,
    /// It hears of it.
    pub(crate) tell: bool,
}

impl End {
    fn protocol(text: impl Into<String>) -> Self {
        Self { code: ErrorCode::Protocol, text: text.into(), tell: true }
    }
}

/// The half of a peer that listens to it.
#[derive(Default)]
pub(crate) struct Reader {
    /// From the moment at which the channels have been told of the peer.
    decoder: Option<Decoder>,
    /// Nothing more is taken.
    ended: bool,
}

impl PeerInner {
    /// The channels know of the peer; `decoder` has what its handshake read beyond the end.
    pub(crate) fn begin(self: &Arc<Self>, agent: &Arc<Inner>, decoder: Decoder) -> Result<(), End> {
        self.reader.lock().decoder = Some(decoder);
        self.hear(agent, &[])?;
        self.listen(agent).map(|_| ())
    }

    /// Whoever hands something on has done so when this returns, and nobody will any more.
    pub(crate) fn stop_listening(&self) {
        self.reader.lock().ended = true;
    }

    /// Takes bytes of the connection.
    pub(crate) fn hear(self: &Arc<Self>, agent: &Arc<Inner>, bytes: &[u8]) -> Result<(), End> {
        let mut reader = self.reader.lock();
        self.heard();
        reader.take(agent, self, bytes)
    }

    /// Takes what is in the lane; true when there was something.
    pub(crate) fn listen(self: &Arc<Self>, agent: &Arc<Inner>) -> Result<bool, End> {
        let Some(lane) = self.lane() else { return Ok(false) };
        let mut reader = self.reader.lock();
        if reader.decoder.is_none() && !reader.ended {
            // Its turn comes.
            return Ok(false);
        }
        for taken in 0..MAX_PIECES {
            match lane.ring.pop() {
                Ok(None) => return Ok(taken > 0),
                Ok(Some(piece)) => {
                    self.heard();
                    reader.take(agent, self, &piece)?;
                }
                Err(e) => {
                    let first = !std::mem::replace(&mut reader.ended, true);
                    return if first { Err(End::protocol(e.to_string())) } else { Ok(false) };
                }
            }
        }
        Ok(true)
    }
}

impl Reader {
    fn take(&mut self, agent: &Arc<Inner>, peer: &Arc<PeerInner>, bytes: &[u8]) -> Result<(), End> {
        let Some(decoder) = &mut self.decoder else { return Ok(()) };
        if self.ended {
            // Only the end matters now.
            return Ok(());
        }
        decoder.push(bytes);
        let result = loop {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    if let Err(end) = hand_on(agent, peer, message) {
                        break Err(end);
                    }
                }
                Ok(None) => return Ok(()),
                Err(e) => break Err(End::protocol(e.to_string())),
            }
        };
        self.ended = true;
        result
    }
}

fn hand_on(agent: &Arc<Inner>, peer: &Arc<PeerInner>, message: Message) -> Result<(), End> {
    match message {
        Message::RegionQuery { query, name } => {
            let found = agent.exports.read().get(&name).map(|e| (e.region.clone(), e.access));
            let region = found.map(|(region, access): (_, Access)| region.advert(peer, &name, access));
            reply(peer, &Message::RegionInfo { query, region });
        }
        Message::RegionInfo { query, region } => peer.answer(query, region),
        Message::Unexported { region } => peer.revoke(region),
        Message::Notify { payload } => {
            if peer.waiting_notifications.load(Ordering::Relaxed) >= MAX_WAITING_NOTIFICATIONS {
                let text =
                    format!("{MAX_WAITING_NOTIFICATIONS} of its notifications wait and nobody fetches them");
                return Err(End { code: ErrorCode::NoCapacity, text, tell: true });
            }
            peer.received.inc();
            let notification = Notification { peer: peer.info.name.clone(), payload };
            agent.inbox.push(notification, &peer.waiting_notifications);
        }
        Message::Ping { nonce } => reply(peer, &Message::Pong { nonce }),
        Message::Pong { .. } => {}
        Message::Bye { reason } => {
            let text = format!("said goodbye: {}", printable(&reason));
            return Err(End { code: ErrorCode::PeerGone, text, tell: false });
        }
        Message::Hello(_)
        | Message::Auth { .. }
        | Message::Offers { .. }
        | Message::Welcome
        | Message::Refuse { .. } => {
            return Err(End::protocol("sent a handshake message after the handshake"));
        }
        message => {
            let handle = Peer::from_inner(agent, peer);
            if !agent.hosts().iter().any(|h| h.message(&handle, &message)) {
                unclaimed(agent, peer, message);
            }
        }
    }
    Ok(())
}

/// No channel takes it: whoever waits for an answer gets one.
fn unclaimed(agent: &Inner, peer: &PeerInner, message: Message) {
    let code = ErrorCode::NotFound;
    match message {
        Message::Attach { channel, pool, .. } => {
            let text = format!("agent {:?} has no pool {pool:?}", agent.name.as_str());
            reply(peer, &Message::Attached { channel, region: None, pages: 0, code, text });
        }
        Message::Reserve { channel, serial, .. } => {
            let text = format!("agent {:?} has no channel {channel}", agent.name.as_str());
            reply(peer, &Message::Refused { channel, serial, code, text });
        }
        Message::Query { channel, query, .. } => {
            let text = format!("agent {:?} has no channel {channel}", agent.name.as_str());
            reply(peer, &Message::Found { channel, query, chunks: Vec::new(), lease_ms: 0, code, text });
        }
        // A sender that has gone has no use for them.
        Message::Advance { channel, pages, .. } => reply(peer, &Message::Return { channel, pages }),
        Message::Release { channel, query } => {
            reply(peer, &Message::Released { channel, query, code });
        }
        other => {
            tracing::debug!(peer = %peer.info.name, channel = ?other.channel(), "nobody takes this message");
        }
    }
}

/// Answers; a peer that does not read its answers ends by its own silence.
fn reply(peer: &PeerInner, message: &Message) {
    if let Err(e) = peer.conn.send(message) {
        tracing::debug!(peer = %peer.info.name, error = %e, "answer not sent");
    }
}

/// How long [`Peer::attend`] looks.
pub(crate) fn attention(agent: &Inner) -> Duration {
    let spin = agent.config.spin;
    if spin.is_zero() { spin } else { spin.max(ATTENTION) }
}

/// Looks after the lanes of peers on the caller's thread until `done`, at most `budget`. The caller holds no lock of a channel and has
/// nothing better to do. Messages of those peers are handed on here meanwhile, whomever they concern.
pub(crate) fn attend(
    agent: &Arc<Inner>,
    peers: impl IntoIterator<Item = Arc<PeerInner>>,
    budget: Duration,
    mut done: impl FnMut() -> bool,
) {
    if budget.is_zero() || agent.reactor.is_progress_thread() || done() {
        return;
    }
    let lanes: Vec<_> = peers.into_iter().filter_map(|p| p.lane().map(|lane| (p, lane))).collect();
    if lanes.is_empty() {
        return;
    }
    for (_, lane) in &lanes {
        lane.attend();
    }
    let until = Instant::now() + budget;
    let mut looks = 0;
    loop {
        let mut some = false;
        for (peer, _) in lanes.iter().filter(|(_, lane)| lane.ring.has_some()) {
            match peer.listen(agent) {
                Ok(found) => some |= found,
                Err(End { code, text, tell }) => {
                    agent.reactor.command(Command::Gone(peer.clone(), code, text, tell));
                }
            }
        }
        if done() || Instant::now() >= until {
            break;
        }
        looks += 1;
        if !some && looks % LOOKS == 0 {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
    for (_, lane) in &lanes {
        // From here on the progress thread is woken for it again.
        if lane.leave() {
            agent.reactor.wake();
        }
    }
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
