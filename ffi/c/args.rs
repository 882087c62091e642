//! What comes in from C and goes back: checked before anything happens, written only on success.

use super::panic::Answer;
use super::result::KVXFER_OK;
use kvxfer_core::{Error, ErrorCode, Result};
use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, align_of, size_of};
use std::time::Duration;

/// Largest time-out or deadline, in milliseconds: one year. `UINT64_MAX` ("for ever") is refused like anything
/// above.
pub const KVXFER_MAX_TIMEOUT_MS: u64 = 31_536_000_000;
/// Longest text accepted, in bytes: more than any configuration, less than a runaway pointer.
const MAX_TEXT: usize = 1 << 20;
/// Largest struct accepted; a larger `struct_size` is an uninitialised one.
const MAX_STRUCT: usize = 4096;

/// A malformed argument.
pub(super) fn invalid(argument: &'static str, problem: impl Into<String>) -> Error {
    Error::InvalidArgument { argument, problem: problem.into() }
}

/// A time-out in milliseconds; everything ends, so for ever is not one.
pub(super) fn flag(argument: &'static str, value: u32) -> Result<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        _ => Err(invalid(argument, format!("is {value}; 0 and 1 are possible"))),
    }
}

/// Milliseconds that every call may wait.
pub(super) fn timeout(argument: &'static str, ms: u64) -> Result<Duration> {
    if ms > KVXFER_MAX_TIMEOUT_MS {
        return Err(invalid(
            argument,
            format!(
                "{ms} ms is more than KVXFER_MAX_TIMEOUT_MS = {KVXFER_MAX_TIMEOUT_MS} (one year); every call ends, \
                 so waiting for ever is not offered: wait again instead"
            ),
        ));
    }
    Ok(Duration::from_millis(ms))
}

/// A time-out where 0 means "as configured".
pub(super) fn optional_timeout(argument: &'static str, ms: u64) -> Result<Option<Duration>> {
    Ok(if ms == 0 { None } else { Some(timeout(argument, ms)?) })
}

/// A NUL-terminated UTF-8 text.
///
/// # Safety
/// `text` is NULL or readable up to its NUL, and stays so during the call.
pub(super) unsafe fn text<'a>(argument: &'static str, text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(invalid(argument, "is NULL"));
    }
    // SAFETY: readable up to its NUL, as the caller promises; never read beyond it.
    let len = unsafe { libc::strnlen(text, MAX_TEXT + 1) };
    if len > MAX_TEXT {
        return Err(invalid(argument, format!("is longer than {MAX_TEXT} bytes, or has no NUL at its end")));
    }
    // SAFETY: the NUL was found at `len`.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|e| {
        invalid(argument, format!("is not UTF-8: byte {} of {:?}", e.valid_up_to(), text.to_string_lossy()))
    })
}

/// A text that may be NULL; empty counts as NULL.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn optional_text<'a>(argument: &'static str, t: *const c_char) -> Result<Option<&'a str>> {
    if t.is_null() {
        return Ok(None);
    }
    // SAFETY: passed on.
    let t = unsafe { text(argument, t) }?;
    Ok(if t.is_empty() { None } else { Some(t) })
}

/// An array; NULL is fine when `count` is 0.
///
/// # Safety
/// `first` is NULL or points at `count` readable elements which stay unchanged during the call.
pub(super) unsafe fn list<'a, T>(argument: &'static str, first: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if first.is_null() {
        return Err(invalid(argument, format!("is NULL, but its count is {count}")));
    }
    if !first.is_aligned() {
        return Err(invalid(argument, format!("{first:p} is not aligned to {} bytes", align_of::<T>())));
    }
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(invalid(argument, format!("{count} elements exceed the address space")));
    }
    // SAFETY: not null, aligned, of a possible size; readable and unchanged as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

