//! The status page in a real browser, in front of real statistics.

#[path = "support/chromium.rs"]
mod chromium;
mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kvxfer_proto::Time;
use kvxfer_proxy::dashboard;
use kvxfer_proxy::stats::{Mark, Outcome, Row, Stats, Timeline};
use serde_json::{Value, json};
use support::Proxy;
use support::client::{open, post, request};
use support::engine::{Engine, Tells};

/// A server on a free port that lives as long as the test.
struct Server {
    address: SocketAddr,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(routes: Router) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener =
            runtime.block_on(tokio::net::TcpListener::bind(("127.0.0.1", 0))).expect("a free port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { address, runtime }
    }

    fn url(&self) -> String {
        format!("http://{}/dashboard", self.address)
    }
}

fn at(ms: u64) -> Time {
    Time(Duration::from_millis(ms).as_nanos() as u64)
}

/// Five minutes of two prefillers and a decoder.
fn five_minutes() -> (Stats, Vec<Row>, Time) {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    stats.add_prefiller("prefiller1");
    stats.add_prefiller("prefiller2");
    let mut now = 0;
    for i in 0..600u64 {
        now = i * 500;
        let wave = (i as f64 / 40.0).sin() * 9.0 + (i * 7919 % 13) as f64;
        let took = 42.0 + wave + if i % 2 == 0 { 0.0 } else { 14.0 };
        let name = if i % 2 == 0 { "prefiller1" } else { "prefiller2" };
        stats.prefilled(at(now), name, Duration::from_secs_f64(took / 1e3));
        let mut timeline = Timeline::new(at(now));
        let mut end = now;
        for (mark, ms) in [
            (Mark::Admitted, 0),
            (Mark::Routed, 2),
            (Mark::Prefilled, took as u64),
            (Mark::KvReady, 6),
            (Mark::FirstDecoded, 14),
            (Mark::Finished, 900),
        ] {
            end += ms;
            timeline.mark(mark, at(end));
        }
        let outcome = if i % 97 == 5 { Outcome::Failed } else { Outcome::Ok };
        stats.finished(at(now), outcome, &timeline, 64);
    }
    let now = at(now);
    let rows = (0..5u64)
        .map(|i| {
            let row = stats.board().add(
                at(298_000 + i * 300),
                format!("cmpl-7f3a{i:02}c2"),
                "/v1/completions",
                true,
            );
            row.planned(512 + i * 700, "first_token");
            row.assigned(Some(["prefiller1", "prefiller2"][i as usize % 2]), Some("decoder1"));
            row.phase(
                at(299_000 + i * 60),
                ["first_decode", "rest", "rest", "kv_wait", "prefill"][i as usize],
            );
            row.output_tokens([1, 31, 12, 1, 0][i as usize]);
            row
        })
        .collect();
    (stats, rows, now)
}

fn instance(name: &str, role: &str, port: u16, health: &str) -> Value {
    json!({"name": name, "role": role, "address": format!("localhost:{port}"), "health": health, "breaker": "closed",
        "admin": "active", "usable": health == "up", "weight": 1, "requests": 2, "tokens": 3124, "started": 300, "failed": 3})
}

fn router_view() -> Value {
    let mut down = instance("prefiller3", "prefiller", 8102, "down");
    down["why"] = json!("connection refused");
    down["down_ms"] = json!(83_000);
    down["breaker"] = json!("open");
    down["requests"] = json!(0);
    down["tokens"] = json!(0);
    let mut decoder = instance("decoder1", "decoder", 8200, "up");
    decoder["tp_ranks"] = json!(2);
    decoder["requests"] = json!(4);
    decoder["max_requests"] = json!(32);
    json!({"instances": [instance("prefiller1", "prefiller", 8100, "up"), instance("prefiller2", "prefiller", 8101, "up"),
        down, decoder],
        "queued": 0, "admitted": 0, "waiting": 0, "prefill": 1, "kv": 1, "decode": 3, "ending": false})
}

/// `/dashboard`, and `/stats` as the closure has it, which is told how many answers there were before.
fn routes(stats: impl Fn(u64, &HeaderMap) -> Response + Send + Sync + 'static) -> Router {
    let stats = Arc::new(stats);
    let asked = Arc::new(AtomicU64::new(0));
    let answer = move |headers: HeaderMap| {
        let answer = stats(asked.fetch_add(1, Ordering::Relaxed), &headers);
        async move { answer }
    };
    Router::new().route("/dashboard", get(dashboard::page)).route("/stats", get(answer))
}

/// What `/stats` says over time: the time of day goes on by a second per answer.
fn body(stats: &Stats, now: Time, view: &Value, turn: u64) -> Response {
    (
        StatusCode::OK,
        [("content-type", "application/json")],
        stats.snapshot(now, 1_700_000_000_000 + turn * 1000, view),
    )
        .into_response()
}

