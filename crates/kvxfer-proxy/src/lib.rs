//! The disaggregated-prefill proxy: one `OpenAI` endpoint in front of prefillers and decoders.
//!
//! A request goes to a prefiller for its first token, waits until the decoder holds its KV cache, and continues at the
//! decoder; the client sees one answer, as from a single server. What is decided without a socket lives in pure modules
//! (the router, [`openai`], [`stats`]); the server drives them.
#![forbid(unsafe_code)]

mod admin;
pub mod config;
pub mod dashboard;
mod health;
pub mod metrics;
mod notify;
pub mod openai;
pub mod router;
pub mod server;
pub mod stats;
mod tls;
mod upstream;

pub use config::{Config, ConfigError, Flags};
pub use server::{Handle, Server, StartError, serve, start};
