//! The C ABI, one file per object. `include/kvxfer.h` is generated from here and `docs/c-abi.md` states the
//! conventions once; this is how they are kept:
//!
//! - every call runs inside `panic::guard`, which stops panics, turns errors into numbers, keeps their text for
//!   `kvxfer_last_error()` and refuses to run in a forked child;
//! - every handle is a checked number in a table (`handle`), never an address;
//! - every pointer, length, text, struct and time-out goes through `args` before anything happens, and results are
//!   written last.
//!
//! Rust programs use the types of the crate root. The functions are public here for those that mix both
//! worlds: see [`agent_into_raw`].
#![allow(non_camel_case_types, reason = "C names, as the header shows them")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the promises of a C caller are the same everywhere: docs/c-abi.md, and the header's first lines"
)]

mod agent;
mod args;
mod config;
mod delivery;
mod error;
mod events;
mod fence;
mod gather;
mod handle;
mod lmcache;
mod log;
mod memory;
mod metrics;
mod notify;
mod outbox;
mod paged;
mod panic;
mod peer;
mod query;
mod receiver;
mod region;
mod result;
mod sender;
mod transfer;
mod version;

pub use agent::*;
pub use args::KVXFER_MAX_TIMEOUT_MS;
pub use config::*;
pub use delivery::*;
pub use error::kvxfer_last_error;
pub use events::*;
pub use fence::*;
pub use gather::*;
pub use lmcache::*;
pub use log::*;
pub use memory::*;
pub use metrics::*;
pub use notify::*;
pub use outbox::*;
pub use paged::*;
pub use peer::*;
pub use query::*;
pub use receiver::*;
pub use region::*;
pub use result::*;
pub use sender::*;
pub use transfer::*;
pub use version::*;
