//! Bytes that can be made and checked anywhere from a few numbers.
//!
//! Word `j` of stream `(seed, stream)` is a hash of the three, so every chunk differs from every other and a byte that
//! is stale, swapped, shifted or missing is seen. Both sides compute the bytes; nothing but the seed is exchanged.

/// One endless sequence of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content {
    key: u64,
}

const TILE: usize = 16 << 10;

impl Content {
    /// The sequence numbered `stream` of `seed`.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self { key: mix(mix(seed ^ 0x9E37_79B9_7F4A_7C15).wrapping_add(stream)) }
    }

    /// Writes bytes `offset..offset + out.len()`; `offset` and the length are multiples of 8.
    pub(crate) fn fill(self, offset: u64, out: &mut [u8]) {
        debug_assert!(offset.is_multiple_of(8) && out.len().is_multiple_of(8));
        for (j, word) in (offset / 8..).zip(out.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.word(j).to_le_bytes());
        }
    }

    /// Compares bytes `offset..offset + got.len()`; tells the first offset that differs.
    pub(crate) fn check(self, offset: u64, got: &[u8]) -> Result<(), u64> {
        let mut want = [0_u8; TILE];
        let mut at = offset;
        for tile in got.chunks(TILE) {
            let want = &mut want[..tile.len().next_multiple_of(8)];
            self.fill(at, want);
            if want[..tile.len()] != *tile {
                let first = tile.iter().zip(want.iter()).position(|(a, b)| a != b).unwrap_or(0);
                return Err(at + first as u64);
            }
            at += tile.len() as u64;
        }
        Ok(())
    }

    /// Shifts and xors alone, so that the compiler turns the loop into vector code on any machine.
    #[inline]
    fn word(self, j: u64) -> u64 {
        let mut x = j.wrapping_add(self.key);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x ^ self.key.rotate_left(32)
    }
}

/// A 64-bit finaliser (splitmix64's).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A small generator for permutations.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A permutation of `0..n`.
    pub(crate) fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            let j = (self.next() % (i as u64 + 1)) as usize;
            order.swap(i, j);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_is_found_where_it_is() {
        let c = Content::new(7, 3);
        let mut bytes = vec![0; 100_000];
        c.fill(4096, &mut bytes);
        assert_eq!(c.check(4096, &bytes), Ok(()));
        assert_eq!(c.check(4096 + 1024, &bytes[1024..1024 + 13]), Ok(()), "any length can be checked");
        bytes[54_321] ^= 1;
        assert_eq!(c.check(4096, &bytes), Err(4096 + 54_321));
        assert!(Content::new(7, 4).check(4096, &bytes[..64]).is_err(), "another stream has other bytes");
        assert!(c.check(4096 + 64, &bytes[..64]).is_err(), "shifted bytes are seen");
    }

    #[test]
    fn permutations_hold_every_number_once() {
        let mut p = Rng::new(1).permutation(1000);
        assert_ne!(p[..10], (0..10).collect::<Vec<u32>>()[..]);
        p.sort_unstable();
        assert_eq!(p, (0..1000).collect::<Vec<u32>>());
    }
}
