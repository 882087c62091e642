//! A scatter/gather list over registered memory, walked front to back, and the digest that is taken on the way.
//!
//! This is the one place of the transport that touches registered memory: bytes go from it to `sendmsg` and from
//! `recvmsg` into it, without a copy in between. Every range is checked against the memory's length when the list
//! is made, and the list keeps the memory alive.

use crate::Memory;
use crate::cuda::{Landing, Slot, Staging, Then};
use kvxfer_proto::Integrity;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// Ranges of one memory with a position in them.
pub(super) struct Scatter {
    memory: Arc<Memory>,
    ranges: Vec<(u64, u32)>,
    at: usize,
    offset: u32,
    left: usize,
    /// Set when the bytes belong to a device: `memory` is then a slot on their way, with the same ranges one after the other.
    device: Option<Staged>,
}

/// A device's side of a list.
struct Staged {
    memory: Arc<Memory>,
    ranges: Vec<(u64, u32)>,
    slot: Slot,
}

/// Distance of the cache lines looked at when a range is only sampled.
const SAMPLE_EVERY: u64 = 64 << 10;
const LINE: u64 = 64;

impl Scatter {
    /// Checks every `(offset, length)`; `Err` holds the first that does not lie inside the memory.
    pub(super) fn new(
        memory: Arc<Memory>,
        ranges: impl Iterator<Item = (u64, u32)>,
    ) -> Result<Self, (u64, u32)> {
        let ranges: Vec<_> = ranges.collect();
        let mut left = 0;
        for &(offset, len) in &ranges {
            if offset.checked_add(u64::from(len)).is_none_or(|end| end > memory.len() as u64) {
                return Err((offset, len));
            }
            left += len as usize;
        }
        Ok(Self { memory, ranges, at: 0, offset: 0, left, device: None })
    }

    /// Puts a slot in the place of device memory, which no socket reaches; host memory stays as it is.
    pub(super) fn stage(self, staging: &Arc<Staging>) -> crate::Result<Self> {
        let Some(device) = self.memory.on_device() else { return Ok(self) };
        let slot = staging.slot(device, self.left)?;
        let host = slot.memory().clone();
        let mut at = 0;
        let ranges = self
            .ranges
            .iter()
            .map(|(_, len)| {
                at += u64::from(*len);
                (at - u64::from(*len), *len)
            })
            .collect();
        let device = Some(Staged { memory: self.memory, ranges: self.ranges, slot });
        Ok(Self { memory: host, ranges, at: 0, offset: 0, left: self.left, device })
    }

    /// Starts to bring the device's bytes into the slot; `None` for host memory, which is ready.
    pub(super) fn fill(&self, then: Then) -> crate::Result<Option<Landing>> {
        self.device.as_ref().map(|d| d.slot.fill(&d.memory, &d.ranges, Some(then))).transpose()
    }

    /// Starts to take what has arrived in the slot to the device; `None` for host memory, where it is already.
    pub(super) fn land(&self, then: Then) -> crate::Result<Option<Landing>> {
        self.device.as_ref().map(|d| d.slot.empty(&d.memory, &d.ranges, Some(then))).transpose()
    }

    pub(super) fn is_staged(&self) -> bool {
        self.device.is_some()
    }

    /// Bytes behind the position.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Appends at most `limit` bytes from the position on, in at most `slots` entries; returns how many bytes.
    pub(super) fn gather(&self, limit: usize, slots: usize, out: &mut Vec<libc::iovec>) -> usize {
        let mut taken = 0;
        for (base, len) in self.parts(limit).take(slots) {
            out.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            taken += len;
        }
        taken
    }

    /// Moves the position.
    pub(super) fn advance(&mut self, mut n: usize) {
        debug_assert!(n <= self.left);
        self.left -= n;
        while n > 0 {
            let here = (self.ranges[self.at].1 - self.offset) as usize;
            if n < here {
                self.offset += n as u32;
                return;
            }
            n -= here;
            self.at += 1;
            self.offset = 0;
        }
    }

    /// Feeds the next `n` bytes to the digest; the position stays.
    pub(super) fn digest(&self, n: usize, digest: &mut Digest) {
        for (base, len) in self.parts(n) {
            // SAFETY: inside the memory (checked in `new`), which is mapped while `self.memory` lives. Registered memory
            // is not borrowed by anybody; a peer or the owner that writes it now makes the check fail, which is the point.
            digest.0.update(unsafe { std::slice::from_raw_parts(base, len) });
        }
    }

