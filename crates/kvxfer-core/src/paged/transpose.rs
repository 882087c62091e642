//! The inner loops: transposing words of 2 or 4 bytes, and taking turns between two rows.
//!
//! A tile of words is read line by line, 16 bytes of each, and leaves as lines of one word of every line read. In a wide register
//! the lanes of 16 bytes hold further lines, so that the same few unpacking steps transpose 8, 16 or 32 lines at once, and what
//! is written grows to a whole cache line. What is left at the edges goes word by word, as does everything on other processors.

/// What is read next, where the processor does not expect it. A hint.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    /// Nobody knows.
    Nothing,
    /// What begins there.
    At(*const u8),
    /// Of each line, what is so many bytes further.
    Beside(usize),
}

/// Words at `from`: `lines` lines, `from_stride` bytes apart, of `count` words each. They become `count` lines at `to`, `to_stride`
/// bytes apart, of `lines` words each. Meanwhile as many bytes are fetched of what is read next.
///
/// # Safety
/// Both sides are valid for what is described there, and do not overlap.
pub(super) unsafe fn transpose<const WORD: usize>(
    (from, from_stride): (*const u8, usize),
    (to, to_stride): (*mut u8, usize),
    lines: usize,
    count: usize,
    ahead: Ahead,
) {
    let area = Area { from, from_stride, to, to_stride, lines, count, ahead };
    #[cfg(target_arch = "x86_64")]
    // SAFETY: passed on.
    let done = unsafe { x86::tiles::<WORD>(&area) };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    // Tiles cover the first `done` lines, in all columns that make up whole tiles.
    let covered = if done > 0 { count / words_in_tile::<WORD>() * words_in_tile::<WORD>() } else { 0 };
    // SAFETY: what remains of the same area.
    unsafe {
        area.word_by_word::<WORD>(0..done, covered..count);
        area.word_by_word::<WORD>(done..lines, 0..count);
    }
}

const fn words_in_tile<const WORD: usize>() -> usize {
    16 / WORD
}

struct Area {
    from: *const u8,
    from_stride: usize,
    to: *mut u8,
    to_stride: usize,
    lines: usize,
    count: usize,
    ahead: Ahead,
}

impl Area {
    fn source<const WORD: usize>(&self, line: usize, column: usize) -> *const u8 {
        self.from.wrapping_add(line * self.from_stride + column * WORD)
    }

    fn target<const WORD: usize>(&self, line: usize, column: usize) -> *mut u8 {
        self.to.wrapping_add(column * self.to_stride + line * WORD)
    }

    /// # Safety
    /// As for [`transpose`]; the ranges lie within the area.
    unsafe fn word_by_word<const WORD: usize>(
        &self,
        lines: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) {
        for column in columns {
            for line in lines.clone() {
                let (from, to) = (self.source::<WORD>(line, column), self.target::<WORD>(line, column));
                // SAFETY: one word within the area.
                unsafe { std::ptr::copy_nonoverlapping(from, to, WORD) };
            }
        }
    }
}

