//! One prefiller and one decoder say what a single instance says.

use crate::harness::{CHUNK, Instance, Pull, completion, ids, prompt, spec};
use kvxfer::{Agent, TransportKind};
use kvxfer_proto::notify::{Notification, encode};
use serde_json::{Value, json};

/// Around the edges of chunks and of the steps in which a prompt is computed.
const LENGTHS: [usize; 8] = [1, 2, 31, 32, 33, 100, 256, 700];

struct Pair {
    prefiller: Instance,
    decoder: Instance,
    proxy: Pull,
}

impl Pair {
    fn start(env: &[(&str, &str)], decoder: &[&str]) -> Self {
        let proxy = Pull::bind();
        let decoder = Instance::start(&[&["--role", "decode", "--kv-port", "0"], decoder].concat(), env);
        let args =
            ["--role", "prefill", "--proxy-port", &proxy.port.to_string(), "--max-num-batched-tokens", "64"];
        Self { prefiller: Instance::start(&args, env), decoder, proxy }
    }

    /// What a proxy does: prefill, wait for the cache, decode.
    fn tokens(&self, prompt: &[u32], max_tokens: usize, request: &str, more: &Value) -> Vec<u32> {
        let first = self.prefiller.prefill(prompt, request, self.decoder.kv_port, more);
        self.proxy.ready(request);
        let rest = self.decoder.tokens(&[prompt, &[first]].concat(), max_tokens - 1, more);
        [vec![first], rest].concat()
    }
}

/// Greedy and sampled, for every length; then the same with a decoder that zeroes what it receives.
fn equal_over(transport: &str) {
    let env = [("KVXFER_TRANSPORTS", transport)];
    // Other steps and another number of threads than the pair's.
    let single = Instance::start(&["--max-num-batched-tokens", "512", "--threads", "3"], &[]);
    let pair = Pair::start(&env, &["--enable-prompt-tokens-details"]);
    for (seed, len) in LENGTHS.into_iter().enumerate() {
        for (way, more) in [("greedy", json!({})), ("sampled", json!({"temperature": 0.9, "seed": 7}))] {
            let prompt = prompt(seed, len);
            let expected = single.tokens(&prompt, 24, &more);
            let found = pair.tokens(&prompt, 24, &format!("{way}-{len}"), &more);
            assert_eq!(found, expected, "{way}, {len} tokens over {transport}");
        }
        // The decoder computed the first token only.
        pair.decoder.wait_log(&format!("Retrieved {len} of {} tokens", len + 1));
    }
    let carried = pair.prefiller.wait_log("Store 700 tokens takes: ");
    assert!(carried.contains(&format!("bytes over {transport};")), "{carried}");
    assert!(carried.contains("offload_time: ") && carried.contains("put_time: "), "{carried}");
    // Whatever was taken was given back.
    assert_eq!(pair.decoder.metric("kv_pages_free"), pair.decoder.metric("kv_pages"));
    drop(pair);

    let pair = Pair::start(&env, &["--zero-received-kv"]);
    for (seed, len) in LENGTHS.into_iter().enumerate().skip(2) {
        let prompt = prompt(seed, len);
        let expected = single.tokens(&prompt, 24, &json!({}));
        let found = pair.tokens(&prompt, 24, &format!("zeroed-{len}"), &json!({}));
        assert_eq!(found[0], expected[0], "the first token is the prefiller's");
        assert_ne!(found, expected, "{len} tokens: a cache of zeros must be noticed");
    }
}

#[test]
fn equal_over_shm() {
    equal_over("shm");
}

#[test]
fn equal_over_tcp() {
    equal_over("tcp");
}

#[test]
fn equal_over_cma() {
    let agent = Agent::builder().allow([TransportKind::Cma]).build().unwrap();
    if let Some(status) = agent.transports().into_iter().find(|t| t.kind == TransportKind::Cma)
        && let Some(reason) = status.reason
    {
        eprintln!("SKIPPED: cma is not available here: {reason}");
        return;
    }
    equal_over("cma");
}

#[test]
fn the_cache_of_a_chat() {
    let (single, pair) = (Instance::start(&[], &[]), Pair::start(&[], &[]));
    let body =
        json!({"messages": [{"role": "user", "content": "Tell me a story about a lighthouse keeper"}]});
    let tokens = ids(&pair.prefiller.post("/tokenize", &body)["tokens"]);
    let mut whole = body;
    whole["temperature"] = 0.into();
    whole["max_tokens"] = 20.into();
    whole["return_token_ids"] = true.into();
    let expected = ids(&single.post("/v1/chat/completions", &whole)["choices"][0]["token_ids"]);
    let mut first = whole.clone();
    first["max_tokens"] = 1.into();
    first["kv_transfer_params"] = spec("chat", pair.decoder.kv_port);
    let answer = pair.prefiller.post("/v1/chat/completions", &first);
    let token = answer["kv_transfer_params"]["first_tok"].as_u64().unwrap() as u32;
    pair.proxy.ready("chat");
    let rest = pair.decoder.tokens(&[&tokens[..], &[token]].concat(), 19, &json!({}));
    assert_eq!([vec![token], rest].concat(), expected);
}

