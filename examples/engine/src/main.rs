//! A small Llama engine on the CPU whose prefillers hand their KV cache to its decoders through `kvxfer`.
//!
//! ```text
//! HTTP ─ api ─► scheduler ─► model ─ chunks ─► kv::send ═ kvxfer ═► kv::receive ─► scheduler of the decoder
//!        ▲          │                             └─ notify ─► proxy
//!        └─ events ─┘
//! ```
//!
//! To see how an engine uses `kvxfer`, read [`kv`]: it is all there is.

mod api;
mod args;
mod kv;
mod model;
mod notify;
mod sample;
mod scheduler;
mod text;

use api::Service;
use args::{Args, Notify};
use clap::Parser;
use kv::Terms;
use kv::receive::Inbox;
use kv::send::Outbox;
use kvxfer::Agent;
use model::{Config, Model, Setup};
use notify::Notifier;
use scheduler::Scheduler;
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use text::Text;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long requests under way may take after the signal to end.
const DRAIN: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let args = Args::parse();
    set_threads(&args);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kvxfer-engine: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The matrix library asks the environment for its number of threads at every product, and counts the machine's cores in
/// `/proc/cpuinfo` where that says nothing. A process cannot safely change its own environment, so it starts over with it.
fn set_threads(args: &Args) {
    let threads = args.threads().to_string();
    // Rows are shared out here, by the tile; the other pool would only spin.
    let wanted = [("RAYON_NUM_THREADS", threads.as_str()), ("CANDLE_NUM_THREADS", "1")];
    if wanted.iter().all(|(name, value)| std::env::var(name).as_deref() == Ok(value)) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let arguments = std::env::args_os().skip(1);
    let e = std::process::Command::new(program).args(arguments).envs(wanted).exec();
    eprintln!("kvxfer-engine: cannot set the number of threads ({e}); it will be slower");
}

fn run(args: &Args) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the HTTP runtime: {e}"))?;
    // Before the model is loaded: a port in use should not take a minute to be noticed.
    let address = format!("{}:{}", args.host, args.port);
    let listener = runtime
        .block_on(TcpListener::bind(&address))
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another --port"))?;
    let (service, agent) = set_up(args, runtime.handle())?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    tracing::info!(role = ?args.role, model = service.names[0], "serving on http://{address}");
    let result = runtime.block_on(serve(listener, service));
    // Peers are told, so that they need not find out.
    if let Err(e) = agent.shutdown(Duration::from_secs(1)) {
        tracing::debug!(error = %e, "shutting the agent down");
    }
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

/// Loads the model and starts everything but the HTTP server.
fn set_up(args: &Args, runtime: &tokio::runtime::Handle) -> Result<(Service, Agent), String> {
    let started = Instant::now();
    let config = args.model.as_deref().map_or_else(|| args.random_config(), Config::from_folder)?;
    let limits = args.limits(&config)?;
    let setup = Setup { positions: limits.positions, chunk_tokens: args.chunk(), threads: args.threads() };
    let (model, text) = match &args.model {
        Some(folder) => (Model::from_folder(folder, config, setup)?, Text::from_folder(folder)?),
        None => (Model::random(config, args.random, setup)?, Text::bytes()?),
    };
    let (model, text) = (Arc::new(model), Arc::new(text));
    tracing::info!(fingerprint = model.fingerprint, ?limits, took = ?started.elapsed(), "model loaded");

    let terms = Terms::new(&model);
    let mut builder = Agent::builder();
    if let Some(port) = args.receives() {
        builder = builder.listen(format!("tcp://{}:{port}", args.kv_host));
    }
    let agent = builder.env().and_then(kvxfer::AgentBuilder::build).map_err(|e| e.to_string())?;
    let inbox = match args.receives() {
        Some(_) => {
            let inbox = Inbox::new(&agent, terms.clone(), args.kv_buffer, args.zero_received_kv)
                .map_err(|e| e.to_string())?;
            inbox.watch();
            Some(inbox)
        }
        None => None,
    };
    let outbox = args.sends().then(|| {
        let notifier = Notifier::new(args.proxy(), args.notify == Notify::Lmcache, runtime.clone());
        Outbox::new(agent.clone(), terms, notifier, args.kv_timeout())
    });
    let scheduler = Scheduler::start(model.clone(), text.clone(), limits, outbox.clone(), inbox.clone())
        .map_err(|e| format!("cannot start a thread: {e}"))?;
    let service = Service {
        model,
        text,
        scheduler,
        names: args.names().into(),
        started: api::now(),
        sends: args.sends(),
        usage_details: args.enable_prompt_tokens_details,
        agent: Some(agent.clone()),
        outbox,
        inbox,
    };
    Ok((service, agent))
}

/// Serves until SIGINT or SIGTERM; requests under way have a moment to end.
async fn serve(listener: TcpListener, service: Service) -> Result<(), String> {
    let on = |kind| signal(kind).map_err(|e| format!("cannot wait for signals: {e}"));
    let (mut int, mut term) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    let (told, mut stopping) = tokio::sync::watch::channel(false);
    let server = axum::serve(listener, api::router(service)).with_graceful_shutdown(async move {
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
        tracing::info!("stopping");
        let _ = told.send(true);
    });
    let late = async {
        let _ = stopping.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server => result.map_err(|e| e.to_string()),
        () = late => Ok(()),
    }
}
