//! Which library this is and what it was built with.

use super::args::text;
use super::handle;
use std::ffi::c_char;

/// Major version of this header; the library's is `kvxfer_version()`.
pub const KVXFER_VERSION_MAJOR: u32 = 0;
/// Minor version of this header.
pub const KVXFER_VERSION_MINOR: u32 = 1;
/// Patch version of this header.
pub const KVXFER_VERSION_PATCH: u32 = 0;
/// Version of the binary interface: the number in the SONAME, `libkvxfer.so.0`. Compare with
/// `kvxfer_abi_version()`.
pub const KVXFER_ABI_VERSION: u32 = 0;

/// Version of the loaded library, e.g. `"0.1.0"`. Static: never to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Version of the loaded library's binary interface. A program that loads the library by hand compares it with
/// `KVXFER_ABI_VERSION`; a linked one is protected by the SONAME.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_abi_version() -> u32 {
    KVXFER_ABI_VERSION
}

/// True when the library was **built** with that feature: `"nixl"` or `"cuda"`. Whether the machine offers it
/// is a question for run time (`kvxfer doctor`). False for NULL and unknown names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_has_feature(name: *const c_char) -> bool {
    // SAFETY: pointer arguments are as the header asks.
    let name = unsafe { text("name", name) }.unwrap_or_default();
    (name == "nixl" && cfg!(feature = "nixl")) || (name == "cuda" && cfg!(feature = "cuda"))
}

/// Number of handles this process has been given and has not freed, of all types: 0 after a clean shutdown.
/// For leak checks in tests.
#[unsafe(no_mangle)]
pub extern "C" fn kvxfer_live_handles() -> u64 {
    handle::live()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_states_the_version_of_the_package() {
        let header = format!("{KVXFER_VERSION_MAJOR}.{KVXFER_VERSION_MINOR}.{KVXFER_VERSION_PATCH}");
        assert_eq!(header, env!("CARGO_PKG_VERSION"));
        // SAFETY: static and NUL-terminated.
        let library = unsafe { std::ffi::CStr::from_ptr(kvxfer_version()) };
        assert_eq!(library.to_str(), Ok(header.as_str()));
    }
}
