//! The kernels of `kernels/*.cu`, loaded from the PTX that ships with the library, or as compiled for the device (`nvrtc`).

use super::device::Device;
use super::driver::{check, check_drop, text};
use super::stream::Stream;
use crate::gather::Params;
use crate::{Error, Result};
use cudarc::driver::sys;
use kvxfer_proto::ErrorCode;
use std::ffi::CString;

/// Loaded kernels of one device.
pub(crate) struct Kernels {
    device: Device,
    module: sys::CUmodule,
    copy: sys::CUfunction,
    /// With accesses of 16 bytes, and of 8.
    paged: [sys::CUfunction; 2],
}

// SAFETY: handles that the driver lets any thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// Of `kernels/*.cu`, for every device from compute capability 8.0 on; the driver makes the device's own code of it.
const PTX: &str = include_str!("../../kernels/ptx/compute_80.ptx");

/// An image that does not load.
struct Refused {
    error: Error,
    /// The driver did not like the image; it may like another one.
    another_may_do: bool,
}

/// Whether a driver says so because of the image: it is too old for the PTX, or lacks the compiler for it.
fn is_of_the_image(result: sys::CUresult) -> bool {
    use sys::CUresult as R;
    matches!(
        result,
        R::CUDA_ERROR_INVALID_IMAGE
            | R::CUDA_ERROR_NO_BINARY_FOR_GPU
            | R::CUDA_ERROR_INVALID_PTX
            | R::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | R::CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, another_may_do: false }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks a multiprocessor holds of it.
const BLOCKS: u32 = 8;

impl Kernels {
    /// From the image that was asked for, else the shipped one; where the driver does not take that, as compiled here, if possible.
    pub(crate) fn load(device: &Device) -> Result<Self> {
        if let Some(own) = super::nvrtc::for_device(device) {
            match Self::from_image(device, &own) {
                Ok(kernels) => return Ok(kernels),
                Err(e) => tracing::warn!(%device, %e, "kernels compiled for this device do not load"),
            }
        }
        let shipped = CString::new(PTX)
            .map_err(|_| Error::failed(ErrorCode::InvalidArgument, "PTX with a zero byte in it"))?;
        Self::from_image(device, shipped.as_bytes_with_nul()).or_else(|refused| {
            if !refused.another_may_do {
                return Err(refused.error);
            }
            tracing::info!(%device, error = %refused, "the driver does not take the shipped kernels");
            super::nvrtc::instead(device, |image| Self::from_image(device, image).map_err(|r| r.error))
                .map_err(|e| Error::failed(ErrorCode::NotAvailable, format!("{refused}; {e}")))
        })
    }

    /// `image`: PTX with a NUL at its end, or machine code.
    fn from_image(device: &Device, image: &[u8]) -> std::result::Result<Self, Refused> {
        let _here = device.enter()?;
        let mut log = vec![0u8; 8 << 10];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        let mut values = [log.as_mut_ptr().cast(), log.len() as *mut std::ffi::c_void];
        let mut module = std::ptr::null_mut();
        // SAFETY: NUL-terminated text, or an ELF file that says its own length; two options with the values the driver documents for them.
        let result = unsafe {
            sys::cuModuleLoadDataEx(
                &raw mut module,
                image.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        if result != sys::CUresult::CUDA_SUCCESS {
            let log = String::from_utf8_lossy(log.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
            let error = Error::failed(
                ErrorCode::NotAvailable,
                format!("the kernels do not load on {device}: {}: {}", text(result), log.trim()),
            );
            return Err(Refused { error, another_may_do: is_of_the_image(result) });
        }
        let mut this = Self {
            device: device.clone(),
            module,
            copy: std::ptr::null_mut(),
            paged: [std::ptr::null_mut(); 2],
        };
        this.copy = this.function("kvx_copy")?;
        this.paged = [this.function("kvx_paged16")?, this.function("kvx_paged8")?];
        Ok(this)
    }

    fn function(&self, name: &str) -> Result<sys::CUfunction> {
        let c_name = CString::new(name)
            .map_err(|_| Error::failed(ErrorCode::InvalidArgument, "a name with a zero byte in it"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module lives, the name is NUL-terminated.
        check(format_args!("cuModuleGetFunction({name})"), unsafe {
            sys::cuModuleGetFunction(&raw mut function, self.module, c_name.as_ptr())
        })?;
        Ok(function)
    }

    /// Moves between paged caches and chunks as `params` says, in about `items` parts.
    pub(crate) fn paged(&self, stream: &Stream, params: &Params, items: u64, wide: bool) -> Result<()> {
        let mut values = [std::ptr::from_ref(params).cast_mut().cast()];
        let warps = THREADS / 32;
        let grid = items.div_ceil(warps.into()).clamp(1, self.most().into()) as u32;
        let what = format_args!("launch of kvx_paged for {items} parts");
        // SAFETY: one parameter of the kernel's type; whoever made it has checked every range, and keeps the memories until the end.
        unsafe { self.launch(what, self.paged[usize::from(!wide)], stream, grid, &mut values) }
    }

    /// Copies `count` pieces whose descriptors lie at `descriptors`, in device-visible memory.
    pub(crate) fn copy(&self, stream: &Stream, mut descriptors: u64, count: usize) -> Result<()> {
        let mut count32 = count as u32;
        let mut values = [(&raw mut descriptors).cast(), (&raw mut count32).cast()];
        let what = format_args!("launch of kvx_copy for {count} pieces");
        // SAFETY: two parameters of the kernel's types; the addresses by the promise of `Engine::start`.
        unsafe { self.launch(what, self.copy, stream, self.most().min(count32.max(1)), &mut values) }
    }

    /// Blocks that the device runs at once.
    fn most(&self) -> u32 {
        self.device.processors() * BLOCKS
    }

    /// # Safety
    /// `values` point to as many live parameters as `function` of this module takes, of its types; they are copied. What they tell it to
    /// touch stays valid until the stream has done it.
    unsafe fn launch(
        &self,
        what: std::fmt::Arguments<'_>,
        function: sys::CUfunction,
        stream: &Stream,
        grid: u32,
        values: &mut [*mut std::ffi::c_void],
    ) -> Result<()> {
        let _here = self.device.enter()?;
        // SAFETY: the caller's promise; the module lives as long as `self`.
        check(what, unsafe {
            sys::cuLaunchKernel(
                function,
                grid,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.raw(),
                values.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: loaded here; the engine waits for its streams before it goes.
        check_drop("cuModuleUnload", unsafe { sys::cuModuleUnload(self.module) });
    }
}
