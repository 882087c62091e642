//! How one layer of a cache lays out its tokens.

use crate::{Error, Result};

/// Whether keys and values, or blocks, come first in a paged layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[2, blocks, …]`, as vLLM's `FlashAttention` backend has it.
    KvFirst,
    /// `[blocks, 2, …]`, as vLLM's `FlashInfer` backend has it.
    BlocksFirst,
}

/// One layer in memory. All numbers but counts are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Keys and values, or one of something (multi-head latent attention).
    pub planes: u32,
    /// From a token's keys to its values.
    pub plane: u64,
    /// Blocks; 1 where tokens simply follow one another.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// From block to block.
    pub block: u64,
    /// From token to token within a block.
    pub token: u64,
    /// Heads.
    pub heads: u32,
    /// From head to head.
    pub head: u64,
    /// Of one head of one token, together in memory.
    pub head_bytes: u64,
}

/// Far more than any model has; the kernels count within a token in 32 bits.
const MAX_TOKEN: u64 = 1 << 30;

impl Layout {
    /// A paged layer: `[2, blocks, block, heads, head]` or `[blocks, 2, block, heads, head]`; with `heads_first` the heads come before
    /// the tokens of a block (HND).
    pub fn paged(
        order: Order,
        heads_first: bool,
        blocks: u32,
        block_tokens: u32,
        heads: u32,
        head_bytes: u64,
    ) -> Self {
        let row = u64::from(heads) * head_bytes;
        let half = u64::from(block_tokens) * row;
        let (plane, block) = match order {
            Order::KvFirst => (u64::from(blocks) * half, half),
            Order::BlocksFirst => (half, 2 * half),
        };
        let (token, head) =
            if heads_first { (head_bytes, u64::from(block_tokens) * head_bytes) } else { (row, head_bytes) };
        Self { planes: 2, plane, blocks, block_tokens, block, token, heads, head, head_bytes }
    }

    /// A paged layer of multi-head latent attention: `[blocks, block, row]`.
    pub fn latent(blocks: u32, block_tokens: u32, row_bytes: u64) -> Self {
        Self {
            planes: 1,
            plane: 0,
            blocks,
            block_tokens,
            block: u64::from(block_tokens) * row_bytes,
            token: row_bytes,
            heads: 1,
            head: row_bytes,
            head_bytes: row_bytes,
        }
    }

    /// A layer within a chunk `[2, layers, tokens, heads * head]` (`KV_2LTD`); layer `i` begins `i * tokens * heads * head_bytes`
    /// after the chunk.
    pub fn chunk(layers: u32, tokens: u32, heads: u32, head_bytes: u64) -> Self {
        let row = u64::from(heads) * head_bytes;
        Self {
            planes: 2,
            plane: u64::from(layers) * u64::from(tokens) * row,
            blocks: 1,
            block_tokens: tokens,
            block: 0,
            token: row,
            heads,
            head: head_bytes,
            head_bytes,
        }
    }

    /// A layer within a chunk `[layers, tokens, row]` of multi-head latent attention.
    pub fn latent_chunk(tokens: u32, row_bytes: u64) -> Self {
        Self { plane: 0, ..Self::latent(1, tokens, row_bytes) }
    }

    /// A layer's own chunk `[tokens, 2, heads * head]`, keys and values of a token side by side, as caches that are moved layer by layer
    /// have it.
    pub fn layer_chunk(tokens: u32, heads: u32, head_bytes: u64) -> Self {
        let row = u64::from(heads) * head_bytes;
        Self {
            planes: 2,
            plane: row,
            blocks: 1,
            block_tokens: tokens,
            block: 0,
            token: 2 * row,
            heads,
            head: head_bytes,
            head_bytes,
        }
    }

    /// Only heads `first..first + count`: what a rank with fewer heads has, or wants.
    pub fn with_heads(self, count: u32) -> Self {
        Self { heads: count, ..self }
    }

    /// Tokens there is room for.
    pub fn capacity(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_tokens)
    }

    /// Bytes from the layer's beginning to the end of its last byte, `None` when no memory is so large.
    pub(super) fn extent(&self) -> Option<u64> {
        let last = |count: u32, step: u64| u64::from(count.checked_sub(1)?).checked_mul(step);
        last(self.planes, self.plane)?
            .checked_add(last(self.blocks, self.block)?)?
            .checked_add(last(self.block_tokens, self.token)?)?
            .checked_add(last(self.heads, self.head)?)?
            .checked_add(self.head_bytes)
            .filter(|e| i64::try_from(*e).is_ok())
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |problem: String| Error::InvalidArgument { argument: "layout", problem };
        for (name, n) in [
            ("planes", u64::from(self.planes)),
            ("blocks", u64::from(self.blocks)),
            ("block_tokens", u64::from(self.block_tokens)),
            ("heads", u64::from(self.heads)),
            ("head_bytes", self.head_bytes),
        ] {
            if n == 0 {
                return Err(bad(format!("{name} is 0")));
            }
        }
        if self.planes > 2 {
            return Err(bad(format!("{} planes; 1 and 2 are known", self.planes)));
        }
        if !self.head_bytes.is_multiple_of(8) {
            return Err(bad(format!(
                "a head of {} bytes; the kernels move multiples of 8 bytes (16 for full speed)",
                self.head_bytes
            )));
        }
        let token = u64::from(self.heads).checked_mul(self.head_bytes);
        if token.is_none_or(|t| t > MAX_TOKEN) {
            return Err(bad(format!(
                "{} heads of {} bytes; a token's keys (or values) have at most {MAX_TOKEN} in a layer",
                self.heads, self.head_bytes
            )));
        }
        if self.extent().is_none() {
            return Err(bad(format!("{self:?} is larger than memory can be")));
        }
        Ok(())
    }

    /// All heads of a token lie together.
    pub(super) fn is_whole(&self) -> bool {
        self.heads == 1 || self.head == self.head_bytes
    }
}
