//! What the proxy makes of a client's request: who samples, what each engine is sent, what is refused and how.

use bytes::Bytes;
use kvxfer_proxy::openai::{
    ApiError, Chats, DisaggSpec, Endpoint, Leg, Limits, Next, Plan, Request, TokenSource, Tokenized,
};
use serde_json::{Value, json};

fn parse(endpoint: Endpoint, body: &str) -> Result<Request, ApiError> {
    Request::parse(endpoint, Bytes::from(body.to_owned()), &Limits::default())
}

fn completion(body: &Value) -> Request {
    parse(Endpoint::Completions, &body.to_string()).expect("a good request")
}

fn chat(body: &Value) -> Request {
    parse(Endpoint::Chat, &body.to_string()).expect("a good request")
}

fn leg(request: &Request, tokens: &[u32]) -> Leg {
    request.leg(0, tokens.to_vec(), Some(4096)).expect("a leg")
}

fn value(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(body)))
}

fn spec() -> String {
    DisaggSpec {
        req_id: "r-1".into(),
        receiver_host: "10.0.0.2".into(),
        receiver_init_port: vec![7300, 7301],
        receiver_alloc_port: vec![7400, 7401],
    }
    .kv_transfer_params()
}

fn prefilled(text: &str, finish: &str, token: Option<u32>) -> Vec<u8> {
    let params = token.map(|token| json!({"first_tok": token}));
    json!({
        "id": "cmpl-x", "object": "text_completion", "created": 7, "model": "m",
        "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": finish, "stop_reason": null}],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
        "kv_transfer_params": params,
    })
    .to_string()
    .into_bytes()
}

#[test]
fn the_guides_request_goes_the_fast_way() {
    let request = completion(
        &json!({"model": "m", "prompt": "Tell me a story", "max_tokens": 100, "temperature": 0.7}),
    );
    let TokenSource::Tokenize(body) = request.tokens(0) else { panic!("text has to be tokenized") };
    assert_eq!(value(&body), json!({"model": "m", "prompt": "Tell me a story"}));

    let leg = leg(&request, &[1, 2, 3]);
    assert_eq!(*leg.plan(), Plan::FirstToken);
    let prefill = value(&leg.prefill_body(&request, &spec()).expect("a prefill"));
    assert_eq!(
        prefill,
        json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0.7, "stream": false,
            "kv_transfer_params": {"ret_first_tok": true, "disagg_spec": {"req_id": "r-1", "receiver_host": "10.0.0.2",
                "receiver_init_port": [7300, 7301], "receiver_alloc_port": [7400, 7401]}}})
    );
    let next =
        leg.after_prefill(&request, "prefiller 1", &prefilled("Once", "length", Some(9))).expect("readable");
    let Next::Continue(first) = next else { panic!("{next:?}") };
    assert_eq!((first.token, first.text.as_str()), (Some(9), "Once"));
    let decode = value(&leg.continue_body(&request, &first, None));
    assert_eq!(decode, json!({"model": "m", "prompt": [1, 2, 3, 9], "max_tokens": 99, "temperature": 0.7}));
}

#[test]
fn fields_keep_their_text_and_their_order() {
    let body =
        r#"{"model":"m","x_unknown":[1, 2],"prompt":"a","temperature":0.30000000000000004,"max_tokens":5}"#;
    let request = parse(Endpoint::Completions, body).expect("good");
    let leg = leg(&request, &[1, 2]);
    assert_eq!(*leg.plan(), Plan::DecoderSamples("x_unknown".into()), "who knows what it does");
    assert_eq!(String::from_utf8(leg.whole_body(&request, None)).expect("text"), body);
}

