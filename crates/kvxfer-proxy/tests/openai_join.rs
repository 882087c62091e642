//! The joined answer is that of one server: text, tokens, counts, indexes, reasons and framing. The expected bytes
//! are what vLLM 0.32's own response models write.

use bytes::Bytes;
use kvxfer_proxy::openai::{
    ApiError, Endpoint, FirstToken, Identity, Leg, LegAnswer, LegProgress, Limits, Next, Request, SseReader,
    StreamJoin, join_full,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn request(endpoint: Endpoint, body: &Value) -> Request {
    Request::parse(endpoint, Bytes::from(body.to_string()), &Limits::default()).expect("a good request")
}

fn identity(endpoint: Endpoint) -> Identity {
    Identity { id: endpoint.id("r"), created: 5 }
}

/// A prefiller's answer with one token.
fn prefilled(text: &str, finish: &str, extra: &Value) -> Vec<u8> {
    let mut choice = json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish, "stop_reason": null,
        "token_ids": null, "prompt_logprobs": null, "prompt_token_ids": null, "routed_experts": null});
    for (key, value) in extra.as_object().expect("an object") {
        choice[key] = value.clone();
    }
    json!({"id": "cmpl-p", "object": "text_completion", "created": 1, "model": "m", "choices": [choice],
        "service_tier": null, "system_fingerprint": null,
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": null,
            "completion_tokens_details": null},
        "kv_transfer_params": {"first_tok": 9}, "ec_transfer_params": null, "metrics": null})
    .to_string()
    .into_bytes()
}

fn first(request: &Request, leg: &Leg, body: &[u8]) -> FirstToken {
    match leg.after_prefill(request, "prefiller 1", body).expect("readable") {
        Next::Continue(first) | Next::Finished(first) => first,
        Next::Whole(why) => panic!("no first token: {why}"),
    }
}

fn leg(request: &Request, index: usize) -> Leg {
    request.leg(index, vec![1, 2, 3], Some(4096)).expect("a leg")
}

/// A decoder's streamed piece of a completion.
fn piece(text: &str, finish: Option<&str>) -> Value {
    json!({"id": "cmpl-d", "object": "text_completion", "created": 77, "model": "m", "choices": [{"index": 0,
        "text": text, "logprobs": null, "finish_reason": finish, "stop_reason": null, "prompt_token_ids": null,
        "token_ids": null}]})
}

/// Feeds events to one leg of a join.
fn feed(
    join: &mut StreamJoin,
    leg: &Leg,
    events: &[String],
    out: &mut Vec<u8>,
) -> Result<LegProgress, ApiError> {
    let mut reader = SseReader::new(1 << 20);
    let mut progress = LegProgress::Open;
    for event in events {
        reader.push(format!("data: {event}\n\n").as_bytes());
        while let Some(event) = reader.next().expect("good events") {
            progress = join.event(leg, &event, out)?;
        }
    }
    Ok(progress)
}

fn lines(out: &[u8]) -> Vec<&str> {
    let text = std::str::from_utf8(out).expect("text");
    assert!(text.ends_with("\n\n"), "{text:?}");
    text.trim_end().split("\n\n").map(|line| line.strip_prefix("data: ").expect("an event")).collect()
}

#[test]
fn a_completions_stream_reads_as_one_servers() {
    let body = json!({"model": "m", "prompt": "a", "max_tokens": 3, "stream": true, "stream_options": {"include_usage": true}});
    let request = request(Endpoint::Completions, &body);
    let leg = leg(&request, 0);
    let first = first(&request, &leg, &prefilled("Once", "length", &json!({})));
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Completions)), Vec::new());
    join.first(&leg, &first, &mut out);
    let usage = json!({"id": "cmpl-d", "object": "text_completion", "created": 77, "model": "m", "choices": [],
        "usage": {"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2}, "system_fingerprint": "fp"});
    let events = [
        piece(" upon", None).to_string(),
        piece(" a", Some("length")).to_string(),
        usage.to_string(),
        "[DONE]".into(),
    ];
    assert_eq!(feed(&mut join, &leg, &events, &mut out), Ok(LegProgress::Done));
    assert!(join.is_done());
    assert_eq!(join.pieces(), 3);
    join.finish(&mut out);
    assert_eq!(
        lines(&out),
        [
            r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"Once","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}"#,
            r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":" upon","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}"#,
            r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}"#,
            r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[],"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3},"system_fingerprint":"fp"}"#,
            "[DONE]",
        ]
    );
}

