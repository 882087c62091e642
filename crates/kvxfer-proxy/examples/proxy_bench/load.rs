//! The load: requests as fast as they are answered, at a steady rate, or many streams at once. Every answer is read to
//! its end and its text compared.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;

use crate::Result;
use crate::http::{Connection, bad, find};

/// No request takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The time between two tokens of the upstream.
#[derive(Clone, Copy)]
pub(crate) struct Pace(u64);

impl Pace {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const TENTH_OF_A_SECOND: Self = Self(100);

    pub(crate) fn milliseconds(self) -> u64 {
        self.0
    }
}

/// What one client asks for, again and again.
pub(crate) struct Task {
    /// What the proxy is sent.
    request: Vec<u8>,
    /// What an engine is sent by a client that does a proxy's work itself.
    steps: Vec<Vec<u8>>,
    expected: String,
    /// The key in front of the text.
    key: &'static [u8],
}

impl Task {
    pub(crate) fn new(prompt_tokens: usize, tokens: usize, stream: bool, chat: bool) -> Self {
        let words = "Tell me a story about a fox and a hound who share a house by the sea. ";
        let prompt = words.repeat(6);
        let (path, body) = if chat {
            let messages = serde_json::json!([{"role": "user", "content": prompt}]);
            (
                "/v1/chat/completions",
                serde_json::json!({"model": "bench", "messages": messages, "max_tokens": tokens,
                "temperature": 0.0, "stream": stream}),
            )
        } else {
            (
                "/v1/completions",
                serde_json::json!({"model": "bench", "prompt": prompt, "max_tokens": tokens,
                "temperature": 0.0, "stream": stream}),
            )
        };
        let ids: Vec<u32> = (0..prompt_tokens as u32).map(|i| 1000 + i * 7).collect();
        let spec = serde_json::json!({"ret_first_tok": true, "disagg_spec": {"req_id": "none"}});
        let steps = vec![
            request("/tokenize", &serde_json::json!({"model": "bench", "prompt": prompt})),
            request(
                "/v1/completions",
                &serde_json::json!({"model": "bench", "prompt": ids, "max_tokens": 1, "kv_transfer_params": spec}),
            ),
            request(
                "/v1/completions",
                &serde_json::json!({"model": "bench", "prompt": ids, "max_tokens": tokens - 1, "stream": stream}),
            ),
        ];
        Self {
            request: request(path, &body),
            steps,
            expected: text(0..tokens),
            key: if chat { b"\"content\":" } else { b"\"text\":" },
        }
    }
}

/// The text of an answer's tokens.
pub(crate) fn text(tokens: std::ops::Range<usize>) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for i in tokens {
        // Writing to a string cannot fail.
        let _ = write!(text, " t{i}");
    }
    text
}

