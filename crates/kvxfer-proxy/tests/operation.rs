//! Running it: the end, the administration, keys, TLS, a new configuration, ports in use.

mod support;

use http_body_util::BodyExt as _;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use kvxfer_proxy::StartError;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use support::client::{Answer, get, open, post, request, send, with_key};
use support::engine::{Engine, Mood, answer_to};
use support::{Proxy, config, one_and_one, yaml};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

const PROMPT: &str = "What is a proxy?";

fn ask(stream: bool) -> Value {
    json!({"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": stream})
}

fn expected() -> String {
    answer_to(PROMPT, 8)
}

#[tokio::test]
async fn at_the_end_requests_under_way_finish_and_new_ones_are_refused() {
    let (_prefiller, decoder, mut proxy) = one_and_one("").await;
    decoder.pause(Duration::from_millis(50));
    let (status, headers, mut stream) =
        open(proxy.at, request(Method::POST, "/v1/completions", ask(true).to_string())).await;
    let mut text = stream.piece().await.expect("the first token");
    proxy.end();
    loop {
        let health = get(proxy.at, "/health").await;
        if health.status == StatusCode::SERVICE_UNAVAILABLE {
            assert_eq!(health.json()["status"], "ending");
            break;
        }
    }
    let refused = post(proxy.at, "/v1/completions", &ask(false)).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.error().contains("the proxy is ending"));
    while let Some(piece) = stream.piece().await {
        text += &piece;
    }
    assert_eq!(Answer { status, headers, body: text.into() }.content(), expected());
    let at = proxy.at;
    assert!(proxy.ended().await, "everything could finish");
    assert!(tokio::net::TcpStream::connect(at).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut_off() {
    let (prefiller, _decoder, proxy) = one_and_one("deadlines: {drain: 200ms}\n").await;
    prefiller.mood(Mood::Hangs(0));
    let at = proxy.at;
    let asked = tokio::spawn(async move { post(at, "/v1/completions", &ask(true)).await });
    proxy.until("it is under way", |s| s["prefill"] == json!(1)).await;
    assert!(!proxy.ended().await);
    asked.abort();
}

#[tokio::test]
async fn instances_come_and_go_at_run_time_for_whoever_has_the_token() {
    let (first, second) = (Engine::start(), Engine::start());
    let decoder = Engine::start();
    let proxy = Proxy::start(&[&first], &[&decoder], "admin_token: secret\n").await;
    for engine in [&first, &second] {
        engine.notify(proxy.notify).await;
    }
    let admin = async |method: Method, path: &str, body: Value| {
        send(proxy.at, with_key(request(method, path, body.to_string()), "secret")).await
    };
    assert_eq!(get(proxy.at, "/admin/instances").await.status, StatusCode::UNAUTHORIZED);
    let wrong = send(proxy.at, with_key(request(Method::GET, "/admin/instances", ""), "guess")).await;
    assert_eq!(wrong.status, StatusCode::UNAUTHORIZED);

    let new = json!({"role": "prefiller", "host": "127.0.0.1", "port": second.at.port(), "weight": 3});
    let added = admin(Method::POST, "/admin/instances", new.clone()).await;
    assert_eq!((added.status, added.json()), (StatusCode::CREATED, json!({"name": "prefiller2"})));
    let again = admin(Method::POST, "/admin/instances", new).await;
    assert!(again.error().contains("prefiller2 is there"), "{}", again.error());
    for (bad, says) in [
        (json!({"role": "cook", "port": 1}), "cook"),
        (json!({"role": "prefiller", "port": 70_000}), "70000"),
        (json!({"role": "prefiller", "port": 1, "wheight": 2}), "wheight"),
        (json!({"role": "prefiller", "port": 1, "name": "prefiller1"}), "there is an instance of this name"),
        (json!({"role": "decoder", "port": 1}), "init_ports"),
        (json!({"role": "decoder", "port": 1, "init_ports": [1, 2], "alloc_ports": [3]}), "alloc_ports"),
    ] {
        let answer = admin(Method::POST, "/admin/instances", bad).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(answer.error().contains(says), "{} should say {says}", answer.error());
    }

    for _ in 0..8 {
        assert_eq!(post(proxy.at, "/v1/completions", &ask(true)).await.content(), expected());
    }
    assert_eq!((first.completions().len(), second.completions().len()), (2, 6), "by weight");
    admin(Method::POST, "/admin/instances/prefiller2/drain", json!(null)).await;
    for _ in 0..2 {
        post(proxy.at, "/v1/completions", &ask(true)).await;
    }
    assert_eq!(first.completions().len(), 4);
    admin(Method::POST, "/admin/instances/prefiller2/resume", json!(null)).await;
    assert_eq!(
        admin(Method::DELETE, "/admin/instances/prefiller1", json!(null)).await.status,
        StatusCode::OK
    );
    assert_eq!(
        admin(Method::DELETE, "/admin/instances/prefiller1", json!(null)).await.status,
        StatusCode::NOT_FOUND
    );
    post(proxy.at, "/v1/completions", &ask(true)).await;
    assert_eq!((first.completions().len(), second.completions().len()), (4, 7));
    let list = admin(Method::GET, "/admin/instances", json!(null)).await.json();
    let names: Vec<&str> =
        list["instances"].as_array().expect("some").iter().filter_map(|i| i["name"].as_str()).collect();
    assert_eq!(names, ["prefiller2", "decoder1"]);
}

#[tokio::test]
async fn the_administration_is_closed_without_a_token() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    let answer = send(proxy.at, with_key(request(Method::GET, "/admin/instances", ""), "")).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.error().contains("--admin-token"));
}

