//! The one guard every call passes through: no panic crosses into C, every failure leaves its text.

use super::result::{KVXFER_CLOSED, KVXFER_PANIC, kvxfer_result_t, number};
use super::{error, handle};
use kvxfer_core::Result;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What the inside of a call answers: a number (`KVXFER_OK`, `KVXFER_IN_PROGRESS`, ...) or an error with its
/// text.
pub(super) type Answer = Result<kvxfer_result_t>;

/// Runs the body of the C function `name`.
pub(super) fn guard(name: &'static str, body: impl FnOnce() -> Answer) -> kvxfer_result_t {
    if handle::forked() {
        error::remember_text(
            name,
            "this process was forked after its parent had started an agent; threads and connections do not \
             survive a fork: start agents in the child before the parent does, or exec after fork",
        );
        return KVXFER_CLOSED;
    }
    // Unwind safety: a body keeps no state of its own, and what it shares is behind locks that do not poison.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(result)) => result,
        Ok(Err(e)) => {
            error::remember(name, &e);
            number(e.code())
        }
        Err(payload) => {
            error::remember_text(name, &format!("panic caught, a bug in kvxfer: {}", words(&*payload)));
            // Dropping the payload runs foreign code, which may panic as well.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
            KVXFER_PANIC
        }
    }
}

fn words(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::c::error::kvxfer_last_error;
    use crate::c::result::{KVXFER_NOT_FOUND, KVXFER_OK};
    use kvxfer_core::Error;
    use std::ffi::CStr;

    fn last() -> String {
        // SAFETY: the pointer is valid until this thread's next failure.
        unsafe { CStr::from_ptr(kvxfer_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn panics_become_a_result_with_their_message() {
        assert_eq!(guard("kvxfer_test", || panic!("went {}", "wrong")), KVXFER_PANIC);
        assert_eq!(last(), "kvxfer_test: panic caught, a bug in kvxfer: went wrong");
        assert_eq!(guard("kvxfer_test", || std::panic::panic_any(7)), KVXFER_PANIC);
        assert!(last().ends_with("(no message)"));
    }

    #[test]
    fn a_payload_that_panics_when_dropped_is_contained() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        assert_eq!(guard("kvxfer_test", || std::panic::panic_any(Bomb)), KVXFER_PANIC);
    }

    #[test]
    fn failures_keep_their_text_and_successes_leave_it() {
        let e = Error::NotFound { what: "region", name: "kv\0x".into() };
        assert_eq!(guard("kvxfer_test", || Err(e)), KVXFER_NOT_FOUND);
        assert!(last().starts_with("kvxfer_test: region \"kv"));
        assert_eq!(guard("kvxfer_test", || Ok(KVXFER_OK)), KVXFER_OK);
        assert!(last().starts_with("kvxfer_test: region"));
    }
}