#[test]
fn a_chats_stream_reads_as_one_servers() {
    let body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": true,
        "return_token_ids": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let request = request(Endpoint::Chat, &body);
    let leg = leg(&request, 0);
    let first = first(&request, &leg, &prefilled("He\"y", "length", &json!({"token_ids": [9]})));
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Chat)), Vec::new());
    join.first(&leg, &first, &mut out);
    let mut last = piece("!", Some("stop"));
    last["choices"][0]["token_ids"] = json!([10]);
    last["choices"][0]["prompt_token_ids"] = json!([1, 2, 3, 9]);
    last["choices"][0]["stop_reason"] = json!(10);
    last["usage"] = json!({"prompt_tokens": 4, "total_tokens": 5, "completion_tokens": 1});
    let usage = json!({"id": "cmpl-d", "object": "text_completion", "created": 77, "model": "m", "choices": [],
        "usage": {"prompt_tokens": 4, "total_tokens": 5, "completion_tokens": 1}});
    feed(&mut join, &leg, &[last.to_string(), usage.to_string(), "[DONE]".into()], &mut out).expect("fine");
    join.finish(&mut out);
    assert_eq!(
        lines(&out),
        [
            r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":3,"completion_tokens":0},"prompt_token_ids":[1,2,3],"prompt_text":null}"#,
            r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"He\"y"},"logprobs":null,"finish_reason":null,"token_ids":[9]}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}"#,
            r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":"stop","stop_reason":10,"token_ids":[10]}],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}"#,
            r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}"#,
            "[DONE]",
        ]
    );
}

#[test]
fn a_stream_that_ends_with_its_first_token() {
    for (endpoint, body, expected) in [
        (
            Endpoint::Completions,
            json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}}),
            vec![
                r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":7,"prompt_token_ids":null,"token_ids":null}]}"#,
                r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}"#,
                "[DONE]",
            ],
        ),
        (
            Endpoint::Chat,
            json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true}),
            vec![
                r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}"#,
                r#"{"id":"chatcmpl-r","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":7,"token_ids":null}]}"#,
                "[DONE]",
            ],
        ),
    ] {
        let request = request(endpoint, &body);
        let leg = leg(&request, 0);
        let first = first(&request, &leg, &prefilled("", "stop", &json!({"stop_reason": 7})));
        let (mut join, mut out) = (StreamJoin::new(&request, &identity(endpoint)), Vec::new());
        join.finished(&leg, &first, &mut out);
        assert!(join.is_done());
        join.finish(&mut out);
        assert_eq!(lines(&out), expected);
    }
}

#[test]
fn log_probabilities_go_on_where_the_first_token_ends() {
    let lp = |offset: usize, token: &str| json!({"text_offset": [offset], "token_logprobs": [-0.5], "tokens": [token], "top_logprobs": [{token: -0.5}]});
    let body = json!({"prompt": "a", "logprobs": 1, "max_tokens": 3, "stream": true});
    let request = request(Endpoint::Completions, &body);
    let leg = leg(&request, 0);
    let answer = prefilled("né", "length", &json!({"logprobs": lp(0, "né")}));
    let first = first(&request, &leg, &answer);
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Completions)), Vec::new());
    join.first(&leg, &first, &mut out);
    let mut events = Vec::new();
    for (offset, token) in [(0, "e"), (1, "s")] {
        let mut chunk = piece(token, None);
        chunk["choices"][0]["logprobs"] = lp(offset, token);
        events.push(chunk.to_string());
    }
    feed(&mut join, &leg, &events, &mut out).expect("fine");
    let offsets: Vec<Value> = lines(&out)
        .iter()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("json")["choices"][0]["logprobs"]["text_offset"]
                .clone()
        })
        .collect();
    assert_eq!(offsets, [json!([0]), json!([2]), json!([3])], "in characters, as vLLM counts");

    let mut rest: Value = serde_json::from_slice(&prefilled("es", "length", &json!({}))).expect("json");
    rest["choices"][0]["logprobs"] = json!({"text_offset": [0, 1], "token_logprobs": [-1.0, null], "tokens": ["e", "s"],
        "top_logprobs": [{"e": -1.0}, null]});
    let rest = rest.to_string();
    let answers = [LegAnswer { leg: &leg, first: Some(&first), decoder: Some(rest.as_bytes()) }];
    let joined: Value = serde_json::from_slice(
        &join_full(&request, &identity(Endpoint::Completions), &answers).expect("joined"),
    )
    .expect("json");
    assert_eq!(
        joined["choices"][0]["logprobs"],
        json!({"text_offset": [0, 2, 3], "token_logprobs": [-0.5, -1.0, null], "tokens": ["né", "e", "s"],
            "top_logprobs": [{"né": -0.5}, {"e": -1.0}, null]})
    );
}

