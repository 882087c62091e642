//! Transfers: batches of pieces moved in one direction.

use super::args::{Out, OutStruct, invalid, list, optional_timeout, read_struct, timeout, versioned};
use super::config::integrity;
use super::fence::{fence, kvxfer_fence_t};
use super::handle::{borrow, into_raw, object, take};
use super::panic::{Answer, guard};
use super::peer::{RemoteRegionObject, kvxfer_peer_t, kvxfer_remote_region_t, peer};
use super::region::{kvxfer_region_t, region};
use super::result::{KVXFER_IN_PROGRESS, KVXFER_OK, kvxfer_result_t, number};
use kvxfer_core::agent::TransferReport;
use kvxfer_core::transport::Outcome;
use kvxfer_core::{Error, ErrorCode, Op, Piece, Result, Transfer, TransferOptions, TransportKind};
use std::ffi::{c_char, c_void};
use std::sync::Arc;

/// A transfer under way or finished. Usable from any thread.
pub struct kvxfer_transfer_t {
    _opaque: [u8; 0],
}

/// The best transport that reaches both regions.
pub const KVXFER_TRANSPORT_ANY: u32 = 0;
/// Inside one process.
pub const KVXFER_TRANSPORT_INPROC: u32 = 1;
/// Shared memory on one host.
pub const KVXFER_TRANSPORT_SHM: u32 = 2;
/// `process_vm_writev` on one host.
pub const KVXFER_TRANSPORT_CMA: u32 = 3;
/// Sockets.
pub const KVXFER_TRANSPORT_TCP: u32 = 4;
/// NIXL's plug-ins.
pub const KVXFER_TRANSPORT_NIXL: u32 = 5;
/// GPU to GPU on one host.
pub const KVXFER_TRANSPORT_CUDA_IPC: u32 = 6;

const _: () = assert!(
    KVXFER_TRANSPORT_INPROC == TransportKind::Inproc as u32
        && KVXFER_TRANSPORT_SHM == TransportKind::Shm as u32
        && KVXFER_TRANSPORT_CMA == TransportKind::Cma as u32
        && KVXFER_TRANSPORT_TCP == TransportKind::Tcp as u32
        && KVXFER_TRANSPORT_NIXL == TransportKind::Nixl as u32
        && KVXFER_TRANSPORT_CUDA_IPC == TransportKind::CudaIpc as u32
);

/// One contiguous run of bytes to move.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_piece_t {
    /// Offset in the local region, bytes.
    pub local_offset: u64,
    /// Offset in the remote region, bytes.
    pub remote_offset: u64,
    /// Length, bytes; not zero.
    pub length: u64,
}

// A list of pieces from C is handed to the core as it is.
const _: () = assert!(
    size_of::<kvxfer_piece_t>() == size_of::<Piece>()
        && align_of::<kvxfer_piece_t>() == align_of::<Piece>()
        && std::mem::offset_of!(kvxfer_piece_t, local_offset) == std::mem::offset_of!(Piece, local_offset)
        && std::mem::offset_of!(kvxfer_piece_t, remote_offset) == std::mem::offset_of!(Piece, remote_offset)
        && std::mem::offset_of!(kvxfer_piece_t, length) == std::mem::offset_of!(Piece, len)
);

/// What a transfer may be told beside its pieces. Zero or NULL in a field means its default.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_transfer_options_t {
    /// `sizeof(kvxfer_transfer_options_t)`.
    pub struct_size: usize,
    /// Ends the transfer with `KVXFER_TIMED_OUT`; milliseconds, 0: as configured.
    pub timeout_ms: u64,
    /// Sent to the peer once every byte has landed, and only then; at most `KVXFER_MAX_NOTIFICATION` bytes.
    pub notify: *const c_void,
    /// Length of `notify` in bytes; 0 with a pointer that is not NULL sends an empty notification.
    pub notify_length: usize,
    /// `KVXFER_INTEGRITY_...`.
    pub integrity: u32,
    /// `KVXFER_TRANSPORT_...`; `KVXFER_UNSUPPORTED` when that one does not reach both regions.
    pub transport: u32,
    /// Nothing is read or written before this point of a CUDA stream; NULL: at once.
    pub after: *const kvxfer_fence_t,
}

/// How a transfer went. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_transfer_report_t {
    /// `sizeof(kvxfer_transfer_report_t)`, set by the caller.
    pub struct_size: usize,
    /// `KVXFER_OK`, or the first failure.
    pub result: kvxfer_result_t,
    /// `KVXFER_TRANSPORT_...`: what carried the bytes.
    pub transport: u32,
    /// Bytes moved.
    pub bytes: u64,
    /// Pieces in all.
    pub pieces: u64,
    /// Pieces that failed.
    pub failed: u64,
    /// From submission to the last outcome, nanoseconds.
    pub duration_ns: u64,
}
versioned! { kvxfer_transfer_options_t, 40; kvxfer_transfer_report_t, 48; }

