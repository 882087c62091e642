//! A scripted engine: vLLM's endpoints with a language model that is a formula, and every kind of misbehaviour.
//!
//! The next token depends on all tokens before it, so an answer that was cut, doubled or continued from the wrong place
//! reads differently. Tokens are the bytes of the text; generated ones are the letters a to z.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::StreamExt as _;
use kvxfer_proto::notify::{Notification, encode};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Mutex as AsyncMutex;
use zeromq::{PushSocket, Socket as _, SocketSend as _};

/// How an engine answers `/v1/completions` and `/v1/chat/completions`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Mood {
    Well,
    Status(u16, String),
    /// 200 with something that is no answer.
    Says(String),
    /// The connection closes in the middle of the answer, or in a stream after so many tokens.
    CutOff(usize),
    /// A stream's events are no JSON after so many tokens.
    Babbles(usize),
    /// A stream ends with an error event after so many tokens.
    Fails(usize),
    /// Nothing comes, ever; in a stream after so many tokens.
    Hangs(usize),
    /// It waits before it answers.
    Slow(Duration),
}

/// What a prefill tells the proxy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tells {
    /// `LMCache`'s message, one per rank.
    Plain,
    /// kvxfer's message, one per rank.
    Ready,
    /// The last rank has failed.
    Failed,
    Nothing,
    /// Garbage, duplicates, strangers' requests, and then the truth.
    Noise,
    /// The truth, that much later.
    Late(Duration),
}

#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) at: SocketAddr,
    /// Tensor-parallel ranks, for decoders.
    pub(crate) ranks: u32,
    shared: Arc<Shared>,
    server: Arc<tokio::task::JoinHandle<()>>,
}

struct Shared {
    mood: Mutex<Mood>,
    tells: Mutex<Tells>,
    health: Mutex<Option<u16>>,
    tokenize: Mutex<Option<u16>>,
    pause: Mutex<Duration>,
    seen: Mutex<Vec<(String, Value)>>,
    headers: Mutex<Vec<hyper::HeaderMap>>,
    push: AsyncMutex<Option<PushSocket>>,
    under_way: AtomicUsize,
    aborted: AtomicUsize,
}

impl Engine {
    pub(crate) fn start() -> Self {
        Self::on("127.0.0.1:0".parse().expect("an address"))
    }

    pub(crate) fn on(at: SocketAddr) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(at).expect("bound");
        let listener = socket.listen(1024).expect("listening");
        Self::serve(listener)
    }

    fn serve(listener: TcpListener) -> Self {
        let at = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            mood: Mutex::new(Mood::Well),
            tells: Mutex::new(Tells::Ready),
            health: Mutex::new(Some(200)),
            tokenize: Mutex::new(Some(200)),
            pause: Mutex::new(Duration::ZERO),
            seen: Mutex::new(Vec::new()),
            headers: Mutex::new(Vec::new()),
            push: AsyncMutex::new(None),
            under_way: AtomicUsize::new(0),
            aborted: AtomicUsize::new(0),
        });
        let app = Router::new()
            .route("/health", get(health))
            .route("/v1/models", get(models))
            .route("/tokenize", post(tokenize))
            .route("/v1/completions", post(complete))
            .route("/v1/chat/completions", post(complete))
            .with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            let listener =
                axum::serve::ListenerExt::tap_io(listener, |s| s.set_nodelay(true).expect("an option"));
            axum::serve(listener, app).await.expect("serving");
        });
        Self { at, ranks: 1, shared, server: Arc::new(server) }
    }

    pub(crate) fn ranks(mut self, ranks: u32) -> Self {
        self.ranks = ranks;
        self
    }

    /// Connects to the proxy's notification socket.
    pub(crate) async fn notify(&self, at: SocketAddr) {
        let mut socket = PushSocket::new();
        socket.connect(&format!("tcp://{at}")).await.expect("connected");
        *self.shared.push.lock().await = Some(socket);
    }

    pub(crate) fn mood(&self, mood: Mood) {
        *self.shared.mood.lock() = mood;
    }

    pub(crate) fn tells(&self, tells: Tells) {
        *self.shared.tells.lock() = tells;
    }

    /// Status of `/health`; `None` hangs.
    pub(crate) fn health(&self, status: Option<u16>) {
        *self.shared.health.lock() = status;
    }

    /// Status of `/tokenize`; `None` hangs.
    pub(crate) fn tokenize(&self, status: Option<u16>) {
        *self.shared.tokenize.lock() = status;
    }

    /// Pause before each token of a stream.
    pub(crate) fn pause(&self, pause: Duration) {
        *self.shared.pause.lock() = pause;
    }

    /// Bodies it was sent, with their paths.
    pub(crate) fn seen(&self) -> Vec<(String, Value)> {
        self.shared.seen.lock().clone()
    }

    /// Bodies of completions.
    pub(crate) fn completions(&self) -> Vec<Value> {
        self.seen()
            .into_iter()
            .filter(|(path, _)| path.ends_with("completions"))
            .map(|(_, body)| body)
            .collect()
    }

    pub(crate) fn headers(&self) -> Vec<hyper::HeaderMap> {
        self.shared.headers.lock().clone()
    }

    pub(crate) fn under_way(&self) -> usize {
        self.shared.under_way.load(Ordering::SeqCst)
    }

    /// Requests whose client went away.
    pub(crate) fn aborted(&self) -> usize {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// Ends the server and every connection of it.
    pub(crate) async fn stop(self) -> SocketAddr {
        self.server.abort();
        while !self.server.is_finished() {
            tokio::task::yield_now().await;
        }
        self.at
    }
}

