//! Compiles C and C++ programs against the library of this build and runs them under a deadline.

use super::header::ROOT;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// No program of these tests needs longer, also under Valgrind on a busy machine.
const DEADLINE: Duration = Duration::from_secs(150);

/// How a program is built and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As it is.
    Plain,
    /// With `AddressSanitizer` and the leak checker compiled in.
    Asan,
    /// Under Valgrind's memcheck with its leak checker.
    Valgrind,
}

/// Where `cargo test` leaves the shared library: beside the test binaries.
pub(crate) fn library_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("path of the test");
    let dir = exe.parent().expect("a folder").to_path_buf();
    assert!(dir.join("libkvxfer.so").is_file(), "no libkvxfer.so in {}", dir.display());
    dir
}

/// True when the tool is there. Says so loudly when not, and fails where CI promised to have it.
pub(crate) fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        let text = format!("SKIPPED: {tool} is not installed (scripts/setup.sh test installs it)");
        assert!(std::env::var_os("CI").is_none(), "{text}");
        eprintln!("{text}");
    }
    found
}

/// Folder for what one test builds, removed when dropped.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("kvxfer-test-").tempdir().expect("temporary folder")
}

/// Compiles `source` to `out/NAME`; warnings are errors.
pub(crate) fn compile(source: &Path, out: &Path, mode: Mode) -> PathBuf {
    let cpp = source.extension().is_some_and(|e| e == "cpp");
    let name = format!("{}-{mode:?}", source.file_stem().unwrap_or_default().to_string_lossy());
    let binary = out.join(name);
    let mut command = Command::new(if cpp { "c++" } else { "cc" });
    command.arg(if cpp { "-std=c++17" } else { "-std=c11" });
    command.args(["-g", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-D_GNU_SOURCE"]);
    command.arg(format!("-I{ROOT}/include")).arg(format!("-I{ROOT}/tests/c"));
    if mode == Mode::Asan {
        command.args(["-fsanitize=address", "-fno-omit-frame-pointer"]);
    }
    command.arg(source).arg("-o").arg(&binary);
    command.arg("-L").arg(library_dir()).args(["-lkvxfer", "-lpthread"]);
    succeed(&mut command);
    if mode == Mode::Asan {
        let symbols = Command::new("nm").arg(&binary).output().expect("nm").stdout;
        assert!(
            String::from_utf8_lossy(&symbols).contains("__asan_report_load"),
            "no AddressSanitizer in {}",
            binary.display()
        );
    }
    binary
}

/// The command that runs `binary` in `mode`.
pub(crate) fn command(binary: &Path, mode: Mode) -> Command {
    let mut command = if mode == Mode::Valgrind {
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--quiet", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=definite"]);
        valgrind.args(["--errors-for-leak-kinds=definite", "--num-callers=30", "--fair-sched=yes"]);
        valgrind.arg(format!("--suppressions={ROOT}/tests/c/valgrind.supp"));
        valgrind.arg(binary);
        valgrind
    } else {
        Command::new(binary)
    };
    command.env("LD_LIBRARY_PATH", library_dir()).env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0");
    command.env("LSAN_OPTIONS", "report_objects=0").env_remove("KVXFER_LOG");
    command
}

/// Compiles and runs one of `tests/c`; it ends with status 0 and `OK`.
pub(crate) fn run(program: &str, mode: Mode) {
    run_source(&Path::new(ROOT).join(format!("tests/c/{program}.c")), mode);
}

/// Same for any source.
pub(crate) fn run_source(source: &Path, mode: Mode) {
    if !have("cc") || (mode == Mode::Valgrind && !have("valgrind")) {
        return;
    }
    let out = scratch();
    let binary = compile(source, out.path(), mode);
    let text = succeed(&mut command(&binary, mode));
    assert!(text.lines().any(|line| line == "OK"), "{} did not say OK:\n{text}", source.display());
}

/// Runs a command to its end; panics with all it said when it fails or does not end.
pub(crate) fn succeed(command: &mut Command) -> String {
    let dir = scratch();
    let (out, err) = (dir.path().join("out"), dir.path().join("err"));
    command.stdin(Stdio::null());
    command.stdout(File::create(&out).expect("file")).stderr(File::create(&err).expect("file"));
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let status = wait(&mut child);
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let (out, err) = (read(out), read(err));
    assert!(
        status == Some(0),
        "{command:?}\nended with {status:?} (None: killed after {DEADLINE:?})\n{out}\n{err}"
    );
    out
}

/// Waits for the end; kills at the deadline.
fn wait(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return status.code().or(Some(-1));
        }
        if start.elapsed() > DEADLINE {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program as two processes: the first prints `ADDRESS ...`, the second gets it as its last argument. Both must end well
/// and say `OK ...`.
pub(crate) fn run_pair(mut first: Command, mut second: Command) {
    let mut one = first
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|e| panic!("{first:?}: {e}"));
    let mut lines = BufReader::new(one.stdout.take().expect("stdout"));
    let mut line = String::new();
    let address = loop {
        line.clear();
        let read = lines.read_line(&mut line).expect("stdout");
        if read == 0 {
            let status = wait(&mut one);
            panic!("{first:?} ended with {status:?} before it told its address");
        }
        if let Some(address) = line.trim().strip_prefix("ADDRESS ") {
            break address.to_owned();
        }
    };
    let rest = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = lines.read_to_string(&mut text);
        text
    });
    second.arg(address);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| succeed(&mut second)));
    if result.is_err() {
        let _ = one.kill();
    }
    let status = wait(&mut one);
    let first_text = rest.join().expect("reader");
    let second_text = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert_eq!(status, Some(0), "{first:?}\n{first_text}");
    assert!(first_text.lines().any(|l| l.starts_with("OK")), "{first:?} did not say OK:\n{first_text}");
    assert!(second_text.lines().any(|l| l.starts_with("OK")), "{second:?} did not say OK:\n{second_text}");
}