    /// Feeds sampled cache lines of the whole list, from its start: the first and last of each range and one per 64 KiB.
    pub(super) fn sample(&self, digest: &mut Digest) {
        let base = self.memory.as_ptr();
        for &(offset, len) in &self.ranges {
            let len = u64::from(len);
            let mut feed = |from: u64| {
                let n = LINE.min(len - from) as usize;
                // SAFETY: as in `digest`; `from + n <= len`.
                digest.0.update(unsafe { std::slice::from_raw_parts(base.add((offset + from) as usize), n) });
            };
            (0..len).step_by(SAMPLE_EVERY as usize).for_each(&mut feed);
            if len > LINE {
                feed(len - LINE);
            }
        }
    }

    /// Copies bytes to the position and moves it.
    pub(super) fn put(&mut self, mut bytes: &[u8]) {
        let n = bytes.len();
        debug_assert!(n <= self.left);
        for (base, len) in self.parts(n) {
            // SAFETY: inside the memory, as in `digest`; `bytes` is a buffer of ours and does not overlap it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base, len) };
            bytes = &bytes[len..];
        }
        self.advance(n);
    }

    fn parts(&self, limit: usize) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let (mut skip, mut left) = (self.offset, limit.min(self.left));
        self.ranges[self.at..].iter().map_while(move |&(offset, len)| {
            if left == 0 {
                return None;
            }
            let n = ((len - skip) as usize).min(left);
            // SAFETY: `new` checked that the range lies inside the memory.
            let base = unsafe { self.memory.as_ptr().add(offset as usize + skip as usize) };
            skip = 0;
            left -= n;
            Some((base, n))
        })
    }
}

/// The check behind a payload: CRC-64/NVME over the header's check and the payload (`Full`) or sampled lines of it
/// (`Bound`). Measured against xxh3-64 it is the faster one wherever carry-less multiplication exists
/// (`docs/performance.md`), and a frame is short enough for it.
pub(super) struct Digest(crc_fast::Digest);

impl Digest {
    /// Bound to a header and its table by their check.
    pub(super) fn new(header_check: u64) -> Self {
        let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        crc.update(&header_check.to_le_bytes());
        Self(crc)
    }
    /// For a level that has one.
    pub(super) fn for_level(level: Integrity, header_check: u64) -> Option<Self> {
        (level != Integrity::Off).then(|| Self::new(header_check))
    }
    /// Adds bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The value.
    pub(super) fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

/// Most entries of one `sendmsg` or `recvmsg`.
pub(super) const MAX_IOV: usize = 512;

/// `sendmsg` without blocking and without `SIGPIPE`.
///
/// # Safety
/// Every entry names memory that is readable during the call.
pub(super) unsafe fn send(fd: BorrowedFd<'_>, iov: &mut [libc::iovec]) -> std::io::Result<usize> {
    // SAFETY: an all-zero msghdr is valid: no name, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = iov.len() as _;
    // SAFETY: `fd` is open, `msg` names `iov`, and the caller promises that its entries are readable.
    let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| std::io::Error::last_os_error())
}

/// `recvmsg` without blocking.
///
/// # Safety
/// Every entry names memory that is writable during the call and that nobody else borrows.
pub(super) unsafe fn receive(fd: BorrowedFd<'_>, iov: &mut [libc::iovec]) -> std::io::Result<usize> {
    // SAFETY: an all-zero msghdr is valid: no name, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = iov.len() as _;
    // SAFETY: `fd` is open, `msg` names `iov`, and the caller promises that its entries are writable.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, libc::MSG_DONTWAIT) };
    usize::try_from(n).map_err(|_| std::io::Error::last_os_error())
}

/// Takes up to `n` bytes out of the socket without looking at them.
pub(super) fn discard(fd: BorrowedFd<'_>, n: usize) -> std::io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: with MSG_TRUNC a stream socket drops the bytes and writes nothing, so no buffer is needed (tcp(7)).
    let n = unsafe { libc::recv(fd.as_raw_fd(), std::ptr::null_mut(), n, flags) };
    usize::try_from(n).map_err(|_| std::io::Error::last_os_error())
}
