//! What the system will give: file-size limit, available memory of machine and container, huge pages obtained.
//!
//! A memfd is not bounded by the size of `/dev/shm`, only by memory itself, and running out of that wakes the OOM
//! killer. So a request that cannot fit is refused before its first page is touched.

use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Growing a file beyond `RLIMIT_FSIZE` would raise `SIGXFSZ`; refuse instead.
pub(super) fn check_file_size(len: usize) -> Result<()> {
    match rustix::process::getrlimit(rustix::process::Resource::Fsize).current {
        Some(limit) if (len as u64) > limit => Err(Error::system(
            format!("a memfd of {len} bytes under a file-size limit of {limit} bytes"),
            rustix::io::Errno::FBIG,
            "raise the limit (ulimit -f) or make the pool smaller",
        )),
        _ => Ok(()),
    }
}

/// Refuses what machine or container cannot hold.
pub(super) fn check_available(len: usize) -> Result<()> {
    let available = [machine_available(), container_available()].into_iter().flatten().min();
    match available {
        Some(available) if len as u64 > available => Err(Error::system(
            format!("{len} bytes of shared memory with {available} bytes available"),
            rustix::io::Errno::NOMEM,
            "make the pool smaller, or give the machine or container more memory",
        )),
        _ => Ok(()),
    }
}

fn machine_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name| field_kib(&text, name);
    Some(field("MemAvailable:")? + field("SwapFree:").unwrap_or(0))
}

fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.starts_with(name))?;
    Some(line[name.len()..].trim().split(' ').next()?.parse::<u64>().ok()? << 10)
}

/// The tightest limit among this process's control group and its ancestors (version 2), or of the memory controller
/// (version 1), less what is used; file cache that can be dropped counts as free.
fn container_available() -> Option<u64> {
    let root = Path::new("/sys/fs/cgroup");
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut tightest: Option<u64> = None;
    let mut consider = |dir: &Path, max: &str, used: &str, cache: &str| {
        let Some(limit) = read_number(&dir.join(max)) else { return };
        let used = read_number(&dir.join(used)).unwrap_or(0);
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let cached =
            stat.lines().find_map(|l| l.strip_prefix(cache)?.trim().parse::<u64>().ok()).unwrap_or(0);
        let free = limit.saturating_sub(used.saturating_sub(cached));
        tightest = Some(tightest.map_or(free, |t| t.min(free)));
    };
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next(), parts.next()?, parts.next()?);
        let relative = PathBuf::from(path.trim_start_matches('/'));
        if controllers.is_empty() {
            for dir in relative.ancestors() {
                consider(&root.join(dir), "memory.max", "memory.current", "inactive_file ");
            }
        } else if controllers.split(',').any(|c| c == "memory") {
            for dir in relative.ancestors() {
                let dir = root.join("memory").join(dir);
                consider(&dir, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ");
            }
        }
    }
    tightest
}

/// A file with one number; `max` and absence read as no number.
fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Bytes of `base..base + len` that are mapped by transparent huge pages now.
pub(super) fn huge_bytes(base: usize, len: usize) -> u64 {
    let Ok(text) = fs::read_to_string("/proc/self/smaps") else { return 0 };
    let mut inside = false;
    let mut bytes = 0;
    for line in text.lines() {
        if let Some((from, to)) = address_range(line) {
            inside = from < base + len && to > base;
        } else if inside
            && (line.starts_with("ShmemPmdMapped:") || line.starts_with("FilePmdMapped:"))
            && let Some((name, _)) = line.split_once(' ')
        {
            bytes += field_kib(line, name).unwrap_or(0);
        }
    }
    bytes
}

fn address_range(line: &str) -> Option<(usize, usize)> {
    let (from, to) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
}
