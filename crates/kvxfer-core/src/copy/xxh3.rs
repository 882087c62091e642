//! XXH3 (64 bit) over long inputs, fused with copying: each line is loaded once, hashed and stored.
//!
//! The hash is the public one, so that the receiving side can use any implementation. Here it is taken apart into
//! stripes of 64 bytes that are consumed as they pass by; inputs of up to 240 bytes and processors without AVX2 take
//! the reference crate instead.

/// Length of a stripe.
pub(super) const STRIPE: usize = 64;
/// Shorter inputs use other formulas.
pub(super) const SHORTEST: u64 = 241;
/// Stripes between two scrambles: `(secret - stripe) / 8`.
const BLOCK: u64 = 16;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

/// The default secret of the algorithm.
#[rustfmt::skip]
static SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// What happens to a stripe beside being hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    /// Nothing.
    None,
    /// Stored as usual; the destination may be unaligned.
    Cached,
    /// Stored past the cache; the destination is aligned to 64 bytes.
    Streaming,
}

/// Accumulators after some stripes of one input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Xxh3 {
    acc: [u64; 8],
    stripes: u64,
}

impl Xxh3 {
    /// A fresh state; `None` when this processor has no kernel.
    pub(super) fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            let acc =
                [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
            return Some(Self { acc, stripes: 0 });
        }
        None
    }

    /// Consumes the next `stripes` stripes of the input, all of which precede its last byte, and stores them at `to`.
    ///
    /// # Safety
    /// `from` is readable for `stripes * 64` bytes; unless `store` is `None`, `to` is writable for as many.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn consume(&mut self, to: *mut u8, from: *const u8, stripes: u64, store: Store) {
        let wide = is_x86_feature_detected!("avx512f");
        // SAFETY: the caller's promise; `new` and the line above detected the features.
        unsafe {
            match (wide, store) {
                (true, Store::None) => x86::avx512::<0>(self, to, from, stripes),
                (true, Store::Cached) => x86::avx512::<1>(self, to, from, stripes),
                (true, Store::Streaming) => x86::avx512::<2>(self, to, from, stripes),
                (false, Store::None) => x86::avx2::<0>(self, to, from, stripes),
                (false, Store::Cached) => x86::avx2::<1>(self, to, from, stripes),
                (false, Store::Streaming) => x86::avx2::<2>(self, to, from, stripes),
            }
        }
        self.stripes += stripes;
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) unsafe fn consume(&mut self, _to: *mut u8, _from: *const u8, _stripes: u64, _store: Store) {
        unreachable!("`new` made no state on this processor");
    }

    /// The hash of an input of `len` bytes that ends with `last`, once `(len - 1) / 64` stripes are consumed.
    pub(super) fn finish(mut self, len: u64, last: &[u8; STRIPE]) -> u64 {
        debug_assert!(len >= SHORTEST && self.stripes == (len - 1) / STRIPE as u64);
        let word = |bytes: &[u8], at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(w)
        };
        for lane in 0..8 {
            let data = word(last, lane * 8);
            let key = data ^ word(&SECRET, SECRET.len() - STRIPE - 7 + lane * 8);
            self.acc[lane ^ 1] = self.acc[lane ^ 1].wrapping_add(data);
            self.acc[lane] = self.acc[lane].wrapping_add((key & 0xFFFF_FFFF).wrapping_mul(key >> 32));
        }
        let mut hash = len.wrapping_mul(PRIME64_1);
        for pair in 0..4 {
            let a = self.acc[pair * 2] ^ word(&SECRET, 11 + pair * 16);
            let b = self.acc[pair * 2 + 1] ^ word(&SECRET, 19 + pair * 16);
            let product = u128::from(a) * u128::from(b);
            hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        hash ^= hash >> 37;
        hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
        hash ^ (hash >> 32)
    }
}

/// A kernel, for the tests.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) type Kernel = unsafe fn(&mut Xxh3, *mut u8, *const u8, u64);

#[cfg(all(test, target_arch = "x86_64"))]
impl Xxh3 {
    /// All kernels, each with whether this processor can run it and whether it stores.
    pub(super) fn kernels() -> [(bool, bool, Kernel); 6] {
        let (wide, narrow) = (is_x86_feature_detected!("avx512f"), is_x86_feature_detected!("avx2"));
        [
            (wide, false, x86::avx512::<0>),
            (wide, true, x86::avx512::<1>),
            (wide, true, x86::avx512::<2>),
            (narrow, false, x86::avx2::<0>),
            (narrow, true, x86::avx2::<1>),
            (narrow, true, x86::avx2::<2>),
        ]
    }
    /// Counts stripes that a kernel consumed directly.
    pub(super) fn advanced(mut self, stripes: u64) -> Self {
        self.stripes += stripes;
        self
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::cast_ptr_alignment,
    reason = "loads and stores are the unaligned ones, except streaming stores, whose alignment is in the contract"
)]
mod x86 {
    use super::{BLOCK, PRIME32_1, SECRET, STRIPE, Xxh3};
    use std::arch::x86_64::{
        __m256i, _MM_HINT_NTA, _mm_prefetch, _mm256_add_epi64, _mm256_loadu_si256, _mm256_mul_epu32,
        _mm256_set1_epi64x, _mm256_shuffle_epi32, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_si256,
        _mm256_stream_si256, _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32,
        _mm512_set1_epi64, _mm512_shuffle_epi32, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512,
        _mm512_stream_si512, _mm512_xor_si512,
    };

