//! How much of what arrives is checked before it is published (Contract line 1).

use serde::{Deserialize, Serialize};

/// Level of the check between a chunk's arrival and its publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Integrity {
    /// Nothing beside the protocol's own bookkeeping.
    Off = 0,
    /// Request, key, length and page generation, plus sampled cache lines.
    Bound = 1,
    /// Every byte, bound to the same ids.
    Full = 2,
}

/// Bytes of one segment of a fully checked chunk: small enough to stay in a core's cache between copy and hash.
pub const SEGMENT: u64 = 256 << 10;
