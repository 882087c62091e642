//! The one table of outcomes, shared by the wire, the Rust errors and the C ABI.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $retry:literal, $text:literal;)*) => {
        /// Why an operation ended as it did. Numbers are never reused or renumbered; a retired one stays reserved.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(into = "u16", from = "u16")]
        #[non_exhaustive]
        #[repr(u16)]
        pub enum ErrorCode { $($(#[$doc])* $name = $number),* }

        impl ErrorCode {
            /// Every code, in the order of the numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// True when the same call may succeed later or with another peer; false when repeating it cannot help.
            pub const fn is_retryable(self) -> bool { match self { $(Self::$name => $retry),* } }

            /// A short name for humans, logs and metric labels.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $text),* } }
        }

        impl From<u16> for ErrorCode {
            /// An unknown number (from a newer peer) reads as [`ErrorCode::Unknown`].
            fn from(n: u16) -> Self { match n { $($number => Self::$name,)* _ => Self::Unknown } }
        }
    };
}

codes! {
    /// The operation succeeded.
    Ok = 0, false, "ok";
    /// An argument is malformed: null, empty, too long, or self-contradictory.
    InvalidArgument = 1, false, "invalid_argument";
    /// Nothing of that name or key exists here (now).
    NotFound = 2, true, "not_found";
    /// The deadline passed first.
    TimedOut = 3, true, "timed_out";
    /// Cancelled by the caller or by the peer.
    Cancelled = 4, true, "cancelled";
    /// The peer ended or was replaced by a newer epoch while the operation was under way.
    PeerGone = 5, true, "peer_gone";
    /// The peer cannot be reached: refused, no route, name not resolved.
    Unreachable = 6, true, "unreachable";
    /// Both sides differ in version, geometry, page size, model or dtype.
    Mismatch = 7, false, "mismatch";
    /// The peer did not prove that it holds the pre-shared key.
    Unauthenticated = 8, false, "unauthenticated";
    /// An offset and length do not lie inside the region or page.
    OutOfRange = 9, false, "out_of_range";
    /// No capacity now: pool, queue or window is full.
    NoCapacity = 10, true, "no_capacity";
    /// It can never fit: larger than the pool, the frame limit or the page.
    TooLarge = 11, false, "too_large";
    /// Bytes arrived damaged; nothing was published.
    Corrupt = 12, true, "corrupt";
    /// A library, driver or kernel feature is absent or of another version.
    NotAvailable = 13, false, "not_available";
    /// The transport failed underneath.
    Transport = 14, true, "transport";
    /// The peer sent something that the protocol does not allow.
    Protocol = 15, false, "protocol";
    /// The address or port is in use.
    AddressInUse = 16, true, "address_in_use";
    /// The operating system refused; the text carries its errno.
    System = 17, true, "system";
    /// The handle, agent or channel is closed.
    Closed = 18, false, "closed";
    /// A panic was caught at the C boundary: a bug here, please report it.
    Panic = 19, false, "panic";
    /// The handle is in use and cannot be freed or changed now.
    Busy = 20, true, "busy";
    /// This transport, memory kind or option cannot do that.
    Unsupported = 21, false, "unsupported";
    /// The page, grant or lease is of an earlier generation.
    Stale = 22, true, "stale";
    /// Still under way.
    InProgress = 23, true, "in_progress";
    /// A configured transport requirement is not met.
    Requirement = 24, false, "requirement";
    /// A number this version does not know.
    Unknown = 65_535, false, "unknown";
}

impl From<ErrorCode> for u16 {
    fn from(c: ErrorCode) -> Self {
        c as Self
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
