//! The `kvxfer` command: `demo` shows the library at work, `bench` measures it beside what it stands on, `doctor` says
//! what a machine can do.
//!
//! Exit codes: 0 all held, 1 something did not hold or failed, 2 wrong usage, 130 interrupted (by the signal itself).
#![forbid(unsafe_code)]

mod agents;
mod args;
mod bench;
mod child;
mod config;
mod content;
mod demo;
mod doctor;
mod machine;
mod proxy;
mod stats;
mod table;
mod units;

use args::{ChildRole, Cli, Command};
use clap::Parser;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Why the command ends with an error: one text for humans.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    text: String,
    usage: bool,
}

/// Whether everything the command looked at held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Held,
    Broken,
}

impl Failure {
    /// Something failed.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), usage: false }
    }

    /// The command line or a file it names is wrong.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), usage: true }
    }

    /// The same, said of something.
    pub(crate) fn within(self, what: impl std::fmt::Display) -> Self {
        Self { text: format!("{what}: {}", self.text), ..self }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<kvxfer_core::Error> for Failure {
    fn from(e: kvxfer_core::Error) -> Self {
        Self::new(e.to_string())
    }
}

impl From<kvxfer_core::proto::ids::InvalidId> for Failure {
    fn from(e: kvxfer_core::proto::ids::InvalidId) -> Self {
        Self::new(e.to_string())
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A server's log is its face; the other commands speak on standard output.
    let quietest = u8::from(matches!(cli.command, Command::Proxy(_)));
    log_to_stderr(cli.verbose.max(quietest));
    match run(&cli.command) {
        Ok(Verdict::Held) => ExitCode::SUCCESS,
        Ok(Verdict::Broken) => ExitCode::from(1),
        Err(failure) => {
            eprintln!("kvxfer: {failure}");
            ExitCode::from(if failure.usage { 2 } else { 1 })
        }
    }
}

fn run(command: &Command) -> Result<Verdict, Failure> {
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Config(command) => config::run(command),
        Command::Child(args) => {
            child::end_with_parent()?;
            let ended = match args.role {
                ChildRole::DemoReceiver => demo::receiver::run(),
                ChildRole::DemoSender => demo::sender::run(),
                ChildRole::BenchServer => bench::server::run_child(),
                ChildRole::BenchGpu => bench::gpu::run_child(),
                ChildRole::BenchNixl => bench::nixl::run_child(),
                ChildRole::CmaTarget => doctor::cma::run_target(),
            };
            // The parent prints it; saying it twice would confuse.
            if let Err(failure) = &ended {
                child::say_error(failure);
            }
            ended.map(|()| Verdict::Held).or(Ok(Verdict::Broken))
        }
    }
}

/// A pre-shared key for one run, so that nobody else on this machine can reach the memory that is moved.
pub(crate) fn secret() -> Result<String, Failure> {
    let mut bytes = [0_u8; 32];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Failure::new(format!("no random bytes: {e}")))?;
    Ok(units::hex(&bytes))
}

/// Logs go to stderr: nothing but warnings unless asked for by `-v` or `KVXFER_LOG`.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let wanted = std::env::var("KVXFER_LOG").ok().filter(|text| !text.is_empty());
    if wanted.is_some() || verbose > 0 {
        // Set once, here; a second value cannot come.
        let _ = child::LOG_FILTER.set(wanted.clone().unwrap_or_else(|| level.to_owned()));
    }
    let (filter, problem) = match wanted {
        Some(text) => match text.parse::<EnvFilter>() {
            Ok(filter) => (filter, None),
            Err(e) => (EnvFilter::new(level), Some(format!("KVXFER_LOG={text:?}: {e}; using {level:?}"))),
        },
        None => (EnvFilter::new(level), None),
    };
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr())
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    if let Some(problem) = problem {
        tracing::warn!("{problem}");
    }
}
