//! Names and numbers that identify things, with their limits.

use serde::{Deserialize, Serialize};

/// Longest name of an agent or region, in bytes.
pub const MAX_NAME: usize = 128;
/// Longest request id, in bytes.
pub const MAX_REQUEST_ID: usize = 256;
/// Longest chunk key, in bytes (`LMCache`'s keys are `model@world@worker@hash@dtype`).
pub const MAX_KEY: usize = 512;

/// An id was refused because of its length or content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} has {len} bytes; 1 to {max} are allowed, without control characters")]
pub struct InvalidId {
    /// Which id.
    pub what: &'static str,
    /// Its length in bytes.
    pub len: usize,
    /// The limit.
    pub max: usize,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Checks the length and that no control character is in it.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidId> {
                let text = text.as_ref();
                if text.is_empty() || text.len() > $max || text.chars().any(char::is_control) {
                    return Err(InvalidId { what: $what, len: text.len(), max: $max });
                }
                Ok(Self(text.into()))
            }
            /// The text.
            pub fn as_str(&self) -> &str { &self.0 }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(s: String) -> Result<Self, InvalidId> { Self::new(s) }
        }
        impl TryFrom<&str> for $name {
            type Error = InvalidId;
            fn try_from(s: &str) -> Result<Self, InvalidId> { Self::new(s) }
        }
        impl From<$name> for String {
            fn from(id: $name) -> Self { id.0.to_string() }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(&self.0) }
        }
    };
}

text_id!(
    /// The configured name of an agent; stays the same over restarts, unlike its [`Epoch`].
    AgentName, "agent name", MAX_NAME
);
text_id!(
    /// One prompt's id, unique among the requests under way between two agents.
    RequestId, "request id", MAX_REQUEST_ID
);
text_id!(
    /// The content key of a chunk, made by the engine; equal keys mean equal bytes.
    ChunkKey, "chunk key", MAX_KEY
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { self.0.fmt(f) }
        }
    };
}

number_id!(
    /// New at each start of an agent and larger than the one before: nanoseconds since the Unix epoch at its start.
    Epoch(u64)
);
number_id!(
    /// A registered region of one agent.
    RegionId(u64)
);
number_id!(
    /// A transfer of one agent.
    TransferId(u64)
);
number_id!(
    /// A page of a receiver's pool.
    PageIndex(u32)
);
number_id!(
    /// How often a page has been handed out; a write or commit naming an older one is refused.
    Generation(u64)
);

/// A page and the generation it was handed out with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hold {
    /// Which page.
    pub page: PageIndex,
    /// Its generation.
    pub generation: Generation,
}
