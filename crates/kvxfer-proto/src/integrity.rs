//! How much of what arrives is checked before it is published (Contract line 1), and the formulas.
//!
//! Both levels start from the *binding*: the digest of what the bytes are supposed to be. A chunk that arrives whole but
//! belongs to another request, key, page or generation therefore fails, also when its bytes happen to be alike.
//!
//! ```text
//! binding = XXH3_64("kvxfer1" 0x00 | u16 len(request) | request | u16 len(key) | key | u64 length | u32 page | u64 generation)
//! bound   = XXH3_64(u64 binding | sampled line | sampled line | …)
//! full    = XXH3_64(u64 binding | u64 XXH3_64(segment 0) | u64 XXH3_64(segment 1) | …)
//! ```
//!
//! All integers are little-endian. `XXH3_64` is the 64-bit XXH3 of the xxHash specification, seed 0, default secret.
//!
//! *Lines* are 64 bytes, a cache line; the last one may be shorter. A chunk of at most [`MAX_LINES`] lines is sampled
//! completely. A larger one gives its first line, its last line, and one line of each of 62 equal strata between them, at
//! a position drawn with splitmix64 (Steele, Lea and Flood 2014; Vigna's constants) from
//! `XXH3_64(key, seed = generation)`. So the sample differs from write to write, both sides draw the same one, a
//! hole of two strata or more is always seen, and a 32 MiB chunk costs 4 KiB of reads: a few microseconds.
//!
//! *Segments* are [`SEGMENT`] bytes, the last one may be shorter. They can be hashed in parallel, out of order, and inside
//! the copy loop while the bytes are in cache.

use crate::{ChunkKey, Generation, PageIndex, RequestId};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64, xxh3_64_with_seed};

/// Level of the check between a chunk's arrival and its publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Integrity {
    /// Nothing beside the protocol's own bookkeeping.
    Off = 0,
    /// Request, key, length and page generation, plus sampled cache lines.
    Bound = 1,
    /// Every byte, bound to the same ids.
    Full = 2,
}

/// Bytes of one segment of a fully checked chunk: small enough to stay in a core's cache between copy and hash.
pub const SEGMENT: u64 = 256 << 10;
/// Bytes of a sampled line.
pub const LINE: u64 = 64;
/// Most lines sampled of one chunk.
pub const MAX_LINES: u64 = 64;

/// What a chunk's bytes are supposed to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The request that writes it.
    pub request: RequestId,
    /// Its content key.
    pub key: ChunkKey,
    /// Its valid bytes.
    pub len: u64,
    /// The page it is written to.
    pub page: PageIndex,
    /// The page's generation.
    pub generation: Generation,
}

