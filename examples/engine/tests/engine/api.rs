//! The shapes of vLLM's endpoints, and what they say to bad requests.

use crate::harness::{Instance, completion, ids, prompt};
use serde_json::{Value, json};

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

#[test]
fn whole_and_streamed_texts_are_the_same() {
    let single = Instance::start(&[], &[]);
    for more in [
        json!({}),
        json!({"temperature": 1.0, "seed": 5}),
        json!({"temperature": 1.0, "seed": 5, "top_p": 0.8, "top_k": 20, "presence_penalty": 0.5}),
        json!({"n": 3, "temperature": 1.0, "seed": 5}),
        json!({"echo": true}),
        json!({"stop": ["e", "~"]}),
    ] {
        let mut body = completion(&prompt(1, 40), 30, &more);
        body["stream_options"] = json!({"include_usage": true});
        let whole = single.post("/v1/completions", &body);
        let mut events = single.stream("/v1/completions", body.clone());
        let usage = events.pop().unwrap();
        assert_eq!(usage["choices"], json!([]));
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(usage["usage"][key], whole["usage"][key], "{key} of {more}");
        }
        for choice in whole["choices"].as_array().unwrap() {
            let mine: Vec<_> =
                events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == choice["index"]).collect();
            let text: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"], "{more}");
            let tokens: Vec<_> = mine.iter().flat_map(|c| ids(&c["token_ids"])).collect();
            assert_eq!(tokens, ids(&choice["token_ids"]), "{more}");
            let (last, rest) = mine.split_last().unwrap();
            assert!(rest.iter().all(|c| c["finish_reason"].is_null()));
            assert_eq!(last["finish_reason"], choice["finish_reason"]);
            assert_eq!(last["stop_reason"], choice["stop_reason"]);
            assert_eq!(ids(&mine[0]["prompt_token_ids"]), prompt(1, 40));
        }
        let id = events[0]["id"].as_str().unwrap();
        assert!(
            id.starts_with("cmpl-")
                && events.iter().all(|e| e["id"] == id && e["object"] == "text_completion")
        );
    }
}

