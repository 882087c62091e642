//! The real `kvxfer` binary: its help, its errors, its JSON, and that nothing of it is left behind.

use serde_json::Value;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Upper bound of any command here; a hang ends as a failure instead of hanging the suite.
const DEADLINE: Duration = Duration::from_secs(90);

fn kvxfer(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvxfer"));
    command.args(args).stdin(Stdio::null());
    // Settings of whoever runs the tests are not part of them.
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("KVXFER_") && !name.contains("NIXL"))
    {
        command.env_remove(name);
    }
    command
}

/// Runs to the end, or kills it.
fn run(args: &[&str]) -> Output {
    finish(kvxfer(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start"))
}

fn finish(mut child: Child) -> Output {
    fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut bytes).expect("read");
            }
            bytes
        })
    }
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let deadline = Instant::now() + DEADLINE;
    let status = loop {
        match child.try_wait().expect("wait") {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().expect("kill");
                child.wait().expect("wait");
                panic!("the command did not end within {DEADLINE:?}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Output { status, stdout: out.join().expect("stdout"), stderr: err.join().expect("stderr") }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("no JSON ({e}): {}\nstderr: {}", text(&output.stdout), text(&output.stderr))
    })
}

#[test]
fn help_teaches_and_hides_what_is_internal() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let all = text(&help.stdout);
    for word in ["demo", "bench", "doctor", "config", "Examples:", "Exit codes:", "KVXFER_LOG"] {
        assert!(all.contains(word), "{word:?} is not in the help:\n{all}");
    }
    assert!(!all.contains("internal"), "{all}");
    assert!(!all.contains('\x1b'), "no colour outside a terminal");
    for (command, words) in [
        ("demo", &["--tokens", "--chunk", "--transport", "--no-kill", "--json", "128 KiB", "5271"][..]),
        (
            "bench",
            &["--quick", "--json", "--html", "--server", "--client", "--integrity", "process_vm_writev"],
        ),
        ("doctor", &["--peer", "--require", "--secs", "degraded"]),
    ] {
        let help = run(&[command, "--help"]);
        assert!(help.status.success());
        for word in words {
            assert!(text(&help.stdout).contains(word), "{word:?} is not in the help of {command}");
        }
    }
    let version = run(&["--version"]);
    assert_eq!(text(&version.stdout).trim(), concat!("kvxfer ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn bad_arguments_are_named_with_the_remedy() {
    for (args, code, words) in [
        (&["demo", "--tokens", "0"][..], 2, &["0", "--tokens", "1..=65536"][..]),
        (&["demo", "--transport", "warp"], 2, &["warp", "shm, cma"]),
        (&["bench", "--piece", "12Q"], 2, &["12Q", "K, M, G"]),
        (&["bench", "--piece", "1"], 2, &["--piece", "1 B", "64 B"]),
        (&["bench", "--bytes", "900000G"], 2, &["--bytes"]),
        (
            &["bench", "--json", "/nonexistent-folder/x.json"],
            2,
            &["/nonexistent-folder/x.json", "cannot be written"],
        ),
        (&["bench", "--only", "everything"], 2, &["everything", "throughput"]),
        (&["bench", "--server", "tcp://127.0.0.1:1", "--client", "tcp://127.0.0.1:1"], 2, &["--client"]),
        (&["doctor", "--secs", "-1"], 2, &["-1"]),
        (&["frobnicate"], 2, &["frobnicate"]),
        (&["internal-child", "demo-sender"], 1, &[][..]),
        (&["config", "check", "/nonexistent.yaml"], 2, &["/nonexistent.yaml"]),
    ] {
        let out = run(args);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
        for word in words {
            assert!(err.contains(word), "{args:?} does not mention {word:?}: {err}");
        }
        assert!(!err.contains("panicked"), "{args:?}: {err}");
    }
}

#[test]
fn an_unreachable_server_is_an_error_with_its_address() {
    // Bound and let go: nobody listens there now.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port();
    let address = format!("tcp://127.0.0.1:{port}");
    let out = run(&["bench", "--quick", "--client", &address]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains(&port.to_string()), "{}", text(&out.stderr));
    let out = run(&["doctor", "--secs", "0", "--json", "--peer", &address, "--require", "peer"]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    let report = json(&out);
    let peer = check(&report, "peer");
    assert_eq!(peer["verdict"], "missing");
    assert!(peer["found"].as_str().is_some_and(|f| f.contains(&port.to_string())), "{peer}");
}

#[test]
fn settings_are_checked_and_the_default_ones_pass() {
    let dir = tempfile::tempdir().expect("folder");
    let default = run(&["config", "default"]);
    assert!(default.status.success());
    let file = dir.path().join("default.yaml");
    std::fs::write(&file, &default.stdout).expect("write");
    let out = run(&["config", "check", file.to_str().expect("path")]);
    assert!(out.status.success(), "{}", text(&out.stderr));

    let file = dir.path().join("bad.json");
    std::fs::write(&file, r#"{"transports": {"forbidden": ["shm"]}}"#).expect("write");
    let out = run(&["config", "check", file.to_str().expect("path")]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("forbidden"), "{}", text(&out.stderr));
}

#[test]
fn the_demo_moves_and_checks_every_byte_and_survives_a_kill() {
    let out = run(&["demo", "--tokens", "300", "--chunk", "64", "--json"]);
    let report = json(&out);
    assert_eq!(out.status.code(), Some(0), "{report:#}\n{}", text(&out.stderr));
    assert_eq!(report["held"], true);
    assert_eq!((report["chunks"].as_u64(), report["bytes"].as_u64()), (Some(5), Some(300 * 131_072)));
    let store = &report["store"];
    assert_eq!(
        (store["correct"].as_bool(), store["bytes_verified"].as_u64()),
        (Some(true), Some(300 * 131_072))
    );
    assert!(store["gbps"].as_f64().is_some_and(|g| g > 0.0), "{store}");
    let rows = report["transports"].as_array().expect("transports");
    let row = |name: &str| {
        rows.iter().find(|r| r["transport"] == name).unwrap_or_else(|| panic!("no {name}: {rows:?}"))
    };
    for name in ["shm", "tcp", "inproc"] {
        assert_eq!(row(name)["available"], true, "{}", row(name));
    }
    for row in rows {
        if row["available"] == true {
            assert_eq!(row["bytes_verified"], 300 * 131_072, "{row}");
            assert!(row["path"].as_str().is_some_and(|p| !p.is_empty()), "the path can be seen: {row}");
        } else {
            assert!(row["note"].as_str().is_some_and(|n| !n.is_empty()), "a reason is given: {row}");
        }
    }
    let kill = &report["kill"];
    assert_eq!(kill["held"], true, "{kill:#}");
    assert_eq!(kill["end"]["free"], kill["end"]["pages"]);
    assert_ne!(kill["epochs"][0], kill["epochs"][1]);
}

#[test]
fn the_demo_notices_bytes_that_were_never_moved() {
    // A transport that claims success without moving anything, and no checking below the demo's own.
    let dir = tempfile::tempdir().expect("folder");
    let file = dir.path().join("lies.yaml");
    std::fs::write(&file, "integrity: \"off\"\nfaults:\n  drop_every: 3\n").expect("write");
    let out = finish(
        kvxfer(&["demo", "--tokens", "300", "--chunk", "64", "--transport", "tcp", "--no-kill", "--json"])
            .env("KVXFER_CONFIG", &file)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start"),
    );
    let report = json(&out);
    assert_eq!(out.status.code(), Some(1), "{report:#}");
    assert_eq!((report["held"].as_bool(), report["store"]["correct"].as_bool()), (Some(false), Some(false)));
    assert!(
        report["store"]["note"].as_str().is_some_and(|n| n.contains("differs at byte")),
        "{}",
        report["store"]
    );
}

#[test]
fn the_demo_prints_the_guides_line() {
    let out = run(&["demo", "--tokens", "70", "--chunk", "64", "--transport", "tcp", "--no-kill"]);
    let all = text(&out.stdout);
    assert!(out.status.success(), "{all}\n{}", text(&out.stderr));
    let line =
        all.lines().find(|l| l.starts_with("Store ")).unwrap_or_else(|| panic!("no Store line:\n{all}"));
    for part in ["Store 70 tokens takes: ", " ms, throughput: ", " GB/s; offload_time: ", " ms, put_time: "] {
        assert!(line.contains(part), "{line}");
    }
    assert!(all.contains("9,175,040 of 9,175,040 bytes checked"), "{all}");
    assert!(!all.contains('\x1b'), "no colour outside a terminal");
}

#[test]
fn the_benchmark_writes_the_rows_its_readers_rely_on() {
    let dir = tempfile::tempdir().expect("folder");
    let file = |name: &str| dir.path().join(name).to_str().expect("path").to_owned();
    let (rows_file, page_file) = (file("run.json"), file("run.html"));
    let out = run(&[
        "bench",
        "--quick",
        "--reps",
        "1",
        "--transport",
        "shm,tcp",
        "--piece",
        "64K,1M",
        "--json",
        &rows_file,
        "--html",
        &page_file,
    ]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("memcpy"), "{}", text(&out.stdout));
    let run: Value = serde_json::from_slice(&std::fs::read(&rows_file).expect("file")).expect("JSON");
    for key in ["kvxfer", "machine", "date", "command", "working_set_bytes"] {
        assert!(!run["header"][key].is_null(), "header.{key}");
    }
    let rows = run["rows"].as_array().expect("rows");
    let fields = [
        "case",
        "transport",
        "op",
        "pattern",
        "piece_bytes",
        "total_bytes",
        "gbps",
        "p50_us",
        "p99_us",
        "submit_ns_per_desc",
        "baseline",
        "baseline_gbps",
        "ratio",
    ];
    for row in rows {
        let row = row.as_object().expect("object");
        let mut got: Vec<&str> = row.keys().map(String::as_str).collect();
        let mut want = fields.to_vec();
        got.sort_unstable();
        want.sort_unstable();
        assert_eq!(got, want);
    }
    for (case, baseline) in [
        ("shm.write.64KiB.random.bound", "memcpy"),
        ("shm.read.1MiB.random.bound", "memcpy"),
        ("tcp.write.1MiB.random.full", "sockets"),
        ("tcp.read.64KiB.random.off", "sockets"),
    ] {
        let row = rows.iter().find(|r| r["case"] == case && r["baseline"] == baseline);
        let row = row
            .unwrap_or_else(|| panic!("no {case} beside {baseline}: {:?}\n{:#}", run["notes"], run["rows"]));
        for field in ["gbps", "baseline_gbps", "ratio", "p50_us", "p99_us", "submit_ns_per_desc"] {
            assert!(row[field].as_f64().is_some_and(|v| v > 0.0), "{field} of {row}");
        }
    }
    for case in [
        "latency.shm.poll",
        "latency.shm.block",
        "submit.shm",
        "integrity.shm.full",
        "integrity.tcp.full",
        "idle.connected",
    ] {
        assert!(rows.iter().any(|r| r["case"] == case), "no {case}: {:?}", run["notes"]);
    }
    let bars = run["bars"].as_array().expect("bars");
    assert!(bars.iter().any(|b| b["pass"].is_boolean()), "{bars:?}");
    let page = std::fs::read_to_string(Path::new(&page_file)).expect("page");
    assert!(page.contains("<svg") && page.contains("shm.write.64KiB.random.bound"));
}

#[test]
fn the_doctor_gives_a_verdict_per_line() {
    let out = run(&["doctor", "--json", "--secs", "1", "--require", "tcp,kernel"]);
    let report = json(&out);
    assert_eq!(out.status.code(), Some(0), "{report:#}");
    for id in [
        "kernel",
        "cpu",
        "memlock",
        "fd-limit",
        "huge-pages",
        "memfd",
        "cma-syscall",
        "nixl-library",
        "cuda",
        "shm",
        "tcp",
        "chosen",
    ] {
        let line = check(&report, id);
        assert!(line["found"].as_str().is_some_and(|f| !f.is_empty()), "{line}");
        let verdict = line["verdict"].as_str().expect("verdict");
        assert!(["ok", "degraded", "missing", "info"].contains(&verdict), "{line}");
        if ["degraded", "missing"].contains(&verdict) {
            assert!(line["fix"].as_str().is_some_and(|f| !f.is_empty()), "a remedy is named: {line}");
        }
    }
    assert!(report["rates"].as_array().is_some_and(|r| !r.is_empty()), "{report:#}");
    let unknown = run(&["doctor", "--secs", "0", "--require", "warp-drive"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("warp-drive"));
    // A transport that the settings forbid is not ok when it is required.
    let out = finish(
        kvxfer(&["doctor", "--json", "--secs", "0", "--require", "shm"])
            .env("KVXFER_FORBID", "shm")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start"),
    );
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stdout));
}

#[test]
fn an_interrupt_leaves_no_child() {
    let mut child = kvxfer(&["bench", "--transport", "tcp", "--only", "throughput", "--reps", "1000"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start");
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let deadline = Instant::now() + DEADLINE;
    let inner = loop {
        assert!(child.try_wait().expect("wait").is_none(), "it ended by itself");
        assert!(Instant::now() < deadline, "no child process appeared");
        match std::fs::read_to_string(&children).unwrap_or_default().split_whitespace().next() {
            Some(pid) => break pid.to_owned(),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupt");
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        assert!(Instant::now() < deadline, "the interrupt was ignored");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(2), "{status}");
    // Gone, or a zombie that waits for the reaper of its new parent.
    let alive = || {
        std::fs::read_to_string(format!("/proc/{inner}/stat"))
            .is_ok_and(|s| !s.rsplit(") ").next().unwrap_or("").starts_with('Z'))
    };
    while alive() {
        assert!(Instant::now() < deadline, "process {inner} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("checks");
    checks.iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no check {id}: {checks:?}"))
}

#[test]
fn lmcaches_older_files_are_explained_and_migrated() {
    let guides = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvxfer-lmcache/tests/guides");
    let prefiller = format!("{guides}/xpyd-prefiller.yaml");
    let out = run(&["config", "check", &prefiller]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for word in ["nixl_peer_port", "pd_peer_init_port", "[55555]", "nixl_enable_gc", "works as written"] {
        assert!(text(&out.stdout).contains(word), "{word}: {}", text(&out.stdout));
    }
    let out = run(&["config", "check", "--json", &prefiller]);
    let json: serde_json::Value = serde_json::from_str(text(&out.stdout)).expect("JSON");
    assert_eq!(json["config"]["pd_role"], "sender");

    let folder = tempfile::tempdir().expect("a folder");
    let new = folder.path().join("new.yaml");
    let new = new.to_str().expect("path");
    let out = run(&["config", "check", &prefiller, "--migrate", "--output", new]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out = run(&["config", "check", new]);
    assert!(out.status.success() && !text(&out.stdout).contains("works as written"), "{}", text(&out.stdout));
    let again = run(&["config", "check", &prefiller, "--migrate", "--output", new]);
    assert_eq!(again.status.code(), Some(2), "an existing file stays");

    let bad = folder.path().join("bad.yaml");
    std::fs::write(&bad, "enable_pd: True\nnixl_role: sender\npd_role: receiver\n").expect("written");
    for flags in [&[][..], &["--migrate"]] {
        let out = run(&[&["config", "check", bad.to_str().expect("path")], flags].concat());
        assert_eq!(out.status.code(), Some(1));
        assert!(
            text(&out.stderr).contains("nixl_role") && text(&out.stderr).contains("pd_role"),
            "{}",
            text(&out.stderr)
        );
    }
}
