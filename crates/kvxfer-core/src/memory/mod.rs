//! Memory that can be registered: shared (memfd), anonymous and foreign host memory.
//!
//! A [`Memory`] is a range of bytes that other processes may read and write while it is registered, so it is
//! never lent as a plain Rust slice by a safe function: safe access copies in or out.

use crate::Result;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

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

/// A range of host memory, mapped for as long as this value lives.
#[derive(Debug)]
pub struct Memory {
    base: std::ptr::NonNull<u8>,
    len: usize,
    kind: MemoryKind,
}

impl Memory {
    /// A shareable pool of `len` bytes (rounded up to whole pages inside; `len()` stays as asked).
    pub fn shared(_len: usize, _huge: HugePages) -> Result<Arc<Self>> {
        todo!("memory")
    }
    /// Maps a memfd received from a peer.
    pub fn from_fd(_fd: std::os::fd::OwnedFd, _len: usize) -> Result<Arc<Self>> {
        todo!("memory")
    }
    /// Private memory of this process.
    pub fn anonymous(_len: usize) -> Result<Arc<Self>> {
        todo!("memory")
    }
    /// Memory owned by the caller.
    ///
    /// # Safety
    /// `base..base + len` must be readable and writable, and must stay valid until the returned value and every
    /// clone of its `Arc` are gone (each [`crate::Region`] over it keeps one until it and its transfers have ended).
    /// Nobody may hold a Rust reference into it while transfers run on it.
    pub unsafe fn foreign(_base: *mut u8, _len: usize) -> Result<Arc<Self>> {
        todo!("memory")
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
    /// First byte. Valid for [`Memory::len`] bytes while `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
    /// The memfd behind it, if any.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Copies `out.len()` bytes from `offset` on; range-checked.
    pub fn read_at(&self, _offset: u64, _out: &mut [u8]) -> Result<()> {
        todo!("memory")
    }
    /// Copies `bytes` to `offset`; range-checked.
    pub fn write_at(&self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        todo!("memory")
    }
}
