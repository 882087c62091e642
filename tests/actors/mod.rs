//! Actors for the tests that need real peers.
//!
//! An [`Actor`] is a sender or a receiver that obeys one-line JSON commands. It runs as a process of its own (this test
//! binary, started again with a role in its environment) so that it can be killed, stopped and restarted; or, for the
//! `inproc` transport, as a thread. Every call has a deadline.

#![allow(dead_code, reason = "each test binary uses its own part of the shared actors")]

mod gpu;
mod receiver;
mod sender;

use kvxfer::Memory;
use kvxfer::memory::HugePages;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const ROLE: &str = "KVXFER_TEST_ROLE";
const MARK: &str = "@@";
/// Longest any single command may take before the test is declared hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The entry of a child process; call it from a `#[test] fn actor_entry()` in every binary that starts actors.
pub(crate) fn actor_entry() {
    let Ok(config) = std::env::var(ROLE) else { return };
    let config: Value = serde_json::from_str(&config).expect("role configuration");
    serve(&config, BufReader::new(std::io::stdin()), std::io::stdout());
    std::process::exit(0);
}

/// A sender or a receiver: answers one command.
type Role = Box<dyn FnMut(&Value) -> Result<Value, kvxfer::Error>>;

fn serve(config: &Value, input: impl BufRead, mut output: impl Write) {
    let mut role: Role = match config["role"].as_str() {
        Some("receiver") => match receiver::ReceiverRole::start(config) {
            Ok(mut role) => Box::new(move |c| role.command(c)),
            Err(e) => return reply(&mut output, &Err(e)),
        },
        Some("sender") => match sender::SenderRole::start(config) {
            Ok(mut role) => Box::new(move |c| role.command(c)),
            Err(e) => return reply(&mut output, &Err(e)),
        },
        other => panic!("unknown role {other:?}"),
    };
    let hello = role(&json!({"do": "hello"}));
    reply(&mut output, &hello);
    for line in input.lines() {
        let Ok(line) = line else { return };
        let command: Value = serde_json::from_str(&line).expect("command");
        if command["do"] == "quit" {
            return reply(&mut output, &Ok(Value::Null));
        }
        let answer = role(&command);
        reply(&mut output, &answer);
    }
}

fn reply(output: &mut impl Write, answer: &Result<Value, kvxfer::Error>) {
    let line = match answer {
        Ok(value) => json!({"ok": value}),
        Err(e) => json!({"code": e.code().as_str(), "retryable": e.is_retryable(), "text": e.to_string()}),
    };
    // The reader may be gone already; then nobody needs the answer.
    let _ = writeln!(output, "{MARK}{line}").and_then(|()| output.flush());
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: String,
    pub(crate) retryable: bool,
    pub(crate) text: String,
}

enum Body {
    Process(Child),
    Thread(Option<std::thread::JoinHandle<()>>),
}

/// A running sender or receiver.
pub(crate) struct Actor {
    body: Body,
    input: Option<Box<dyn Write + Send>>,
    answers: mpsc::Receiver<Value>,
    /// What it said when it had started, e.g. its address.
    pub(crate) hello: Value,
}

impl Actor {
    /// Starts one as a process (or as a thread when `config.transport` is `inproc`); panics when it cannot start.
    pub(crate) fn start(config: &Value) -> Self {
        Self::try_start(config).unwrap_or_else(|f| panic!("actor {config} did not start: {f:?}"))
    }

    /// Starts one; its refusal is the error.
    pub(crate) fn try_start(config: &Value) -> Result<Self, Failure> {
        if config["transport"] == "inproc" { Self::thread(config) } else { Self::process(config) }
    }

    fn process(config: &Value) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["actor_entry", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, config.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a child");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Self::attach(Body::Process(child), Box::new(input), output)
    }

    fn thread(config: &Value) -> Result<Self, Failure> {
        let (commands, to_role) = std::io::pipe().map(|(r, w)| (w, r)).expect("pipe");
        let (from_role, answers) = std::io::pipe().expect("pipe");
        let config = config.clone();
        let thread = std::thread::spawn(move || serve(&config, BufReader::new(to_role), answers));
        Self::attach(Body::Thread(Some(thread)), Box::new(commands), BufReader::new(from_role))
    }

