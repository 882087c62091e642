//! The KV cache between instances: everything this engine does with `kvxfer`.
//!
//! [`send`] is the prefiller's half, [`receive`] the decoder's. What both must agree on is here: the geometry, which `kvxfer`
//! compares when they connect, and the keys. A chunk's key is a hash of every token up to its end and of the model's weights,
//! so equal keys mean equal bytes, a prefix that two prompts share travels once, and nobody has to send a list of keys along.

pub(crate) mod receive;
pub(crate) mod send;

use crate::model::{Model, Shape, hex};
use kvxfer::{ChunkKey, Geometry, Result};
use sha2::{Digest, Sha256};

/// What a sender and a receiver of this model's cache have in common.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) shape: Shape,
    pub(crate) geometry: Geometry,
    fingerprint: String,
}

impl Terms {
    pub(crate) fn new(model: &Model) -> Self {
        let shape = model.shape();
        let geometry = Geometry {
            model: format!("kvxfer-engine/{}", model.fingerprint),
            dtype: "float32".into(),
            layout: "KV_2LTD".into(),
            page_bytes: shape.bytes(shape.tokens) as u64,
            chunk_tokens: shape.tokens as u32,
            layers: model.config.layers as u32,
            kv_heads: model.config.kv_heads as u32,
            head_dim: model.config.head_dim as u32,
            tp_rank: 0,
            tp_size: 1,
            hash_seed: String::new(),
        };
        Self { shape, geometry, fingerprint: model.fingerprint.clone() }
    }

    /// Keys of all chunks of a sequence, the last of which may be partial.
    pub(crate) fn keys(&self, tokens: &[u32]) -> Result<Vec<ChunkKey>> {
        let mut chain = self.chain();
        tokens.chunks(self.shape.tokens).map(|chunk| self.key(chain.after(chunk))).collect()
    }

    fn chain(&self) -> Chain {
        Chain(Sha256::digest(self.fingerprint.as_bytes()).into())
    }

    fn key(&self, hash: [u8; 32]) -> Result<ChunkKey> {
        Ok(ChunkKey::new(format!("{}@1@0@{}@float32", self.fingerprint, hex(&hash[..16])))?)
    }
}

/// The hash of a sequence so far.
#[derive(Clone)]
struct Chain([u8; 32]);

impl Chain {
    /// Goes on over a chunk and returns its hash.
    fn after(&mut self, chunk: &[u32]) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(self.0);
        for token in chunk {
            hash.update(token.to_le_bytes());
        }
        self.0 = hash.finalize().into();
        self.0
    }
}