#[tokio::test]
async fn keys_are_asked_for_and_not_passed_on() {
    let (prefiller, decoder, proxy) = one_and_one("api_keys: [one, two]\nupstream_api_key: theirs\n").await;
    let body = ask(false).to_string();
    for (key, status) in [(None, 401), (Some("three"), 401), (Some("one"), 200), (Some("two"), 200)] {
        let asked = request(Method::POST, "/v1/completions", body.clone());
        let asked = match key {
            Some(key) => with_key(asked, key),
            None => asked,
        };
        let answer = send(proxy.at, asked).await;
        assert_eq!(answer.status.as_u16(), status, "{key:?}: {}", answer.text());
        if status == 401 {
            assert!(answer.error().contains("API key") && answer.headers.contains_key("www-authenticate"));
        }
    }
    assert_eq!(get(proxy.at, "/v1/models").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(get(proxy.at, "/health").await.status, StatusCode::OK);
    for headers in prefiller.headers().iter().chain(&decoder.headers()) {
        assert_eq!(headers["authorization"], "Bearer theirs");
    }
    assert_eq!(prefiller.completions().len(), 2);
}

#[tokio::test]
async fn https_is_served_with_the_given_certificate() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls");
    let (_prefiller, _decoder, proxy) =
        one_and_one(&format!("tls: {{cert: {folder}/cert.pem, key: {folder}/key.pem}}\n")).await;
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(format!("{folder}/cert.pem")).expect("PEM"))
        .expect("a certificate");
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(proxy.at).await.expect("connected");
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream).await.expect("TLS");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    let response = sender
        .send_request(request(Method::POST, "/v1/completions", ask(true).to_string()))
        .await
        .expect("answered");
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("readable").to_bytes();
    assert_eq!(Answer { status: head.status, headers: head.headers, body }.content(), expected());
    // A client without TLS gets nothing and does no harm.
    let plain = tokio::net::TcpStream::connect(proxy.at).await.expect("connected");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(plain)).await.expect("HTTP");
    tokio::spawn(connection);
    sender.send_request(request(Method::GET, "/health", "")).await.expect_err("no HTTP here");
}

