//! Compiling the kernels at run time, for a device's own architecture.
//!
//! The PTX that ships with the library runs on every device from compute capability 8.0 on; the driver makes machine code of it. NVRTC comes in
//!
//! - where `KVXFER_NVRTC` asks for it (a path, or `1` for the copy that `scripts/install-nvrtc.sh` keeps): PTX for the very device,
//! - where the driver does not take the shipped PTX (it is older than its version, or comes without its compiler) and there is a
//!   `libnvrtc` on the loader's path or in `KVXFER_NVRTC`: machine code for the very device, of which the driver need not understand any PTX.
//!   `KVXFER_NVRTC=0` forbids it.
//!
//! What was compiled is kept in the cache folder under the hash of its text. Whatever goes wrong there is said in the log; the shipped PTX
//! is used in the first case, copies in the second.

mod library;

use self::library::{Form, Nvrtc};
use super::device::Device;
use super::driver;
use crate::{Error, Result, cache};
use kvxfer_proto::ErrorCode;
use std::ffi::{CString, OsString};
use std::path::{Path, PathBuf};

/// The kernels as one text.
fn source() -> Result<CString> {
    const FILES: [&str; 3] = [
        include_str!("../../../kernels/access.h"),
        include_str!("../../../kernels/copy.cu"),
        include_str!("../../../kernels/paged.cu"),
    ];
    let text = FILES.concat().replace("#include \"access.h\"\n", "").replace("#pragma once\n", "");
    CString::new(text).map_err(failed)
}

fn failed(text: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::NotAvailable, format!("NVRTC: {text}"))
}

fn variable() -> Option<OsString> {
    std::env::var_os("KVXFER_NVRTC").filter(|v| !v.is_empty())
}

/// The library that the environment names.
fn named() -> Option<PathBuf> {
    let asked = variable().filter(|v| v != "0")?;
    if asked == "1" { installed() } else { Some(PathBuf::from(asked)) }
}

/// PTX for this device, compiled now or before, NUL-terminated; `None` where nobody asked, or it could not be had.
pub(super) fn for_device(device: &Device) -> Option<Vec<u8>> {
    match Nvrtc::open(&named()?).and_then(|nvrtc| image(nvrtc, device, Form::Ptx)) {
        Ok(ptx) => Some(ptx),
        Err(e) => {
            tracing::warn!(%device, error = %e, "the kernels were not compiled for this device; the shipped ones are used");
            None
        }
    }
}

/// Gives `load` machine code for this device, from one library after the other until it takes one: the one that the environment names,
/// then those of the loader's path. The error says what was tried.
pub(super) fn instead<T>(device: &Device, load: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
    if variable().is_some_and(|v| v == "0") {
        return Err(failed("KVXFER_NVRTC=0 forbids compiling them here"));
    }
    // The driver's own generation first: it need not take the code of a newer one.
    let mut names = ["libnvrtc.so.13", "libnvrtc.so.12"];
    if driver::driver()?.version < 13_000 {
        names.reverse();
    }
    let mut tried = Vec::new();
    for path in named().into_iter().chain(names.map(PathBuf::from)) {
        let made = Nvrtc::open(&path).and_then(|nvrtc| {
            let loaded = load(&image(nvrtc, device, Form::Cubin)?)?;
            tracing::info!(%device, library = %nvrtc, "the kernels were compiled for this device");
            Ok(loaded)
        });
        match made {
            Ok(loaded) => return Ok(loaded),
            Err(e) => tried.push(e.to_string()),
        }
    }
    Err(failed(format!(
        "{}; put libnvrtc.so.12 or .13 on the loader's path, or its path into KVXFER_NVRTC",
        tried.join("; ")
    )))
}

/// The kernels for this device, compiled now or before.
fn image(nvrtc: &Nvrtc, device: &Device, form: Form) -> Result<Vec<u8>> {
    let (major, minor) = device.capability()?;
    let (architecture, source) = (major * 10 + minor, source()?);
    let (kind, extension) = if form == Form::Ptx { ("compute", "ptx") } else { ("sm", "cubin") };
    let text = format!("{}{kind}_{architecture}{nvrtc}", source.to_string_lossy());
    let key = xxhash_rust::xxh3::xxh3_64(text.as_bytes());
    let kept = cache::folder()
        .map(|folder| folder.join("ptx").join(format!("{kind}_{architecture}-{key:016x}.{extension}")));
    if let Some(image) = kept.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = nvrtc.compile(&source, architecture, form)?;
    if let Some(file) = kept
        && let Err(e) = keep(&file, &image)
    {
        tracing::debug!(file = %file.display(), error = %e, "compiled kernels are not kept");
    }
    Ok(image)
}

