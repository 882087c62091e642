//! The numbers every call answers with: one per [`ErrorCode`], never renumbered, never reused.

use kvxfer_core::ErrorCode;
use std::ffi::{CStr, c_char};

/// Outcome of a call: `KVXFER_OK` or the reason for the failure. Numbers are never reused; a newer library may
/// answer with a number this header does not name, so treat an unknown one as a failure.
pub type kvxfer_result_t = u32;

/// The operation succeeded.
pub const KVXFER_OK: kvxfer_result_t = 0;
/// An argument is malformed: NULL, a freed handle, empty, too long, or self-contradictory.
pub const KVXFER_INVALID_ARGUMENT: kvxfer_result_t = 1;
/// Nothing of that name or key exists here (now). Retryable.
pub const KVXFER_NOT_FOUND: kvxfer_result_t = 2;
/// The deadline passed first. Retryable.
pub const KVXFER_TIMED_OUT: kvxfer_result_t = 3;
/// Cancelled by the caller or by the peer. Retryable.
pub const KVXFER_CANCELLED: kvxfer_result_t = 4;
/// The peer ended or was replaced by a newer epoch while the operation was under way. Retryable.
pub const KVXFER_PEER_GONE: kvxfer_result_t = 5;
/// The peer cannot be reached: refused, no route, name not resolved. Retryable.
pub const KVXFER_UNREACHABLE: kvxfer_result_t = 6;
/// Both sides differ in version, geometry, page size, model or dtype.
pub const KVXFER_MISMATCH: kvxfer_result_t = 7;
/// The peer did not prove that it holds the pre-shared key.
pub const KVXFER_UNAUTHENTICATED: kvxfer_result_t = 8;
/// An offset and length do not lie inside the region or page.
pub const KVXFER_OUT_OF_RANGE: kvxfer_result_t = 9;
/// No capacity now: pool, queue or window is full. Retryable.
pub const KVXFER_NO_CAPACITY: kvxfer_result_t = 10;
/// It can never fit: larger than the pool, the frame limit, the page, or the caller's buffer.
pub const KVXFER_TOO_LARGE: kvxfer_result_t = 11;
/// Bytes arrived damaged; nothing was published. Retryable.
pub const KVXFER_CORRUPT: kvxfer_result_t = 12;
/// A library, driver or kernel feature is absent or of another version.
pub const KVXFER_NOT_AVAILABLE: kvxfer_result_t = 13;
/// The transport failed underneath. Retryable.
pub const KVXFER_TRANSPORT: kvxfer_result_t = 14;
/// The peer sent something that the protocol does not allow.
pub const KVXFER_PROTOCOL: kvxfer_result_t = 15;
/// The address or port is in use. Retryable.
pub const KVXFER_ADDRESS_IN_USE: kvxfer_result_t = 16;
/// The operating system refused; the text carries its errno. Retryable.
pub const KVXFER_SYSTEM: kvxfer_result_t = 17;
/// The agent or channel is shut down, or this process was forked from the one that made the handle.
pub const KVXFER_CLOSED: kvxfer_result_t = 18;
/// A panic was caught at the C boundary: a bug in kvxfer, please report it.
pub const KVXFER_PANIC: kvxfer_result_t = 19;
/// The handle is in use and cannot be freed or changed now. Retryable.
pub const KVXFER_BUSY: kvxfer_result_t = 20;
/// This transport, memory kind, option or struct version cannot do that.
pub const KVXFER_UNSUPPORTED: kvxfer_result_t = 21;
/// The page, grant or lease is of an earlier generation. Retryable.
pub const KVXFER_STALE: kvxfer_result_t = 22;
/// Still under way. Retryable.
pub const KVXFER_IN_PROGRESS: kvxfer_result_t = 23;
/// A configured transport requirement is not met.
pub const KVXFER_REQUIREMENT: kvxfer_result_t = 24;
/// A peer answered with a number that this version does not know.
pub const KVXFER_UNKNOWN: kvxfer_result_t = 65535;

macro_rules! table {
    ($($constant:ident = $code:ident, $name:literal;)*) => {
        $(const _: () = assert!($constant == ErrorCode::$code as u32);)*

        /// Every number with its name, in the order of the numbers.
        pub(super) const TABLE: &[(kvxfer_result_t, &CStr)] = &[$(($constant, $name)),*];
    };
}

table! {
    KVXFER_OK = Ok, c"ok";
    KVXFER_INVALID_ARGUMENT = InvalidArgument, c"invalid_argument";
    KVXFER_NOT_FOUND = NotFound, c"not_found";
    KVXFER_TIMED_OUT = TimedOut, c"timed_out";
    KVXFER_CANCELLED = Cancelled, c"cancelled";
    KVXFER_PEER_GONE = PeerGone, c"peer_gone";
    KVXFER_UNREACHABLE = Unreachable, c"unreachable";
    KVXFER_MISMATCH = Mismatch, c"mismatch";
    KVXFER_UNAUTHENTICATED = Unauthenticated, c"unauthenticated";
    KVXFER_OUT_OF_RANGE = OutOfRange, c"out_of_range";
    KVXFER_NO_CAPACITY = NoCapacity, c"no_capacity";
    KVXFER_TOO_LARGE = TooLarge, c"too_large";
    KVXFER_CORRUPT = Corrupt, c"corrupt";
    KVXFER_NOT_AVAILABLE = NotAvailable, c"not_available";
    KVXFER_TRANSPORT = Transport, c"transport";
    KVXFER_PROTOCOL = Protocol, c"protocol";
    KVXFER_ADDRESS_IN_USE = AddressInUse, c"address_in_use";
    KVXFER_SYSTEM = System, c"system";
    KVXFER_CLOSED = Closed, c"closed";
    KVXFER_PANIC = Panic, c"panic";
    KVXFER_BUSY = Busy, c"busy";
    KVXFER_UNSUPPORTED = Unsupported, c"unsupported";
    KVXFER_STALE = Stale, c"stale";
    KVXFER_IN_PROGRESS = InProgress, c"in_progress";
    KVXFER_REQUIREMENT = Requirement, c"requirement";
    KVXFER_UNKNOWN = Unknown, c"unknown";
}

/// A code of the core as its number in C.
pub(super) fn number(code: ErrorCode) -> kvxfer_result_t {
    u32::from(u16::from(code))
}

/// A number from C as a code; one this version does not know reads as [`ErrorCode::Unknown`].
pub(super) fn code(number: kvxfer_result_t) -> ErrorCode {
    u16::try_from(number).map_or(ErrorCode::Unknown, ErrorCode::from)
}

/// Short name of a result, e.g. `"timed_out"`, for logs and metrics. Never NULL, never to be freed; a number
/// this version does not know is `"unknown"`.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_result_name(result: kvxfer_result_t) -> *const c_char {
    TABLE.iter().find(|(n, _)| *n == result).map_or(c"unknown", |(_, name)| name).as_ptr()
}

/// True when the same call may succeed later or with another peer; false when repeating it cannot help (and for
/// `KVXFER_OK`).
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_result_is_retryable(result: kvxfer_result_t) -> bool {
    code(result).is_retryable()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_core_has_its_number_and_name() {
        assert_eq!(TABLE.len(), ErrorCode::ALL.len());
        for (&(n, name), &c) in TABLE.iter().zip(ErrorCode::ALL) {
            assert_eq!(n, number(c));
            assert_eq!(name.to_str(), Ok(c.as_str()));
            assert_eq!(code(n), c);
            assert_eq!(kvxfer_result_is_retryable(n), c.is_retryable());
        }
        assert_eq!(code(70_000), ErrorCode::Unknown);
    }
}
