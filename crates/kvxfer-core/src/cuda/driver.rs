//! The driver library: found, loaded and initialised once; its errors in words.

use crate::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use kvxfer_proto::ErrorCode;
use std::ffi::CStr;
use std::sync::OnceLock;

/// The driver of this process.
#[derive(Debug)]
pub(crate) struct Driver {
    /// As CUDA counts: 12080 is 12.8.
    pub(crate) version: i32,
    /// One call for many copies (CUDA 12.8).
    pub(crate) batch: bool,
}

/// Oldest CUDA version of a driver that is used (R525).
const OLDEST: i32 = 12_000;

/// What the code around this calls without asking first. A library without one of them is refused in words, where the binding
/// would panic.
const NEEDED: [&str; 47] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetPCIBusId",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxEnablePeerAccess",
    "cuCtxGetStreamPriorityRange",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuPointerGetAttributes",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuMemRetainAllocationHandle",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuMemcpyAsync",
    "cuStreamCreateWithPriority",
    "cuStreamWaitEvent",
    "cuEventRecord",
    "cuModuleLoadDataEx",
    "cuLaunchKernel",
    "cuLaunchHostFunc",
];

/// The driver, loaded at the first call. The same answer ever after: a machine does not get a driver while a process runs.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let found = load();
            match &found {
                Ok(d) => tracing::debug!(version = d.version, batch = d.batch, "CUDA driver"),
                Err(e) => tracing::info!(reason = %e, "working without CUDA"),
            }
            found
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// Whether there is a driver library that fits, without waking it: a process that never touches device memory stays free to fork.
pub(crate) fn library() -> Result<()> {
    static LIBRARY: OnceLock<Result<()>> = OnceLock::new();
    LIBRARY.get_or_init(find).clone()
}

fn absent(text: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::NotAvailable, format!("CUDA not available: {text}"))
}

fn has(name: &str) -> bool {
    // SAFETY: only called once the library was found; the symbol is looked up and not called.
    unsafe { sys::culib().get::<*const ()>(name.as_bytes()) }.is_ok()
}

fn find() -> Result<()> {
    // SAFETY: opens the driver library, whose initialisers are NVIDIA's; nothing of it is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(absent("libcuda.so.1 cannot be loaded; it comes with the NVIDIA driver"));
    }
    if let Some(missing) = NEEDED.iter().find(|n| !has(n)) {
        return Err(absent(format!(
            "the driver library lacks {missing}; a driver of CUDA {}.{} or newer is needed",
            OLDEST / 1000,
            OLDEST % 1000 / 10
        )));
    }
    Ok(())
}

fn load() -> Result<Driver> {
    library()?;
    // SAFETY: the documented first call; it takes flags that must be zero.
    let result = unsafe { sys::cuInit(0) };
    if result != CUresult::CUDA_SUCCESS {
        let advice = match result {
            CUresult::CUDA_ERROR_NO_DEVICE => {
                "; no device is visible: check CUDA_VISIBLE_DEVICES and nvidia-smi"
            }
            _ => "",
        };
        return Err(absent(format!("cuInit: {}{advice}", text(result))));
    }
    let mut version = 0;
    // SAFETY: the driver is initialised and the pointer is to a live integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if version < OLDEST {
        return Err(absent(format!(
            "the driver is of CUDA {}.{}, {}.{} is the oldest that works; update the NVIDIA driver",
            version / 1000,
            version % 1000 / 10,
            OLDEST / 1000,
            OLDEST % 1000 / 10
        )));
    }
    Ok(Driver { version, batch: has("cuMemcpyBatchAsync") })
}

/// Whether somebody in this process (torch, the CUDA runtime, we) has initialised the driver.
pub(crate) fn is_awake() -> bool {
    use libloading::os::unix::{Library, RTLD_LAZY};
    // SAFETY: with this flag a library is found if it is loaded already, and nothing is run.
    let loaded = unsafe { Library::open(Some("libcuda.so.1"), RTLD_LAZY | libc::RTLD_NOLOAD) };
    if loaded.is_err() || library().is_err() {
        return false;
    }
    let mut count = 0;
    // SAFETY: the pointer is to a live integer; before `cuInit` the call answers so and does nothing.
    let result = unsafe { sys::cuDeviceGetCount(&raw mut count) };
    result == CUresult::CUDA_SUCCESS && count > 0
}

/// CUDA's own name and text of a result.
pub(crate) fn text(result: CUresult) -> String {
    let lookup = |f: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut p = std::ptr::null();
        // SAFETY: the function writes a pointer to a static string, or leaves it null.
        let known = unsafe { f(result, &raw mut p) } == CUresult::CUDA_SUCCESS && !p.is_null();
        // SAFETY: checked above; such strings are NUL-terminated and live as long as the library.
        known.then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned())
    };
    match (lookup(sys::cuGetErrorName), lookup(sys::cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{name} ({text})"),
        _ => format!("CUDA error {}", result as u32),
    }
}

/// The error of a call that did not succeed.
pub(crate) fn error(call: impl std::fmt::Display, result: CUresult) -> Error {
    use CUresult as R;
    let (code, advice) = match result {
        R::CUDA_ERROR_OUT_OF_MEMORY => (
            ErrorCode::NoCapacity,
            "; the device (or pinned memory) is full: ask for less, or lower the engine's gpu_memory_utilization",
        ),
        R::CUDA_ERROR_NO_DEVICE | R::CUDA_ERROR_INVALID_DEVICE => {
            (ErrorCode::NotAvailable, "; check CUDA_VISIBLE_DEVICES and nvidia-smi")
        }
        R::CUDA_ERROR_NOT_SUPPORTED | R::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED => (ErrorCode::Unsupported, ""),
        R::CUDA_ERROR_CONTEXT_IS_DESTROYED | R::CUDA_ERROR_INVALID_CONTEXT => {
            (ErrorCode::Transport, "; the device's context was destroyed or reset under kvxfer")
        }
        R::CUDA_ERROR_INVALID_VALUE | R::CUDA_ERROR_INVALID_HANDLE => (ErrorCode::InvalidArgument, ""),
        _ => (ErrorCode::Transport, ""),
    };
    Error::failed(code, format!("{call}: {}{advice}", text(result)))
}

/// A call's result as ours.
pub(crate) fn check(call: impl std::fmt::Display, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(error(call, result)) }
}

/// For destructors: what fails there is told to the log and no one else.
pub(crate) fn check_drop(call: &str, result: CUresult) {
    // At the end of the process the driver may be gone before the last value: nothing is left to release then.
    if !matches!(
        result,
        CUresult::CUDA_SUCCESS
            | CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
    ) {
        tracing::warn!(error = text(result), "{call}");
    }
}
