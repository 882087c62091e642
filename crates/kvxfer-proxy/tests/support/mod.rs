//! What the proxy's tests stand on: a scripted engine below the documented HTTP seam, a client, and a proxy in this
//! process with ports chosen by the system.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub(crate) mod client;
pub(crate) mod engine;

use engine::Engine;
use kvxfer_proxy::config::File;
use kvxfer_proxy::{Config, Flags, Handle};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Upper bound of anything a test waits for; reaching it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A proxy in this process.
pub(crate) struct Proxy {
    pub(crate) at: SocketAddr,
    pub(crate) notify: SocketAddr,
    pub(crate) handle: Handle,
    end: Option<oneshot::Sender<()>>,
    task: JoinHandle<bool>,
}

impl Proxy {
    /// In front of these engines, with more YAML.
    pub(crate) async fn start(prefillers: &[&Engine], decoders: &[&Engine], more: &str) -> Self {
        Self::with(&yaml(prefillers, decoders, more)).await
    }

    pub(crate) async fn with(yaml: &str) -> Self {
        let config = config(yaml);
        let server = kvxfer_proxy::start(config).await.expect("the proxy starts");
        let (at, notify) = (server.address().expect("bound"), server.notify_address().expect("bound"));
        let handle = server.handle();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(server.run(async {
            let _ = ended.await;
        }));
        Self { at, notify, handle, end: Some(end), task }
    }

    /// Tells it to end, without waiting.
    pub(crate) fn end(&mut self) {
        self.end.take();
    }

    /// Waits until it has ended. True when every request could finish.
    pub(crate) async fn ended(mut self) -> bool {
        self.end.take();
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends").expect("no panic")
    }

    pub(crate) async fn stats(&self) -> serde_json::Value {
        client::get(self.at, "/stats").await.json()
    }

    /// Waits until `/stats` is as wanted.
    pub(crate) async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let by = tokio::time::Instant::now() + PATIENCE;
        loop {
            let stats = self.stats().await;
            if wanted(&stats) {
                return stats;
            }
            assert!(tokio::time::Instant::now() < by, "{what}: {stats:#}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A configuration from YAML.
pub(crate) fn config(yaml: &str) -> Config {
    let file = File::parse(yaml).expect("valid YAML");
    let config = Flags::default().onto(file).expect("valid settings");
    config.check().expect("valid configuration");
    config
}

/// The YAML for these engines. Every decoder has one rank unless it says otherwise.
pub(crate) fn yaml(prefillers: &[&Engine], decoders: &[&Engine], more: &str) -> String {
    let mut yaml = "host: 127.0.0.1\nport: 0\nproxy_host: 127.0.0.1\nproxy_port: 0\n".to_owned();
    yaml += "prefillers:\n";
    for engine in prefillers {
        writeln!(yaml, "  - {{host: 127.0.0.1, port: {}}}", engine.at.port()).expect("a string");
    }
    if prefillers.is_empty() {
        yaml.truncate(yaml.len() - 1);
        yaml += " []\n";
    }
    yaml += "decoders:\n";
    for engine in decoders {
        let ports =
            |from: u32| (0..engine.ranks).map(|i| (from + i).to_string()).collect::<Vec<_>>().join(", ");
        let (init, alloc) = (ports(7300), ports(7400));
        writeln!(
            yaml,
            "  - {{host: 127.0.0.1, port: {}, init_ports: [{}], alloc_ports: [{}]}}",
            engine.at.port(),
            init,
            alloc
        )
        .expect("a string");
    }
    yaml + more
}

/// One prefiller, one decoder and a proxy between, with notifications working.
pub(crate) async fn one_and_one(more: &str) -> (Engine, Engine, Proxy) {
    let (prefiller, decoder) = (Engine::start(), Engine::start());
    let proxy = Proxy::start(&[&prefiller], &[&decoder], more).await;
    prefiller.notify(proxy.notify).await;
    (prefiller, decoder, proxy)
}
