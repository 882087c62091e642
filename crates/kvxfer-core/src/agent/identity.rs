//! Where this process runs, and whether it is still the process that made an agent.

use crate::transport::PeerInfo;
use crate::{Error, Result};
use kvxfer_proto::wire::HostIdentity;
use kvxfer_proto::{Epoch, ErrorCode};
use parking_lot::Mutex;
use std::os::unix::fs::MetadataExt;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Counts this process's forks seen from the child: 0 in a process that was not forked since the library was used.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Which process image this is; changes in a child of `fork`. One atomic load: it guards every public call.
pub(crate) fn generation() -> u32 {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        extern "C" fn in_child() {
            FORKS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: `in_child` is async-signal-safe (one atomic add) and lives as long as the process.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    FORKS.load(Ordering::Relaxed)
}

/// True in a child of the process that made the thing.
pub(crate) fn forked_since(made_in: u32) -> bool {
    FORKS.load(Ordering::Relaxed) != made_in
}

/// The error every call gives in such a child.
pub(crate) fn forked_error() -> Error {
    Error::failed(
        ErrorCode::Closed,
        "this agent was created before fork() and belongs to the parent process; create one in the child",
    )
}

/// `N` random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::failed(ErrorCode::System, format!("no random bytes from the system: {e}")))?;
    Ok(bytes)
}

/// A new epoch: nanoseconds since the Unix epoch, larger than any given out by this process before.
pub(crate) fn new_epoch() -> Epoch {
    static LAST: Mutex<u64> = Mutex::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let mut last = LAST.lock();
    *last = now.max(*last + 1);
    Epoch(*last)
}

/// This process's random token, another one in each child.
fn process_token() -> Result<u64> {
    static TOKEN: Mutex<Option<(u32, u64)>> = Mutex::new(None);
    let generation = generation();
    let mut slot = TOKEN.lock();
    match *slot {
        Some((g, token)) if g == generation => Ok(token),
        _ => {
            let token = u64::from_le_bytes(random()?);
            *slot = Some((generation, token));
            Ok(token)
        }
    }
}

/// Who and where we are. `side_socket` is filled in by the caller.
pub(crate) fn host_identity(side_socket: String) -> Result<HostIdentity> {
    let inode = |path: &str| std::fs::metadata(path).map_or(0, |m| m.ino());
    Ok(HostIdentity {
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|s| s.trim().to_owned())
            .unwrap_or_default(),
        pid_namespace: inode("/proc/self/ns/pid"),
        net_namespace: inode("/proc/self/ns/net"),
        pid: std::process::id(),
        process: process_token()?,
        side_socket,
    })
}

/// True when both run under one kernel and see the same process ids.
pub(crate) fn same_host(ours: &HostIdentity, theirs: &HostIdentity) -> bool {
    same_kernel(ours, theirs) && ours.pid_namespace != 0 && ours.pid_namespace == theirs.pid_namespace
}

/// True when both run under one kernel, whatever processes they see.
pub(crate) fn same_kernel(ours: &HostIdentity, theirs: &HostIdentity) -> bool {
    !ours.boot_id.is_empty() && ours.boot_id == theirs.boot_id
}

/// True when both are in one process.
pub(crate) fn same_process(ours: &HostIdentity, theirs: &HostIdentity) -> bool {
    same_host(ours, theirs) && ours.pid == theirs.pid && ours.process == theirs.process
}

/// `host-pid`, for agents that were not given a name.
pub(crate) fn default_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host: String = host.chars().filter(|c| !c.is_control()).take(100).collect();
    format!("{}-{}", if host.is_empty() { "localhost" } else { &host }, std::process::id())
}

/// For log lines.
pub(crate) fn whereabouts(info: &PeerInfo) -> String {
    if info.same_process {
        "this process".into()
    } else if info.same_host {
        format!("this host, pid {}", info.host.pid)
    } else if info.same_kernel {
        "this host, in another PID namespace".into()
    } else {
        info.address.map_or_else(|| "unknown".into(), |a| a.to_string())
    }
}
