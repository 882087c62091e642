//! Runs a scenario in a process with the driver it needs, and looks at what that leaves behind.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::process::Command;

/// Set in a process that has a driver.
pub(crate) const UNDER: &str = "KVXFER_TEST_UNDER_CUDA";

/// Runs `body` in a process of its own, under the stand-in driver with these variables. `LD_LIBRARY_PATH`: empty for no driver, `old`
/// for an older one. On a real GPU only scenarios without variables of the stand-in run.
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

/// How often the stand-in driver was called by that name.
pub(crate) fn standin_calls(name: &str) -> i64 {
    let name = std::ffi::CString::new(name).expect("a name");
    // SAFETY: the stand-in is loaded already, by that name; its function takes and gives what is written here.
    unsafe {
        let driver = libloading::Library::new("libcuda.so.1").expect("the stand-in");
        driver
            .get::<unsafe extern "C" fn(*const std::ffi::c_char) -> i64>(b"kvxstandin_calls")
            .expect("the stand-in's function")(name.as_ptr())
    }
}

/// The next call of that name fails with `CUDA_ERROR_UNKNOWN`.
pub(crate) fn standin_fails_next(call: &str) {
    let plan = std::ffi::CString::new(format!("{call}:{}:999", standin_calls(call) + 1)).expect("a plan");
    // SAFETY: as above.
    unsafe {
        let driver = libloading::Library::new("libcuda.so.1").expect("the stand-in");
        driver
            .get::<unsafe extern "C" fn(*const std::ffi::c_char)>(b"kvxstandin_fail")
            .expect("the stand-in's function")(plan.as_ptr());
    }
}
