//! The server: sockets, tasks and time around the router.
//!
//! [`start`] binds everything and refuses what cannot work; [`Server::run`] serves until it is told to end. All requests
//! share one [`App`]: the router behind a lock that is never held across a wait, the pool of connections to the
//! instances, statistics. One task reads each notification connection, one probes each instance; nothing polls.

mod complete;
mod emit;
mod leg;
mod listen;
mod reply;
mod routes;
mod trace;

pub(crate) use reply::{error_response, json_response};
pub(crate) use routes::bearer;

use crate::config::{Config, ConfigError, Instance, Settings};
use crate::health::Probes;
use crate::metrics::Metrics;
use crate::notify::{self, Heard};
use crate::router::{Admin, Ids, InstanceId, Noted, Router};
use crate::stats::Stats;
use crate::tls;
use crate::upstream::Upstream;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{HeaderMap, Method};
use kvxfer_proto::Time;
use leg::Waker;
use parking_lot::{Mutex, RwLock};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

/// Unused caches that are being used up at the same time.
const MOST_CONSUMERS: usize = 256;

/// What cannot be started or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address or another thing of the system; the text names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What all requests share.
pub struct App {
    router: Mutex<Router<Waker>>,
    settings: RwLock<Arc<Settings>>,
    pub(crate) upstream: Upstream,
    pub(crate) probes: Probes,
    pub(crate) stats: Stats,
    pub(crate) metrics: Metrics,
    started: Instant,
    ids: String,
    next_id: AtomicU64,
    consumers: Arc<Semaphore>,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("started", &self.started).finish_non_exhaustive()
    }
}

impl App {
    /// Time since the start, as the router counts it.
    pub(crate) fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Asks or tells the router something, and wakes whom that concerns.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Router<Waker>, Time) -> T) -> T {
        let (answer, wakes) = {
            let mut router = self.router.lock();
            let answer = work(&mut router, self.now());
            (answer, router.take_wakes())
        };
        for waker in wakes {
            waker.notify_one();
        }
        answer
    }

    /// The settings in force.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read())
    }

    /// An id of this proxy, not used before by it or another one.
    pub(crate) fn new_id(&self) -> String {
        format!("{}{}", self.ids, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Headers of a client that go on to the instances.
    pub(crate) fn forwarded(&self, from: &HeaderMap) -> HeaderMap {
        let mut headers = self.own_headers();
        let settings = self.settings();
        // A key for this proxy is none for the instances.
        if settings.upstream_api_key.is_none()
            && settings.api_keys.is_empty()
            && let Some(key) = from.get(AUTHORIZATION)
        {
            headers.insert(AUTHORIZATION, key.clone());
        }
        for name in ["traceparent", "tracestate", "session-id", "x-session-id"] {
            if let Some(value) = from.get(name) {
                headers.insert(HeaderName::from_static(name), value.clone());
            }
        }
        headers
    }

    /// Headers of a request of the proxy's own.
    pub(crate) fn own_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(8);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = &self.settings().upstream_api_key
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {}", key.expose()))
        {
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        headers
    }

    /// Lets a decoder use up a cache that nobody will ask for, so that its memory is free again.
    pub(crate) fn consume(self: &Arc<Self>, decoder: Arc<Instance>, body: Vec<u8>, headers: &HeaderMap) {
        let Ok(permit) = Arc::clone(&self.consumers).try_acquire_owned() else {
            tracing::warn!(decoder = decoder.name, "too many unused caches; this one is left to the decoder");
            return;
        };
        let headers = headers_for(headers, &self.new_id());
        let app = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = permit;
            let by = Instant::now() + app.settings().deadlines.decode;
            let answer =
                app.upstream.send(&decoder, Method::POST, "/v1/completions", &headers, body.into(), by).await;
            match answer {
                Ok(response) => {
                    if let Err(trouble) = Upstream::whole(&decoder, response.into_body(), 1 << 20, by).await {
                        tracing::debug!(problem = trouble.text, "an unused cache may stay");
                    }
                }
                Err(trouble) => tracing::debug!(problem = trouble.text, "an unused cache may stay"),
            }
        });
    }

    /// A notification, or what came instead of one.
    fn hear(&self, heard: &Heard) {
        match heard {
            Heard::Notification(notification) => {
                let noted = self.with(|router, _| router.note(notification));
                self.count(noted, notification.req_id());
            }
            Heard::Garbage => self.metrics.bad_message("zmq"),
        }
    }

    pub(crate) fn count(&self, noted: Noted, id: &str) {
        let kind = match noted {
            Noted::Progress => "progress",
            Noted::Ready => "ready",
            Noted::Failed => "failed",
            Noted::Duplicate => "duplicate",
            Noted::Late => "late",
            Noted::Unknown => "unknown",
        };
        self.metrics.notification(kind);
        if matches!(noted, Noted::Duplicate | Noted::Late | Noted::Unknown) {
            tracing::debug!(kind, id, "a notification that changes nothing");
        }
    }

    /// Takes over what a newly read configuration says. Instances that are not in it any more are drained and go.
    pub(crate) fn reload(self: &Arc<Self>, config: &Config) {
        *self.settings.write() = Arc::new(config.settings.clone());
        let (mut added, mut gone) = (Vec::new(), Vec::new());
        self.with(|router, now| {
            router.reload(now, &config.settings);
            let mut old = router.instances();
            for new in config.instances() {
                let same = |(_, known): &(InstanceId, Arc<Instance>)| {
                    known.name == new.name && known.role == new.role && known.authority() == new.authority()
                };
                match old.iter().position(same) {
                    Some(at) => {
                        let (id, _) = old.swap_remove(at);
                        router.update(now, id, new.clone());
                    }
                    None => added.push(new.clone()),
                }
            }
            for (id, instance) in old {
                router.set_admin(now, id, Admin::Removing);
                gone.push(instance.name.clone());
            }
            for new in &added {
                router.add(now, new.clone());
            }
        });
        for instance in &config.prefillers {
            self.stats.add_prefiller(&instance.name);
        }
        self.probes.cover(self);
        let added: Vec<&str> = added.iter().map(|instance| instance.name.as_str()).collect();
        tracing::info!(?added, ?gone, "read the configuration again");
    }
}

