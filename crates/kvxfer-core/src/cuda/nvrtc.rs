//! Compiling the kernels at run time, for a device's own architecture, where NVRTC is there and somebody asks for it.
//!
//! The PTX that ships with the library runs on every device from compute capability 8.0 on; the driver makes machine code of it. With
//! `KVXFER_NVRTC` set to `libnvrtc.so.12` (a path, or `1` for the copy that `scripts/install-nvrtc.sh` keeps) the kernels are compiled for
//! the very device instead, once, and kept in the cache folder under the hash of their text. Whatever goes wrong there is said in the
//! log, and the shipped PTX is used.

use super::device::Device;
use crate::{Error, Result, cache};
use cudarc::nvrtc::{result, sys};
use kvxfer_proto::ErrorCode;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The kernels as one text.
fn source() -> String {
    const FILES: [&str; 3] = [
        include_str!("../../kernels/access.h"),
        include_str!("../../kernels/copy.cu"),
        include_str!("../../kernels/paged.cu"),
    ];
    let mut text = FILES.concat().replace("#include \"access.h\"\n", "").replace("#pragma once\n", "");
    text.push('\0');
    text
}

fn failed(text: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::NotAvailable, format!("NVRTC: {text}"))
}

/// PTX for this device, compiled now or before; `None` where nobody asked, or it could not be had.
pub(super) fn for_device(device: &Device) -> Option<String> {
    let asked = std::env::var_os("KVXFER_NVRTC").filter(|v| !v.is_empty() && v != "0")?;
    let library = if asked == "1" { installed()? } else { PathBuf::from(asked) };
    let made = device.capability().and_then(|(major, minor)| {
        let architecture = format!("compute_{major}{minor}");
        let source = source();
        let key =
            xxhash_rust::xxh3::xxh3_64(format!("{source}{architecture}{}", library.display()).as_bytes());
        let kept =
            cache::folder().map(|folder| folder.join("ptx").join(format!("{architecture}-{key:016x}.ptx")));
        if let Some(text) = kept.as_ref().and_then(|file| std::fs::read_to_string(file).ok()) {
            return Ok(text);
        }
        let ptx = compile(&library, &architecture)?;
        if let Some(file) = kept
            && let Err(e) = keep(&file, &ptx)
        {
            tracing::debug!(file = %file.display(), error = %e, "compiled kernels are not kept");
        }
        Ok(ptx)
    });
    match made {
        Ok(ptx) => Some(ptx),
        Err(e) => {
            tracing::warn!(%device, error = %e, "the kernels were not compiled for this device; the shipped ones are used");
            None
        }
    }
}

/// Compiles all kernels for an architecture, `compute_80` say.
fn compile(library: &Path, architecture: &str) -> Result<String> {
    load(library)?;
    let source = source();
    let source = CStr::from_bytes_with_nul(source.as_bytes()).map_err(failed)?;
    let program = result::create_program(source, Some(c"kvxfer.cu")).map_err(|e| failed(format!("{e:?}")))?;
    // SAFETY: a program made above, used by this thread alone and destroyed once; the texts are copied before that.
    unsafe {
        let done = result::compile_program(
            program,
            &[format!("--gpu-architecture={architecture}"), "--std=c++17".into()],
        );
        let text = |chars: Vec<std::ffi::c_char>| {
            let bytes: Vec<u8> = chars.into_iter().map(|c| c as u8).take_while(|b| *b != 0).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let outcome = match done {
            Ok(()) => result::get_ptx(program).map(text).map_err(|e| failed(format!("{e:?}"))),
            Err(e) => {
                let log = result::get_program_log(program).map(text).unwrap_or_default();
                Err(failed(format!("{e:?} for {architecture}: {}", log.trim())))
            }
        };
        if let Err(e) = result::destroy_program(program) {
            tracing::debug!(error = ?e, "nvrtcDestroyProgram");
        }
        outcome
    }
}

/// Opens the library by its path, so that the binding finds it by its name. Once: a process has one NVRTC.
fn load(library: &Path) -> Result<()> {
    static LOADED: OnceLock<Result<libloading::Library>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        // SAFETY: NVIDIA's library, whose initialisers do nothing but set up itself.
        unsafe { libloading::Library::new(library) }.map_err(failed)
    });
    loaded.as_ref().map_err(Clone::clone)?;
    // SAFETY: a look-up by name; the library was loaded above.
    if unsafe { sys::is_culib_present() } {
        Ok(())
    } else {
        Err(failed(format!("{} is not libnvrtc.so.12 by its own name", library.display())))
    }
}

/// The copy that `scripts/install-nvrtc.sh` keeps.
fn installed() -> Option<PathBuf> {
    let library = cache::folder()?.join("nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    library.is_file().then_some(library)
}

/// Writes beside and renames: another process may do the same.
fn keep(file: &Path, text: &str) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let part =
        folder.join(format!(".{}-{}", std::process::id(), file.file_name().unwrap_or_default().display()));
    std::fs::write(&part, text)?;
    std::fs::rename(&part, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library() -> Option<PathBuf> {
        let found =
            std::env::var_os("KVXFER_NVRTC").map(PathBuf::from).filter(|p| p.is_file()).or_else(installed);
        if found.is_none() {
            println!("SKIPPED: no NVRTC here; scripts/install-nvrtc.sh brings it");
        }
        found
    }

    /// What ships is what the sources come to. `KVXFER_UPDATE_PTX=1` writes it anew.
    #[test]
    fn the_shipped_ptx_is_what_the_sources_come_to() {
        let Some(library) = library() else { return };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/ptx/compute_80.ptx");
        let fresh = compile(&library, "compute_80").unwrap();
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
        for architecture in ["compute_90", "compute_100"] {
            assert!(
                compile(&library, architecture).unwrap().contains(".entry kvx_paged16"),
                "{architecture}"
            );
        }
        let e = compile(&library, "compute_1").unwrap_err();
        assert!(e.to_string().contains("compute_1"), "{e}");
    }

    #[test]
    fn compiled_kernels_are_kept_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b.ptx");
        keep(&file, "text").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "text");
        assert_eq!(std::fs::read_dir(folder.path().join("a")).unwrap().count(), 1);
    }
}