#[tokio::test]
async fn what_cannot_be_started_names_the_key_or_the_port() {
    let (prefiller, decoder) = (Engine::start(), Engine::start());
    let base = yaml(&[&prefiller], &[&decoder], "");
    let taken = prefiller.at.port();
    for (yaml, says) in [
        (base.replacen("port: 0", &format!("port: {taken}"), 1), format!("--port 127.0.0.1:{taken}")),
        (
            base.replacen("proxy_port: 0", &format!("proxy_port: {taken}"), 1),
            format!("--proxy-port 127.0.0.1:{taken}"),
        ),
        (base.replacen("host: 127.0.0.1", "host: 192.0.2.1", 1), "--host/--port 192.0.2.1".to_owned()),
        (
            base.clone() + "tls: {cert: /nowhere/cert.pem, key: /nowhere/key.pem}\n",
            "tls.cert: /nowhere/cert.pem".to_owned(),
        ),
    ] {
        let Err(problem) = kvxfer_proxy::start(config(&yaml)).await else { panic!("{says}: it started") };
        assert!(problem.to_string().contains(&says), "{problem} should say {says}");
        if let StartError::Io(e) = &problem
            && e.kind() == std::io::ErrorKind::AddrInUse
        {
            assert!(problem.to_string().contains("another program listens there"));
        }
    }
}

#[tokio::test]
async fn a_new_configuration_is_taken_over_without_losing_a_request() {
    let (first, second, decoder) = (Engine::start(), Engine::start(), Engine::start());
    let proxy = Proxy::start(&[&first], &[&decoder], "").await;
    for engine in [&first, &second] {
        engine.notify(proxy.notify).await;
    }
    first.mood(Mood::Slow(Duration::from_millis(300)));
    let at = proxy.at;
    let asked = tokio::spawn(async move { post(at, "/v1/completions", &ask(true)).await });
    proxy.until("it is at the first", |s| s["prefill"] == json!(1)).await;
    // The first goes, the second comes, and from now on a key is asked for.
    let named = format!("- {{name: fresh, host: 127.0.0.1, port: {}}}", second.at.port());
    let plain = format!("- {{host: 127.0.0.1, port: {}}}", second.at.port());
    let new = config(&yaml(&[&second], &[&decoder], "api_keys: [new]\n").replace(&plain, &named));
    proxy.handle.reload(&new).expect("reloaded");
    assert_eq!(asked.await.expect("no panic").content(), expected(), "what was under way goes on");
    assert_eq!(post(at, "/v1/completions", &ask(true)).await.status, StatusCode::UNAUTHORIZED);
    let answer =
        send(at, with_key(request(Method::POST, "/v1/completions", ask(true).to_string()), "new")).await;
    assert_eq!(answer.content(), expected());
    assert_eq!((first.completions().len(), second.completions().len()), (1, 1));
    let stats =
        proxy.until("the first is gone", |s| s["instances"].as_array().is_some_and(|i| i.len() == 2)).await;
    assert_eq!(
        (&stats["instances"][0]["name"], &stats["instances"][1]["name"]),
        (&json!("fresh"), &json!("decoder1"))
    );
    assert_eq!(stats["instances"][1]["started"], json!(2), "the decoder is the same as before");
}

#[tokio::test]
async fn what_is_seen_from_outside_is_told() {
    let (_prefiller, _decoder, proxy) = one_and_one("").await;
    for _ in 0..3 {
        post(proxy.at, "/v1/completions", &ask(true)).await;
    }
    let stats = proxy.stats().await;
    assert_eq!(stats["requests"]["ok"], json!(3), "{stats:#}");
    assert_eq!(stats["ttft"][0]["name"], "prefiller1");
    let metrics = get(proxy.at, "/metrics").await.text();
    for line in [
        "kvxfer_proxy_requests_total{endpoint=\"/v1/completions\",outcome=\"ok\"} 3",
        "kvxfer_proxy_instance_up{instance=\"decoder1\",role=\"decoder\"} 1",
        "kvxfer_proxy_notifications_total{kind=\"ready\"} 3",
        "kvxfer_proxy_kv_bytes_total 3000",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    let page = get(proxy.at, "/dashboard").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.text().starts_with("<!"));
}
