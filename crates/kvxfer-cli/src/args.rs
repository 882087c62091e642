//! The command line: every option with its unit and default. `--help` is written to teach.
#![expect(clippy::doc_markdown, reason = "doc comments here are help texts, read on a terminal")]

use crate::bench::cases::{Pattern, Section};
use crate::units::parse_size;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kvxfer_core::{Integrity, Op, TransportKind};
use std::path::PathBuf;

/// Moves LLM key/value caches between processes and hosts: show it, measure it, find out what a machine can do.
#[derive(Parser, Debug)]
#[command(name = "kvxfer", version, propagate_version = true, arg_required_else_help = true, after_help = AFTER)]
pub(crate) struct Cli {
    /// Log more: -v connections and transfers, -vv everything (`KVXFER_LOG=filter` is finer).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
Examples:
  kvxfer demo                                     move one prompt's cache, check every byte, survive a kill
  kvxfer doctor                                   what can this machine do, and what should be fixed
  kvxfer bench --quick                            the table in under 20 seconds
  kvxfer proxy --port 9000 --prefiller-port 8100 --decoder-port 8200 --proxy-port 7500
  kvxfer bench --transport shm,tcp --piece 16K,1M --json run.json --html run.html

Sizes take K, M, G (binary: 64K = 65536 bytes). Rates are decimal: 1 GB/s = 10^9 bytes a second.
Settings of the library (KVXFER_* variables) apply here too; see docs/cli.md.

Exit codes: 0 all held · 1 something did not hold, or failed · 2 wrong usage · 130 interrupted";

#[derive(Subcommand, Debug)]
#[expect(clippy::large_enum_variant, reason = "made once, from the command line")]
pub(crate) enum Command {
    /// Move a prompt's KV cache between two processes, check every byte, then kill the sender and recover.
    Demo(DemoArgs),
    /// Measure every transport beside memcpy, process_vm_writev, raw sockets and NIXL itself.
    Bench(BenchArgs),
    /// Say what this machine (and a peer) can do, what would be chosen and why, and how to fix what is missing.
    Doctor(DoctorArgs),
    /// Serve OpenAI's API in front of prefillers and decoders (disaggregated prefill).
    Proxy(Box<crate::proxy::ProxyArgs>),
    /// Check a configuration file, or print the default one.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// A child process of this command.
    #[command(hide = true, name = "internal-child")]
    Child(ChildArgs),
}

#[derive(Args, Debug)]
#[command(after_help = "\
The prompt has the shape of Llama-3.1-8B: 32 layers, 8 KV heads of 128, bfloat16 = 128 KiB a token, in chunks of
--chunk tokens laid out as KV_2LTD; the last chunk is partial. Its content is made from a seed and differs everywhere,
so the receiver can check every byte without having been sent anything else.

offload_time is the gathering of paged KV blocks into the send buffer; put_time runs from the first chunk handed to
the transport until the receiver has checked and published the last one. Both overlap chunk by chunk.

Examples:
  kvxfer demo --tokens 512 --no-kill
  kvxfer demo --transport tcp
  kvxfer demo --json | jq .store")]
pub(crate) struct DemoArgs {
    /// Tokens of the prompt; less is taken, with a sentence, where memory is short.
    #[arg(long, default_value_t = 5271, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub tokens: u32,
    /// Tokens of a full chunk.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub chunk: u32,
    /// Only this transport instead of the best one and then each: shm, cma, tcp, nixl, inproc.
    #[arg(long, value_name = "NAME", value_parser = transport)]
    pub transport: Option<TransportKind>,
    /// Leave out the part in which the sender is killed.
    #[arg(long)]
    pub no_kill: bool,
    /// Seed of the content.
    #[arg(long, default_value_t = 5271)]
    pub seed: u64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Each subject is measured in turns with its baseline, the same pieces in the same memory, in the same run:
  shm   against one thread's memcpy           cma   against raw process_vm_writev/readv
  tcp   against raw sockets, as many streams  nixl  against NIXL through the thinnest wrapper
Ratios are medians over the repetitions. A mark says whether a ratio reaches the project's bar.

Examples:
  kvxfer bench --quick                          a first look, under 20 seconds
  kvxfer bench --only throughput --transport shm --piece 16K --pattern random
  kvxfer bench --json run.json --html run.html --markdown
  kvxfer bench --gpu --json gpu.json            GPU memory, two processes on one device
  kvxfer bench --gpu --gpu-devices 0,1          and on two
Two hosts:
  host A:  kvxfer bench --server tcp://192.0.2.1:7300
  host B:  kvxfer bench --client tcp://192.0.2.1:7300
Set KVXFER_AUTH_KEY to the same secret on both, unless the network is yours alone.")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(crate) struct BenchArgs {
    /// Transports; default: all that both sides have.
    #[arg(long, value_name = "A,B", value_delimiter = ',', value_parser = transport)]
    pub transport: Vec<TransportKind>,
    /// Directions.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "write,read")]
    pub op: Vec<OpArg>,
    /// Piece sizes [default: 4K,16K,64K,1M,32M; --quick: 16K,64K,1M].
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_size)]
    pub piece: Vec<u64>,
    /// Orders of the pieces [default: both; --quick: random].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub pattern: Vec<Pattern>,
    /// Levels of checking for the throughput table: off, bound, full [default: each transport's own default, and off
    /// where that default is full, so that both the path and the checked path are seen].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub integrity: Vec<IntegrityArg>,
    /// Working set per pass; at least twice the last-level cache [default: 256M, more where the cache is larger].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bytes: Option<u64>,
    /// Repetitions of each pass, in turns with the baseline [default: 7; --quick: 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub reps: Option<u32>,
    /// Only these sections [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Section>,
    /// A first look: fewer sizes, smaller working set, fewer repetitions; under 20 seconds.
    #[arg(long)]
    pub quick: bool,
    /// Write the rows as JSON (`-` for standard output instead of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a self-contained report with charts.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print the tables as Markdown.
    #[arg(long)]
    pub markdown: bool,
    /// No progress bar.
    #[arg(long)]
    pub no_progress: bool,
    /// Measure GPU memory instead: device to device, device to host, scattered blocks, beside the driver's own copies and NIXL.
    #[arg(long, conflicts_with_all = ["server", "client", "html", "transport", "piece", "pattern", "op", "integrity", "only", "bytes"])]
    pub gpu: bool,
    /// The two processes' CUDA devices; the same number twice is two processes on one GPU.
    #[arg(long, value_name = "A,B", value_delimiter = ',', num_args = 1.., default_value = "0,0", requires = "gpu")]
    pub gpu_devices: Vec<i32>,
    /// Serve a benchmark on another host: listen on this address until interrupted.
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["client", "json", "html", "markdown"])]
    pub server: Option<String>,
    /// Measure against `kvxfer bench --server` on another host (or another process).
    #[arg(long, value_name = "ADDR")]
    pub client: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Every line has a verdict: ok, degraded (it works, slower or with a limit), missing, or info. Degraded and missing lines
