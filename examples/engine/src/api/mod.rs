//! The HTTP face: vLLM's endpoints, over axum.

mod answer;
mod error;
mod request;

use crate::kv::receive::Inbox;
use crate::kv::send::Outbox;
use crate::model::{Model, hex};
use crate::scheduler::{Job, Scheduler};
use crate::text::Text;
use answer::Answer;
use axum::Json;
use axum::Router;
use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use request::Body;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Largest body of a request.
const MAX_BODY: usize = 64 << 20;
/// Events that wait for a slow client before the rest waits in the engine's own queue.
const STREAM_QUEUE: usize = 64;

/// Everything a handler needs. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) model: Arc<Model>,
    pub(crate) text: Arc<Text>,
    pub(crate) scheduler: Scheduler,
    /// The first is the one answers carry.
    pub(crate) names: Arc<[String]>,
    pub(crate) started: u64,
    /// Requests may name a decoder to send their cache to.
    pub(crate) sends: bool,
    /// Say how many tokens of a prompt came from the cache.
    pub(crate) usage_details: bool,
    pub(crate) agent: Option<kvxfer::Agent>,
    pub(crate) outbox: Option<Outbox>,
    pub(crate) inbox: Option<Arc<Inbox>>,
}

#[derive(Deserialize)]
struct Tokenize {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    return_token_strs: Option<bool>,
}

#[derive(Deserialize)]
struct Detokenize {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// All routes.
pub(crate) fn router(service: Service) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/ping", get(health))
        .route("/version", get(async || Json(json!({ "version": env!("CARGO_PKG_VERSION") }))))
        .route("/metrics", get(metrics))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(service)
}

async fn completions(State(service): State<Service>, headers: HeaderMap, body: Bytes) -> Response {
    generate(service, &headers, &body, false).await.unwrap_or_else(IntoResponse::into_response)
}

async fn chat_completions(State(service): State<Service>, headers: HeaderMap, body: Bytes) -> Response {
    generate(service, &headers, &body, true).await.unwrap_or_else(IntoResponse::into_response)
}

async fn generate(
    service: Service,
    headers: &HeaderMap,
    body: &[u8],
    chat: bool,
) -> Result<Response, ApiError> {
    let body = Body::parse(body)?;
    let model = body.model.clone().unwrap_or_else(|| service.names[0].clone());
    let ask = body.check(&service, chat)?;
    let given = headers.get("x-request-id").and_then(|v| v.to_str().ok()).filter(|id| !id.is_empty());
    let unique = given.map(str::to_owned).or_else(|| ask.request_id.clone()).unwrap_or_else(random_id);
    let id = format!("{}-{unique}", if chat { "chatcmpl" } else { "cmpl" });
    let mut events = Vec::new();
    for (i, prompt) in ask.prompts.iter().enumerate() {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let job = Job {
            id: if chat { id.clone() } else { format!("{id}-{i}") },
            prompt: prompt.clone(),
            params: ask.params.clone(),
            choices: ask.choices,
            target: ask.target.clone(),
            events: sender,
        };
        if !service.scheduler.submit(job) {
            return Err(ApiError::busy(
                "too many requests are waiting; try again later or start the engine with a larger --max-queue",
            ));
        }
        events.push(receiver);
    }
    let stream = ask.stream;
    let answer = Answer { service, ask, id, model, created: now(), events };
    if !stream {
        return Ok(Json(answer.whole().await?).into_response());
    }
    let (out, queue) = tokio::sync::mpsc::channel(STREAM_QUEUE);
    tokio::spawn(answer.stream(out));
    let body = HttpBody::from_stream(ReceiverStream::new(queue).map(Ok::<_, std::convert::Infallible>));
    Ok(([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response())
}

async fn tokenize(State(service): State<Service>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let ask: Tokenize = parse(&body)?;
    service.check_model(ask.model.as_deref())?;
    let (prompt, special) = match (ask.prompt, ask.messages) {
        (Some(prompt), None) => (prompt, true),
        (None, Some(messages)) => {
            let prompt = service.text.chat(
                &messages,
                ask.add_generation_prompt.unwrap_or(true),
                ask.tools.as_ref(),
                ask.chat_template_kwargs.as_ref(),
            );
            (prompt.map_err(|e| ApiError::bad("messages", e))?, false)
        }
        _ => return Err(ApiError::bad("prompt", "either prompt or messages is needed")),
    };
    let tokens = service
        .text
        .encode(&prompt, ask.add_special_tokens.unwrap_or(special))
        .map_err(|e| ApiError::bad("prompt", e))?;
    let names: Option<Vec<_>> =
        (ask.return_token_strs == Some(true)).then(|| tokens.iter().map(|t| service.text.name(*t)).collect());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": service.scheduler.limits.positions,
        "tokens": tokens,
        "token_strs": names,
    })))
}

