//! What the benchmark's two processes tell each other: JSON in notifications of the agents themselves, so that it works
//! between hosts just as between parent and child.

use super::cases::Pattern;
use crate::Failure;
use kvxfer_core::agent::PeerState;
use kvxfer_core::{Agent, Notification, Op, Peer, TransportKind};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The regions the server exports: memory of kvxfer's own (a memfd), and memory as any program has it.
pub(crate) const SHARED: &str = "bench.shared";
pub(crate) const PLAIN: &str = "bench.plain";
/// The region the client exports for the way back of a ping-pong.
pub(crate) const PONG: &str = "bench.pong";
/// The server's pool.
pub(crate) const POOL: &str = "bench";
/// Payload of a ping-pong's notification.
pub(crate) const PING: &[u8] = b"ping";

/// How often a waiting client looks whether the server is still there.
const SLICE: Duration = Duration::from_millis(250);

/// To the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Allocate and export both regions. Answer: [`Answer::Prepared`].
    Prepare { bytes: u64 },
    /// Write `stamp` into the first eight bytes of each piece.
    Stamp { region: String, pattern: Pattern, piece: u64, bytes: u64, seed: u64, stamp: u64 },
    /// Count the pieces whose first eight bytes are not `stamp`. Answer: [`Answer::Bad`].
    Inspect { region: String, pattern: Pattern, piece: u64, bytes: u64, seed: u64, stamp: u64 },
    /// Answer the next `count` pings.
    PingPong { kind: TransportKind, count: u32, poll: bool },
    /// Answer: [`Answer::Cpu`].
    Cpu,
    /// Open raw sockets over the shared region. Answer: [`Answer::Raw`].
    Raw { streams: u16 },
    /// Open a pool. Answer: [`Answer::Done`].
    Pool { pages: u32, page_bytes: u64 },
    /// Drop chunks `0..chunks` of run `run`. Answer: [`Answer::Bad`] with how many were not there.
    Forget { run: u64, chunks: u32 },
}

/// From the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Prepared {
        pid: u32,
        /// Address of the plain region in the server's process.
        plain_address: u64,
        /// Bytes of each region.
        bytes: u64,
    },
    Bad(u64),
    Cpu {
        /// Processor time of the process so far, nanoseconds.
        ns: u64,
    },
    Raw {
        address: String,
        token: String,
    },
    Failed(String),
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Numbered<T> {
    pub id: u64,
    pub body: T,
}

/// The client's end of the control conversation.
pub(crate) struct Control {
    agent: Agent,
    peer: Peer,
    next: u64,
}

impl Control {
    pub(crate) fn new(agent: Agent, peer: Peer) -> Self {
        Self { agent, peer, next: 1 }
    }

    /// Asks, and waits for the answer to this very question.
    pub(crate) fn ask(&mut self, ask: Ask, timeout: Duration) -> Result<Answer, Failure> {
        let id = self.next;
        self.next += 1;
        let text = format!("{ask:?}");
        let payload = encode(&Numbered { id, body: ask })?;
        self.peer.notify(&payload)?;
        let deadline = Instant::now() + timeout;
        loop {
            // In slices, so that a server that ends is noticed.
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(Notification { payload, .. }) = self.agent.notification(left.min(SLICE))? else {
                if let PeerState::Gone(code) = self.peer.state() {
                    return Err(Failure::new(format!("the server ended before it answered {text}: {code}")));
                }
                if left.is_zero() {
                    return Err(Failure::new(format!("the server did not answer {text} within {timeout:?}")));
                }
                continue;
            };
            // Late pongs and answers to questions given up may still arrive.
            match serde_json::from_slice::<Numbered<Answer>>(&payload) {
                Ok(Numbered { id: got, body }) if got == id => {
                    return match body {
                        Answer::Failed(why) => Err(Failure::new(format!("the server: {why}"))),
                        answer => Ok(answer),
                    };
                }
                _ => {}
            }
        }
    }
}

pub(crate) fn encode(message: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(message).map_err(|e| Failure::new(e.to_string()))
}

/// Any of a pass over raw sockets, fixed in size: sent on each connection before the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawPass {
    pub op: Op,
    pub pattern: Pattern,
    pub lane: u32,
    pub lanes: u32,
    pub piece: u64,
    pub bytes: u64,
    pub seed: u64,
}

impl RawPass {
    pub(crate) const LEN: usize = 40;

    pub(crate) fn encode(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0] = self.op as u8;
        out[1] = u8::from(self.pattern == Pattern::Random);
        out[4..8].copy_from_slice(&self.lane.to_le_bytes());
        out[8..12].copy_from_slice(&self.lanes.to_le_bytes());
        out[16..24].copy_from_slice(&self.piece.to_le_bytes());
        out[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        out[32..40].copy_from_slice(&self.seed.to_le_bytes());
        out
    }

    /// Checked against the region's size: nothing from a socket is trusted.
    pub(crate) fn decode(raw: &[u8; Self::LEN], limit: u64) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap_or_default());
        let half = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap_or_default());
        let op = match raw[0] {
            1 => Op::Write,
            2 => Op::Read,
            _ => return None,
        };
        let pattern = if raw[1] == 0 { Pattern::Ordered } else { Pattern::Random };
        let pass = Self {
            op,
            pattern,
            lane: half(4),
            lanes: half(8),
            piece: word(16),
            bytes: word(24),
            seed: word(32),
        };
        let fits = pass.piece >= 64 && pass.piece <= pass.bytes && pass.bytes <= limit;
        (fits && pass.lane < pass.lanes && pass.lanes <= 64).then_some(pass)
    }
}

/// Key of a chunk of the integrity section.
pub(crate) fn chunk_key(run: u64, chunk: u32) -> String {
    format!("bench@1@0@{run:016x}-{chunk}@uint8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_pass_is_checked_before_use() {
        let pass = RawPass {
            op: Op::Read,
            pattern: Pattern::Random,
            lane: 1,
            lanes: 2,
            piece: 4096,
            bytes: 1 << 20,
            seed: 77,
        };
        assert_eq!(RawPass::decode(&pass.encode(), 1 << 20), Some(pass));
        assert_eq!(RawPass::decode(&pass.encode(), (1 << 20) - 1), None, "beyond the region");
        assert_eq!(RawPass::decode(&RawPass { piece: 0, ..pass }.encode(), 1 << 20), None, "no piece");
        assert_eq!(RawPass::decode(&RawPass { lane: 2, ..pass }.encode(), 1 << 20), None, "no such lane");
        assert_eq!(RawPass::decode(&[0; RawPass::LEN], 1 << 20), None, "no op");
    }
}
