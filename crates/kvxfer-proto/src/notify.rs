//! What prefillers and decoders tell the proxy about a request's KV cache.
//!
//! The proxy binds a `ZeroMQ` PULL socket; the engines PUSH one message per event: a `MessagePack` map whose key `"type"`
//! names it. [`Notification::ProxyNotif`] is `LMCache`'s own message, byte for byte: it carries no rank, so its reader
//! counts one per tensor-parallel rank. [`Notification::KvReady`] and [`Notification::KvFailed`] are kvxfer's, on the same
//! socket: they name the rank, say what it took, and bring a failure to the one who can act on it. Keys that this version
//! does not know are skipped; everything else about a message is checked before anybody sees it.

use crate::ids::MAX_REQUEST_ID;
use serde::{Deserialize, Serialize};

/// Largest message, in bytes.
pub const MAX_MESSAGE: usize = 16 << 10;
/// Longest code of a failure, in bytes.
pub const MAX_CODE: usize = 64;
/// Longest text of a failure, in bytes.
pub const MAX_TEXT: usize = 4096;
/// Most tensor-parallel ranks of one instance; ranks count from 0.
pub const MAX_TP_RANKS: u32 = 1024;
/// Deepest nesting inside keys that are skipped.
const MAX_DEPTH: usize = 16;

/// One event of one request's KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type")]
#[non_exhaustive]
pub enum Notification {
    /// `LMCache`: one of the prefiller's ranks has written all it has of this request. Does not say which.
    ProxyNotif {
        /// The request, as in its `disagg_spec`.
        req_id: String,
    },
    /// One rank's KV cache is complete, checked and visible at the decoder.
    KvReady {
        /// The request, as in its `disagg_spec`.
        req_id: String,
        /// Tensor-parallel rank, from 0.
        tp_rank: u32,
        /// Bytes that were moved.
        bytes: u64,
        /// Microseconds from the first chunk handed over to the last one visible.
        took_us: u64,
    },
    /// One rank's KV cache will not arrive.
    KvFailed {
        /// The request, as in its `disagg_spec`.
        req_id: String,
        /// Tensor-parallel rank, from 0.
        tp_rank: u32,
        /// [`crate::ErrorCode::as_str`].
        code: String,
        /// For humans.
        message: String,
        /// Whether the same request may succeed when tried again.
        retryable: bool,
    },
}

/// Bytes that are no notification, or a notification that may not travel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// The message is larger than any of them can be.
    #[error("a notification of {len} bytes; at most {MAX_MESSAGE} are allowed")]
    TooLarge {
        /// Length in bytes.
        len: usize,
    },
    /// A string or number inside is beyond its limit.
    #[error("{what}: {value} is beyond the limit of {limit}")]
    Limit {
        /// Which field.
        what: &'static str,
        /// Its value, or its length in bytes.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A text that is empty or holds control characters where that is not allowed.
    #[error("{what} is empty or holds control characters")]
    Text {
        /// Which field.
        what: &'static str,
    },
    /// A message of another kind or a later version.
    #[error("unknown notification type {name:?}; known are ProxyNotif, KvReady and KvFailed")]
    UnknownType {
        /// Its name, at most 64 characters of it.
        name: String,
    },
    /// A key that this type needs is not there.
    #[error("{kind} without {key:?}")]
    Missing {
        /// The message's type.
        kind: &'static str,
        /// The missing key.
        key: &'static str,
    },
    /// Not a map of the expected shape, or cut off.
    #[error("not a notification: {problem}")]
    Malformed {
        /// What the decoder stumbled on.
        problem: String,
    },
}

impl Notification {
    /// The request this is about.
    pub fn req_id(&self) -> &str {
        match self {
            Self::ProxyNotif { req_id } | Self::KvReady { req_id, .. } | Self::KvFailed { req_id, .. } => {
                req_id
            }
        }
    }

    /// The rank, where the message names one.
    pub fn tp_rank(&self) -> Option<u32> {
        match self {
            Self::ProxyNotif { .. } => None,
            Self::KvReady { tp_rank, .. } | Self::KvFailed { tp_rank, .. } => Some(*tp_rank),
        }
    }

    /// Its name on the wire.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::ProxyNotif { .. } => "ProxyNotif",
            Self::KvReady { .. } => "KvReady",
            Self::KvFailed { .. } => "KvFailed",
        }
    }
}

