//! The decoder's side: a pool of pages that senders fill and the engine reads.

use super::pool::{Handle, Pool};
use crate::agent::host;
use crate::memory::HugePages;
use crate::{Agent, Error, Memory, Result};
use kvxfer_proto::layout::Layout;
use kvxfer_proto::pool::{Hold, Known};
use kvxfer_proto::{AgentName, ChunkKey, ErrorCode, Geometry, PageIndex, RequestId};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// The pool. Cheap to clone; senders are told when the last clone goes. Chunks acquired from it outlive it.
#[derive(Clone)]
pub struct Receiver {
    handle: Arc<Handle>,
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
    pool: Arc<Pool>,
    hold: Hold,
    offset: u64,
    len: u64,
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

/// Pages by state, and the queue. `free + writing + advanced + published + quarantined == pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All pages.
    pub pages: u32,
    /// Free.
    pub free: u32,
    /// Granted and being written.
    pub writing: u32,
    /// In the hands of senders, for requests to come; they return them when others wait.
    pub advanced: u32,
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
    /// Pages a new request could have: free ones, and published ones whose consumers have come and gone.
    pub available: u32,
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
    pub fn new(agent: &Agent, config: ReceiverConfig) -> Result<Self> {
        let layout = layout(&config)?;
        let memory = Memory::shared(layout.total_bytes() as usize, HugePages::Try)?;
        Self::with_memory(agent, config, memory)
    }

    /// The same over memory the caller provides: at least `pages * page_bytes` bytes.
    pub fn with_memory(agent: &Agent, config: ReceiverConfig, memory: Arc<Memory>) -> Result<Self> {
        let layout = layout(&config)?;
        if (memory.len() as u64) < layout.total_bytes() {
            return Err(Error::InvalidArgument {
                argument: "memory",
                problem: format!(
                    "{} bytes; {} pages of {} bytes need {}",
                    memory.len(),
                    layout.pages(),
                    layout.page_bytes(),
                    layout.total_bytes()
                ),
            });
        }
        let pool = Pool::open(agent, config, layout, memory)?;
        Ok(Self { handle: Arc::new(Handle { pool }) })
    }

    /// What is known of `key` now.
    pub fn lookup(&self, key: &ChunkKey) -> Lookup {
        match self.pool().state.lock().machine.known(key) {
            Known::Published(len) => Lookup::Present(len),
            Known::Writing => Lookup::Pending,
            Known::Absent => Lookup::Absent,
        }
    }

    /// Pins a published chunk; [`ErrorCode::InProgress`] while it is being written, [`ErrorCode::NotFound`] when unknown.
    pub fn acquire(&self, key: &ChunkKey) -> Result<Chunk> {
        let pool = self.pool();
        let mut state = pool.state.lock();
        let Some((hold, len)) = state.machine.pin(key) else {
            return Err(match state.machine.known(key) {
                Known::Writing => {
                    Error::failed(ErrorCode::InProgress, format!("chunk {key} is still being written"))
                }
                _ => Error::NotFound { what: "chunk", name: key.to_string() },
            });
        };
        state.show();
        let offset = pool.offset(hold.page);
        Ok(Chunk { pool: pool.clone(), hold, offset, len })
    }

    /// Gives a published chunk back: it goes when no other request announced here counts on it, and its page is free once the
    /// last pin is gone. False when no such chunk is published.
    pub fn remove(&self, key: &ChunkKey) -> bool {
        self.pool().with(|m| m.remove(host::now(), key))
    }

    /// Waits until the request has ended, declared already or not; its failure is the error. Where several senders use the
    /// same id, the one that ended last counts.
    pub fn wait_request(&self, request: &RequestId, timeout: Duration) -> Result<()> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        let mut state = pool.state.lock();
        loop {
            if let Some(end) = state.ends.get(request) {
                return end.clone().map_err(|(code, text)| Error::failed(code, text));
            }
            if state.closed {
                return Err(pool.closed_error());
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() && !state.ends.contains_key(request)
            {
                return Err(Error::TimedOut { operation: format!("request {request}"), after: timeout });
            }
        }
    }

    /// Next event, `None` when the time is over or the pool is closed. Every event is given to one caller only; when nobody
    /// asks, the oldest are dropped.
    pub fn next_event(&self, timeout: Duration) -> Option<ReceiverEvent> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        let mut state = pool.state.lock();
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if state.closed {
                return None;
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() {
                return state.events.pop_front();
            }
        }
    }

    /// Pages by state.
    pub fn stats(&self) -> PoolStats {
        self.pool().state.lock().stats()
    }

    /// The pool's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.pool().region.memory()
    }

    /// Refuses new requests, ends the ones under way, waits until no page can be written any more. Published chunks stay
    /// until the last handle goes.
    pub fn close(&self, timeout: Duration) -> Result<()> {
        let pool = self.pool();
        let deadline = Instant::now() + timeout;
        pool.shut("the receiver was closed");
        let mut state = pool.state.lock();
        loop {
            let quarantined = state.stats().quarantined;
            if quarantined == 0 || state.agent_gone {
                return Ok(());
            }
            if pool.changed.wait_until(&mut state, deadline).timed_out() && state.stats().quarantined > 0 {
                return Err(Error::TimedOut {
                    operation: format!(
                        "closing pool {:?}: {quarantined} pages may still be written",
                        pool.name
                    ),
                    after: timeout,
                });
            }
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        &self.handle.pool
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver")
            .field("pool", &self.pool().name)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Chunk {
    /// Its page.
    pub fn page(&self) -> PageIndex {
        self.hold.page
    }
    /// Offset of its first byte in the pool's memory.
    pub fn offset(&self) -> u64 {
        self.offset
    }
    /// Valid bytes.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// The pool's memory; it stays mapped while this chunk lives.
    pub fn memory(&self) -> &Arc<Memory> {
        self.pool.region.memory()
    }
    /// Copies bytes out, from `offset` within the chunk.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let len = out.len() as u64;
        if offset > self.len || len > self.len - offset {
            let what = format!("chunk on page {}", self.hold.page);
            return Err(Error::OutOfRange { what, offset, len, limit: self.len });
        }
        self.memory().read_at(self.offset + offset, out)
    }
}

impl std::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunk").field("page", &self.hold.page).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.with(|m| m.unpin(host::now(), self.hold));
    }
}

fn layout(config: &ReceiverConfig) -> Result<Layout> {
    Layout::new(config.geometry.page_bytes, config.pages).map_err(|e| Error::InvalidArgument {
        argument: "pages and geometry.page_bytes",
        problem: e.to_string(),
    })
}
