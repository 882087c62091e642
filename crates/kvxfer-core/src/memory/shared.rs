//! Making and opening memfd pools: sealed, reserved in full, on huge pages where they can be had.

use super::{HugePages, Mapping, Memory, OUT_OF_MEMORY, Paging, limits, round_up};
use crate::error::SystemError;
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A mapped memfd.
pub(super) struct Pool {
    pub(super) mapping: Mapping,
    pub(super) paging: Paging,
    pub(super) fd: OwnedFd,
}

/// Size of the huge pages asked for explicitly.
const HUGE: usize = 2 << 20;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
/// A received pool up to this size gets its page tables filled before it is used.
const POPULATE_AT_IMPORT: usize = 4 << 20;
/// Up to this size they are filled beside the first transfers; of a larger one at first touch only.
const POPULATE_BESIDE: usize = 16 << 30;
/// Filled at a time, so that whoever drops the memory meanwhile waits for this much at most.
const SLICE: usize = 16 << 20;
const FD_LIMIT: &str = "raise the limit of open files (ulimit -n)";
const NO_HUGE: &str = "reserve huge pages (sysctl vm.nr_hugepages) or allow transparent ones \
     (/sys/kernel/mm/transparent_hugepage/shmem_enabled = advise), or set huge_pages to try";

/// A new pool: explicit huge pages if wanted and available, else base pages with advice for transparent ones.
pub(super) fn create(len: usize, huge: HugePages) -> Result<Pool> {
    limits::check_file_size(len)?;
    if huge != HugePages::Never {
        match create_explicit(len) {
            Ok(pool) => return Ok(pool),
            Err(e) => tracing::debug!(error = %e, "no explicit huge pages"),
        }
    }
    limits::check_available(len)?;
    let pool = create_plain(len, huge)?;
    if huge == HugePages::Require && pool.paging == Paging::Base {
        return Err(Error::system(
            format!("huge pages for {} bytes of shared memory", pool.mapping.bytes),
            rustix::io::Errno::NOMEM,
            NO_HUGE,
        ));
    }
    Ok(pool)
}

fn create_explicit(len: usize) -> Result<Pool> {
    let mapped = round_up(len, HUGE);
    let fd = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    size(&fd, mapped)?;
    // Mapping reserves the pages; allocating them turns a short pool into an error here.
    let pool = map(fd, mapped, Paging::Explicit)?;
    rustix::fs::fallocate(&pool.fd, FallocateFlags::empty(), 0, mapped as u64)
        .map_err(|e| Error::system(format!("fallocate of {mapped} bytes of huge pages"), e, NO_HUGE))?;
    sealed(pool)
}

fn create_plain(len: usize, huge: HugePages) -> Result<Pool> {
    let mapped = round_up(len, rustix::param::page_size());
    let fd = memfd(MemfdFlags::empty())?;
    size(&fd, mapped)?;
    let mut pool = map(fd, mapped, Paging::Base)?;
    reserve(&mut pool, huge)?;
    sealed(pool)
}

/// Allocates every page now. Transparent huge pages come only with faults in an advised mapping, so those go first;
/// `fallocate` is the fallback for kernels that cannot populate (before 5.14).
fn reserve(pool: &mut Pool, huge: HugePages) -> Result<()> {
    let mapped = pool.mapping.bytes;
    if huge != HugePages::Never {
        let _ = pool.mapping.advise(libc::MADV_HUGEPAGE);
    }
    match pool.mapping.advise(libc::MADV_POPULATE_WRITE) {
        Ok(()) => {}
        Err(libc::EINVAL) => {
            rustix::fs::fallocate(&pool.fd, FallocateFlags::empty(), 0, mapped as u64).map_err(|e| {
                Error::system(format!("fallocate of {mapped} bytes of shared memory"), e, OUT_OF_MEMORY)
            })?;
        }
        Err(e) => {
            return Err(Error::system(
                format!("reserving {mapped} bytes of shared memory"),
                SystemError(e),
                OUT_OF_MEMORY,
            ));
        }
    }
    if huge != HugePages::Never
        && limits::huge_bytes(pool.mapping.base.as_ptr() as usize, mapped) * 2 >= mapped as u64
    {
        pool.paging = Paging::Transparent;
    }
    Ok(())
}