fn request(path: &str, body: &serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    format!("POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

/// Whom the load goes to.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    address: SocketAddr,
    direct: bool,
}

impl Target {
    /// A proxy.
    pub(crate) fn proxy(address: SocketAddr) -> Self {
        Self { address, direct: false }
    }

    /// The upstream itself: the same calls without a proxy, as what a proxy adds is measured against.
    pub(crate) fn direct(address: SocketAddr) -> Self {
        Self { address, direct: true }
    }
}

/// What came of it.
#[derive(Default)]
pub(crate) struct Outcome {
    /// How long each request took.
    pub(crate) times: Vec<Duration>,
    pub(crate) errors: Vec<String>,
    pub(crate) took: Duration,
}

impl Outcome {
    /// Fails with the first error.
    pub(crate) fn no_errors(&self) -> Result<()> {
        match self.errors.first() {
            Some(error) => Err(format!(
                "{} of {} requests failed: {error}",
                self.errors.len(),
                self.errors.len() + self.times.len()
            )
            .into()),
            None => Ok(()),
        }
    }

    fn add(&mut self, done: std::io::Result<Duration>) {
        match done {
            Ok(took) => self.times.push(took),
            Err(error) => self.errors.push(error.to_string()),
        }
    }
}

/// `concurrency` clients, each of which asks again as soon as it is answered.
pub(crate) async fn closed(
    target: Target,
    task: &Task,
    concurrency: usize,
    length: Duration,
) -> Result<Outcome> {
    let outcome = RefCell::new(Outcome::default());
    let start = Instant::now();
    let client = async || -> std::io::Result<()> {
        let mut connection = connect(target).await?;
        while start.elapsed() < length {
            let done = ask(&mut connection, target, task).await;
            let broken = done.is_err();
            outcome.borrow_mut().add(done);
            if broken {
                connection = connect(target).await?;
            }
        }
        Ok(())
    };
    let clients: Vec<_> = (0..concurrency).map(|_| client()).collect();
    for done in join_all(clients).await {
        done?;
    }
    let mut outcome = outcome.into_inner();
    outcome.took = start.elapsed();
    Ok(outcome)
}

/// Requests that come at a steady rate, whether the ones before are answered or not.
pub(crate) async fn open(target: Target, task: &Task, rate: f64, length: Duration) -> Result<Outcome> {
    let outcome = RefCell::new(Outcome::default());
    let pool: RefCell<Vec<Connection>> = RefCell::new(Vec::new());
    let start = Instant::now();
    let one = async || {
        let pooled = pool.borrow_mut().pop();
        let done = match pooled {
            Some(connection) => Ok(connection),
            None => connect(target).await,
        };
        let done = match done {
            Ok(mut connection) => {
                let done = ask(&mut connection, target, task).await;
                if done.is_ok() {
                    pool.borrow_mut().push(connection);
                }
                done
            }
            Err(error) => Err(error),
        };
        outcome.borrow_mut().add(done);
    };
    let mut under_way = FuturesUnordered::new();
    let mut sent = 0u64;
    let mut tick = tokio::time::interval(Duration::from_millis(1));
    loop {
        tokio::select! {
            biased;
            Some(()) = under_way.next() => {}
            now = tick.tick() => {
                let now = now.into_std().saturating_duration_since(start);
                if now > length {
                    break;
                }
                while (sent as f64) < now.as_secs_f64() * rate {
                    under_way.push(one());
                    sent += 1;
                }
            }
        }
    }
    while under_way.next().await.is_some() {}
    drop(under_way);
    let mut outcome = outcome.into_inner();
    outcome.took = start.elapsed();
    Ok(outcome)
}

/// `number` requests at the same time.
pub(crate) async fn at_once(target: Target, task: &Task, number: usize) -> Outcome {
    let start = Instant::now();
    let one = async || ask(&mut connect(target).await?, target, task).await;
    let mut outcome = Outcome::default();
    for done in join_all((0..number).map(|_| one())).await {
        outcome.add(done);
    }
    outcome.took = start.elapsed();
    outcome
}

async fn connect(target: Target) -> std::io::Result<Connection> {
    Connection::new(TcpStream::connect(target.address).await?)
}

/// One request; how long it took. An answer that is not the expected one is an error.
async fn ask(connection: &mut Connection, target: Target, task: &Task) -> std::io::Result<Duration> {
    let start = Instant::now();
    let asking = async {
        let mut body = Vec::new();
        if target.direct {
            for step in &task.steps {
                body.clear();
                answer(connection, step, &mut body).await?;
            }
        } else {
            answer(connection, &task.request, &mut body).await?;
            let text = text_of(&body, task.key);
            if text != task.expected {
                return Err(bad(&format!("a wrong answer: {text:?}")));
            }
        }
        Ok(start.elapsed())
    };
    tokio::time::timeout(PATIENCE, asking).await.map_err(|_| bad("no answer in time"))?
}

async fn answer(connection: &mut Connection, request: &[u8], body: &mut Vec<u8>) -> std::io::Result<()> {
    connection.write(request).await?;
    let head = connection.head().await?.ok_or_else(|| bad("the connection was closed"))?;
    connection.body(&head, |piece| body.extend_from_slice(piece)).await?;
    if head.second() != "200" {
        return Err(bad(&format!(
            "{}: {}",
            head.line,
            String::from_utf8_lossy(&body[..body.len().min(200)])
        )));
    }
    Ok(())
}

/// All texts of an answer, streamed or not, without looking at the rest of it.
fn text_of(body: &[u8], key: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = body;
    while let Some(at) = find(rest, key) {
        rest = rest[at + key.len()..].trim_ascii_start();
        // A null is no text.
        let Some(inner) = rest.strip_prefix(b"\"") else { continue };
        let end = inner.iter().position(|b| *b == b'"').unwrap_or(inner.len());
        text.push_str(&String::from_utf8_lossy(&inner[..end]));
        rest = &inner[end..];
    }
    text
}
