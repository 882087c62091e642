//! Between an engine's paged cache and contiguous chunks, on the processor: gather before a send, scatter after a receive.
//!
//! vLLM's CPU attention keeps a layer as `[blocks, heads, block size, 2 * head size]`. What it says by that is only where a
//! (block, head) begins: the bytes of one are first all its keys, then all its values, each in the order that the attention
//! kernels like to read ([`PagedVariant`]). `LMCache` keeps a chunk as `KV_2LTD`, `[2, layers, tokens, heads * head size]`: keys of
//! all layers, then values, a row a token. A slot is `block * block size + place in the block`, one for each token, in any order.
//!
//! # What was seen
//!
//! vLLM 0.32 writes its cache with the op `cpu_attn_reshape_and_cache`. It was given known keys and values in every slot, and
//! the cache was read back, for float16, bfloat16 and float32, with blocks of 16 to 160 tokens and heads of 32 to 512 elements:
//!
//! | kernels | taken by vLLM for | keys of a (block, head) | values of a (block, head) |
//! |---|---|---|---|
//! | `vec` | every type; blocks and heads in multiples of 32 | `[head size][block size]` | `[block size][head size]` |
//! | `vec16` | the other blocks, and heads of 80 or 112 | the same | the same |
//! | `amx` | bfloat16 where the processor has AMX; blocks and heads in multiples of 32 | `[block size / 16][head size / 2][16 tokens][2]` | `[head size / 16][block size / 2][16 elements][2 tokens]` |
//!
//! The op for `amx` lays float16 out like bfloat16. It takes float32 too, with another layout, which vLLM never chooses; it is
//! refused here, as are the kernels of other processors (`neon`, `rvv`, `vsx`, `vxe`) and caches of one byte an element.
//!
//! # How it is done
//!
//! The slots of a chunk become runs of neighbours within a block (`runs`). A layer's keys, and a layer's values, are one piece
//! of work, taken by whichever thread is free: no two threads write the same bytes, whatever the slots say. In all four
//! formats a run of one (block, head) is either a transposition of elements or of pairs, an interleaving of two rows, or a plain
//! copy (`run`, `transpose`). Large moves are streamed: a head's rows are put in order in a buffer that stays in the first-level
//! cache, and leave it past the caches, while what is read next is fetched (`work`).

mod layout;
mod run;
mod runs;
#[cfg(test)]
mod tests;
mod transpose;
mod work;

pub use layout::{PagedLayout, PagedVariant};

use crate::{Error, Result};

/// No model has so many; more is a wild number.
const MAX_LAYERS: usize = 1 << 16;

/// A paged cache in host memory: where its layers are, and what they look like.
#[derive(Debug)]
pub struct PagedCache {
    layout: PagedLayout,
    layers: Vec<*mut u8>,
}

// SAFETY: the pointers name memory that whoever made the cache has promised for as long as it lives; which threads use them is
// stated at `gather` and `scatter`.
unsafe impl Send for PagedCache {}
// SAFETY: as above.
unsafe impl Sync for PagedCache {}

/// A contiguous chunk, and the slots of its tokens.
#[derive(Clone, Copy, Debug)]
pub struct PagedChunk<'a> {
    /// A slot for each token of the chunk.
    pub slots: &'a [i64],
    /// So many tokens at the chunk's start are left alone on both sides.
    pub skip: usize,
    /// First byte of the chunk.
    pub data: *mut u8,
    /// Bytes of the chunk.
    pub len: u64,
}

