//! `kvxfer proxy` as a process: its flags, its log, its signals, its exit codes.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// An engine that says the same to everybody. Returns its port; it ends with the test's process.
fn canned_engine() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || while answer_one(&stream).is_some() {});
        }
    });
    port
}

fn answer_one(stream: &TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let answer = match path.as_str() {
        "/tokenize" => json!({"tokens": [1, 2, 3, 4], "max_model_len": 4096}),
        "/v1/completions" => json!({
            "id": "x", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": "hello", "finish_reason": "length"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
        }),
        _ => json!({}),
    };
    let answer = answer.to_string();
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
        answer.len()
    )
    .ok()
}

struct Proxy {
    child: Child,
    port: u16,
    log: Arc<Mutex<String>>,
    out: Arc<Mutex<String>>,
}

impl Proxy {
    fn start(args: &[String]) -> Self {
        let mut child =
            command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let (log, out) =
            (collect(child.stderr.take().expect("piped")), collect(child.stdout.take().expect("piped")));
        let mut proxy = Self { child, port: 0, log, out };
        let line = proxy.wait_log("clients: http on 127.0.0.1:");
        let digits: String = line.chars().take_while(char::is_ascii_digit).collect();
        proxy.port = digits.parse().expect("a port");
        proxy
    }

    /// What follows `text` in the log, as soon as it is there.
    fn wait_log(&self, text: &str) -> String {
        let by = Instant::now() + PATIENCE;
        loop {
            let log = self.log.lock().expect("no panic").clone();
            if let Some(at) = log.find(text)
                && let Some(rest) = log[at + text.len()..].split_once('\n')
            {
                return rest.0.to_owned();
            }
            assert!(Instant::now() < by, "no {text:?} in the log:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it lives");
    }

    fn ended(&mut self) -> ExitStatus {
        let by = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                return status;
            }
            assert!(Instant::now() < by, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("an option");
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
            .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        let status = answer.split(' ').nth(1).expect("a status").parse().expect("a number");
        (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let ours = Arc::clone(&text);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            ours.lock().expect("no panic").push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    text
}

fn command(args: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvxfer"));
    command.arg("proxy").args(args);
    for name in ["KVXFER_LOG", "OPENAI_API_KEY", "KVXFER_PROXY_API_KEY", "KVXFER_PROXY_ADMIN_TOKEN"] {
        command.env_remove(name);
    }
    command
}

fn flags(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn completion() -> String {
    json!({"model": "m", "prompt": "hi", "max_tokens": 4, "temperature": 0}).to_string()
}

#[test]
fn the_guides_flags_serve_and_sigterm_ends_it_in_order_with_statistics() {
    let (prefiller, decoder) = (canned_engine(), canned_engine());
    let mut proxy = Proxy::start(&flags(&format!(
        "--host 127.0.0.1 --port 0 --prefiller-host 127.0.0.1 --prefiller-port {prefiller} --num-prefillers 1 \
         --decoder-host 127.0.0.1 --decoder-port {decoder} --decoder-init-port 7300 --decoder-alloc-port 7400 \
         --proxy-host 127.0.0.1 --proxy-port 0 --num-decoders 1 --kv-timeout 0.1"
    )));
    let (status, body) = proxy.ask("POST", "/v1/completions", &completion());
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(body["choices"][0]["text"], "hello");
    assert!(proxy.wait_log("path=\"/v1/completions\"").contains("status=200"));
    proxy.signal(rustix::process::Signal::TERM);
    assert_eq!(proxy.ended().code(), Some(0), "{}", proxy.log.lock().expect("no panic"));
    let by = Instant::now() + PATIENCE;
    loop {
        let out = proxy.out.lock().expect("no panic").clone();
        if out.contains("99th Percentile (ms): ") {
            assert!(out.contains("===============================\nNum requests: 1\nPrefiller 1 TTFT stats:\n - Average (ms): "), "{out}");
            break;
        }
        assert!(Instant::now() < by, "no statistics: {out}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn sighup_reads_the_file_again_and_a_bad_one_changes_nothing() {
    let (first, second) = (canned_engine(), canned_engine());
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("proxy.yaml");
    let write = |decoder: u16, more: &str| {
        let yaml = format!(
            "host: 127.0.0.1\nport: 0\nproxy_host: 127.0.0.1\nproxy_port: 0\nprefillers: []\n\
             decoders: [{{host: 127.0.0.1, port: {decoder}, init_ports: 7300, alloc_ports: 7400}}]\n{more}"
        );
        std::fs::write(&file, yaml).expect("written");
    };
    write(first, "");
    let mut proxy = Proxy::start(&["--config".to_owned(), file.display().to_string()]);
    let address = |port: u16| format!("\"address\":\"127.0.0.1:{port}\"");
    assert!(proxy.ask("GET", "/stats", "").1.contains(&address(first)));
    write(second, "oops: 1\n");
    proxy.signal(rustix::process::Signal::HUP);
    assert!(proxy.wait_log("the configuration stays as it was").contains("oops"));
    write(second, "");
    proxy.signal(rustix::process::Signal::HUP);
    proxy.wait_log("read the configuration again");
    let stats = proxy.ask("GET", "/stats", "").1;
    assert!(stats.contains(&address(second)) && !stats.contains(&address(first)), "{stats}");
    assert_eq!(proxy.ask("POST", "/v1/completions", &completion()).0, 200);
    proxy.signal(rustix::process::Signal::INT);
    assert_eq!(proxy.ended().code(), Some(0));
}

#[test]
fn wrong_usage_names_the_flag_and_a_port_in_use_the_port() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = taken.local_addr().expect("bound").port();
    for (args, code, says) in [
        (format!("--host 127.0.0.1 --port {port} --proxy-port 0"), 1, format!("127.0.0.1:{port}")),
        ("--prefiller-port 8100,8101 --num-prefillers 3".into(), 2, "--num-prefillers: 3".into()),
        ("--prefiller-port 8100,8101 --prefiller-host a,b,c".into(), 2, "2 ports for 3 hosts".into()),
        (
            "--decoder-port 8200 8201 --decoder-init-port 1 2 3".into(),
            2,
            "--decoder-init-port: [1, 2, 3]".into(),
        ),
        ("--prefiller-port 70000".into(), 2, "70000".into()),
        ("--policy fastest".into(), 2, "round-robin".into()),
        ("--prefiller-host http://a".into(), 2, "without a scheme".into()),
        ("--config /nowhere/proxy.yaml".into(), 2, "/nowhere/proxy.yaml".into()),
        ("--tls-cert a.pem".into(), 2, "--tls-key".into()),
    ] {
        let ended = command(&flags(&args)).output().expect("it runs");
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(code), "{args}: {text}");
        assert!(text.contains(&says), "{args}: {text} should say {says}");
    }
    let checked =
        command(&flags("--prefiller-port 8100 --num-prefillers 2 --decoder-port 8200,8201 --check")).output();
    let text = String::from_utf8(checked.expect("it runs").stdout).expect("text");
    for line in [
        "prefiller2     http://localhost:8101",
        "decoder2       http://localhost:8201",
        "init [8301] alloc [8401]",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    // A prefiller that accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = silent.local_addr().expect("bound").port();
    let mut proxy = Proxy::start(&flags(&format!(
        "--host 127.0.0.1 --port 0 --prefiller-host 127.0.0.1 --prefiller-port {port} --decoder-host 127.0.0.1 \
         --decoder-port {port} --proxy-host 127.0.0.1 --proxy-port 0"
    )));
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port)).expect("connected");
    let body = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 4}).to_string();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let by = Instant::now() + PATIENCE;
    while !proxy.ask("GET", "/stats", "").1.contains("\"prefill\":1") {
        assert!(Instant::now() < by, "it is under way");
    }
    proxy.signal(rustix::process::Signal::TERM);
    proxy.wait_log("ending: no new requests");
    assert!(proxy.child.try_wait().expect("waited").is_none(), "it waits for the request");
    proxy.signal(rustix::process::Signal::TERM);
    assert_eq!(proxy.ended().code(), Some(1));
}
