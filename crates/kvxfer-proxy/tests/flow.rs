//! The way of a request through prefiller and decoder, with real sockets: what each engine is sent, and that the client
//! reads what one engine alone would have said.

mod support;

use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;
use support::client::{get, open, post, request};
use support::engine::{Engine, Mood, Tells, answer_to};
use support::{Proxy, one_and_one};

const PROMPT: &str = "Tell me a story about a proxy";

fn ask(stream: bool, tokens: u64) -> Value {
    json!({"model": "m", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": stream, "user": "somebody"})
}

#[tokio::test]
async fn a_completion_is_that_of_one_engine() {
    let (prefiller, decoder, proxy) = one_and_one("").await;
    let answer = post(proxy.at, "/v1/completions", &ask(false, 12)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.content(), answer_to(PROMPT, 12));
    let body = answer.json();
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": PROMPT.len(), "total_tokens": PROMPT.len() + 12, "completion_tokens": 12})
    );
    assert!(body["id"].as_str().expect("an id").starts_with("cmpl-"));
    assert_eq!(body["choices"][0]["finish_reason"], "length");

    let prefill = &prefiller.completions()[0];
    assert_eq!((&prefill["max_tokens"], &prefill["stream"]), (&json!(1), &json!(false)));
    assert_eq!((&prefill["user"], &prefill["temperature"]), (&json!("somebody"), &json!(0)));
    let params = &prefill["kv_transfer_params"];
    assert_eq!(params["ret_first_tok"], json!(true));
    let spec = &params["disagg_spec"];
    assert_eq!(spec["receiver_host"], "127.0.0.1");
    assert_eq!((&spec["receiver_init_port"], &spec["receiver_alloc_port"]), (&json!([7300]), &json!([7400])));
    let decode = &decoder.completions()[0];
    assert_eq!(decode["max_tokens"], json!(11));
    assert_eq!(decode["prompt"].as_array().expect("tokens").len(), PROMPT.len() + 1);
    assert!(decode["kv_transfer_params"].is_null());
}

#[tokio::test]
async fn a_stream_is_that_of_one_engine_and_its_first_token_does_not_wait() {
    let (prefiller, _decoder, proxy) = one_and_one("").await;
    prefiller.tells(Tells::Late(Duration::from_millis(300)));
    let mut body = ask(true, 12);
    body["stream_options"] = json!({"include_usage": true});
    let (status, headers, mut stream) =
        open(proxy.at, request(Method::POST, "/v1/completions", body.to_string())).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(headers["content-type"], "text/event-stream; charset=utf-8");
    assert!(headers["x-kvxfer-timing"].to_str().expect("text").contains("prefill;dur="));
    let first = stream.piece().await.expect("a piece");
    // The cache has not arrived yet, so the decoder cannot have said anything.
    let now = proxy.stats().await;
    assert_eq!((&now["kv"], &now["decode"]), (&json!(1), &json!(0)), "{now:#}");
    assert!(first.contains(&format!("\"text\":\"{}\"", &answer_to(PROMPT, 1))), "{first}");
    let mut rest = String::new();
    while let Some(piece) = stream.piece().await {
        rest += &piece;
    }
    let whole = support::client::Answer { status, headers, body: (first + &rest).into() };
    assert_eq!(whole.content(), answer_to(PROMPT, 12));
    let events = whole.events();
    assert_eq!(events.last().expect("usage")["usage"]["completion_tokens"], json!(12));
    assert!(events.iter().all(|e| e["id"] == events[0]["id"]));
}

#[tokio::test]
async fn chats_go_through_the_template_and_come_back_as_chats() {
    let (prefiller, decoder, proxy) = one_and_one("").await;
    let messages = json!([{"role": "system", "content": "Be short"}, {"role": "user", "content": "Hello"}]);
    let expected = answer_to("Be short|Hello", 9);
    let body = json!({"model": "m", "messages": messages, "max_completion_tokens": 9, "temperature": 0});
    let answer = post(proxy.at, "/v1/chat/completions", &body).await;
    assert_eq!(answer.content(), expected, "{}", answer.text());
    assert_eq!(answer.json()["object"], "chat.completion");
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let answer = post(proxy.at, "/v1/chat/completions", &streamed).await;
    assert_eq!(answer.content(), expected, "{}", answer.text());
    assert!(answer.events().iter().all(|e| e["object"] == "chat.completion.chunk"));
    assert!(prefiller.seen().iter().any(|(path, _)| path == "/tokenize"));
    assert_eq!(
        decoder.completions()[0]["prompt"].as_array().expect("tokens").len(),
        "Be short|Hello".len() + 1
    );
}

#[tokio::test]
async fn prompts_come_in_every_form() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    let tokens: Vec<u32> = PROMPT.bytes().map(u32::from).collect();
    let other: Vec<u32> = "other".bytes().map(u32::from).collect();
    let (one, two) = (answer_to(PROMPT, 5), answer_to("other", 5));
    for (prompt, expected) in [
        (json!(PROMPT), one.clone()),
        (json!(tokens), one.clone()),
        (json!([PROMPT, "other"]), one.clone() + &two),
        (json!([tokens, other]), one.clone() + &two),
    ] {
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 5, "temperature": 0});
        let answer = post(proxy.at, "/v1/completions", &body).await;
        assert_eq!(answer.content(), expected, "{}", answer.text());
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let answer = post(proxy.at, "/v1/completions", &streamed).await;
        let mut texts = [String::new(), String::new()];
        for event in answer.events() {
            let choice = &event["choices"][0];
            texts[choice["index"].as_u64().expect("an index") as usize] +=
                choice["text"].as_str().expect("text");
        }
        assert_eq!(texts.concat(), expected);
    }
}

