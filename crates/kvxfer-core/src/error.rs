//! One error type for the library; each variant names the values that matter and says what to do.

use kvxfer_proto::ErrorCode;
use std::time::Duration;

/// Result of the library's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. [`Error::code`] gives the stable number, [`Error::is_retryable`] whether to try again.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is malformed.
    #[error("{argument}: {problem}")]
    InvalidArgument {
        /// Name of the argument or configuration key.
        argument: &'static str,
        /// What is wrong with it, with the value.
        problem: String,
    },
    /// No such thing.
    #[error("{what} {name:?} not found")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A deadline passed.
    #[error("{operation} did not finish within {after:?}")]
    TimedOut {
        /// What was waited for.
        operation: String,
        /// The limit.
        after: Duration,
    },
    /// An offset and length outside the region.
    #[error("{what}: offset {offset} + length {len} does not lie within {limit} bytes")]
    OutOfRange {
        /// Which region, and the descriptor's index where known.
        what: String,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the region.
        limit: u64,
    },
    /// The operating system refused.
    #[error("{call}: {source} ({advice})")]
    System {
        /// What was tried, with its values.
        call: String,
        /// What the system said.
        source: SystemError,
        /// What to do about it.
        advice: &'static str,
    },
    /// Anything that is decided by protocol or peer: the code says what, the text names the values.
    #[error("{text}")]
    Failed {
        /// The code.
        code: ErrorCode,
        /// Names the values and the remedy.
        text: String,
    },
}

/// An errno that can be cloned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemError(pub i32);

impl std::fmt::Display for SystemError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}
impl std::error::Error for SystemError {}
impl From<std::io::Error> for SystemError {
    fn from(e: std::io::Error) -> Self {
        Self(e.raw_os_error().unwrap_or(libc::EIO))
    }
}
impl From<rustix::io::Errno> for SystemError {
    fn from(e: rustix::io::Errno) -> Self {
        Self(e.raw_os_error())
    }
}

impl Error {
    /// A failure with a code and a text.
    pub fn failed(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Failed { code, text: text.into() }
    }

    /// The operating system's refusal of `call`.
    pub fn system(call: impl Into<String>, source: impl Into<SystemError>, advice: &'static str) -> Self {
        Self::System { call: call.into(), source: source.into(), advice }
    }

    /// The stable code of this error.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidArgument { .. } => ErrorCode::InvalidArgument,
            Self::NotFound { .. } => ErrorCode::NotFound,
            Self::TimedOut { .. } => ErrorCode::TimedOut,
            Self::OutOfRange { .. } => ErrorCode::OutOfRange,
            Self::System { source, .. } => match source.0 {
                libc::EADDRINUSE => ErrorCode::AddressInUse,
                libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH => ErrorCode::Unreachable,
                _ => ErrorCode::System,
            },
            Self::Failed { code, .. } => *code,
        }
    }

    /// True when the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.code().is_retryable()
    }
}

impl From<kvxfer_proto::ids::InvalidId> for Error {
    fn from(e: kvxfer_proto::ids::InvalidId) -> Self {
        Self::InvalidArgument { argument: e.what, problem: e.to_string() }
    }
}
