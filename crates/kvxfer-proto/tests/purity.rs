//! The heart stays pure: only these crates, no unsafe code, no clock, thread, socket or randomness of the system.

use std::collections::BTreeSet;
use std::path::Path;

/// Each with the reason why it may be here.
const ALLOWED: [&str; 9] = [
    "hmac",        // proof of the pre-shared key
    "rmp-serde",   // the wire's encoding
    "serde",       // the wire's types
    "serde_bytes", // byte strings on the wire
    "sha2",        // proof of the pre-shared key
    "subtle",      // comparison of proofs in constant time
    "thiserror",   // error types
    "xxhash-rust", // integrity digests
    "proptest",    // tests
];

#[test]
fn only_the_allowed_crates_are_used() {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .expect("the manifest is readable");
    let mut inside = false;
    let mut used = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.contains("dependencies");
            // `[dependencies.name]` would hide a crate from the loop below.
            assert!(!line.contains("dependencies."), "write {line} as an entry of its table");
        } else if inside && let Some((name, _)) = line.split_once(['.', '=', ' ']) {
            used.insert(name.trim().to_owned());
        }
    }
    let allowed: BTreeSet<String> = ALLOWED.map(str::to_owned).into();
    assert_eq!(used, allowed, "dependencies of kvxfer-proto changed");
}

#[test]
fn nothing_of_the_system_is_touched() {
    let mut files = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).expect("readable").map(|e| e.expect("readable").path()));
        } else if path.extension().is_some_and(|e| e == "rs") {
            seen += 1;
            let text = std::fs::read_to_string(&path).expect("readable");
            for forbidden in [
                "std::net",
                "std::thread",
                "std::fs",
                "std::process",
                "std::env",
                "Instant",
                "SystemTime",
                "getrandom",
            ] {
                assert!(!text.contains(forbidden), "{} uses {forbidden}", path.display());
            }
        }
    }
    assert!(seen > 10, "the sources were found");
    let root =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("readable");
    assert!(root.contains("#![forbid(unsafe_code)]"));
}
