//! Streams of our own, and events: ours, and those that order a transfer behind its producer's work.

use super::device::Device;
use super::driver::{self, check, check_drop};
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use kvxfer_proto::ErrorCode;
use std::sync::Arc;

/// A stream that does not synchronise with the legacy default stream.
#[derive(Debug)]
pub(crate) struct Stream {
    device: Device,
    raw: sys::CUstream,
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: streams are handles that the driver lets any thread use; it locks by itself.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: so are events.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// The moment at which a stream of the caller has done everything given to it so far: a transfer that carries one starts after
/// it, so that no half-written byte leaves. Cheap to clone.
#[derive(Clone)]
pub struct Fence(Arc<Event>);

impl Stream {
    /// With the highest priority there is: a transfer is short and somebody waits for it.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let (_, greatest) = device.priorities()?;
        let _here = device.enter()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a context is current; the pointer is to a live handle.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&raw mut raw, flags, greatest)
        })?;
        Ok(Self { device: device.clone(), raw })
    }
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }
    /// What is given to it from now on runs after `event`.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<()> {
        let _here = self.device.enter()?;
        // SAFETY: both handles live.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }
    /// Runs `then` on a thread of the driver once everything given to the stream so far has been done. It must be short and make no
    /// call of CUDA; it is not run when the device fails.
    pub(crate) fn when_done(&self, then: Box<dyn FnOnce() + Send>) -> Result<()> {
        unsafe extern "C" fn run(data: *mut std::ffi::c_void) {
            // SAFETY: made from such a box below, and given to the driver once.
            let then = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
            // A panic must not cross the driver.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(then)).is_err() {
                tracing::error!("a call at the end of a copy panicked");
            }
        }
        let data = Box::into_raw(Box::new(then)).cast();
        let _here = self.device.enter()?;
        // SAFETY: the function takes the pointer it is given here, once.
        let result = check("cuLaunchHostFunc", unsafe { sys::cuLaunchHostFunc(self.raw, Some(run), data) });
        if result.is_err() {
            // SAFETY: the driver did not take it.
            drop(unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) });
        }
        result
    }
    /// Blocks until it has done everything.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _here = self.device.enter()?;
        // SAFETY: the handle lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: made here, used by nobody any more. Work under way still completes, by the driver's promise.
        check_drop("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) });
    }
}

impl Event {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let _here = device.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a context is current; the pointer is to a live handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Self { device: device.clone(), raw })
    }
    /// Marks what `stream` has been given so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        let _here = self.device.enter()?;
        // SAFETY: both handles live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }
    /// Whether that has been done; an error of the work before it is this call's.
    pub(crate) fn is_done(&self) -> Result<bool> {
        let _here = self.device.enter()?;
        // SAFETY: the handle lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => Err(driver::error("cuEventQuery", other)),
        }
    }
    /// Blocks until it has been done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _here = self.device.enter()?;
        // SAFETY: the handle lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: made here, used by nobody any more; waits for it that are queued keep what they need.
        check_drop("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) });
    }
}

impl Fence {
    /// Marks what a stream of the caller has been given so far.
    ///
    /// `stream` is a `CUstream` (`cudaStream_t`, torch's `Stream.cuda_stream`) of device `ordinal`'s primary context, or 0 for
    /// its default stream.
    ///
    /// # Safety
    /// `stream` must be 0 or a live stream; the driver does not survive a stale handle.
    pub unsafe fn of_stream(ordinal: i32, stream: usize) -> Result<Self> {
        let device = Device::get(ordinal)?;
        let raw = stream as sys::CUstream;
        // The default streams (0, 1, 2) belong to whatever context is current.
        if stream > 2 {
            let mut context = std::ptr::null_mut();
            // SAFETY: the caller's promise; the pointer is to a live handle.
            check("cuStreamGetCtx", unsafe { sys::cuStreamGetCtx(raw, &raw mut context) })?;
            if context != device.context() {
                return Err(Error::failed(
                    ErrorCode::InvalidArgument,
                    format!(
                        "stream {stream:#x} does not belong to the primary context of {device}; make it on that device, \
                         in the context of cuDevicePrimaryCtxRetain (torch and the CUDA runtime do)"
                    ),
                ));
            }
        }
        let event = Event::new(&device)?;
        let here = device.enter()?;
        // SAFETY: the caller's promise, and an event made a moment ago.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw, raw) })?;
        drop(here);
        Ok(Self(Arc::new(event)))
    }

    /// Whether the producer's work has been done. An error of that work is an error here.
    pub fn is_done(&self) -> Result<bool> {
        self.0.is_done()
    }

    /// Blocks until the producer's work has been done.
    pub fn wait(&self) -> Result<()> {
        self.0.synchronize()
    }

    pub(crate) fn event(&self) -> &Event {
        &self.0
    }
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Fence").field(&self.0.device).finish()
    }
}