    fn attach(
        body: Body,
        input: Box<dyn Write + Send>,
        output: impl BufRead + Send + 'static,
    ) -> Result<Self, Failure> {
        let (tell, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                // libtest prints lines of its own; and it may share a line with the first answer.
                let Some(at) = line.find(MARK) else { continue };
                let Ok(value) = serde_json::from_str(&line[at + MARK.len()..]) else { continue };
                if tell.send(value).is_err() {
                    return;
                }
            }
        });
        let mut actor = Self { body, input: Some(input), answers, hello: Value::Null };
        actor.hello = actor.answer()?;
        Ok(actor)
    }

    /// Sends a command and waits for its answer; panics on failure.
    pub(crate) fn call(&mut self, command: &Value) -> Value {
        self.try_call(command).unwrap_or_else(|f| panic!("{command} failed: {f:?}"))
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn try_call(&mut self, command: &Value) -> Result<Value, Failure> {
        self.tell(command);
        self.answer()
    }

    /// Sends a command; [`Actor::answer`] fetches what comes of it.
    pub(crate) fn tell(&mut self, command: &Value) {
        let input = self.input.as_mut().expect("the actor's input is open");
        // A killed actor cannot be told anything; the missing answer says so.
        let _ = writeln!(input, "{command}").and_then(|()| input.flush());
    }

    /// The answer to the oldest unanswered command.
    pub(crate) fn answer(&mut self) -> Result<Value, Failure> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(value) if value.get("ok").is_some() => Ok(value["ok"].clone()),
            Ok(value) => Err(Failure {
                code: value["code"].as_str().unwrap_or_default().into(),
                retryable: value["retryable"].as_bool().unwrap_or_default(),
                text: value["text"].as_str().unwrap_or_default().into(),
            }),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(Failure { code: "actor_ended".into(), retryable: false, text: String::new() })
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("an actor did not answer within {PATIENCE:?}: it hangs")
            }
        }
    }

    /// Where a receiver listens.
    pub(crate) fn address(&self) -> &str {
        self.hello["address"].as_str().expect("a receiver's address")
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        match &self.body {
            Body::Process(child) => child.id(),
            Body::Thread(_) => panic!("a thread cannot be signalled"),
        }
    }

    /// SIGSTOP, and waits until every thread has stopped: the signal is delivered in its own time.
    pub(crate) fn stop(&self) {
        self.signal(rustix::process::Signal::STOP);
        eventually("every thread of the actor has stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
            let stopped = |task: std::fs::DirEntry| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
            };
            tasks.flatten().all(stopped).then_some(())
        });
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("signal the actor");
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        let Body::Process(child) = &mut self.body else { panic!("a thread cannot be killed") };
        child.kill().expect("kill the actor");
        child.wait().expect("reap the actor");
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.input = None; // end of input ends the role
        match &mut self.body {
            Body::Process(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Body::Thread(thread) => {
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
            }
        }
    }
}