#[test]
fn a_prefix_that_is_there_travels_once() {
    let (single, pair) = (Instance::start(&[], &[]), Pair::start(&[], &[]));
    let shared = prompt(1, 3 * CHUNK);
    let prompts: Vec<_> = (0..3).map(|i| [&shared[..], &prompt(50 + i, 20)].concat()).collect();
    let chunk = 2 * 2 * CHUNK as u64 * 32 * 4;
    let mut firsts = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let request = format!("r{i}");
        firsts.push(pair.prefiller.prefill(prompt, &request, pair.decoder.kv_port, &json!({})));
        let bytes = pair.proxy.ready(&request);
        let tail = chunk * 20 / CHUNK as u64;
        assert_eq!(bytes, if i == 0 { 3 * chunk + tail } else { tail }, "request {i}");
    }
    for (i, (prompt, first)) in prompts.iter().zip(firsts).enumerate() {
        let rest = pair.decoder.tokens(&[&prompt[..], &[first]].concat(), 15, &json!({}));
        assert_eq!([vec![first], rest].concat(), single.tokens(prompt, 16, &json!({})), "request {i}");
    }
    // Each announced them, so they stayed until the last had taken them.
    assert_eq!(pair.decoder.metric("kv_tokens_hit_total"), 3 * (3 * CHUNK as u64 + 20));
    assert_eq!(pair.decoder.metric("kv_pages_free"), pair.decoder.metric("kv_pages"));
}

#[test]
fn many_pairs_of_requests_at_once() {
    let (single, pair) = (Instance::start(&[], &[]), Pair::start(&[], &[]));
    let prompts: Vec<_> = (0..12).map(|i| prompt(i, 20 + 37 * i)).collect();
    let expected: Vec<_> = prompts.iter().map(|p| single.tokens(p, 12, &json!({}))).collect();
    std::thread::scope(|scope| {
        for (i, prompt) in prompts.iter().enumerate() {
            let (pair, expected) = (&pair, &expected[i]);
            let (prefiller, decoder) = (&pair.prefiller, &pair.decoder);
            scope.spawn(move || {
                let first = prefiller.prefill(prompt, &format!("r{i}"), decoder.kv_port, &json!({}));
                // Without waiting for the cache: what is on its way is waited for, what is not there is computed.
                let rest = decoder.tokens(&[&prompt[..], &[first]].concat(), 11, &json!({}));
                assert_eq!([vec![first], rest].concat(), *expected, "request {i}");
            });
        }
    });
    let mut ready: Vec<_> = (0..12).map(|_| pair.proxy.next().req_id().to_owned()).collect();
    ready.sort();
    ready.dedup();
    assert_eq!(ready.len(), 12);
}

#[test]
fn lmcaches_own_notification() {
    let proxy = Pull::bind();
    let decoder = Instance::start(&["--role", "decode", "--kv-port", "0"], &[]);
    let port = proxy.port.to_string();
    let args = ["--role", "prefill", "--proxy-port", &port, "--notify", "lmcache"];
    let prefiller = Instance::start(&args, &[]);
    prefiller.prefill(&prompt(1, 40), "7", decoder.kv_port, &json!({}));
    assert_eq!(proxy.raw(), encode(&Notification::ProxyNotif { req_id: "7".into() }).unwrap());
}

#[test]
fn instances_that_do_not_match_are_told_so() {
    let proxy = Pull::bind();
    let decoder = Instance::start(&["--role", "decode", "--kv-port", "0", "--random", "1"], &[]);
    let prefiller = Instance::start(&["--role", "prefill", "--proxy-port", &proxy.port.to_string()], &[]);
    prefiller.prefill(&prompt(1, 40), "r", decoder.kv_port, &json!({}));
    assert_eq!(proxy.failed("r"), ("mismatch".to_owned(), false));
    let line = prefiller.wait_log("the cache did not arrive");
    assert!(line.contains("model differs"), "{line}");
    let mut body = completion(&prompt(1, 40), 1, &json!({}));
    body["kv_transfer_params"] = spec("r", decoder.kv_port);
    let (status, message) = decoder.refuse("/v1/completions", &body.to_string());
    assert!(status == 400 && message.contains("--role"), "{message}");
}