    /// Lines are fetched this far ahead.
    const AHEAD: usize = 2 << 10;

    /// # Safety
    /// As for [`Xxh3::consume`]; `STORE` 0 stores nothing, 1 as usual, 2 past the cache.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const STORE: u8>(
        state: &mut Xxh3,
        to: *mut u8,
        from: *const u8,
        stripes: u64,
    ) {
        // SAFETY: accesses lie below `stripes * 64` at both addresses, and inside the secret.
        unsafe {
            let mut acc = _mm512_loadu_si512(state.acc.as_ptr().cast());
            let last_key = _mm512_loadu_si512(SECRET.as_ptr().add(SECRET.len() - STRIPE).cast());
            let prime = _mm512_set1_epi64(PRIME32_1 as i64);
            let mut at = 0;
            for stripe in state.stripes..state.stripes + stripes {
                let source = from.add(at);
                _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(AHEAD).cast());
                let data = _mm512_loadu_si512(source.cast());
                match STORE {
                    1 => _mm512_storeu_si512(to.add(at).cast(), data),
                    2 => _mm512_stream_si512(to.add(at).cast(), data),
                    _ => {}
                }
                let secret = SECRET.as_ptr().add((stripe % BLOCK) as usize * 8);
                let key = _mm512_xor_si512(data, _mm512_loadu_si512(secret.cast()));
                let product = _mm512_mul_epu32(key, _mm512_srli_epi64::<32>(key));
                let swapped = _mm512_shuffle_epi32::<0b01_00_11_10>(data);
                acc = _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
                if stripe % BLOCK == BLOCK - 1 {
                    let mixed = _mm512_xor_si512(acc, _mm512_srli_epi64::<47>(acc));
                    let keyed = _mm512_xor_si512(mixed, last_key);
                    let low = _mm512_mul_epu32(keyed, prime);
                    let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(keyed), prime);
                    acc = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
                }
                at += STRIPE;
            }
            _mm512_storeu_si512(state.acc.as_mut_ptr().cast(), acc);
        }
    }

    /// # Safety
    /// As for [`avx512`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2<const STORE: u8>(state: &mut Xxh3, to: *mut u8, from: *const u8, stripes: u64) {
        // SAFETY: as above.
        unsafe {
            let half = |p: *const u8, i: usize| _mm256_loadu_si256(p.cast::<__m256i>().add(i));
            let mut acc = [half(state.acc.as_ptr().cast(), 0), half(state.acc.as_ptr().cast(), 1)];
            let last_key = SECRET.as_ptr().add(SECRET.len() - STRIPE);
            let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
            let mut at = 0;
            for stripe in state.stripes..state.stripes + stripes {
                let source = from.add(at);
                _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(AHEAD).cast());
                let secret = SECRET.as_ptr().add((stripe % BLOCK) as usize * 8);
                for (i, acc) in acc.iter_mut().enumerate() {
                    let data = half(source, i);
                    let target = to.wrapping_add(at).cast::<__m256i>().wrapping_add(i);
                    match STORE {
                        1 => _mm256_storeu_si256(target, data),
                        2 => _mm256_stream_si256(target, data),
                        _ => {}
                    }
                    let key = _mm256_xor_si256(data, half(secret, i));
                    let product = _mm256_mul_epu32(key, _mm256_srli_epi64::<32>(key));
                    let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
                    *acc = _mm256_add_epi64(*acc, _mm256_add_epi64(product, swapped));
                    if stripe % BLOCK == BLOCK - 1 {
                        let mixed = _mm256_xor_si256(*acc, _mm256_srli_epi64::<47>(*acc));
                        let keyed = _mm256_xor_si256(mixed, half(last_key, i));
                        let low = _mm256_mul_epu32(keyed, prime);
                        let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
                        *acc = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
                    }
                }
                at += STRIPE;
            }
            for (i, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_si256(state.acc.as_mut_ptr().cast::<__m256i>().add(i), acc);
            }
        }
    }
}
