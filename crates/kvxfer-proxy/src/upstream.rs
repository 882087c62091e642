//! Requests to the instances: one pool of connections, deadlines on everything, and a plain word for what went wrong.

use crate::config::Instance;
use crate::router::Failure;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::error::Error as _;
use std::io;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Idle connections are given up before a vLLM server does so (5 s), which would race with the next request.
const IDLE: Duration = Duration::from_secs(4);

/// Why an instance did not answer.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    pub(crate) failure: Failure,
    pub(crate) text: String,
}

impl Trouble {
    pub(crate) fn new(failure: Failure, text: impl Into<String>) -> Self {
        Self { failure, text: text.into() }
    }
}

/// The HTTP client.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Upstream {
    pub(crate) fn new(connect: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect));
        connector.set_keepalive(Some(Duration::from_secs(30)));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(1024)
            .http1_max_buf_size(32 << 10)
            .build(connector);
        Self { client }
    }

    /// Sends a request and waits for the head of the answer.
    pub(crate) async fn send(
        &self,
        to: &Instance,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
        by: Instant,
    ) -> Result<Response<Incoming>, Trouble> {
        let uri = format!("http://{}{path}", to.authority());
        let mut repeated = false;
        loop {
            let mut request = Request::new(Full::new(body.clone()));
            *request.method_mut() = method.clone();
            *request.uri_mut() = uri.parse().map_err(|e| {
                Trouble::new(Failure::Broken, format!("{}: {uri} is no address: {e}", to.name))
            })?;
            request.headers_mut().clone_from(headers);
            match timeout_at(by, self.client.request(request)).await {
                Err(_) => {
                    return Err(Trouble::new(
                        Failure::TimedOut,
                        format!("{} did not answer in time", to.name),
                    ));
                }
                Ok(Ok(response)) => return Ok(response),
                // An idle connection that the other side closed in this very moment; a new one tells whether it lives.
                Ok(Err(e)) if !repeated && !e.is_connect() => {
                    tracing::debug!(instance = to.name, error = %text_of(&e), "repeating on a new connection");
                    repeated = true;
                }
                Ok(Err(e)) => return Err(classify(to, &e)),
            }
        }
    }

    /// The whole body, at most `limit` bytes.
    pub(crate) async fn whole(
        to: &Instance,
        body: Incoming,
        limit: usize,
        by: Instant,
    ) -> Result<Bytes, Trouble> {
        match timeout_at(by, Limited::new(body, limit).collect()).await {
            Err(_) => {
                Err(Trouble::new(Failure::TimedOut, format!("{} did not finish its answer in time", to.name)))
            }
            Ok(Ok(whole)) => Ok(whole.to_bytes()),
            Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(Trouble::new(
                Failure::Broken,
                format!("{}'s answer has more than {limit} bytes", to.name),
            )),
            Ok(Err(e)) => {
                Err(Trouble::new(Failure::Broken, format!("{} broke off its answer: {e}", to.name)))
            }
        }
    }
}

/// What an error of a started answer means.
pub(crate) fn broken_off(to: &Instance, e: &hyper::Error) -> Trouble {
    Trouble::new(Failure::Broken, format!("{} broke off its answer: {}", to.name, innermost(e)))
}

fn classify(to: &Instance, e: &hyper_util::client::legacy::Error) -> Trouble {
    let text = text_of(e);
    if !e.is_connect() {
        return Trouble::new(
            Failure::Broken,
            format!("{} closed the connection without an answer: {text}", to.name),
        );
    }
    let mut source = e.source();
    let mut cause: Option<&io::Error> = None;
    while let Some(inner) = source {
        cause = inner.downcast_ref::<io::Error>().or(cause);
        source = inner.source();
    }
    // Out of descriptors here says nothing about the other side.
    let ours = cause.and_then(io::Error::raw_os_error).is_some_and(|code| code == 24 || code == 23);
    let failure = match cause.map(io::Error::kind) {
        _ if ours => Failure::Busy,
        Some(io::ErrorKind::TimedOut) => Failure::TimedOut,
        _ => Failure::Unreachable,
    };
    Trouble::new(failure, format!("{} at {} cannot be reached: {text}", to.name, to.authority()))
}

fn text_of(e: &hyper_util::client::legacy::Error) -> String {
    e.source().map_or_else(|| e.to_string(), innermost)
}

fn innermost(e: &(dyn std::error::Error + 'static)) -> String {
    let mut last = e;
    while let Some(inner) = last.source() {
        last = inner;
    }
    last.to_string()
}
