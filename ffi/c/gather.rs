//! Gathers on a GPU: between paged caches and chunks of any two layouts.

use super::args::{Out, flag, invalid, list, read_struct, timeout, versioned};
use super::fence::{fence, kvxfer_fence_t};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::region::{kvxfer_region_t, region};
use super::result::{KVXFER_IN_PROGRESS, KVXFER_OK, kvxfer_result_t};
use super::transfer::kvxfer_piece_t;
use kvxfer_core::Result;
use kvxfer_core::gather::{Gather, Layout, Tokens, View};
use parking_lot::Mutex;

/// A gather: two views of a cache that fit each other. Usable from any thread.
pub struct kvxfer_gather_t {
    _opaque: [u8; 0],
}

/// Layers of a cache in a region, and which of their tokens are meant. All numbers but counts are bytes.
///
/// A layer `[2, blocks, block, heads, head]` has a `plane` of `blocks * block`, a `block` of `block_tokens * token`, a `token` of
/// `heads * head_bytes` and a `head` of `head_bytes`. Other orders differ in the strides alone. A contiguous chunk is one block of all its tokens.
/// Tokens are named by a table of blocks (`table`, `first`), by slots, or, with neither, one after the other from `first` on.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_view_t {
    /// `sizeof(kvxfer_view_t)`.
    pub struct_size: usize,
    /// Where the layers are: a GPU's memory, or pinned host memory.
    pub region: *const kvxfer_region_t,
    /// Offset of each layer in the region; any subset, in any order.
    pub layers: *const u64,
    /// Number of layers.
    pub layer_count: usize,
    /// From a token's keys to its values.
    pub plane: u64,
    /// From block to block.
    pub block: u64,
    /// From token to token in a block.
    pub token: u64,
    /// From head to head.
    pub head: u64,
    /// Bytes of a head of one token, a multiple of 8; of 16 for full speed.
    pub head_bytes: u64,
    /// 2: keys and values; 1: one of something (multi-head latent attention).
    pub planes: u32,
    /// Blocks.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Heads that are meant, from the layers' offsets on.
    pub heads: u32,
    /// Block of each `block_tokens` tokens; NULL: none.
    pub table: *const u32,
    /// Entries of `table`.
    pub table_count: usize,
    /// Slot of each token, `block * block_tokens + place in the block`; NULL: none.
    pub slots: *const i64,
    /// Entries of `slots`.
    pub slot_count: usize,
    /// Tokens of the first block of the table that are left out, or the first of consecutive tokens.
    pub first: u32,
    /// Zero.
    pub reserved: u32,
}
versioned! { kvxfer_view_t, 128; }

/// What a gather's handle stands for.
struct GatherObject {
    gather: Gather,
    running: Mutex<Option<Running>>,
}
object!(GatherObject, kvxfer_gather_t, GATHER);

#[cfg(feature = "cuda")]
type Running = kvxfer_core::gather::Gathering;
#[cfg(not(feature = "cuda"))]
type Running = ();

unsafe fn view(argument: &'static str, view: *const kvxfer_view_t) -> Result<View> {
    // SAFETY: the struct and its pointers are as the header asks.
    unsafe {
        let v = read_struct(argument, view)?;
        if v.reserved != 0 {
            return Err(invalid("reserved", format!("is {}, must be 0", v.reserved)));
        }
        let tokens = match (v.table.is_null(), v.slots.is_null()) {
            (true, true) => Tokens::From(v.first),
            (false, true) => {
                Tokens::Blocks { ids: list("table", v.table, v.table_count)?.to_vec(), first: v.first }
            }
            (true, false) => Tokens::Slots(list("slots", v.slots, v.slot_count)?.to_vec()),
            (false, false) => {
                return Err(invalid(argument, "has a table of blocks and slots; one of them is NULL"));
            }
        };
        Ok(View {
            layout: Layout {
                planes: v.planes,
                plane: v.plane,
                blocks: v.blocks,
                block_tokens: v.block_tokens,
                block: v.block,
                token: v.token,
                heads: v.heads,
                head: v.head,
                head_bytes: v.head_bytes,
            },
            memory: region(argument, v.region)?.memory().clone(),
            layers: list("layers", v.layers, v.layer_count)?.to_vec(),
            tokens,
        })
    }
}

/// Checks `tokens` tokens from one view to another: equal layers, planes, heads and bytes of a head, everything within its region. Tables
/// and slots are copied. The views must not overlap. Nothing moves yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_gather_new(
    from: *const kvxfer_view_t,
    to: *const kvxfer_view_t,
    tokens: u32,
    gather_out: *mut *mut kvxfer_gather_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_gather_new", || unsafe {
        let out = Out::new("gather_out", gather_out)?;
        let gather = Gather::new(view("from", from)?, view("to", to)?, tokens)?;
        out.set(into_raw(GatherObject { gather, running: Mutex::new(None) })?);
        Ok(KVXFER_OK)
    })
}