#[test]
fn whole_answers_read_as_one_servers() {
    let chat_body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3});
    for (endpoint, body, expected) in [
        (
            Endpoint::Completions,
            json!({"prompt": "a", "max_tokens": 3}),
            r#"{"id":"cmpl-r","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"Once upon","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#,
        ),
        (
            Endpoint::Chat,
            chat_body,
            r#"{"id":"chatcmpl-r","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Once upon","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null,"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null}"#,
        ),
    ] {
        let request = request(endpoint, &body);
        let leg = leg(&request, 0);
        let first = first(&request, &leg, &prefilled("Once", "length", &json!({})));
        let mut rest: Value =
            serde_json::from_slice(&prefilled(" upon", "length", &json!({}))).expect("json");
        rest["usage"] = json!({"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2, "prompt_tokens_details": null,
            "completion_tokens_details": null});
        let rest = rest.to_string();
        let answers = [LegAnswer { leg: &leg, first: Some(&first), decoder: Some(rest.as_bytes()) }];
        let joined = join_full(&request, &identity(endpoint), &answers).expect("joined");
        assert_eq!(String::from_utf8(joined).expect("text"), expected);

        let ended = prefilled("Bye", "stop", &json!({"stop_reason": "e"}));
        let first = FirstToken::parse("prefiller 1", &ended).expect("readable");
        let answers = [LegAnswer { leg: &leg, first: Some(&first), decoder: None }];
        let joined: Value =
            serde_json::from_slice(&join_full(&request, &identity(endpoint), &answers).expect("joined"))
                .expect("json");
        let choice = &joined["choices"][0];
        let text = if endpoint == Endpoint::Chat { &choice["message"]["content"] } else { &choice["text"] };
        assert_eq!(
            (text, &choice["finish_reason"], &choice["stop_reason"]),
            (&json!("Bye"), &json!("stop"), &json!("e"))
        );
        assert_eq!(joined["usage"]["completion_tokens"], 1);
        assert_eq!(joined["kv_transfer_params"], Value::Null);
    }
}

#[test]
fn token_ids_are_the_whole_answers() {
    let request =
        request(Endpoint::Completions, &json!({"prompt": "a", "return_token_ids": true, "max_tokens": 4}));
    let leg = leg(&request, 0);
    let first = first(
        &request,
        &leg,
        &prefilled("a", "length", &json!({"token_ids": [9], "prompt_token_ids": [1, 2, 3]})),
    );
    let rest = prefilled("bc", "length", &json!({"token_ids": [10, 11], "prompt_token_ids": [1, 2, 3, 9]}));
    let answers = [LegAnswer { leg: &leg, first: Some(&first), decoder: Some(&rest) }];
    let joined: Value = serde_json::from_slice(
        &join_full(&request, &identity(Endpoint::Completions), &answers).expect("joined"),
    )
    .expect("json");
    assert_eq!(joined["choices"][0]["token_ids"], json!([9, 10, 11]));
    assert_eq!(joined["choices"][0]["prompt_token_ids"], json!([1, 2, 3]));
}

#[test]
fn what_the_decoder_answers_alone_passes_but_for_its_name() {
    let request = request(
        Endpoint::Chat,
        &json!({"messages": [{"role": "user", "content": "Hi"}], "tools": [{}], "stream": true}),
    );
    let leg = leg(&request, 0);
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Chat)), Vec::new());
    let chunk = r#"{"id":"chatcmpl-d","object":"chat.completion.chunk","created":77,"model":"m","choices":[{"index":0,"delta":{"tool_calls":[{"x": 1.50}]},"logprobs":null,"finish_reason":null}],"new":{"a" : 1}}"#;
    feed(&mut join, &leg, &[chunk.into(), "[DONE]".into()], &mut out).expect("fine");
    join.finish(&mut out);
    assert_eq!(
        lines(&out),
        [chunk.replace("chatcmpl-d", "chatcmpl-r").replace("77", "5").as_str(), "[DONE]"]
    );

    let body = r#"{"id":"chatcmpl-d","object":"chat.completion","created":77,"model":"m","choices":[{"index":0,"message":{"tool_calls":[1.50]}}],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2},"kv_transfer_params":{"a":1},"new":2}"#;
    let answers = [LegAnswer { leg: &leg, first: None, decoder: Some(body.as_bytes()) }];
    let joined = String::from_utf8(join_full(&request, &identity(Endpoint::Chat), &answers).expect("joined"))
        .expect("text");
    assert_eq!(
        joined,
        body.replace("chatcmpl-d", "chatcmpl-r").replace("77", "5").replace(r#"{"a":1}"#, "null")
    );
}