/// Room for `count` elements, which the call fills.
///
/// # Safety
/// As for [`list`], and writable.
pub(super) unsafe fn list_mut<'a, T>(
    argument: &'static str,
    first: *mut T,
    count: usize,
) -> Result<&'a mut [T]> {
    // SAFETY: the caller's promise.
    let checked = unsafe { list(argument, first.cast_const(), count) }?.len();
    if checked == 0 {
        return Ok(&mut []);
    }
    // SAFETY: checked by `list`; writable and nobody else's during the call, as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts_mut(first, count) })
}

/// An array of texts.
///
/// # Safety
/// As for [`list`], and for [`text`] of each element.
pub(super) unsafe fn texts(
    argument: &'static str,
    first: *const *const c_char,
    count: usize,
) -> Result<Vec<String>> {
    // SAFETY: passed on.
    unsafe { list(argument, first, count)?.iter().map(|t| Ok(text(argument, *t)?.to_owned())).collect() }
}

/// A struct that the caller fills, grown over versions: its first field is `size_t struct_size`.
///
/// # Safety
/// `repr(C)`, starts with a `usize`, valid with all bytes zero, and at most [`MAX_STRUCT`] bytes long.
pub(super) unsafe trait Versioned: Copy {
    /// Name in C.
    const NAME: &'static str;
    /// Size in the first version.
    const FIRST: usize;
}

/// Declares a struct as [`Versioned`].
macro_rules! versioned {
    ($($t:ident, $first:expr;)*) => {
        $(
            // SAFETY: the struct is `repr(C)`, starts with `struct_size: usize`, and has integer, pointer and array fields only.
            unsafe impl $crate::c::args::Versioned for $t {
                const NAME: &'static str = stringify!($t);
                const FIRST: usize = $first;
            }
            const _: () = assert!(std::mem::offset_of!($t, struct_size) == 0 && $first <= size_of::<$t>());
        )*
    };
}
pub(super) use versioned;

fn struct_size<T: Versioned>(argument: &'static str, given: usize) -> Result<usize> {
    if given < T::FIRST || given > MAX_STRUCT {
        return Err(invalid(
            argument,
            format!(
                "struct_size is {given}; set it to sizeof({}), {} bytes in this version",
                T::NAME,
                size_of::<T>()
            ),
        ));
    }
    Ok(given)
}

/// Reads a struct of this or another version. Fields this version does not know must be zero.
///
/// # Safety
/// `p` is NULL or points at a struct whose first `struct_size` bytes are readable.
pub(super) unsafe fn read_struct<T: Versioned>(argument: &'static str, p: *const T) -> Result<T> {
    if p.is_null() {
        return Err(invalid(argument, "is NULL"));
    }
    // SAFETY: the first field is the size, readable as the caller promises; no alignment is assumed.
    let size = struct_size::<T>(argument, unsafe { p.cast::<usize>().read_unaligned() })?;
    let bytes = p.cast::<u8>();
    for i in size_of::<T>()..size {
        // SAFETY: within `struct_size` bytes, as the caller promises.
        if unsafe { bytes.add(i).read() } != 0 {
            return Err(Error::failed(
                ErrorCode::Unsupported,
                format!(
                    "{argument}: byte {i} of {} is set, but this version knows {} bytes: the program was built against a \
                     newer kvxfer; upgrade the library",
                    T::NAME,
                    size_of::<T>()
                ),
            ));
        }
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: at most `struct_size` bytes are read and at most the whole value written; all zero is valid for `T`.
    unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(bytes, size.min(size_of::<T>()));
        Ok(value.assume_init())
    }
}

/// A struct to fill: as large as the caller's version of it.
pub(super) struct OutStruct<T> {
    at: *mut T,
    size: usize,
}

impl<T: Versioned> OutStruct<T> {
    /// Checks pointer and `struct_size`.
    ///
    /// # Safety `p` is NULL or points at a struct whose first `struct_size` bytes are readable and writable
    /// until the call returns.
    pub(super) unsafe fn new(argument: &'static str, p: *mut T) -> Result<Self> {
        if p.is_null() {
            return Err(invalid(argument, "is NULL"));
        }
        // SAFETY: the first field is the size, readable as the caller promises.
        let size = struct_size::<T>(argument, unsafe { p.cast::<usize>().read_unaligned() })?;
        Ok(Self { at: p, size })
    }

