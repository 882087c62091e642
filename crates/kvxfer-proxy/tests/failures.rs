//! Everything that can go wrong below and beside a request: each ends with the right answer or a clear error, and leaves
//! nothing behind.

mod support;

use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;
use support::client::{get, open, post, request};
use support::engine::{Engine, Mood, Tells, answer_to};
use support::{PATIENCE, Proxy, one_and_one};
use tokio::io::AsyncWriteExt as _;

const PROMPT: &str = "Once upon a time";
/// Short deadlines, where a test is about one of them.
const SHORT: &str =
    "deadlines: {prefill: 300ms, kv: 300ms, decode: 300ms, stall: 300ms, tokenize: 300ms, drain: 300ms}\n";

fn ask(stream: bool) -> Value {
    json!({"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": stream})
}

fn expected() -> String {
    answer_to(PROMPT, 8)
}

fn error_body(message: &str) -> String {
    json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": 400}}).to_string()
}

/// Nothing is under way any more, at the proxy and at the engines.
async fn all_quiet(proxy: &Proxy, engines: &[&Engine]) {
    let quiet = |stats: &Value| {
        let idle = |i: &Value| i["requests"] == json!(0) && i["tokens"] == json!(0);
        stats["in_flight"] == json!([])
            && ["queued", "admitted", "waiting", "prefill", "kv", "decode"]
                .iter()
                .all(|k| stats[k] == json!(0))
            && stats["instances"].as_array().expect("instances").iter().all(idle)
    };
    proxy.until("nothing is under way", quiet).await;
    let by = tokio::time::Instant::now() + PATIENCE;
    while engines.iter().any(|e| e.under_way() > 0) {
        assert!(tokio::time::Instant::now() < by, "an engine is still at work");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_prefiller_that_fails_is_replaced_by_another() {
    for mood in [
        Mood::Status(500, "boom".into()),
        Mood::Status(503, "busy".into()),
        Mood::Says("not json".into()),
        Mood::Says("{\"choices\": []}".into()),
        Mood::CutOff(0),
        Mood::Hangs(0),
    ] {
        let (bad, good, decoder) = (Engine::start(), Engine::start(), Engine::start());
        let proxy = Proxy::start(&[&bad, &good], &[&decoder], SHORT).await;
        good.notify(proxy.notify).await;
        bad.mood(mood.clone());
        for stream in [false, true] {
            let answer = post(proxy.at, "/v1/completions", &ask(stream)).await;
            assert_eq!(answer.content(), expected(), "{mood:?}: {}", answer.text());
        }
        assert!(!bad.completions().is_empty(), "{mood:?}: it was asked");
        assert_eq!(good.completions().len(), 2);
        all_quiet(&proxy, &[&good, &decoder]).await;
    }
}

#[tokio::test]
async fn when_no_prefiller_works_the_decoder_does_it_all() {
    let (prefiller, decoder, proxy) = one_and_one(SHORT).await;
    prefiller.mood(Mood::Status(500, "boom".into()));
    for stream in [false, true] {
        assert_eq!(post(proxy.at, "/v1/completions", &ask(stream)).await.content(), expected());
    }
    let nobody = Proxy::start(&[], &[&decoder], "").await;
    assert_eq!(post(nobody.at, "/v1/completions", &ask(true)).await.content(), expected());
    // Unless that is not wanted.
    let strict = Proxy::start(&[&prefiller], &[&decoder], "health: {decode_alone: false}\n").await;
    let answer = post(strict.at, "/v1/completions", &ask(false)).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert!(answer.error().contains("prefiller1 answered 500: boom"), "{}", answer.error());
}

#[tokio::test]
async fn a_requests_own_fault_is_said_in_the_engines_words_and_only_once() {
    let (first, second, decoder) = (Engine::start(), Engine::start(), Engine::start());
    let proxy = Proxy::start(&[&first, &second], &[&decoder], "").await;
    for engine in [&first, &second, &decoder] {
        engine.mood(Mood::Status(400, error_body("temperature must be non-negative, got -1.0.")));
    }
    for stream in [false, true] {
        let answer = post(proxy.at, "/v1/completions", &ask(stream)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(answer.error(), "temperature must be non-negative, got -1.0.");
    }
    assert_eq!(first.completions().len() + second.completions().len() + decoder.completions().len(), 2);
    let stats = proxy.stats().await;
    assert!(
        stats["instances"].as_array().expect("some").iter().all(|i| i["failed"] == json!(0)),
        "{stats:#}"
    );
}

#[tokio::test]
async fn an_unknown_model_is_the_engines_to_refuse() {
    let (prefiller, decoder, proxy) = one_and_one("").await;
    prefiller.tokenize(Some(404));
    decoder.mood(Mood::Status(404, error_body("The model `x` does not exist.")));
    let answer = post(proxy.at, "/v1/completions", &ask(false)).await;
    assert_eq!(
        (answer.status, answer.error().as_str()),
        (StatusCode::NOT_FOUND, "The model `x` does not exist.")
    );
}

#[tokio::test]
async fn without_tokens_the_decoder_does_it_all() {
    let (prefiller, decoder, proxy) = one_and_one(SHORT).await;
    for status in [Some(404), Some(500), None] {
        prefiller.tokenize(status);
        decoder.tokenize(status);
        assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected(), "{status:?}");
    }
    assert!(prefiller.completions().is_empty());
}

#[tokio::test]
async fn a_cache_that_fails_or_never_comes_costs_time_and_not_the_answer() {
    for (tells, kind) in [(Tells::Nothing, "kv_timeout"), (Tells::Failed, "kv_failed")] {
        let (prefiller, decoder) = (Engine::start(), Engine::start().ranks(2));
        let proxy = Proxy::start(&[&prefiller], &[&decoder], SHORT).await;
        prefiller.notify(proxy.notify).await;
        prefiller.tells(tells);
        for stream in [false, true] {
            assert_eq!(post(proxy.at, "/v1/completions", &ask(stream)).await.content(), expected());
        }
        let metrics = get(proxy.at, "/metrics").await.text();
        assert!(metrics.contains(&format!("fallbacks_total{{kind=\"{kind}\"}} 2")), "{metrics}");
    }
}

#[tokio::test]
async fn garbage_on_the_notification_port_harms_nobody() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    for garbage in [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        // A greeting, a READY, and the promise of an exabyte.
        [
            &b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL"[..],
            &[0; 48],
            b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PUSH",
            b"\x02\x10\0\0\0\0\0\0\0",
        ]
        .concat(),
    ] {
        let mut stranger = tokio::net::TcpStream::connect(proxy.notify).await.expect("connected");
        stranger.write_all(&garbage).await.expect("sent");
    }
    assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected());
    proxy.until("nothing is under way", |s| s["in_flight"] == json!([])).await;
    let by = tokio::time::Instant::now() + PATIENCE;
    while !get(proxy.at, "/metrics").await.text().contains("bad_messages_total{kind=\"zmq\"} 3") {
        assert!(tokio::time::Instant::now() < by, "each is counted");
    }
}