/// These headers for one request, which the instance shall know by this id.
pub(crate) fn headers_for(forwarded: &HeaderMap, id: &str) -> HeaderMap {
    let mut headers = forwarded.clone();
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    headers
}

/// A proxy whose sockets are bound.
pub struct Server {
    app: Arc<App>,
    config: Config,
    clients: Vec<TcpListener>,
    engines: Vec<TcpListener>,
    tls: Arc<RwLock<Option<TlsAcceptor>>>,
}

/// Binds the sockets. Must be called inside a tokio runtime.
pub async fn start(config: Config) -> Result<Server, StartError> {
    config.check()?;
    raise_descriptor_limit();
    let acceptor = config.tls.as_ref().map(tls::acceptor).transpose()?;
    let clients = notify::listen("--host/--port", &config.listen).await?;
    let engines = notify::listen("--proxy-host/--proxy-port", &config.notify).await?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let started = u64::try_from(started).unwrap_or(u64::MAX);
    let ids = Ids::new(started, random()?);
    let settings = config.settings.clone();
    let app = Arc::new(App {
        router: Mutex::new(Router::new(&settings, config.instances().cloned(), ids)),
        upstream: Upstream::new(settings.deadlines.connect),
        probes: Probes::default(),
        stats: Stats::new(Time(0), settings.stats_interval.0),
        metrics: Metrics::new(),
        started: Instant::now(),
        ids: format!("{started:x}{:08x}-", random()? as u32),
        next_id: AtomicU64::new(1),
        consumers: Arc::new(Semaphore::new(MOST_CONSUMERS)),
        settings: RwLock::new(Arc::new(settings)),
    });
    for instance in &config.prefillers {
        app.stats.add_prefiller(&instance.name);
    }
    Ok(Server { app, config, clients, engines, tls: Arc::new(RwLock::new(acceptor)) })
}

impl Server {
    /// Where clients connect.
    pub fn address(&self) -> Option<SocketAddr> {
        self.clients.first()?.local_addr().ok()
    }

    /// Where engines connect.
    pub fn notify_address(&self) -> Option<SocketAddr> {
        self.engines.first()?.local_addr().ok()
    }

    /// Changes the running proxy.
    pub fn handle(&self) -> Handle {
        Handle { app: Arc::clone(&self.app), tls: Arc::clone(&self.tls) }
    }

