//! Sender and receiver channels: requests, pages, leases and integrity on top of an agent.
//!
//! ```text
//! Sender ─ reserve ─► Session ─ Reserve ─────────────► Receiver ─► pool: pages for all chunks, or a place in the queue
//!                        │     ◄───────────── Grant ─┘
//!                        ├─ Peer::write (bytes) ─────► the pool's memory
//!                        └─ Commit (digest) ─────────► check ─► published ─► lookup, acquire ─► engine
//! ```
//!
//! Where the pool is mapped in the sender's process (`shm`, `cuda_ipc`), a chunk's bytes can be produced in its page to begin with ([`Place`]):
//! then nothing is left to write, and the rest is the same.
//!
//! The other way round, a [`Sender`] asks a receiver for published chunks and reads them back from its pages ([`Found`]).
//!
//! All decisions are made by the machines of `kvxfer-proto`. What is here carries them out: it feeds them messages, ends of
//! transfers and time, and turns what they ask for into messages, transfers and checks. A machine is only touched under its
//! channel's lock; messages are queued under that lock too, so that they leave in the order in which they were decided;
//! transfers are submitted and cancelled outside of it.

mod anchor;
mod digest;
mod outbox;
mod place;
mod pool;
mod query;
mod receiver;
mod sender;
mod session;
mod ticket;
mod worker;
mod write;

#[cfg(test)]
mod tests;

pub use outbox::{Batch, Outbox, OutboxConfig, OutboxEvent};
pub use place::{Place, Placed};
pub use query::{Found, ReadReport};
pub use receiver::{Chunk, Lookup, PoolStats, Receiver, ReceiverConfig, ReceiverEvent};
pub use sender::{ChunkSource, Delivery, DeliveryReport, Reservation, Sender, SenderConfig};
