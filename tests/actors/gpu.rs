//! Where tests of device memory run: under the stand-in driver in a process of its own, or on the GPU of this machine.

use std::process::Command;

/// Set in a process that has a driver, the real one or the stand-in: which sides have device memory.
const UNDER: &str = "KVXFER_TEST_UNDER_CUDA";

/// Whether `side` has device memory in this process.
pub(super) fn wanted(side: &str) -> bool {
    std::env::var(UNDER).is_ok_and(|sides| sides == side || sides == "both")
}

/// Runs the test of that name in a process with a driver, unless this one is it already. True when it has been dealt with.
///
/// `KVXFER_TEST_GPU=1` takes the machine's own driver and GPU.
pub(super) fn elsewhere(test: &str, sides: &str) -> bool {
    if std::env::var_os(UNDER).is_some() {
        return false;
    }
    let real = std::env::var_os("KVXFER_TEST_GPU").is_some();
    if !real && !kvxfer_cuda_standin::available() {
        println!("SKIPPED {test}: no C++ compiler, so no stand-in CUDA driver (Debian: g++)");
        return true;
    }
    let mut child = Command::new(std::env::current_exe().expect("own path"));
    child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(UNDER, sides);
    if !real {
        // UCX's CUDA modules know nothing of the stand-in's memory.
        child.env("LD_LIBRARY_PATH", kvxfer_cuda_standin::folder()).env("UCX_TLS", "^cuda");
    }
    let status = child.status().expect("start a child");
    assert!(
        status.success(),
        "{test} failed under {}",
        if real { "the driver" } else { "the stand-in driver" }
    );
    true
}
