//! Memory that can be registered: shared (memfd), anonymous and foreign host memory, and device memory.
//!
//! A [`Memory`] is a range of bytes that other processes may read and write while it is registered, so it is
//! never lent as a plain Rust slice by a safe function: safe access copies in or out.
//!
//! Shared memory is complete when [`Memory::shared`] returns: every page is reserved (a full machine is an error
//! here, not a `SIGBUS` in the middle of a transfer) and the file is sealed against shrinking and growing, which the
//! importing side insists on, so that no peer can pull mapped pages away. What a seal cannot forbid is a hole punched
//! into a writable file by its owner; the pages are then allocated anew on access, zero-filled.
//!
//! `fork` keeps working: shared pools stay shared with the child, anonymous memory becomes copy-on-write. No
//! `MADV_DONTFORK` is set, because a child that only reads is legitimate; a child must not submit transfers.

mod device;
mod limits;
#[cfg(feature = "cuda")]
mod numa;
mod shared;

#[cfg(feature = "cuda")]
pub(crate) use numa::near_node;

use crate::cuda::{Block, Pin};
use crate::{Error, Result};
use parking_lot::Mutex;
use rustix::mm::{MapFlags, ProtFlags};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, Weak};

/// Where memory came from; decides which transports can reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// A memfd that can be passed to peers on the same host.
    Memfd,
    /// Private anonymous memory of this process.
    Anonymous,
    /// Memory owned by somebody else in this process (a torch tensor, say).
    Foreign,
    /// A GPU's memory, allocated here.
    Device,
    /// A GPU's memory, owned by somebody else in this process.
    ForeignDevice,
}

/// Whether a memfd pool uses huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Never.
    Never,
    /// When the system has them (explicit ones first, then transparent ones by advice).
    #[default]
    Try,
    /// Fail when there are none.
    Require,
}

/// The pages that a range of memory really got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// The system's base pages (or not known: foreign memory).
    Base,
    /// Transparent huge pages, for at least half of the range at the time it was made.
    Transparent,
    /// Explicit huge pages (`MFD_HUGETLB`).
    Explicit,
}

/// A range of host or device memory, mapped for as long as this value lives.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    kind: MemoryKind,
    paging: Paging,
    fd: Option<OwnedFd>,
    /// Registered with the CUDA driver. Dropped before the mapping it is about.
    pin: OnceLock<Pin>,
    /// `Some` for device memory, which the host cannot touch.
    block: Option<Block>,
    /// `None` for foreign and for device memory.
    mapping: Option<Mapping>,
}

