//! What the stand-in driver tells of itself, and what it can be told. `None` or nothing on a real driver.
#![expect(unsafe_code, reason = "calls of a library that was loaded by name")]
#![allow(dead_code, reason = "each test uses a part of it")]

use std::ffi::{CString, c_char};

/// Calls a function of the stand-in, which is loaded already.
///
/// # Safety
/// `F` is the type of the function of that name.
unsafe fn with<F, T>(name: &[u8], call: impl FnOnce(&F) -> T) -> Option<T> {
    // SAFETY: the library was loaded before; the type by the caller's promise.
    unsafe {
        let driver = libloading::Library::new("libcuda.so.1").ok()?;
        let found = driver.get::<F>(name).ok()?;
        Some(call(&found))
    }
}

type Ask = unsafe extern "C" fn(*const c_char) -> i64;

fn ask(function: &[u8], about: &str) -> Option<i64> {
    let about = CString::new(about).unwrap();
    // SAFETY: both functions that are asked take a NUL-terminated text.
    unsafe { with(function, |f: &Ask| f(about.as_ptr())) }
}

/// How often a function of the driver was called.
pub(crate) fn calls(name: &str) -> Option<i64> {
    ask(b"kvxstandin_calls", name)
}

/// How many objects of a kind live.
pub(crate) fn live(kind: &str) -> Option<i64> {
    ask(b"kvxstandin_live", kind)
}

/// How often kernels have touched host memory.
pub(crate) fn kernel_host_accesses() -> Option<i64> {
    // SAFETY: it takes nothing.
    unsafe { with(b"kvxstandin_kernel_host_accesses", |f: &unsafe extern "C" fn() -> i64| f()) }
}

/// Before each later launch, 4 bytes are written at `offset` from the address that is word `word` of the first parameter.
pub(crate) fn poke(word: usize, offset: usize, value: u32) {
    type Poke = unsafe extern "C" fn(usize, usize, u32);
    // SAFETY: three numbers; the test knows what the parameter is.
    unsafe { with(b"kvxstandin_poke", |f: &Poke| f(word, offset, value)) }.expect("the stand-in driver");
}

pub(crate) fn poke_no_more() {
    // SAFETY: it takes nothing.
    unsafe { with(b"kvxstandin_poke_no_more", |f: &unsafe extern "C" fn()| f()) }
        .expect("the stand-in driver");
}

/// The `n`th call of that name from now on fails with `CUDA_ERROR_UNKNOWN`; 1 is the next one.
pub(crate) fn fails(call: &str, n: i64) {
    let at = calls(call).expect("the stand-in driver") + n;
    let plan = CString::new(format!("{call}:{at}:999")).unwrap();
    // SAFETY: it takes a NUL-terminated text.
    unsafe { with(b"kvxstandin_fail", |f: &unsafe extern "C" fn(*const c_char)| f(plan.as_ptr())) };
}
