//! The prefiller's side: reserve, write, commit.

use crate::{Agent, Peer, Region, Result};
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ErrorCode, Geometry, Integrity, RequestId};
use std::sync::Arc;
use std::time::Duration;

/// Settings of a sender.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// The receiver's pool.
    pub pool: String,
    /// Must equal the receiver's.
    pub geometry: Geometry,
    /// Level of checking; default: by transport.
    pub integrity: Option<Integrity>,
    /// Deadline of a request that states none, admission included.
    pub request_timeout: Duration,
}

/// A channel to one receiver's pool. Reconnects by itself when the receiver was restarted. Cheap to clone.
#[derive(Clone)]
pub struct Sender {
    _inner: Arc<()>,
}

/// An admitted (or waiting) request.
pub struct Reservation {
    _inner: Arc<()>,
}

/// A request whose end can be waited for.
pub struct Delivery {
    _inner: Arc<()>,
}

/// Where a chunk's bytes are: runs of a local region, concatenated.
#[derive(Clone)]
pub struct ChunkSource {
    /// The region.
    pub region: Region,
    /// `(offset, length)` runs in the order of the chunk's bytes; their sum is the chunk's length.
    pub runs: Vec<(u64, u64)>,
}

/// How a request went.
#[derive(Clone, Debug)]
pub struct DeliveryReport {
    /// Bytes that crossed (chunks already present do not).
    pub bytes: u64,
    /// Chunks written.
    pub written: u32,
    /// Chunks that were already there.
    pub present: u32,
    /// Wait for admission.
    pub queued: Duration,
    /// From admission to the receiver's word that all is published.
    pub moved: Duration,
    /// What carried it.
    pub transport: crate::TransportKind,
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self {
            pool: "kv".into(),
            geometry: Geometry::default(),
            integrity: None,
            request_timeout: Duration::from_secs(60),
        }
    }
}

impl Sender {
    /// Connects and compares geometries.
    pub fn connect(
        _agent: &Agent,
        _address: &str,
        _config: SenderConfig,
        _timeout: Duration,
    ) -> Result<Self> {
        todo!("channel")
    }
    /// Declares a request with all its chunks. Returns at once; admission is waited for with [`Reservation::wait_admitted`].
    pub fn reserve(
        &self,
        _request: RequestId,
        _chunks: Vec<ChunkSpec>,
        _timeout: Option<Duration>,
    ) -> Result<Reservation> {
        todo!("channel")
    }
    /// Reserve, write and commit in one go; returns at once.
    pub fn send(
        &self,
        _request: RequestId,
        _chunks: Vec<(ChunkSpec, ChunkSource)>,
        _timeout: Option<Duration>,
    ) -> Result<Delivery> {
        todo!("channel")
    }
    /// The receiver's agent.
    pub fn peer(&self) -> Peer {
        todo!("channel")
    }
}

impl Reservation {
    /// Waits until the request is admitted; refusal is the error.
    pub fn wait_admitted(&self, _timeout: Duration) -> Result<()> {
        todo!("channel")
    }
    /// Writes and commits chunk `i` from `source`; returns at once. Chunks that are present already cost nothing.
    /// Call it as soon as the chunk's bytes are final, while the prefill goes on.
    pub fn write(&self, _i: usize, _source: ChunkSource) -> Result<()> {
        todo!("channel")
    }
    /// Every chunk has been given to [`Reservation::write`]; the rest can be waited for.
    pub fn finish(self) -> Delivery {
        todo!("channel")
    }
    /// Gives the request up. Pages are reused once no write can land.
    pub fn abort(self, _why: ErrorCode) {
        todo!("channel")
    }
}

impl Delivery {
    /// Waits for the end.
    pub fn wait(&self, _timeout: Duration) -> Result<DeliveryReport> {
        todo!("channel")
    }
    /// True when it has ended.
    pub fn is_finished(&self) -> bool {
        todo!("channel")
    }
}
