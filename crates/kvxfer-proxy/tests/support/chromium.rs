//! A headless Chromium, where one is installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long one page may take; a bound for safety, far above what is needed.
const PATIENCE: Duration = Duration::from_secs(90);

/// The browser's path, or `None` after saying loudly that the test is skipped.
pub(crate) fn find(test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
    let found =
        std::env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name))).find(|p| p.is_file());
    if found.is_none() {
        eprintln!("SKIPPED {test}: no Chromium in PATH (on Debian: apt-get install chromium)");
    }
    found
}

/// Opens a page, lets its clock run for `virtual_ms` and gives the document as it then is, or whatever else the
/// arguments ask for.
pub(crate) fn run(browser: &Path, url: &str, virtual_ms: u32, arguments: &[&str]) -> String {
    let profile = tempfile::tempdir().expect("a folder for the profile");
    let out = profile.path().join("out");
    let file = std::fs::File::create(&out).expect("a file for the document");
    let mut child = Command::new(browser)
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ])
        .args(["--no-first-run", "--disable-background-networking", "--disable-extensions", "--disable-sync"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--virtual-time-budget={virtual_ms}"))
        .args(arguments)
        .arg(url)
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(Stdio::null())
        .spawn()
        .expect("Chromium starts");
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("its state is known") {
            break status;
        }
        if Instant::now() > until {
            child.kill().expect("it can be stopped");
            child.wait().expect("it has ended");
            panic!("Chromium did not finish {url} within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(status.success(), "Chromium ended with {status} at {url}");
    std::fs::read_to_string(&out).expect("text")
}