#[test]
fn several_prompts_and_samples_are_numbered_as_one_server_numbers_them() {
    let body =
        json!({"prompt": ["a", "b"], "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let request = request(Endpoint::Completions, &body);
    let legs = [leg(&request, 0), leg(&request, 1)];
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Completions)), Vec::new());
    let chunk = |index: usize, text: &str| {
        let mut chunk = piece(text, None);
        chunk["choices"][0]["index"] = json!(index);
        chunk.to_string()
    };
    let usage = |prompt: u64, completion: u64| {
        json!({"id": "cmpl-d", "object": "text_completion", "created": 77, "model": "m", "choices": [],
            "usage": {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}}).to_string()
    };
    feed(&mut join, &legs[1], &[chunk(1, "d"), chunk(0, "c")], &mut out).expect("fine");
    feed(&mut join, &legs[0], &[chunk(1, "b"), chunk(0, "a"), usage(3, 8), "[DONE]".into()], &mut out)
        .expect("fine");
    assert!(!join.is_done());
    feed(&mut join, &legs[1], &[usage(5, 9), "[DONE]".into()], &mut out).expect("fine");
    assert!(join.is_done());
    join.finish(&mut out);
    let lines = lines(&out);
    let seen: Vec<(u64, String)> = lines[..4]
        .iter()
        .map(|line| {
            let value: Value = serde_json::from_str(line).expect("json");
            (
                value["choices"][0]["index"].as_u64().expect("an index"),
                value["choices"][0]["text"].to_string(),
            )
        })
        .collect();
    assert_eq!(seen, [(3, "\"d\"".into()), (2, "\"c\"".into()), (1, "\"b\"".into()), (0, "\"a\"".into())]);
    let last: Value = serde_json::from_str(lines[4]).expect("json");
    assert_eq!(last["usage"], json!({"prompt_tokens": 8, "total_tokens": 25, "completion_tokens": 17}));
    assert_eq!(lines[5..], ["[DONE]"]);

    let answer = |texts: [&str; 2], prompt: u64| {
        json!({"id": "cmpl-d", "object": "text_completion", "created": 77, "model": "m",
            "choices": [{"index": 0, "text": texts[0]}, {"index": 1, "text": texts[1]}],
            "usage": {"prompt_tokens": prompt, "total_tokens": prompt + 4, "completion_tokens": 4}})
        .to_string()
    };
    let (a, b) = (answer(["a", "b"], 3), answer(["c", "d"], 5));
    let answers = [
        LegAnswer { leg: &legs[0], first: None, decoder: Some(a.as_bytes()) },
        LegAnswer { leg: &legs[1], first: None, decoder: Some(b.as_bytes()) },
    ];
    let joined: Value = serde_json::from_slice(
        &join_full(&request, &identity(Endpoint::Completions), &answers).expect("joined"),
    )
    .expect("json");
    let expected: Vec<Value> =
        ["a", "b", "c", "d"].iter().enumerate().map(|(i, text)| json!({"index": i, "text": text})).collect();
    assert_eq!(joined["choices"], json!(expected));
    assert_eq!(joined["usage"], json!({"prompt_tokens": 8, "total_tokens": 16, "completion_tokens": 8}));
}

#[test]
fn errors_in_the_middle_of_a_stream_reach_the_client_in_vllms_form() {
    let request = request(Endpoint::Completions, &json!({"prompt": "a", "stream": true}));
    let leg = leg(&request, 0);
    let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Completions)), Vec::new());
    let engines = r#"{"error": {"message": "out of blocks", "type": "InternalServerError", "param": null, "code": 500}}"#;
    let error = feed(&mut join, &leg, &[piece("a", None).to_string(), engines.into()], &mut out)
        .expect_err("an error");
    assert!(error.message.contains("out of blocks"), "{error}");
    join.fail(&error, &mut out);
    assert_eq!(lines(&out)[1..], [engines, "[DONE]"]);

    for garbage in ["not json", "[]", "7", r#"{"choices":[7]}"#] {
        let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Completions)), Vec::new());
        let first = first(&request, &leg, &prefilled("a", "length", &json!({})));
        join.first(&leg, &first, &mut out);
        out.clear();
        let error = feed(&mut join, &leg, &[garbage.into()], &mut out).expect_err(garbage);
        assert_eq!(error.status, 502, "{garbage}: {error}");
        assert!(out.is_empty(), "nothing half-written: {}", String::from_utf8_lossy(&out));
        join.fail(&error, &mut out);
        assert_eq!(lines(&out).last(), Some(&"[DONE]"));
    }
    for garbage in [&b"no"[..], b"{}", br#"{"choices":[]}"#, br#"{"error":{"message":"x"}}"#, b"\xff"] {
        let answers = [LegAnswer { leg: &leg, first: None, decoder: Some(garbage) }];
        let error = join_full(&request, &identity(Endpoint::Completions), &answers).expect_err("garbage");
        assert!(error.status >= 500, "{error}");
    }
}

