//! What the demo's processes tell each other.

use super::prompt::Prompt;
use kvxfer_core::TransportKind;
use kvxfer_core::channel::PoolStats;
use serde::{Deserialize, Serialize};

/// To the receiver.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToReceiver {
    /// First message: open a pool for prompts of this shape, with or without NIXL for senders on this host. Answer:
    /// [`Opened`].
    Open { prompt: Prompt, pages: u32, key: String, nixl: bool },
    /// Compare every byte of the request's chunks. Answer: [`Checked`].
    Check { prompt: Prompt },
    /// Drop the request's chunks, present or not. Answer: [`Pool`].
    Drop { prompt: Prompt },
    /// Answer: [`Pool`].
    Stats,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Opened {
    pub address: String,
    pub pages: u32,
}

/// What the receiver holds of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Checked {
    /// Chunks published.
    pub chunks: usize,
    /// Bytes that are as they should be.
    pub bytes: u64,
    /// The first byte that is not.
    pub wrong: Option<String>,
}

/// The pool's state and the process's open descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pool {
    pub pages: u32,
    pub free: u32,
    pub writing: u32,
    pub published: u32,
    pub pinned: u32,
    pub quarantined: u32,
    pub queued: u32,
    pub active: u32,
    pub descriptors: usize,
}

/// To the sender.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToSender {
    /// First message: connect and allocate. With no address, open a pool in the same process. Answer: [`Connected`].
    Connect { prompt: Prompt, address: Option<String>, key: String, transport: Option<TransportKind> },
    /// Move the prompt's cache. Answer: [`Stored`].
    Store { prompt: Prompt, request: String },
    /// Move it, answer [`Half`] in the middle, and never hand over the last chunk.
    StoreHalf { prompt: Prompt, request: String },
    /// Check at the pool in the same process. Answer: [`Checked`].
    Check { prompt: Prompt },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connected {
    /// Paths to the receiver, best first.
    pub paths: Vec<(TransportKind, String)>,
    pub epoch: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Half {
    /// Chunks handed to the transport.
    pub chunks: usize,
}

/// How a store went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    pub transport: TransportKind,
    pub bytes: u64,
    pub written: u32,
    pub present: u32,
    pub takes_ms: f64,
    pub offload_ms: f64,
    pub put_ms: f64,
    pub queued_ms: f64,
}

impl Pool {
    pub(super) fn new(stats: PoolStats) -> Self {
        Self {
            pages: stats.pages,
            free: stats.free,
            writing: stats.writing,
            published: stats.published,
            pinned: stats.pinned,
            quarantined: stats.quarantined,
            queued: stats.queued,
            active: stats.active,
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        }
    }

    /// Nothing is under way: every page is free or holds a published chunk.
    pub(super) fn is_quiet(&self) -> bool {
        self.writing + self.pinned + self.quarantined + self.queued + self.active == 0
            && self.free + self.published == self.pages
    }
}
