//! Copying between mapped memory: what a transfer's slice does when both sides are addresses of this process.

use crate::transport::mover::{Report, Slice};
use crate::transport::{Job, Op};

/// Moves one slice of `job` between its local memory and the mapped remote side.
///
/// # Safety
/// The job's remote ranges lie inside memory that is mapped at `remote` for the duration of the call.
pub(crate) unsafe fn carry(job: &Job, slice: &Slice, remote: *mut u8) -> Report {
    let local = job.local.as_ptr();
    for run in slice.runs(&job.pieces) {
        let (local, remote) =
            (local.wrapping_add(run.local as usize), remote.wrapping_add(run.remote as usize));
        let (from, to) = match job.op {
            Op::Write => (local, remote),
            Op::Read => (remote, local),
        };
        // SAFETY: local ranges were checked against the memory at submit, remote ones are the caller's promise. Two
        // names for the same bytes (a region transferred onto itself) are why this may overlap.
        unsafe { std::ptr::copy(from, to, run.len as usize) };
    }
    Report::default()
}
