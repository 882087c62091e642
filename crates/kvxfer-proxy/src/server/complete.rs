//! `POST /v1/completions` and `/v1/chat/completions`: a request's legs run side by side, and their answers leave as one.
//!
//! Nothing is spawned: the legs are futures inside the answer, so a client that goes away takes them along. A stream's
//! status line waits for the first piece, so whatever fails before that is an ordinary error.

use super::App;
use super::emit::{self, Emitter};
use super::leg::{Decoding, LegRun, Start};
use super::reply::{error_response, json_response};
use super::trace::Trace;
use crate::openai::{
    ApiError, EVENT_STREAM, Endpoint, FirstToken, Identity, Leg, LegAnswer, LegProgress, Limits, Request,
    SseReader, StreamJoin, join_full,
};
use crate::router::Failure;
use crate::stats::TIMING_HEADER;
use crate::upstream::{Trouble, Upstream, broken_off};
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::future::try_join_all;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, timeout, timeout_at};

/// Longest id that is taken over from a client.
const MAX_CLIENT_ID: usize = 128;

/// Serves one request.
pub(crate) async fn complete(app: Arc<App>, endpoint: Endpoint, request: hyper::Request<Body>) -> Response {
    let came = app.now();
    let settings = app.settings();
    let (head, body) = request.into_parts();
    let body = match whole_body(&head.headers, body, settings.limits.body, settings.deadlines.body).await {
        Ok(body) => body,
        Err(error) => return refused(&app, endpoint, came, &error),
    };
    let limits = Limits {
        max_prompts: settings.limits.prompts,
        max_prompt_tokens: settings.limits.prompt_tokens,
        chats: settings.chats,
    };
    let request = match Request::parse(endpoint, body, &limits) {
        Ok(request) => Arc::new(request),
        Err(error) => return refused(&app, endpoint, came, &error),
    };
    let id = client_id(&head.headers, &request).unwrap_or_else(|| app.new_id());
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let identity = Identity { id: endpoint.id(&id), created };
    let trace = Trace::new(&app, id.clone(), endpoint, request.stream(), came);
    let by = Instant::now() + settings.deadlines.request;
    let headers = Arc::new(app.forwarded(&head.headers));
    let mut response = if request.stream() {
        streamed(&app, &trace, request, headers, &identity, by).await
    } else {
        in_one_piece(&app, &trace, &request, &headers, &identity, by).await
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    response
}

/// A request that never got as far as a leg.
fn refused(app: &Arc<App>, endpoint: Endpoint, came: kvxfer_proto::Time, error: &ApiError) -> Response {
    let trace = Trace::new(app, String::new(), endpoint, false, came);
    trace.ended(error.status, Some(&error.message));
    error_response(error)
}

async fn whole_body(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    deadline: Duration,
) -> Result<Bytes, ApiError> {
    let too_large =
        || ApiError::new(413, format!("The body has more than {limit} bytes, the most this proxy takes."));
    let declared =
        headers.get(hyper::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|len| len > limit as u64) {
        return Err(too_large());
    }
    match timeout(deadline, Limited::new(body, limit).collect()).await {
        Err(_) => Err(ApiError::new(408, format!("The body did not arrive within {deadline:?}."))),
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(ApiError::new(400, format!("The body broke off: {e}."))),
    }
}

/// The id a client chose, where it can stand in a header and a log.
fn client_id(headers: &HeaderMap, request: &Request) -> Option<String> {
    let header = headers.get("x-request-id").and_then(|v| v.to_str().ok()).map(str::to_owned);
    header.or_else(|| request.request_id()).filter(|id| {
        !id.is_empty() && id.len() <= MAX_CLIENT_ID && id.bytes().all(|b| (0x21..0x7f).contains(&b))
    })
}

/// The answer in one piece.
async fn in_one_piece(
    app: &Arc<App>,
    trace: &Arc<Trace>,
    request: &Arc<Request>,
    headers: &Arc<HeaderMap>,
    identity: &Identity,
    by: Instant,
) -> Response {
    let legs = (0..request.prompts()).map(|index| leg_in_one_piece(app, trace, request, headers, index, by));
    let joined = match timeout_at(by, try_join_all(legs)).await {
        Err(_) => Err(took_too_long(app)),
        Ok(Err(error)) => Err(error),
        Ok(Ok(parts)) => {
            let answers: Vec<LegAnswer<'_>> = parts
                .iter()
                .map(|(leg, first, decoder)| LegAnswer {
                    leg,
                    first: first.as_ref(),
                    decoder: decoder.as_deref(),
                })
                .collect();
            join_full(request, identity, &answers).map(|body| {
                let tokens = completion_tokens(&body);
                (body, tokens)
            })
        }
    };
    match joined {
        Ok((body, tokens)) => {
            trace.output_tokens(tokens);
            trace.ended(200, None);
            let mut response = json_response(StatusCode::OK, body);
            timing(&mut response, trace);
            response
        }
        Err(error) => {
            trace.ended(error.status, Some(&error.message));
            let mut response = error_response(&error);
            timing(&mut response, trace);
            response
        }
    }
}

type Part = (Leg, Option<FirstToken>, Option<Bytes>);

async fn leg_in_one_piece(
    app: &Arc<App>,
    trace: &Arc<Trace>,
    request: &Arc<Request>,
    headers: &Arc<HeaderMap>,
    index: usize,
    by: Instant,
) -> Result<Part, ApiError> {
    let (mut run, start, leg) =
        LegRun::start(app, trace, Arc::clone(request), Arc::clone(headers), index).await?;
    let first = match start {
        Start::Finished(first) => return Ok((leg, Some(first), None)),
        Start::Continue(first) => Some(first),
        Start::Whole => None,
    };
    run.wait_for_cache().await;
    loop {
        let Decoding { response, at, decoder } = run.decode(first.as_ref()).await?;
        let body = Upstream::whole(&decoder, response.into_body(), run.answer_limit(), by);
        match run.place.unless_lost(&decoder.name, body).await {
            Ok(body) => {
                run.decoded();
                return Ok((leg, first, Some(body)));
            }
            // Nothing of it has left: another decoder may do it all.
            Err(trouble) => {
                if !run.decode_broke(at, &trouble, false) {
                    return Err(super::leg::error_of(&trouble));
                }
            }
        }
    }
}

/// The answer as a stream of events.
async fn streamed(
    app: &Arc<App>,
    trace: &Arc<Trace>,
    request: Arc<Request>,
    headers: Arc<HeaderMap>,
    identity: &Identity,
    by: Instant,
) -> Response {
    let join = Arc::new(Mutex::new(StreamJoin::new(&request, identity)));
    let mut pieces = emit::stream({
        let (app, trace) = (Arc::clone(app), Arc::clone(trace));
        move |out: Emitter<Result<Bytes, ApiError>>| async move {
            let legs = request.prompts();
            let work = async {
                if legs == 1 {
                    return leg_streamed(&app, &trace, request, headers, 0, &join, &out).await;
                }
                let all = (0..legs).map(|index| {
                    leg_streamed(&app, &trace, Arc::clone(&request), Arc::clone(&headers), index, &join, &out)
                });
                try_join_all(all).await.map(|_| ())
            };
            let ended = timeout_at(by, work).await.unwrap_or_else(|_| Err(took_too_long(&app)));
            match ended {
                Ok(()) => {
                    let mut last = Vec::with_capacity(256);
                    join.lock().finish(&mut last);
                    trace.ended(200, None);
                    out.emit(Ok(last.into())).await;
                }
                Err(error) => {
                    trace.ended(error.status, Some(&error.message));
                    out.emit(Err(error)).await;
                }
            }
        }
    });
    // Nothing is promised before there is something to send.
    let first = match pieces.next().await {
        Some(Ok(piece)) => piece,
        Some(Err(error)) => {
            let mut response = error_response(&error);
            timing(&mut response, trace);
            return response;
        }
        None => return error_response(&ApiError::new(500, "The request ended without an answer.")),
    };
    let rest = pieces.map(|piece| {
        Ok::<_, Infallible>(piece.unwrap_or_else(|error| {
            let mut out = Vec::with_capacity(256);
            error.write_events(&mut out);
            out.into()
        }))
    });
    let mut response = Response::new(Body::from_stream(stream::once(async { Ok(first) }).chain(rest)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // What stands between here and the client must not collect the pieces.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    timing(&mut response, trace);
    response
}

async fn leg_streamed(
    app: &Arc<App>,
    trace: &Arc<Trace>,
    request: Arc<Request>,
    headers: Arc<HeaderMap>,
    index: usize,
    join: &Mutex<StreamJoin>,
    out: &Emitter<Result<Bytes, ApiError>>,
) -> Result<(), ApiError> {
    // Boxed, like the asking below: what only the beginning needs must not lie in memory as long as the stream lasts.
    let (mut run, start, leg) = Box::pin(LegRun::start(app, trace, request, headers, index)).await?;
    let mut bytes = Vec::with_capacity(512);
    let first = match start {
        Start::Finished(first) => {
            join.lock().finished(&leg, &first, &mut bytes);
            send(trace, join, out, bytes).await;
            return Ok(());
        }
        Start::Continue(first) => {
            join.lock().first(&leg, &first, &mut bytes);
            send(trace, join, out, bytes).await;
            Some(first)
        }
        Start::Whole => None,
    };
    drop(leg);
    run.wait_for_cache().await;
    loop {
        let decoding = Box::pin(run.decode(first.as_ref())).await?;
        let (at, decoder) = (decoding.at, Arc::clone(&decoding.decoder));
        let mut passed_on = false;
        match follow(&mut run, decoding, trace, join, out, &mut passed_on).await {
            Ok(()) => return Ok(()),
            Err(Broke::Engine(error)) => return Err(error),
            Err(Broke::Trouble(trouble)) => {
                if !run.decode_broke(at, &trouble, passed_on) {
                    tracing::warn!(decoder = decoder.name, problem = trouble.text, "a stream broke off");
                    return Err(super::leg::error_of(&trouble));
                }
            }
        }
    }
}

/// Why a decoder's stream did not reach its end.
enum Broke {
    /// The engine said so itself, in an event.
    Engine(ApiError),
    /// It fell silent, closed, or sent what no engine sends.
    Trouble(Trouble),
}

/// Passes a decoder's events on until its stream ends.
async fn follow(
    run: &mut LegRun,
    decoding: Decoding,
    trace: &Trace,
    join: &Mutex<StreamJoin>,
    out: &Emitter<Result<Bytes, ApiError>>,
    passed_on: &mut bool,
) -> Result<(), Broke> {
    let Decoding { response, decoder, .. } = decoding;
    let broken =
        |text: String| Broke::Trouble(Trouble::new(Failure::Broken, format!("{}: {text}", decoder.name)));
    let mut body = response.into_body();
    let mut reader = SseReader::new(run.answer_limit().min(16 << 20));
    let mut done = false;
    loop {
        let next = async {
            match timeout(run.stall(), body.frame()).await {
                Err(_) => {
                    let text = format!("{} sent nothing for {:?}", decoder.name, run.stall());
                    Err(Trouble::new(Failure::TimedOut, text))
                }
                Ok(None) => Ok(None),
                Ok(Some(Ok(frame))) => Ok(Some(frame)),
                Ok(Some(Err(e))) => Err(broken_off(&decoder, &e)),
            }
        };
        let Some(frame) = run.place.unless_lost(&decoder.name, next).await.map_err(Broke::Trouble)? else {
            break;
        };
        let Ok(data) = frame.into_data() else { continue };
        reader.push(&data);
        let mut bytes = Vec::with_capacity(data.len() + 64);
        while let Some(event) = reader.next().map_err(|e| broken(e.to_string()))? {
            if done {
                continue;
            }
            let progress = join.lock().event(&run.leg, &event, &mut bytes);
            match progress {
                Ok(LegProgress::Open) => {}
                Ok(LegProgress::Done) => done = true,
                Err(error) => {
                    if !bytes.is_empty() {
                        *passed_on = true;
                        send(trace, join, out, bytes).await;
                    }
                    // An engine's own word is final; what no engine says is a fault that another may not have.
                    return Err(match error.verbatim {
                        Some(_) => Broke::Engine(error),
                        None => Broke::Trouble(Trouble::new(Failure::Broken, error.message)),
                    });
                }
            }
        }
        if !bytes.is_empty() {
            if !std::mem::replace(passed_on, true) {
                run.decoded();
                run.lighten();
            }
            send(trace, join, out, bytes).await;
        }
        if done {
            drain(body);
            return Ok(());
        }
    }
    reader.finish().map_err(|e| broken(e.to_string()))?;
    Err(broken("the stream ended without [DONE]".to_owned()))
}

/// Reads on to the end, which is due, so that the connection can be used again.
fn drain(mut body: Incoming) {
    if !matches!(body.frame().now_or_never(), Some(None)) {
        tokio::spawn(timeout(Duration::from_secs(1), async move {
            while let Some(Ok(_)) = body.frame().await {}
        }));
    }
}

/// `usage.completion_tokens` of an answer.
fn completion_tokens(body: &[u8]) -> u64 {
    #[derive(serde::Deserialize)]
    struct Answer {
        usage: Option<Usage>,
    }
    #[derive(serde::Deserialize)]
    struct Usage {
        completion_tokens: Option<u64>,
    }
    let answer = serde_json::from_slice::<Answer>(body).ok();
    answer.and_then(|answer| answer.usage?.completion_tokens).unwrap_or(0)
}

async fn send(
    trace: &Trace,
    join: &Mutex<StreamJoin>,
    out: &Emitter<Result<Bytes, ApiError>>,
    bytes: Vec<u8>,
) {
    trace.first_token();
    trace.output_tokens(join.lock().pieces());
    out.emit(Ok(bytes.into())).await;
}

fn took_too_long(app: &App) -> ApiError {
    ApiError::new(504, format!("The request took longer than {:?}.", app.settings().deadlines.request))
}

fn timing(response: &mut Response, trace: &Trace) {
    if let Ok(value) = HeaderValue::from_str(&trace.header()) {
        response.headers_mut().insert(HeaderName::from_static(TIMING_HEADER), value);
    }
}