/// Encodes one notification. The text of a failure is cut to [`MAX_TEXT`]; other limits are errors.
pub fn encode(notification: &Notification) -> Result<Vec<u8>, NotifyError> {
    let cut = match notification {
        Notification::KvFailed { req_id, tp_rank, code, message, retryable } if message.len() > MAX_TEXT => {
            let end = (0..=MAX_TEXT).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
            Some(Notification::KvFailed {
                req_id: req_id.clone(),
                tp_rank: *tp_rank,
                code: code.clone(),
                message: message[..end].to_owned(),
                retryable: *retryable,
            })
        }
        _ => None,
    };
    let notification = cut.as_ref().unwrap_or(notification);
    check(notification)?;
    rmp_serde::to_vec_named(notification).map_err(|e| NotifyError::Malformed { problem: e.to_string() })
}

/// Decodes one message. Unknown keys are skipped, bytes after the map are refused.
pub fn decode(payload: &[u8]) -> Result<Notification, NotifyError> {
    if payload.len() > MAX_MESSAGE {
        return Err(NotifyError::TooLarge { len: payload.len() });
    }
    // Only a map has names; the derived reader would take an array as the fields in order.
    if !matches!(payload.first(), Some(0x80..=0x8f | 0xde | 0xdf)) {
        return Err(NotifyError::Malformed { problem: "the message is not a MessagePack map".to_owned() });
    }
    let mut rest = payload;
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(MAX_DEPTH);
    let fields =
        Fields::deserialize(&mut reader).map_err(|e| NotifyError::Malformed { problem: e.to_string() })?;
    if !rest.is_empty() {
        return Err(NotifyError::Malformed { problem: format!("{} bytes after the message", rest.len()) });
    }
    let notification = fields.into_notification()?;
    check(&notification)?;
    Ok(notification)
}

/// Every key that any of the messages has.
#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "type")]
    kind: Option<String>,
    req_id: Option<String>,
    tp_rank: Option<u32>,
    bytes: Option<u64>,
    took_us: Option<u64>,
    code: Option<String>,
    message: Option<String>,
    retryable: Option<bool>,
}

impl Fields {
    fn into_notification(self) -> Result<Notification, NotifyError> {
        fn need<T>(kind: &'static str, key: &'static str, value: Option<T>) -> Result<T, NotifyError> {
            value.ok_or(NotifyError::Missing { kind, key })
        }
        match self.kind.as_deref() {
            None => Err(NotifyError::Missing { kind: "a message", key: "type" }),
            Some("ProxyNotif") => {
                Ok(Notification::ProxyNotif { req_id: need("ProxyNotif", "req_id", self.req_id)? })
            }
            Some("KvReady") => Ok(Notification::KvReady {
                req_id: need("KvReady", "req_id", self.req_id)?,
                tp_rank: need("KvReady", "tp_rank", self.tp_rank)?,
                bytes: need("KvReady", "bytes", self.bytes)?,
                took_us: need("KvReady", "took_us", self.took_us)?,
            }),
            Some("KvFailed") => Ok(Notification::KvFailed {
                req_id: need("KvFailed", "req_id", self.req_id)?,
                tp_rank: need("KvFailed", "tp_rank", self.tp_rank)?,
                code: need("KvFailed", "code", self.code)?,
                message: need("KvFailed", "message", self.message)?,
                retryable: need("KvFailed", "retryable", self.retryable)?,
            }),
            Some(other) => Err(NotifyError::UnknownType { name: other.chars().take(64).collect() }),
        }
    }
}

/// The limits, in both directions.
fn check(notification: &Notification) -> Result<(), NotifyError> {
    plain("req_id", notification.req_id(), MAX_REQUEST_ID)?;
    if let Some(rank) = notification.tp_rank()
        && rank >= MAX_TP_RANKS
    {
        return Err(NotifyError::Limit {
            what: "tp_rank",
            value: rank.into(),
            limit: (MAX_TP_RANKS - 1).into(),
        });
    }
    if let Notification::KvFailed { code, message, .. } = notification {
        plain("code", code, MAX_CODE)?;
        at_most("message", message.len(), MAX_TEXT)?;
    }
    Ok(())
}

fn plain(what: &'static str, text: &str, max: usize) -> Result<(), NotifyError> {
    at_most(what, text.len(), max)?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(NotifyError::Text { what });
    }
    Ok(())
}

fn at_most(what: &'static str, len: usize, max: usize) -> Result<(), NotifyError> {
    if len > max {
        return Err(NotifyError::Limit { what, value: len as u64, limit: max as u64 });
    }
    Ok(())
}
