//! Between an engine's paged cache and contiguous chunks.

use super::args::{invalid, list, read_struct, versioned};
use super::panic::{Answer, guard};
use super::result::{KVXFER_OK, kvxfer_result_t};
use kvxfer_core::{PagedCache, PagedChunk, PagedLayout, PagedVariant, Result};
use std::ffi::c_void;

/// vLLM's `vec` and `vec16` kernels. In a (block, head): keys `[head_size][block_size]`, values
/// `[block_size][head_size]`.
pub const KVXFER_PAGED_VEC: u32 = 1;
/// vLLM's `amx` kernels, elements of 2 bytes. In a (block, head): keys `[block_size / 16][head_size / 2][16][2]`,
/// values `[head_size / 16][block_size / 2][16][2]`.
pub const KVXFER_PAGED_AMX: u32 = 2;

/// A paged cache in host memory. Each layer is contiguous, `[blocks, heads, 2, block_size * head_size]` elements:
/// of each block and head first the keys, then the values, in the order that `layout` names.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_paged_t {
    /// `sizeof(kvxfer_paged_t)`.
    pub struct_size: usize,
    /// First byte of each layer; the memory stays the caller's.
    pub layers: *const *mut c_void,
    /// Number of layers in `layers`.
    pub layer_count: usize,
    /// Bytes of each layer; must be what the sizes below come to.
    pub layer_bytes: u64,
    /// Blocks.
    pub blocks: u64,
    /// Heads of keys and of values.
    pub heads: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// Elements of a head.
    pub head_size: u32,
    /// Bytes of an element: 2 or 4.
    pub element_bytes: u32,
    /// `KVXFER_PAGED_...`.
    pub layout: u32,
    /// Threads that copy; 0: as many as the calling thread has processors, eight at most.
    pub threads: u32,
}
versioned! { kvxfer_paged_t, 64; }

/// A contiguous chunk, `[2, layers, tokens, heads * head_size]` elements: keys of all layers, then values.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_paged_chunk_t {
    /// Slot of each token, `block * block_size + place in the block`; in any order.
    pub slots: *const i64,
    /// Number of tokens.
    pub tokens: usize,
    /// So many tokens at the chunk's start are left alone on both sides; their slots are not looked at.
    pub skip: usize,
    /// First byte of the chunk; the memory stays the caller's.
    pub data: *mut c_void,
    /// Bytes of the chunk; must be what its tokens, skipped ones too, come to.
    pub length: u64,
}

/// Copies tokens out of the cache: each chunk is filled from its slots. Several threads, and large copies go past
/// the processor's cache; returns when all is done. The slots' bytes must not change meanwhile. Everything is
/// checked first; on `KVXFER_INVALID_ARGUMENT` (a slot outside the blocks, a length that does not fit the sizes,
/// an unknown layout, memory that overlaps) nothing was copied. The chunks are disjoint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_paged_gather(
    cache: *const kvxfer_paged_t,
    chunks: *const kvxfer_paged_chunk_t,
    chunk_count: usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_paged_gather", || unsafe { carry(cache, chunks, chunk_count, true) })
}

/// Copies tokens into the cache: each chunk's tokens go to its slots, and nothing else of the cache changes. Of a
/// slot that is named twice, the later token stays. The layers are disjoint; otherwise as `kvxfer_paged_gather`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_paged_scatter(
    cache: *const kvxfer_paged_t,
    chunks: *const kvxfer_paged_chunk_t,
    chunk_count: usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_paged_scatter", || unsafe { carry(cache, chunks, chunk_count, false) })
}

/// # Safety
/// As the header asks.
unsafe fn carry(
    cache: *const kvxfer_paged_t,
    chunks: *const kvxfer_paged_chunk_t,
    count: usize,
    gather: bool,
) -> Answer {
    // SAFETY: passed on.
    unsafe {
        let paged = read_struct("cache", cache)?;
        if chunks.is_null() {
            return Err(invalid("chunks", "is NULL"));
        }
        let cache = paged_cache(&paged)?;
        let chunks = list("chunks", chunks, count)?.iter().map(|c| chunk(c)).collect::<Result<Vec<_>>>()?;
        if gather {
            cache.gather(&chunks, paged.threads as usize)?;
        } else {
            cache.scatter(&chunks, paged.threads as usize)?;
        }
    }
    Ok(KVXFER_OK)
}

/// # Safety
/// The layers are as the header asks.
unsafe fn paged_cache(paged: &kvxfer_paged_t) -> Result<PagedCache> {
    let variant = match paged.layout {
        KVXFER_PAGED_VEC => PagedVariant::Vec,
        KVXFER_PAGED_AMX => PagedVariant::Amx,
        other => {
            return Err(invalid(
                "cache: layout",
                format!("is {other}; known are KVXFER_PAGED_VEC, KVXFER_PAGED_AMX"),
            ));
        }
    };
    let layout = PagedLayout {
        variant,
        blocks: paged.blocks as usize,
        heads: paged.heads as usize,
        block_size: paged.block_size as usize,
        head_size: paged.head_size as usize,
        element_bytes: paged.element_bytes as usize,
    };
    // SAFETY: passed on.
    let cache = unsafe {
        let layers = list("cache: layers", paged.layers, paged.layer_count)?;
        PagedCache::new(layout, &layers.iter().map(|l| l.cast::<u8>()).collect::<Vec<_>>())
    }?;
    if layout.layer_bytes() as u64 != paged.layer_bytes {
        return Err(invalid(
            "cache: layer_bytes",
            format!("is {}, but the sizes of the layers come to {}", paged.layer_bytes, layout.layer_bytes()),
        ));
    }
    Ok(cache)
}

/// # Safety
/// The slots are readable, as the header asks, and outlive what is returned.
unsafe fn chunk<'a>(chunk: &kvxfer_paged_chunk_t) -> Result<PagedChunk<'a>> {
    // SAFETY: passed on.
    let slots = unsafe { list("chunks: slots", chunk.slots, chunk.tokens) }?;
    Ok(PagedChunk { slots, skip: chunk.skip, data: chunk.data.cast(), len: chunk.length })
}