/// What this model says after a prompt.
pub(crate) fn answer_to(prompt: &str, tokens: usize) -> String {
    let mut all: Vec<u32> = prompt.bytes().map(u32::from).collect();
    generate(&mut all, tokens)
}

/// How a chat becomes a prompt.
pub(crate) fn chat_prompt(messages: &Value) -> String {
    messages
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|m| m["content"].as_str())
        .collect::<Vec<_>>()
        .join("|")
}

fn generate(all: &mut Vec<u32>, tokens: usize) -> String {
    (0..tokens)
        .map(|_| {
            let mixed = all.iter().fold(7_u32, |acc, t| acc.wrapping_mul(31).wrapping_add(*t));
            let token = u32::from(b'a') + mixed % 26;
            all.push(token);
            char::from_u32(token).expect("a letter")
        })
        .collect()
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let status = *shared.health.lock();
    match status {
        Some(status) => plain(status, String::new()),
        None => std::future::pending().await,
    }
}

async fn models() -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": "m", "object": "model"}]}))
}

async fn tokenize(State(shared): State<Arc<Shared>>, Json(body): Json<Value>) -> Response {
    shared.seen.lock().push(("/tokenize".into(), body.clone()));
    let status = *shared.tokenize.lock();
    match status {
        Some(200) => {
            let text = body["prompt"].as_str().map_or_else(|| chat_prompt(&body["messages"]), str::to_owned);
            let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
            let body = json!({"count": tokens.len(), "max_model_len": 4096, "tokens": tokens});
            plain(200, body.to_string())
        }
        Some(status) => plain(status, "{\"detail\": \"no\"}".into()),
        None => std::future::pending().await,
    }
}

/// Counts a request that is dropped before its end.
struct UnderWay(Arc<Shared>, bool);