#[test]
fn without_max_tokens_each_api_has_its_own_default() {
    let next = prefilled("a", "length", Some(9));
    let request = completion(&json!({"model": "m", "prompt": [1, 2, 3]}));
    assert_eq!(request.tokens(0), TokenSource::Known(vec![1, 2, 3]));
    let leg1 = leg(&request, &[1, 2, 3]);
    let Ok(Next::Continue(first)) = leg1.after_prefill(&request, "p", &next) else { panic!("continues") };
    assert_eq!(value(&leg1.continue_body(&request, &first, None))["max_tokens"], 15);

    let request = chat(&json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}));
    let leg2 = leg(&request, &[1, 2, 3]);
    assert_eq!(*leg2.plan(), Plan::FirstToken);
    let Ok(Next::Continue(first)) = leg2.after_prefill(&request, "p", &next) else { panic!("continues") };
    assert_eq!(value(&leg2.continue_body(&request, &first, None))["max_tokens"], 4096 - 3 - 1);
    // Where the context's length is not known, only the engine can say how far a chat goes.
    let unknown = request.leg(0, vec![1, 2, 3], None).expect("a leg");
    assert_eq!(*unknown.plan(), Plan::DecoderSamples("max_tokens".into()));
}

#[test]
fn a_chat_becomes_a_completion_of_its_tokens() {
    let request = chat(
        &json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 8, "max_tokens": 99, "stop": "\n", "stream": true, "add_generation_prompt": true,
        "chat_template_kwargs": {"a": 1}, "stream_options": {"include_usage": true}, "logprobs": false}),
    );
    let TokenSource::Tokenize(body) = request.tokens(0) else { panic!("a chat has to be tokenized") };
    assert_eq!(
        value(&body),
        json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "add_generation_prompt": true, "chat_template_kwargs": {"a": 1}})
    );
    let leg = leg(&request, &[5, 6]);
    assert_eq!(*leg.plan(), Plan::FirstToken);
    let prefill = value(&leg.prefill_body(&request, "{}").expect("a prefill"));
    assert_eq!(
        prefill,
        json!({"model": "m", "prompt": [5, 6], "max_tokens": 1, "stop": "\n", "stream": false, "kv_transfer_params": {}})
    );
    let Ok(Next::Continue(first)) = leg.after_prefill(&request, "p", &prefilled("a", "length", Some(9)))
    else {
        panic!("continues")
    };
    assert_eq!(
        value(&leg.continue_body(&request, &first, Some(r#"{"k":1}"#))),
        json!({"model": "m", "prompt": [5, 6, 9], "max_tokens": 7, "stop": "\n", "stream": true,
            "stream_options": {"include_usage": true}, "kv_transfer_params": {"k": 1}})
    );
}

#[test]
fn chats_can_be_left_to_the_engines_own_endpoint() {
    let body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8});
    let limits = Limits { chats: Chats::Engine, ..Limits::default() };
    let read = |endpoint, body: &Value| {
        Request::parse(endpoint, Bytes::from(body.to_string()), &limits).expect("good")
    };
    let request = read(Endpoint::Chat, &body);
    let plan = leg(&request, &[1, 2, 3]);
    assert_eq!(plan.plan().name(), "decoder_samples");
    assert_eq!(value(&plan.whole_body(&request, None)), body);
    let request = read(Endpoint::Completions, &json!({"prompt": "a"}));
    assert_eq!(*leg(&request, &[1, 2]).plan(), Plan::FirstToken, "only chats");
}

#[test]
fn documents_and_effort_reach_the_template_as_at_the_chat_endpoint() {
    let request = chat(&json!({"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "low",
        "documents": [{"text": "d"}], "chat_template_kwargs": {"a": 1}}));
    let TokenSource::Tokenize(body) = request.tokens(0) else { panic!("a chat has to be tokenized") };
    assert_eq!(
        value(&body)["chat_template_kwargs"],
        json!({"a": 1, "documents": [{"text": "d"}], "reasoning_effort": "low", "enable_thinking": true})
    );
    assert_eq!(leg(&request, &[1, 2]).plan().name(), "decoder_samples");
}