/// Maps a pool somebody else made, after checking that it cannot be pulled away.
pub(super) fn open(fd: OwnedFd, len: usize) -> Result<Pool> {
    let refused =
        |problem: String| Error::failed(ErrorCode::Protocol, format!("shared memory of a peer: {problem}"));
    let stat = rustix::fs::fstat(&fd).map_err(|e| Error::system("fstat of a received memfd", e, FD_LIMIT))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(refused(format!("the descriptor is no memfd (mode {:o})", stat.st_mode)));
    }
    let seals = rustix::fs::fcntl_get_seals(&fd)
        .map_err(|e| refused(format!("the descriptor is no memfd that can be sealed: {e}")))?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(refused(format!("it is not sealed against shrinking (seals {:#x})", seals.bits())));
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(refused(format!("it is sealed against writing (seals {:#x})", seals.bits())));
    }
    if (stat.st_size as u64) < len as u64 {
        return Err(refused(format!("it holds {} bytes, {len} were announced", stat.st_size)));
    }
    // The block size is the size of the pages: 2 MiB or 1 GiB on explicit huge pages.
    let unit = (stat.st_blksize as usize).max(rustix::param::page_size());
    if !unit.is_power_of_two() || unit > 1 << 30 {
        return Err(refused(format!("its page size of {unit} bytes is none of this machine")));
    }
    let paging = if unit >= HUGE { Paging::Explicit } else { Paging::Base };
    let pool = map(fd, round_up(len, unit), paging)?;
    if paging == Paging::Base {
        let _ = pool.mapping.advise(libc::MADV_HUGEPAGE);
    }
    if pool.mapping.bytes <= POPULATE_AT_IMPORT {
        // Fills page tables so that the first transfer does not pay for them. A failure is left to the first touch.
        let _ = pool.mapping.advise(libc::MADV_POPULATE_WRITE);
    }
    Ok(pool)
}

/// Fills the page tables of a received pool on a thread of its own: a quarter of a second for a gibibyte, for which neither the
/// first request nor, on the progress thread, any other peer should wait. Pages that a transfer touches first are its own business.
pub(super) fn populate_beside(memory: &Arc<Memory>) {
    let bytes = memory.mapping.as_ref().map_or(0, |m| m.bytes);
    if bytes <= POPULATE_AT_IMPORT || bytes > POPULATE_BESIDE || memory.paging == Paging::Explicit {
        return;
    }
    let memory = Arc::downgrade(memory);
    let started = crate::threads::spawn("kvxfer-populate", move || {
        for offset in (0..bytes).step_by(SLICE) {
            let Some(memory) = memory.upgrade() else { return };
            let Some(mapping) = &memory.mapping else { return };
            if mapping.advise_part(offset, SLICE.min(bytes - offset), libc::MADV_POPULATE_WRITE).is_err() {
                return;
            }
        }
    });
    if let Err(e) = started {
        tracing::debug!(error = %e, "page tables are filled at first touch");
    }
}

fn memfd(extra: MemfdFlags) -> Result<OwnedFd> {
    rustix::fs::memfd_create("kvxfer-pool", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | extra).map_err(
        |e| {
            let advice = if e == rustix::io::Errno::MFILE || e == rustix::io::Errno::NFILE {
                FD_LIMIT
            } else {
                "this kernel offers no such memfd; kvxfer can go on with cma or tcp"
            };
            Error::system("memfd_create", e, advice)
        },
    )
}

fn size(fd: &OwnedFd, bytes: usize) -> Result<()> {
    rustix::fs::ftruncate(fd, bytes as u64)
        .map_err(|e| Error::system(format!("ftruncate of a memfd to {bytes} bytes"), e, OUT_OF_MEMORY))
}

fn map(fd: OwnedFd, mapped: usize, paging: Paging) -> Result<Pool> {
    // SAFETY: a new shared mapping at an address of the kernel's choice; nothing existing is replaced.
    let base = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            mapped,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            fd.as_fd(),
            0,
        )
    }
    .map_err(|e| Error::system(format!("mmap of {mapped} bytes of shared memory"), e, OUT_OF_MEMORY))?;
    Ok(Pool { mapping: Mapping::new(base, mapped)?, paging, fd })
}

fn sealed(pool: Pool) -> Result<Pool> {
    rustix::fs::fcntl_add_seals(&pool.fd, SEALS)
        .map_err(|e| Error::system("sealing a memfd", e, "this kernel cannot seal such a memfd"))?;
    Ok(pool)
}