// SAFETY: `Memory` is an address range plus its owner; it hands out a raw pointer and copies, never references, so
// sharing it between threads promises nothing about the bytes. Foreign memory: the promise of `Memory::foreign`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// A shareable pool of `len` bytes (rounded up to whole pages inside; `len()` stays as asked), zero-filled and
    /// reserved in full.
    pub fn shared(len: usize, huge: HugePages) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        let pool = shared::create(len, huge)?;
        let memory = Arc::new(Self {
            base: pool.mapping.base,
            len,
            kind: MemoryKind::Memfd,
            paging: pool.paging,
            fd: Some(pool.fd),
            pin: OnceLock::new(),
            block: None,
            mapping: Some(pool.mapping),
        });
        let mut known = SHARED.lock();
        known.retain(|_, m| m.strong_count() > 0);
        known.insert(memory.base.as_ptr() as usize, Arc::downgrade(&memory));
        drop(known);
        Ok(memory)
    }

    /// The memory that [`Memory::shared`] made of exactly these bytes, if it still lives.
    pub fn shared_at(base: usize, len: usize) -> Option<Arc<Self>> {
        let memory = SHARED.lock().get(&base)?.upgrade()?;
        (len == memory.len).then_some(memory)
    }

    /// Maps a memfd received from a peer. Refused unless it is sealed against shrinking and holds `len` bytes:
    /// otherwise its owner could make every access here fatal.
    pub fn from_fd(fd: OwnedFd, len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        let pool = shared::open(fd, len)?;
        let memory = Arc::new(Self {
            base: pool.mapping.base,
            len,
            kind: MemoryKind::Memfd,
            paging: pool.paging,
            fd: Some(pool.fd),
            pin: OnceLock::new(),
            block: None,
            mapping: Some(pool.mapping),
        });
        shared::populate_beside(&memory);
        Ok(memory)
    }

    /// Private memory of this process, zero-filled; pages are allocated at first touch, huge ones where the system
    /// gives them on advice.
    pub fn anonymous(len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        let mapped = round_up(len, rustix::param::page_size());
        // SAFETY: a new private mapping at an address of the kernel's choice; nothing existing is replaced.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|e| Error::system(format!("mmap of {mapped} anonymous bytes"), e, OUT_OF_MEMORY))?;
        let mapping = Mapping::new(base, mapped)?;
        // A refusal (no transparent huge pages here) costs speed only.
        let _ = mapping.advise(libc::MADV_HUGEPAGE);
        Ok(Arc::new(Self {
            base: mapping.base,
            len,
            kind: MemoryKind::Anonymous,
            paging: Paging::Base,
            fd: None,
            pin: OnceLock::new(),
            block: None,
            mapping: Some(mapping),
        }))
    }

    /// Memory owned by the caller.
    ///
    /// # Safety
    /// `base..base + len` must be readable and writable, and must stay valid until the returned value and every
    /// clone of its `Arc` are gone (each [`crate::Region`] over it keeps one until it and its transfers have ended).
    /// Nobody may hold a Rust reference into it while transfers run on it.
    pub unsafe fn foreign(base: *mut u8, len: usize) -> Result<Arc<Self>> {
        let len = checked_len(len)?;
        let base = NonNull::new(base).ok_or_else(|| Error::InvalidArgument {
            argument: "base",
            problem: "the address of foreign memory is null".into(),
        })?;
        if (base.as_ptr() as usize).checked_add(len).is_none() {
            return Err(Error::InvalidArgument {
                argument: "len",
                problem: format!("{len} bytes from {:p} wrap around the address space", base.as_ptr()),
            });
        }
        Ok(Arc::new(Self {
            base,
            len,
            kind: MemoryKind::Foreign,
            paging: Paging::Base,
            fd: None,
            pin: OnceLock::new(),
            block: None,
            mapping: None,
        }))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Never true: zero-length memory is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Where it came from.
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }
    /// The pages it got.
    pub fn paging(&self) -> Paging {
        self.paging
    }
    /// First byte. Valid for [`Memory::len`] bytes while `self` lives; for device memory an address that only the device's
    /// copies and kernels can use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
    /// The memfd behind it, if any.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Copies `out.len()` bytes from `offset` on; range-checked. Device memory: waits for the device.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let from = self.range(offset, out.len() as u64)?;
        if let Some(block) = &self.block {
            return block.read(offset, out);
        }
        // SAFETY: `range` checked that `out.len()` bytes from `offset` lie inside this mapping, which `self` keeps
        // alive. `copy` allows overlap, should `out` lie in foreign memory against its owner's promise.
        unsafe { std::ptr::copy(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies the bytes of all `runs` (offset and length) one after the other; they fill `out` exactly. Device memory: one visit
    /// to the device for all of them.
    pub(crate) fn read_runs(&self, runs: &[(u64, u64)], out: &mut [u8]) -> Result<()> {
        debug_assert_eq!(runs.iter().map(|r| r.1).sum::<u64>(), out.len() as u64);
        for (offset, len) in runs {
            self.range(*offset, *len)?;
        }
        if let Some(block) = &self.block {
            return block.read_runs(runs, out);
        }
        let mut rest = out;
        for (offset, len) in runs {
            let (now, later) = rest.split_at_mut(*len as usize);
            self.read_at(*offset, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `bytes` to `offset`; range-checked. Device memory: waits for the device.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let to = self.range(offset, bytes.len() as u64)?;
        if let Some(block) = &self.block {
            return block.write(offset, bytes);
        }
        // SAFETY: as in `read_at`.
        unsafe { std::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Address of `offset` once `offset..offset + len` is known to lie inside.
    pub(crate) fn range(&self, offset: u64, len: u64) -> Result<*mut u8> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len as u64 => Ok(self.as_ptr().wrapping_add(offset as usize)),
            _ => Err(Error::OutOfRange { what: "memory".into(), offset, len, limit: self.len as u64 }),
        }
    }
}

/// Shared memory made by this process, by its address.
static SHARED: Mutex<BTreeMap<usize, Weak<Memory>>> = Mutex::new(BTreeMap::new());

/// A mapping this process made; dropping it unmaps.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    fn new(base: *mut std::ffi::c_void, bytes: usize) -> Result<Self> {
        NonNull::new(base.cast()).map(|base| Self { base, bytes }).ok_or_else(|| {
            Error::system(
                "mmap",
                crate::error::SystemError(libc::EINVAL),
                "the kernel mapped address zero; check vm.mmap_min_addr",
            )
        })
    }

    /// `madvise` over the whole mapping; the errno is the error. Only for advice that discards nothing.
    fn advise(&self, advice: i32) -> Result<(), i32> {
        self.advise_part(0, self.bytes, advice)
    }

    /// The same for `len` bytes from `offset` on, a multiple of the page size.
    fn advise_part(&self, offset: usize, len: usize, advice: i32) -> Result<(), i32> {
        debug_assert!([libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE].contains(&advice));
        assert!(
            offset <= self.bytes && len <= self.bytes - offset,
            "{len} bytes at {offset} of {}",
            self.bytes
        );
        // SAFETY: the range is this mapping's own, and the two kinds of advice given here change no byte of it.
        if unsafe { libc::madvise(self.base.as_ptr().wrapping_add(offset).cast(), len, advice) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping with this length and is the last to use it.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) } {
            tracing::error!(error = %e, bytes = self.bytes, "munmap failed");
        }
    }
}

const OUT_OF_MEMORY: &str = "ask for less, or give the machine or container more memory";

fn checked_len(len: usize) -> Result<usize> {
    // One page of room so that rounding up cannot overflow.
    if len == 0 || len > isize::MAX as usize - (1 << 30) {
        return Err(Error::InvalidArgument {
            argument: "len",
            problem: format!("{len} bytes of memory; at least 1 and at most {} are possible", isize::MAX),
        });
    }
    Ok(len)
}

/// `len` rounded up to a multiple of `unit`, a power of two.
fn round_up(len: usize, unit: usize) -> usize {
    (len + unit - 1) & !(unit - 1)
}

#[cfg(test)]
mod tests;
