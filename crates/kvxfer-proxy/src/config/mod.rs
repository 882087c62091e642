//! What the proxy is told: instances, limits, deadlines, who may ask.
//!
//! There are two ways to say it, and they combine: the command line of the guides and of `LMCache`'s proxy ([`Flags`]), and
//! a YAML file ([`File`]) that can say more about each instance. A flag that is given wins over the file. Whatever is
//! wrong is refused before anything starts, with an error that names the key and the value.

mod check;
mod file;
mod flags;

pub use file::{File, FileDecoder, FilePolicy, FilePrefiller};
pub use flags::Flags;

use crate::openai::Chats;
use kvxfer_proto::notify::MAX_TP_RANKS;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Everything the proxy is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients connect.
    pub listen: Endpoint,
    /// Where the engines' notifications arrive (`--proxy-host`, `--proxy-port`).
    pub notify: Endpoint,
    /// Prefillers in the order given.
    pub prefillers: Vec<Instance>,
    /// Decoders in the order given.
    pub decoders: Vec<Instance>,
    /// What may be changed while the proxy runs.
    pub settings: Settings,
    /// Certificate and key, for HTTPS.
    pub tls: Option<TlsFiles>,
    /// The file all this came from, read again on SIGHUP.
    pub file: Option<PathBuf>,
}

/// The part that a reload replaces.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How instances are chosen.
    pub policy: Policies,
    /// How the cache travels.
    pub kv: KvPath,
    /// Who answers chats.
    pub chats: Chats,
    /// Limits.
    pub limits: Limits,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// Health probes and circuit breaker.
    pub health: Health,
    /// Keys of clients; empty lets everybody in.
    pub api_keys: Vec<Secret>,
    /// Sent to the instances instead of the client's own key.
    pub upstream_api_key: Option<Secret>,
    /// Opens `/admin`; without one it stays closed.
    pub admin_token: Option<Secret>,
    /// One line per request in the log.
    pub access_log: AccessLog,
    /// Statistics in the log at most this often; zero never.
    pub stats_interval: Stats,
}

/// Host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address.
    pub host: String,
    /// Port; 0 lets the system choose.
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write_authority(f, &self.host, self.port)
    }
}

fn write_authority(f: &mut impl std::fmt::Write, host: &str, port: u16) -> std::fmt::Result {
    if host.contains(':') && !host.starts_with('[') {
        write!(f, "[{host}]:{port}")
    } else {
        write!(f, "{host}:{port}")
    }
}

/// What an instance does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Computes a prompt's KV cache and the first token.
    Prefiller,
    /// Receives the cache and computes the rest.
    Decoder,
}

impl Role {
    /// For names, logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefiller => "prefiller",
            Self::Decoder => "decoder",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// Unique; `prefiller1`, `decoder1`, … unless given.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Host of its HTTP server.
    pub host: String,
    /// Port of its HTTP server.
    pub port: u16,
    /// Share of requests compared to the others of its role.
    pub weight: u32,
    /// Requests it gets at the same time at most.
    pub max_requests: Option<u32>,
    /// Decoders: where prefillers send the cache to.
    pub receiver: Receiver,
}

/// Where a decoder receives KV caches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receiver {
    /// Host as the prefillers see it.
    pub host: String,
    /// Handshake ports, one per tensor-parallel rank.
    pub init_ports: Vec<u16>,
    /// Allocation ports, one per tensor-parallel rank.
    pub alloc_ports: Vec<u16>,
}

impl Instance {
    /// `host:port` of its HTTP server.
    pub fn authority(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write_authority(&mut text, &self.host, self.port);
        text
    }

    /// Tensor-parallel ranks, for decoders; at least one.
    pub fn tp_ranks(&self) -> u32 {
        u32::try_from(self.receiver.init_ports.len().max(1)).unwrap_or(MAX_TP_RANKS)
    }
}

/// How an instance is chosen among those of its role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// The one with the fewest tokens under way for its weight.
    LeastTokens,
    /// Prompts that begin alike go to the same instance, unless it is much busier than the others.
    PrefixAffinity,
}

impl std::str::FromStr for Policy {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "round-robin" => Ok(Self::RoundRobin),
            "least-tokens" => Ok(Self::LeastTokens),
            "prefix-affinity" => Ok(Self::PrefixAffinity),
            _ => Err(ConfigError::new("policy", text, "use round-robin, least-tokens or prefix-affinity")),
        }
    }
}

/// A policy for each role, and what prefix affinity looks at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policies {
    /// For prefillers.
    pub prefill: Policy,
    /// For decoders.
    pub decode: Policy,
    /// Tokens of a chunk (`LMCache`'s `chunk_size`).
    pub chunk_tokens: usize,
    /// How many leading chunks count.
    pub chunks: usize,
}

impl Policies {
    /// Itself, if a prompt's beginning matters to it.
    pub(crate) fn looks_at_prefixes(&self) -> Option<&Self> {
        [self.prefill, self.decode].contains(&Policy::PrefixAffinity).then_some(self)
    }
}

impl Default for Policies {
    fn default() -> Self {
        Self { prefill: Policy::RoundRobin, decode: Policy::RoundRobin, chunk_tokens: 256, chunks: 1 }
    }
}

/// How caches get from prefiller to decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvPath {
    /// `LMCache`'s PD mode: the prefiller is told the decoder's ports and notifies over the `ZeroMQ` socket.
    #[default]
    Pd,
    /// `LMCache`'s MP mode: the engines know their store; readiness comes by `POST /api/v1/telemetry`.
    Mp,
}