/// `overlay`'s keys win.
fn merged(mut base: Value, overlay: &Value) -> Value {
    for (key, value) in overlay.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

/// A name nobody else has.
pub(crate) fn unique(stem: &str) -> String {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    format!("{stem}-{}-{}", std::process::id(), NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

/// Configuration of a receiver with 8 pages of 64 KiB on `transport`.
pub(crate) fn receiver_config(transport: &str, overlay: &Value) -> Value {
    merged(json!({"role": "receiver", "transport": transport, "name": unique("decoder")}), overlay)
}

/// Configuration of a sender connected to `decoder`.
pub(crate) fn sender_config(transport: &str, decoder: &Actor, overlay: &Value) -> Value {
    let base = json!({
        "role": "sender", "transport": transport, "name": unique("prefiller"), "connect": decoder.address(),
    });
    merged(base, overlay)
}

/// Starts a receiver.
pub(crate) fn receiver(transport: &str, overlay: &Value) -> Actor {
    Actor::start(&receiver_config(transport, overlay))
}

/// Starts a sender connected to `decoder`.
pub(crate) fn sender(transport: &str, decoder: &Actor, overlay: &Value) -> Actor {
    Actor::start(&sender_config(transport, decoder, overlay))
}

/// Runs `line` on `transport`, or says why that cannot be done here.
pub(crate) fn on(transport: &str, name: &str, line: fn(&str)) {
    if transport == "cuda_ipc" && gpu::elsewhere(&format!("{transport}::{name}"), "both") {
        return;
    }
    match unavailable(transport) {
        None => line(transport),
        Some(why) => println!("SKIPPED on {transport}: {why}"),
    }
}

/// Runs a test of this binary with device memory on the named sides.
pub(crate) fn on_devices(sides: &str, test: &str) {
    gpu::elsewhere(test, sides);
}

/// Memory for one side, `sender` or `receiver`: a GPU's where the test asks for it, else shareable host memory.
pub(crate) fn memory(side: &str, len: usize) -> Result<Arc<Memory>, kvxfer::Error> {
    if gpu::wanted(side) {
        return Memory::device(&kvxfer::cuda::Device::get(0)?, len);
    }
    Memory::shared(len, HugePages::Try)
}

/// Why `transport` cannot be tested here; `None` when it can.
pub(crate) fn unavailable(transport: &str) -> Option<String> {
    let kind = transport.parse().expect("a transport's name");
    let agent = match kvxfer::Agent::builder().name(unique("probe")).allow([kind]).build() {
        Ok(agent) => agent,
        Err(e) => return Some(e.to_string()),
    };
    agent.transports().into_iter().find(|t| t.kind == kind).and_then(|t| t.reason)
}

/// The sum of `kvxfer_…<what>…_total` samples of one transport in Prometheus text.
pub(crate) fn metric(text: &Value, what: &str, transport: &str) -> u64 {
    let label = format!("transport=\"{transport}\"");
    let text = text.as_str().expect("metrics are text");
    let samples: Vec<f64> = text
        .lines()
        .filter(|l| l.starts_with("kvxfer_") && l.contains(&label))
        .filter(|l| l.split('{').next().is_some_and(|name| name.contains(what) && name.ends_with("_total")))
        .filter_map(|l| l.rsplit(' ').next()?.parse().ok())
        .collect();
    assert!(!samples.is_empty(), "no {what} of {transport} in:\n{text}");
    samples.iter().sum::<f64>() as u64
}

/// Forwards connections to a receiver and flips a byte of the payload every 65,000 bytes of a data connection. Returns its address.
pub(crate) fn flipping_proxy(target: &str) -> String {
    let target = target.strip_prefix("tcp://").expect("a tcp address").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = format!("tcp://{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(&target) else { return };
            let (near_in, far_in) = (near.try_clone().expect("clone"), far.try_clone().expect("clone"));
            std::thread::spawn(move || pump(near_in, far, true));
            std::thread::spawn(move || pump(far_in, near, false));
        }
    });
    address
}

fn pump(mut from: TcpStream, mut to: TcpStream, flip: bool) {
    let mut buffer = vec![0; 64 << 10];
    let (mut seen, mut next, mut data) = (0_usize, 30_000, false);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        data |= seen == 0 && buffer.starts_with(b"KVXFER\0D");
        while flip && data && next < seen + count {
            buffer[next - seen] ^= 0x10;
            next += 65_000;
        }
        seen += count;
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// Repeats `look` until it gives something or [`PATIENCE`] is over; panics with `what` then.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Content of a chunk: a stream that differs at every offset and for every seed (splitmix64).
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        out.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// An agent as the configuration of an actor says: `name`, `transport`, `listen`, `key`, `faults`, `integrity`, `agent` (overlays any field).
fn agent(config: &Value) -> Result<kvxfer::Agent, kvxfer::Error> {
    let name = config["name"].as_str().map(Into::into);
    let mut settings = kvxfer::AgentConfig { name, ..Default::default() };
    settings.listen.extend(config["listen"].as_str().map(Into::into));
    settings.auth_key = config["key"].as_str().map(kvxfer::config::Secret::new);
    if let Some(transport) = config["transport"].as_str() {
        settings.transports.allow = vec![transport.parse()?];
    }
    if !config["faults"].is_null() {
        settings.faults = Some(serde_json::from_value(config["faults"].clone()).expect("fault plan"));
    }
    if !config["integrity"].is_null() {
        settings.integrity = Some(serde_json::from_value(config["integrity"].clone()).expect("integrity"));
    }
    if !config["require"].is_null() {
        settings.transports.require = serde_json::from_value(config["require"].clone()).expect("require");
    }
    if let Some(ms) = config["peer_timeout_ms"].as_u64() {
        settings.peer_timeout = Duration::from_millis(ms);
    }
    kvxfer::Agent::builder().config(settings).build()
}

fn geometry(config: &Value) -> kvxfer::Geometry {
    let mut geometry: kvxfer::Geometry = match &config["geometry"] {
        Value::Null => {
            kvxfer::Geometry { model: "test/model".into(), dtype: "bfloat16".into(), ..Default::default() }
        }
        given => serde_json::from_value(given.clone()).expect("geometry"),
    };
    geometry.page_bytes = config["page_bytes"].as_u64().unwrap_or(64 << 10);
    geometry
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} is missing in {value}"))
}

fn millis(value: &Value, key: &str, default: u64) -> Duration {
    Duration::from_millis(value[key].as_u64().unwrap_or(default))
}
