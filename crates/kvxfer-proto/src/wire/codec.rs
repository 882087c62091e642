//! Encoding and decoding of one message, with every limit checked in both directions.

use super::{
    MAX_CHUNKS, MAX_FRAME, MAX_NOTIFICATION, MAX_OFFERS, MAX_PAYLOAD, MAX_PROOF, MAX_QUERY, MAX_TEXT,
    Message, RegionAdvert,
};
use crate::{ErrorCode, Geometry};
use serde::de::{IgnoredAny, MapAccess, Visitor};

/// A message that may not travel, or bytes that are not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The encoded message is larger than a frame may be.
    #[error(
        "a message of {len} bytes; a frame holds at most {MAX_FRAME} (split the request or shorten its keys)"
    )]
    FrameTooLarge {
        /// Length in bytes.
        len: usize,
    },
    /// A count or length inside the message is beyond its limit.
    #[error("{what}: {value} is beyond the limit of {limit}")]
    Limit {
        /// Which field.
        what: &'static str,
        /// Its count or length.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A message type of another version.
    #[error("unknown message type {name:?}; the peer speaks a newer protocol than this build")]
    UnknownType {
        /// Its name, at most 64 characters of it.
        name: String,
    },
    /// Not a message: truncated, of the wrong shape, or with a value that is not allowed.
    #[error("not a valid message: {problem}")]
    Malformed {
        /// What the decoder stumbled on.
        problem: String,
    },
}

impl WireError {
    /// The code for the peer and the caller.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::FrameTooLarge { .. } => ErrorCode::TooLarge,
            _ => ErrorCode::Protocol,
        }
    }
}

/// Encodes a message, without the length prefix of its frame.
pub fn encode(message: &Message) -> Result<Vec<u8>, WireError> {
    check(message)?;
    let bytes =
        rmp_serde::to_vec_named(message).map_err(|e| WireError::Malformed { problem: e.to_string() })?;
    if bytes.len() > MAX_FRAME {
        return Err(WireError::FrameTooLarge { len: bytes.len() });
    }
    Ok(bytes)
}

/// Decodes one frame's payload. Trailing bytes are refused.
pub fn decode(payload: &[u8]) -> Result<Message, WireError> {
    if payload.len() > MAX_FRAME {
        return Err(WireError::FrameTooLarge { len: payload.len() });
    }
    let mut rest = payload;
    let message: Message = match rmp_serde::from_read(&mut rest) {
        Ok(message) => message,
        Err(e) => {
            return Err(match type_name(payload) {
                Some(name) if !TYPES.contains(&name.as_str()) => {
                    WireError::UnknownType { name: name.chars().take(64).collect() }
                }
                _ => WireError::Malformed { problem: e.to_string() },
            });
        }
    };
    if !rest.is_empty() {
        return Err(WireError::Malformed { problem: format!("{} bytes after the message", rest.len()) });
    }
    check(&message)?;
    Ok(message)
}

/// Names of all messages, as on the wire.
const TYPES: [&str; 34] = [
    "hello",
    "auth",
    "offers",
    "welcome",
    "refuse",
    "region_query",
    "region_info",
    "unexported",
    "notify",
    "attach",
    "attached",
    "detach",
    "reserve",
    "advance",
    "recall",
    "return",
    "extend",
    "extended",
    "grant",
    "resolved",
    "refused",
    "commit",
    "committed",
    "ready",
    "abort",
    "revoke",
    "renew",
    "query",
    "found",
    "release",
    "released",
    "ping",
    "pong",
    "bye",
];

/// The message's name, if the payload has the shape of one.
fn type_name(payload: &[u8]) -> Option<String> {
    struct Name;
    impl<'de> Visitor<'de> for Name {
        type Value = String;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a message's name")
        }
        fn visit_str<E>(self, name: &str) -> Result<String, E> {
            Ok(name.to_owned())
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
            let name = map.next_key::<String>()?.unwrap_or_default();
            let _ = map.next_value::<IgnoredAny>();
            Ok(name)
        }
    }
    let mut de = rmp_serde::Deserializer::from_read_ref(payload);
    serde::Deserializer::deserialize_any(&mut de, Name).ok()
}