#[tokio::test]
async fn a_decoder_that_fails_before_its_first_word_is_replaced_by_another() {
    for mood in [
        Mood::Status(500, "boom".into()),
        Mood::CutOff(0),
        Mood::Hangs(0),
        Mood::Says("data: {oops\n\n".into()),
    ] {
        let (prefiller, bad, good) = (Engine::start(), Engine::start(), Engine::start());
        let proxy = Proxy::start(&[&prefiller], &[&bad, &good], SHORT).await;
        prefiller.notify(proxy.notify).await;
        bad.mood(mood.clone());
        let answer = post(proxy.at, "/v1/completions", &ask(true)).await;
        assert_eq!(answer.content(), expected(), "{mood:?}: {}", answer.text());
        // A connection that closes without an answer is tried once more: it may have been an idle one.
        assert!((1..=2).contains(&bad.completions().len()) && good.completions().len() == 1, "{mood:?}");
        all_quiet(&proxy, &[&prefiller, &good]).await;
    }
    // In one piece as well, where there is more time: nothing has left before the end.
    for mood in [Mood::Status(500, "boom".into()), Mood::CutOff(0), Mood::Hangs(0)] {
        let (prefiller, bad, good) = (Engine::start(), Engine::start(), Engine::start());
        let proxy = Proxy::start(&[&prefiller], &[&bad, &good], SHORT).await;
        prefiller.notify(proxy.notify).await;
        bad.mood(mood.clone());
        let answer = post(proxy.at, "/v1/completions", &ask(false)).await;
        assert_eq!(answer.content(), expected(), "{mood:?}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_says_so_and_repeats_nothing() {
    for (mood, says) in [
        (Mood::CutOff(3), "decoder1 broke off"),
        (Mood::Babbles(3), "cannot be read"),
        (Mood::Fails(3), "the engine is sick"),
        (Mood::Hangs(3), "sent nothing for 300ms"),
    ] {
        let (prefiller, bad, good) = (Engine::start(), Engine::start(), Engine::start());
        let proxy = Proxy::start(&[&prefiller], &[&bad, &good], SHORT).await;
        prefiller.notify(proxy.notify).await;
        bad.mood(mood.clone());
        // One after the other, so that each piece is on its way before the next.
        bad.pause(Duration::from_millis(20));
        let answer = post(proxy.at, "/v1/completions", &ask(true)).await;
        let mut events = answer.events();
        let last = events.pop().expect("events");
        let message = last["error"]["message"].as_str().unwrap_or_else(|| panic!("{mood:?}: {last}"));
        assert!(message.contains(says), "{mood:?}: {message}");
        let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, expected()[..4], "{mood:?}");
        assert!(good.completions().is_empty());
        all_quiet(&proxy, &[&prefiller]).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_request_along() {
    // In the prefill.
    let (prefiller, decoder, proxy) = one_and_one("").await;
    prefiller.mood(Mood::Hangs(0));
    let asked = tokio::spawn({
        let at = proxy.at;
        async move { post(at, "/v1/completions", &ask(true)).await }
    });
    proxy.until("it is at the prefiller", |s| s["prefill"] == json!(1)).await;
    while prefiller.under_way() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    asked.abort();
    all_quiet(&proxy, &[&prefiller, &decoder]).await;
    assert_eq!(prefiller.aborted(), 1);

    // While the cache is on its way: the decoder uses it up for nobody.
    prefiller.mood(Mood::Well);
    prefiller.tells(Tells::Nothing);
    let (_, _, mut stream) =
        open(proxy.at, request(Method::POST, "/v1/completions", ask(true).to_string())).await;
    stream.piece().await.expect("the first token");
    drop(stream);
    all_quiet(&proxy, &[&prefiller, &decoder]).await;
    let by = tokio::time::Instant::now() + PATIENCE;
    while decoder.completions().is_empty() {
        assert!(tokio::time::Instant::now() < by, "the cache is used up");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(decoder.completions()[0]["max_tokens"], json!(1));

    // In the decode.
    prefiller.tells(Tells::Ready);
    decoder.mood(Mood::Hangs(3));
    let (_, _, mut stream) =
        open(proxy.at, request(Method::POST, "/v1/completions", ask(true).to_string())).await;
    stream.piece().await.expect("the first token");
    stream.piece().await.expect("the decoder's");
    drop(stream);
    all_quiet(&proxy, &[&prefiller, &decoder]).await;
    assert_eq!(decoder.aborted(), 1);
    let metrics = get(proxy.at, "/metrics").await.text();
    assert!(metrics.contains("outcome=\"cancelled\"} 3"), "{metrics}");
}

#[tokio::test]
async fn too_much_waits_in_a_queue_and_beyond_that_is_refused() {
    let limits = "limits: {requests: 1, queue: 1, queue_wait: 20s}\n";
    let (prefiller, _decoder, proxy) = one_and_one(limits).await;
    prefiller.mood(Mood::Slow(Duration::from_millis(300)));
    let at = proxy.at;
    let ask_one = move || tokio::spawn(async move { post(at, "/v1/completions", &ask(false)).await });
    let first = ask_one();
    proxy.until("one is under way", |s| s["prefill"] == json!(1)).await;
    let second = ask_one();
    proxy.until("one waits", |s| s["queued"] == json!(1)).await;
    let third = post(at, "/v1/completions", &ask(true)).await;
    assert_eq!(third.status, StatusCode::SERVICE_UNAVAILABLE);
    let retry: u64 = third.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=60).contains(&retry));
    assert!(third.error().contains("too many requests are waiting"), "{}", third.error());
    for asked in [first, second] {
        assert_eq!(asked.await.expect("no panic").content(), expected());
    }
    // Who waits too long hears of it.
    let (prefiller, _decoder, proxy) =
        one_and_one("limits: {requests: 1, queue: 1, queue_wait: 200ms}\n").await;
    prefiller.mood(Mood::Hangs(0));
    let at = proxy.at;
    let first = tokio::spawn(async move { post(at, "/v1/completions", &ask(false)).await });
    proxy.until("one is under way", |s| s["prefill"] == json!(1)).await;
    let second = post(at, "/v1/completions", &ask(false)).await;
    assert_eq!(second.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(second.error().contains("waited 200ms for its turn"), "{}", second.error());
    first.abort();
}

#[tokio::test]
async fn an_instances_limit_is_kept() {
    let (prefiller, decoder) = (Engine::start(), Engine::start());
    let port = format!("port: {}}}", prefiller.at.port());
    let limited = format!("port: {}, max_requests: 2}}", prefiller.at.port());
    let yaml = support::yaml(&[&prefiller], &[&decoder], "").replacen(&port, &limited, 1);
    let proxy = Proxy::with(&yaml).await;
    prefiller.notify(proxy.notify).await;
    prefiller.mood(Mood::Slow(Duration::from_millis(30)));
    let at = proxy.at;
    let all: Vec<_> =
        (0..12).map(|_| tokio::spawn(async move { post(at, "/v1/completions", &ask(true)).await })).collect();
    let watch = async {
        let mut most = 0;
        while !all.iter().all(tokio::task::JoinHandle::is_finished) {
            let stats = proxy.stats().await;
            most = most.max(stats["instances"][0]["requests"].as_u64().expect("a number"));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        most
    };
    assert_eq!(watch.await, 2, "never more, and the room is used");
    for asked in all {
        assert_eq!(asked.await.expect("no panic").content(), expected());
    }
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_reason() {
    let (prefiller, decoder, proxy) = one_and_one("limits: {body: 100000, prompts: 4}\n").await;
    let bodies: Vec<(String, StatusCode)> = vec![
        (String::new(), StatusCode::BAD_REQUEST),
        ("{".into(), StatusCode::BAD_REQUEST),
        ("[]".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": 7}".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": \"\"}".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": []}".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": \"x\", \"max_tokens\": \"many\"}".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": \"x\", \"stream\": \"yes\"}".into(), StatusCode::BAD_REQUEST),
        ("{\"prompt\": [\"a\",\"b\",\"c\",\"d\",\"e\"]}".into(), StatusCode::BAD_REQUEST),
        (format!("{{\"prompt\": \"{}\"}}", "x".repeat(100_000)), StatusCode::PAYLOAD_TOO_LARGE),
    ];
    for (body, status) in bodies {
        let answer =
            support::client::send(proxy.at, request(Method::POST, "/v1/completions", body.clone())).await;
        assert_eq!(answer.status, status, "{}: {}", &body[..body.len().min(60)], answer.text());
        assert!(!answer.error().is_empty());
    }
    assert!(prefiller.seen().is_empty() && decoder.seen().is_empty(), "none of that reaches an engine");
    assert_eq!(get(proxy.at, "/nowhere").await.status, StatusCode::NOT_FOUND);
    assert_eq!(get(proxy.at, "/v1/completions").await.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(get(proxy.at, "/nowhere").await.error().contains("/nowhere"));
    // A body that promises more than it holds ends with the connection, and nothing stays.
    let mut cut = tokio::net::TcpStream::connect(proxy.at).await.expect("connected");
    cut.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{\"prompt\"")
        .await
        .expect("sent");
    drop(cut);
    all_quiet(&proxy, &[&prefiller, &decoder]).await;
}

#[tokio::test]
async fn an_instance_that_comes_back_serves_again() {
    let yaml = "health: {interval: 100ms, interval_down: 50ms}\n";
    let (prefiller, decoder, proxy) = one_and_one(yaml).await;
    let at = decoder.stop().await;
    proxy.until("the decoder is down", |s| s["instances"][1]["health"] == json!("down")).await;
    let answer = post(proxy.at, "/v1/completions", &ask(true)).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.error().contains("decoder1 is down"), "{}", answer.error());
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(get(proxy.at, "/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let decoder = Engine::on(at);
    proxy.until("the decoder is up", |s| s["instances"][1]["health"] == json!("up")).await;
    assert_eq!(get(proxy.at, "/health").await.status, StatusCode::OK);
    assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected());
    assert_eq!(decoder.completions().len(), 1);
    // A prefiller that says it is not well is left alone, and used again when it is.
    prefiller.health(Some(500));
    proxy.until("the prefiller is down", |s| s["instances"][0]["health"] == json!("down")).await;
    let before = prefiller.completions().len();
    assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected());
    assert_eq!(prefiller.completions().len(), before);
    prefiller.health(Some(200));
    proxy.until("the prefiller is up", |s| s["instances"][0]["health"] == json!("up")).await;
    assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected());
    assert_eq!(prefiller.completions().len(), before + 1);
}

#[tokio::test]
async fn a_prefiller_that_falls_silent_loses_its_requests_to_another() {
    let yaml = "health: {interval: 50ms, timeout: 100ms, failures: 2}\n";
    let (silent, good, decoder) = (Engine::start(), Engine::start(), Engine::start());
    let proxy = Proxy::start(&[&silent, &good], &[&decoder], yaml).await;
    good.notify(proxy.notify).await;
    silent.mood(Mood::Hangs(0));
    let at = proxy.at;
    let asked = tokio::spawn(async move { post(at, "/v1/completions", &ask(true)).await });
    proxy.until("it is at the prefiller", |s| s["instances"][0]["requests"] == json!(1)).await;
    // The prefill's own deadline is minutes away; the probes notice first.
    silent.health(None);
    assert_eq!(asked.await.expect("no panic").content(), expected());
}

#[tokio::test]
async fn proxies_side_by_side_do_not_mix_their_requests_up() {
    let (prefiller, decoder) = (Engine::start(), Engine::start());
    let one = Proxy::start(&[&prefiller], &[&decoder], SHORT).await;
    let two = Proxy::start(&[&prefiller], &[&decoder], SHORT).await;
    // All notifications go to the first, also those about the second's requests.
    prefiller.notify(one.notify).await;
    assert_eq!(post(one.at, "/v1/completions", &ask(true)).await.content(), expected());
    assert_eq!(post(two.at, "/v1/completions", &ask(true)).await.content(), expected());
    let metrics = get(one.at, "/metrics").await.text();
    assert!(metrics.contains("notifications_total{kind=\"unknown\"} 1"), "{metrics}");
    assert!(get(two.at, "/metrics").await.text().contains("fallbacks_total{kind=\"kv_timeout\"} 1"));
}
