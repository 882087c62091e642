//! Copy kernels, chosen by what the processor offers.
//!
//! A streaming store writes a whole line without reading it first, and the loads are helped by prefetching two KiB
//! ahead, across the border into the next run: a processor's own prefetcher stops at each page and knows nothing of
//! the next run's address. On processors without AVX2 the C library's copy does the work.

/// How far ahead lines are fetched.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2 << 10;
/// Blocks of at least this size in the middle of a longer run go through the processor's string copy where it has a
/// fast one; at a run's end the kernels win, because they know where reading goes on.
#[cfg(target_arch = "x86_64")]
const STRING_COPY: usize = 16 << 10;

/// Copies with streaming stores; call [`fence`] before anybody is told. `next` is where reading goes on afterwards.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes. They may overlap, with unspecified bytes as the result.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize, next: *const u8) {
    // SAFETY: the caller's promise.
    unsafe { copy_lines::<true>(to, from, len, next) };
}

/// Copies rows of whole lines, `len` bytes each and a stride apart, with streaming stores; call [`fence`] before anybody is told.
/// What is `further` bytes behind each line is fetched meanwhile, unless that is 0.
///
/// # Safety
/// `to`, its stride and `len` are multiples of 64. Every row is readable at `from` and writable at `to`; the two do not overlap.
pub(crate) unsafe fn copy_rows(
    (to, to_stride): (*mut u8, usize),
    (from, from_stride): (*const u8, usize),
    len: usize,
    rows: usize,
    further: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the promise; the feature was detected.
        unsafe { x86::rows_avx512((to, to_stride), (from, from_stride), len, rows, further) };
        return;
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        unsafe { x86::rows_avx2((to, to_stride), (from, from_stride), len, rows, further) };
        return;
    }
    let _ = further;
    for row in 0..rows {
        // SAFETY: the promise.
        unsafe {
            from.add(row * from_stride).copy_to_nonoverlapping(to.add(row * to_stride), len);
        }
    }
}

/// Copies so that the destination is in the cache afterwards.
///
/// # Safety
/// As for [`copy`].
pub(super) unsafe fn copy_cached(to: *mut u8, from: *const u8, len: usize, next: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if len >= STRING_COPY && next == from.wrapping_add(len) && x86::has_fast_string_copy() {
        // SAFETY: the caller's promise.
        unsafe { x86::string_copy(to, from, len) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { copy_lines::<false>(to, from, len, next) };
}

/// # Safety
/// As for [`copy`].
unsafe fn copy_lines<const STREAM: bool>(to: *mut u8, from: *const u8, len: usize, next: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if let Some(kernel) = kernel::<STREAM>() {
        // Whole lines of the destination go through the kernel, what is before and after is copied as usual.
        let head = to.align_offset(64).min(len);
        let lines = (len - head) / 64 * 64;
        let tail = head + lines;
        // SAFETY: the parts lie inside the range promised; the kernel's features were detected.
        unsafe {
            std::ptr::copy(from, to, head);
            kernel(to.add(head), from.add(head), lines, next);
            std::ptr::copy(from.add(tail), to.add(tail), len - tail);
        }
        return;
    }
    let _ = next;
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from, to, len) };
}

#[cfg(target_arch = "x86_64")]
fn kernel<const STREAM: bool>() -> Option<Kernel> {
    if is_x86_feature_detected!("avx512f") {
        Some(x86::lines_avx512::<STREAM>)
    } else if is_x86_feature_detected!("avx2") {
        Some(x86::lines_avx2::<STREAM>)
    } else {
        None
    }
}

/// Asks for the lines of a range that will be read soon, in an order that the processor does not guess. A hint only, whatever the
/// address.
pub(crate) fn fetch(from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..len.div_ceil(64) {
        // SAFETY: prefetching has no effect on wrong addresses.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(64 * line).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, len);
}

/// Makes streaming stores visible before anything that follows.
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of every x86-64 processor, no memory is named.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// All kernels, each with whether this processor can run it.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) fn kernels() -> [(bool, Kernel); 4] {
    let (wide, narrow) = (is_x86_feature_detected!("avx512f"), is_x86_feature_detected!("avx2"));
    [
        (wide, x86::lines_avx512::<true>),
        (wide, x86::lines_avx512::<false>),
        (narrow, x86::lines_avx2::<true>),
        (narrow, x86::lines_avx2::<false>),
    ]
}

#[cfg(target_arch = "x86_64")]
pub(super) type Kernel = unsafe fn(*mut u8, *const u8, usize, *const u8);

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::cast_ptr_alignment,
    reason = "loads and stores are the unaligned ones, except streaming stores, whose alignment is in the contract"
)]
mod x86 {
    use super::AHEAD;
    use std::arch::x86_64::{
        __m256i, __m512i, _MM_HINT_NTA, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256,
        _mm256_stream_si256, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512,
    };
    use std::sync::OnceLock;

    /// Where to prefetch when `at` of `len` bytes are done.
    #[inline]
    fn ahead(from: *const u8, at: usize, len: usize, next: *const u8) -> *const i8 {
        let target = at + AHEAD;
        if target < len { from.wrapping_add(target).cast() } else { next.wrapping_add(target - len).cast() }
    }

