//! The digest that the kernel can take while it moves a cache: the same whatever the layouts, and in any order.
//!
//! ```text
//! sum over all words w[i] of mix(w[i] xor (i + 1) * 0x9e3779b97f4a7c15), modulo 2^64
//! ```
//!
//! Words are 8 bytes, little-endian, of the cache in `KV_2LTD` order `[planes, layers, tokens, heads * head]`; `mix` is the finalizer of
//! `MurmurHash3`'s 64-bit variant (Appleby, public domain). It finds what is damaged, misplaced or missing by accident; it
//! is no defence against somebody who makes up bytes.

/// Of bytes in `KV_2LTD` order, a multiple of 8.
pub fn digest(bytes: &[u8]) -> u64 {
    digest_from(0, bytes)
}

/// The part of `bytes` in it, when they begin with word number `first`.
pub(super) fn digest_from(first: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
    words
        .zip(first + 1..)
        .fold(0, |sum, (word, n)| sum.wrapping_add(mix(word ^ n.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}
