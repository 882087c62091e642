//! Fences: transfers that start after what a CUDA stream has been given.

use super::args::Out;
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::result::{KVXFER_IN_PROGRESS, KVXFER_OK, kvxfer_result_t};
use kvxfer_core::Result;
use kvxfer_core::cuda::Fence;

/// A point in a CUDA stream. Usable from any thread.
pub struct kvxfer_fence_t {
    _opaque: [u8; 0],
}

/// What a fence's handle stands for.
pub(super) struct FenceObject(Fence);
object!(FenceObject, kvxfer_fence_t, FENCE);

/// The fence of a handle; none for NULL.
pub(super) fn fence(argument: &'static str, fence: *const kvxfer_fence_t) -> Result<Option<Fence>> {
    if fence.is_null() {
        return Ok(None);
    }
    Ok(Some(borrow::<FenceObject>(argument, fence)?.0.clone()))
}

/// Marks what `stream` has been given so far; a transfer or chunk that carries the fence is not read or written before that has been
/// done. `stream` is a `CUstream` or `cudaStream_t` of device `device`'s primary context as a number (torch:
/// `stream.cuda_stream`), 0 for its default stream; it must be live. The call does not wait. The fence may be used any
/// number of times and freed as soon as it has been handed over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_fence_new(
    device: i32,
    stream: u64,
    fence_out: *mut *mut kvxfer_fence_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks, and so is the stream.
    guard("kvxfer_fence_new", || unsafe {
        let out = Out::new("fence_out", fence_out)?;
        out.set(into_raw(FenceObject(Fence::of_stream(device, stream as usize)?))?);
        Ok(KVXFER_OK)
    })
}

/// `KVXFER_OK` once the stream has come past the fence, `KVXFER_IN_PROGRESS` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_fence_poll(fence: *const kvxfer_fence_t) -> kvxfer_result_t {
    guard("kvxfer_fence_poll", || {
        let fence = borrow::<FenceObject>("fence", fence)?;
        Ok(if fence.0.is_done()? { KVXFER_OK } else { KVXFER_IN_PROGRESS })
    })
}

/// Frees the handle. What carries the fence keeps it. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_fence_free(fence: *mut kvxfer_fence_t) -> kvxfer_result_t {
    guard("kvxfer_fence_free", || take::<FenceObject>("fence", fence).map(|_| KVXFER_OK))
}