    /// Serves until `end` is ready, then lets requests under way finish within the drain deadline. False when some had
    /// to be cut off.
    pub async fn run(self, end: impl Future<Output = ()>) -> bool {
        let Self { app, config, clients, engines, tls } = self;
        describe(&config, &clients, &engines, tls.read().is_some());
        let mut tasks = Vec::new();
        let hear: Arc<dyn Fn(Heard) + Send + Sync> = {
            let app = Arc::clone(&app);
            Arc::new(move |heard| app.hear(&heard))
        };
        for listener in engines {
            tasks.push(tokio::spawn(notify::serve(listener, Arc::clone(&hear))));
        }
        app.probes.cover(&app);
        tasks.push(tokio::spawn(print_stats(Arc::clone(&app))));
        let door = listen::Door::new(&app, tls);
        let accepting: Vec<_> =
            clients.into_iter().map(|listener| tokio::spawn(Arc::clone(&door).accept(listener))).collect();
        end.await;
        app.with(|router, _| router.end());
        let (legs, patience) = (app.with(|router, _| router.legs()), app.settings().deadlines.drain);
        tracing::info!(legs, ?patience, "ending: no new requests, those under way may finish");
        // New connections are still answered, with 503, until the last request has left.
        let drained = door.drain(patience).await;
        for task in accepting.into_iter().chain(tasks) {
            task.abort();
        }
        if let Some(report) = app.stats.last_report() {
            println!("{report}");
        }
        if !drained {
            tracing::warn!("cut off requests that were still under way after {patience:?}");
        }
        drained
    }
}

/// Changes a running proxy.
#[derive(Clone)]
pub struct Handle {
    app: Arc<App>,
    tls: Arc<RwLock<Option<TlsAcceptor>>>,
}

impl Handle {
    /// Takes over a newly read configuration. Addresses stay as they are; certificates are read again.
    pub fn reload(&self, config: &Config) -> Result<(), StartError> {
        config.check()?;
        if let Some(files) = &config.tls
            && self.tls.read().is_some()
        {
            *self.tls.write() = Some(tls::acceptor(files)?);
        }
        self.app.reload(config);
        Ok(())
    }
}

/// The guides' statistics on standard output, when there is something new.
async fn print_stats(app: Arc<App>) {
    loop {
        let every = app.settings().stats_interval.0;
        if every.is_zero() {
            return;
        }
        tokio::time::sleep(every).await;
        if let Some(report) = app.stats.report(app.now()) {
            println!("{report}");
        }
    }
}

/// Says what it is going to do, so that a wrong flag is seen at once.
fn describe(config: &Config, clients: &[TcpListener], engines: &[TcpListener], tls: bool) {
    let list = |listeners: &[TcpListener]| {
        let all: Vec<String> =
            listeners.iter().filter_map(|l| l.local_addr().ok()).map(|at| at.to_string()).collect();
        all.join(", ")
    };
    let scheme = if tls { "https" } else { "http" };
    tracing::info!("clients: {scheme} on {}; notifications: ZeroMQ PULL on {}", list(clients), list(engines));
    for instance in &config.prefillers {
        tracing::info!("{}: http://{} weight {}", instance.name, instance.authority(), instance.weight);
    }
    for instance in &config.decoders {
        let receiver = &instance.receiver;
        tracing::info!(
            "{}: http://{} weight {}, receives at {} init {:?} alloc {:?} ({} tensor-parallel ranks)",
            instance.name,
            instance.authority(),
            instance.weight,
            receiver.host,
            receiver.init_ports,
            receiver.alloc_ports,
            instance.tp_ranks()
        );
    }
}

fn random() -> std::io::Result<u64> {
    getrandom::u64().map_err(std::io::Error::other)
}

/// Every stream needs two descriptors; the usual soft limit of 1,024 is soon reached.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(e) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(error = %e, "cannot raise the limit of open files");
        }
    }
}

/// Reads a configuration, serves on SIGHUP-reloads and drains on SIGTERM or Ctrl-C; a second one ends it at once. True
/// when every request could finish.
pub async fn serve(
    config: Config,
    reload: impl Fn() -> Result<Config, ConfigError> + Send + 'static,
) -> Result<bool, StartError> {
    use tokio::signal::unix::{SignalKind, signal};
    let server = start(config).await?;
    let handle = server.handle();
    let mut hangup = signal(SignalKind::hangup())?;
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let reloader = tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let reloaded = reload().map_err(StartError::from).and_then(|config| handle.reload(&config));
            if let Err(e) = reloaded {
                tracing::error!(error = %e, "the configuration stays as it was");
            }
        }
    });
    let mut told_to_end = async move || {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let running = server.run(async {
        // It ends as well when nobody is left to tell it.
        let _ = ended.await;
    });
    tokio::pin!(running);
    let mut end = Some(end);
    let drained = loop {
        tokio::select! {
            drained = &mut running => break drained,
            () = told_to_end() => {
                if end.take().is_none() {
                    tracing::warn!("told to end for the second time: ending at once");
                    break false;
                }
            }
        }
    };
    reloader.abort();
    Ok(drained)
}
