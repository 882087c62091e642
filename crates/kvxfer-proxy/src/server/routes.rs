//! Every path the proxy answers, and who may ask.

use super::complete::complete;
use super::reply::{error_response, json_response, text_response};
use super::{App, headers_for};
use crate::config::Role;
use crate::metrics::{self, InstanceGauges};
use crate::openai::{ApiError, Endpoint};
use crate::upstream::Upstream;
use crate::{admin, dashboard};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{any, get, post};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Method, StatusCode};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// All of them.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(health))
        .route("/ping", get(health))
        .route("/metrics", get(prometheus))
        .route("/stats", get(stats))
        .route("/api/v1/telemetry", post(telemetry))
        .route("/dashboard", get(dashboard::page));
    let for_clients = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(pass_on))
        .route("/v1/models/{model}", get(pass_on))
        .route("/version", get(pass_on))
        .route("/tokenize", post(pass_on))
        .route("/detokenize", post(pass_on))
        .route_layer(middleware::from_fn_with_state(Arc::clone(app), known));
    open.merge(for_clients)
        .merge(admin::routes(app))
        .fallback(any(nowhere))
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::clone(app))
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Response {
    complete(app, Endpoint::Completions, request).await
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    complete(app, Endpoint::Chat, request).await
}

/// Lets in who has a key, where keys are asked for.
async fn known(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let settings = app.settings();
    if settings.api_keys.is_empty() {
        return next.run(request).await;
    }
    match bearer(request.headers()) {
        Some(key) if settings.api_keys.iter().any(|known| known.matches(key)) => next.run(request).await,
        given => {
            let problem = if given.is_some() { "is not valid" } else { "is missing" };
            let text = format!("The API key {problem}; send it as `Authorization: Bearer KEY`.");
            error_response(&ApiError::new(401, text))
        }
    }
}

/// What stands behind `Bearer`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let (view, well) = app.with(|router, now| (router.view(now), router.can_serve(now)));
    let usable = |role| view.instances.iter().filter(|i| i.role == role && i.usable).count();
    let status = match (view.ending, well) {
        (true, _) => "ending",
        (false, true) => "ok",
        (false, false) => "no decoder can be used",
    };
    let body = serde_json::json!({
        "status": status,
        "prefillers": usable(Role::Prefiller),
        "decoders": usable(Role::Decoder),
    });
    let code = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json_response(code, body.to_string())
}

async fn prometheus(State(app): State<Arc<App>>) -> Response {
    let view = app.with(|router, now| router.view(now));
    let states = [
        ("queued", view.queued),
        ("admitted", view.admitted),
        ("waiting", view.waiting),
        ("prefill", view.prefill),
        ("kv", view.kv),
        ("decode", view.decode),
    ];
    let instances = view.instances.iter().map(|instance| InstanceGauges {
        name: &instance.name,
        role: instance.role.as_str(),
        up: instance.health != "down",
        usable: instance.usable,
        weight: instance.weight,
        requests: instance.requests,
        tokens: instance.tokens,
        started: instance.started,
        failed: instance.failed,
    });
    let text = app.metrics.encode(&states, instances);
    text_response(StatusCode::OK, metrics::CONTENT_TYPE, text)
}

async fn stats(State(app): State<Arc<App>>) -> Response {
    let (view, now) = app.with(|router, now| (router.view(now), now));
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    json_response(StatusCode::OK, app.stats.snapshot(now, u64::try_from(unix_ms).unwrap_or(0), &view))
}

/// MP mode: an engine tells which requests it has stored.
async fn telemetry(State(app): State<Arc<App>>, request: Request) -> Response {
    #[derive(serde::Deserialize)]
    struct Event {
        #[serde(rename = "event")]
        kind: String,
        #[serde(default)]
        request_ids_set: Vec<String>,
        #[serde(default)]
        world_size: Option<u32>,
        #[serde(default)]
        kv_rank: Option<u32>,
    }
    let refused = |problem: String| {
        tracing::warn!(problem, "skipped a telemetry event");
        app.metrics.bad_message("telemetry");
        error_response(&ApiError::new(400, problem))
    };
    let body = match to_bytes(request.into_body(), 1 << 20).await {
        Ok(body) => body,
        Err(e) => return refused(format!("The event cannot be read: {e}.")),
    };
    let event: Event = match serde_json::from_slice(&body) {
        Ok(event) => event,
        Err(e) => return refused(format!("The event is not one of LMCache's telemetry: {e}.")),
    };
    let mut notified = 0;
    if event.kind == "request_store_finished" {
        let (rank, ranks) = (event.kv_rank.unwrap_or(0), event.world_size.unwrap_or(1));
        for id in &event.request_ids_set {
            let noted = app.with(|router, _| router.note_stored(id, rank, ranks));
            app.count(noted, id);
            notified +=
                u32::from(matches!(noted, crate::router::Noted::Progress | crate::router::Noted::Ready));
        }
    }
    let body =
        serde_json::json!({"status": "ok", "notified": notified, "total": event.request_ids_set.len()});
    json_response(StatusCode::OK, body.to_string())
}

/// What one instance can answer for all: models, version, tokens.
async fn pass_on(State(app): State<Arc<App>>, request: Request) -> Response {
    let settings = app.settings();
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let body = match to_bytes(body, settings.limits.body).await {
        Ok(body) => body,
        Err(e) => return error_response(&ApiError::new(413, format!("The body cannot be read: {e}."))),
    };
    let headers = headers_for(&app.forwarded(&head.headers), &app.new_id());
    let by = Instant::now() + settings.deadlines.tokenize;
    let method = if head.method == Method::HEAD { Method::GET } else { head.method };
    let mut why = "no instance can be used; try again in 2 s".to_owned();
    for _ in 0..3 {
        let Some((id, instance)) = app.with(|router, now| router.anyone(now, Role::Prefiller)) else { break };
        let asked = app.upstream.send(&instance, method.clone(), &path, &headers, body.clone(), by).await;
        let answer = match asked {
            Ok(response) => {
                let (head, body) = response.into_parts();
                Upstream::whole(&instance, body, settings.limits.answer, by).await.map(|body| (head, body))
            }
            Err(trouble) => Err(trouble),
        };
        match answer {
            Ok((head, body)) => {
                let mut response = Response::new(Body::from(body));
                *response.status_mut() = head.status;
                let kind = head.headers.get(CONTENT_TYPE).cloned();
                let kind = kind.unwrap_or(HeaderValue::from_static("application/json"));
                response.headers_mut().insert(CONTENT_TYPE, kind);
                return response;
            }
            Err(trouble) => {
                if trouble.failure == crate::router::Failure::Unreachable {
                    app.with(|router, now| router.probe_failed(now, id, true, &trouble.text));
                }
                app.probes.look_now(id);
                why = trouble.text;
            }
        }
    }
    error_response(&ApiError::new(503, why))
}

async fn nowhere(request: Request) -> Response {
    let text = format!("There is nothing at {} {}.", request.method(), request.uri().path());
    error_response(&ApiError::new(404, text))
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("{} is not possible at {}.", request.method(), request.uri().path());
    error_response(&ApiError::new(405, text))
}
