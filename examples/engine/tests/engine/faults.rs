//! Clients, decoders and pools that are not there when they are needed.

use crate::harness::{CHUNK, Instance, Pull, completion, prompt, request, spec};
use serde_json::json;
use std::io::Write;
use std::net::{TcpListener, TcpStream};

/// Slow enough that something can happen in the middle of a prompt.
const SLOW: &[&str] = &["--max-num-batched-tokens", "16", "--max-num-seqs", "16"];

fn decoder(port: u16, more: &[&str]) -> Instance {
    Instance::start(&[&["--role", "decode", "--kv-port", &port.to_string()], more].concat(), &[])
}

fn prefiller(proxy: &Pull, more: &[&str]) -> Instance {
    let port = proxy.port.to_string();
    Instance::start(
        &[&["--role", "prefill", "--proxy-port", &port, "--kv-timeout", "20"], more].concat(),
        &[],
    )
}

/// Starts a request and returns while its prompt is being computed.
fn begin(prefiller: &Instance, prompt: &[u32], id: &str, kv_port: u16) -> TcpStream {
    let mut body = completion(prompt, 1, &json!({}));
    body["kv_transfer_params"] = spec(id, kv_port);
    let mut socket = TcpStream::connect(("127.0.0.1", prefiller.port)).unwrap();
    socket.write_all(request("/v1/completions", &body.to_string()).as_bytes()).unwrap();
    socket
}

/// The request has its pages, so its chunks are being written.
fn wait_granted(decoder: &Instance) {
    let pages = decoder.metric("kv_pages");
    decoder.wait_metric("kv_pages_free", |free| free < pages);
}

#[test]
fn a_decoder_killed_under_a_prefill() {
    let proxy = Pull::bind();
    let mut first = decoder(0, &[]);
    let (prefiller, port) = (prefiller(&proxy, SLOW), first.kv_port);
    let long = prompt(1, 3000);
    let socket = begin(&prefiller, &long, "lost", port);
    wait_granted(&first);
    first.kill();
    let (code, retryable) = proxy.failed("lost");
    assert!(code == "peer_gone" && retryable, "{code}");
    drop(socket);

    // The prefiller serves on, and the decoder's successor is found without a restart.
    let second = decoder(port, &[]);
    let short = prompt(2, 100);
    let token = prefiller.prefill(&short, "kept", port, &json!({}));
    proxy.ready("kept");
    let rest = second.tokens(&[&short[..], &[token]].concat(), 9, &json!({}));
    assert_eq!([vec![token], rest].concat(), prefiller.tokens(&short, 10, &json!({})));
    second.wait_log("Retrieved 100 of 101 tokens");
}

#[test]
fn chunks_travel_while_the_prompt_is_computed() {
    let proxy = Pull::bind();
    let (decoder, prefiller) = (decoder(0, &[]), prefiller(&proxy, SLOW));
    let _socket = begin(&prefiller, &prompt(1, 6000), "overlap", decoder.kv_port);
    // Complete and checked at the decoder, while most of the prompt is still to be computed.
    decoder.wait_metric("kv_pages_published", |n| n >= 2);
    assert_eq!(prefiller.metric("sequences_running"), 1);
    proxy.ready("overlap");
    assert_eq!(decoder.metric("kv_pages_published"), 6000_u64.div_ceil(CHUNK as u64));
}

#[test]
fn a_client_that_goes_during_the_prefill() {
    let proxy = Pull::bind();
    let (decoder, prefiller) = (decoder(0, &[]), prefiller(&proxy, SLOW));
    let socket = begin(&prefiller, &prompt(1, 6000), "gone", decoder.kv_port);
    wait_granted(&decoder);
    drop(socket);
    assert_eq!(proxy.failed("gone").0, "cancelled");
    prefiller.wait_metric("sequences_running", |n| n == 0);
    prefiller.wait_metric("cache_tokens_reserved", |n| n == 0);
    assert_eq!(prefiller.metric("clients_gone_total"), 1);
    let pages = decoder.metric("kv_pages");
    decoder.wait_metric("kv_pages_free", |free| free == pages);
}

#[test]
fn a_decoder_that_is_not_there() {
    let proxy = Pull::bind();
    let prefiller = prefiller(&proxy, &["--kv-timeout", "2"]);
    // A port that nobody listens on: bound, but never accepted from.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let expected = prefiller.tokens(&prompt(1, 80), 1, &json!({}));
    let token = prefiller.prefill(&prompt(1, 80), "nowhere", closed, &json!({}));
    assert_eq!(vec![token], expected, "the answer does not depend on the cache's fate");
    assert_eq!(proxy.failed("nowhere"), ("unreachable".to_owned(), true));
}

#[test]
fn a_pool_that_is_too_small() {
    let proxy = Pull::bind();
    // Two pages.
    let bytes = (2 * 2 * 2 * CHUNK * 32 * 4).to_string();
    let (decoder, prefiller) = (decoder(0, &["--kv-buffer", &bytes]), prefiller(&proxy, &[]));
    assert_eq!(decoder.metric("kv_pages"), 2);
    let long = prompt(1, 3 * CHUNK);
    let token = prefiller.prefill(&long, "large", decoder.kv_port, &json!({}));
    assert_eq!(proxy.failed("large"), ("too_large".to_owned(), false));
    // The decoder computes the prompt itself, and says the same.
    let rest = decoder.tokens(&[&long[..], &[token]].concat(), 9, &json!({}));
    assert_eq!([vec![token], rest].concat(), prefiller.tokens(&long, 10, &json!({})));
    decoder.wait_log("Retrieved 0 of 97 tokens");
    // What fits still goes.
    prefiller.prefill(&prompt(2, CHUNK), "fits", decoder.kv_port, &json!({}));
    proxy.ready("fits");
}

#[test]
fn a_client_that_goes_while_its_text_is_written() {
    let single = Instance::start(&[], &[]);
    let body = completion(&prompt(1, 20), 8000, &json!({"stream": true, "ignore_eos": true}));
    let mut socket = TcpStream::connect(("127.0.0.1", single.port)).unwrap();
    socket.write_all(request("/v1/completions", &body.to_string()).as_bytes()).unwrap();
    single.wait_metric("sequences_running", |n| n == 1);
    drop(socket);
    single.wait_metric("sequences_running", |n| n == 0);
    assert_eq!(single.metric("cache_tokens_reserved"), 0);
}

#[test]
fn more_requests_than_may_wait() {
    let single = Instance::start(&["--max-num-seqs", "1", "--max-queue", "1"], &[]);
    let body = completion(&prompt(1, 20), 8000, &json!({"stream": true, "ignore_eos": true}));
    let occupy = || {
        let mut socket = TcpStream::connect(("127.0.0.1", single.port)).unwrap();
        socket.write_all(request("/v1/completions", &body.to_string()).as_bytes()).unwrap();
        socket
    };
    let running = occupy();
    single.wait_metric("sequences_running", |n| n == 1);
    let waiting = occupy();
    single.wait_metric("requests_waiting", |n| n == 1);
    let reply = single.post_text("/v1/completions", &completion(&prompt(2, 5), 4, &json!({})).to_string());
    assert_eq!(reply.status, 503, "{}", reply.body);
    assert!(reply.head.contains("retry-after: "), "{}", reply.head);
    drop((running, waiting));
    single.wait_metric("requests_waiting", |n| n == 0);
    assert_eq!(single.tokens(&prompt(2, 5), 4, &json!({})).len(), 4);
}
