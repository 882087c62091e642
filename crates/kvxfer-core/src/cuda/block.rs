//! Device memory: allocated, shareable (VMM), or somebody else's; and host memory pinned for the devices.

use super::device::Device;
use super::driver::{self, check, check_drop};
use super::engine::{Engine, Kept};
use super::ipc::Opened;
use super::stream::Stream;
use super::vmm::Mapped;
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUpointer_attribute as A, CUresult};
use std::sync::{Arc, OnceLock};

/// A range of a device's memory.
#[derive(Debug)]
pub(crate) struct Block {
    device: Device,
    base: u64,
    len: usize,
    /// For reads and writes of single runs; made when first wanted.
    stream: OnceLock<Stream>,
    engine: Kept,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    /// `cuMemAlloc`.
    Allocated,
    /// Virtual memory management: can be given away as a file descriptor.
    Shareable(Mapped),
    /// Somebody else frees it.
    Foreign,
    /// Part of another process's allocation, mapped here as long as this lives.
    Opened(Arc<Opened>),
}

/// Host memory registered with the driver until this is dropped: copies from and to it need no bounce buffer and do not block.
#[derive(Debug)]
pub(crate) struct Pin {
    base: usize,
    /// False when somebody else had registered it before.
    ours: bool,
    device: Device,
}

/// What the driver says of an address.
struct Pointer {
    kind: u32,
    ordinal: i32,
    context: u64,
    managed: bool,
    start: u64,
    size: u64,
}

impl Block {
    fn new(device: Device, base: u64, len: usize, owner: Owner) -> Self {
        Self { device, base, len, stream: OnceLock::new(), engine: Kept::default(), owner }
    }

    /// `len` bytes of zeros.
    pub(crate) fn allocate(device: &Device, len: usize) -> Result<Self> {
        let here = device.enter()?;
        let mut base = 0;
        // SAFETY: a context is current; the pointer is to a live integer.
        check(format_args!("cuMemAlloc of {len} bytes on {device}"), unsafe {
            sys::cuMemAlloc_v2(&raw mut base, len)
        })?;
        drop(here);
        let block = Self::new(device.clone(), base, len, Owner::Allocated);
        block.clear()?;
        Ok(block)
    }

    /// The same, and peers that no CUDA IPC handle reaches get a file descriptor.
    pub(crate) fn shareable(device: &Device, len: usize) -> Result<Self> {
        let mapped = Mapped::create(device, len)?;
        let base = mapped.base();
        let owner = Owner::Shareable(mapped);
        let block = Self::new(device.clone(), base, len, owner);
        block.clear()?;
        Ok(block)
    }

    /// Memory of another owner, after asking the driver what it is.
    ///
    /// # Safety
    /// It must stay allocated until the returned value is gone.
    pub(crate) unsafe fn foreign(base: u64, len: usize) -> Result<Self> {
        driver::driver()?;
        let refused = |problem: String| Error::InvalidArgument {
            argument: "device pointer",
            problem: format!("{base:#x}: {problem}"),
        };
        let end = base
            .checked_add(len as u64)
            .ok_or_else(|| refused(format!("{len} bytes from there wrap around the address space")))?;
        let first = Pointer::ask(base)?;
        first.must_be_device().map_err(refused)?;
        let device = Device::get(first.ordinal)?;
        if first.context != 0 && first.context != device.context() as u64 {
            return Err(refused(format!(
                "it was allocated in a context made by cuCtxCreate; kvxfer works in the primary context of {device}, as torch \
                 and the CUDA runtime do"
            )));
        }
        // One allocation, or several mapped side by side (expandable segments).
        let mut known = first.end();
        while known < end {
            let next = Pointer::ask(known)?;
            next.must_be_device()
                .and_then(|()| {
                    if next.ordinal == first.ordinal && next.end() > known {
                        Ok(())
                    } else {
                        Err("another device's".into())
                    }
                })
                .map_err(|why| {
                    refused(format!(
                        "{len} bytes were named, but its allocation ends after {}, and what follows is {why}",
                        known - base
                    ))
                })?;
            known = next.end();
        }
        Ok(Self::new(device, base, len, Owner::Foreign))
    }

