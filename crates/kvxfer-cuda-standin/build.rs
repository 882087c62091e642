//! Builds the stand-in driver: `libcuda.so.1` with every call, and an older one without the batched copies of CUDA 12.8.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    let mut sources = files(&here.join("standin"), "cpp");
    // The kernels' own sources, compiled for the host.
    let kernels = here.join("../kvxfer-core/kernels");
    sources.extend(files(&kernels.join("twin"), "cpp"));
    for folder in [&here.join("standin"), &kernels, &kernels.join("twin")] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    println!("cargo::rerun-if-env-changed=CXX");
    let built = build(&out.join("new"), &sources, &kernels, &[])
        .and_then(|()| build(&out.join("old"), &sources, &kernels, &["-DSTANDIN_OLD"]));
    let folder = match built {
        Ok(()) => out.display().to_string(),
        Err(why) => {
            let why = why.replace('\n', "\ncargo::warning=");
            println!("cargo::warning=no stand-in CUDA driver, the tests that need it will say so: {why}");
            String::new()
        }
    };
    println!("cargo::rustc-env=KVXFER_CUDA_STANDIN={folder}");
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}

fn build(folder: &Path, sources: &[PathBuf], kernels: &Path, more: &[&str]) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|e| e.to_string())?;
    let library = folder.join("libcuda.so.1");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let output = Command::new(&compiler)
        .args([
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-O2",
            "-g",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ])
        .args(["-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"])
        .args(more)
        .arg("-I")
        .arg(kernels)
        .args(sources)
        .arg("-o")
        .arg(&library)
        .output()
        .map_err(|e| format!("{compiler}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{compiler} failed:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    // The binding tries this name first.
    let link = folder.join("libcuda.so");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink("libcuda.so.1", &link).map_err(|e| e.to_string())
}