/// The text of an element of a dumped document, without markup.
fn text_of(document: &str, from: &str, to: &str) -> String {
    let start = document.find(from).unwrap_or_else(|| panic!("{from} is missing in\n{document}"));
    let rest = &document[start..];
    let part = &rest[..rest.find(to).unwrap_or(rest.len())];
    let mut text = String::new();
    let mut inside = false;
    for c in part.chars() {
        match c {
            '<' => inside = true,
            '>' => {
                inside = false;
                text.push(' ');
            }
            c if !inside => text.push(c),
            _ => {}
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn it_shows_instances_times_and_requests() {
    let Some(browser) = chromium::find("it_shows_instances_times_and_requests") else { return };
    let (stats, rows, now) = five_minutes();
    let server = Server::start(routes(move |turn, _| body(&stats, now, &router_view(), turn)));
    let document = chromium::run(&browser, &server.url(), 3500, &["--dump-dom"]);
    assert_eq!(text_of(&document, "id=\"state\"", "</p>").split(' ').next_back(), Some("Serving"));
    let instances = text_of(&document, "<table id=\"instances\"", "</table>");
    for part in [
        "prefiller1 localhost:8100 Up 2",
        "prefiller3 localhost:8102 Down for 1 min 23 s connection refused Breaker open",
        "decoder1 localhost:8200 2 ranks Up 4 of 32 3,124 1 300 3",
    ] {
        assert!(instances.contains(part), "{part} is missing in: {instances}");
    }
    let ttft = text_of(&document, "<table id=\"ttft\"", "</table>");
    assert!(ttft.contains("prefiller1 300 ") && ttft.contains(" ms"), "{ttft}");
    let requests = text_of(&document, "<table id=\"requests\"", "</table>");
    for part in ["cmpl-7f3a00c2", "First decoded token", "KV wait", "prefiller1 → decoder1", "2,612"] {
        assert!(requests.contains(part), "{part} is missing in: {requests}");
    }
    let phases = text_of(&document, "<table id=\"phases\"", "</table>");
    assert!(phases.contains("KV wait 6 ms 6 ms"), "{phases}");
    assert!(text_of(&document, "id=\"way\"", "</ol>").contains("Decode 3"));
    let chart = &document[document.find("id=\"chart\"").expect("a chart")..];
    assert_eq!(chart.matches("class=\"line\"").count(), 2, "a line per prefiller");
    assert!(
        document.contains("aria-label=\"Time to first token over the last five minutes. Latest: prefiller1")
    );
    // The rates come from the differences of answers a second apart; nothing changes here.
    assert!(text_of(&document, "id=\"figures\"", "</dl>").contains("Requests a second 0.0"));
    drop(rows);
    drop(server.runtime);
}

#[test]
fn it_says_so_when_the_proxy_goes_away() {
    let Some(browser) = chromium::find("it_says_so_when_the_proxy_goes_away") else { return };
    let (stats, rows, now) = five_minutes();
    let server = Server::start(routes(move |turn, _| match turn {
        0 | 1 => body(&stats, now, &router_view(), turn),
        // Half an answer, as from a process that dies.
        _ => (StatusCode::OK, "{\"version\":").into_response(),
    }));
    let document = chromium::run(&browser, &server.url(), 5000, &["--dump-dom"]);
    assert!(text_of(&document, "id=\"state\"", "</p>").contains("Not answering"), "{document}");
    let trouble = text_of(&document, "id=\"trouble\"", "</p>");
    assert!(trouble.contains("What you see is from") && trouble.contains("Trying again"), "{trouble}");
    assert!(document.contains("<main id=\"main\" class=\"old\""), "what is old looks old");
    assert!(
        text_of(&document, "<table id=\"instances\"", "</table>").contains("prefiller1"),
        "but is still there"
    );
    drop(rows);
}

#[test]
fn names_are_text_whatever_they_hold() {
    let Some(browser) = chromium::find("names_are_text_whatever_they_hold") else { return };
    let evil = "<img src=x onerror=\"document.title='owned'\">";
    let stats = Stats::new(at(0), Duration::from_secs(5));
    stats.prefilled(at(1000), evil, Duration::from_millis(3));
    let row = stats.board().add(at(900), evil, "/v1/completions", false);
    row.assigned(Some(evil), None);
    let mut view = router_view();
    view["instances"][0]["name"] = json!(evil);
    view["instances"][2]["why"] = json!(evil);
    let server = Server::start(routes(move |turn, _| body(&stats, at(1000), &view, turn)));
    let document = chromium::run(&browser, &server.url(), 2500, &["--dump-dom"]);
    assert!(document.contains("<title>kvxfer proxy</title>"), "nothing ran");
    assert!(!document.contains("<img"), "no markup came of it");
    assert!(document.matches("&lt;img src=x").count() >= 4, "it is shown as text in every place");
    drop(row);
}

#[test]
fn an_empty_proxy_and_a_locked_one() {
    let Some(browser) = chromium::find("an_empty_proxy_and_a_locked_one") else { return };
    let server = Server::start(routes(|turn, _| {
        let stats = Stats::new(at(0), Duration::from_secs(5));
        body(&stats, at(5000), &json!({"instances": [], "ending": true}), turn)
    }));
    let document = chromium::run(&browser, &server.url(), 2500, &["--dump-dom"]);
    for part in [
        "Ending",
        "No prefill in the last five minutes.",
        "No instance is configured.",
        "None at this moment.",
    ] {
        assert!(document.contains(part), "{part} is missing in\n{document}");
    }
    let server = Server::start(routes(|_, headers| {
        assert!(headers.get("authorization").is_none(), "no key was entered");
        StatusCode::UNAUTHORIZED.into_response()
    }));
    let document = chromium::run(&browser, &server.url(), 2500, &["--dump-dom"]);
    assert!(text_of(&document, "id=\"state\"", "</p>").contains("Locked"));
    assert!(!document.contains("id=\"login\" hidden"), "the key is asked for");
}

/// The proxy itself, with engines that answer, one that has gone, and a request that waits for its cache.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_shows_what_a_running_proxy_tells() {
    let Some(browser) = chromium::find("it_shows_what_a_running_proxy_tells") else { return };
    let (one, two, gone, decoder) = (Engine::start(), Engine::start(), Engine::start(), Engine::start());
    let proxy = Proxy::start(&[&one, &two, &gone], &[&decoder], "health: {interval: 50ms}\n").await;
    for engine in [&one, &two, &gone] {
        engine.notify(proxy.notify).await;
    }
    let body = json!({"model": "m", "prompt": "Tell me a story", "max_tokens": 5, "temperature": 0});
    for _ in 0..6 {
        let answer = post(proxy.at, "/v1/completions", &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    gone.stop().await;
    proxy.until("it is seen to be gone", |stats| stats["instances"][2]["health"] == "down").await;
    // The first token is there, the cache is not.
    for engine in [&one, &two] {
        engine.tells(Tells::Late(Duration::from_secs(3600)));
    }
    let mut asked = body.clone();
    asked["stream"] = json!(true);
    let (_, _, mut stream) =
        open(proxy.at, request(Method::POST, "/v1/completions", asked.to_string())).await;
    stream.piece().await.expect("the first token");

    let url = format!("http://{}/dashboard", proxy.at);
    let document = tokio::task::spawn_blocking(move || chromium::run(&browser, &url, 2500, &["--dump-dom"]));
    let document = document.await.expect("it runs");
    assert!(text_of(&document, "id=\"state\"", "</p>").contains("Serving"), "{document}");
    let instances = text_of(&document, "<table id=\"instances\"", "</table>");
    assert!(
        instances.contains("prefiller1 127.0.0.1:") && instances.contains("decoder1 127.0.0.1:"),
        "{instances}"
    );
    let third = &instances[instances.find("prefiller3").expect("it is listed")..];
    assert!(third.split("decoder1").next().expect("its row").contains("Down"), "{instances}");
    let ttft = text_of(&document, "<table id=\"ttft\"", "</table>");
    assert!(ttft.contains("prefiller1") && ttft.contains("prefiller2"), "{ttft}");
    let requests = text_of(&document, "<table id=\"requests\"", "</table>");
    assert!(requests.contains("KV wait") && requests.contains("→ decoder1"), "{requests}");
    assert!(text_of(&document, "id=\"way\"", "</ol>").contains("KV transfer 1"));
    assert!(text_of(&document, "id=\"figures\"", "</dl>").contains("Answered 6"));
    let phases = text_of(&document, "<table id=\"phases\"", "</table>");
    assert!(phases.contains("Prefill") && phases.contains("Total"), "{phases}");
}

/// Pictures of both colour schemes; `KVXFER_UPDATE_SCREENSHOT=1` keeps one in `docs/`.
#[test]
fn it_can_be_photographed() {
    let Some(browser) = chromium::find("it_can_be_photographed") else { return };
    let (stats, rows, now) = five_minutes();
    let server = Server::start(routes(move |turn, _| body(&stats, now, &router_view(), turn)));
    let folder = tempfile::tempdir().expect("a folder");
    for (scheme, flags) in [
        ("light", "--disable-features=WebContentsForceDark"),
        ("dark", "--blink-settings=preferredColorScheme=0"),
    ] {
        let file = folder.path().join(format!("{scheme}.png"));
        let argument = format!("--screenshot={}", file.display());
        chromium::run(&browser, &server.url(), 3500, &[flags, "--window-size=1180,1570", &argument]);
        let picture = std::fs::read(&file).expect("a picture");
        assert!(picture.starts_with(b"\x89PNG"), "a PNG");
        let side = |from: usize| u32::from_be_bytes(picture[from..from + 4].try_into().expect("four bytes"));
        assert_eq!((side(16), side(20)), (1180, 1570), "{scheme}");
        if scheme == "light" && std::env::var_os("KVXFER_UPDATE_SCREENSHOT").is_some() {
            let kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/dashboard.png");
            std::fs::copy(&file, kept).expect("the picture is kept");
        }
    }
    drop(rows);
}
