//! Reading back: which published chunks a receiver still has, and their bytes.

use super::args::{Out, OutStruct, invalid, list, texts, timeout, versioned};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::region::kvxfer_region_t;
use super::result::{KVXFER_OK, kvxfer_result_t};
use super::sender::{kvxfer_run_t, kvxfer_sender_t, sender, source};
use kvxfer_core::channel::Found;
use kvxfer_core::proto::wire::FoundChunk;
use kvxfer_core::{Agent, ChunkKey, Error, ErrorCode, Result};
use parking_lot::Mutex;
use std::ffi::c_char;
use std::sync::Arc;

/// Chunks that a receiver has, held for reading until they are read or the handle is freed. Usable from any thread.
pub struct kvxfer_found_t {
    _opaque: [u8; 0],
}

/// Most keys in one query.
pub const KVXFER_MAX_QUERY: usize = 4096;
const _: () = assert!(KVXFER_MAX_QUERY == kvxfer_core::proto::wire::MAX_QUERY);

/// One chunk that was found. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_found_chunk_t {
    /// `sizeof(kvxfer_found_chunk_t)`, set by the caller.
    pub struct_size: usize,
    /// Valid bytes.
    pub length: u64,
    /// Generation of its page.
    pub generation: u64,
    /// Place of its key in the query.
    pub index: u32,
    /// Its page in the receiver's pool.
    pub page: u32,
}

/// Where a chunk that was found is read to: runs of a region, in the order of the chunk's bytes. Their sum is the
/// chunk's length.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_found_target_t {
    /// The region.
    pub region: *const kvxfer_region_t,
    /// The runs.
    pub runs: *const kvxfer_run_t,
    /// Number of runs.
    pub run_count: usize,
    /// Place of the chunk's key in the query.
    pub index: u32,
    /// Zero.
    pub reserved: u32,
}

/// How reading went. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_read_report_t {
    /// `sizeof(kvxfer_read_report_t)`, set by the caller.
    pub struct_size: usize,
    /// Bytes read.
    pub bytes: u64,
    /// From the call to the certainty that they are good, nanoseconds.
    pub took_ns: u64,
    /// Chunks read.
    pub chunks: u32,
    /// `KVXFER_TRANSPORT_...`: what carried the bytes.
    pub transport: u32,
}
versioned! {
    kvxfer_found_chunk_t, 32;
    kvxfer_read_report_t, 32;
}

/// What the handle stands for.
struct FoundObject {
    chunks: Vec<FoundChunk>,
    lease_ms: u64,
    /// Empty once read.
    held: Mutex<Option<Found>>,
    agent: Agent,
}
object!(FoundObject, kvxfer_found_t, FOUND);

fn found(found: *const kvxfer_found_t) -> Result<Arc<FoundObject>> {
    borrow("found", found)
}

/// Asks which of `count` chunks, at most `KVXFER_MAX_QUERY`, the receiver has published. Their pages are held for `lease_ms`, at most
/// the receiver's own lease, so that `kvxfer_found_read` can read them; with a lease of 0 the call only asks, and
/// nothing is held. A chunk that the receiver does not have is simply not found. Free the answer with
/// `kvxfer_found_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_query(
    sender: *mut kvxfer_sender_t,
    keys: *const *const c_char,
    count: usize,
    lease_ms: u64,
    timeout_ms: u64,
    found_out: *mut *mut kvxfer_found_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_query", || unsafe {
        let object = self::sender(sender)?;
        let out = Out::new("found_out", found_out)?;
        let keys = texts("keys", keys, count)?;
        let keys = keys.into_iter().map(|k| Ok(ChunkKey::new(k)?)).collect::<Result<Vec<_>>>()?;
        let (lease, timeout) = (timeout("lease_ms", lease_ms)?, timeout("timeout_ms", timeout_ms)?);
        let found = object.sender.query(keys, lease, timeout)?;
        let (chunks, lease_ms) = (found.chunks().to_vec(), found.lease().as_millis() as u64);
        let (held, agent) = (Mutex::new(Some(found)), object.agent.clone());
        out.set(into_raw(FoundObject { chunks, lease_ms, held, agent })?);
        Ok(KVXFER_OK)
    })
}

/// How many chunks were found, and for how long their pages are held (`lease_ms_out` may be NULL), counted from the
/// receiver's answer; 0 when nothing is held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_found_count(
    found: *const kvxfer_found_t,
    count_out: *mut usize,
    lease_ms_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_found_count", || unsafe {
        let object = self::found(found)?;
        let (count, lease) = (Out::new("count_out", count_out)?, Out::optional(lease_ms_out));
        count.set(object.chunks.len());
        if let Some(lease) = lease {
            lease.set(object.lease_ms);
        }
        Ok(KVXFER_OK)
    })
}

/// Chunk number `index` of those that were found, in the order of the query; `KVXFER_OUT_OF_RANGE` when there are not
/// so many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_found_chunk(
    found: *const kvxfer_found_t,
    index: usize,
    chunk_out: *mut kvxfer_found_chunk_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_found_chunk", || unsafe {
        let object = self::found(found)?;
        let out = OutStruct::new("chunk_out", chunk_out)?;
        let chunk = object.chunks.get(index).ok_or_else(|| Error::OutOfRange {
            what: "the chunks that were found".into(),
            offset: index as u64,
            len: 1,
            limit: object.chunks.len() as u64,
        })?;
        out.set(&kvxfer_found_chunk_t {
            struct_size: 0,
            length: chunk.len,
            generation: chunk.generation.0,
            index: chunk.index,
            page: chunk.page.0,
        });
        Ok(KVXFER_OK)
    })
}

/// Reads chunks back, waits at most `timeout_ms`, and gives everything that was found back to the receiver; further
/// calls answer `KVXFER_CLOSED`. On `KVXFER_OK` every byte is there and fits the digest its writer committed.
/// `KVXFER_STALE`: the lease ended first; `KVXFER_CORRUPT`: the bytes do not fit; `KVXFER_PEER_GONE`: the receiver is
/// gone. After a failure the targets may hold anything, and nothing changes them any more. `report_out` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_found_read(
    found: *mut kvxfer_found_t,
    targets: *const kvxfer_found_target_t,
    count: usize,
    timeout_ms: u64,
    report_out: *mut kvxfer_read_report_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_found_read", || unsafe {
        let object = self::found(found)?;
        let report =
            if report_out.is_null() { None } else { Some(OutStruct::new("report_out", report_out)?) };
        let timeout = timeout("timeout_ms", timeout_ms)?;
        let targets = list("targets", targets, count)?
            .iter()
            .map(|t| {
                if t.reserved != 0 {
                    return Err(invalid("targets.reserved", format!("is {}, must be 0", t.reserved)));
                }
                let (source, _) = source(&object.agent, "targets.region", t.region, t.runs, t.run_count)?;
                Ok((t.index, source))
            })
            .collect::<Result<Vec<_>>>()?;
        let held = object.held.lock().take().ok_or_else(|| {
            Error::failed(ErrorCode::Closed, "what was found has been read and given back already")
        })?;
        let answer = held.read(&targets, timeout)?;
        if let Some(out) = report {
            out.set(&kvxfer_read_report_t {
                struct_size: 0,
                bytes: answer.bytes,
                took_ns: answer.took.as_nanos() as u64,
                chunks: answer.chunks,
                transport: answer.transport as u32,
            });
        }
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; what is still held is given back to the receiver. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_found_free(found: *mut kvxfer_found_t) -> kvxfer_result_t {
    guard("kvxfer_found_free", || take::<FoundObject>("found", found).map(|_| KVXFER_OK))
}