#[test]
fn a_chat() {
    let single = Instance::start(&["--served-model-name", "meta/llama", "alias"], &[]);
    let body = json!({
        "model": "alias", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 12, "temperature": 0,
        "logprobs": true, "top_logprobs": 3, "return_token_ids": true, "request_id": "mine",
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    let whole = single.post("/v1/chat/completions", &body);
    assert_eq!(whole["id"], "chatcmpl-mine");
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("alias")));
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], "length");
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 12);
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"], "greedy takes the likeliest");
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(entry["bytes"].as_array().unwrap().len(), entry["token"].as_str().unwrap().len());
    }
    let mut events = single.stream("/v1/chat/completions", body);
    let usage = events.pop().unwrap();
    assert_eq!(usage["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    let first = events.remove(0);
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(
        ids(&first["prompt_token_ids"]).len() as u64,
        whole["usage"]["prompt_tokens"].as_u64().unwrap()
    );
    let streamed: String =
        events.iter().map(|e| e["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(streamed, choice["message"]["content"]);
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["usage"]["completion_tokens"], i + 1);
    }
}

#[test]
fn log_probabilities_and_echo() {
    let single = Instance::start(&[], &[]);
    let tokens = prompt(3, 50).iter().map(|t| 32 + t % 90).collect::<Vec<_>>();
    let body = completion(&tokens, 5, &json!({"logprobs": 2, "echo": true}));
    let answer = single.post("/v1/completions", &body);
    let logprobs = &answer["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 55, "{key}");
    }
    assert!(logprobs["token_logprobs"][0].is_null(), "nothing comes before the first");
    let joined: String = logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(joined, text(&answer));
    assert_eq!(logprobs["text_offset"][54], 54);
    // A prompt's token is scored as if it had been written.
    let longer = [&tokens[..], &ids(&answer["choices"][0]["token_ids"])].concat();
    let again =
        single.post("/v1/completions", &completion(&longer, 1, &json!({"logprobs": 2, "echo": true})));
    for i in 1..55 {
        assert_eq!(
            again["choices"][0]["logprobs"]["token_logprobs"][i], logprobs["token_logprobs"][i],
            "token {i}"
        );
    }
    let mut body = completion(&tokens, 3, &json!({"logprobs": 0, "return_tokens_as_token_ids": true}));
    body["prompt"] = json!([tokens, tokens]);
    let both = single.post("/v1/completions", &body);
    assert_eq!(both["choices"][0]["text"], both["choices"][1]["text"]);
    assert_eq!(both["choices"][1]["index"], 1);
    assert_eq!(both["usage"]["prompt_tokens"], 100);
    assert!(both["choices"][0]["logprobs"]["tokens"][0].as_str().unwrap().starts_with("token_id:"));
}

#[test]
fn why_texts_end() {
    let single = Instance::start(&[], &[]);
    let ask = |more: Value| {
        single.post("/v1/completions", &completion(&prompt(1, 10), 20, &more))["choices"][0].clone()
    };
    let free = ask(json!({}));
    assert_eq!((&free["finish_reason"], &free["stop_reason"]), (&json!("length"), &Value::Null));
    let (all, tokens) = (free["text"].as_str().unwrap(), ids(&free["token_ids"]));
    let stop = &all[5..7];
    let at = all.find(stop).unwrap();
    let stopped = ask(json!({"stop": stop}));
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(stopped["text"], all[..at]);
    assert_eq!(ask(json!({"stop": [stop], "include_stop_str_in_output": true}))["text"], all[..at + 2]);
    let by_token = ask(json!({"stop_token_ids": [tokens[3]]}));
    assert_eq!((&by_token["finish_reason"], &by_token["stop_reason"]), (&json!("stop"), &json!(tokens[3])));
    let later = ask(json!({"stop_token_ids": [tokens[3]], "min_tokens": 10}));
    assert!(later["token_ids"].as_array().unwrap().len() >= 10);
    // 257 ends a text of the byte vocabulary.
    let eos = json!({"logit_bias": {"257": 100}});
    let ended = ask(eos.clone());
    assert_eq!((&ended["finish_reason"], &ended["stop_reason"]), (&json!("stop"), &Value::Null));
    assert_eq!((&ended["text"], &ended["token_ids"]), (&json!(""), &json!([257])));
    let mut on = eos;
    on["ignore_eos"] = true.into();
    assert_eq!(ask(on)["token_ids"].as_array().unwrap().len(), 20);
}

#[test]
fn many_at_once_say_what_each_says_alone() {
    let single = Instance::start(&["--max-num-batched-tokens", "48", "--max-num-seqs", "10"], &[]);
    let prompts: Vec<_> = (0..24).map(|i| prompt(i, 1 + 23 * i)).collect();
    let alone: Vec<_> = prompts.iter().map(|p| single.tokens(p, 20, &json!({}))).collect();
    std::thread::scope(|scope| {
        for (prompt, expected) in prompts.iter().zip(&alone) {
            let single = &single;
            scope.spawn(move || assert_eq!(single.tokens(prompt, 20, &json!({})), *expected));
        }
    });
}

#[test]
fn the_small_endpoints() {
    let single = Instance::start(&["--max-model-len", "1000"], &[]);
    assert_eq!(single.get("/health").status, 200);
    let models: Value = serde_json::from_str(&single.get("/v1/models").body).unwrap();
    assert_eq!(models["data"][0]["id"], "random-0");
    assert_eq!(models["data"][0]["max_model_len"], 1000);
    let tokens = single.post("/tokenize", &json!({"prompt": "Hé", "return_token_strs": true}));
    assert_eq!(tokens["tokens"], json!([256, 72, 195, 169]));
    assert_eq!((&tokens["count"], &tokens["max_model_len"]), (&json!(4), &json!(1000)));
    assert_eq!(tokens["token_strs"].as_array().unwrap().len(), 4);
    assert_eq!(single.post("/detokenize", &json!({"tokens": [72, 195, 169]}))["prompt"], "Hé");
    let chat = single.post("/tokenize", &json!({"messages": [{"role": "user", "content": "Hi"}]}));
    let detokenized = single.post("/detokenize", &json!({ "tokens": chat["tokens"] }));
    assert_eq!(detokenized["prompt"], "user: Hi\nassistant:");
    assert!(single.get("/metrics").body.contains("# TYPE kvxfer_engine_sequences_running gauge"));
    assert_eq!(single.get("/nowhere").status, 404);
}

#[test]
fn bad_requests_are_told_what_is_wrong() {
    let single =
        Instance::start(&["--max-model-len", "100", "--max-num-seqs", "4", "--kv-cache-tokens", "200"], &[]);
    let long = vec![1; 100];
    let cases = [
        (r#"{"prompt""#.to_owned(), "not a valid request"),
        (r#"{"prompt": 7}"#.to_owned(), "not a valid request"),
        (r#"{"prompt": "x", "max_tokens": "many"}"#.to_owned(), "max_tokens"),
        ("{}".to_owned(), "prompt is missing"),
        (json!({"prompt": []}).to_string(), "empty"),
        (json!({"prompt": [[]]}).to_string(), "empty"),
        (json!({"prompt": [300]}).to_string(), "token id 300"),
        (json!({ "prompt": long }).to_string(), "maximum context length is 100"),
        (json!({"prompt": "x", "max_tokens": 99}).to_string(), "maximum context length is 100"),
        (json!({"prompt": "x", "max_tokens": 0}).to_string(), "at least 1"),
        (json!({"prompt": "x", "max_tokens": -1}).to_string(), "at least 1"),
        (json!({"prompt": "x", "n": 0}).to_string(), "n is 0"),
        (json!({"prompt": "x", "n": 5}).to_string(), "1 to 4"),
        (json!({"prompt": "x", "n": 4, "max_tokens": 90}).to_string(), "--kv-cache-tokens"),
        (json!({"prompt": "x", "temperature": -1}).to_string(), "temperature"),
        (json!({"prompt": "x", "top_p": 0}).to_string(), "top_p"),
        (json!({"prompt": "x", "top_k": -2}).to_string(), "top_k"),
        (json!({"prompt": "x", "logprobs": 21}).to_string(), "at most 20"),
        (json!({"prompt": "x", "logprobs": "all"}).to_string(), "logprobs"),
        (json!({"prompt": "x", "stop": [""]}).to_string(), "stop"),
        (json!({"prompt": "x", "logit_bias": {"a": 1}}).to_string(), "logit_bias"),
        (json!({"prompt": "x", "kv_transfer_params": {"disagg_spec": {"req_id": "", "receiver_host": "h", "receiver_init_port": [1]}}}).to_string(), "req_id"),
        (json!({"prompt": "x", "kv_transfer_params": {"disagg_spec": {"req_id": "r", "receiver_host": "h", "receiver_init_port": []}}}).to_string(), "receiver_init_port"),
    ];
    for (body, expected) in cases {
        let (status, message) = single.refuse("/v1/completions", &body);
        assert_eq!(status, 400, "{body}");
        assert!(message.contains(expected), "{body} -> {message}");
    }
    for body in
        [r#"{"messages": []}"#, r#"{"messages": "Hi"}"#, r#"{"messages": [{"content": "no role"}]}"#, "{}"]
    {
        assert_eq!(single.refuse("/v1/chat/completions", body).0, 400, "{body}");
    }
    let (status, message) = single.refuse("/v1/completions", r#"{"model": "gpt", "prompt": "x"}"#);
    assert!(status == 404 && message.contains("gpt"), "{message}");
    // It serves on.
    assert_eq!(single.tokens(&[1, 2, 3], 4, &json!({})).len(), 4);
}