/// Starts it by a kernel on the GPU that one of the views lies on, after `after` (NULL: at once); does not wait. `digest` 1 takes the digest
/// of docs/kernels.md on the way. `KVXFER_BUSY` while an earlier start has not ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_gather_start(
    gather: *mut kvxfer_gather_t,
    after: *const kvxfer_fence_t,
    digest: u32,
) -> kvxfer_result_t {
    guard("kvxfer_gather_start", || {
        let object = borrow::<GatherObject>("gather", gather)?;
        let (after, digest) = (fence("after", after)?, flag("digest", digest)?);
        start(&object, after.as_ref(), digest)
    })
}

#[cfg(feature = "cuda")]
fn start(
    object: &GatherObject,
    after: Option<&kvxfer_core::cuda::Fence>,
    digest: bool,
) -> super::panic::Answer {
    let mut running = object.running.lock();
    if let Some(before) = running.as_mut()
        && !before.is_done()?
    {
        return Err(kvxfer_core::Error::failed(
            kvxfer_core::ErrorCode::Busy,
            "the gather is under way: wait for it first",
        ));
    }
    *running = Some(object.gather.start(after, digest)?);
    Ok(KVXFER_OK)
}

#[cfg(not(feature = "cuda"))]
fn start(_: &GatherObject, _: Option<&kvxfer_core::cuda::Fence>, _: bool) -> super::panic::Answer {
    Err(kvxfer_core::Error::failed(
        kvxfer_core::ErrorCode::NotAvailable,
        "CUDA not available: built without the feature `cuda`",
    ))
}

/// Waits for the end of a start, `timeout_ms` at most (0: asks, and answers `KVXFER_IN_PROGRESS`). On `KVXFER_OK` the bytes are where they belong.
/// `bytes_out` and `digest_out` may be NULL; the digest is 0 where none was asked for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_gather_wait(
    gather: *mut kvxfer_gather_t,
    timeout_ms: u64,
    bytes_out: *mut u64,
    digest_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_gather_wait", || unsafe {
        let object = borrow::<GatherObject>("gather", gather)?;
        let (bytes, digest) = (Out::optional(bytes_out), Out::optional(digest_out));
        let limit = timeout("timeout_ms", timeout_ms)?;
        let Some(done) = wait(&object, limit)? else { return Ok(KVXFER_IN_PROGRESS) };
        if let Some(out) = bytes {
            out.set(done.0);
        }
        if let Some(out) = digest {
            out.set(done.1);
        }
        Ok(KVXFER_OK)
    })
}

fn not_started() -> kvxfer_core::Error {
    invalid("gather", "has not been started")
}

#[cfg(feature = "cuda")]
fn wait(object: &GatherObject, limit: std::time::Duration) -> Result<Option<(u64, u64)>> {
    let mut slot = object.running.lock();
    let running = slot.as_mut().ok_or_else(not_started)?;
    match running.wait(limit) {
        Err(kvxfer_core::Error::TimedOut { .. }) if limit.is_zero() => Ok(None),
        Err(e @ kvxfer_core::Error::TimedOut { .. }) => Err(e),
        ended => {
            *slot = None;
            ended.map(|done| Some((done.bytes, done.digest.unwrap_or(0))))
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn wait(object: &GatherObject, _: std::time::Duration) -> Result<Option<(u64, u64)>> {
    match *object.running.lock() {
        None => Err(not_started()),
        Some(()) => Ok(None),
    }
}

/// The same as pieces for `kvxfer_peer_write`: local offsets in `from`'s region, remote ones in `to`'s, neighbours joined.
/// `count_out` gets their number; `KVXFER_TOO_LARGE` when `capacity` is less, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_gather_pieces(
    gather: *const kvxfer_gather_t,
    pieces: *mut kvxfer_piece_t,
    capacity: usize,
    count_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_gather_pieces", || unsafe {
        let object = borrow::<GatherObject>("gather", gather)?;
        let count = Out::new("count_out", count_out)?;
        let runs = object.gather.runs();
        if runs.len() > capacity {
            count.set(runs.len());
            return Err(kvxfer_core::Error::failed(
                kvxfer_core::ErrorCode::TooLarge,
                format!("{} pieces, but there is room for {capacity}", runs.len()),
            ));
        }
        let out = super::args::list_mut("pieces", pieces, runs.len())?;
        count.set(runs.len());
        for (slot, r) in out.iter_mut().zip(&runs) {
            *slot = kvxfer_piece_t {
                local_offset: r.local_offset,
                remote_offset: r.remote_offset,
                length: r.len,
            };
        }
        Ok(KVXFER_OK)
    })
}

/// Frees the handle, after the end of what is under way. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_gather_free(gather: *mut kvxfer_gather_t) -> kvxfer_result_t {
    guard("kvxfer_gather_free", || take::<GatherObject>("gather", gather).map(|_| KVXFER_OK))
}