impl Binding {
    /// Digest of the ids alone.
    pub fn digest(&self) -> u64 {
        let (request, key) = (self.request.as_str().as_bytes(), self.key.as_str().as_bytes());
        let mut bytes = Vec::with_capacity(32 + request.len() + key.len());
        bytes.extend_from_slice(b"kvxfer1\0");
        for id in [request, key] {
            // Ids are at most 512 bytes long, checked when they were made.
            bytes.extend_from_slice(&(id.len() as u16).to_le_bytes());
            bytes.extend_from_slice(id);
        }
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.page.0.to_le_bytes());
        bytes.extend_from_slice(&self.generation.0.to_le_bytes());
        xxh3_64(&bytes)
    }

    /// Offset and length of the lines that [`Integrity::Bound`] looks at, ascending.
    pub fn lines(&self) -> impl Iterator<Item = (u64, usize)> + use<> {
        let len = self.len;
        let count = len.div_ceil(LINE);
        let all = count <= MAX_LINES;
        let seed = if all { 0 } else { xxh3_64_with_seed(self.key.as_str().as_bytes(), self.generation.0) };
        (0..count.min(MAX_LINES)).map(move |i| {
            let line = if all {
                i
            } else if i == 0 {
                0
            } else if i == MAX_LINES - 1 {
                count - 1
            } else {
                // Stratum i - 1 of the lines between the first and the last; none is empty. No overflow: count < 2^58.
                let between = count - 2;
                let strata = MAX_LINES - 2;
                let start = (i - 1) * between / strata;
                let end = i * between / strata;
                1 + start + splitmix64(seed.wrapping_add(i.wrapping_mul(GOLDEN_GAMMA))) % (end - start)
            };
            let offset = line * LINE;
            (offset, LINE.min(len - offset) as usize)
        })
    }

    /// Digest at level [`Integrity::Bound`]; `read(offset, out)` fills `out` from the chunk's bytes.
    pub fn bound<E>(&self, mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<u64, E> {
        let mut buffer = [0; 8 + (LINE * MAX_LINES) as usize];
        buffer[..8].copy_from_slice(&self.digest().to_le_bytes());
        let mut filled = 8;
        for (offset, len) in self.lines() {
            read(offset, &mut buffer[filled..filled + len])?;
            filled += len;
        }
        Ok(xxh3_64(&buffer[..filled]))
    }

    /// Digest at level [`Integrity::Full`] from the hashes of all segments in order.
    pub fn full(&self, segments: impl IntoIterator<Item = u64>) -> u64 {
        let mut hasher = Xxh3Default::new();
        hasher.update(&self.digest().to_le_bytes());
        for hash in segments {
            hasher.update(&hash.to_le_bytes());
        }
        hasher.digest()
    }
}

/// Number of segments of a chunk of `len` bytes.
pub const fn segment_count(len: u64) -> u64 {
    len.div_ceil(SEGMENT)
}

/// Offset and length of segment `i` of a chunk of `len` bytes; empty beyond the last.
pub const fn segment(len: u64, i: u64) -> (u64, u64) {
    let start = i.saturating_mul(SEGMENT);
    let rest = len.saturating_sub(start);
    (start, if rest < SEGMENT { rest } else { SEGMENT })
}