#[tokio::test]
async fn every_rank_has_to_arrive() {
    for tells in [Tells::Plain, Tells::Ready, Tells::Noise] {
        let prefiller = Engine::start();
        let decoder = Engine::start().ranks(2);
        let proxy = Proxy::start(&[&prefiller], &[&decoder], "").await;
        prefiller.notify(proxy.notify).await;
        prefiller.tells(tells.clone());
        let answer = post(proxy.at, "/v1/completions", &ask(true, 6)).await;
        assert_eq!(answer.content(), answer_to(PROMPT, 6), "{tells:?}");
        let metrics = get(proxy.at, "/metrics").await.text();
        assert!(!metrics.contains("fallbacks_total{"), "{tells:?}: {metrics}");
    }
}

#[tokio::test]
async fn mp_mode_hears_of_stored_requests_by_telemetry() {
    let (prefiller, _decoder, proxy) = one_and_one("kv: mp\n").await;
    let asked = tokio::spawn(async move { post(proxy.at, "/v1/completions", &ask(false, 6)).await });
    let id = loop {
        if let Some(headers) = prefiller.headers().first() {
            break headers["x-request-id"].to_str().expect("text").to_owned();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert!(prefiller.completions()[0]["kv_transfer_params"]["disagg_spec"].is_null());
    let event = |ids: Value, rank: u32| json!({"event": "request_store_finished", "request_ids_set": ids, "model_name": "m", "world_size": 2, "kv_rank": rank});
    let stored = format!("cmpl-{id}-0-1f2e3d4c");
    let answer = post(proxy.at, "/api/v1/telemetry", &event(json!([stored, "strange"]), 0)).await;
    assert_eq!(answer.json(), json!({"status": "ok", "notified": 1, "total": 2}));
    assert!(!asked.is_finished());
    post(proxy.at, "/api/v1/telemetry", &event(json!([stored]), 1)).await;
    assert_eq!(asked.await.expect("no panic").content(), answer_to(PROMPT, 6));
    assert_eq!(post(proxy.at, "/api/v1/telemetry", &json!([1])).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_clients_id_is_kept_and_never_used_twice_towards_engines() {
    let (prefiller, decoder, proxy) = one_and_one("").await;
    for _ in 0..2 {
        let mut asked = request(Method::POST, "/v1/completions", ask(false, 4).to_string());
        asked.headers_mut().insert("x-request-id", "mine".parse().expect("a header"));
        asked.headers_mut().insert("authorization", "Bearer sk-client".parse().expect("a header"));
        let answer = support::client::send(proxy.at, asked).await;
        assert_eq!(answer.headers["x-request-id"], "mine");
        assert_eq!(answer.json()["id"], "cmpl-mine");
    }
    let mut ids: Vec<String> = prefiller
        .headers()
        .iter()
        .chain(&decoder.headers())
        .map(|h| {
            assert_eq!(h["authorization"], "Bearer sk-client");
            h["x-request-id"].to_str().expect("text").to_owned()
        })
        .collect();
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), all), (4, 4));
}

#[tokio::test]
async fn models_and_tokens_are_asked_of_an_engine() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    assert_eq!(get(proxy.at, "/v1/models").await.json()["data"][0]["id"], "m");
    let tokens = post(proxy.at, "/tokenize", &json!({"model": "m", "prompt": "abc"})).await;
    assert_eq!(tokens.json()["tokens"], json!([97, 98, 99]));
}

#[tokio::test]
async fn one_token_is_one_token() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    for stream in [false, true] {
        let answer = post(proxy.at, "/v1/completions", &ask(stream, 1)).await;
        assert_eq!(answer.content(), answer_to(PROMPT, 1));
    }
}

#[tokio::test]
async fn the_prefillers_last_word_ends_the_answer_and_the_cache_is_used_up() {
    let (prefiller, decoder, proxy) = one_and_one("").await;
    let end = json!({
        "id": "x", "object": "text_completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": null, "stop_reason": null}],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
        "kv_transfer_params": {"first_tok": 2},
    });
    prefiller.mood(Mood::Says(end.to_string()));
    let answer = post(proxy.at, "/v1/completions", &ask(true, 10)).await;
    assert_eq!(answer.content(), "");
    assert_eq!(answer.events()[0]["choices"][0]["finish_reason"], "stop");
    // The decoder gets one request, whose answer goes to nobody.
    for _ in 0..2000 {
        if !decoder.completions().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(decoder.completions()[0]["max_tokens"], json!(1));
}
