//! The upstream of canned responses: tokenizer, prefiller, decoder and the notifier of caches in one.
//!
//! Token `i` of an answer is the text ` t<i>`, so whoever reads an answer can tell whether every token is there and in
//! order. A prefill is told from a decode by its `disagg_spec`; its notification goes out before its answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use crate::Result;
use crate::http::{Connection, find};
use crate::load::Pace;

pub(crate) struct Upstream {
    address: SocketAddr,
    /// Milliseconds between two tokens.
    pace: AtomicU64,
    tokenized: Vec<u8>,
    prefilled: Vec<u8>,
    /// The connection to the proxy's notification socket.
    notifier: Mutex<Option<TcpStream>>,
}

impl Upstream {
    /// Starts serving on a free port.
    pub(crate) async fn start(prompt_tokens: usize) -> Result<Arc<Self>> {
        let listener = TcpListener::bind(crate::any_port()).await?;
        let tokens: Vec<u32> = (0..prompt_tokens as u32).map(|i| 1000 + i * 7).collect();
        let tokenized = serde_json::json!({"count": prompt_tokens, "max_model_len": 32768, "tokens": tokens, "token_strs": null});
        let prefilled = serde_json::json!({"id": "cmpl-prefill", "object": "text_completion", "created": 1, "model": "bench",
            "choices": [{"index": 0, "text": " t0", "logprobs": null, "finish_reason": "length", "stop_reason": null,
                "token_ids": null, "prompt_logprobs": null, "prompt_token_ids": null, "routed_experts": null}],
            "service_tier": null, "system_fingerprint": null,
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 1, "completion_tokens": 1,
                "prompt_tokens_details": null, "completion_tokens_details": null},
            "kv_transfer_params": {"first_tok": 7}, "ec_transfer_params": null, "metrics": null});
        let upstream = Arc::new(Self {
            address: listener.local_addr()?,
            pace: AtomicU64::new(0),
            tokenized: answer(&tokenized.to_string()),
            prefilled: answer(&prefilled.to_string()),
            notifier: Mutex::new(None),
        });
        let serving = Arc::clone(&upstream);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = Arc::clone(&serving);
                tokio::spawn(async move {
                    // A proxy that goes away is none of the upstream's trouble.
                    let _ = upstream.serve(stream).await;
                });
            }
        });
        Ok(upstream)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set_pace(&self, pace: Pace) {
        self.pace.store(pace.milliseconds(), Ordering::Relaxed);
    }

    /// Connects to a proxy's PULL socket, as `LMCache`'s PUSH sockets do.
    pub(crate) async fn notify(&self, proxy: SocketAddr) -> Result<()> {
        *self.notifier.lock().await = Some(push_socket(proxy).await?);
        Ok(())
    }

    /// Lets go of the proxy.
    pub(crate) async fn forget(&self) {
        *self.notifier.lock().await = None;
    }

    async fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut connection = Connection::new(stream)?;
        let mut body = Vec::new();
        while let Some(head) = connection.head().await? {
            body.clear();
            connection.body(&head, |piece| body.extend_from_slice(piece)).await?;
            match head.second() {
                "/tokenize" => connection.write(&self.tokenized).await?,
                "/v1/completions" => self.complete(&mut connection, &body).await?,
                "/v1/models" => connection.write(&answer(MODELS)).await?,
                // What asks for health gets it; the rest is not asked for here.
                _ => connection.write(&answer("{}")).await?,
            }
        }
        Ok(())
    }

    async fn complete(&self, connection: &mut Connection, body: &[u8]) -> std::io::Result<()> {
        if let Some(id) = text_after(body, b"\"req_id\"") {
            if let Some(socket) = self.notifier.lock().await.as_mut() {
                socket.write_all(&notification(id)).await?;
            }
            return connection.write(&self.prefilled).await;
        }
        let tokens = number_after(body, b"\"max_tokens\"").unwrap_or(16);
        if find(body, b"\"stream\":true").is_none() && find(body, b"\"stream\": true").is_none() {
            let text = crate::load::text(1..tokens + 1);
            let whole = serde_json::json!({"id": "cmpl-decode", "object": "text_completion", "created": 2, "model": "bench",
                "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": "length", "stop_reason": null}],
                "usage": {"prompt_tokens": 9, "total_tokens": 9 + tokens, "completion_tokens": tokens}});
            return connection.write(&answer(&whole.to_string())).await;
        }
        connection
            .write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
            .await?;
        for i in 1..=tokens {
            let pace = self.pace.load(Ordering::Relaxed);
            if pace > 0 {
                tokio::time::sleep(Duration::from_millis(pace)).await;
            }
            let finish = if i == tokens { "\"length\"" } else { "null" };
            let event = format!(
                "data: {{\"id\":\"cmpl-decode\",\"object\":\"text_completion\",\"created\":2,\"model\":\"bench\",\
                 \"choices\":[{{\"index\":0,\"text\":\" t{i}\",\"logprobs\":null,\"finish_reason\":{finish},\
                 \"stop_reason\":null,\"prompt_token_ids\":null,\"token_ids\":null}}]}}\n\n"
            );
            connection.write(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
        }
        connection.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await
    }
}

const MODELS: &str = r#"{"object":"list","data":[{"id":"bench","object":"model","created":1,"owned_by":"bench","max_model_len":32768}]}"#;

/// A whole answer of status 200.
fn answer(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The JSON string behind a key.
pub(crate) fn text_after<'a>(body: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let rest = &body[find(body, key)? + key.len()..];
    let start = rest.iter().position(|b| *b == b'"')? + 1;
    let end = start + rest[start..].iter().position(|b| *b == b'"')?;
    Some(&rest[start..end])
}

fn number_after(body: &[u8], key: &[u8]) -> Option<usize> {
    let rest = &body[find(body, key)? + key.len()..];
    let digits: String = rest
        .iter()
        .skip_while(|b| !b.is_ascii_digit())
        .take_while(|b| b.is_ascii_digit())
        .map(|b| *b as char)
        .collect();
    digits.parse().ok()
}

/// `LMCache`'s `ProxyNotif` as one frame of ZMTP.
fn notification(id: &[u8]) -> Vec<u8> {
    let mut payload = b"\x82\xa4type\xaaProxyNotif\xa6req_id\xd9".to_vec();
    payload.push(u8::try_from(id.len()).unwrap_or(u8::MAX));
    payload.extend_from_slice(&id[..id.len().min(255)]);
    let mut frame = vec![0, u8::try_from(payload.len()).unwrap_or(u8::MAX)];
    frame.extend_from_slice(&payload);
    frame
}

/// A ZMTP 3.0 connection of a PUSH socket, past its handshake.
async fn push_socket(address: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut greeting = [0u8; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).await?;
    let mut theirs = [0u8; 64];
    stream.read_exact(&mut theirs).await?;
    let mut ready = b"\x05READY\x0bSocket-Type\0\0\0\x04PUSH".to_vec();
    ready.splice(0..0, [4, ready.len() as u8]);
    stream.write_all(&ready).await?;
    let mut head = [0u8; 2];
    stream.read_exact(&mut head).await?;
    if head[0] != 4 {
        return Err("the notification socket does not speak ZMTP".into());
    }
    let mut command = vec![0u8; head[1].into()];
    stream.read_exact(&mut command).await?;
    Ok(stream)
}
