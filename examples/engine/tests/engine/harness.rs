//! Starts instances, talks HTTP to them, listens to their notifications.

use kvxfer_proto::notify::{self, Notification};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zeromq::{PullSocket, Socket, SocketRecv};

/// The longest anything here may take; nothing is judged by it but a hang.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// A model that answers at once.
pub(crate) const TINY: &[&str] = &[
    "--hidden",
    "64",
    "--layers",
    "2",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--intermediate",
    "96",
    "--chunk",
    "32",
    "--threads",
    "1",
];
pub(crate) const CHUNK: usize = 32;

/// A running engine; killed when dropped.
pub(crate) struct Instance {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    pub(crate) port: u16,
    /// Where a decoder receives caches.
    pub(crate) kv_port: u16,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Instance {
    /// Starts the tiny random model and waits until it serves.
    pub(crate) fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_model(&[TINY, args].concat(), env)
    }

    pub(crate) fn start_model(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvxfer-engine"))
            .args(["--port", "0"])
            .args(args)
            .envs(env.iter().copied())
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::<Mutex<Vec<String>>>::default();
        let (lines, ours) = (BufReader::new(child.stderr.take().unwrap()).lines(), log.clone());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                ours.lock().unwrap().push(line);
            }
        });
        let mut instance = Self { child, log, port: 0, kv_port: 0 };
        wait_for(|| {
            let ended = instance.child.try_wait().unwrap().is_some();
            (ended || instance.find_log("serving on http://").is_some()).then_some(())
        });
        let line = instance
            .find_log("serving on http://")
            .unwrap_or_else(|| panic!("no start: {:#?}", instance.log()));
        instance.port = port_after(&line, "serving on http://");
        if let Some(line) = instance.log().iter().find(|l| l.contains("ready to receive caches")) {
            instance.kv_port = port_after(line, "tcp://");
        }
        instance
    }

    /// The log so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn find_log(&self, text: &str) -> Option<String> {
        self.log().into_iter().find(|l| l.contains(text))
    }

    /// Waits for a line that contains `text`.
    pub(crate) fn wait_log(&self, text: &str) -> String {
        let found = wait_for(|| self.find_log(text));
        found.unwrap_or_else(|| panic!("no {text:?} in the log:\n{}", self.log().join("\n")))
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        exchange(self.port, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> Reply {
        exchange(self.port, &request(path, body))
    }

    /// Posts and expects success.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        let reply = self.post_text(path, &body.to_string());
        assert_eq!(reply.status, 200, "{body} -> {}", reply.body);
        serde_json::from_str(&reply.body).unwrap()
    }

    /// Posts and expects an error, whose text it returns.
    pub(crate) fn refuse(&self, path: &str, body: &str) -> (u16, String) {
        let reply = self.post_text(path, body);
        let value: Value =
            serde_json::from_str(&reply.body).unwrap_or_else(|_| panic!("no error body: {reply:?}"));
        assert_eq!(value["error"]["code"], reply.status, "{value}");
        assert!(value["error"]["type"].is_string(), "{value}");
        (reply.status, value["error"]["message"].as_str().unwrap().to_owned())
    }

    /// Events of a stream; the last one must be `[DONE]`.
    pub(crate) fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let reply = self.post_text(path, &body.to_string());
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
        let mut events: Vec<_> =
            reply.body.split("\n\n").map(|e| e.strip_prefix("data: ").unwrap_or(e)).collect();
        assert_eq!(events.pop(), Some(""), "{}", reply.body);
        assert_eq!(events.pop(), Some("[DONE]"), "{}", reply.body);
        events.into_iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    /// The value of one of the engine's metrics.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|l| l.strip_prefix(&format!("kvxfer_engine_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    pub(crate) fn wait_metric(&self, name: &str, wanted: impl Fn(u64) -> bool) {
        let ok = wait_for(|| Some(()).filter(|()| wanted(self.metric(name))));
        assert!(ok.is_some(), "{name} is {}", self.metric(name));
    }

    /// Token ids of a completion.
    pub(crate) fn tokens(&self, prompt: &[u32], max_tokens: usize, more: &Value) -> Vec<u32> {
        let answer = self.post("/v1/completions", &completion(prompt, max_tokens, more));
        ids(&answer["choices"][0]["token_ids"])
    }

    /// Has a prompt computed for a decoder; returns the first token.
    pub(crate) fn prefill(&self, prompt: &[u32], request: &str, kv_port: u16, more: &Value) -> u32 {
        let mut body = completion(prompt, 1, more);
        body["kv_transfer_params"] = spec(request, kv_port);
        let answer = self.post("/v1/completions", &body);
        answer["kv_transfer_params"]["first_tok"].as_u64().unwrap() as u32
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn spec(request: &str, kv_port: u16) -> Value {
    json!({"ret_first_tok": true, "disagg_spec": {
        "req_id": request, "receiver_host": "127.0.0.1",
        "receiver_init_port": [kv_port], "receiver_alloc_port": [kv_port],
    }})
}

pub(crate) fn completion(prompt: &[u32], max_tokens: usize, more: &Value) -> Value {
    let mut body =
        json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": true});
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

/// A prompt of bytes that no other seed shares a prefix with.
pub(crate) fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * i * 31 + i * 7 + seed * 101 + seed * seed * (i + 1)) % 256) as u32).collect()
}

/// Asks until there is something or [`LONG`] has passed.
pub(crate) fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(found) = ask() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A proxy's PULL socket.
pub(crate) struct Pull {
    pub(crate) port: u16,
    messages: mpsc::Receiver<Vec<u8>>,
}

impl Pull {
    pub(crate) fn bind() -> Self {
        let (port, bound) = mpsc::channel();
        let (out, messages) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut socket = PullSocket::new();
                let endpoint = socket.bind("tcp://127.0.0.1:0").await.unwrap();
                port.send(port_after(&endpoint.to_string(), "tcp://")).unwrap();
                while let Ok(message) = socket.recv().await {
                    if out.send(message.get(0).unwrap().to_vec()).is_err() {
                        return;
                    }
                }
            });
        });
        Self { port: bound.recv_timeout(LONG).unwrap(), messages }
    }

    pub(crate) fn raw(&self) -> Vec<u8> {
        self.messages.recv_timeout(LONG).expect("a notification")
    }

    pub(crate) fn next(&self) -> Notification {
        notify::decode(&self.raw()).unwrap()
    }

    /// The next one must say that `request` is ready.
    pub(crate) fn ready(&self, request: &str) -> u64 {
        match self.next() {
            Notification::KvReady { req_id, bytes, tp_rank: 0, .. } if req_id == request => bytes,
            other => panic!("{other:?} instead of KvReady of {request}"),
        }
    }

    /// The next one must say that `request` failed; returns the code and whether to try again.
    pub(crate) fn failed(&self, request: &str) -> (String, bool) {
        match self.next() {
            Notification::KvFailed { req_id, code, retryable, .. } if req_id == request => (code, retryable),
            other => panic!("{other:?} instead of KvFailed of {request}"),
        }
    }
}

pub(crate) fn request(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends a request and reads the answer to its end.
fn exchange(port: u16, request: &str) -> Reply {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    let body = if head.contains("transfer-encoding: chunked") { dechunk(body) } else { body.to_owned() };
    Reply { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body }
}

fn dechunk(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
}

fn port_after(text: &str, prefix: &str) -> u16 {
    let rest = &text[text.find(prefix).unwrap() + prefix.len()..];
    let digits: String =
        rest.chars().skip_while(|c| *c != ':').skip(1).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no port in {text:?}"))
}
