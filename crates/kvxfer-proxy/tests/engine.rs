//! The proxy in front of the real engine of `examples/engine`: real processes, a real model, real caches.
//!
//! What comes out of two prefillers and a decoder is what one instance says, and a SIGKILL under load costs at most clear
//! errors: no request hangs, no answer is wrong, and whoever comes back serves again.

mod support;

use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use support::client::{Answer, post};
use support::{PATIENCE, Proxy, config};
use tokio::time::{Instant, sleep, timeout};

/// A model that answers at once.
const TINY: &[&str] = &[
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

/// A running engine, ended by SIGKILL.
struct Instance {
    child: Child,
    port: u16,
    kv_port: u16,
}

impl Instance {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(engine())
            .args(TINY)
            .args(args)
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .expect("the engine starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (mut port, mut kv_port, mut seen) = (0, 0, Vec::new());
        while port == 0 {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {seen:#?}")).expect("text");
            if line.contains("ready to receive caches") {
                kv_port = port_after(&line, "tcp://");
            }
            if line.contains("serving on http://") {
                port = port_after(&line, "http://");
            }
            seen.push(line);
        }
        // Nobody reads on; a full pipe would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, port, kv_port }
    }

    fn at(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn port_after(line: &str, what: &str) -> u16 {
    let rest = &line[line.find(what).expect("there") + what.len()..];
    let digits: String =
        rest[rest.find(':').expect("a port") + 1..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no port in {line}"))
}

/// The engine's binary beside this test; built when it is not there.
fn engine() -> PathBuf {
    let folder = std::env::current_exe().expect("a path");
    let folder = folder.ancestors().nth(2).expect("target/profile/deps").to_owned();
    let binary = folder.join("kvxfer-engine");
    if !binary.exists() {
        let profile = if folder.ends_with("release") { "release" } else { "dev" };
        let built = Command::new(env!("CARGO"))
            .args(["build", "-p", "kvxfer-engine", "--profile", profile])
            .status()
            .expect("cargo runs");
        assert!(built.success(), "the engine builds");
    }
    binary
}

struct Cluster {
    prefillers: Vec<Instance>,
    decoder: Instance,
    proxy: Proxy,
}

impl Cluster {
    async fn start(more: &str) -> Self {
        let decoder = tokio::task::spawn_blocking(|| {
            Instance::start(&["--role", "decode", "--port", "0", "--kv-port", "0"])
        })
        .await
        .expect("no panic");
        // The prefillers are told where the proxy listens, so it comes before them.
        let proxy = Proxy::with(&Self::yaml(&[], &decoder, more)).await;
        let notify = proxy.notify.port().to_string();
        let prefillers: Vec<Instance> = (0..2)
            .map(|_| Instance::start(&["--role", "prefill", "--port", "0", "--proxy-port", &notify]))
            .collect();
        proxy.handle.reload(&config(&Self::yaml(&prefillers, &decoder, more))).expect("reloaded");
        Self { prefillers, decoder, proxy }
    }

    fn yaml(prefillers: &[Instance], decoder: &Instance, more: &str) -> String {
        let list: Vec<String> =
            prefillers.iter().map(|p| format!("{{host: 127.0.0.1, port: {}}}", p.port)).collect();
        format!(
            "host: 127.0.0.1\nport: 0\nproxy_host: 127.0.0.1\nproxy_port: 0\nprefillers: [{}]\n\
             decoders: [{{host: 127.0.0.1, port: {}, init_ports: [{}], alloc_ports: [1]}}]\n{more}",
            list.join(", "),
            decoder.port,
            decoder.kv_port
        )
    }
}

fn prompt(i: usize) -> String {
    format!(
        "Prompt number {i}: the fox, the hen, {} and the long winter of the year {}",
        "many words ".repeat(i % 5),
        i * 7
    )
}

fn ask(i: usize, stream: bool) -> (&'static str, Value) {
    let common = json!({"max_tokens": 12, "temperature": 0, "stream": stream});
    let mut body = common;
    if i % 3 == 2 {
        body["messages"] = json!([{"role": "user", "content": prompt(i)}]);
        ("/v1/chat/completions", body)
    } else {
        body["prompt"] = json!(prompt(i));
        ("/v1/completions", body)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_prefillers_and_a_decoder_say_what_one_instance_says() {
    let cluster = Cluster::start("").await;
    let single = Instance::start(&["--port", "0"]);
    let asked: Vec<_> = (0..12)
        .map(|i| {
            let (at, alone) = (cluster.proxy.at, single.at());
            tokio::spawn(async move {
                let stream = i % 2 == 0;
                let (path, body) = ask(i, stream);
                let (ours, theirs) = (post(at, path, &body).await, post(alone, path, &body).await);
                assert_eq!(ours.status, 200, "{}", ours.text());
                assert!(!theirs.content().is_empty());
                assert_eq!(ours.content(), theirs.content(), "{body}");
                if !stream {
                    let usage = |a: &Answer| {
                        let usage = &a.json()["usage"];
                        (
                            usage["prompt_tokens"].clone(),
                            usage["completion_tokens"].clone(),
                            usage["total_tokens"].clone(),
                        )
                    };
                    assert_eq!(usage(&ours), usage(&theirs));
                }
            })
        })
        .collect();
    for one in asked {
        one.await.expect("equal");
    }
    let stats = cluster.proxy.stats().await;
    for instance in stats["instances"].as_array().expect("three") {
        assert!(instance["started"].as_u64() >= Some(6) && instance["failed"] == json!(0), "{instance}");
    }
    let metrics = support::client::get(cluster.proxy.at, "/metrics").await.text();
    assert!(metrics.contains("notifications_total{kind=\"ready\"} 12"), "every cache has arrived: {metrics}");
    assert!(!metrics.contains("fallbacks_total{"), "{metrics}");
}

/// What became of a request under fire.
#[derive(Debug)]
enum End {
    Right,
    Error(String),
    Wrong(String),
}

/// Compares an answer with the right one; an error has to be a clear one.
fn judge(answer: &Answer, expected: &str) -> End {
    if answer.status != 200 {
        return End::Error(answer.error());
    }
    if answer.headers["content-type"].as_bytes().starts_with(b"text/event-stream") {
        let events = answer.events();
        if let Some(error) = events.last().filter(|e| e["error"].is_object()) {
            let text: String = events
                .iter()
                .filter_map(|e| {
                    e["choices"][0]["text"].as_str().or(e["choices"][0]["delta"]["content"].as_str())
                })
                .collect();
            // What was said before the error is right as well.
            return if expected.starts_with(&text) {
                End::Error(error["error"]["message"].to_string())
            } else {
                End::Wrong(text)
            };
        }
    }
    let content = answer.content();
    if content == expected { End::Right } else { End::Wrong(content) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sigkill_under_load_costs_at_most_clear_errors() {
    const KINDS: usize = 6;
    let mut cluster = Cluster::start("deadlines: {kv: 2s, prefill: 10s, decode: 10s, stall: 10s}\n").await;
    let single = Instance::start(&["--port", "0"]);
    let mut expected: HashMap<usize, String> = HashMap::new();
    for i in 0..KINDS {
        let (path, body) = ask(i, false);
        expected.insert(i, post(single.at(), path, &body).await.content());
    }
    drop(single);
    let expected = Arc::new(expected);
    let at = cluster.proxy.at;

    // 50 requests a second, whatever happens to them.
    let load = tokio::spawn({
        let expected = Arc::clone(&expected);
        async move {
            let begun = Instant::now();
            let mut all = Vec::new();
            for n in 0..350_u32 {
                tokio::time::sleep_until(begun + Duration::from_millis(20) * n).await;
                let (i, expected) = (n as usize % KINDS, Arc::clone(&expected));
                all.push(tokio::spawn(async move {
                    let (path, body) = ask(i, n % 2 == 0);
                    let answer = timeout(PATIENCE, post(at, path, &body)).await.expect("no request hangs");
                    judge(&answer, &expected[&i])
                }));
            }
            let mut ends = Vec::new();
            for one in all {
                ends.push(one.await.expect("every request ends in order"));
            }
            ends
        }
    });

    sleep(Duration::from_millis(1500)).await;
    let notify = cluster.proxy.notify.port().to_string();
    let killed = cluster.prefillers.remove(0);
    let port = killed.port.to_string();
    drop(killed);
    sleep(Duration::from_millis(500)).await;
    let back = tokio::task::spawn_blocking(move || {
        Instance::start(&["--role", "prefill", "--port", &port, "--proxy-port", &notify])
    });
    cluster.prefillers.push(back.await.expect("it starts"));
    serves_again(&cluster, 0).await;

    sleep(Duration::from_millis(500)).await;
    let (port, kv_port) = (cluster.decoder.port.to_string(), cluster.decoder.kv_port.to_string());
    let _ = cluster.decoder.child.kill();
    let _ = cluster.decoder.child.wait();
    sleep(Duration::from_millis(500)).await;
    let back = tokio::task::spawn_blocking(move || {
        Instance::start(&["--role", "decode", "--port", &port, "--kv-port", &kv_port])
    });
    cluster.decoder = back.await.expect("it starts");
    serves_again(&cluster, 2).await;

    let ends = load.await.expect("the load ends");
    let right = ends.iter().filter(|end| matches!(end, End::Right)).count();
    for end in &ends {
        if let End::Wrong(text) = end {
            panic!("a wrong answer: {text}");
        }
    }
    println!("{right} of {} requests were answered", ends.len());
    for end in &ends {
        if let End::Error(text) = end {
            let clear =
                ["decoder1", "prefiller1", "prefiller2", "try again"].iter().any(|name| text.contains(name));
            assert!(clear, "an error says what happened: {text}");
        }
    }
    // The dead time of the only decoder is the only one in which requests must fail.
    assert!(right > ends.len() / 3, "{right} of {} were answered", ends.len());
    cluster.proxy.until("nothing is under way", |s| s["in_flight"] == json!([])).await;
    for i in 0..KINDS {
        let (path, body) = ask(i, true);
        let answer = post(at, path, &body).await;
        assert!(
            matches!(judge(&answer, &expected[&i]), End::Right),
            "afterwards all is well: {}",
            answer.text()
        );
    }
}

/// The instance at this place of the list gets requests again.
async fn serves_again(cluster: &Cluster, place: usize) {
    let of = |stats: &Value| stats["instances"][place]["started"].as_u64().expect("a number");
    cluster.proxy.until("it is seen to be back", |s| s["instances"][place]["health"] == json!("up")).await;
    let before = of(&cluster.proxy.stats().await);
    cluster.proxy.until("it gets requests again", |s| of(s) > before).await;
}
