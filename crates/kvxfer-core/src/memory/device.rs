//! Device memory, and host memory pinned for devices.

use super::{Memory, MemoryKind, Paging, checked_len};
use crate::cuda::{Block, Device, Pin};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

static PINNING: Mutex<()> = Mutex::new(());

impl Memory {
    /// `len` zero bytes on a device. Peers on this host reach them by a CUDA IPC handle.
    pub fn device(device: &Device, len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        Self::from_block(Block::allocate(device, len)?, len, MemoryKind::Device)
    }

    /// The same from the driver's virtual memory management (rounded up to its pages of 2 MiB inside): peers get a file descriptor,
    /// which also goes where CUDA IPC handles do not.
    pub fn device_shareable(device: &Device, len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        Self::from_block(Block::shareable(device, len)?, len, MemoryKind::Device)
    }

    /// Device memory owned by the caller (a torch tensor's `data_ptr()`, say). The driver is asked what it is: host memory, managed
    /// memory, memory that was freed and a length beyond the allocation are refused.
    ///
    /// # Safety
    /// It must stay allocated until the returned value and every clone of its `Arc` are gone.
    pub unsafe fn device_foreign(base: u64, len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        // SAFETY: the caller's promise.
        let block = unsafe { Block::foreign(base, len) }?;
        Self::from_block(block, len, MemoryKind::ForeignDevice)
    }

    /// Part of another process's device memory, mapped here.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_opened(
        opened: &Arc<crate::cuda::Opened>,
        offset: u64,
        len: usize,
    ) -> Option<Arc<Self>> {
        Self::from_block(Block::opened(opened, offset, len)?, len, MemoryKind::ForeignDevice).ok()
    }

    fn from_block(block: Block, len: usize, kind: MemoryKind) -> Result<Arc<Self>> {
        let base = NonNull::new(block.base() as *mut u8).ok_or_else(|| Error::InvalidArgument {
            argument: "device pointer",
            problem: "the address is zero".into(),
        })?;
        Ok(Arc::new(Self {
            base,
            len,
            kind,
            paging: Paging::Base,
            fd: None,
            pin: OnceLock::new(),
            block: Some(block),
            mapping: None,
        }))
    }

    /// Registers host memory with the CUDA driver, for every device: `cuda_ipc` and staged transfers then copy from and to it
    /// directly. Takes about a third of a second a gibibyte; done once, later calls do nothing. Ends with the memory.
    pub fn pin(&self) -> Result<()> {
        if self.is_device() || self.pin.get().is_some() {
            return Ok(());
        }
        if !matches!(self.kind, MemoryKind::Memfd | MemoryKind::Anonymous | MemoryKind::Foreign) {
            return Err(Error::failed(
                ErrorCode::Unsupported,
                format!("{:?} memory cannot be pinned", self.kind),
            ));
        }
        // One at a time: of two registrations of the same memory the driver refuses the second, and the first must be the one kept.
        let _one = PINNING.lock();
        if self.pin.get().is_none() {
            // SAFETY: mapped for as long as `self` lives, and the pin goes first.
            let pin = unsafe { Pin::new(&Device::any()?, self.as_ptr() as usize, self.len) }?;
            let _ = self.pin.set(pin);
        }
        Ok(())
    }

    /// True once [`Memory::pin`] has succeeded.
    pub fn is_pinned(&self) -> bool {
        self.pin.get().is_some()
    }

    /// True for a GPU's memory, which no host code can touch.
    pub fn is_device(&self) -> bool {
        self.block.is_some()
    }

    /// The device it lies on.
    pub fn on_device(&self) -> Option<&Device> {
        self.block.as_ref().map(Block::device)
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn block(&self) -> Option<&Block> {
        self.block.as_ref()
    }
}
