//! What a test does with the driver by itself, as an engine would.
#![expect(unsafe_code, reason = "calls of the driver")]

use cudarc::driver::sys;
use std::ffi::c_void;

fn check(result: sys::CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}

/// Device memory allocated in the primary context of a device, as torch does it.
pub(crate) struct Allocation {
    pub(crate) address: u64,
    device: i32,
}

/// Runs `body` with the primary context of a device current.
pub(crate) fn within<T>(device: i32, body: impl FnOnce() -> T) -> T {
    let mut context = std::ptr::null_mut();
    // SAFETY: plain calls with pointers to live values.
    unsafe {
        check(sys::cuInit(0));
        check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device));
        check(sys::cuCtxPushCurrent_v2(context));
    }
    let result = body();
    let mut popped = std::ptr::null_mut();
    // SAFETY: as above.
    unsafe {
        // A scenario may have destroyed the context.
        let _ = sys::cuCtxPopCurrent_v2(&raw mut popped);
        let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
    }
    result
}

/// Keeps the primary context: without anybody it ends, and everything in it.
fn retain(device: i32) {
    let mut context = std::ptr::null_mut();
    // SAFETY: plain calls with pointers to live values.
    unsafe {
        check(sys::cuInit(0));
        check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device));
    }
}
fn release(device: i32) {
    // SAFETY: retained before. A scenario may have destroyed it.
    let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) };
}

impl Allocation {
    pub(crate) fn new(device: i32, len: usize) -> Self {
        retain(device);
        let mut address = 0;
        // SAFETY: a pointer to a live integer.
        within(device, || check(unsafe { sys::cuMemAlloc_v2(&raw mut address, len) }));
        Self { address, device }
    }
    pub(crate) fn free(self) {
        // SAFETY: allocated by `new`.
        within(self.device, || check(unsafe { sys::cuMemFree_v2(self.address) }));
        release(self.device);
    }
}

/// A stream of the primary context.
pub(crate) struct Stream(pub(crate) sys::CUstream, i32);

impl Stream {
    pub(crate) fn new(device: i32) -> Self {
        let mut stream = std::ptr::null_mut();
        // SAFETY: a pointer to a live handle.
        within(device, || check(unsafe { sys::cuStreamCreate(&raw mut stream, 1) }));
        Self(stream, device)
    }
    pub(crate) fn address(&self) -> usize {
        self.0 as usize
    }
    /// Sleeps on the stream.
    pub(crate) fn sleep(&self, millis: u64) {
        unsafe extern "C" fn nap(millis: *mut c_void) {
            std::thread::sleep(std::time::Duration::from_millis(millis as u64));
        }
        // SAFETY: the function takes a number in the place of the pointer.
        check(unsafe { sys::cuLaunchHostFunc(self.0, Some(nap), millis as *mut c_void) });
    }
    /// Fills memory on the stream.
    pub(crate) fn fill(&self, address: u64, byte: u8, len: usize) {
        // SAFETY: the test's own memory.
        within(self.1, || check(unsafe { sys::cuMemsetD8Async(address, byte, len, self.0) }));
    }
    pub(crate) fn end(self) {
        // SAFETY: made by `new`.
        within(self.1, || unsafe {
            let _ = sys::cuStreamSynchronize(self.0);
            let _ = sys::cuStreamDestroy_v2(self.0);
        });
    }
}

/// Pinned host memory.
pub(crate) fn pinned(len: usize) -> u64 {
    retain(0);
    let mut p = std::ptr::null_mut();
    // SAFETY: a pointer to a live pointer.
    within(0, || check(unsafe { sys::cuMemHostAlloc(&raw mut p, len, 0) }));
    p as u64
}
pub(crate) fn free_pinned(address: u64) {
    // SAFETY: allocated by `pinned`.
    within(0, || check(unsafe { sys::cuMemFreeHost(address as *mut c_void) }));
    release(0);
}

/// A context that is not the primary one, with memory and a stream in it; and its end.
pub(crate) fn foreign_context(body: impl FnOnce(u64, usize)) {
    let (mut context, mut address, mut stream) = (std::ptr::null_mut(), 0, std::ptr::null_mut());
    // SAFETY: pointers to live values; everything is freed in reverse.
    unsafe {
        check(sys::cuInit(0));
        check(sys::cuCtxCreate_v2(&raw mut context, 0, 0));
        check(sys::cuMemAlloc_v2(&raw mut address, 4096));
        check(sys::cuStreamCreate(&raw mut stream, 1));
    }
    body(address, stream as usize);
    // SAFETY: as above.
    unsafe {
        check(sys::cuStreamDestroy_v2(stream));
        check(sys::cuMemFree_v2(address));
        check(sys::cuCtxDestroy_v2(context));
    }
}

/// Destroys the primary context under everybody.
pub(crate) fn reset(device: i32) {
    // SAFETY: the purpose of the test.
    check(unsafe { sys::cuDevicePrimaryCtxReset_v2(device) });
}
