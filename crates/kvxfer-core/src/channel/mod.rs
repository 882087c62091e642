//! Sender and receiver channels: requests, pages, leases and integrity on top of an agent.
//!
//! They drive the machines of `kvxfer-proto` with real messages, transfers and time.

mod receiver;
mod sender;

pub use receiver::{Chunk, Lookup, PoolStats, Receiver, ReceiverConfig, ReceiverEvent};
pub use sender::{ChunkSource, Delivery, DeliveryReport, Reservation, Sender, SenderConfig};
