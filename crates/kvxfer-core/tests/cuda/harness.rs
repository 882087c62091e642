//! Runs a scenario in a process with the driver it needs, and looks at what that leaves behind.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::PathBuf;
use std::process::Command;

/// Set in a process that has a driver.
pub(crate) const UNDER: &str = "KVXFER_TEST_UNDER_CUDA";

/// The compiler that `scripts/install-nvrtc.sh` keeps.
fn nvrtc() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(base.join("kvxfer/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")).filter(|f| f.is_file())
}

/// Runs `body` in a process of its own, under the stand-in driver with these variables. `LD_LIBRARY_PATH`: empty for no driver, `old`
/// for an older one, `nvrtc` for NVRTC beside it; `KVXFER_NVRTC`: `installed` for its path; with either the cache is a new folder. On a real GPU only scenarios without variables of the stand-in run.
pub(crate) fn run(name: &str, variables: &[(&str, &str)], body: fn()) {
    if std::env::var_os(UNDER).is_some() {
        return body();
    }
    let real = std::env::var_os("KVXFER_TEST_GPU").is_some();
    if real && !variables.is_empty() {
        println!("SKIPPED {name}: it needs the stand-in driver");
        return;
    }
    if !kvxfer_cuda_standin::available() {
        println!("SKIPPED {name}: no C++ compiler, so no stand-in CUDA driver (Debian: g++)");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let report = folder.path().join("report");
    let mut child = Command::new(std::env::current_exe().expect("own path"));
    child.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(UNDER, "1");
    if !real {
        child
            .env("LD_LIBRARY_PATH", kvxfer_cuda_standin::folder())
            .env("KVXSTANDIN_REPORT", &report)
            .env_remove("CUDA_VISIBLE_DEVICES");
    }
    for (key, value) in variables {
        let compiler = matches!(*value, "nvrtc" | "installed").then(nvrtc);
        if compiler == Some(None) {
            println!("SKIPPED {name}: no NVRTC here; scripts/install-nvrtc.sh brings it");
            return;
        }
        if let Some(Some(library)) = &compiler {
            child.env("XDG_CACHE_HOME", folder.path());
            if *key == "LD_LIBRARY_PATH" {
                let folders = [kvxfer_cuda_standin::folder(), library.parent().expect("a folder").to_owned()];
                child.env(key, std::env::join_paths(folders).expect("two folders"));
            } else {
                child.env(key, library);
            }
            continue;
        }
        match (*key, *value) {
            ("LD_LIBRARY_PATH", "old") => child.env(key, kvxfer_cuda_standin::folder_of_an_older_one()),
            _ => child.env(key, value),
        };
    }
    let output = child.output().expect("start a child");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}:\n{said}");
    println!("{said}");
    if !real && !said.contains("LEAKS ON PURPOSE") {
        // Every process that loaded it wrote a line, also the peers; killed ones did not.
        for line in std::fs::read_to_string(&report).unwrap_or_default().lines() {
            assert!(line.contains("\"live\":{}"), "{name} left things behind: {line}");
        }
    }
}
