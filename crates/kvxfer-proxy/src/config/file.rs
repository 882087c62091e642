//! The YAML file: everything the command line can say, and more about each instance.

use super::{
    ConfigError, Deadlines, Health, Instance, KvPath, Limits, Policies, Policy, Receiver, Role, Secret,
    TlsFiles,
};
use crate::openai::Chats;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::path::Path;
use std::time::Duration;

/// The file as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// Where clients connect.
    pub host: Option<String>,
    /// Port for clients.
    pub port: Option<u16>,
    /// Where notifications arrive.
    pub proxy_host: Option<String>,
    /// Port for notifications.
    pub proxy_port: Option<u16>,
    /// Prefillers.
    pub prefillers: Vec<FilePrefiller>,
    /// Decoders.
    pub decoders: Vec<FileDecoder>,
    /// One policy for both roles, or one for each.
    pub policy: Option<FilePolicy>,
    /// How caches travel.
    pub kv: Option<KvPath>,
    /// Who answers chats of plain text.
    pub chats: Option<Chats>,
    /// Limits.
    pub limits: Limits,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// Health probes, breaker, attempts.
    pub health: Health,
    /// Keys of clients.
    pub api_keys: Vec<Secret>,
    /// Key for the instances.
    pub upstream_api_key: Option<Secret>,
    /// Opens `/admin`.
    pub admin_token: Option<Secret>,
    /// HTTPS.
    pub tls: Option<TlsFiles>,
    /// One line per request.
    pub access_log: Option<bool>,
    /// Statistics in the log.
    #[serde(with = "humantime_serde")]
    pub stats_interval: Option<Duration>,
}

/// A policy's name, or the table.
#[derive(Clone, Debug)]
pub enum FilePolicy {
    /// For both roles.
    One(Policy),
    /// For each.
    Each(Policies),
}

impl<'de> Deserialize<'de> for FilePolicy {
    /// By hand, so that an error names the value and not only its place.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FilePolicy;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a policy, or `prefill` and `decode` with a name each")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<FilePolicy, E> {
                name.parse().map(FilePolicy::One).map_err(de::Error::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FilePolicy, A::Error> {
                Policies::deserialize(de::value::MapAccessDeserializer::new(map)).map(FilePolicy::Each)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A prefiller in the file and in `/admin/instances`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePrefiller {
    name: Option<String>,
    #[serde(default = "localhost")]
    host: String,
    port: u16,
    #[serde(default = "one")]
    weight: u32,
    max_requests: Option<u32>,
}

/// A decoder in the file and in `/admin/instances`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDecoder {
    name: Option<String>,
    #[serde(default = "localhost")]
    host: String,
    port: u16,
    #[serde(default = "one")]
    weight: u32,
    max_requests: Option<u32>,
    /// As the prefillers see it; the HTTP host unless given.
    receiver_host: Option<String>,
    #[serde(default)]
    init_ports: Ports,
    #[serde(default)]
    alloc_ports: Ports,
}

/// One port or a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "a port is a number from 1 to 65535; give one, or a list of them")]
enum Ports {
    One(u16),
    Many(Vec<u16>),
}

impl Default for Ports {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<Ports> for Vec<u16> {
    fn from(ports: Ports) -> Self {
        match ports {
            Ports::One(port) => vec![port],
            Ports::Many(ports) => ports,
        }
    }
}

fn localhost() -> String {
    "localhost".to_owned()
}

fn one() -> u32 {
    1
}

impl File {
    /// Reads a file; errors name it and the place in it.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| ConfigError::new("--config", path.display(), e.to_string()))?;
        Self::parse(&text).map_err(|problem| ConfigError::new("--config", path.display(), problem))
    }

    /// Reads YAML text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_yaml_ng::from_str(text).map_err(|e| e.to_string())
    }
}

impl FilePrefiller {
    /// The instance, named by its number (from 1) unless it has a name.
    pub fn instance(self, number: usize) -> Instance {
        Instance {
            name: self.name.unwrap_or_else(|| format!("prefiller{number}")),
            role: Role::Prefiller,
            host: self.host,
            port: self.port,
            weight: self.weight,
            max_requests: self.max_requests,
            receiver: Receiver::default(),
        }
    }
}

impl FileDecoder {
    /// The instance, named by its number (from 1) unless it has a name.
    pub fn instance(self, number: usize) -> Instance {
        Instance {
            name: self.name.unwrap_or_else(|| format!("decoder{number}")),
            role: Role::Decoder,
            receiver: Receiver {
                host: self.receiver_host.unwrap_or_else(|| self.host.clone()),
                init_ports: self.init_ports.into(),
                alloc_ports: self.alloc_ports.into(),
            },
            host: self.host,
            port: self.port,
            weight: self.weight,
            max_requests: self.max_requests,
        }
    }
}
