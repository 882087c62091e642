//! A client that shows everything it gets.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).expect("text")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// `error.message`, after checking the form of it.
    pub(crate) fn error(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert!(error["type"].is_string() && error["code"].is_u64(), "{body:#}");
        error["message"].as_str().expect("a message").to_owned()
    }

    /// The data of a stream's events, without the last one, which must be `[DONE]`.
    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        let text = self.text();
        let mut data: Vec<&str> = text
            .split("\n\n")
            .filter(|e| !e.is_empty())
            .map(|e| e.strip_prefix("data: ").expect("data"))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|d| serde_json::from_str(d).unwrap_or_else(|e| panic!("{e}: {d}"))).collect()
    }

    /// The text that the events of a stream, or the answer in one piece, put together.
    pub(crate) fn content(&self) -> String {
        let streamed =
            self.headers.get("content-type").is_some_and(|t| t.as_bytes().starts_with(b"text/event-stream"));
        let parts = if streamed { self.events() } else { vec![self.json()] };
        parts
            .iter()
            .flat_map(|part| part["choices"].as_array().expect("choices").clone())
            .filter_map(|choice| {
                let text = &choice["text"];
                let text = if text.is_null() { &choice["delta"]["content"] } else { text };
                let text = if text.is_null() { &choice["message"]["content"] } else { text };
                text.as_str().map(str::to_owned)
            })
            .collect()
    }
}

/// Sends a request on a connection of its own and reads the whole answer.
pub(crate) async fn send(at: SocketAddr, request: Request<Full<Bytes>>) -> Answer {
    let (status, headers, mut body) = open(at, request).await;
    let mut whole = Vec::new();
    while let Some(piece) = timeout(super::PATIENCE, body.frame()).await.expect("in time") {
        whole.extend_from_slice(&piece.expect("readable").into_data().unwrap_or_default());
    }
    Answer { status, headers, body: whole.into() }
}

/// Sends a request and returns when the head of the answer is there. Dropping the body closes the connection.
pub(crate) async fn open(at: SocketAddr, request: Request<Full<Bytes>>) -> (StatusCode, HeaderMap, Opened) {
    let stream = timeout(super::PATIENCE, TcpStream::connect(at)).await.expect("in time").expect("connected");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    let connection = tokio::spawn(async move {
        let _ = connection.await;
    });
    let response =
        timeout(super::PATIENCE, sender.send_request(request)).await.expect("in time").expect("answered");
    let (head, body) = response.into_parts();
    (head.status, head.headers, Opened { body, connection: connection.abort_handle() })
}

/// An answer that is being read.
pub(crate) struct Opened {
    body: hyper::body::Incoming,
    connection: tokio::task::AbortHandle,
}

impl Opened {
    pub(crate) async fn frame(&mut self) -> Option<Result<hyper::body::Frame<Bytes>, hyper::Error>> {
        self.body.frame().await
    }

    /// The next piece of a stream.
    pub(crate) async fn piece(&mut self) -> Option<String> {
        let frame = timeout(super::PATIENCE, self.body.frame()).await.expect("in time")?.expect("readable");
        Some(String::from_utf8(frame.into_data().expect("data").to_vec()).expect("text"))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub(crate) fn request(method: Method, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "proxy")
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .expect("a request")
}

pub(crate) fn with_key(mut request: Request<Full<Bytes>>, key: &str) -> Request<Full<Bytes>> {
    let value = format!("Bearer {key}").parse().expect("a header");
    request.headers_mut().insert("authorization", value);
    request
}

pub(crate) async fn get(at: SocketAddr, path: &str) -> Answer {
    send(at, request(Method::GET, path, Bytes::new())).await
}

pub(crate) async fn post(at: SocketAddr, path: &str, body: &serde_json::Value) -> Answer {
    send(at, request(Method::POST, path, body.to_string())).await
}