impl PagedCache {
    /// A cache whose layers begin at `layers`.
    ///
    /// # Safety
    /// Each layer is valid for [`PagedLayout::layer_bytes`] bytes as long as the cache is used.
    pub unsafe fn new(layout: PagedLayout, layers: &[*mut u8]) -> Result<Self> {
        layout.check()?;
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(invalid(
                "layers",
                format!("{} of them; 1 to {MAX_LAYERS} are possible", layers.len()),
            ));
        }
        if let Some(i) = layers.iter().position(|l| l.is_null()) {
            return Err(invalid("layers", format!("layer {i} is NULL")));
        }
        Ok(Self { layout, layers: layers.to_vec() })
    }

    /// Bytes of a chunk of so many tokens; `None` when that is more than memory can hold.
    pub fn chunk_bytes(&self, tokens: usize) -> Option<u64> {
        let row = self.layout.row_bytes();
        let bytes = row.checked_mul(tokens)?.checked_mul(2 * self.layers.len())?;
        isize::try_from(bytes).ok().map(|bytes| bytes as u64)
    }

    /// Copies the tokens of each chunk from the cache into it. `threads` of 0 takes as many as the calling thread has
    /// processors, eight at most. Nothing is copied when an argument is wrong.
    ///
    /// # Safety
    /// Each chunk is writable for its length. During the call nobody else writes to the slots named and nobody uses the chunks.
    pub unsafe fn gather(&self, chunks: &[PagedChunk<'_>], threads: usize) -> Result<()> {
        self.check(chunks)?;
        disjoint(Range::of_chunks(chunks), &Range::of_layers(self))?;
        // SAFETY: passed on; everything was checked.
        unsafe { work::carry::<true>(self, chunks, threads) };
        Ok(())
    }

    /// Copies each chunk's tokens into their slots. Of slots that are named twice, the later token stays. `threads` as for
    /// [`gather`](Self::gather).
    ///
    /// # Safety
    /// Each chunk is readable for its length. During the call nobody uses the slots named and nobody writes to the chunks.
    pub unsafe fn scatter(&self, chunks: &[PagedChunk<'_>], threads: usize) -> Result<()> {
        self.check(chunks)?;
        disjoint(Range::of_layers(self), &Range::of_chunks(chunks))?;
        // SAFETY: passed on; everything was checked.
        unsafe { work::carry::<false>(self, chunks, threads) };
        Ok(())
    }

    fn check(&self, chunks: &[PagedChunk<'_>]) -> Result<()> {
        for (i, chunk) in chunks.iter().enumerate() {
            let tokens = chunk.slots.len();
            if chunk.data.is_null() && chunk.len > 0 {
                return Err(invalid("chunks", format!("chunk {i}: its data is NULL")));
            }
            if self.chunk_bytes(tokens) != Some(chunk.len) {
                let needed =
                    self.chunk_bytes(tokens).map_or("more than memory holds".into(), |b| b.to_string());
                return Err(invalid(
                    "chunks",
                    format!(
                        "chunk {i} has {} bytes, but {tokens} tokens of {} layers of 2 * {} bytes are {needed}",
                        chunk.len,
                        self.layers.len(),
                        self.layout.row_bytes()
                    ),
                ));
            }
            if chunk.skip > tokens {
                return Err(invalid("chunks", format!("chunk {i} skips {} of {tokens} tokens", chunk.skip)));
            }
            let slots = self.layout.slots();
            let outside = |slot: &i64| u64::try_from(*slot).map_or(true, |s| s >= slots);
            if let Some(at) = chunk.slots[chunk.skip..].iter().position(outside) {
                let token = chunk.skip + at;
                return Err(invalid(
                    "chunks",
                    format!(
                        "chunk {i}, token {token}: slot {} does not lie within {} blocks of {} tokens",
                        chunk.slots[token], self.layout.blocks, self.layout.block_size
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Memory that a message can name.
struct Range {
    what: &'static str,
    index: usize,
    from: usize,
    to: usize,
}

impl Range {
    fn of_chunks(chunks: &[PagedChunk<'_>]) -> Vec<Self> {
        let range =
            |(i, chunk): (usize, &PagedChunk<'_>)| Self::new("chunk", i, chunk.data, chunk.len as usize);
        chunks.iter().enumerate().map(range).collect()
    }

    fn of_layers(cache: &PagedCache) -> Vec<Self> {
        let bytes = cache.layout.layer_bytes();
        cache.layers.iter().enumerate().map(|(i, base)| Self::new("layer", i, *base, bytes)).collect()
    }

    fn new(what: &'static str, index: usize, base: *mut u8, len: usize) -> Self {
        Self { what, index, from: base.addr(), to: base.addr().saturating_add(len) }
    }

    fn overlap(&self, other: &Self) -> Error {
        let text = format!("{} {} and {} {} share memory", self.what, self.index, other.what, other.index);
        invalid(if self.what == "layer" { "layers" } else { "chunks" }, text)
    }
}

/// What is written overlaps nothing else; what is only read may overlap.
fn disjoint(mut written: Vec<Range>, read: &[Range]) -> Result<()> {
    written.retain(|range| range.from < range.to);
    written.sort_unstable_by_key(|range| range.from);
    if let Some(pair) = written.windows(2).find(|pair| pair[1].from < pair[0].to) {
        return Err(pair[0].overlap(&pair[1]));
    }
    for range in read.iter().filter(|range| range.from < range.to) {
        // They are in order and apart: the last one that begins before the range's end is the last one that ends, too.
        let before = written.partition_point(|other| other.from < range.to);
        if let Some(other) = written[..before].last().filter(|other| range.from < other.to) {
            return Err(other.overlap(range));
        }
    }
    Ok(())
}

fn invalid(argument: &'static str, problem: impl Into<String>) -> Error {
    Error::InvalidArgument { argument, problem: problem.into() }
}