async fn detokenize(State(service): State<Service>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let ask: Detokenize = parse(&body)?;
    service.check_model(ask.model.as_deref())?;
    let vocab = service.model.config.vocab as u32;
    if let Some(token) = ask.tokens.iter().find(|t| **t >= vocab) {
        return Err(ApiError::bad(
            "tokens",
            format!("token id {token} is not within the vocabulary of {vocab}"),
        ));
    }
    Ok(Json(json!({ "prompt": service.text.decode(&ask.tokens, false) })))
}

/// Healthy as long as somebody computes.
async fn health(State(service): State<Service>) -> Result<StatusCode, ApiError> {
    if service.scheduler.stats.ended.load(Ordering::Relaxed) {
        return Err(ApiError::busy("the engine has stopped computing; its log says why"));
    }
    Ok(StatusCode::OK)
}

async fn models(State(service): State<Service>) -> Json<Value> {
    let cards: Vec<_> = service
        .names
        .iter()
        .map(|name| {
            json!({
                "id": name,
                "object": "model",
                "created": service.started,
                "owned_by": "kvxfer",
                "root": name,
                "parent": null,
                "max_model_len": service.scheduler.limits.positions,
                "permission": [],
            })
        })
        .collect();
    Json(json!({ "object": "list", "data": cards }))
}

/// Prometheus' text format; the agent's own metrics follow.
async fn metrics(State(service): State<Service>) -> Response {
    let stats = &service.scheduler.stats;
    let mut rows = vec![
        ("requests_waiting", "gauge", stats.waiting.load(Ordering::Relaxed) as u64),
        ("sequences_running", "gauge", stats.running.load(Ordering::Relaxed) as u64),
        ("cache_tokens_reserved", "gauge", stats.reserved.load(Ordering::Relaxed) as u64),
        ("cache_tokens", "gauge", service.scheduler.limits.cache_tokens as u64),
        ("prompt_tokens_total", "counter", stats.prompt_tokens.load(Ordering::Relaxed)),
        ("generated_tokens_total", "counter", stats.generated_tokens.load(Ordering::Relaxed)),
        ("texts_finished_total", "counter", stats.finished.load(Ordering::Relaxed)),
        ("clients_gone_total", "counter", stats.gone.load(Ordering::Relaxed)),
    ];
    if let Some(outbox) = &service.outbox {
        let sent = outbox.counters();
        rows.push(("kv_requests_sent_total", "counter", sent.requests.load(Ordering::Relaxed)));
        rows.push(("kv_requests_failed_total", "counter", sent.failed.load(Ordering::Relaxed)));
        rows.push(("kv_bytes_sent_total", "counter", sent.bytes.load(Ordering::Relaxed)));
    }
    if let Some(inbox) = &service.inbox {
        let pages = inbox.pages();
        rows.push(("kv_tokens_asked_total", "counter", inbox.counters().asked.load(Ordering::Relaxed)));
        rows.push(("kv_tokens_hit_total", "counter", inbox.counters().hits.load(Ordering::Relaxed)));
        rows.push(("kv_pages_free", "gauge", pages.free.into()));
        rows.push(("kv_pages_published", "gauge", pages.published.into()));
        rows.push(("kv_pages", "gauge", pages.pages.into()));
    }
    let mut text = String::new();
    for (name, kind, value) in rows {
        let _ = writeln!(text, "# TYPE kvxfer_engine_{name} {kind}\nkvxfer_engine_{name} {value}");
    }
    if let Some(agent) = &service.agent {
        text.push_str(&agent.metrics());
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

impl Service {
    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if !self.names.iter().any(|n| n == name) => Err(ApiError {
                status: StatusCode::NOT_FOUND,
                message: format!("The model `{name}` does not exist; this instance serves {:?}.", self.names),
                param: Some("model"),
            }),
            _ => Ok(()),
        }
    }
}

fn parse<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad(None, format!("the body is not a valid request: {e}")))
}

fn random_id() -> String {
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        bytes = std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos()).to_le_bytes();
    }
    hex(&bytes)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs())
}
