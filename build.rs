//! Names the shared library: its SONAME, and a file of that name in the build tree so that programs linked there run.

use std::path::{Path, PathBuf};

/// The number is `KVXFER_ABI_VERSION`; it changes when programs linked before would break.
const SONAME: &str = "libkvxfer.so.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os != "linux" {
        return;
    }
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
    // OUT_DIR is target/PROFILE/build/kvxfer-HASH/out; `cargo build` leaves the library in PROFILE, `cargo test` in
    // PROFILE/deps.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    if let Some(profile) = out.ancestors().nth(3).filter(|p| p.join("build").is_dir()) {
        for folder in [profile.to_path_buf(), profile.join("deps")] {
            link(&folder);
        }
    }
}

#[cfg(unix)]
fn link(folder: &Path) {
    // Dangling until the library is built, and there already the next time. A build tree that does not allow links only
    // loses the convenience: an installed library gets its links from scripts/install.sh.
    if folder.is_dir() {
        let _ = std::os::unix::fs::symlink("libkvxfer.so", folder.join(SONAME));
    }
}

#[cfg(not(unix))]
fn link(_: &Path) {}