/// Lines of 64 bytes, one after another; in each, sixteen elements of 2 bytes of two rows take turns, and the rows follow one another
/// `stride` bytes apart. Out of the lines (`GATHER`) or into them.
///
/// # Safety
/// There are `pairs` lines, and twice as many rows, each valid for 32 bytes; none overlaps another.
pub(super) unsafe fn interleave<const GATHER: bool>(
    lines: *mut u8,
    rows: *mut u8,
    stride: usize,
    pairs: usize,
) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: passed on; the feature was detected.
    unsafe {
        if is_x86_feature_detected!("avx512f") {
            x86::interleave_avx512::<GATHER>(lines, rows, stride, pairs);
        } else {
            x86::interleave_sse2::<GATHER>(lines, rows, stride, pairs);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: passed on.
    unsafe {
        interleave_word_by_word::<GATHER>(lines, rows, stride, pairs);
    }
}

/// # Safety
/// As for [`interleave`].
#[cfg(any(test, not(target_arch = "x86_64")))]
unsafe fn interleave_word_by_word<const GATHER: bool>(
    lines: *mut u8,
    rows: *mut u8,
    stride: usize,
    pairs: usize,
) {
    for row in 0..2 * pairs {
        for i in 0..16 {
            let paged = lines.wrapping_add(row / 2 * 64 + 4 * i + row % 2 * 2);
            let row = rows.wrapping_add(row * stride + 2 * i);
            let (from, to) = if GATHER { (paged, row) } else { (row, paged) };
            // SAFETY: one element of each.
            unsafe { std::ptr::copy_nonoverlapping(from, to, 2) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Ahead, Area, words_in_tile};
    use crate::copy::stream;
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_packs_epi32, _mm_slli_epi32, _mm_srai_epi32,
        _mm_storeu_si128, _mm_unpackhi_epi16, _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi16,
        _mm_unpacklo_epi32, _mm_unpacklo_epi64, _mm256_loadu_si256, _mm256_loadu2_m128i, _mm256_storeu_si256,
        _mm256_unpackhi_epi16, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi16,
        _mm256_unpacklo_epi32, _mm256_unpacklo_epi64, _mm512_castsi128_si512, _mm512_cvtepi32_epi16,
        _mm512_cvtepu16_epi32, _mm512_inserti32x4, _mm512_loadu_si512, _mm512_or_si512, _mm512_slli_epi32,
        _mm512_srli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi16, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    /// A kernel transposes one tile: so many lines of 16 bytes.
    type Kernel = unsafe fn(*const u8, usize, *mut u8, usize);

    /// Transposes the tiles of an area; all its columns that make up whole tiles, of the lines whose number is returned.
    ///
    /// # Safety
    /// As for [`super::transpose`].
    pub(super) unsafe fn tiles<const WORD: usize>(area: &Area) -> usize {
        let mut done = 0;
        let mut fetched = 0;
        for (lines, kernel) in kernels::<WORD>() {
            while area.lines - done >= lines {
                let Some(kernel) = kernel else { break };
                for column in (0..area.count / words_in_tile::<WORD>()).map(|i| i * words_in_tile::<WORD>()) {
                    let (from, to) = (area.source::<WORD>(done, column), area.target::<WORD>(done, column));
                    match area.ahead {
                        Ahead::At(next) => {
                            stream::fetch(next.wrapping_add(fetched), 16 * lines);
                            fetched += 16 * lines;
                        }
                        // Four tiles to a cache line.
                        Ahead::Beside(bytes) if (column * WORD).is_multiple_of(64) => {
                            for line in 0..lines {
                                stream::fetch(from.wrapping_add(line * area.from_stride + bytes), 1);
                            }
                        }
                        Ahead::Beside(_) | Ahead::Nothing => {}
                    }
                    // SAFETY: the tile lies within the area; the kernel's features were detected.
                    unsafe { kernel(from, area.from_stride, to, area.to_stride) };
                }
                done += lines;
            }
        }
        done
    }

    /// Kernels by the lines they take, the widest first, each if this processor can run it.
    pub(super) fn kernels<const WORD: usize>() -> [(usize, Option<Kernel>); 3] {
        let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        let middle = is_x86_feature_detected!("avx2");
        match WORD {
            2 => [
                (32, wide.then_some(words2_avx512 as Kernel)),
                (16, middle.then_some(words2_avx2 as Kernel)),
                (8, Some(words2_sse2)),
            ],
            4 => [
                (16, wide.then_some(words4_avx512 as Kernel)),
                (8, middle.then_some(words4_avx2 as Kernel)),
                (4, Some(words4_sse2)),
            ],
            _ => [(usize::MAX, None); 3],
        }
    }

    /// A register of one, two or four lanes; lane `l` has line `i + l * step`.
    macro_rules! kernels {
        ($feature:literal, $words2:ident, $words4:ident, $load:ident, $store:ident,
         $lo16:ident, $hi16:ident, $lo32:ident, $hi32:ident, $lo64:ident, $hi64:ident) => {
            /// # Safety
            /// Each line of the tile is readable for 16 bytes; of the eight at `to`, each is writable for a register.
            #[target_feature(enable = $feature)]
            unsafe fn $words2(from: *const u8, from_stride: usize, to: *mut u8, to_stride: usize) {
                // SAFETY: the promise.
                unsafe {
                    let s = from_stride;
                    let r = [
                        $load(from, 8 * s),
                        $load(from.wrapping_add(s), 8 * s),
                        $load(from.wrapping_add(2 * s), 8 * s),
                        $load(from.wrapping_add(3 * s), 8 * s),
                        $load(from.wrapping_add(4 * s), 8 * s),
                        $load(from.wrapping_add(5 * s), 8 * s),
                        $load(from.wrapping_add(6 * s), 8 * s),
                        $load(from.wrapping_add(7 * s), 8 * s),
                    ];
                    // Pairs of lines, element by element.
                    let a = [
                        $lo16(r[0], r[1]),
                        $lo16(r[2], r[3]),
                        $lo16(r[4], r[5]),
                        $lo16(r[6], r[7]),
                        $hi16(r[0], r[1]),
                        $hi16(r[2], r[3]),
                        $hi16(r[4], r[5]),
                        $hi16(r[6], r[7]),
                    ];
                    // Four lines.
                    let b = [
                        $lo32(a[0], a[1]),
                        $lo32(a[2], a[3]),
                        $hi32(a[0], a[1]),
                        $hi32(a[2], a[3]),
                        $lo32(a[4], a[5]),
                        $lo32(a[6], a[7]),
                        $hi32(a[4], a[5]),
                        $hi32(a[6], a[7]),
                    ];
                    // All eight.
                    for i in 0..4 {
                        $store(to.wrapping_add(2 * i * to_stride), $lo64(b[2 * i], b[2 * i + 1]));
                        $store(to.wrapping_add((2 * i + 1) * to_stride), $hi64(b[2 * i], b[2 * i + 1]));
                    }
                }
            }

            /// # Safety
            /// Each line of the tile is readable for 16 bytes; of the four at `to`, each is writable for a register.
            #[target_feature(enable = $feature)]
            unsafe fn $words4(from: *const u8, from_stride: usize, to: *mut u8, to_stride: usize) {
                // SAFETY: the promise.
                unsafe {
                    let s = from_stride;
                    let r = [
                        $load(from, 4 * s),
                        $load(from.wrapping_add(s), 4 * s),
                        $load(from.wrapping_add(2 * s), 4 * s),
                        $load(from.wrapping_add(3 * s), 4 * s),
                    ];
                    let a = [$lo32(r[0], r[1]), $lo32(r[2], r[3]), $hi32(r[0], r[1]), $hi32(r[2], r[3])];
                    for i in 0..2 {
                        $store(to.wrapping_add(2 * i * to_stride), $lo64(a[2 * i], a[2 * i + 1]));
                        $store(to.wrapping_add((2 * i + 1) * to_stride), $hi64(a[2 * i], a[2 * i + 1]));
                    }
                }
            }
        };
    }
    kernels!(
        "sse2",
        words2_sse2,
        words4_sse2,
        load_128,
        store_128,
        _mm_unpacklo_epi16,
        _mm_unpackhi_epi16,
        _mm_unpacklo_epi32,
        _mm_unpackhi_epi32,
        _mm_unpacklo_epi64,
        _mm_unpackhi_epi64
    );
    kernels!(
        "avx2",
        words2_avx2,
        words4_avx2,
        load_256,
        store_256,
        _mm256_unpacklo_epi16,
        _mm256_unpackhi_epi16,
        _mm256_unpacklo_epi32,
        _mm256_unpackhi_epi32,
        _mm256_unpacklo_epi64,
        _mm256_unpackhi_epi64
    );
    kernels!(
        "avx512f,avx512bw",
        words2_avx512,
        words4_avx512,
        load_512,
        store_512,
        _mm512_unpacklo_epi16,
        _mm512_unpackhi_epi16,
        _mm512_unpacklo_epi32,
        _mm512_unpackhi_epi32,
        _mm512_unpacklo_epi64,
        _mm512_unpackhi_epi64
    );

    #[inline]
    unsafe fn load_128(from: *const u8, _step: usize) -> __m128i {
        // SAFETY: 16 readable bytes.
        unsafe { _mm_loadu_si128(from.cast()) }
    }

    #[inline]
    unsafe fn store_128(to: *mut u8, register: __m128i) {
        // SAFETY: 16 writable bytes.
        unsafe { _mm_storeu_si128(to.cast(), register) };
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_256(from: *const u8, step: usize) -> __m256i {
        // SAFETY: two lines of 16 readable bytes.
        unsafe { _mm256_loadu2_m128i(from.wrapping_add(step).cast(), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_256(to: *mut u8, register: __m256i) {
        // SAFETY: 32 writable bytes.
        unsafe { _mm256_storeu_si256(to.cast(), register) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_512(from: *const u8, step: usize) -> __m512i {
        // SAFETY: four lines of 16 readable bytes.
        unsafe {
            let all = _mm512_castsi128_si512(load_128(from, 0));
            let all = _mm512_inserti32x4::<1>(all, load_128(from.wrapping_add(step), 0));
            let all = _mm512_inserti32x4::<2>(all, load_128(from.wrapping_add(2 * step), 0));
            _mm512_inserti32x4::<3>(all, load_128(from.wrapping_add(3 * step), 0))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_512(to: *mut u8, register: __m512i) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(to.cast(), register) };
    }

    /// # Safety
    /// As for [`super::interleave`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn interleave_avx512<const GATHER: bool>(
        lines: *mut u8,
        rows: *mut u8,
        stride: usize,
        pairs: usize,
    ) {
        for pair in 0..pairs {
            // SAFETY: a line, and sixteen elements of each of its two rows.
            unsafe {
                let line = lines.wrapping_add(64 * pair).cast();
                let first = rows.wrapping_add(2 * pair * stride).cast();
                let second = rows.wrapping_add((2 * pair + 1) * stride).cast();
                if GATHER {
                    let both = _mm512_loadu_si512(line);
                    _mm256_storeu_si256(first, _mm512_cvtepi32_epi16(both));
                    _mm256_storeu_si256(second, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(both)));
                } else {
                    let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first));
                    let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second));
                    _mm512_storeu_si512(line, _mm512_or_si512(first, _mm512_slli_epi32::<16>(second)));
                }
            }
        }
    }

    /// # Safety
    /// As for [`super::interleave`].
    pub(super) unsafe fn interleave_sse2<const GATHER: bool>(
        lines: *mut u8,
        rows: *mut u8,
        stride: usize,
        pairs: usize,
    ) {
        for half in 0..2 * pairs {
            let line = lines.wrapping_add(32 * half);
            let first = rows.wrapping_add(half / 2 * 2 * stride + half % 2 * 16);
            let second = first.wrapping_add(stride);
            // SAFETY: eight elements of each row, sixteen of the line; SSE2 is part of every x86-64 processor.
            unsafe {
                if GATHER {
                    let (a, b) = (load_128(line, 0), load_128(line.wrapping_add(16), 0));
                    // Sign extension makes packing with saturation exact.
                    let (low_a, low_b) = (_mm_slli_epi32::<16>(a), _mm_slli_epi32::<16>(b));
                    store_128(first, _mm_packs_epi32(extended(low_a), extended(low_b)));
                    store_128(second, _mm_packs_epi32(extended(a), extended(b)));
                } else {
                    let (a, b) = (load_128(first, 0), load_128(second, 0));
                    store_128(line, _mm_unpacklo_epi16(a, b));
                    store_128(line.wrapping_add(16), _mm_unpackhi_epi16(a, b));
                }
            }
        }
    }

    /// The upper half of each four bytes, as a number.
    #[inline]
    unsafe fn extended(words: __m128i) -> __m128i {
        // SAFETY: part of every x86-64 processor.
        unsafe { _mm_srai_epi32::<16>(words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    fn check<const WORD: usize>(lines: usize, count: usize) {
        // Strides with a gap, so that what lies between lines is seen to stay.
        let (from_stride, to_stride) = (count * WORD + 6, lines * WORD + 10);
        let from = filled(lines * from_stride);
        let mut to = vec![0xEE; count * to_stride];
        // SAFETY: both vectors have so many lines of that stride.
        unsafe {
            let (source, target) = ((from.as_ptr(), from_stride), (to.as_mut_ptr(), to_stride));
            transpose::<WORD>(source, target, lines, count, Ahead::Nothing);
        }
        let mut expected = vec![0xEE; count * to_stride];
        for line in 0..lines {
            for column in 0..count {
                let (f, t) = (line * from_stride + column * WORD, column * to_stride + line * WORD);
                expected[t..t + WORD].copy_from_slice(&from[f..f + WORD]);
            }
        }
        assert_eq!(to, expected, "{lines} x {count} words of {WORD}");
    }

    #[test]
    fn every_size_of_area_is_transposed_and_nothing_else_is_written() {
        for lines in (0..12).chain([15, 16, 17, 31, 32, 33, 40, 64, 80, 100]) {
            for count in (0..12).chain([15, 16, 17, 32, 35, 64]) {
                check::<2>(lines, count);
                check::<4>(lines, count);
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_kernel_transposes_its_tile() {
        fn check<const WORD: usize>() {
            let columns = words_in_tile::<WORD>();
            for (lines, kernel) in x86::kernels::<WORD>() {
                let Some(kernel) = kernel else {
                    eprintln!(
                        "SKIPPED: the kernel for {lines} lines of {WORD}-byte words: not on this processor"
                    );
                    continue;
                };
                let from = filled(lines * 16);
                let mut to = vec![0; columns * lines * WORD];
                // SAFETY: so many lines of 16 bytes, and as many bytes on the other side.
                unsafe { kernel(from.as_ptr(), 16, to.as_mut_ptr(), lines * WORD) };
                for column in 0..columns {
                    for line in 0..lines {
                        let (f, t) = (line * 16 + column * WORD, (column * lines + line) * WORD);
                        assert_eq!(to[t..t + WORD], from[f..f + WORD], "{lines} lines, ({line}, {column})");
                    }
                }
            }
        }
        check::<2>();
        check::<4>();
    }

    #[test]
    fn two_rows_take_turns_in_a_line() {
        type Turn = unsafe fn(*mut u8, *mut u8, usize, usize);
        const STRIDE: usize = 40;
        let mut turns: Vec<[Turn; 2]> = vec![
            [interleave_word_by_word::<true>, interleave_word_by_word::<false>],
            [interleave::<true>, interleave::<false>],
        ];
        #[cfg(target_arch = "x86_64")]
        turns.push([x86::interleave_sse2::<true>, x86::interleave_sse2::<false>]);
        let lines = filled(3 * 64);
        for [out, back] in turns {
            let (mut source, mut rows, mut again) = (lines.clone(), vec![0xEE; 6 * STRIDE], vec![0; 3 * 64]);
            // SAFETY: three lines, and six rows of 32 bytes.
            unsafe {
                out(source.as_mut_ptr(), rows.as_mut_ptr(), STRIDE, 3);
                back(again.as_mut_ptr(), rows.as_mut_ptr(), STRIDE, 3);
            }
            for (at, byte) in rows.iter().enumerate() {
                let (row, i) = (at / STRIDE, at % STRIDE);
                let expected =
                    if i < 32 { lines[row / 2 * 64 + i / 2 * 4 + row % 2 * 2 + i % 2] } else { 0xEE };
                assert_eq!(*byte, expected, "row {row}, byte {i}");
            }
            assert_eq!(again, lines);
        }
    }
}