    /// Writes what fits; `struct_size` stays, fields of a newer version become zero.
    pub(super) fn set(self, value: &T) {
        let head = size_of::<usize>();
        let known = self.size.min(size_of::<T>());
        // SAFETY: `size` writable bytes were promised to `new`; `known` lies within both.
        unsafe {
            let at = self.at.cast::<u8>();
            at.add(head)
                .copy_from_nonoverlapping(std::ptr::from_ref(value).cast::<u8>().add(head), known - head);
            at.add(known).write_bytes(0, self.size - known);
        }
    }
}

/// A place for one result.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Checks that there is one.
    ///
    /// # Safety
    /// `p` is NULL or writable until the call returns.
    pub(super) unsafe fn new(argument: &'static str, p: *mut T) -> Result<Self> {
        if p.is_null() { Err(invalid(argument, "is NULL")) } else { Ok(Self(p)) }
    }

    /// One that the caller may leave out with NULL.
    ///
    /// # Safety
    /// As for [`Out::new`].
    pub(super) unsafe fn optional(p: *mut T) -> Option<Self> {
        if p.is_null() { None } else { Some(Self(p)) }
    }

    /// Writes the result.
    pub(super) fn set(self, value: T) {
        // SAFETY: writable, as promised to `new`; no alignment is assumed.
        unsafe { self.0.write_unaligned(value) }
    }
}

/// A caller's buffer for a text or bytes, with a place for the length.
pub(super) struct Buffer {
    at: *mut u8,
    capacity: usize,
    length: Out<usize>,
}

impl Buffer {
    /// Checks the pointers; a NULL buffer of capacity 0 asks for the length only.
    ///
    /// # Safety
    /// `at` is NULL or writable for `capacity` bytes, and `length` is NULL or writable, until the call returns.
    pub(super) unsafe fn new(
        argument: &'static str,
        at: *mut u8,
        capacity: usize,
        length: *mut usize,
    ) -> Result<Self> {
        if at.is_null() && capacity > 0 {
            return Err(invalid(argument, format!("is NULL, but its capacity is {capacity}")));
        }
        // SAFETY: passed on.
        Ok(Self { at, capacity, length: unsafe { Out::new("length_out", length) }? })
    }

    /// True when only the length was asked for.
    pub(super) fn asks_for_length(&self) -> bool {
        self.at.is_null()
    }