/// Every field whose meaning depends on where the answer begins leaves the sampling to the decoder, which then gets
/// the request as it came.
#[test]
fn what_the_first_token_would_change_is_left_to_the_decoder() {
    for (field, setting) in [
        ("n", json!(2)),
        ("best_of", json!(3)),
        ("echo", json!(true)),
        ("seed", json!(0)),
        ("prompt_logprobs", json!(0)),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-0.5)),
        ("bad_words", json!(["x"])),
        ("response_format", json!({"type": "json_object"})),
        ("structured_outputs", json!({"regex": "a+"})),
        ("use_beam_search", json!(true)),
        ("max_tokens", json!(1)),
        ("vllm_xargs", json!({"a": 1})),
        ("thinking_token_budget", json!(5)),
    ] {
        let mut body = json!({"model": "m", "prompt": [1, 2, 3], "cache_salt": "s"});
        body[field] = setting;
        let request = completion(&body);
        let leg = leg(&request, &[1, 2, 3]);
        assert_eq!(*leg.plan(), Plan::DecoderSamples(field.into()), "{body}");
        // All but the last token are prefilled: just what the decoder takes over before it computes that one.
        let prefill = value(&leg.prefill_body(&request, "{}").expect("a prefill"));
        assert_eq!(
            prefill,
            json!({"model": "m", "cache_salt": "s", "prompt": [1, 2], "max_tokens": 1, "temperature": 0, "stream": false,
                "kv_transfer_params": {}})
        );
        assert_eq!(value(&leg.whole_body(&request, None)), body);
        let next = leg.after_prefill(&request, "p", &prefilled("zzz", "stop", Some(9))).expect("readable");
        assert!(matches!(next, Next::Whole(_)), "the prefiller's token means nothing here: {next:?}");
    }
    for (field, setting) in [
        ("n", json!(1)),
        ("n", Value::Null),
        ("echo", json!(false)),
        ("seed", Value::Null),
        ("presence_penalty", json!(0.0)),
        ("bad_words", json!([])),
        ("response_format", json!({"type": "text"})),
        ("structured_outputs", Value::Null),
        ("x_unknown", Value::Null),
        ("logprobs", json!(2)),
        ("min_tokens", json!(4)),
    ] {
        let mut body = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 9});
        body[field] = setting;
        assert_eq!(*leg(&completion(&body), &[1, 2, 3]).plan(), Plan::FirstToken, "{body}");
    }
    let greedy = json!({"prompt": "a", "seed": 7, "temperature": 0.0});
    assert_eq!(
        *leg(&completion(&greedy), &[1, 2]).plan(),
        Plan::FirstToken,
        "greedy decoding draws no numbers"
    );
    for extra in [
        json!({"tools": [{"type": "function"}]}),
        json!({"logprobs": true}),
        json!({"include_reasoning": false}),
        json!({"continue_final_message": true, "add_generation_prompt": false}),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        for (key, setting) in extra.as_object().expect("an object") {
            body[key] = setting.clone();
        }
        let request = chat(&body);
        let leg = leg(&request, &[1, 2]);
        assert_eq!(leg.plan().name(), "decoder_samples", "{body}");
        assert_eq!(value(&leg.whole_body(&request, None)), body);
    }
}

#[test]
fn where_a_prefiller_is_of_no_use_the_decoder_works_alone() {
    let picture =
        json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]);
    let request = chat(&json!({"messages": [{"role": "user", "content": picture}]}));
    assert!(matches!(request.tokens(0), TokenSource::NotNeeded(why) if why.contains("messages")));
    for body in [
        json!({"prompt_embeds": "AAAA"}),
        json!({"prompt": "a", "truncate_prompt_tokens": 5}),
        json!({"prompt": "a", "echo": true, "max_tokens": 0}),
    ] {
        let request = completion(&body);
        assert!(matches!(request.tokens(0), TokenSource::NotNeeded(_)), "{body}");
        let leg = request.decoder_leg(0, "because");
        assert_eq!(leg.prefill_body(&request, "{}"), None);
        assert_eq!(value(&leg.whole_body(&request, None)), body);
    }
    let request = completion(&json!({"prompt": [1]}));
    assert_eq!(leg(&request, &[1]).plan().name(), "decoder_only", "one token leaves nothing to hand over");
    let request = completion(&json!({"prompt": "a", "max_tokens": 5000}));
    assert_eq!(
        leg(&request, &[1, 2, 3]).plan().name(),
        "decoder_only",
        "the engine has its own words for this"
    );
}

