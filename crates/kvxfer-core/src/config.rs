//! Every setting of an agent, with its default, and the one place that reads the environment.
//!
//! Precedence, lowest first: defaults, a configuration file, what the program sets, then, only when asked with
//! [`crate::AgentBuilder::env`], the `KVXFER_*` variables. Whatever the source, [`AgentConfig::validate`] has the last word.

use crate::memory::HugePages;
use crate::transport::TransportKind;
use crate::{Error, Result};
use kvxfer_proto::{AgentName, Integrity};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
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
    #[serde(skip_serializing)]
    pub auth_key: Option<Secret>,
    /// File that holds the pre-shared key (one trailing line end is not part of it); instead of `auth_key`.
    pub auth_key_file: Option<PathBuf>,
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
    /// Frames of a GPU's memory that are copied to pinned memory ahead of the socket, per data connection.
    pub staging_depth: usize,
}

/// NIXL settings. UCX's and NIXL's own environment variables keep their meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NixlConfig {
    /// `libnixl_capi.so` to load; default: searched (see `docs/transports.md`).
    pub library: Option<PathBuf>,
    /// Folder of NIXL's plug-ins; default: beside the library, or `NIXL_PLUGIN_DIR`.
    pub plugin_dir: Option<PathBuf>,
    /// Offer NIXL to peers on the same host as well. By default it is for other hosts, and for those that name it in
    /// [`TransportPolicy::allow`]; where it is not needed it is not even loaded.
    pub same_host: bool,
    /// Backends to create, the first that can carry a transfer is used.
    pub backends: Vec<String>,
    /// Slices of a GPU's memory that are under way through pinned memory at the same time, per peer, where the backends do not
    /// take that memory.
    pub staging_depth: usize,
    /// Parameters of each backend, by its name, as its plug-in documents them: `UCX: {num_workers: "2"}`.
    pub params: std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            name: None,
            listen: Vec::new(),
            auth_key: None,
            auth_key_file: None,
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
        Self { streams: 2, io_threads: 2, frame_bytes: 1 << 20, staging_depth: 4 }
    }
}

impl Default for NixlConfig {
    fn default() -> Self {
        Self {
            library: None,
            plugin_dir: None,
            same_host: false,
            backends: vec!["UCX".into()],
            staging_depth: 4,
            params: std::collections::BTreeMap::new(),
        }
    }
}

/// Requirements that name a property instead of a transport.
pub(crate) const REQUIREMENTS: [&str; 3] = ["nvlink", "rdma", "same_host"];

fn bad(argument: &'static str, problem: impl Into<String>) -> Error {
    Error::InvalidArgument { argument, problem: problem.into() }
}