/// The `text` of every piece of a stream, in order.
fn streamed_text(out: &[u8], chat: bool) -> String {
    lines(out)
        .iter()
        .filter(|line| **line != "[DONE]")
        .filter_map(|line| {
            let value: Value = serde_json::from_str(line).expect("json");
            let choice = value["choices"].get(0)?.clone();
            let text = if chat { &choice["delta"]["content"] } else { &choice["text"] };
            Some(text.as_str().expect("a text").to_owned())
        })
        .collect()
}

proptest! {
    #[test]
    fn joined_text_is_the_first_and_the_rest(
        texts in proptest::collection::vec("\\PC{1,8}", 1..6), is_chat in any::<bool>(), prompt in 2u64..5000,
    ) {
        prop_assume!(!texts[0].contains('\u{fffd}'));
        let endpoint = if is_chat { Endpoint::Chat } else { Endpoint::Completions };
        let body = json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": texts.len() + 1,
            "stream": true, "stream_options": {"include_usage": true}});
        let request = request(endpoint, &body);
        let leg = leg(&request, 0);
        let mut answer: Value = serde_json::from_slice(&prefilled(&texts[0], "length", &json!({}))).expect("json");
        answer["usage"]["prompt_tokens"] = json!(prompt);
        let first = first(&request, &leg, answer.to_string().as_bytes());
        let (mut join, mut out) = (StreamJoin::new(&request, &identity(endpoint)), Vec::new());
        join.first(&leg, &first, &mut out);
        let rest = texts[1..].len() as u64;
        let usage = json!({"prompt_tokens": prompt + 1, "total_tokens": prompt + 1 + rest, "completion_tokens": rest});
        let mut events: Vec<String> = texts[1..].iter().map(|text| piece(text, None).to_string()).collect();
        events.push(json!({"id": "d", "object": "text_completion", "created": 7, "model": "m", "choices": [], "usage": usage}).to_string());
        events.push("[DONE]".into());
        feed(&mut join, &leg, &events, &mut out).expect("fine");
        join.finish(&mut out);
        prop_assert_eq!(streamed_text(&out, is_chat), texts.concat());
        let all = lines(&out);
        let last: Value = serde_json::from_str(all[all.len() - 2]).expect("json");
        let expected = json!({"prompt_tokens": prompt, "total_tokens": prompt + 1 + rest, "completion_tokens": 1 + rest});
        prop_assert_eq!(&last["usage"], &expected);

        let mut whole: Value = serde_json::from_slice(&prefilled(&texts[1..].concat(), "length", &json!({}))).expect("json");
        whole["usage"] = usage;
        let whole = whole.to_string();
        let answers = [LegAnswer { leg: &leg, first: Some(&first), decoder: Some(whole.as_bytes()) }];
        let joined: Value = serde_json::from_slice(&join_full(&request, &identity(endpoint), &answers).expect("joined")).expect("json");
        let choice = &joined["choices"][0];
        let text = if is_chat { &choice["message"]["content"] } else { &choice["text"] };
        prop_assert_eq!(text, &json!(texts.concat()));
        prop_assert_eq!(&joined["usage"], &expected);
    }

    /// Whatever an engine sends, the join answers with bytes or an error, and what it writes is events of JSON.
    #[test]
    fn any_event_is_survived(data in "\\PC{0,60}", shaped in any::<bool>()) {
        let request = request(Endpoint::Chat, &json!({"messages": [{"role": "user", "content": "a"}], "stream": true}));
        let leg = leg(&request, 0);
        let first = first(&request, &leg, &prefilled("a", "length", &json!({})));
        let (mut join, mut out) = (StreamJoin::new(&request, &identity(Endpoint::Chat)), Vec::new());
        join.first(&leg, &first, &mut out);
        let data = if shaped { format!("{{\"choices\":[{{\"index\":{data},\"text\":{data}}}]}}") } else { data };
        let _ = feed(&mut join, &leg, &[data], &mut out);
        join.finish(&mut out);
        for line in lines(&out) {
            prop_assert!(line == "[DONE]" || serde_json::from_str::<Value>(line).is_ok(), "{}", line);
        }
    }
}
