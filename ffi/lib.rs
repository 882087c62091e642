//! `kvxfer` moves LLM key/value caches between inference engines: from a prefiller to a decoder, over shared memory, CMA, TCP
//! or NIXL/UCX. This crate is the public Rust API; the C ABI is in [`c`], its conventions in `docs/c-abi.md`.
//!
//! Two layers:
//!
//! - one-sided: an [`Agent`] owns [`Region`]s of registered memory and connects to [`Peer`]s; [`Peer::write`] and [`Peer::read`] move
//!   [`Piece`]s and return a [`Transfer`], which can be polled, waited for, or awaited;
//! - requests: a [`Receiver`] is a pool of pages; a [`Sender`] reserves all chunks of a request at once, writes each when it is
//!   ready, and gets word when the receiver has checked and published them.
//!
//! # An agent
//!
//! ```
//! use kvxfer::{Agent, AgentConfig, TransportKind};
//!
//! # fn main() -> kvxfer::Result<()> {
//! let agent = Agent::builder()
//!     .name("decoder-0")
//!     .listen("tcp://127.0.0.1:0") // port 0: the system picks one
//!     .auth_key("the same on both sides")
//!     .allow([TransportKind::Inproc, TransportKind::Shm, TransportKind::Tcp])
//!     .build()?;
//! assert!(agent.addresses()[0].starts_with("tcp://127.0.0.1:"));
//!
//! // The same from a configuration file; every setting has a default, unknown keys are errors.
//! let config = AgentConfig::from_yaml("name: prefiller-0\ntransfer_timeout: 5s")?;
//! let other = Agent::builder().config(config).build()?;
//! assert_eq!(other.name().as_str(), "prefiller-0");
//! # Ok(())
//! # }
//! ```
//!
//! # Write to a peer's memory
//!
//! ```
//! use kvxfer::agent::Access;
//! use kvxfer::{Agent, Piece, TransferOptions};
//! use std::time::Duration;
//!
//! # fn main() -> kvxfer::Result<()> {
//! const WAIT: Duration = Duration::from_secs(10);
//!
//! // Usually in another process: memory that peers may write.
//! let target = Agent::builder().name("target").listen("tcp://127.0.0.1:0").build()?;
//! let inbox = target.allocate(1 << 20)?;
//! target.export(&inbox, "inbox", Access::Write)?;
//!
//! let agent = Agent::builder().name("writer").build()?;
//! let local = agent.allocate(1 << 20)?;
//! local.memory().write_at(4096, b"key/value cache")?;
//! let peer = agent.connect(&target.addresses()[0], WAIT)?;
//! let remote = peer.region("inbox", WAIT)?;
//!
//! let piece = Piece { local_offset: 4096, remote_offset: 512, len: 15 };
//! let options = TransferOptions { notify: Some(b"written".to_vec()), ..TransferOptions::default() };
//! let report = peer.write(&local, &remote, &[piece], options)?.wait(WAIT)?;
//! assert_eq!((report.bytes, report.error), (15, None));
//!
//! // The notification comes after the last byte it belongs to.
//! let notification = target.notification(WAIT)?.expect("one was sent");
//! assert_eq!(notification.payload, b"written");
//! let mut bytes = [0; 15];
//! inbox.memory().read_at(512, &mut bytes)?;
//! assert_eq!(&bytes, b"key/value cache");
//! # Ok(())
//! # }
//! ```
//!
//! # Hand over a request
//!
//! ```
//! use kvxfer::channel::ChunkSource;
//! use kvxfer::proto::wire::ChunkSpec;
//! use kvxfer::{Agent, ChunkKey, Geometry, Receiver, ReceiverConfig, RequestId, Sender, SenderConfig};
//! use std::time::Duration;
//!
//! # fn main() -> kvxfer::Result<()> {
//! const WAIT: Duration = Duration::from_secs(10);
//! let geometry = Geometry { model: "a-model".into(), page_bytes: 64 << 10, ..Geometry::default() };
//!
//! // The decoder's process: a pool of 16 pages.
//! let decoder = Agent::builder().name("decoder").listen("tcp://127.0.0.1:0").build()?;
//! let config = ReceiverConfig { pages: 16, geometry: geometry.clone(), ..ReceiverConfig::default() };
//! let receiver = Receiver::new(&decoder, config)?;
//!
//! // The prefiller's: a full chunk and a partial one, of which only the valid bytes travel.
//! let prefiller = Agent::builder().name("prefiller").build()?;
//! let region = prefiller.allocate(128 << 10)?;
//! region.memory().write_at(65_536, &[7; 1000])?;
//! let config = SenderConfig { geometry, ..SenderConfig::default() };
//! let sender = Sender::connect(&prefiller, &decoder.addresses()[0], config, WAIT)?;
//!
//! let chunks = vec![
//!     ChunkSpec { key: ChunkKey::new("chunk-0")?, len: 65_536 },
//!     ChunkSpec { key: ChunkKey::new("chunk-1")?, len: 1000 },
//! ];
//! let request = RequestId::new("request-1")?;
//! let reservation = sender.reserve(request, chunks, Some(WAIT))?;
//! reservation.wait_admitted(WAIT)?; // all its pages at once, or an error that says why
//! reservation.write(0, ChunkSource::new(region.clone(), vec![(0, 65_536)]))?;
//! reservation.write(1, ChunkSource::new(region.clone(), vec![(65_536, 1000)]))?;
//! let report = reservation.finish().wait(WAIT)?;
//! assert_eq!((report.written, report.bytes), (2, 66_536));
//!
//! // Published means complete and checked. The chunk is pinned until it is dropped.
//! let chunk = receiver.acquire(&ChunkKey::new("chunk-1")?)?;
//! let mut bytes = vec![0; chunk.len() as usize];
//! chunk.read_at(0, &mut bytes)?;
//! assert_eq!(bytes, [7; 1000]);
//! # Ok(())
//! # }
//! ```
//!
//! # Errors
//!
//! There is one type, [`Error`]. Its text names the value and the remedy, [`Error::code`] is the stable number that peers and C see,
//! and [`Error::is_retryable`] tells whether to try again.

pub mod c;

pub use kvxfer_core::*;
