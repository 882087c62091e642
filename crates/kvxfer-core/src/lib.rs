//! The working parts of `kvxfer`: memory, transports, the agent's runtime, and the channels that drive the
//! state machines of `kvxfer-proto`.
//!
//! Data flows one way: [`memory`] is registered as a [`Region`] of an [`Agent`]; a [`Peer`]'s exported region is
//! reached through the [`transport`] chosen for it; a [`Transfer`] moves descriptors between the two; the
//! [`channel`]s put requests, pages, leases and integrity on top.

pub mod agent;
pub mod baseline;
#[cfg(any(feature = "cuda", feature = "nixl"))]
mod cache;
pub mod channel;
pub mod config;
mod copy;
pub mod cuda;
pub mod error;
pub mod gather;
pub mod memory;
pub mod metrics;
pub mod notify;
pub mod paged;
mod threads;
pub mod transport;

pub use agent::{
    Access, Agent, AgentBuilder, Notification, Peer, PeerState, PeerStats, Region, RemoteRegion, Transfer,
    TransferOptions, TransferReport, TransportStatus,
};
pub use channel::{Outbox, OutboxConfig, Receiver, ReceiverConfig, Sender, SenderConfig};
pub use config::AgentConfig;
pub use error::{Error, Result};
pub use kvxfer_proto as proto;
pub use kvxfer_proto::{
    AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, Integrity, PageIndex, RequestId,
};
pub use memory::Memory;
pub use paged::{PagedCache, PagedChunk, PagedLayout, PagedVariant};
pub use transport::{Op, Piece, TransportKind};

const _: () = assert!(usize::BITS == 64, "kvxfer needs a 64-bit target");
