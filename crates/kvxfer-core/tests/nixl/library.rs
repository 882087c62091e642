//! Libraries that are missing, wrong, or lack something: an error that says so, and the process lives.

use crate::support::{isolated, with_nixl};
use kvxfer_core::ErrorCode;
use kvxfer_core::config::{AgentConfig, NixlConfig};
use kvxfer_core::transport::nixl::{Bare, NixlTransport, find, probe};
use kvxfer_core::{AgentName, Epoch};
use std::path::{Path, PathBuf};
use std::process::Command;

fn refused(config: &NixlConfig) -> String {
    let error = find::load(config).expect_err("refused");
    assert_eq!(error.code(), ErrorCode::NotAvailable, "{error}");
    let text = error.to_string();
    assert!(text.contains("NIXL not available") && text.contains("remedy"), "{text}");
    text
}

fn configured(path: &Path) -> NixlConfig {
    NixlConfig { library: Some(path.to_owned()), ..NixlConfig::default() }
}

/// A shared library from a line of C.
fn compile(dir: &Path, source: &str, soname: &str) -> PathBuf {
    let (c, so) = (dir.join("x.c"), dir.join("libnixl_capi.so"));
    std::fs::write(&c, source).expect("written");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&so)
        .arg(&c)
        .arg(format!("-Wl,-soname,{soname}"))
        .status()
        .expect("a C compiler");
    assert!(status.success());
    so
}

/// Every function the library must have, as C definitions, without those in `but`.
fn functions(but: &[&str]) -> String {
    let mut source = String::new();
    for name in find::required_functions().filter(|f| !but.contains(f)) {
        source.extend(["int ", name, "(void) { return -2; }\n"]);
    }
    source
}

#[test]
fn absent() {
    isolated("library::absent", || {
        let empty = tempfile::tempdir().expect("temporary folder");
        // SAFETY: this process has one test thread, which is the only one that reads or writes the environment.
        unsafe {
            for name in ["VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "PATH"] {
                std::env::remove_var(name);
            }
            for name in ["HOME", "XDG_CACHE_HOME", "NIXL_PREFIX"] {
                std::env::set_var(name, empty.path());
            }
        }
        let text = refused(&NixlConfig::default());
        assert!(text.contains("searched"), "{text}");
        assert!(text.contains(&empty.path().display().to_string()), "{text}");
        let mut config = AgentConfig::default();
        let name = AgentName::new("a").expect("a name");
        for asked_for in [false, true] {
            config.nixl.same_host = asked_for;
            let error = NixlTransport::new(&name, Epoch(1), &config).err().expect("refused");
            assert_eq!(error.code(), ErrorCode::NotAvailable);
        }
        assert_eq!(Bare::new("a", &config.nixl).err().map(|e| e.code()), Some(ErrorCode::NotAvailable));
        assert_eq!(probe(&config.nixl).err().map(|e| e.code()), Some(ErrorCode::NotAvailable));
    });
}

#[test]
fn configured_file_is_missing_or_no_library() {
    isolated("library::configured_file_is_missing_or_no_library", || {
        let dir = tempfile::tempdir().expect("temporary folder");
        let missing = dir.path().join("gone.so");
        let text = refused(&configured(&missing));
        assert!(text.contains("gone.so") && text.contains("no such file"), "{text}");
        let wrong = dir.path().join("libnixl_capi.so");
        std::fs::write(&wrong, b"not a library").expect("written");
        let text = refused(&configured(&wrong));
        assert!(text.contains(&wrong.display().to_string()), "{text}");
    });
}

#[test]
fn another_library() {
    isolated("library::another_library", || {
        let dir = tempfile::tempdir().expect("temporary folder");
        let so = compile(dir.path(), "int answer(void) { return 42; }", "libnixl_capi.so");
        assert!(refused(&configured(&so)).contains("not NIXL's C library"));
    });
}

#[test]
fn lacking_a_symbol() {
    isolated("library::lacking_a_symbol", || {
        let dir = tempfile::tempdir().expect("temporary folder");
        let so = compile(dir.path(), &functions(&["nixl_capi_post_xfer_req"]), "libnixl_capi.so");
        let text = refused(&configured(&so));
        assert!(text.contains("lacks the function nixl_capi_post_xfer_req"), "{text}");
    });
}

#[test]
fn wrong_soname() {
    isolated("library::wrong_soname", || {
        let dir = tempfile::tempdir().expect("temporary folder");
        let so = compile(dir.path(), &functions(&[]), "libother.so");
        assert!(refused(&configured(&so)).contains("DT_SONAME"));
    });
}

#[test]
fn every_function_there_but_none_works() {
    isolated("library::every_function_there_but_none_works", || {
        let dir = tempfile::tempdir().expect("temporary folder");
        let so = compile(dir.path(), &functions(&[]), "libnixl_capi.so");
        let loaded = find::load(&configured(&so)).expect("every function is there");
        assert_eq!(loaded.path, so.canonicalize().expect("exists"));
        // The calls of nixl-sys go to that very file, and its answers become errors.
        let error = Bare::new("a", &configured(&so)).err().expect("it answers with an error");
        assert_eq!(error.code(), ErrorCode::Transport, "{error}");
        // A process has one NIXL.
        let other = find::load(&configured(Path::new("/elsewhere/libnixl_capi.so"))).expect_err("refused");
        assert!(other.to_string().contains("/elsewhere/"), "{other}");
    });
}

#[test]
fn the_real_one() {
    with_nixl("library::the_real_one", || {
        let library = find::load(&NixlConfig::default()).expect("found");
        let mapped = std::fs::read_to_string("/proc/self/maps").expect("readable");
        let copies: std::collections::BTreeSet<&str> = mapped
            .lines()
            .filter_map(|l| l.find('/').map(|at| &l[at..]))
            .filter(|p| p.ends_with("/libnixl_capi.so"))
            .collect();
        assert_eq!(copies.len(), 1, "{copies:?}");
        assert!(!nixl_is_missing_for_nixl_sys(), "nixl-sys does not see {}", library.path.display());
        let report = probe(&NixlConfig::default()).expect("usable");
        assert_eq!(report.library, library.path);
        assert_eq!(report.backends[0].name, "UCX");
        assert_eq!(report.backends[0].problem, None);
        assert!(report.backends[0].memory.contains(&"dram".to_owned()), "{report:?}");
        let nonsense = NixlConfig { backends: vec!["NOSUCH".into()], ..NixlConfig::default() };
        let problem = probe(&nonsense).expect("the library is fine").backends[0].problem.clone();
        assert!(problem.is_some_and(|p| p.contains("NOSUCH") && p.contains("UCX")));
        let json = serde_json::to_string(&report).expect("a report is data");
        assert_eq!(
            serde_json::from_str::<kvxfer_core::transport::nixl::Probe>(&json).expect("reads back"),
            report
        );
    });
}

/// What nixl-sys itself says.
fn nixl_is_missing_for_nixl_sys() -> bool {
    nixl_sys::is_stub()
}
