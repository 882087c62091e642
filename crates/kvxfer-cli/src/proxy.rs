//! `kvxfer proxy`: one OpenAI endpoint in front of prefillers and decoders, with the flags of LMCache's own proxy.
#![expect(clippy::doc_markdown, reason = "doc comments here are help texts, read on a terminal")]

use crate::{Failure, Verdict};
use clap::Args;
use kvxfer_proxy::config::{Policy, TlsFiles};
use kvxfer_proxy::{Config, Flags, StartError};
use std::path::PathBuf;
use std::time::Duration;

/// The environment of this command; a flag wins.
const API_KEY: &str = "KVXFER_PROXY_API_KEY";
const ADMIN_TOKEN: &str = "KVXFER_PROXY_ADMIN_TOKEN";
const UPSTREAM_API_KEY: &str = "KVXFER_PROXY_UPSTREAM_API_KEY";

#[derive(Args, Debug)]
#[command(after_help = "\
A request goes to a prefiller for its first token, waits until the decoder has its KV cache, and goes on at the decoder.
Engines say that a cache has arrived on the ZeroMQ socket at --proxy-host:--proxy-port (LMCache's pd_proxy_host and
pd_proxy_port). When a cache does not arrive, the decoder computes the prompt itself.

Lists are given as `8100,8101` or `8100 8101`. One host and one port with a count are consecutive ports.

Examples:
  kvxfer proxy --port 9000 --prefiller-port 8100 8101 --num-prefillers 2 --decoder-port 8200 \\
               --decoder-init-port 7300 --decoder-alloc-port 7400 --proxy-port 7500
  kvxfer proxy --port 9000 --decoder-init-port 8300,8301 --decoder-alloc-port 8400,8401    two ranks (TP = 2)
  kvxfer proxy --config proxy.yaml                        weights, limits, deadlines, hosts of each instance
  kvxfer proxy --config proxy.yaml --check                is it right?

Then:  curl http://localhost:9000/v1/completions -H 'Content-Type: application/json' \\
         -d '{\"model\": \"…\", \"prompt\": \"Tell me a story\", \"max_tokens\": 100}'
Look:  /health, /stats, /metrics, /dashboard; statistics and a line per request are in the log.

SIGHUP reads the file again. SIGTERM and Ctrl-C let requests finish; a second one ends at once.
KVXFER_PROXY_API_KEY, KVXFER_PROXY_ADMIN_TOKEN and KVXFER_PROXY_UPSTREAM_API_KEY (for the engines; OPENAI_API_KEY
is taken when it is not set) keep secrets off the command line.")]
pub(crate) struct ProxyArgs {
    /// A YAML file; flags win over it. See docs/proxy.md.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check flags and file, say what they come to, and end.
    #[arg(long)]
    check: bool,
    /// Address for clients [default: localhost].
    #[arg(long)]
    host: Option<String>,
    /// Port for clients; 0 lets the system choose [default: 8000].
    #[arg(long)]
    port: Option<u16>,
    /// Hosts of the prefillers' HTTP servers [default: localhost].
    #[arg(long, value_name = "HOST", num_args = 1.., value_delimiter = ',')]
    prefiller_host: Vec<String>,
    /// Ports of the prefillers' HTTP servers [default: 8100].
    #[arg(long, value_name = "PORT", num_args = 1.., value_delimiter = ',')]
    prefiller_port: Vec<u16>,
    /// How many prefillers.
    #[arg(long, value_name = "N")]
    num_prefillers: Option<usize>,
    /// Hosts of the decoders' HTTP servers, where they also receive caches [default: localhost].
    #[arg(long, value_name = "HOST", num_args = 1.., value_delimiter = ',')]
    decoder_host: Vec<String>,
    /// Ports of the decoders' HTTP servers [default: 8200].
    #[arg(long, value_name = "PORT", num_args = 1.., value_delimiter = ',')]
    decoder_port: Vec<u16>,
    /// A decoder's handshake ports (pd_peer_init_port), one per tensor-parallel rank; decoders on one host take the next
    /// ports, or their own part of a list for all [default: 8300].
    #[arg(long, value_name = "PORT", num_args = 1.., value_delimiter = ',')]
    decoder_init_port: Vec<u16>,
    /// A decoder's allocation ports (pd_peer_alloc_port), likewise [default: 8400].
    #[arg(long, value_name = "PORT", num_args = 1.., value_delimiter = ',')]
    decoder_alloc_port: Vec<u16>,
    /// How many decoders.
    #[arg(long, value_name = "N")]
    num_decoders: Option<usize>,
    /// Address for the engines' notifications [default: localhost].
    #[arg(long, value_name = "HOST")]
    proxy_host: Option<String>,
    /// Port for the engines' notifications [default: 8500].
    #[arg(long, value_name = "PORT")]
    proxy_port: Option<u16>,
    /// How instances are chosen: round-robin, least-tokens (fewest tokens under way), prefix-affinity (prompts that begin
    /// alike go together) [default: round-robin].
    #[arg(long, value_parser = policy)]
    policy: Option<Policy>,
    /// Seconds to wait for a cache after the prefill; then the decoder computes the prompt itself [default: 10].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    kv_timeout: Option<Duration>,
    /// Requests under way at the same time; more wait in a queue [default: 4096].
    #[arg(long, value_name = "N")]
    max_requests: Option<usize>,
    /// Ask clients for this key.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// Open /admin to whoever has this token.
    #[arg(long, value_name = "TOKEN")]
    admin_token: Option<String>,
    /// Serve HTTPS with this certificate (PEM, chain included).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// No line per request in the log.
    #[arg(long)]
    no_access_log: bool,
    /// Threads [default: one per core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

fn policy(text: &str) -> Result<Policy, String> {
    text.parse().map_err(|e: kvxfer_proxy::ConfigError| e.remedy)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|e| format!("{text}: {e}"))
}

