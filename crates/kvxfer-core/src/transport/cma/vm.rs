//! The two system calls, in batches of as many ranges as the kernel takes.

use super::NONCE;
use crate::transport::mover::{Report, Run, Slice};
use crate::transport::{Job, Op};
use crate::{Error, Result, copy};
use kvxfer_proto::{ErrorCode, Integrity};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{PTracer, Pid, set_ptracer};
use std::cell::RefCell;

/// Most ranges a call takes on each side (`IOV_MAX`).
const BATCH: usize = 1024;
/// Lines read back from a slice at most: each costs the kernel a page look-up.
const SAMPLES: usize = 4;
/// Read back and compared at a time when every byte is checked.
const READ_BACK: usize = 128 << 10;

/// Ranges of both sides, kept from call to call.
#[derive(Default)]
struct Scratch {
    runs: Vec<Run>,
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Where a job's bytes are.
#[derive(Clone, Copy)]
struct Sides {
    pid: u32,
    local: *mut u8,
    remote: u64,
}

/// Moves a slice; `remote` is the region's address in process `pid`.
pub(super) fn carry(job: &Job, slice: &Slice, pid: u32, remote: u64, report: &mut Report) {
    SCRATCH.with_borrow_mut(|scratch| {
        let sides = Sides { pid, local: job.local.as_ptr(), remote };
        if job.op == Op::Write
            && let Some(digests) = &job.digest
        {
            // Hashed first, the kernel then finds the bytes in the cache.
            // SAFETY: submit checked the local ranges.
            unsafe { copy::digest_local(job, slice, digests) };
        }
        scratch.runs.clear();
        scratch.runs.extend(slice.runs(&job.pieces));
        let moved = transfer(job.op, sides, scratch, report);
        if !moved {
            return;
        }
        if job.op == Op::Read
            && let Some(digests) = &job.digest
        {
            // SAFETY: as above.
            unsafe { copy::digest_local(job, slice, digests) };
        }
        match job.integrity {
            Integrity::Bound => compare_samples(job, slice, sides, scratch, report),
            Integrity::Full if job.digest.is_none() => compare_all(sides, scratch, report),
            _ => {}
        }
    });
}

/// Moves `scratch.runs`. A run whose memory is not there fails alone; false when the peer cannot be reached any more.
fn transfer(op: Op, sides: Sides, scratch: &mut Scratch, report: &mut Report) -> bool {
    let mut next = 0;
    while next < scratch.runs.len() {
        let end = gather(sides, scratch, next);
        let batch: u64 = scratch.runs[next..end].iter().map(|r| r.len).sum();
        match call_all(op, sides.pid, &mut scratch.local, &mut scratch.remote, batch) {
            Ok(()) => next = end,
            Err((done, Errno::FAULT)) => {
                let at = next + run_at(&scratch.runs[next..end], done);
                let run = scratch.runs[at];
                report.fail(run.piece, ErrorCode::Transport, || {
                    format!(
                        "piece {}: {} bytes at {:#x} of process {} or at {:p} here are not mapped; was the region's \
                         memory freed before it was deregistered?",
                        run.piece,
                        run.len,
                        sides.remote + run.remote,
                        sides.pid,
                        sides.local.wrapping_add(run.local as usize)
                    )
                });
                next = at + 1;
            }
            Err((done, e)) => {
                let at = next + run_at(&scratch.runs[next..end], done);
                let (code, text) = explain(op, sides.pid, e);
                report.stop(scratch.runs[at].piece, code, text);
                return false;
            }
        }
    }
    true
}

/// Fills both range lists from run `first` on, joining neighbours; returns one beyond the last run taken.
fn gather(sides: Sides, scratch: &mut Scratch, first: usize) -> usize {
    let Scratch { runs, local, remote, .. } = scratch;
    local.clear();
    remote.clear();
    for (i, run) in runs[first..].iter().enumerate() {
        let near = sides.local.wrapping_add(run.local as usize) as usize;
        let far = (sides.remote + run.remote) as usize;
        let len = run.len as usize;
        let joins = |list: &[libc::iovec], at: usize| {
            list.last().is_some_and(|last| last.iov_base as usize + last.iov_len == at)
        };
        let (near_joins, far_joins) = (joins(local, near), joins(remote, far));
        if (!near_joins && local.len() == BATCH) || (!far_joins && remote.len() == BATCH) {
            return first + i;
        }
        push(local, near_joins, near, len);
        push(remote, far_joins, far, len);
    }
    runs.len()
}

fn push(list: &mut Vec<libc::iovec>, joins: bool, base: usize, len: usize) {
    match list.last_mut() {
        Some(neighbour) if joins => neighbour.iov_len += len,
        _ => list.push(libc::iovec { iov_base: base as *mut libc::c_void, iov_len: len }),
    }
}

/// The run that holds byte `at` of the runs' sum.
fn run_at(runs: &[Run], at: u64) -> usize {
    let mut end = 0;
    runs.iter()
        .position(|run| {
            end += run.len;
            at < end
        })
        .unwrap_or(runs.len().saturating_sub(1))
}

/// Calls until `bytes` are moved. The error carries how many were.
fn call_all(
    op: Op,
    pid: u32,
    local: &mut [libc::iovec],
    remote: &mut [libc::iovec],
    bytes: u64,
) -> Result<(), (u64, Errno)> {
    let (mut near, mut far) = (local, remote);
    let mut done = 0;
    loop {
        match call(op, pid, near, far) {
            // No progress and no error: the kernel found nothing to move, so a range is empty or gone.
            Ok(0) => return Err((done, Errno::FAULT)),
            Ok(n) => {
                done += n;
                if done >= bytes {
                    return Ok(());
                }
                near = advance(near, n as usize);
                far = advance(far, n as usize);
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err((done, e)),
        }
    }
}

/// What is left of a list after `n` bytes.
fn advance(list: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    let mut skip = 0;
    while let Some(first) = list.get_mut(skip) {
        if n < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(n).cast();
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        skip += 1;
    }
    &mut list[skip..]
}

fn call(op: Op, pid: u32, local: &[libc::iovec], remote: &[libc::iovec]) -> Result<u64, Errno> {
    let (near, near_count) = (local.as_ptr(), local.len() as libc::c_ulong);
    let (far, far_count) = (remote.as_ptr(), remote.len() as libc::c_ulong);
    let pid = pid as libc::pid_t;
    // SAFETY: the local ranges lie inside memory that the job keeps alive (checked at submit) or inside a buffer of
    // the caller; the remote ones are addresses of another process, which the kernel checks.
    let n = unsafe {
        match op {
            Op::Write => libc::process_vm_writev(pid, near, near_count, far, far_count, 0),
            Op::Read => libc::process_vm_readv(pid, near, near_count, far, far_count, 0),
        }
    };
    if n < 0 { Err(last_errno()) } else { Ok(n as u64) }
}

/// `errno`, typed.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Reads a few lines back and compares them with the local side.
fn compare_samples(job: &Job, slice: &Slice, sides: Sides, scratch: &mut Scratch, report: &mut Report) {
    let all = copy::samples(job, slice);
    // Evenly spread, both ends included.
    let count = all.len().min(SAMPLES);
    let chosen: Vec<_> = (0..count).map(|i| all[i * (all.len() - 1) / (count - 1).max(1)]).collect();
    let Scratch { runs, local, remote, bytes } = scratch;
    let total: usize = chosen.iter().map(|s| s.len).sum();
    bytes.resize(total, 0);
    local.clear();
    remote.clear();
    runs.clear();
    push(local, false, bytes.as_mut_ptr() as usize, total);
    for s in &chosen {
        push(remote, false, (sides.remote + s.remote) as usize, s.len);
        runs.push(Run { piece: s.piece, local: s.local, remote: s.remote, len: s.len as u64 });
    }
    if let Err((done, e)) = call_all(Op::Read, sides.pid, local, remote, total as u64) {
        if e != Errno::FAULT {
            let (code, text) = explain(Op::Read, sides.pid, e);
            report.stop(runs[run_at(runs, done)].piece, code, text);
        }
        // A range that is not there has been reported by the transfer itself.
        return;
    }
    let mut at = 0;
    for run in runs.iter() {
        compare(sides, run, &bytes[at..], report);
        at += run.len as usize;
    }
}

/// Reads everything back, block by block, and compares it with the local side.
fn compare_all(sides: Sides, scratch: &mut Scratch, report: &mut Report) {
    let Scratch { runs, local, remote, bytes } = scratch;
    bytes.resize(READ_BACK, 0);
    for run in runs.iter() {
        let mut part = *run;
        let end = run.local + run.len;
        while part.local < end {
            part.len = (end - part.local).min(READ_BACK as u64);
            local.clear();
            remote.clear();
            push(local, false, bytes.as_mut_ptr() as usize, part.len as usize);
            push(remote, false, (sides.remote + part.remote) as usize, part.len as usize);
            match call_all(Op::Read, sides.pid, local, remote, part.len) {
                Ok(()) => compare(sides, &part, bytes, report),
                Err((_, Errno::FAULT)) => break,
                Err((_, e)) => {
                    let (code, text) = explain(Op::Read, sides.pid, e);
                    report.stop(run.piece, code, text);
                    return;
                }
            }
            part.local += part.len;
            part.remote += part.len;
        }
    }
}

fn compare(sides: Sides, run: &Run, bytes: &[u8], report: &mut Report) {
    let local = sides.local.wrapping_add(run.local as usize);
    // SAFETY: the local range was checked at submit; `bytes` holds at least the run.
    if !unsafe { copy::equal(local, bytes.as_ptr(), run.len as usize) } {
        report.fail(run.piece, ErrorCode::Corrupt, || copy::differs(run.piece, run));
    }
}

/// What a refusal means and what to do.
fn explain(op: Op, pid: u32, e: Errno) -> (ErrorCode, String) {
    let call = match op {
        Op::Write => "process_vm_writev",
        Op::Read => "process_vm_readv",
    };
    match e {
        Errno::SRCH => (ErrorCode::PeerGone, format!("process {pid} has ended")),
        Errno::PERM | Errno::ACCESS => (
            ErrorCode::Transport,
            format!(
                "{call} on process {pid}: {e}. Both processes must run as the same user and the peer must be dumpable; \
                 with Yama (kernel.yama.ptrace_scope >= 1) the peer must have offered cma to this process; in a \
                 container, allow the call (seccomp) or add CAP_SYS_PTRACE, or share memory through kvxfer (shm)"
            ),
        ),
        Errno::NOSYS => (
            ErrorCode::NotAvailable,
            format!("{call}: this kernel or its seccomp policy does not offer it; use shm or tcp"),
        ),
        e => (ErrorCode::System, format!("{call} on process {pid}: {e}")),
    }
}

/// Reads the peer's secret at the address it named.
pub(super) fn probe(pid: u32, address: u64, expected: &[u8; NONCE]) -> Result<()> {
    let mut found = [0_u8; NONCE];
    let near = libc::iovec { iov_base: found.as_mut_ptr().cast(), iov_len: NONCE };
    let far = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: NONCE };
    match call(Op::Read, pid, &[near], &[far]) {
        Ok(n) if n == NONCE as u64 && found == *expected => Ok(()),
        Ok(_) | Err(Errno::FAULT) => Err(Error::failed(
            ErrorCode::Unreachable,
            format!(
                "process {pid} does not hold the peer's token at {address:#x}: it is another process; is the peer in \
                 another PID namespace?"
            ),
        )),
        Err(e) => {
            let (code, text) = explain(Op::Read, pid, e);
            Err(Error::failed(
                if code == ErrorCode::Transport { ErrorCode::NotAvailable } else { code },
                text,
            ))
        }
    }
}

/// Permits process `pid` to reach this one's memory where Yama asks for consent. Yama keeps one permission per
/// process, so a second peer widens it to every process of the same user.
pub(super) fn permit(pid: u32) {
    static PERMITTED: Mutex<Option<u32>> = Mutex::new(None);
    let mut permitted = PERMITTED.lock();
    let tracer = match (*permitted, i32::try_from(pid).ok().and_then(Pid::from_raw)) {
        (Some(known), _) if known == pid => return,
        (None, Some(peer)) => PTracer::ProcessID(peer),
        (Some(_), Some(_)) => PTracer::Any,
        (_, None) => return,
    };
    let wide = matches!(tracer, PTracer::Any);
    match set_ptracer(tracer) {
        Ok(()) => {
            *permitted = Some(pid);
            if wide {
                tracing::debug!(
                    pid,
                    "several cma peers: every process of this user may reach this one's memory"
                );
            }
        }
        // No Yama, no consent needed.
        Err(Errno::INVAL) => {}
        Err(e) => tracing::debug!(error = %e, pid, "PR_SET_PTRACER"),
    }
}
