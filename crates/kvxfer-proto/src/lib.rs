//! The pure heart of `kvxfer`.
//!
//! Everything that can be decided without a socket, a thread, a clock or a pointer lives here: ids, the
//! geometry two sides must agree on, the plan of a request's chunks, the wire messages with their limits,
//! the handshake with its authentication, integrity digests, and the three state machines that move a
//! request: [`sender`], [`receiver`] and the page [`pool`]. Time is an argument ([`Time`]); randomness is an
//! argument; input arrives as values and output leaves as values. That is what lets the tests run two
//! peers on a virtual link through thousands of interleavings in a second.
#![forbid(unsafe_code)]

pub mod admission;
pub mod code;
pub mod frame;
pub mod geometry;
pub mod handshake;
pub mod ids;
pub mod integrity;
pub mod layout;
pub mod notify;
pub mod plan;
pub mod pool;
pub mod query;
pub mod receiver;
pub mod sender;
pub mod time;
pub mod wire;
pub mod zmtp;

pub use code::ErrorCode;
pub use geometry::Geometry;
pub use ids::{AgentName, ChunkKey, Epoch, Generation, Hold, PageIndex, RegionId, RequestId, TransferId};
pub use integrity::Integrity;
pub use time::Time;