impl UnderWay {
    fn done(mut self) {
        self.1 = true;
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
        if !self.1 {
            self.0.aborted.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn complete(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let chat = path.contains("chat");
    shared.headers.lock().push(request.headers().clone());
    let body = axum::body::to_bytes(request.into_body(), 64 << 20).await.expect("a body");
    let body: Value = serde_json::from_slice(&body).expect("the proxy sends JSON");
    shared.seen.lock().push((path, body.clone()));
    shared.under_way.fetch_add(1, Ordering::SeqCst);
    let guard = UnderWay(Arc::clone(&shared), false);
    let mood = shared.mood.lock().clone();
    match &mood {
        Mood::Status(status, text) => {
            guard.done();
            return plain(*status, text.clone());
        }
        Mood::Says(text) => {
            guard.done();
            return plain(200, text.clone());
        }
        Mood::Slow(time) => tokio::time::sleep(*time).await,
        Mood::Hangs(0) => std::future::pending().await,
        Mood::CutOff(0) => {
            guard.done();
            let start = futures_util::stream::iter([Ok("{\"choices\""), Err(std::io::Error::other("cut"))]);
            return Response::new(Body::from_stream(start));
        }
        _ => {}
    }
    let prompt: Vec<u32> = match &body["prompt"] {
        Value::Array(tokens) => tokens.iter().map(|t| t.as_u64().expect("a token") as u32).collect(),
        Value::String(text) => text.bytes().map(u32::from).collect(),
        _ => chat_prompt(&body["messages"]).bytes().map(u32::from).collect(),
    };
    let asked = body["max_completion_tokens"].as_u64().or(body["max_tokens"].as_u64());
    let tokens = asked.unwrap_or(if chat { 40 } else { 16 }) as usize;
    let mut all = prompt.clone();
    let text = generate(&mut all, tokens);
    let spec = &body["kv_transfer_params"]["disagg_spec"];
    if spec.is_object() {
        let first = all.get(prompt.len()).copied();
        let ranks = spec["receiver_init_port"].as_array().expect("ports").len() as u32;
        tell(&shared, spec["req_id"].as_str().expect("an id"), ranks);
        guard.done();
        let body = json!({
            "id": "cmpl-p", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": null, "stop_reason": null}],
            "usage": {"prompt_tokens": prompt.len(), "total_tokens": prompt.len() + 1, "completion_tokens": 1},
            "kv_transfer_params": {"first_tok": first},
        });
        return plain(200, body.to_string());
    }
    let usage = json!({
        "prompt_tokens": prompt.len(), "total_tokens": prompt.len() + tokens, "completion_tokens": tokens,
    });
    if body["stream"] == json!(true) {
        return stream(
            &shared,
            guard,
            &mood,
            chat,
            body["stream_options"]["include_usage"] == json!(true),
            &text,
            usage,
        );
    }
    guard.done();
    let choice = if chat {
        json!({"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"})
    } else {
        json!({"index": 0, "text": text, "finish_reason": "length", "logprobs": null, "stop_reason": null})
    };
    plain(
        200,
        json!({"id": "d", "object": "o", "created": 2, "model": "m", "choices": [choice], "usage": usage})
            .to_string(),
    )
}

fn stream(
    shared: &Shared,
    guard: UnderWay,
    mood: &Mood,
    chat: bool,
    include_usage: bool,
    text: &str,
    usage: Value,
) -> Response {
    let pause = *shared.pause.lock();
    let last = text.chars().count().saturating_sub(1);
    let chunk = move |choices: Value| json!({"id": "d", "object": "o", "created": 2, "model": "m", "choices": choices});
    let mut pieces: Vec<Result<String, &'static str>> = Vec::new();
    if chat {
        pieces.push(Ok(chunk(
            json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]),
        )
        .to_string()));
    }
    for (i, letter) in text.chars().enumerate() {
        match mood {
            Mood::CutOff(n) if *n == i => {
                pieces.push(Err("cut"));
                break;
            }
            Mood::Hangs(n) if *n == i => {
                pieces.push(Err("hang"));
                break;
            }
            Mood::Babbles(n) if *n == i => {
                pieces.push(Ok("{not json".into()));
                break;
            }
            Mood::Fails(n) if *n == i => {
                pieces.push(Ok(json!({"error": {"message": "the engine is sick", "type": "InternalServerError", "code": 500}}).to_string()));
                break;
            }
            _ => {}
        }
        let finish = if i == last { json!("length") } else { Value::Null };
        let choice = if chat {
            json!({"index": 0, "delta": {"content": letter.to_string()}, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": letter.to_string(), "finish_reason": finish, "logprobs": null, "stop_reason": null})
        };
        pieces.push(Ok(chunk(json!([choice])).to_string()));
    }
    if matches!(mood, Mood::Well | Mood::Slow(_))
        || matches!(pieces.last(), Some(Ok(last)) if last.contains("error"))
    {
        if include_usage {
            let mut end = chunk(json!([]));
            end["usage"] = usage;
            pieces.push(Ok(end.to_string()));
        }
        pieces.push(Ok("[DONE]".into()));
    }
    let mut guard = Some(guard);
    let count = pieces.len();
    let stream = futures_util::stream::iter(pieces.into_iter().enumerate()).then(move |(i, piece)| {
        let done = (i + 1 == count).then(|| guard.take()).flatten();
        async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let piece = match piece {
                Ok(data) => Ok(Bytes::from(format!("data: {data}\n\n"))),
                Err("hang") => {
                    let _held = done;
                    return std::future::pending().await;
                }
                Err(why) => Err(std::io::Error::other(why)),
            };
            if let Some(guard) = done {
                guard.done();
            }
            piece
        }
    });
    let mut response = Response::new(Body::from_stream(stream));
    response
        .headers_mut()
        .insert("content-type", "text/event-stream; charset=utf-8".parse().expect("a header"));
    response
}

fn tell(shared: &Arc<Shared>, id: &str, ranks: u32) {
    let tells = shared.tells.lock().clone();
    let ready =
        |rank| Notification::KvReady { req_id: id.to_owned(), tp_rank: rank, bytes: 1000, took_us: 50 };
    let mut messages: Vec<Vec<u8>> = Vec::new();
    let mut push = |n: &Notification| messages.push(encode(n).expect("valid"));
    match tells {
        Tells::Plain => (0..ranks).for_each(|_| push(&Notification::ProxyNotif { req_id: id.to_owned() })),
        Tells::Ready | Tells::Late(_) => (0..ranks).for_each(|rank| push(&ready(rank))),
        Tells::Failed => {
            (0..ranks - 1).for_each(|rank| push(&ready(rank)));
            push(&Notification::KvFailed {
                req_id: id.to_owned(),
                tp_rank: ranks - 1,
                code: "no_capacity".into(),
                message: "the pool is full".into(),
                retryable: true,
            });
        }
        Tells::Nothing => {}
        Tells::Noise => {
            push(&Notification::ProxyNotif { req_id: "7".into() });
            push(&Notification::ProxyNotif { req_id: format!("{id}9") });
            (0..ranks).for_each(|rank| push(&ready(rank)));
            (0..ranks).for_each(|rank| push(&ready(rank)));
            messages.insert(0, b"garbage".to_vec());
            messages.insert(0, Vec::new());
            messages.insert(0, vec![0xdf, 0xff, 0xff, 0xff, 0xff]);
            messages.insert(0, vec![0x91; 20_000]);
        }
    }
    let shared = Arc::clone(shared);
    let send = async move {
        if let Tells::Late(time) = tells {
            tokio::time::sleep(time).await;
        }
        let mut socket = shared.push.lock().await;
        let Some(socket) = socket.as_mut() else { return };
        for message in messages {
            socket.send(message.into()).await.expect("sent");
        }
    };
    tokio::spawn(send);
}

fn plain(status: u16, body: String) -> Response {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Body::from(body))
        .expect("a response")
}
