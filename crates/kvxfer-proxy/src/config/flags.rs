//! The command line of the guides and of `LMCache`'s proxy: hosts, ports and counts become instances.

use super::file::FilePolicy;
use super::{
    AccessLog, Config, ConfigError, Endpoint, File, Instance, Policies, Policy, Receiver, Role, Secret,
    Settings, Stats, TlsFiles,
};
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

/// What was given on the command line; empty or `None` where nothing was.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--host`.
    pub host: Option<String>,
    /// `--port`.
    pub port: Option<u16>,
    /// `--prefiller-host`.
    pub prefiller_hosts: Vec<String>,
    /// `--prefiller-port`.
    pub prefiller_ports: Vec<u16>,
    /// `--num-prefillers`.
    pub num_prefillers: Option<usize>,
    /// `--decoder-host`.
    pub decoder_hosts: Vec<String>,
    /// `--decoder-port`.
    pub decoder_ports: Vec<u16>,
    /// `--decoder-init-port`.
    pub decoder_init_ports: Vec<u16>,
    /// `--decoder-alloc-port`.
    pub decoder_alloc_ports: Vec<u16>,
    /// `--num-decoders`.
    pub num_decoders: Option<usize>,
    /// `--proxy-host`.
    pub proxy_host: Option<String>,
    /// `--proxy-port`.
    pub proxy_port: Option<u16>,
    /// `--policy`.
    pub policy: Option<Policy>,
    /// `--kv-timeout`.
    pub kv_timeout: Option<Duration>,
    /// `--max-requests`.
    pub max_requests: Option<usize>,
    /// `--no-access-log`.
    pub no_access_log: bool,
    /// `--api-key`, or its variable.
    pub api_keys: Vec<String>,
    /// The key for the instances.
    pub upstream_api_key: Option<String>,
    /// `--admin-token`, or its variable.
    pub admin_token: Option<String>,
    /// `--tls-cert` and `--tls-key`.
    pub tls: Option<TlsFiles>,
}

impl Flags {
    /// The configuration of a file with these flags over it.
    pub fn onto(&self, file: File) -> Result<Config, ConfigError> {
        let prefillers = match self.prefillers()? {
            given if !given.is_empty() => given,
            _ if file.prefillers.is_empty() && file.decoders.is_empty() => self.default_prefillers()?,
            _ => numbered(file.prefillers, super::file::FilePrefiller::instance),
        };
        let decoders = match self.decoders()? {
            given if !given.is_empty() => given,
            _ if file.decoders.is_empty() => self.default_decoders()?,
            _ => numbered(file.decoders, super::file::FileDecoder::instance),
        };
        let mut policy = match file.policy {
            Some(FilePolicy::One(policy)) => {
                Policies { prefill: policy, decode: policy, ..Policies::default() }
            }
            Some(FilePolicy::Each(policies)) => policies,
            None => Policies::default(),
        };
        if let Some(given) = self.policy {
            (policy.prefill, policy.decode) = (given, given);
        }
        let mut deadlines = file.deadlines;
        if let Some(given) = self.kv_timeout {
            deadlines.kv = given;
        }
        let mut limits = file.limits;
        if let Some(given) = self.max_requests {
            limits.requests = given;
        }
        let secret =
            |key: &str, given: &Option<String>| given.as_ref().map(|text| Secret::new(key, text)).transpose();
        let keys =
            self.api_keys.iter().map(|key| Secret::new("--api-key", key)).collect::<Result<Vec<_>, _>>()?;
        let settings = Settings {
            policy,
            kv: file.kv.unwrap_or_default(),
            chats: file.chats.unwrap_or_default(),
            limits,
            deadlines,
            health: file.health,
            api_keys: if keys.is_empty() { file.api_keys } else { keys },
            upstream_api_key: secret("the key for the instances", &self.upstream_api_key)?
                .or(file.upstream_api_key),
            admin_token: secret("--admin-token", &self.admin_token)?.or(file.admin_token),
            access_log: AccessLog(!self.no_access_log && file.access_log.unwrap_or(true)),
            stats_interval: file.stats_interval.map_or_else(Stats::default, Stats),
        };
        let or = |given: &Option<String>, file: Option<String>| {
            given.clone().or(file).unwrap_or_else(|| "localhost".to_owned())
        };
        Ok(Config {
            listen: Endpoint {
                host: or(&self.host, file.host),
                port: self.port.or(file.port).unwrap_or(8000),
            },
            notify: Endpoint {
                host: or(&self.proxy_host, file.proxy_host),
                port: self.proxy_port.or(file.proxy_port).unwrap_or(8500),
            },
            prefillers,
            decoders,
            settings,
            tls: self.tls.clone().or(file.tls),
            file: self.config.clone(),
        })
    }

    fn prefillers(&self) -> Result<Vec<Instance>, ConfigError> {
        if self.prefiller_hosts.is_empty() && self.prefiller_ports.is_empty() && self.num_prefillers.is_none()
        {
            return Ok(Vec::new());
        }
        self.default_prefillers()
    }