pub(crate) fn run(args: &ProxyArgs) -> Result<Verdict, Failure> {
    let flags = flags(args);
    let config = Config::load(&flags).map_err(|e| Failure::usage(e.to_string()))?;
    if args.check {
        print!("{}", told(&config));
        return Ok(Verdict::Held);
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = args.threads {
        runtime.worker_threads(threads.into());
    }
    let runtime = runtime
        .thread_name("kvxfer-proxy")
        .enable_all()
        .build()
        .map_err(|e| Failure::new(format!("cannot start threads: {e}")))?;
    let served = runtime.block_on(kvxfer_proxy::serve(config, move || Config::load(&flags)));
    // Requests that were cut off are not waited for.
    runtime.shutdown_background();
    match served {
        Ok(true) => Ok(Verdict::Held),
        Ok(false) => Ok(Verdict::Broken),
        Err(StartError::Config(e)) => Err(Failure::usage(e.to_string())),
        Err(e) => Err(Failure::new(e.to_string())),
    }
}

fn flags(args: &ProxyArgs) -> Flags {
    let secret = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let mut api_keys = args.api_key.clone();
    if api_keys.is_empty() {
        api_keys.extend(secret(API_KEY));
    }
    Flags {
        config: args.config.clone(),
        host: args.host.clone(),
        port: args.port,
        prefiller_hosts: args.prefiller_host.clone(),
        prefiller_ports: args.prefiller_port.clone(),
        num_prefillers: args.num_prefillers,
        decoder_hosts: args.decoder_host.clone(),
        decoder_ports: args.decoder_port.clone(),
        decoder_init_ports: args.decoder_init_port.clone(),
        decoder_alloc_ports: args.decoder_alloc_port.clone(),
        num_decoders: args.num_decoders,
        proxy_host: args.proxy_host.clone(),
        proxy_port: args.proxy_port,
        policy: args.policy,
        kv_timeout: args.kv_timeout,
        max_requests: args.max_requests,
        no_access_log: args.no_access_log,
        api_keys,
        // LMCache's proxy sends OPENAI_API_KEY to the engines.
        upstream_api_key: secret(UPSTREAM_API_KEY).or_else(|| secret("OPENAI_API_KEY")),
        admin_token: args.admin_token.clone().or_else(|| secret(ADMIN_TOKEN)),
        tls: args.tls_cert.clone().zip(args.tls_key.clone()).map(|(cert, key)| TlsFiles { cert, key }),
    }
}

/// What flags and file come to.
fn told(config: &Config) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "clients        {}", config.listen);
    let _ = writeln!(out, "notifications  {}", config.notify);
    for instance in config.instances() {
        let _ =
            write!(out, "{:<14} http://{} weight {}", instance.name, instance.authority(), instance.weight);
        let receiver = &instance.receiver;
        if !receiver.init_ports.is_empty() {
            let _ = write!(
                out,
                "  receives at {} init {:?} alloc {:?}",
                receiver.host, receiver.init_ports, receiver.alloc_ports
            );
        }
        out.push('\n');
    }
    let settings = &config.settings;
    let _ = writeln!(
        out,
        "policy         prefill {:?}, decode {:?}",
        settings.policy.prefill, settings.policy.decode
    );
    let _ = writeln!(out, "{:#?}\n{:#?}\n{:#?}", settings.limits, settings.deadlines, settings.health);
    let open = |closed: bool| if closed { "asked for" } else { "not asked for" };
    let _ = writeln!(out, "API key        {}", open(!settings.api_keys.is_empty()));
    let _ = writeln!(
        out,
        "/admin         {}",
        if settings.admin_token.is_some() { "behind a token" } else { "closed" }
    );
    out
}
