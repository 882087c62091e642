//! The `OpenAI` face of the proxy, without any I/O: what a client asked, what each engine is sent, and how their
//! answers become the one answer a single server would have given.
//!
//! The way of a request: [`Request::parse`] reads the body once and keeps every field of it. Each prompt of the
//! request becomes a [`Leg`], once its tokens are known ([`Request::tokens`] says how). A leg's [`Plan`] says who
//! samples the first token; [`Leg::prefill_body`], [`Leg::continue_body`] and [`Leg::whole_body`] are what the
//! prefiller and the decoder are sent. [`StreamJoin`] and [`join_full`] put the answers together: ids, times,
//! usage, indexes, log probabilities and framing are those of one vLLM server.
//!
//! Nothing here blocks, reads a clock or knows a socket; everything takes bytes and gives bytes.

mod answer;
mod chat;
mod error;
mod full;
mod leg;
mod object;
mod plan;
mod request;
mod sse;
mod stream;

pub use answer::{FirstToken, Tokenized, Usage};
pub use error::ApiError;
pub use full::{LegAnswer, join_full};
pub use leg::{DisaggSpec, Leg, Next};
pub use object::Object;
pub use plan::Plan;
pub use request::{Chats, Endpoint, Limits, Request, TokenSource};
pub use sse::{Event, SseError, SseReader, write_event};
pub use stream::{LegProgress, StreamJoin};

/// Content type of a streamed answer, as vLLM sends it.
pub const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";
/// Content type of every other answer.
pub const JSON: &str = "application/json";
/// The data of the event that ends a stream.
pub const DONE: &str = "[DONE]";

/// What the joined answer calls itself, the same in every part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `cmpl-…` or `chatcmpl-…`; see [`Endpoint::id`].
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
}