    fn default_prefillers(&self) -> Result<Vec<Instance>, ConfigError> {
        let places =
            pair("prefiller", &self.prefiller_hosts, &self.prefiller_ports, 8100, self.num_prefillers)?;
        let instance = |(i, (host, port))| Instance {
            name: format!("prefiller{}", i + 1),
            role: Role::Prefiller,
            host,
            port,
            weight: 1,
            max_requests: None,
            receiver: Receiver::default(),
        };
        Ok(places.into_iter().enumerate().map(instance).collect())
    }

    fn decoders(&self) -> Result<Vec<Instance>, ConfigError> {
        if self.decoder_hosts.is_empty()
            && self.decoder_ports.is_empty()
            && self.num_decoders.is_none()
            && self.decoder_init_ports.is_empty()
            && self.decoder_alloc_ports.is_empty()
        {
            return Ok(Vec::new());
        }
        self.default_decoders()
    }

    fn default_decoders(&self) -> Result<Vec<Instance>, ConfigError> {
        let places = pair("decoder", &self.decoder_hosts, &self.decoder_ports, 8200, self.num_decoders)?;
        let init = spread("--decoder-init-port", &self.decoder_init_ports, 8300, &places)?;
        let alloc = spread("--decoder-alloc-port", &self.decoder_alloc_ports, 8400, &places)?;
        let instance = |(i, (((host, port), init_ports), alloc_ports)): (usize, ((_, _), _))| {
            let host: String = host;
            Instance {
                name: format!("decoder{}", i + 1),
                role: Role::Decoder,
                receiver: Receiver { host: host.clone(), init_ports, alloc_ports },
                host,
                port,
                weight: 1,
                max_requests: None,
            }
        };
        Ok(places.into_iter().zip(init).zip(alloc).enumerate().map(instance).collect())
    }
}

fn numbered<T>(given: Vec<T>, instance: fn(T, usize) -> Instance) -> Vec<Instance> {
    given.into_iter().enumerate().map(|(i, one)| instance(one, i + 1)).collect()
}

/// Hosts and ports, paired as `LMCache`'s proxy pairs them: one host and one port with a count are consecutive ports, one
/// of either goes with each of the other, two lists go pairwise.
fn pair(
    what: &str,
    hosts: &[String],
    ports: &[u16],
    default_port: u16,
    count: Option<usize>,
) -> Result<Vec<(String, u16)>, ConfigError> {
    let count_key = format!("--num-{what}s");
    if count == Some(0) || count.is_some_and(|count| count > 1024) {
        return Err(ConfigError::new(count_key, count.unwrap_or(0), "use 1 to 1024"));
    }
    let localhost = ["localhost".to_owned()];
    let hosts = if hosts.is_empty() { &localhost } else { hosts };
    let first = [default_port];
    let ports = if ports.is_empty() { &first } else { ports };
    let places: Vec<(String, u16)> = match (hosts, ports) {
        ([host], [port]) => {
            let count = count.unwrap_or(1);
            let last = usize::from(*port) + count - 1;
            if last > usize::from(u16::MAX) {
                return Err(ConfigError::new(count_key, count, format!("the last port would be {last}")));
            }
            (0..count).map(|i| (host.clone(), port + i as u16)).collect()
        }
        ([host], ports) => ports.iter().map(|port| (host.clone(), *port)).collect(),
        (hosts, [port]) => hosts.iter().map(|host| (host.clone(), *port)).collect(),
        (hosts, ports) if hosts.len() == ports.len() => {
            hosts.iter().cloned().zip(ports.iter().copied()).collect()
        }
        (hosts, ports) => {
            return Err(ConfigError::new(
                format!("--{what}-port"),
                format!("{} ports for {} hosts", ports.len(), hosts.len()),
                "give one of either, or as many of both",
            ));
        }
    };
    match count {
        Some(count) if count != places.len() => Err(ConfigError::new(
            count_key,
            count,
            format!(
                "--{what}-host and --{what}-port name {}; give as many, or leave the count out",
                places.len()
            ),
        )),
        _ => Ok(places),
    }
}

/// The ranks' ports of each decoder. The list is one decoder's ranks; decoders that share a host get the next ports, or
/// their own part of a list that has enough for all.
fn spread(
    key: &str,
    ports: &[u16],
    default_port: u16,
    places: &[(String, u16)],
) -> Result<Vec<Vec<u16>>, ConfigError> {
    let first = [default_port];
    let ports = if ports.is_empty() { &first } else { ports };
    let decoders = places.len();
    let hosts: HashSet<&str> = places.iter().map(|(host, _)| host.as_str()).collect();
    if hosts.len() == decoders {
        return Ok(vec![ports.to_vec(); decoders]);
    }
    if let [port] = ports {
        let last = usize::from(*port) + decoders - 1;
        if last > usize::from(u16::MAX) {
            return Err(ConfigError::new(key, port, format!("decoder {decoders}'s port would be {last}")));
        }
        return Ok((0..decoders).map(|i| vec![port + i as u16]).collect());
    }
    if ports.len() % decoders == 0 {
        return Ok(ports.chunks(ports.len() / decoders).map(<[u16]>::to_vec).collect());
    }
    Err(ConfigError::new(
        key,
        format!("{ports:?}"),
        format!(
            "for {decoders} decoders on one host give a port for each rank of each, or use a file (--config)"
        ),
    ))
}