/// The copy that `scripts/install-nvrtc.sh` keeps.
fn installed() -> Option<PathBuf> {
    let library = cache::folder()?.join("nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    library.is_file().then_some(library)
}

/// What `keep` wrote: the driver reads as far as an image says by itself, so nothing but that is given to it.
fn read(file: &Path) -> Option<Vec<u8>> {
    let mut image = std::fs::read(file).ok()?;
    let digest = image.split_off(image.len().checked_sub(8)?);
    (digest == xxhash_rust::xxh3::xxh3_64(&image).to_le_bytes()).then_some(image)
}

/// Writes an image with its digest, beside, and renames: another process may do the same.
fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let part =
        folder.join(format!(".{}-{}", std::process::id(), file.file_name().unwrap_or_default().display()));
    std::fs::write(&part, [image, &xxhash_rust::xxh3::xxh3_64(image).to_le_bytes()].concat())?;
    std::fs::rename(&part, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn library() -> Option<PathBuf> {
        let found =
            std::env::var_os("KVXFER_NVRTC").map(PathBuf::from).filter(|p| p.is_file()).or_else(installed);
        if found.is_none() {
            println!("SKIPPED: no NVRTC here; scripts/install-nvrtc.sh brings it");
        }
        found
    }

    /// PTX as text.
    fn compiled(library: &Path, architecture: i32) -> Result<String> {
        let ptx = Nvrtc::open(library)?.compile(&source().unwrap(), architecture, Form::Ptx)?;
        assert_eq!(ptx.last(), Some(&0), "it ends as the driver wants it");
        Ok(CStr::from_bytes_until_nul(&ptx).unwrap().to_str().unwrap().to_owned())
    }

    /// What ships is what the sources come to. `KVXFER_UPDATE_PTX=1` writes it anew.
    #[test]
    fn the_shipped_ptx_is_what_the_sources_come_to() {
        let Some(library) = library() else { return };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/ptx/compute_80.ptx");
        let fresh = compiled(&library, 80).unwrap();
        if std::env::var_os("KVXFER_UPDATE_PTX").is_some() {
            std::fs::write(&file, &fresh).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap();
        assert!(
            fresh == kept,
            "kernels/ptx/compute_80.ptx differs from the sources: run `make ptx` and commit it"
        );
        // Accesses of 16 bytes, and nothing spilled to local memory.
        assert!(fresh.contains("ld.global.L1::no_allocate.v4.u32") && fresh.contains("st.global.cs.v4.u32"));
        assert!(!fresh.contains(".local"), "a kernel uses local memory");
    }

    #[test]
    fn newer_architectures_compile_and_unknown_ones_say_why() {
        let Some(library) = library() else { return };
        for architecture in [90, 100] {
            assert!(
                compiled(&library, architecture).unwrap().contains(".entry kvx_paged16"),
                "{architecture}"
            );
            let code = Nvrtc::open(&library).unwrap().compile(&source().unwrap(), architecture, Form::Cubin);
            assert!(code.unwrap().starts_with(b"\x7fELF"), "machine code for {architecture}");
        }
        let e = compiled(&library, 1).unwrap_err();
        assert!(e.to_string().contains("compute_1"), "{e}");
        let e = Nvrtc::open(Path::new("libnvrtc.so.0")).unwrap_err();
        assert!(e.to_string().contains("libnvrtc.so.0"), "{e}");
    }

    #[test]
    fn compiled_kernels_are_kept_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b.ptx");
        keep(&file, b"text").unwrap();
        assert_eq!(read(&file).as_deref(), Some(b"text".as_slice()));
        assert_eq!(std::fs::read_dir(folder.path().join("a")).unwrap().count(), 1);
        // What is not as it was written is not used.
        for damaged in [b"".as_slice(), b"text", b"text1234"] {
            std::fs::write(&file, damaged).unwrap();
            assert_eq!(read(&file), None, "{damaged:?}");
        }
    }
}
