//! Virtual memory management: memory whose handle travels as a file descriptor, where a CUDA IPC handle cannot go.

use super::device::Device;
use super::driver::{check, check_drop};
use crate::{Error, Result};
use cudarc::driver::sys;
use kvxfer_proto::ErrorCode;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A physical allocation mapped into this process's device addresses.
#[derive(Debug)]
pub(crate) struct Mapped {
    device: Device,
    handle: sys::CUmemGenericAllocationHandle,
    base: u64,
    bytes: usize,
}

const FD: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Released unless it was handed on: the first half of a mapping.
struct Handle(sys::CUmemGenericAllocationHandle);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: this value's own reference.
        check_drop("cuMemRelease", unsafe { sys::cuMemRelease(self.0) });
    }
}

impl Mapped {
    /// `len` bytes, rounded up to the device's granularity.
    pub(crate) fn create(device: &Device, len: usize) -> Result<Self> {
        let _here = device.enter()?;
        let prop = properties(device);
        let mut unit = 0;
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: pointers to live values of these types.
        check("cuMemGetAllocationGranularity", unsafe {
            sys::cuMemGetAllocationGranularity(&raw mut unit, &raw const prop, option)
        })?;
        let bytes = len.checked_next_multiple_of(unit.max(1)).ok_or_else(|| Error::InvalidArgument {
            argument: "len",
            problem: format!("{len} bytes of device memory"),
        })?;
        let mut handle = 0;
        // SAFETY: as above.
        check(format_args!("cuMemCreate of {bytes} bytes on {device}"), unsafe {
            sys::cuMemCreate(&raw mut handle, bytes, &raw const prop, 0)
        })?;
        Self::map(device, Handle(handle), bytes)
    }

    /// Maps memory that came as a file descriptor, `bytes` long by its owner's word.
    pub(crate) fn import(device: &Device, fd: &OwnedFd, bytes: usize) -> Result<Self> {
        let _here = device.enter()?;
        let mut handle = 0;
        // SAFETY: the descriptor is passed by value in the pointer argument, as the driver documents for this type; it stays ours.
        check("cuMemImportFromShareableHandle", unsafe {
            sys::cuMemImportFromShareableHandle(&raw mut handle, fd.as_raw_fd() as usize as *mut _, FD)
        })?;
        Self::map(device, Handle(handle), bytes)
    }

    fn map(device: &Device, handle: Handle, bytes: usize) -> Result<Self> {
        let mut base = 0;
        // SAFETY: the pointer is to a live integer; the driver chooses the address.
        check(format_args!("cuMemAddressReserve of {bytes} bytes"), unsafe {
            sys::cuMemAddressReserve(&raw mut base, bytes, 0, 0, 0)
        })?;
        let access = sys::CUmemAccessDesc {
            location: location(device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: a range reserved above, a live handle; a size beyond the handle's is the driver's to refuse.
        let mut done = check(format_args!("cuMemMap of {bytes} bytes"), unsafe {
            sys::cuMemMap(base, bytes, 0, handle.0, 0)
        });
        if done.is_ok() {
            // SAFETY: the range mapped above, one live description.
            done = check("cuMemSetAccess", unsafe { sys::cuMemSetAccess(base, bytes, &raw const access, 1) });
            if done.is_err() {
                // SAFETY: mapped above.
                check_drop("cuMemUnmap", unsafe { sys::cuMemUnmap(base, bytes) });
            }
        }
        if let Err(e) = done {
            // SAFETY: reserved above, nothing is mapped there.
            check_drop("cuMemAddressFree", unsafe { sys::cuMemAddressFree(base, bytes) });
            return Err(e);
        }
        let mapped = Self { device: device.clone(), handle: handle.0, base, bytes };
        std::mem::forget(handle);
        Ok(mapped)
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
    /// A descriptor of the physical memory; it keeps that alive.
    pub(crate) fn export(&self) -> Result<OwnedFd> {
        export(&self.device, self.handle)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: mapped, reserved and held by this value; transfers that used it have ended.
        unsafe {
            check_drop("cuMemUnmap", sys::cuMemUnmap(self.base, self.bytes));
            check_drop("cuMemAddressFree", sys::cuMemAddressFree(self.base, self.bytes));
            check_drop("cuMemRelease", sys::cuMemRelease(self.handle));
        }
    }
}

/// A descriptor of somebody else's mapping that begins at `base` (torch's expandable segments).
pub(crate) fn export_foreign(device: &Device, base: u64) -> Result<OwnedFd> {
    let _here = device.enter()?;
    let mut handle = 0;
    // SAFETY: any address may be asked about; the pointer is to a live integer.
    check("cuMemRetainAllocationHandle", unsafe {
        sys::cuMemRetainAllocationHandle(&raw mut handle, base as *mut _)
    })?;
    export(device, Handle(handle).0)
}

fn export(device: &Device, handle: sys::CUmemGenericAllocationHandle) -> Result<OwnedFd> {
    let _here = device.enter()?;
    let mut fd = -1i32;
    // SAFETY: for this handle type the driver writes an int.
    check("cuMemExportToShareableHandle", unsafe {
        sys::cuMemExportToShareableHandle((&raw mut fd).cast(), handle, FD, 0)
    })?;
    if fd < 0 {
        return Err(Error::failed(ErrorCode::Transport, "cuMemExportToShareableHandle gave no descriptor"));
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn location(device: &Device) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.raw() }
}

fn properties(device: &Device) -> sys::CUmemAllocationProp {
    // SAFETY: a plain C structure for which all zeros is the documented starting point.
    let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = FD;
    prop.location = location(device);
    prop
}
