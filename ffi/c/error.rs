//! The text of this thread's last failure.

use kvxfer_core::Error;
use std::cell::RefCell;
use std::ffi::{CString, c_char};

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Keeps `error` as this thread's text, prefixed with the function that failed.
pub(super) fn remember(function: &str, error: &Error) {
    remember_text(function, &error.to_string());
}

/// Same, for a text.
pub(super) fn remember_text(function: &str, text: &str) {
    // A NUL inside would cut the text short; none is expected, so it is made visible instead.
    let line = format!("{function}: {text}").replace('\0', "\u{2400}");
    let line = CString::new(line).unwrap_or_default();
    // At thread exit the slot may be gone already; then nobody can ask for the text either.
    let _ = LAST.try_with(|last| *last.borrow_mut() = line);
}

/// Text for humans of the last call that failed **on this thread**: which function, which argument, which
/// value and what to do about it. Never NULL; empty when nothing has failed yet. Calls that succeed leave it
/// as it is. The pointer is valid until the next call that fails on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