say how to fix it. The exit code is 1 only when something named by --require is not ok.

Examples:
  kvxfer doctor
  kvxfer doctor --require shm,cma --json
  kvxfer doctor --peer tcp://192.0.2.1:7300      a running agent; rates too, when it is `kvxfer bench --server`")]
pub(crate) struct DoctorArgs {
    /// Also examine this running agent, e.g. tcp://192.0.2.1:7300.
    #[arg(long, value_name = "ADDR")]
    pub peer: Option<String>,
    /// Exit with 1 unless these are ok: transports (shm, cma, tcp, nixl, …) or check ids (memlock, huge-pages, …).
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub require: Vec<String>,
    /// Ports that should be free [default: those of the LMCache guide's decoder and proxy].
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "7300,7400,7500")]
    pub port: Vec<u16>,
    /// Time to spend on measuring rates, in seconds for this host and for the peer each; 0 measures nothing.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(0..=600))]
    pub secs: u64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum ConfigCommand {
    /// Say what a configuration file comes to: LMCache's (also with the older `nixl_*` keys), or one of agent settings.
    #[command(after_help = "\
Examples:
  kvxfer config check lmcache-prefiller-config.yaml            what became of each key, and what would not work
  kvxfer config check old.yaml --migrate --output new.yaml     the same file in today's words
  kvxfer config check agent.yaml                               settings of an agent

With kvxfer installed LMCache reads older files as they are; migrating is for those who read them.
Exit codes: 0 fine · 1 something in it will not work · 2 wrong usage")]
    Check {
        /// The file, `-` for standard input; JSON by its extension, YAML otherwise.
        file: PathBuf,
        /// Print LMCache's file in today's words instead.
        #[arg(long)]
        migrate: bool,
        /// Where the migrated file goes, instead of standard output. An existing file is not overwritten.
        #[arg(long, value_name = "FILE", requires = "migrate")]
        output: Option<PathBuf>,
        /// Print one JSON object instead of text.
        #[arg(long, conflicts_with = "migrate")]
        json: bool,
    },
    /// Print every setting with its default, as YAML.
    Default,
}

#[derive(Args, Debug)]
pub(crate) struct ChildArgs {
    #[arg(value_enum)]
    pub role: ChildRole,
}

/// What a child process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ChildRole {
    DemoReceiver,
    DemoSender,
    BenchServer,
    BenchGpu,
    BenchNixl,
    CmaTarget,
}

/// [`Op`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OpArg {
    Write,
    Read,
}

impl From<OpArg> for Op {
    fn from(op: OpArg) -> Self {
        match op {
            OpArg::Write => Self::Write,
            OpArg::Read => Self::Read,
        }
    }
}

/// [`Integrity`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IntegrityArg {
    Off,
    Bound,
    Full,
}

impl From<IntegrityArg> for Integrity {
    fn from(level: IntegrityArg) -> Self {
        match level {
            IntegrityArg::Off => Self::Off,
            IntegrityArg::Bound => Self::Bound,
            IntegrityArg::Full => Self::Full,
        }
    }
}

fn transport(name: &str) -> Result<TransportKind, String> {
    name.parse().map_err(|e: kvxfer_core::Error| e.to_string())
}