/// What a transfer's handle stands for.
pub(super) struct TransferObject(Transfer);
object!(TransferObject, kvxfer_transfer_t, TRANSFER);

fn transfer(handle: *const kvxfer_transfer_t) -> Result<Arc<TransferObject>> {
    borrow("transfer", handle)
}

unsafe fn options(options: *const kvxfer_transfer_options_t) -> Result<TransferOptions> {
    if options.is_null() {
        return Ok(TransferOptions::default());
    }
    // SAFETY: the struct and its pointers are as the header asks.
    unsafe {
        let o = read_struct("options", options)?;
        let payload = list("options.notify", o.notify.cast::<u8>(), o.notify_length)?;
        Ok(TransferOptions {
            timeout: optional_timeout("options.timeout_ms", o.timeout_ms)?,
            notify: (!o.notify.is_null()).then(|| payload.to_vec()),
            integrity: integrity("options.integrity", o.integrity)?,
            transport: transport("options.transport", o.transport)?,
            after: fence("options.after", o.after)?,
        })
    }
}

pub(super) fn transport(argument: &'static str, n: u32) -> Result<Option<TransportKind>> {
    if n == KVXFER_TRANSPORT_ANY {
        return Ok(None);
    }
    TransportKind::ALL
        .into_iter()
        .find(|k| *k as u32 == n)
        .map(Some)
        .ok_or_else(|| invalid(argument, format!("{n} is none of the KVXFER_TRANSPORT_ values 0 to 6")))
}

#[allow(clippy::too_many_arguments, reason = "the arguments of the two C functions that share it")]
unsafe fn submit(
    op: Op,
    peer: *const kvxfer_peer_t,
    local: *const kvxfer_region_t,
    remote: *const kvxfer_remote_region_t,
    pieces: *const kvxfer_piece_t,
    count: usize,
    options: *const kvxfer_transfer_options_t,
    transfer_out: *mut *mut kvxfer_transfer_t,
) -> Answer {
    // SAFETY: pointer arguments are as the header asks.
    unsafe {
        let peer = self::peer(peer)?;
        let local = region("local", local)?;
        let remote = borrow::<RemoteRegionObject>("remote", remote)?;
        let out = Out::new("transfer_out", transfer_out)?;
        // The two structs have the same layout, as checked above.
        let pieces = list("pieces", pieces.cast::<Piece>(), count)?;
        let options = self::options(options)?;
        if pieces.is_empty() {
            return Err(invalid("count", "0 pieces: a transfer moves at least one"));
        }
        let transfer = peer.submit(op, &local, &remote.0, pieces, options)?;
        out.set(into_raw(TransferObject(transfer))?);
        Ok(KVXFER_OK)
    }
}

/// What a finished transfer's report means as an answer.
fn answer(report: &TransferReport) -> Answer {
    match report.error {
        None => Ok(KVXFER_OK),
        Some(code) => {
            let why = report.detail.as_deref().unwrap_or(code.as_str());
            Err(Error::failed(code, format!("{} of {} pieces failed: {why}", report.failed, report.pieces)))
        }
    }
}

/// Starts moving `count` pieces from the local region to the peer's. Does not block; a small transfer may be
/// finished on return. `options` may be NULL. Ranges are checked before anything moves: `KVXFER_OUT_OF_RANGE`
/// names the piece. Free the transfer with `kvxfer_transfer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_write(
    peer: *mut kvxfer_peer_t,
    local: *const kvxfer_region_t,
    remote: *const kvxfer_remote_region_t,
    pieces: *const kvxfer_piece_t,
    count: usize,
    options: *const kvxfer_transfer_options_t,
    transfer_out: *mut *mut kvxfer_transfer_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_write", || unsafe {
        submit(Op::Write, peer, local, remote, pieces, count, options, transfer_out)
    })
}

/// Starts moving `count` pieces from the peer's region to the local one; otherwise as `kvxfer_peer_write`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_read(
    peer: *mut kvxfer_peer_t,
    local: *const kvxfer_region_t,
    remote: *const kvxfer_remote_region_t,
    pieces: *const kvxfer_piece_t,
    count: usize,
    options: *const kvxfer_transfer_options_t,
    transfer_out: *mut *mut kvxfer_transfer_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_read", || unsafe {
        submit(Op::Read, peer, local, remote, pieces, count, options, transfer_out)
    })
}

/// How the transfer stands: `KVXFER_IN_PROGRESS`, or once it has ended `KVXFER_OK` or its first failure. Never
/// blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_poll(transfer: *const kvxfer_transfer_t) -> kvxfer_result_t {
    guard("kvxfer_transfer_poll", || match self::transfer(transfer)?.0.report() {
        None => Ok(KVXFER_IN_PROGRESS),
        Some(report) => answer(&report),
    })
}

