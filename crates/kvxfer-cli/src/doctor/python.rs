//! The Python that this command was installed with: what kvxfer works with there, beside what it was tested with.

use super::{Check, Standing};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const AREA: &str = "python";
const PATIENCE: Duration = Duration::from_secs(20);

/// What `python -m kvxfer.compat --json` answers.
#[derive(Deserialize)]
struct Report {
    kvxfer: String,
    found: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    name: String,
    installed: Option<String>,
    tested: Vec<String>,
    ok: bool,
}

/// Nothing where the command does not come from a wheel.
pub(super) fn checks() -> Vec<Check> {
    let Some(python) = beside_this_command() else { return Vec::new() };
    match ask(&python) {
        Ok(report) => lines(&report),
        Err(why) => vec![
            Check::new("python", AREA, Standing::Missing, format!("{}: {why}", python.display()))
                .fix("run it with -m kvxfer.compat to see what is wrong; pip install --force-reinstall brings package and command together again"),
        ],
    }
}

/// The interpreter of the environment whose `bin` this command lies in, if the package is in it.
fn beside_this_command() -> Option<PathBuf> {
    let command = std::env::current_exe().ok()?;
    let bin = command.parent()?;
    let python = ["python3", "python"].map(|name| bin.join(name)).into_iter().find(|p| p.is_file())?;
    has_package(bin.parent()?).then_some(python)
}

fn has_package(environment: &Path) -> bool {
    std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten().any(|folder| {
        ["site-packages", "dist-packages"]
            .iter()
            .flat_map(|packages| std::fs::read_dir(folder.path().join(packages)))
            .flatten()
            .flatten()
            .any(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with("kvxfer-") && name.ends_with(".dist-info")
            })
    })
}

fn ask(python: &Path) -> Result<Report, String> {
    // Its exit code says whether all was tested, which the lines say too.
    let mut child = Command::new(python)
        .args(["-m", "kvxfer.compat", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let end = Instant::now() + PATIENCE;
    while child.try_wait().map_err(|e| e.to_string())?.is_none() {
        if Instant::now() > end {
            // Neither can fail in a way that matters: it ends, or it has ended.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("no answer within {} s", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // The answer is a few hundred bytes, which a pipe holds.
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    serde_json::from_slice(&output.stdout).map_err(|_| format!("kvxfer.compat ended with {}", output.status))
}

fn lines(report: &Report) -> Vec<Check> {
    let ours = env!("CARGO_PKG_VERSION");
    let package = if report.kvxfer == ours {
        Check::new("kvxfer-package", AREA, Standing::Ok, format!("kvxfer {ours}"))
    } else {
        let found = format!("kvxfer {}, but this command is {ours}", report.kvxfer);
        Check::new("kvxfer-package", AREA, Standing::Degraded, found)
            .fix("install one version again: pip install --force-reinstall")
    };
    let products = report.found.iter().map(|f| {
        let id = f.name.to_lowercase();
        let tested = f.tested.join(", ");
        match &f.installed {
            None => {
                Check::new(id, AREA, Standing::Info, format!("no {} (tested: {tested})", f.name))
            }
            Some(version) if f.ok => Check::new(id, AREA, Standing::Ok, format!("{} {version}", f.name)),
            Some(version) => Check::new(
                id,
                AREA,
                Standing::Degraded,
                format!("{} {version}, which was not tested (tested: {tested})", f.name),
            )
            .fix("it is used as it is, what does not fit is refused; install a tested version, or see docs/compatibility.md"),
        }
    });
    std::iter::once(package).chain(products).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(installed: &str, ok: bool) -> Vec<(String, Standing)> {
        let version = env!("CARGO_PKG_VERSION");
        let text = format!(
            r#"{{"kvxfer": "{version}", "found": [{{"name": "LMCache", "installed": {installed}, "tested": ["0.5.6"], "ok": {ok}}}]}}"#
        );
        let report: Report = serde_json::from_str(&text).expect("report");
        lines(&report).into_iter().map(|c| (c.id, c.verdict)).collect()
    }

    #[test]
    fn tested_untested_and_absent_versions_are_told_apart() {
        let package = ("kvxfer-package".to_owned(), Standing::Ok);
        for (installed, ok, verdict) in [
            (r#""0.5.6""#, true, Standing::Ok),
            (r#""0.9.0""#, false, Standing::Degraded),
            ("null", true, Standing::Info),
        ] {
            assert_eq!(standing(installed, ok), [package.clone(), ("lmcache".to_owned(), verdict)]);
        }
    }

    #[test]
    fn a_package_of_another_version_is_seen() {
        let report = Report { kvxfer: "0.0.0".into(), found: Vec::new() };
        let [line] = &lines(&report)[..] else { panic!("one line") };
        assert_eq!(line.verdict, Standing::Degraded);
        assert!(line.found.contains("0.0.0") && line.found.contains(env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn the_package_is_found_by_its_metadata() {
        let environment = tempfile::tempdir().expect("folder");
        assert!(!has_package(environment.path()));
        let packages = environment.path().join("lib/python3.11/site-packages");
        std::fs::create_dir_all(packages.join("kvxfer")).expect("folder");
        assert!(!has_package(environment.path()), "a folder of that name alone is none");
        std::fs::create_dir_all(packages.join("kvxfer-0.1.0.dist-info")).expect("folder");
        assert!(has_package(environment.path()));
    }
}