#[test]
fn lists_of_prompts_become_one_leg_each() {
    let request = completion(&json!({"prompt": ["a", "b\n"], "n": 2, "max_tokens": 4}));
    assert_eq!((request.prompts(), request.n()), (2, 2));
    let TokenSource::Tokenize(body) = request.tokens(1) else { panic!("text") };
    assert_eq!(value(&body), json!({"prompt": "b\n"}));
    let leg = request.leg(1, vec![3, 4], None).expect("a leg");
    assert_eq!(value(&leg.whole_body(&request, None)), json!({"prompt": "b\n", "n": 2, "max_tokens": 4}));

    let request = completion(&json!({"prompt": [[1, 2], [3, 4, 5]]}));
    assert_eq!(request.tokens(1), TokenSource::Known(vec![3, 4, 5]));
    let whole = request.leg(1, vec![3, 4, 5], None).expect("a leg").whole_body(&request, None);
    assert_eq!(value(&whole), json!({"prompt": [3, 4, 5]}));
    assert_eq!(completion(&json!({"prompt": ["only"]})).prompts(), 1);
}

#[test]
fn a_first_token_that_ends_the_answer_or_hides_half_a_stop_string() {
    let request =
        completion(&json!({"prompt": "a", "stop": ["END", "é!"], "max_tokens": 9, "min_tokens": 3}));
    let leg = leg(&request, &[1, 2]);
    let prefill = value(&leg.prefill_body(&request, "{}").expect("a prefill"));
    assert_eq!(prefill["min_tokens"], 1, "no more than max_tokens, or the engine refuses");
    let next = |text, finish, token| {
        leg.after_prefill(&request, "p", &prefilled(text, finish, token)).expect("readable")
    };
    assert!(matches!(next("", "stop", Some(2)), Next::Finished(_)), "the end of the text");
    for (text, why) in [
        (" E", "stop string"),
        ("xEN", "stop string"),
        ("é", "stop string"),
        ("", "character"),
        ("\u{fffd}", "character"),
    ] {
        let Next::Whole(reason) = next(text, "length", Some(3)) else { panic!("{text:?}") };
        assert!(reason.contains(why), "{text:?}: {reason}");
    }
    let Next::Whole(reason) = next("x", "length", None) else {
        panic!("without the token there is nothing to continue")
    };
    assert!(reason.contains("token"), "{reason}");
    let Next::Continue(first) = next("ENx", "length", Some(3)) else {
        panic!("nothing can complete a stop here")
    };
    assert_eq!(value(&leg.continue_body(&request, &first, None))["min_tokens"], 2);
    assert_eq!(
        value(&leg.consume_body(&request, &first)),
        json!({"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0, "stream": false})
    );
    for finish in ["error", "abort"] {
        let error = leg
            .after_prefill(&request, "prefiller 2", &prefilled("x", finish, Some(3)))
            .expect_err("given up");
        assert_eq!(error.status, 502);
        assert!(error.message.contains("prefiller 2"), "{error}");
    }
}

#[test]
fn bad_requests_name_the_field_and_the_value() {
    for (body, param, word) in [
        ("", None, "JSON"),
        ("{\"prompt\": \"a\"", None, "JSON"),
        ("[1]", None, "JSON object"),
        ("{}", Some("prompt"), "non-empty"),
        (r#"{"prompt": null}"#, Some("prompt"), "non-empty"),
        (r#"{"prompt": ""}"#, Some("prompt"), "non-empty"),
        (r#"{"prompt": []}"#, Some("prompt"), "empty"),
        (r#"{"prompt": [[1], []]}"#, Some("prompt"), "prompt 1"),
        (r#"{"prompt": 7}"#, Some("prompt"), "got 7"),
        (r#"{"prompt": {"a": 1}}"#, Some("prompt"), "must be a string"),
        (r#"{"prompt": [1, "a"]}"#, Some("prompt"), "token ids"),
        (r#"{"prompt": ["a", 1]}"#, Some("prompt"), "must be a string"),
        (r#"{"prompt": [1, -2]}"#, Some("prompt"), "non-negative"),
        (r#"{"prompt": "a", "stream": "yes"}"#, Some("stream"), "yes"),
        (r#"{"prompt": "a", "n": 0}"#, Some("n"), "at least 1"),
        (r#"{"prompt": "a", "max_tokens": -5}"#, Some("max_tokens"), "-5"),
        (r#"{"prompt": "a", "max_tokens": "5"}"#, Some("max_tokens"), "\"5\""),
        (r#"{"prompt": "a", "max_tokens": 1e400}"#, Some("max_tokens"), "1e400"),
        (r#"{"prompt": "a", "stop": 5}"#, Some("stop"), "got 5"),
        (r#"{"prompt": "a", "model": 5}"#, Some("model"), "got 5"),
        (r#"{"prompt": "a", "stream_options": {}}"#, Some("stream_options"), "stream=True"),
        (r#"{"prompt": "a", "stream": true, "stream_options": 3}"#, Some("stream_options"), "object"),
    ] {
        let error = parse(Endpoint::Completions, body).expect_err(body);
        assert_eq!((error.status, error.param.as_deref()), (400, param), "{body}: {error}");
        assert!(error.message.contains(word), "{body}: {error}");
        let json = value(&error.to_json());
        assert_eq!(json["error"]["type"], "BadRequestError");
        assert_eq!(json["error"]["code"], 400);
        assert_eq!(json["error"]["param"], json!(param));
    }
    for body in ["{}", r#"{"messages": "Hi"}"#, r#"{"messages": []}"#] {
        let error = parse(Endpoint::Chat, body).expect_err(body);
        assert_eq!(error.param.as_deref(), Some("messages"), "{error}");
    }
    let error = Request::parse(
        Endpoint::Completions,
        Bytes::from_static(b"{\"prompt\":\"\xff\"}"),
        &Limits::default(),
    );
    assert!(error.expect_err("no text").message.contains("UTF-8"));
    let limits = Limits { max_prompts: 2, max_prompt_tokens: 3, ..Limits::default() };
    let many =
        Request::parse(Endpoint::Completions, Bytes::from_static(br#"{"prompt":["a","b","c"]}"#), &limits);
    assert!(many.expect_err("too many").message.contains("length 3 exceeds the maximum allowed count of 2"));
    let request = Request::parse(Endpoint::Completions, Bytes::from_static(br#"{"prompt":"a"}"#), &limits)
        .expect("fine");
    assert!(request.leg(0, vec![1; 4], None).expect_err("too long").message.contains("4 tokens"));
}

#[test]
fn upstream_errors_pass_on_or_are_quoted() {
    let body = br#"{"error":{"message":"no such model","type":"NotFoundError","param":null,"code":404}}"#;
    let error = ApiError::upstream("prefiller 1", 404, body);
    assert_eq!((error.status, &error.to_json()[..]), (404, &body[..]));
    assert!(error.is_clients_fault());
    let error = ApiError::upstream("prefiller 1", 500, b"<html>oops");
    assert_eq!(error.status, 502);
    assert!(error.message.contains("prefiller 1 answered 500: <html>oops"), "{error}");
    assert!(!error.is_clients_fault());
    assert_eq!(ApiError::upstream("d", 302, b"").status, 502);
    let error = Tokenized::parse("prefiller 1", b"{\"count\": 1}").expect_err("no tokens");
    assert!(error.message.contains("/tokenize"), "{error}");
    let tokenized = Tokenized::parse("p", br#"{"count":2,"max_model_len":64,"tokens":[1,2]}"#).expect("good");
    assert_eq!(tokenized, Tokenized { tokens: vec![1, 2], max_model_len: Some(64) });
    let request = completion(&json!({"prompt": "a"}));
    for garbage in [&b"not json"[..], b"{}", br#"{"choices":[]}"#, b"\xff"] {
        let error =
            leg(&request, &[1, 2]).after_prefill(&request, "prefiller 1", garbage).expect_err("garbage");
        assert_eq!(error.status, 502, "{error}");
    }
}
