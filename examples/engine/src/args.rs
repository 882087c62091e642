//! The command line.

use crate::model::{Config, Rope};
use crate::scheduler::Limits;
use crate::text;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Largest chunk, in tokens.
const MAX_CHUNK: u64 = 1 << 16;
/// What the cache may take where nothing is said about it (it is allocated as it is used).
const DEFAULT_CACHE_BYTES: usize = 2 << 30;

const ABOUT: &str = "\
Serves a Llama on the CPU with vLLM's HTTP endpoints, alone or as prefiller and decoder
that hand the KV cache over with kvxfer.

Alone:

  kvxfer-engine --port 8000
  curl localhost:8000/v1/completions -d '{\"prompt\": \"Tell me a story\", \"max_tokens\": 40}'

One prefiller and one decoder behind the proxy (ports as in the disaggregated-prefill guides):

  kvxfer-engine --role decode  --port 8200 --kv-port 7300
  kvxfer-engine --role prefill --port 8100 --proxy-port 7500
  kvxfer proxy --port 9000 --prefiller-port 8100 --decoder-port 8200 \\
      --decoder-init-port 7300 --decoder-alloc-port 7400 --proxy-port 7500

A request to a prefiller names its decoder: kv_transfer_params.disagg_spec with req_id,
receiver_host and receiver_init_port, which are the decoder's --kv-host and --kv-port.
All instances need the same weights and --chunk; otherwise kvxfer refuses to connect them.
KVXFER_* variables (KVXFER_TRANSPORTS=tcp, KVXFER_AUTH_KEY, KVXFER_CONFIG, ...) set up the
transfer, RUST_LOG the log, as for every program that uses kvxfer.";

/// The command line's settings.
#[derive(Parser, Debug)]
#[command(name = "kvxfer-engine", version, about = "A small Llama engine on the CPU, disaggregated by kvxfer", long_about = ABOUT, args_override_self = true)]
pub(crate) struct Args {
    /// Folder of a Llama from Hugging Face: config.json, *.safetensors, tokenizer.json
    #[arg(long, value_name = "FOLDER", conflicts_with = "random", help_heading = "Model")]
    pub(crate) model: Option<PathBuf>,
    /// Random weights from this seed, with one token per byte; the same seed and sizes give the same model everywhere
    #[arg(long, value_name = "SEED", default_value_t = 0, help_heading = "Model")]
    pub(crate) random: u64,
    /// Hidden size of a random model
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Model")]
    hidden: usize,
    /// Layers of a random model
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Model")]
    layers: usize,
    /// Attention heads of a random model
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Model")]
    heads: usize,
    /// Key/value heads of a random model
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Model")]
    kv_heads: usize,
    /// Intermediate size of a random model
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = "Model")]
    intermediate: usize,
    /// Longest sequence; default: what config.json says, 16384 for a random model
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    max_model_len: Option<usize>,
    /// Names requests may use; default: the folder, or random-SEED
    #[arg(long, value_name = "NAME", num_args = 1.., help_heading = "Model")]
    served_model_name: Vec<String>,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", help_heading = "Serving")]
    pub(crate) host: String,
    /// Port to listen on; 0: the system picks one, the log says which
    #[arg(long, default_value_t = 8000, help_heading = "Serving")]
    pub(crate) port: u16,
    /// Texts that are written at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one, help_heading = "Serving")]
    max_num_seqs: u64,
    /// Tokens of one step: how much of a prompt is computed between two tokens of a text
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = at_least_one, help_heading = "Serving")]
    max_num_batched_tokens: u64,
    /// Tokens of cache of all texts together; default: 16 times the longest sequence, or 2 GiB where that is less
    #[arg(long, value_name = "TOKENS", help_heading = "Serving")]
    kv_cache_tokens: Option<usize>,
    /// Requests that may wait; more are answered with 503
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_least_one, help_heading = "Serving")]
    max_queue: u64,
    /// Threads that compute; default: one per core, at most 8
    #[arg(long, value_name = "N", help_heading = "Serving")]
    threads: Option<usize>,
    /// Say in `usage` how many tokens of the prompt were in the cache
    #[arg(long, help_heading = "Serving")]
    pub(crate) enable_prompt_tokens_details: bool,

    /// What this instance does
    #[arg(long, value_enum, default_value_t = Role::Both, help_heading = "Disaggregation")]
    pub(crate) role: Role,
    /// Tokens of a chunk, the unit in which the cache travels; the same on all instances
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=MAX_CHUNK), help_heading = "Disaggregation")]
    chunk: u64,
    /// Decoder: address to receive caches on
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Disaggregation")]
    pub(crate) kv_host: String,
    /// Decoder: port to receive caches on [default: 7300 for --role decode; --role both receives only when this is given]
    #[arg(long, value_name = "PORT", help_heading = "Disaggregation")]
    kv_port: Option<u16>,
    /// Decoder: bytes of the pool that prefillers write to
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20, value_parser = at_least_one, help_heading = "Disaggregation")]
    pub(crate) kv_buffer: u64,
    /// Decoder: longest wait for a chunk that is on its way when its request is already here, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, help_heading = "Disaggregation")]
    kv_wait: u64,
    /// Prefiller: host of the proxy's notification socket
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Disaggregation")]
    proxy_host: String,
    /// Prefiller: port of the proxy's notification socket; without it nobody is told
    #[arg(long, value_name = "PORT", help_heading = "Disaggregation")]
    proxy_port: Option<u16>,
    /// Prefiller: which notifications the proxy understands
    #[arg(long, value_enum, default_value_t = Notify::Kvxfer, help_heading = "Disaggregation")]
    pub(crate) notify: Notify,
    /// Prefiller: seconds a cache may take to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = at_least_one, help_heading = "Disaggregation")]
    kv_timeout: u64,
    /// Replaces what was received by zeros, which must change every answer: shows that a comparison can fail
    #[arg(long, hide = true)]
    pub(crate) zero_received_kv: bool,
}