impl AgentConfig {
    /// Reads YAML; the error names the key and the line.
    pub fn from_yaml(text: &str) -> Result<Self> {
        let config: Self =
            serde_yaml_ng::from_str(text).map_err(|e| bad("configuration (YAML)", e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Reads JSON; the error names the key and the line.
    pub fn from_json(text: &str) -> Result<Self> {
        let config: Self =
            serde_json::from_str(text).map_err(|e| bad("configuration (JSON)", e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Reads a file, JSON when its name ends in `.json`, YAML otherwise.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::system(
                format!("reading the configuration {}", path.display()),
                e,
                "check the path and its permissions",
            )
        })?;
        let parsed = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
            Self::from_json(&text)
        } else {
            Self::from_yaml(&text)
        };
        parsed.map_err(|e| match e {
            Error::InvalidArgument { argument, problem } => {
                bad(argument, format!("{}: {problem}", path.display()))
            }
            other => other,
        })
    }

    /// Checks every value; the error names the key, the value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if let Some(name) = &self.name {
            AgentName::new(name).map_err(|e| bad("name", format!("{name:?}: {e}")))?;
        }
        for address in &self.listen {
            crate::agent::address::Address::parse(address)
                .map_err(|e| bad("listen", format!("{address:?}: {e}")))?;
        }
        if self.auth_key.as_ref().is_some_and(|k| k.expose().is_empty()) {
            return Err(bad("auth_key", "is empty; leave it out to run without authentication"));
        }
        if self.auth_key.is_some() && self.auth_key_file.is_some() {
            return Err(bad("auth_key_file", "auth_key and auth_key_file are both set; keep one"));
        }
        for (key, value) in [
            ("connect_timeout", self.connect_timeout),
            ("transfer_timeout", self.transfer_timeout),
            ("peer_timeout", self.peer_timeout),
        ] {
            if value < Duration::from_millis(1) || value > Duration::from_secs(86_400) {
                return Err(bad(key, format!("{value:?} is not within 1ms to 1day")));
            }
        }
        if self.spin > Duration::from_millis(10) {
            return Err(bad("spin", format!("{:?} is more than 10ms", self.spin)));
        }
        for (key, value, max) in [
            ("copy_threads", self.copy_threads, 256),
            ("tcp.io_threads", self.tcp.io_threads, 256),
            ("tcp.streams", usize::from(self.tcp.streams), 64),
        ] {
            if value > max {
                return Err(bad(key, format!("{value} is more than {max}")));
            }
        }
        for (key, value) in
            [("tcp.streams", usize::from(self.tcp.streams)), ("tcp.io_threads", self.tcp.io_threads)]
        {
            if value == 0 {
                return Err(bad(key, "0: at least 1 is needed; forbid the transport to do without it"));
            }
        }
        for (key, depth) in
            [("tcp.staging_depth", self.tcp.staging_depth), ("nixl.staging_depth", self.nixl.staging_depth)]
        {
            if !(1..=64).contains(&depth) {
                return Err(bad(key, format!("{depth} is not within 1 to 64")));
            }
        }
        if !(4 << 10..=64 << 20).contains(&self.tcp.frame_bytes) {
            return Err(bad(
                "tcp.frame_bytes",
                format!("{} is not within 4096 to 67108864", self.tcp.frame_bytes),
            ));
        }
        let policy = &self.transports;
        if let Some(kind) = policy.allow.iter().find(|k| policy.forbid.contains(k)) {
            return Err(bad("transports", format!("{kind} is both allowed and forbidden")));
        }
        for name in &policy.require {
            if !REQUIREMENTS.contains(&name.as_str()) && name.parse::<TransportKind>().is_err() {
                return Err(bad(
                    "transports.require",
                    format!(
                        "{name:?} is neither a transport (inproc, cuda_ipc, shm, cma, nixl, tcp) nor one of nvlink, rdma, same_host"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Overlays the `KVXFER_*` variables as `get` returns them. [`crate::AgentBuilder::env`] passes the process's environment.
    pub fn overlay(mut self, get: impl Fn(&'static str) -> Option<String>) -> Result<Self> {
        let list = |text: String| -> Vec<String> {
            text.split(',').map(|p| p.trim().to_owned()).filter(|p| !p.is_empty()).collect()
        };
        let kinds = |var: &'static str, text: String| -> Result<Vec<TransportKind>> {
            list(text).iter().map(|p| p.parse().map_err(|e: Error| bad(var, e.to_string()))).collect()
        };
        let get = |var: &'static str| get(var).filter(|value| !value.is_empty());
        if let Some(path) = get("KVXFER_CONFIG") {
            self = Self::from_file(&path).map_err(|e| bad("KVXFER_CONFIG", e.to_string()))?;
        }
        if let Some(v) = get("KVXFER_NAME") {
            AgentName::new(&v).map_err(|e| bad("KVXFER_NAME", format!("{v:?}: {e}")))?;
            self.name = Some(v);
        }
        if let Some(v) = get("KVXFER_LISTEN") {
            self.listen = list(v);
            for address in &self.listen {
                crate::agent::address::Address::parse(address)
                    .map_err(|e| bad("KVXFER_LISTEN", format!("{address:?}: {e}")))?;
            }
        }
        match (get("KVXFER_AUTH_KEY"), get("KVXFER_AUTH_KEY_FILE")) {
            (Some(_), Some(_)) => {
                return Err(bad("KVXFER_AUTH_KEY_FILE", "KVXFER_AUTH_KEY is set too; keep one"));
            }
            (Some(key), None) => (self.auth_key, self.auth_key_file) = (Some(Secret::new(key)), None),
            (None, Some(file)) => (self.auth_key, self.auth_key_file) = (None, Some(file.into())),
            (None, None) => {}
        }
        if let Some(v) = get("KVXFER_TRANSPORTS") {
            self.transports.allow = kinds("KVXFER_TRANSPORTS", v)?;
        }
        if let Some(v) = get("KVXFER_FORBID") {
            self.transports.forbid = kinds("KVXFER_FORBID", v)?;
        }
        if let Some(v) = get("KVXFER_REQUIRE") {
            self.transports.require = list(v);
        }
        if let Some(v) = get("KVXFER_INTEGRITY") {
            self.integrity = Some(match v.as_str() {
                "off" => Integrity::Off,
                "bound" => Integrity::Bound,
                "full" => Integrity::Full,
                _ => return Err(bad("KVXFER_INTEGRITY", format!("{v:?} is none of off, bound, full"))),
            });
        }
        if let Some(v) = get("KVXFER_COPY_THREADS") {
            self.copy_threads = number("KVXFER_COPY_THREADS", &v)?;
        }
        if let Some(v) = get("KVXFER_TCP_STREAMS") {
            self.tcp.streams = number("KVXFER_TCP_STREAMS", &v)?;
        }
        if let Some(v) = get("KVXFER_NIXL_LIBRARY") {
            self.nixl.library = Some(v.into());
        }
        if let Some(v) = get("KVXFER_NIXL_SAME_HOST") {
            self.nixl.same_host = match v.as_str() {
                "1" | "true" | "yes" => true,
                "0" | "false" | "no" => false,
                _ => return Err(bad("KVXFER_NIXL_SAME_HOST", format!("{v:?} is neither 1 nor 0"))),
            };
        }
        if let Some(v) = get("KVXFER_NIXL_BACKENDS") {
            self.nixl.backends = list(v);
        }
        for (var, field) in [
            ("KVXFER_CONNECT_TIMEOUT", &mut self.connect_timeout),
            ("KVXFER_TRANSFER_TIMEOUT", &mut self.transfer_timeout),
            ("KVXFER_PEER_TIMEOUT", &mut self.peer_timeout),
            ("KVXFER_SPIN", &mut self.spin),
        ] {
            if let Some(v) = get(var) {
                *field = duration(var, &v)?;
            }
        }
        self.validate()?;
        Ok(self)
    }

    /// The pre-shared key, from wherever it is configured.
    pub(crate) fn key(&self) -> Result<Option<Vec<u8>>> {
        let Some(path) = &self.auth_key_file else {
            return Ok(self.auth_key.as_ref().map(|k| k.expose().to_vec()));
        };
        let mut key = std::fs::read(path).map_err(|e| {
            Error::system(
                format!("reading auth_key_file {}", path.display()),
                e,
                "check the path and its permissions",
            )
        })?;
        for end in [b'\n', b'\r'] {
            if key.last() == Some(&end) {
                key.pop();
            }
        }
        if key.is_empty() {
            return Err(bad("auth_key_file", format!("{} is empty", path.display())));
        }
        Ok(Some(key))
    }
}

fn number<T: std::str::FromStr>(var: &'static str, text: &str) -> Result<T> {
    text.parse().map_err(|_| bad(var, format!("{text:?} is not a number in range")))
}

fn duration(var: &'static str, text: &str) -> Result<Duration> {
    use serde::de::IntoDeserializer;
    let source: serde::de::value::StrDeserializer<'_, serde::de::value::Error> = text.into_deserializer();
    humantime_serde::deserialize(source)
        .map_err(|_| bad(var, format!("{text:?} is not a duration such as 500ms, 10s or 2min")))
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
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_str("…")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn env(pairs: &[(&'static str, &str)]) -> Result<AgentConfig> {
        let map: HashMap<&str, String> = pairs.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        AgentConfig::default().overlay(|k| map.get(k).cloned())
    }

    #[test]
    fn yaml_and_json_give_the_same() {
        let yaml =
            "name: a\nlisten: ['tcp://127.0.0.1:0']\nconnect_timeout: 3s\ntransports: {require: [rdma]}\n";
        let json = r#"{"name":"a","listen":["tcp://127.0.0.1:0"],"connect_timeout":"3s","transports":{"require":["rdma"]}}"#;
        let (y, j) = (AgentConfig::from_yaml(yaml).unwrap(), AgentConfig::from_json(json).unwrap());
        assert_eq!(format!("{y:?}"), format!("{j:?}"));
        assert_eq!(y.connect_timeout, Duration::from_secs(3));
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let text = AgentConfig::from_yaml("nmae: a\n").unwrap_err().to_string();
        assert!(text.contains("nmae"), "{text}");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let config = AgentConfig { name: Some("x".into()), ..AgentConfig::default() };
        let text = serde_yaml_ng::to_string(&config).unwrap();
        assert_eq!(AgentConfig::from_yaml(&text).unwrap().name.as_deref(), Some("x"));
    }

    #[test]
    fn validation_names_key_and_value() {
        for (yaml, key, value) in [
            ("listen: ['http://x']", "listen", "http://x"),
            ("peer_timeout: 0s", "peer_timeout", "0ns"),
            ("tcp: {streams: 0}", "tcp.streams", "0"),
            ("tcp: {frame_bytes: 5}", "tcp.frame_bytes", "5"),
            ("tcp: {staging_depth: 0}", "tcp.staging_depth", "0"),
            ("nixl: {staging_depth: 65}", "nixl.staging_depth", "65"),
            ("transports: {require: [warp]}", "transports.require", "warp"),
            ("transports: {allow: [shm], forbid: [shm]}", "transports", "shm"),
            ("auth_key: ''", "auth_key", "empty"),
            ("name: ''", "name", "0 bytes"),
        ] {
            let error = AgentConfig::from_yaml(yaml).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(value), "{yaml}: {text}");
        }
    }

    #[test]
    fn the_environment_is_overlaid_and_bad_values_name_the_variable() {
        let c = env(&[
            ("KVXFER_NAME", "n"),
            ("KVXFER_LISTEN", "tcp://127.0.0.1:0, unix:///tmp/x"),
            ("KVXFER_TRANSPORTS", "shm,tcp"),
            ("KVXFER_REQUIRE", "same_host"),
            ("KVXFER_INTEGRITY", "full"),
            ("KVXFER_COPY_THREADS", "3"),
            ("KVXFER_TCP_STREAMS", "4"),
            ("KVXFER_NIXL_BACKENDS", "UCX,POSIX"),
            ("KVXFER_PEER_TIMEOUT", "1500ms"),
        ])
        .unwrap();
        assert_eq!(c.listen.len(), 2);
        assert_eq!(c.transports.allow, [TransportKind::Shm, TransportKind::Tcp]);
        assert_eq!((c.copy_threads, c.tcp.streams), (3, 4));
        assert_eq!(c.peer_timeout, Duration::from_millis(1500));
        for (var, value) in [
            ("KVXFER_LISTEN", "ftp://x"),
            ("KVXFER_TRANSPORTS", "warp"),
            ("KVXFER_FORBID", "warp"),
            ("KVXFER_INTEGRITY", "most"),
            ("KVXFER_COPY_THREADS", "-1"),
            ("KVXFER_NIXL_SAME_HOST", "perhaps"),
            ("KVXFER_TCP_STREAMS", "many"),
            ("KVXFER_PEER_TIMEOUT", "soon"),
            ("KVXFER_CONFIG", "/nonexistent/kvxfer.yaml"),
        ] {
            let text = env(&[(var, value)]).unwrap_err().to_string();
            assert!(text.contains(var) && text.contains(value), "{var}: {text}");
        }
    }

    #[test]
    fn the_key_comes_from_a_file_and_never_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "hunter2\n").unwrap();
        let c = env(&[("KVXFER_AUTH_KEY_FILE", path.to_str().unwrap())]).unwrap();
        assert_eq!(c.key().unwrap().unwrap(), b"hunter2");
        let c = env(&[("KVXFER_AUTH_KEY", "hunter2")]).unwrap();
        assert!(!format!("{c:?}").contains("hunter2"));
        assert!(!serde_json::to_string(&c).unwrap().contains("hunter2"));
        assert!(env(&[("KVXFER_AUTH_KEY", "a"), ("KVXFER_AUTH_KEY_FILE", "b")]).is_err());
    }
}
