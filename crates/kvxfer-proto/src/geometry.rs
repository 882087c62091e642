//! What two sides must agree on before a byte moves (Contract line 8).

use serde::{Deserialize, Serialize};

/// The shape of the cache a sender and a receiver exchange.
///
/// Compared at connect, field by field; [`Geometry::mismatch`] names the first differing field with both values.
/// An empty string or zero means "not stated" and is compared like any other value: both sides state it or neither does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Geometry {
    /// Fingerprint or name of the model, e.g. `meta-llama/Llama-3.1-8B-Instruct`.
    pub model: String,
    /// Element type, e.g. `bfloat16`.
    pub dtype: String,
    /// Layout of a chunk, e.g. `KV_2LTD` = `[2, layers, tokens, heads * head_dim]`.
    pub layout: String,
    /// Bytes of one page: a full chunk's keys and values of this rank.
    pub page_bytes: u64,
    /// Tokens of a full chunk.
    pub chunk_tokens: u32,
    /// Transformer layers held by this rank.
    pub layers: u32,
    /// KV heads held by this rank.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Tensor-parallel size.
    pub tp_size: u32,
    /// What the engine's content hashes depend on beside the content (Python: `PYTHONHASHSEED`).
    pub hash_seed: String,
}

/// One field of two geometries differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} differs: here {ours:?}, at the peer {theirs:?}")]
pub struct Mismatch {
    /// The field's name.
    pub field: &'static str,
    /// Our value.
    pub ours: String,
    /// The peer's value.
    pub theirs: String,
}

impl Geometry {
    /// The first field in which the two differ.
    pub fn mismatch(&self, peer: &Self) -> Option<Mismatch> {
        macro_rules! compare {
            ($($field:ident),*) => {
                $(if self.$field != peer.$field {
                    return Some(Mismatch {
                        field: stringify!($field),
                        ours: self.$field.to_string(),
                        theirs: peer.$field.to_string(),
                    });
                })*
            };
        }
        compare!(
            model,
            dtype,
            layout,
            page_bytes,
            chunk_tokens,
            layers,
            kv_heads,
            head_dim,
            tp_rank,
            tp_size,
            hash_seed
        );
        None
    }
}