    /// `len` bytes from `offset` on of what another process has shared; `None` beyond its end.
    pub(crate) fn opened(opened: &Arc<Opened>, offset: u64, len: usize) -> Option<Self> {
        let inside = offset <= opened.size() && len as u64 <= opened.size() - offset;
        inside.then(|| {
            let owner = Owner::Opened(opened.clone());
            Self::new(opened.device().clone(), opened.base() + offset, len, owner)
        })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
    pub(crate) fn base(&self) -> u64 {
        self.base
    }
    /// The mapping that can be given away, when it was made for that.
    pub(crate) fn mapped(&self) -> Option<&Mapped> {
        match &self.owner {
            Owner::Shareable(m) => Some(m),
            _ => None,
        }
    }

    /// What copies on its device.
    pub(crate) fn engine(&self) -> Result<Arc<Engine>> {
        match &self.owner {
            Owner::Opened(opened) => opened.engine(),
            _ => self.engine.get(&self.device),
        }
    }

    fn stream(&self) -> Result<&Stream> {
        if let Some(s) = self.stream.get() {
            return Ok(s);
        }
        let made = Stream::new(&self.device)?;
        Ok(self.stream.get_or_init(|| made))
    }

    fn clear(&self) -> Result<()> {
        let stream = self.stream()?;
        let here = self.device.enter()?;
        // SAFETY: the range is this value's own.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(self.base, 0, self.len, stream.raw()) })?;
        drop(here);
        stream.synchronize()
    }

    /// Copies out, blocking. The range lies inside (checked by the caller).
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.copy(out.as_mut_ptr() as u64, self.base + offset, out.len())
    }

    /// Copies in, blocking. The range lies inside (checked by the caller).
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.copy(self.base + offset, bytes.as_ptr() as u64, bytes.len())
    }

    /// Copies several runs out, one after the other, with one visit to the device. The runs lie inside (checked by the caller).
    pub(crate) fn read_runs(&self, runs: &[(u64, u64)], out: &mut [u8]) -> Result<()> {
        if let [(offset, _)] = runs {
            return self.read(*offset, out);
        }
        let sources: Vec<_> = runs.iter().map(|(offset, len)| (self.base + offset, *len)).collect();
        // SAFETY: the runs lie inside this block, which lives until the call has returned.
        unsafe { self.engine()?.collect(&sources, out) }
    }

    fn copy(&self, to: u64, from: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let stream = self.stream()?;
        let here = self.device.enter()?;
        // SAFETY: one side is a live Rust slice, borrowed until the copy has been waited for; the other lies inside this block.
        check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, len, stream.raw()) })?;
        drop(here);
        stream.synchronize()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Transfers hold the memory until they have ended. Of its own copies one may be queued still, when waiting for it failed.
        if let Some(stream) = self.stream.take()
            && let Err(e) = stream.synchronize()
        {
            tracing::debug!(error = %e, "before device memory is freed");
        }
        if matches!(self.owner, Owner::Allocated)
            && let Ok(_here) = self.device.enter()
        {
            // SAFETY: allocated here, and nobody else has it.
            check_drop("cuMemFree", unsafe { sys::cuMemFree_v2(self.base) });
        }
    }
}

impl Pin {
    /// Registers `len` bytes at `base` for every device.
    ///
    /// # Safety
    /// They must stay mapped until the returned value is gone.
    pub(crate) unsafe fn new(device: &Device, base: usize, len: usize) -> Result<Self> {
        let _here = device.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemHostRegister_v2(base as *mut _, len, flags) };
        let ours = match result {
            CUresult::CUDA_SUCCESS => true,
            CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED => false,
            other => {
                return Err(driver::error(format_args!("cuMemHostRegister of {len} bytes"), other));
            }
        };
        Ok(Self { base, ours, device: device.clone() })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.ours
            && let Ok(_here) = self.device.enter()
        {
            // SAFETY: registered here; transfers that used it have ended.
            check_drop("cuMemHostUnregister", unsafe { sys::cuMemHostUnregister(self.base as *mut _) });
        }
    }
}

/// Whether the driver knows the address as a device's.
pub(super) fn is_device(address: u64) -> bool {
    Pointer::ask(address).is_ok_and(|p| p.must_be_device().is_ok())
}

impl Pointer {
    fn ask(at: u64) -> Result<Self> {
        let mut wanted = [
            A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            A::CU_POINTER_ATTRIBUTE_CONTEXT,
            A::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            A::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            A::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        ];
        // The widest of them is a pointer; narrower ones leave the rest zero.
        let mut found = [0u64; 6];
        let mut data = found.each_mut().map(|f| std::ptr::from_mut(f).cast());
        // SAFETY: two arrays of the stated length; each entry has room for its attribute. Any address may be asked about: what is not
        // known to the driver reads as zero.
        check("cuPointerGetAttributes", unsafe {
            sys::cuPointerGetAttributes(wanted.len() as u32, wanted.as_mut_ptr(), data.as_mut_ptr(), at)
        })?;
        let [kind, ordinal, context, managed, start, size] = found;
        Ok(Self {
            kind: kind as u32,
            ordinal: ordinal as u32 as i32,
            context,
            managed: managed as u8 != 0,
            start,
            size,
        })
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    fn must_be_device(&self) -> Result<(), String> {
        if self.managed {
            return Err(
                "managed memory, which may move between host and device; allocate it with cuMemAlloc".into(),
            );
        }
        match self.kind {
            2 => Ok(()),
            1 => Err("pinned host memory, not device memory".into()),
            _ => Err("not device memory that the driver knows (host memory, or freed already?)".into()),
        }
    }
}