    /// True when that many bytes fit.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        bytes <= self.capacity
    }

    /// Writes `bytes`, or only their length with `KVXFER_TOO_LARGE` when they do not fit.
    pub(super) fn set(self, bytes: &[u8]) -> Answer {
        self.put(bytes, bytes.len())
    }

    /// Writes a text and its NUL; the length is without the NUL.
    pub(super) fn set_text(self, text: &str) -> Answer {
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
        self.put(&bytes, text.len())
    }

    fn put(self, bytes: &[u8], length: usize) -> Answer {
        let (asks, capacity) = (self.asks_for_length(), self.capacity);
        let fits = self.fits(bytes.len());
        if fits {
            // SAFETY: `capacity` writable bytes were promised to `new`, and `bytes` are not more; they are ours, so no overlap.
            unsafe { self.at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        self.length.set(length);
        if fits || asks {
            return Ok(KVXFER_OK);
        }
        Err(Error::failed(
            ErrorCode::TooLarge,
            format!("the buffer holds {capacity} bytes, {} are needed (length_out tells)", bytes.len()),
        ))
    }
}

/// Copies a text with its NUL into a fixed array of a struct, cut at a character boundary when too long.
pub(super) fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in out.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = *from as c_char;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Sample {
        struct_size: usize,
        first: u64,
        second: u64,
    }
    versioned! { Sample, 16; }

    #[repr(C)]
    struct Newer {
        known: Sample,
        extra: u64,
    }

    #[test]
    fn structs_of_older_and_newer_versions_are_read() {
        let mut newer = Newer { known: Sample { struct_size: 16, first: 7, second: 9 }, extra: 0 };
        let at = std::ptr::from_ref(&newer).cast::<Sample>();
        // SAFETY: points at a `Newer`, whose bytes cover every size used here.
        let read = |p| unsafe { read_struct::<Sample>("sample", p) };
        let old = read(at).unwrap();
        assert_eq!((old.first, old.second), (7, 0), "a field the older caller does not have reads as zero");
        newer.known.struct_size = size_of::<Newer>();
        let at = std::ptr::from_ref(&newer).cast::<Sample>();
        assert_eq!(read(at).unwrap().second, 9);
        newer.extra = 1;
        let at = std::ptr::from_ref(&newer).cast::<Sample>();
        assert_eq!(read(at).err().unwrap().code(), ErrorCode::Unsupported);
        for size in [0, 15, MAX_STRUCT + 1, usize::MAX] {
            newer.known.struct_size = size;
            let at = std::ptr::from_ref(&newer).cast::<Sample>();
            assert_eq!(read(at).err().unwrap().code(), ErrorCode::InvalidArgument, "{size}");
        }
    }

    #[test]
    fn structs_are_filled_as_far_as_the_caller_knows_them() {
        let mut newer = Newer { known: Sample { struct_size: 16, first: 1, second: 2 }, extra: 3 };
        let value = Sample { struct_size: 0, first: 10, second: 20 };
        let fill = |newer: &mut Newer| {
            // SAFETY: points at a `Newer`, whose bytes cover both sizes.
            unsafe { OutStruct::new("s", std::ptr::from_mut(newer).cast::<Sample>()) }.unwrap().set(&value);
        };
        fill(&mut newer);
        assert_eq!((newer.known.first, newer.known.second, newer.extra), (10, 2, 3));
        newer.known.struct_size = size_of::<Newer>();
        fill(&mut newer);
        assert_eq!((newer.known.second, newer.extra, newer.known.struct_size), (20, 0, size_of::<Newer>()));
    }

    #[test]
    fn texts_are_checked() {
        // SAFETY: NULL or NUL-terminated.
        let read =
            |t: *const c_char| unsafe { text("name", t) }.map(str::to_owned).map_err(|e| e.to_string());
        assert_eq!(read(c"kv".as_ptr()).unwrap(), "kv");
        assert_eq!(read(std::ptr::null()).unwrap_err(), "name: is NULL");
        assert!(read(c"k\xffv".as_ptr()).unwrap_err().contains("not UTF-8: byte 1"));
        let long = vec![b'a'; MAX_TEXT + 1];
        assert!(read(std::ffi::CString::new(long).unwrap().as_ptr()).unwrap_err().contains("longer"));
        assert_eq!(fixed::<4>("äö"), [0xc3_u8 as c_char, 0xa4_u8 as c_char, 0, 0]);
    }

    #[test]
    fn lists_are_checked() {
        let a = [1_u64, 2];
        // SAFETY: refused before any read, or within `a`.
        let read =
            |p: *const u64, n| unsafe { list("a", p, n) }.map(<[u64]>::to_vec).map_err(|e| e.to_string());
        assert_eq!(read(a.as_ptr(), 2).unwrap(), [1, 2]);
        assert_eq!(read(std::ptr::null(), 0).unwrap(), [0_u64; 0]);
        assert!(read(std::ptr::null(), 1).is_err());
        assert!(read(a.as_ptr(), usize::MAX / 8).unwrap_err().contains("exceed"));
        assert!(read(a.as_ptr().cast::<u8>().wrapping_add(1).cast(), 1).unwrap_err().contains("aligned"));
    }

    #[test]
    fn forever_is_refused() {
        assert!(timeout("timeout_ms", u64::MAX).is_err());
        assert_eq!(timeout("timeout_ms", 5).unwrap(), Duration::from_millis(5));
        assert_eq!(optional_timeout("timeout_ms", 0).unwrap(), None);
    }
}