    /// # Safety
    /// `to` is aligned to 64 bytes, `len` a multiple of 64 (or zero); `from` readable and `to` writable for `len` bytes.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn lines_avx512<const STREAM: bool>(
        to: *mut u8,
        from: *const u8,
        len: usize,
        next: *const u8,
    ) {
        let mut at = 0;
        // SAFETY: all accesses lie below `len`; prefetching has no effect on wrong addresses.
        unsafe {
            while at + 256 <= len {
                let hint = ahead(from, at, len, next);
                _mm_prefetch::<_MM_HINT_NTA>(hint);
                _mm_prefetch::<_MM_HINT_NTA>(hint.wrapping_add(64));
                _mm_prefetch::<_MM_HINT_NTA>(hint.wrapping_add(128));
                _mm_prefetch::<_MM_HINT_NTA>(hint.wrapping_add(192));
                let source = from.add(at).cast::<__m512i>();
                let a = _mm512_loadu_si512(source);
                let b = _mm512_loadu_si512(source.add(1));
                let c = _mm512_loadu_si512(source.add(2));
                let d = _mm512_loadu_si512(source.add(3));
                let target = to.add(at).cast::<__m512i>();
                store_512::<STREAM>(target, a);
                store_512::<STREAM>(target.add(1), b);
                store_512::<STREAM>(target.add(2), c);
                store_512::<STREAM>(target.add(3), d);
                at += 256;
            }
            while at < len {
                store_512::<STREAM>(to.add(at).cast(), _mm512_loadu_si512(from.add(at).cast()));
                at += 64;
            }
        }
    }

    /// # Safety
    /// As for [`lines_avx512`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn lines_avx2<const STREAM: bool>(
        to: *mut u8,
        from: *const u8,
        len: usize,
        next: *const u8,
    ) {
        let mut at = 0;
        // SAFETY: as above.
        unsafe {
            while at + 128 <= len {
                let hint = ahead(from, at, len, next);
                _mm_prefetch::<_MM_HINT_NTA>(hint);
                _mm_prefetch::<_MM_HINT_NTA>(hint.wrapping_add(64));
                let source = from.add(at).cast::<__m256i>();
                let a = _mm256_loadu_si256(source);
                let b = _mm256_loadu_si256(source.add(1));
                let c = _mm256_loadu_si256(source.add(2));
                let d = _mm256_loadu_si256(source.add(3));
                let target = to.add(at).cast::<__m256i>();
                store_256::<STREAM>(target, a);
                store_256::<STREAM>(target.add(1), b);
                store_256::<STREAM>(target.add(2), c);
                store_256::<STREAM>(target.add(3), d);
                at += 128;
            }
            while at < len {
                store_256::<STREAM>(to.add(at).cast(), _mm256_loadu_si256(from.add(at).cast()));
                at += 32;
            }
        }
    }

    /// # Safety
    /// As for [`super::copy_rows`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn rows_avx512(
        (to, to_stride): (*mut u8, usize),
        (from, from_stride): (*const u8, usize),
        len: usize,
        rows: usize,
        further: usize,
    ) {
        for row in 0..rows {
            // SAFETY: whole lines of a row; the destination is aligned.
            unsafe {
                let (from, to) = (from.add(row * from_stride), to.add(row * to_stride));
                for at in (0..len).step_by(64) {
                    if further > 0 {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + further).cast());
                    }
                    store_512::<true>(to.add(at).cast(), _mm512_loadu_si512(from.add(at).cast()));
                }
            }
        }
    }

    /// # Safety
    /// As for [`super::copy_rows`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn rows_avx2(
        (to, to_stride): (*mut u8, usize),
        (from, from_stride): (*const u8, usize),
        len: usize,
        rows: usize,
        further: usize,
    ) {
        for row in 0..rows {
            // SAFETY: whole lines of a row; the destination is aligned.
            unsafe {
                let (from, to) = (from.add(row * from_stride), to.add(row * to_stride));
                for at in (0..len).step_by(32) {
                    if further > 0 {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + further).cast());
                    }
                    store_256::<true>(to.add(at).cast(), _mm256_loadu_si256(from.add(at).cast()));
                }
            }
        }
    }

    /// # Safety
    /// `to` is aligned to 64 bytes and writable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_512<const STREAM: bool>(to: *mut __m512i, line: __m512i) {
        // SAFETY: the caller's promise.
        unsafe { if STREAM { _mm512_stream_si512(to, line) } else { _mm512_storeu_si512(to, line) } };
    }

    /// # Safety
    /// `to` is aligned to 32 bytes and writable.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_256<const STREAM: bool>(to: *mut __m256i, half: __m256i) {
        // SAFETY: the caller's promise.
        unsafe { if STREAM { _mm256_stream_si256(to, half) } else { _mm256_storeu_si256(to, half) } };
    }

    /// "Enhanced REP MOVSB" (leaf 7, EBX bit 9).
    pub(super) fn has_fast_string_copy() -> bool {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        *KNOWN.get_or_init(|| {
            std::arch::x86_64::__cpuid(0).eax >= 7
                && std::arch::x86_64::__cpuid_count(7, 0).ebx & (1 << 9) != 0
        })
    }

    /// # Safety
    /// `from` is readable and `to` writable for `len` bytes.
    pub(super) unsafe fn string_copy(to: *mut u8, from: *const u8, len: usize) {
        // SAFETY: copies exactly the range promised; the direction flag is clear by the calling convention.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags)
            );
        }
    }
}
