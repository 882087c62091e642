//! The decoder's side: a pool of pages that senders fill and the engine reads.

use crate::{Agent, Memory, Result};
use kvxfer_proto::{AgentName, ChunkKey, ErrorCode, Geometry, PageIndex, RequestId};
use std::sync::Arc;
use std::time::Duration;

/// Settings of a pool.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// Name senders attach to.
    pub pool: String,
    /// Pages.
    pub pages: u32,
    /// What the pages hold; `geometry.page_bytes` is the size of a page.
    pub geometry: Geometry,
    /// A sender that neither commits nor renews for this long loses its lease.
    pub lease: Duration,
    /// A request not admitted for this long is refused (its own deadline may be shorter).
    pub admission_timeout: Duration,
    /// Longest queue of requests that wait for pages.
    pub max_queue: usize,
    /// A published chunk nobody has acquired is dropped after this long.
    pub retention: Duration,
}

/// The pool. Cheap to clone; senders are told when the last clone goes.
#[derive(Clone)]
pub struct Receiver {
    _inner: Arc<()>,
}

/// What is known of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Published: complete and checked, this many bytes.
    Present(u64),
    /// On its way.
    Pending,
    /// Nothing known.
    Absent,
}

/// A published chunk, pinned: its bytes stay as they are until this is dropped.
pub struct Chunk {
    _inner: Arc<()>,
}

/// What happens to requests; see [`Receiver::next_event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// Every chunk of the request is published.
    Ready {
        /// From whom.
        sender: AgentName,
        /// The request.
        request: RequestId,
    },
    /// The request ended otherwise.
    Failed {
        /// From whom.
        sender: AgentName,
        /// The request.
        request: RequestId,
        /// Why.
        code: ErrorCode,
        /// In words.
        text: String,
    },
}

/// Pages by state, and the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All pages.
    pub pages: u32,
    /// Free.
    pub free: u32,
    /// Granted and being written.
    pub writing: u32,
    /// Published.
    pub published: u32,
    /// Published and pinned.
    pub pinned: u32,
    /// Waiting until no write can land any more.
    pub quarantined: u32,
    /// Requests waiting for pages.
    pub queued: u32,
    /// Requests admitted and not ended.
    pub active: u32,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            pool: "kv".into(),
            pages: 0,
            geometry: Geometry::default(),
            lease: Duration::from_secs(30),
            admission_timeout: Duration::from_secs(30),
            max_queue: 1024,
            retention: Duration::from_secs(120),
        }
    }
}

impl Receiver {
    /// Allocates a shareable pool and opens it to senders.
    pub fn new(_agent: &Agent, _config: ReceiverConfig) -> Result<Self> {
        todo!("channel")
    }
    /// The same over memory the caller provides: at least `pages * page_bytes` bytes.
    pub fn with_memory(_agent: &Agent, _config: ReceiverConfig, _memory: Arc<Memory>) -> Result<Self> {
        todo!("channel")
    }
    /// What is known of `key` now.
    pub fn lookup(&self, _key: &ChunkKey) -> Lookup {
        todo!("channel")
    }
    /// Pins a published chunk; [`ErrorCode::InProgress`] while it is being written, [`ErrorCode::NotFound`] when unknown.
    pub fn acquire(&self, _key: &ChunkKey) -> Result<Chunk> {
        todo!("channel")
    }
    /// Drops a published chunk; its page is free once the last pin is gone.
    pub fn remove(&self, _key: &ChunkKey) -> bool {
        todo!("channel")
    }
    /// Waits until the request has ended; its failure is the error.
    pub fn wait_request(&self, _request: &RequestId, _timeout: Duration) -> Result<()> {
        todo!("channel")
    }
    /// Next event, `None` when the time is over.
    pub fn next_event(&self, _timeout: Duration) -> Option<ReceiverEvent> {
        todo!("channel")
    }
    /// Pages by state.
    pub fn stats(&self) -> PoolStats {
        todo!("channel")
    }
    /// The pool's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        todo!("channel")
    }
    /// Refuses new requests, ends the ones under way, waits until the pages are quiet.
    pub fn close(&self, _timeout: Duration) -> Result<()> {
        todo!("channel")
    }
}

impl Chunk {
    /// Its page.
    pub fn page(&self) -> PageIndex {
        todo!("channel")
    }
    /// Offset of its first byte in the pool's memory.
    pub fn offset(&self) -> u64 {
        todo!("channel")
    }
    /// Valid bytes.
    pub fn len(&self) -> u64 {
        todo!("channel")
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// Copies bytes out, from `offset` within the chunk.
    pub fn read_at(&self, _offset: u64, _out: &mut [u8]) -> Result<()> {
        todo!("channel")
    }
}