/// What one proxy takes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Bytes of an instance's answer in one piece, and of one event of a stream.
    pub answer: usize,
    /// Requests under way at the same time.
    pub requests: usize,
    /// Requests that wait for their turn; more are refused with 503.
    pub queue: usize,
    /// How long one waits.
    #[serde(with = "humantime_serde")]
    pub queue_wait: Duration,
    /// Prompts in one request.
    pub prompts: usize,
    /// Tokens of one prompt.
    pub prompt_tokens: usize,
    /// Connections of clients.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 64 << 20,
            answer: 64 << 20,
            requests: 4096,
            queue: 4096,
            queue_wait: Duration::from_secs(30),
            prompts: 128,
            prompt_tokens: 4 << 20,
            connections: 32_768,
        }
    }
}

/// How long each step may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deadlines {
    /// Connecting to an instance.
    #[serde(with = "humantime_serde")]
    pub connect: Duration,
    /// Receiving a client's request body.
    #[serde(with = "humantime_serde")]
    pub body: Duration,
    /// `POST /tokenize`.
    #[serde(with = "humantime_serde")]
    pub tokenize: Duration,
    /// A prefiller's answer.
    #[serde(with = "humantime_serde")]
    pub prefill: Duration,
    /// From the prefiller's answer to the cache's arrival; after it the decoder computes the prompt itself.
    #[serde(with = "humantime_serde")]
    pub kv: Duration,
    /// From the decoder's request to its first bytes.
    #[serde(with = "humantime_serde")]
    pub decode: Duration,
    /// Between two pieces of a stream.
    #[serde(with = "humantime_serde")]
    pub stall: Duration,
    /// A whole request, from its arrival to its last byte.
    #[serde(with = "humantime_serde")]
    pub request: Duration,
    /// Requests under way when the proxy is told to end.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            body: Duration::from_secs(60),
            tokenize: Duration::from_secs(30),
            prefill: Duration::from_secs(300),
            kv: Duration::from_secs(10),
            decode: Duration::from_secs(300),
            stall: Duration::from_secs(120),
            request: Duration::from_secs(3600),
            drain: Duration::from_secs(60),
        }
    }
}

/// Health probes and the circuit breaker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Probed by GET; 200 means healthy.
    pub path: String,
    /// Pause between probes of a healthy instance.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// Pause between probes of one that is down.
    #[serde(with = "humantime_serde")]
    pub interval_down: Duration,
    /// How long one probe may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Slow or failed probes in a row that make an instance count as down; a refused connection does at once.
    pub failures: u32,
    /// Failed requests in a row that open an instance's breaker.
    pub breaker_failures: u32,
    /// How long an open breaker keeps requests away before one is let through on trial.
    #[serde(with = "humantime_serde")]
    pub breaker_pause: Duration,
    /// Attempts of a prefill, each on another prefiller.
    pub prefill_attempts: u32,
    /// Attempts of a decode of which nothing was passed on yet, each on another decoder.
    pub decode_attempts: u32,
    /// When no prefiller can do it, let the decoder compute the prompt itself.
    pub decode_alone: bool,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            path: "/health".to_owned(),
            interval: Duration::from_secs(2),
            interval_down: Duration::from_millis(500),
            timeout: Duration::from_secs(5),
            failures: 3,
            breaker_failures: 3,
            breaker_pause: Duration::from_secs(5),
            prefill_attempts: 3,
            decode_attempts: 2,
            decode_alone: true,
        }
    }
}

/// Whether each request gets a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessLog(pub bool);

impl Default for AccessLog {
    fn default() -> Self {
        Self(true)
    }
}

/// How often statistics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats(pub Duration);

impl Default for Stats {
    fn default() -> Self {
        Self(Duration::from_secs(5))
    }
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate, followed by those that signed it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A key or token. Never printed; compared in constant time.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Refuses what cannot travel in a header.
    pub fn new(key: &str, text: impl Into<String>) -> Result<Self, ConfigError> {
        let secret = Self(text.into());
        secret.check(key)?;
        Ok(secret)
    }

    pub(crate) fn check(&self, key: &str) -> Result<(), ConfigError> {
        if self.0.is_empty() || self.0.len() > 4096 || !self.0.bytes().all(|b| (0x21..0x7f).contains(&b)) {
            return Err(ConfigError::new(
                key,
                "(not shown)",
                "use 1 to 4096 visible ASCII characters, no spaces",
            ));
        }
        Ok(())
    }

    /// Whether `text` is it.
    pub fn matches(&self, text: &[u8]) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.as_bytes().ct_eq(text).into()
    }

    /// For the header of a request.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {value}: {remedy}")]
pub struct ConfigError {
    /// The flag or key.
    pub key: String,
    /// What it was set to.
    pub value: String,
    /// What would be right.
    pub remedy: String,
}

impl ConfigError {
    pub(crate) fn new(
        key: impl Into<String>,
        value: impl std::fmt::Display,
        remedy: impl Into<String>,
    ) -> Self {
        Self { key: key.into(), value: value.to_string(), remedy: remedy.into() }
    }
}

impl Config {
    /// From the command line, and the file it names.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            Some(path) => File::read(path)?,
            None => File::default(),
        };
        let config = flags.onto(file)?;
        config.check()?;
        Ok(config)
    }

    /// Prefillers, then decoders.
    pub fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.prefillers.iter().chain(&self.decoders)
    }
}
