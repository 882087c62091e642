//! The kernels' sources, compiled for the host under the address and undefined-behaviour sanitizers, against models that share nothing with
//! them: `memcpy` for pieces; for paged caches every layout by the formula of its shape's indices. Damaged tables of blocks and slots
//! too, which the library refuses before a launch, and how evenly a grid's warps and lanes are loaded.

use std::path::Path;
use std::process::{Command, Stdio};

/// Rounds of random cases for each of them.
const ROUNDS: &str = "400";

#[test]
fn the_kernels_do_what_the_models_do() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let there = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !there.is_ok_and(|s| s.success()) {
        println!(
            "SKIPPED: the kernels against their models: no C++ compiler {compiler} (scripts/setup.sh test)"
        );
        return;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["main", "copies", "paged_moves"].map(|f| here.join(format!("tests/kernels/{f}.cpp")));
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("kernels");
    let built = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"])
        // The device's pragmas, and the kernels of the file that a test is not about.
        .args(["-Wno-unknown-pragmas", "-Wno-unused-function"])
        .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
        .arg("-I")
        .arg(here.join("kernels"))
        .args(&sources)
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(built.status.success(), "{compiler}:\n{}", String::from_utf8_lossy(&built.stderr));
    for seed in ["1", "77", "4242"] {
        let ran = Command::new(&program).args([seed, ROUNDS]).output().unwrap();
        assert!(ran.status.success(), "seed {seed}:\n{}", String::from_utf8_lossy(&ran.stderr));
    }
}