/// Waits for the end and answers as `kvxfer_transfer_poll`; `KVXFER_IN_PROGRESS` when `timeout_ms` passes
/// first: the transfer then goes on until its own deadline, which is what `KVXFER_TIMED_OUT` stands for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_wait(
    transfer: *const kvxfer_transfer_t,
    timeout_ms: u64,
) -> kvxfer_result_t {
    guard("kvxfer_transfer_wait", || {
        let transfer = self::transfer(transfer)?;
        match transfer.0.wait(timeout("timeout_ms", timeout_ms)?) {
            Ok(report) => answer(&report),
            Err(Error::TimedOut { .. }) => {
                transfer.0.report().map_or(Ok(KVXFER_IN_PROGRESS), |report| answer(&report))
            }
            Err(e) => Err(e),
        }
    })
}

/// Asks the transfer to end. `KVXFER_OK`: it has ended, and no byte changes any more. `KVXFER_IN_PROGRESS`:
/// not yet; wait for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_cancel(transfer: *mut kvxfer_transfer_t) -> kvxfer_result_t {
    guard("kvxfer_transfer_cancel", || {
        Ok(if self::transfer(transfer)?.0.cancel() { KVXFER_OK } else { KVXFER_IN_PROGRESS })
    })
}

/// Outcomes of `count` pieces from number `first` on: `KVXFER_OK`, `KVXFER_IN_PROGRESS` or why the piece
/// failed. `KVXFER_OUT_OF_RANGE` when the transfer has fewer pieces.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_outcomes(
    transfer: *const kvxfer_transfer_t,
    first: usize,
    count: usize,
    outcomes_out: *mut kvxfer_result_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_transfer_outcomes", || unsafe {
        let transfer = self::transfer(transfer)?;
        Out::new("outcomes_out", outcomes_out)?;
        // Outcomes are decided one by one while this runs; the range is checked at its end before anything is written.
        let last = first.checked_add(count).filter(|&end| end == 0 || transfer.0.outcome(end - 1).is_some());
        if last.is_none() || count == 0 {
            return Err(Error::failed(
                ErrorCode::OutOfRange,
                format!("{count} outcomes from piece {first} on: the transfer has no such pieces"),
            ));
        }
        for i in 0..count {
            let outcome = match transfer.0.outcome(first + i) {
                Some(Outcome::Done) => KVXFER_OK,
                Some(Outcome::Failed(code)) => number(code),
                Some(Outcome::Pending) | None => KVXFER_IN_PROGRESS,
            };
            outcomes_out.add(i).write_unaligned(outcome);
        }
        Ok(KVXFER_OK)
    })
}

/// How the transfer went, once it has ended; `KVXFER_IN_PROGRESS` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_report(
    transfer: *const kvxfer_transfer_t,
    report_out: *mut kvxfer_transfer_report_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_transfer_report", || unsafe {
        let transfer = self::transfer(transfer)?;
        let out = OutStruct::new("report_out", report_out)?;
        let Some(report) = transfer.0.report() else { return Ok(KVXFER_IN_PROGRESS) };
        out.set(&kvxfer_transfer_report_t {
            struct_size: 0,
            result: report.error.map_or(KVXFER_OK, number),
            transport: report.transport as u32,
            bytes: report.bytes,
            pieces: report.pieces as u64,
            failed: u64::from(report.failed),
            duration_ns: report.duration.as_nanos() as u64,
        });
        Ok(KVXFER_OK)
    })
}

/// The transfer's id, unique within its agent, as logs show it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_id(
    transfer: *const kvxfer_transfer_t,
    id_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_transfer_id", || unsafe {
        let transfer = self::transfer(transfer)?;
        Out::new("id_out", id_out)?.set(transfer.0.id().0);
        Ok(KVXFER_OK)
    })
}

/// Frees the handle. A transfer still under way goes on by itself: it is not cancelled. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_transfer_free(transfer: *mut kvxfer_transfer_t) -> kvxfer_result_t {
    guard("kvxfer_transfer_free", || take::<TransferObject>("transfer", transfer).map(|_| KVXFER_OK))
}

/// Name of a `KVXFER_TRANSPORT_...` number, e.g. `"shm"`; `"any"` for 0 and `"unknown"` for others. Static,
/// never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_transport_name(transport: u32) -> *const c_char {
    const NAMES: [&std::ffi::CStr; 7] = [c"any", c"inproc", c"shm", c"cma", c"tcp", c"nixl", c"cuda_ipc"];
    NAMES.get(transport as usize).copied().unwrap_or(c"unknown").as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transport_names_are_those_of_the_core() {
        for kind in TransportKind::ALL {
            // SAFETY: static and NUL-terminated.
            let name = unsafe { std::ffi::CStr::from_ptr(kvxfer_transport_name(kind as u32)) };
            assert_eq!(name.to_str(), Ok(kind.as_str()));
            assert_eq!(transport("t", kind as u32).unwrap(), Some(kind));
        }
        assert!(transport("t", 7).is_err());
    }
}
