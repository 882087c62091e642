//! `include/kvxfer.h` is what cbindgen makes of `ffi/c`, and says something about everything in it.

mod support;

use std::path::Path;
use support::header::{Header, ROOT};

/// The files in the order in which a C reader wants to meet their contents.
const SOURCES: [&str; 24] = [
    "version", "result", "error", "args", "config", "agent", "region", "fence", "peer", "transfer", "notify",
    "events", "metrics", "receiver", "sender", "delivery", "query", "outbox", "memory", "paged", "gather",
    "lmcache", "log", "handle",
];

fn generate() -> String {
    let root = Path::new(ROOT);
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in SOURCES {
        builder = builder.with_src(root.join(format!("ffi/c/{source}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().expect("cbindgen").write(&mut text);
    String::from_utf8(text).expect("UTF-8")
}

#[test]
fn header_is_up_to_date() {
    let path = Path::new(ROOT).join("include/kvxfer.h");
    let fresh = generate();
    if std::env::var_os("KVXFER_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &fresh).expect("write the header");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((i, (ours, theirs))) =
        fresh.lines().zip(kept.lines().chain(std::iter::repeat(""))).enumerate().find(|(_, (a, b))| a != b)
    {
        panic!(
            "include/kvxfer.h differs from ffi/c at line {}:\n  generated: {ours}\n  kept:      {theirs}\nrun `make header` and commit it",
            i + 1
        );
    }
    assert_eq!(fresh, kept, "include/kvxfer.h differs from ffi/c: run `make header` and commit it");
}

#[test]
fn every_source_of_the_interface_is_in_the_header() {
    let here: std::collections::BTreeSet<_> = SOURCES.iter().map(|s| (*s).to_owned()).collect();
    for entry in std::fs::read_dir(Path::new(ROOT).join("ffi/c")).expect("ffi/c") {
        let name = entry.expect("entry").path().file_stem().unwrap().to_string_lossy().into_owned();
        assert!(
            here.contains(&name) || ["mod", "panic"].contains(&name.as_str()),
            "add ffi/c/{name}.rs to SOURCES in tests/header.rs"
        );
    }
}

#[test]
fn every_function_and_type_is_documented_and_prefixed() {
    let header = Header::read();
    assert!(header.functions.len() > 60, "only {} functions parsed", header.functions.len());
    for function in &header.functions {
        assert!(function.name.starts_with("kvxfer_"), "{}", function.name);
        assert!(!function.doc.trim().is_empty(), "{} has no documentation", function.name);
    }
    for name in header.constants.iter().map(|(name, _)| name) {
        assert!(name.starts_with("KVXFER_"), "{name}");
    }
    for handle in &header.handles {
        let free = format!("{}_free", handle.trim_end_matches("_t"));
        assert!(header.functions.iter().any(|f| f.name == free), "{handle} has no {free}");
    }
    assert_eq!(header.handles.len(), 15, "{:?}", header.handles);
}

#[test]
fn results_are_numbered_as_in_the_core() {
    let header = Header::read();
    for &code in kvxfer::ErrorCode::ALL {
        let name = format!("KVXFER_{}", code.as_str().to_uppercase());
        let found = header.constants.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(found.1, u16::from(code).to_string(), "{name}");
    }
}
