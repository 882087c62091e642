//! The proxy under load: ours and one in Python that speaks the same protocol, both in front of the same upstream of
//! canned responses, one after the other in one run.
//!
//! The proxy under test is a process of its own, pinned to one core. The upstream (prefiller, decoder and notifier in
//! one) and the load generator share this process, pinned to the other core. Measured are requests a second, the time
//! a proxy adds to a request, a thousand concurrent streams with their memory and order, and the idle proxy.
//!
//! `cargo run --release -p kvxfer-proxy --example proxy_bench -- --json build/bench-proxy.json`

mod http;
mod load;
mod process;
mod report;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use load::{Pace, Target, Task};
use process::{Proxy, Usage};
use report::{Report, Row};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
#[command(about = "Measures the proxy against one in Python")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Command {
    /// The proxy under test; started by the benchmark itself.
    #[command(hide = true)]
    Serve(process::Ports),
}

#[derive(Args, Clone)]
struct Options {
    /// Seconds of each throughput and latency run.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Requests under way in a throughput run.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 8)]
    tokens: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Concurrent streams of the stream run.
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// Tokens of each stream, ten a second.
    #[arg(long, default_value_t = 40)]
    stream_tokens: usize,
    /// Seconds over which the idle proxy is watched.
    #[arg(long, default_value_t = 5.0)]
    idle_seconds: f64,
    /// Core of the proxy under test.
    #[arg(long, default_value_t = 0)]
    proxy_core: usize,
    /// Core of the upstream and the load.
    #[arg(long, default_value_t = 1)]
    load_core: usize,
    /// A Python with fastapi, uvicorn, httpx, msgspec and pyzmq; `none` leaves the comparison out.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Write the figures here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// End with an error when a bar is missed.
    #[arg(long)]
    check: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(Command::Serve(ports)) = arguments.command {
        return process::serve(&ports);
    }
    let options = arguments.options;
    process::raise_file_limit()?;
    process::pin(options.load_core)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(run(&options))?;
    print!("{report}");
    if let Some(path) = &options.json {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, report.json())?;
        println!("written: {}", path.display());
    }
    if options.check && !report.all_met() {
        return Err("a bar is missed".into());
    }
    Ok(())
}

/// Turns that two sides take in one measurement, so that whatever else the machine does befalls both alike.
const TURNS: u32 = 5;

async fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new(options);
    {
        let ours = Proxy::ours(options).await?;
        let theirs = Proxy::python(options).await?;
        for (name, stream, chat) in [
            ("completions, streamed", true, false),
            ("completions, in one piece", false, false),
            ("chat, streamed", true, true),
        ] {
            let task = Task::new(options.prompt_tokens, options.tokens, stream, chat);
            report.rows.push(row(options, name, &task, &ours, theirs.as_ref()).await?);
        }
        ours.stop().await?;
        if let Some(theirs) = theirs {
            theirs.stop().await?;
        }
    }
    // Fresh processes, so that no memory is left over from the load before.
    let proxy = Proxy::ours(options).await?;
    report.streams = Some(streams(options, &proxy).await?);
    proxy.stop().await?;
    if let Some(proxy) = Proxy::python(options).await? {
        report.their_streams = Some(streams(options, &proxy).await?);
        proxy.stop().await?;
    }
    Ok(report)
}

/// One kind of request: as many as either proxy can take, then the time each adds at half of its own most.
async fn row(
    options: &Options,
    name: &'static str,
    task: &Task,
    ours: &Proxy,
    theirs: Option<&Proxy>,
) -> Result<Row> {
    let mut row = Row::new(name);
    let turn = Duration::from_secs_f64(options.seconds) / TURNS;
    // Connections are made and memory is warm before the clock starts.
    for proxy in [Some(ours), theirs].into_iter().flatten() {
        load::closed(
            Target::proxy(proxy.address()),
            task,
            options.concurrency,
            turn.min(Duration::from_secs(1)),
        )
        .await?;
    }
    let (mut our_part, mut their_part) = (report::Throughput::default(), report::Throughput::default());
    for _ in 0..TURNS {
        our_part.add(throughput(options, ours, task, turn).await?);
        if let Some(theirs) = theirs {
            their_part.add(throughput(options, theirs, task, turn).await?);
        }
    }
    row.added = Some(added(ours, task, our_part.rate() / 2.0, turn).await?);
    row.ours = our_part;
    if let Some(theirs) = theirs {
        row.theirs_added = Some(added(theirs, task, their_part.rate() / 2.0, turn).await?);
        row.theirs = Some(their_part);
    }
    Ok(row)
}

/// As many requests as it can take.
async fn throughput(
    options: &Options,
    proxy: &Proxy,
    task: &Task,
    length: Duration,
) -> Result<report::Throughput> {
    let before = proxy.usage()?;
    let outcome = load::closed(Target::proxy(proxy.address()), task, options.concurrency, length).await?;
    let after = proxy.usage()?;
    outcome.no_errors()?;
    Ok(report::Throughput {
        requests: outcome.times.len(),
        took: outcome.took,
        cpu: Usage::cpu(before, after),
    })
}

/// What a proxy adds to requests that come at a steady rate, over the same calls made directly.
async fn added(proxy: &Proxy, task: &Task, rate: f64, turn: Duration) -> Result<report::Added> {
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        for (target, times) in
            [(Target::direct(proxy.upstream()), &mut direct), (Target::proxy(proxy.address()), &mut through)]
        {
            let outcome = load::open(target, task, rate, turn).await?;
            outcome.no_errors()?;
            times.extend(outcome.times);
        }
    }
    Ok(report::Times::new(through).added(&report::Times::new(direct)))
}

/// Many streams at once, slow ones; then nothing at all.
async fn streams(options: &Options, proxy: &Proxy) -> Result<report::Streams> {
    let task = Task::new(options.prompt_tokens, options.stream_tokens, true, false);
    let target = Target::proxy(proxy.address());
    load::closed(target, &task, 4, Duration::from_millis(300)).await?.no_errors()?;
    let idle = proxy.usage()?;
    proxy.set_pace(Pace::TENTH_OF_A_SECOND);
    let outcome = load::at_once(target, &task, options.streams).await;
    proxy.set_pace(Pace::NONE);
    let peak = proxy.usage()?;
    let errors = outcome.errors.len();
    let example = outcome.errors.into_iter().next();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = proxy.usage()?;
    tokio::time::sleep(Duration::from_secs_f64(options.idle_seconds)).await;
    let after = proxy.usage()?;
    Ok(report::Streams {
        number: options.streams,
        errors,
        example,
        bytes_each: (peak.most_memory.saturating_sub(idle.memory)) / options.streams as u64,
        idle_core: Usage::share(before, after),
    })
}

/// An address on this machine whose port the system chooses.
fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}
