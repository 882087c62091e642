//! Device memory across processes: CUDA IPC handles, or file descriptors of virtual memory where no handle goes.
//!
//! A handle stands for a whole allocation, so the offset of the region in it travels beside it (torch's caching allocator
//! hands out parts of large allocations). Opened allocations are kept in one table per process: several regions of one allocation
//! share an opening, whoever imports them. The driver gives an allocation a number that is never used again
//! (`CU_POINTER_ATTRIBUTE_BUFFER_ID`); it is part of the key, so that memory freed and allocated anew at the peer under an equal handle
//! is not mistaken for the old.

use super::block::Block;
use super::device::Device;
use super::driver::{check, check_drop};
use super::engine::{Engine, Kept};
use super::vmm::{self, Mapped};
use crate::{Error, Result};
use cudarc::driver::sys;
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock, Weak};

/// Bytes of a CUDA IPC handle.
pub(crate) const HANDLE: usize = 64;

/// What another process needs to map a block.
#[derive(Debug)]
pub(crate) struct Export {
    /// The device it lies on.
    pub(crate) uuid: [u8; 16],
    /// The driver's number of the allocation.
    pub(crate) buffer: u64,
    /// Where the block begins in it.
    pub(crate) offset: u64,
    /// Bytes of the allocation.
    pub(crate) size: u64,
    pub(crate) way: Way,
}

/// How it travels.
#[derive(Debug)]
pub(crate) enum Way {
    Handle([u8; HANDLE]),
    Descriptor(OwnedFd),
}

/// An allocation of another process, mapped here.
#[derive(Debug)]
pub(crate) struct Opened {
    device: Device,
    base: u64,
    size: u64,
    mapped: Option<Mapped>,
    engine: Kept,
}

type Key = ([u8; 16], u64, [u8; HANDLE]);
static OPENED: LazyLock<Mutex<HashMap<Key, Weak<Opened>>>> = LazyLock::new(Mutex::default);

/// Start and length of the allocation that an address lies in. A context is current.
fn allocation_of(address: u64) -> Result<(u64, u64)> {
    let (mut start, mut size) = (0, 0);
    // SAFETY: two pointers to live integers; the driver checks the address.
    check("cuMemGetAddressRange", unsafe {
        sys::cuMemGetAddressRange_v2(&raw mut start, &raw mut size, address)
    })?;
    Ok((start, size as u64))
}

/// Makes a block reachable for other processes of this host.
pub(crate) fn export(block: &Block, len: usize) -> Result<Export> {
    let device = block.device();
    let uuid = device.uuid();
    if let Some(mapped) = block.mapped() {
        let way = Way::Descriptor(mapped.export()?);
        return Ok(Export { uuid, buffer: 0, offset: 0, size: mapped.bytes() as u64, way });
    }
    let here = device.enter()?;
    let (start, size) = allocation_of(block.base())?;
    let offset = block.base() - start;
    if offset + len as u64 > size {
        return Err(Error::failed(
            ErrorCode::Unsupported,
            format!(
                "the region of {len} bytes spans several allocations, and one handle stands for one; register each by itself \
                 (torch: turn expandable_segments off)"
            ),
        ));
    }
    let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE] };
    // SAFETY: the pointer is to a live handle; the driver checks the address.
    let by_handle = check("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&raw mut handle, start) });
    let mut buffer = 0u64;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
    // SAFETY: the attribute is a 64-bit number, and so is what is pointed to.
    check("cuPointerGetAttribute", unsafe {
        sys::cuPointerGetAttribute((&raw mut buffer).cast(), attribute, start)
    })?;
    drop(here);
    let way = match by_handle {
        Ok(()) => Way::Handle(handle.reserved.map(|b| b as u8)),
        // Virtual memory has no handle. Its owner may have allowed descriptors.
        Err(refused) => match vmm::export_foreign(device, start) {
            Ok(fd) => Way::Descriptor(fd),
            Err(also) => {
                return Err(Error::failed(
                    ErrorCode::Unsupported,
                    format!("this device memory cannot be shared with other processes ({refused}; {also})"),
                ));
            }
        },
    };
    Ok(Export { uuid, buffer, offset, size, way })
}

impl Opened {
    /// Maps what `export` described; a handle that is open already is shared.
    pub(crate) fn open(export: &Export) -> Result<Arc<Self>> {
        let device = Device::with_uuid(&export.uuid)?;
        let handle = match &export.way {
            Way::Handle(h) => *h,
            Way::Descriptor(fd) => {
                let bytes = usize::try_from(export.size).unwrap_or(usize::MAX);
                let mapped = Mapped::import(&device, fd, bytes)?;
                let base = mapped.base();
                let (size, mapped, engine) = (export.size, Some(mapped), Kept::default());
                return Ok(Arc::new(Self { device, base, size, mapped, engine }));
            }
        };
        let key = (export.uuid, export.buffer, handle);
        let mut opened = OPENED.lock();
        opened.retain(|_, o| o.strong_count() > 0);
        if let Some(known) = opened.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let here = device.enter()?;
        let raw = sys::CUipcMemHandle { reserved: handle.map(|b| b as std::ffi::c_char) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: the pointer is to a live integer; the driver checks the handle.
        check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, raw, flags) })?;
        drop(here);
        let mut this = Self { device, base, size: 0, mapped: None, engine: Kept::default() };
        // The owner's word on the size is not enough: what was mapped is asked for.
        let here = this.device.enter()?;
        let asked = allocation_of(base);
        drop(here);
        let (start, size) = asked?;
        this.size = size - (base - start);
        let this = Arc::new(this);
        opened.insert(key, Arc::downgrade(&this));
        Ok(this)
    }

    /// Whether opening the same export again gives this one. Of a descriptor nobody can tell what an earlier one was; to keep its mapping
    /// would only keep the peer's memory.
    pub(crate) fn is_found_again(&self) -> bool {
        self.mapped.is_none()
    }
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
    /// What copies on its device.
    pub(crate) fn engine(&self) -> Result<Arc<Engine>> {
        self.engine.get(&self.device)
    }
    pub(crate) fn base(&self) -> u64 {
        self.base
    }
    /// Bytes that are mapped.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.mapped.is_none()
            && let Ok(_here) = self.device.enter()
        {
            // SAFETY: opened here, by this value alone; transfers that used it have ended.
            check_drop("cuIpcCloseMemHandle", unsafe { sys::cuIpcCloseMemHandle(self.base) });
        }
    }
}
