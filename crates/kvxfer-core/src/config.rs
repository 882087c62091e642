//! Every setting of an agent, with its default, and the one place that reads the environment.

use crate::memory::HugePages;
use crate::transport::TransportKind;
use kvxfer_proto::Integrity;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Settings of an [`crate::Agent`]; YAML and JSON name the fields as here, unknown keys are errors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of the agent, stable over restarts. Default: `host-pid`.
    pub name: Option<String>,
    /// Addresses to listen on: `tcp://127.0.0.1:7300` (port 0 picks one), `unix:///run/kvxfer.sock`. Default: none.
    pub listen: Vec<String>,
    /// Pre-shared key; when set, every control connection must prove it holds the same. Never logged or sent.
    pub auth_key: Option<Secret>,
    /// Which transports may be used.
    pub transports: TransportPolicy,
    /// Level of checking; default: `bound` within a host, `full` on `tcp` and on host memory over `nixl`.
    pub integrity: Option<Integrity>,
    /// Deadline of a connection attempt with its handshake.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Deadline of a transfer that states none.
    #[serde(with = "humantime_serde")]
    pub transfer_timeout: Duration,
    /// A peer silent for this long (pings included) is gone.
    #[serde(with = "humantime_serde")]
    pub peer_timeout: Duration,
    /// How long a waiting thread spins before it sleeps.
    #[serde(with = "humantime_serde")]
    pub spin: Duration,
    /// Threads that copy for `shm`, `cma` and `inproc`; the waiting thread lends a hand besides.
    pub copy_threads: usize,
    /// A transfer of at most this many bytes is copied within submit.
    pub inline_bytes: u64,
    /// Shared memory.
    pub shm: ShmConfig,
    /// Sockets.
    pub tcp: TcpConfig,
    /// NIXL.
    pub nixl: NixlConfig,
    /// Faults to inject, for tests; `None` in production.
    pub faults: Option<crate::transport::fault::FaultPlan>,
}

/// Choice of transport. Without any setting the best one both sides offer is taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransportPolicy {
    /// Only these, in this order; empty: all, in the built-in order.
    pub allow: Vec<TransportKind>,
    /// Never these.
    pub forbid: Vec<TransportKind>,
    /// At least one of these must carry a peer's bytes, or connecting fails (Contract line 12). Names of transports, or
    /// `nvlink`, `rdma`, `same_host`.
    pub require: Vec<String>,
}

/// Shared memory settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShmConfig {
    /// Huge pages for pools.
    pub huge_pages: HugePages,
}

/// Socket settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TcpConfig {
    /// Data connections per peer.
    pub streams: u16,
    /// Threads that serve data connections.
    pub io_threads: usize,
    /// Bytes of one frame; the unit of checking, cancelling and striping.
    pub frame_bytes: u32,
}

/// NIXL settings. UCX's and NIXL's own environment variables keep their meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NixlConfig {
    /// `libnixl_capi.so` to load; default: searched (see `docs/transports.md`).
    pub library: Option<PathBuf>,
    /// Folder of NIXL's plug-ins; default: beside the library, or `NIXL_PLUGIN_DIR`.
    pub plugin_dir: Option<PathBuf>,
    /// Backends to create, the first that can carry a transfer is used.
    pub backends: Vec<String>,
    /// Parameters of each backend, by its name, as its plug-in documents them: `UCX: {num_workers: "2"}`.
    pub params: std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            name: None,
            listen: Vec::new(),
            auth_key: None,
            transports: TransportPolicy::default(),
            integrity: None,
            connect_timeout: Duration::from_secs(10),
            transfer_timeout: Duration::from_secs(60),
            peer_timeout: Duration::from_secs(10),
            spin: Duration::from_micros(20),
            copy_threads: 1,
            inline_bytes: 64 << 10,
            shm: ShmConfig::default(),
            tcp: TcpConfig::default(),
            nixl: NixlConfig::default(),
            faults: None,
        }
    }
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self { streams: 2, io_threads: 1, frame_bytes: 1 << 20 }
    }
}

impl Default for NixlConfig {
    fn default() -> Self {
        Self {
            library: None,
            plugin_dir: None,
            backends: vec!["UCX".into()],
            params: std::collections::BTreeMap::new(),
        }
    }
}

/// A key that never shows in logs, debug output or serialised configuration.
#[derive(Clone, Deserialize)]
#[serde(from = "String")]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Wraps key bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }
    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
impl From<String> for Secret {
    fn from(s: String) -> Self {
        Self(s.into_bytes())
    }
}
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}
impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("…")
    }
}