/// Hash of one segment's bytes.
pub fn segment_hash(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Hashes one segment that comes in parts.
#[derive(Clone, Default)]
pub struct SegmentHasher(Xxh3Default);

impl SegmentHasher {
    /// Starts a segment.
    pub fn new() -> Self {
        Self(Xxh3Default::new())
    }
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The hash; equal to [`segment_hash`] of all the parts together.
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

impl std::fmt::Debug for SegmentHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SegmentHasher")
    }
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64 applied to a counter.
const fn splitmix64(counter: u64) -> u64 {
    let z = counter;
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn binding(len: u64) -> Binding {
        Binding {
            request: RequestId::new("cmpl-1").expect("valid"),
            key: ChunkKey::new("llama@1@0@00ff@bfloat16").expect("valid"),
            len,
            page: PageIndex(3),
            generation: Generation(9),
        }
    }

    /// Byte `i` of every test chunk.
    fn byte(i: u64) -> u8 {
        (i.wrapping_mul(0x9e37_79b9) >> 7) as u8
    }

    fn content(len: u64) -> Vec<u8> {
        (0..len).map(byte).collect()
    }

    fn bound_of(b: &Binding, bytes: &[u8]) -> u64 {
        b.bound(|offset, out| {
            out.copy_from_slice(&bytes[offset as usize..][..out.len()]);
            Ok::<_, Infallible>(())
        })
        .expect("infallible")
    }

    fn full_of(b: &Binding, bytes: &[u8]) -> u64 {
        b.full(bytes.chunks(SEGMENT as usize).map(segment_hash))
    }

    #[test]
    fn digests_keep_their_values() {
        let small = binding(1000);
        let large = binding(3 * SEGMENT + 17);
        assert_eq!(
            [
                small.digest(),
                bound_of(&small, &content(1000)),
                full_of(&small, &content(1000)),
                bound_of(&large, &content(large.len)),
                full_of(&large, &content(large.len)),
            ],
            GOLDEN
        );
    }

    /// Computed by an independent implementation of the formulas over the reference xxHash library.
    const GOLDEN: [u64; 5] = [
        8_117_759_826_758_029_850,
        13_393_402_273_297_321_956,
        17_384_429_318_391_965_236,
        15_847_327_204_256_805_197,
        14_633_955_681_396_595_089,
    ];

    #[test]
    fn lines_are_the_first_the_last_and_one_of_each_stratum() {
        let b = binding(32 << 20);
        let lines: Vec<_> = b.lines().collect();
        assert_eq!(lines.len() as u64, MAX_LINES);
        assert_eq!(lines[0], (0, 64));
        assert_eq!(lines[63], ((32 << 20) - 64, 64));
        assert!(lines.windows(2).all(|w| w[0].0 < w[1].0 && w[1].0 - w[0].0 < 2 * (32 << 20) / 61));
        let other = Binding { generation: Generation(10), ..b };
        assert_ne!(lines, other.lines().collect::<Vec<_>>(), "the next generation draws other lines");
    }

    #[test]
    fn a_different_id_gives_a_different_digest() {
        let b = binding(5000);
        let bytes = content(5000);
        let others = [
            Binding { request: RequestId::new("cmpl-2").expect("valid"), ..b.clone() },
            Binding { key: ChunkKey::new("llama@1@0@00fe@bfloat16").expect("valid"), ..b.clone() },
            Binding { page: PageIndex(4), ..b.clone() },
            Binding { generation: Generation(8), ..b.clone() },
            Binding { len: 4999, ..b.clone() },
        ];
        for other in others {
            assert_ne!(bound_of(&b, &bytes), bound_of(&other, &bytes), "{other:?}");
            assert_ne!(full_of(&b, &bytes), full_of(&other, &bytes), "{other:?}");
        }
    }

    #[test]
    fn ids_that_run_together_are_kept_apart() {
        let id = |r: &str, k: &str| {
            let b = binding(1);
            Binding { request: RequestId::new(r).expect("valid"), key: ChunkKey::new(k).expect("valid"), ..b }
                .digest()
        };
        assert_ne!(id("ab", "c"), id("a", "bc"));
    }

    proptest! {
        #[test]
        fn lines_stay_inside_and_ascend(len in 1u64..1 << 40, generation: u64) {
            let b = Binding { generation: Generation(generation), ..binding(len) };
            let mut next = 0;
            for (offset, n) in b.lines() {
                prop_assert!(offset >= next && (1..=64).contains(&n) && offset + n as u64 <= len);
                next = offset + n as u64;
            }
            prop_assert_eq!(next, len, "the last line is always looked at");
        }

        #[test]
        fn full_sees_every_flipped_bit(len in 1u64..600_000, at: prop::sample::Index, bit in 0..8u8) {
            let b = binding(len);
            let mut bytes = content(len);
            let before = full_of(&b, &bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_ne!(before, full_of(&b, &bytes));
        }

        #[test]
        fn bound_sees_a_missing_half(len in 2u64..600_000, generation: u64) {
            let b = Binding { generation: Generation(generation), ..binding(len) };
            let bytes = content(len);
            let good = bound_of(&b, &bytes);
            for hole in [0..len / 2, len / 2..len] {
                let mut half = bytes.clone();
                half[hole.start as usize..hole.end as usize].iter_mut().for_each(|b| *b = !*b);
                prop_assert_ne!(good, bound_of(&b, &half));
            }
        }

        #[test]
        fn segments_cover_the_chunk(len in 1u64..1 << 40) {
            let n = segment_count(len);
            let (start, last) = segment(len, n - 1);
            prop_assert_eq!(start + last, len);
            prop_assert_eq!(segment(len, n).1, 0);
        }

        #[test]
        fn a_segment_in_parts_hashes_the_same(len in 0usize..9000, cut: prop::sample::Index) {
            let bytes = content(len as u64);
            let mut hasher = SegmentHasher::new();
            let cut = if len == 0 { 0 } else { cut.index(len) };
            hasher.update(&bytes[..cut]);
            hasher.update(&bytes[cut..]);
            prop_assert_eq!(hasher.finish(), segment_hash(&bytes));
        }
    }
}