fn limit(what: &'static str, value: usize, limit: usize) -> Result<(), WireError> {
    if value > limit {
        return Err(WireError::Limit { what, value: value as u64, limit: limit as u64 });
    }
    Ok(())
}

/// Limits that the types themselves do not enforce (ids check their own length).
fn check(message: &Message) -> Result<(), WireError> {
    match message {
        Message::Hello(hello) => {
            limit("hello.library", hello.library.len(), MAX_TEXT)?;
            limit("hello.challenge", hello.challenge.len(), MAX_PROOF)?;
            limit("hello.host.boot_id", hello.host.boot_id.len(), MAX_TEXT)?;
            limit("hello.host.side_socket", hello.host.side_socket.len(), MAX_TEXT)
        }
        Message::Auth { mac } => limit("auth.mac", mac.len(), MAX_PROOF),
        Message::Offers { session, offers } => {
            limit("offers.session", session.len(), MAX_PROOF)?;
            limit("offers", offers.len(), MAX_OFFERS)?;
            offers.iter().try_for_each(|o| {
                limit("offer.transport", o.transport.len(), MAX_TEXT)?;
                limit("offer.payload", o.payload.len(), MAX_PAYLOAD)
            })
        }
        Message::RegionQuery { name, .. } => limit("region_query.name", name.len(), MAX_TEXT),
        Message::RegionInfo { region, .. } => region.as_ref().map_or(Ok(()), advert),
        Message::Notify { payload } => limit("notify.payload", payload.len(), MAX_NOTIFICATION),
        Message::Attach { pool, geometry, .. } => {
            limit("attach.pool", pool.len(), MAX_TEXT)?;
            let Geometry { model, dtype, layout, hash_seed, .. } = geometry;
            [model, dtype, layout, hash_seed]
                .into_iter()
                .try_for_each(|s| limit("attach.geometry", s.len(), MAX_TEXT))
        }
        Message::Attached { region, text, .. } => {
            limit("attached.text", text.len(), MAX_TEXT)?;
            region.as_ref().map_or(Ok(()), advert)
        }
        Message::Reserve { chunks, more, places, .. } => {
            limit("reserve.chunks", chunks.len().saturating_add(*more as usize), MAX_CHUNKS)?;
            limit("reserve.places", places.len(), MAX_CHUNKS)
        }
        Message::Advance { pages, .. } | Message::Return { pages, .. } => {
            limit("pages", pages.len(), MAX_CHUNKS)
        }
        Message::Extend { first, chunks, .. } => {
            limit("extend.chunks", chunks.len().saturating_add(*first as usize), MAX_CHUNKS)
        }
        Message::Extended { first, slots, .. } => {
            limit("extended.slots", slots.len().saturating_add(*first as usize), MAX_CHUNKS)
        }
        Message::Grant { slots, .. } => limit("grant.slots", slots.len(), MAX_CHUNKS),
        Message::Query { keys, .. } => limit("query.keys", keys.len(), MAX_QUERY),
        Message::Found { chunks, text, .. } => {
            limit("found.chunks", chunks.len(), MAX_QUERY)?;
            limit("found.text", text.len(), MAX_TEXT)
        }
        Message::Refuse { text, .. }
        | Message::Detach { text, .. }
        | Message::Refused { text, .. }
        | Message::Revoke { text, .. }
        | Message::Bye { reason: text } => limit("text", text.len(), MAX_TEXT),
        Message::Welcome
        | Message::Unexported { .. }
        | Message::Resolved { .. }
        | Message::Commit { .. }
        | Message::Committed { .. }
        | Message::Ready { .. }
        | Message::Abort { .. }
        | Message::Renew { .. }
        | Message::Recall { .. }
        | Message::Release { .. }
        | Message::Released { .. }
        | Message::Ping { .. }
        | Message::Pong { .. } => Ok(()),
    }
}

fn advert(region: &RegionAdvert) -> Result<(), WireError> {
    limit("region.name", region.name.len(), MAX_TEXT)?;
    limit("region.tickets", region.tickets.len(), MAX_OFFERS)?;
    region.tickets.iter().try_for_each(|t| {
        limit("ticket.transport", t.transport.len(), MAX_TEXT)?;
        limit("ticket.payload", t.payload.len(), MAX_PAYLOAD)
    })
}