/// What an instance does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Computes prompts and sends their caches
    Prefill,
    /// Receives caches and writes texts
    Decode,
    /// Everything by itself; sends and receives as well when asked to
    Both,
}

/// Which notifications a proxy understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Notify {
    /// `KvReady` and `KvFailed`
    Kvxfer,
    /// `LMCache`'s `ProxyNotif`, which knows no failure
    Lmcache,
}

impl Args {
    /// The shape of a random model.
    pub(crate) fn random_config(&self) -> Result<Config, String> {
        let config = Config {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden.checked_div(self.heads).unwrap_or(0),
            intermediate: self.intermediate,
            vocab: text::BYTE_VOCAB,
            eps: 1e-6,
            rope: Rope { theta: 10_000.0, llama3: None },
            positions: 16_384,
            tied: false,
            eos: vec![text::BYTE_EOS],
        };
        config.check()?;
        Ok(config)
    }

    /// All limits, for a model.
    pub(crate) fn limits(&self, config: &Config) -> Result<Limits, String> {
        let positions = config.positions;
        let len = self.max_model_len.unwrap_or(positions);
        if len < 2 || len > positions {
            return Err(format!("--max-model-len {len}: the model is made for 2 to {positions} tokens"));
        }
        let chunk = self.chunk as usize;
        let of_one = len.next_multiple_of(chunk);
        let affordable =
            DEFAULT_CACHE_BYTES / (2 * config.layers * config.kv_width() * size_of::<f32>()).max(1);
        let cache = self.kv_cache_tokens.unwrap_or(affordable.clamp(of_one, 16 * of_one));
        if cache < chunk {
            return Err(format!("--kv-cache-tokens {cache} is less than one chunk of {} tokens", self.chunk));
        }
        Ok(Limits {
            positions: len,
            cache_tokens: cache,
            sequences: self.max_num_seqs as usize,
            batch: self.max_num_batched_tokens.max(self.max_num_seqs) as usize,
            queue: self.max_queue as usize,
            kv_wait: Duration::from_millis(self.kv_wait),
        })
    }

    pub(crate) fn chunk(&self) -> usize {
        self.chunk as usize
    }

    pub(crate) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).min(8);
        self.threads.unwrap_or_else(cores).max(1)
    }

    /// Names for requests, the first for answers.
    pub(crate) fn names(&self) -> Vec<String> {
        match (&self.model, self.served_model_name.is_empty()) {
            (_, false) => self.served_model_name.clone(),
            (Some(folder), true) => vec![folder.display().to_string()],
            (None, true) => vec![format!("random-{}", self.random)],
        }
    }

    /// The port to receive caches on, for those who do.
    pub(crate) fn receives(&self) -> Option<u16> {
        match self.role {
            Role::Prefill => None,
            Role::Decode => Some(self.kv_port.unwrap_or(7300)),
            Role::Both => self.kv_port,
        }
    }

    pub(crate) fn sends(&self) -> bool {
        self.role != Role::Decode
    }

    pub(crate) fn proxy(&self) -> Option<(String, u16)> {
        self.proxy_port.map(|port| (self.proxy_host.clone(), port))
    }

    pub(crate) fn kv_timeout(&self) -> Duration {
        Duration::from_secs(self.kv_timeout)
    }
}

fn at_least_one(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}
