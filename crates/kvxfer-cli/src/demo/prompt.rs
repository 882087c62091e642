//! The prompt whose cache is moved: shape, chunks, keys, and where the engine keeps each run of bytes.
//!
//! The engine's side is paged as vLLM's is: per layer, keys and values in blocks of 16 tokens, scattered by a block
//! table. A chunk is contiguous, `KV_2LTD` = `[2, layers, tokens, heads * dim]`, so storing it gathers runs of one
//! block's tokens.

use crate::content::{Content, Rng, mix};
use crate::{Failure, units};
use kvxfer_core::proto::wire::ChunkSpec;
use kvxfer_core::{ChunkKey, Geometry};
use serde::{Deserialize, Serialize};

const LAYERS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
/// Bytes of one token's keys (or values) in one layer.
const ROW: u64 = (KV_HEADS * HEAD_DIM) as u64 * 2;
/// Bytes of one token's cache.
pub(super) const TOKEN_BYTES: u64 = ROW * 2 * LAYERS as u64;
/// Tokens of one block of the engine's paged cache.
const BLOCK: u32 = 16;

/// A prompt of a number of tokens, cut into chunks.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Prompt {
    pub tokens: u32,
    pub chunk_tokens: u32,
    pub seed: u64,
}

impl Prompt {
    /// The same shape with other content and keys.
    pub(super) fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    pub(super) fn chunks(self) -> usize {
        self.tokens.div_ceil(self.chunk_tokens) as usize
    }

    pub(super) fn bytes(self) -> u64 {
        u64::from(self.tokens) * TOKEN_BYTES
    }

    pub(super) fn page_bytes(self) -> u64 {
        u64::from(self.chunk_tokens) * TOKEN_BYTES
    }

    /// Tokens of chunk `i`; the last one may be partial.
    pub(super) fn chunk_tokens(self, i: usize) -> u32 {
        (self.tokens - i as u32 * self.chunk_tokens).min(self.chunk_tokens)
    }

    pub(super) fn chunk_bytes(self, i: usize) -> u64 {
        u64::from(self.chunk_tokens(i)) * TOKEN_BYTES
    }

    /// What chunk `i` holds.
    pub(super) fn content(self, i: usize) -> Content {
        Content::new(self.seed, i as u64)
    }

    /// Its key, in `LMCache`'s form.
    pub(super) fn key(self, i: usize) -> Result<ChunkKey, Failure> {
        let hash = mix(mix(self.seed).wrapping_add(i as u64 + 1));
        Ok(ChunkKey::new(format!("meta-llama/Llama-3.1-8B-Instruct@1@0@{hash:016x}@bfloat16"))?)
    }

    pub(super) fn specs(self) -> Result<Vec<ChunkSpec>, Failure> {
        (0..self.chunks()).map(|i| Ok(ChunkSpec { key: self.key(i)?, len: self.chunk_bytes(i) })).collect()
    }

    pub(super) fn geometry(self) -> Geometry {
        Geometry {
            model: "meta-llama/Llama-3.1-8B-Instruct".into(),
            dtype: "bfloat16".into(),
            layout: "KV_2LTD".into(),
            page_bytes: self.page_bytes(),
            chunk_tokens: self.chunk_tokens,
            layers: LAYERS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            tp_rank: 0,
            tp_size: 1,
            hash_seed: "0".into(),
        }
    }

    /// `21 chunks (20 x 256 tokens, 1 x 151)`.
    pub(super) fn describe(self) -> String {
        let n = self.chunks();
        let tail = self.chunk_tokens(n - 1);
        let chunks = if n == 1 { "chunk" } else { "chunks" };
        let shape = if tail == self.chunk_tokens {
            format!("{n} x {tail} tokens")
        } else if n == 1 {
            format!("{tail} of {} tokens", self.chunk_tokens)
        } else {
            format!("{} x {} tokens, 1 x {tail}", n - 1, self.chunk_tokens)
        };
        format!("{n} {chunks} ({shape}), {} bytes", units::thousands(self.bytes()))
    }
}

/// The engine's paged cache of one prompt.
pub(super) struct Engine {
    cache: Vec<u8>,
    blocks: u32,
    table: Vec<u32>,
}

impl Engine {
    pub(super) fn new(prompt: Prompt) -> Self {
        let blocks = prompt.tokens.div_ceil(BLOCK);
        let bytes = u64::from(blocks) * u64::from(BLOCK) * TOKEN_BYTES;
        Self {
            cache: vec![0; bytes as usize],
            blocks,
            table: Rng::new(prompt.seed).permutation(blocks as usize),
        }
    }

    /// What a prefill would leave: every chunk's content in its blocks.
    pub(super) fn prefill(&mut self, prompt: Prompt) {
        for chunk in 0..prompt.chunks() {
            let content = prompt.content(chunk);
            for run in self.runs(prompt, chunk) {
                content.fill(run.in_chunk, &mut self.cache[run.in_cache..][..run.len]);
            }
        }
    }

    /// Hands out chunk `i` run by run: offset within the chunk, and the bytes.
    pub(super) fn gather<E>(
        &self,
        prompt: Prompt,
        i: usize,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.runs(prompt, i)
            .into_iter()
            .try_for_each(|run| take(run.in_chunk, &self.cache[run.in_cache..][..run.len]))
    }

    fn runs(&self, prompt: Prompt, chunk: usize) -> Vec<Run> {
        let tokens = prompt.chunk_tokens(chunk);
        let first = chunk as u32 * prompt.chunk_tokens;
        let plane = u64::from(self.blocks) * u64::from(BLOCK) * ROW;
        let mut runs = Vec::new();
        for kv in 0..2 {
            for layer in 0..LAYERS {
                let mut t = 0;
                while t < tokens {
                    let token = first + t;
                    let n = (BLOCK - token % BLOCK).min(tokens - t);
                    let slot = self.table[(token / BLOCK) as usize] * BLOCK + token % BLOCK;
                    runs.push(Run {
                        in_chunk: u64::from((kv * LAYERS + layer) * tokens + t) * ROW,
                        in_cache: (u64::from(layer * 2 + kv) * plane + u64::from(slot) * ROW) as usize,
                        len: (u64::from(n) * ROW) as usize,
                    });
                    t += n;
                }
            }
        }
        runs
    }
}

/// A contiguous run of one block's tokens.
struct Run {
    in_chunk: u64,
    in_cache: usize,
    len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guides_prompt_has_its_size() {
        let p = Prompt { tokens: 5271, chunk_tokens: 256, seed: 1 };
        assert_eq!((p.chunks(), p.chunk_tokens(20), p.bytes()), (21, 151, 690_880_512));
        assert_eq!(p.page_bytes(), 32 << 20);
        assert_eq!((0..21).map(|i| p.chunk_bytes(i)).sum::<u64>(), p.bytes());
        assert_eq!(p.describe(), "21 chunks (20 x 256 tokens, 1 x 151), 690,880,512 bytes");
    }

    #[test]
    fn gathering_a_prefilled_cache_gives_the_content() {
        // Chunks that end inside a block make runs shorter than one.
        let p = Prompt { tokens: 100, chunk_tokens: 40, seed: 9 };
        let mut engine = Engine::new(p);
        engine.prefill(p);
        for i in 0..p.chunks() {
            let mut next = 0;
            engine
                .gather(p, i, |at, bytes| {
                    assert_eq!(at, next, "runs follow one another");
                    next = at + bytes.len() as u64;
                    p.content(i).check(at, bytes)
                })
                .expect("content");
            assert_eq!(next, p.chunk_bytes(i));
        }
    }
}
