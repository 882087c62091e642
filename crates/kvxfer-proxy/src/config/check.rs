//! Whether settings can be used: every refusal names the key, the value and what would be right.

use super::{Config, ConfigError, Instance, KvPath, Role, Settings};
use kvxfer_proto::notify::MAX_TP_RANKS;
use std::collections::HashSet;
use std::time::Duration;

impl Config {
    /// Everything fits together.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_host("host", &self.listen.host)?;
        check_host("proxy_host", &self.notify.host)?;
        let mut names = HashSet::new();
        let mut places = HashSet::new();
        for instance in self.instances() {
            instance.check()?;
            if !names.insert(instance.name.as_str()) {
                return Err(ConfigError::new("name", &instance.name, "two instances have this name"));
            }
            if !places.insert((instance.role, instance.authority())) {
                return Err(ConfigError::new(
                    format!("{}s", instance.role),
                    instance.authority(),
                    "this address is listed twice",
                ));
            }
        }
        for decoder in &self.decoders {
            decoder.check_path(self.settings.kv)?;
        }
        if self.decoders.is_empty() {
            return Err(ConfigError::new("decoders", "none", "give at least one"));
        }
        self.settings.check()
    }
}

impl Instance {
    /// A decoder says where it receives, where prefillers have to be told.
    pub fn check_path(&self, kv: KvPath) -> Result<(), ConfigError> {
        if kv == KvPath::Pd && self.role == Role::Decoder && self.receiver.init_ports.is_empty() {
            return Err(ConfigError::new(
                format!("{}.init_ports", self.name),
                "none",
                "give one handshake port per tensor-parallel rank (LMCache's pd_peer_init_port), and alloc_ports too",
            ));
        }
        Ok(())
    }

    /// The names and numbers are usable.
    pub fn check(&self) -> Result<(), ConfigError> {
        let at = |key: &str| format!("{}.{key}", self.name);
        if self.name.is_empty() || self.name.len() > 128 || !self.name.chars().all(is_name) {
            return Err(ConfigError::new(
                format!("{} name", self.role),
                &self.name,
                "use 1 to 128 letters, digits, '.', '_', '-' or ':'",
            ));
        }
        check_host(&at("host"), &self.host)?;
        if self.port == 0 {
            return Err(ConfigError::new(at("port"), 0, "an instance's port is 1 to 65535"));
        }
        if self.weight == 0 || self.weight > 10_000 {
            return Err(ConfigError::new(
                at("weight"),
                self.weight,
                "use 1 to 10000; to rest an instance, drain it",
            ));
        }
        if self.max_requests == Some(0) {
            return Err(ConfigError::new(
                at("max_requests"),
                0,
                "use at least 1; to rest an instance, drain it",
            ));
        }
        if self.role == Role::Decoder {
            check_host(&at("receiver_host"), &self.receiver.host)?;
            let (init, alloc) = (&self.receiver.init_ports, &self.receiver.alloc_ports);
            if init.len() != alloc.len() {
                return Err(ConfigError::new(
                    at("alloc_ports"),
                    format!("{alloc:?}"),
                    format!("it needs as many as init_ports {init:?}: one per tensor-parallel rank"),
                ));
            }
            if init.len() > MAX_TP_RANKS as usize {
                return Err(ConfigError::new(
                    at("init_ports"),
                    init.len(),
                    format!("at most {MAX_TP_RANKS} ranks"),
                ));
            }
            let mut seen = HashSet::new();
            for port in init.iter().chain(alloc) {
                if *port == 0 || !seen.insert(*port) {
                    return Err(ConfigError::new(
                        at("init_ports/alloc_ports"),
                        port,
                        "each is 1 to 65535 and used once",
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Settings {
    fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("limits.body", self.limits.body),
            ("limits.answer", self.limits.answer),
            ("limits.requests", self.limits.requests),
            ("limits.prompts", self.limits.prompts),
            ("limits.prompt_tokens", self.limits.prompt_tokens),
            ("limits.connections", self.limits.connections),
            ("policy.chunk_tokens", self.policy.chunk_tokens),
            ("policy.chunks", self.policy.chunks),
            ("health.failures", self.health.failures as usize),
            ("health.breaker_failures", self.health.breaker_failures as usize),
            ("health.prefill_attempts", self.health.prefill_attempts as usize),
            ("health.decode_attempts", self.health.decode_attempts as usize),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::new(*key, 0, "use at least 1"));
        }
        let d = &self.deadlines;
        let times = [
            ("deadlines.connect", d.connect),
            ("deadlines.body", d.body),
            ("deadlines.tokenize", d.tokenize),
            ("deadlines.prefill", d.prefill),
            ("deadlines.kv", d.kv),
            ("deadlines.decode", d.decode),
            ("deadlines.stall", d.stall),
            ("deadlines.request", d.request),
            ("health.interval", self.health.interval),
            ("health.interval_down", self.health.interval_down),
            ("health.timeout", self.health.timeout),
            ("health.breaker_pause", self.health.breaker_pause),
        ];
        let day = Duration::from_secs(86_400);
        if let Some((key, value)) = times.iter().find(|(_, t)| *t < Duration::from_millis(1) || *t > day) {
            return Err(ConfigError::new(*key, format!("{value:?}"), "use 1ms to 24h"));
        }
        if !self.health.path.starts_with('/') || !self.health.path.bytes().all(|b| (0x21..0x7f).contains(&b))
        {
            return Err(ConfigError::new("health.path", &self.health.path, "a path begins with '/'"));
        }
        for key in &self.api_keys {
            key.check("api_keys")?;
        }
        if let Some(key) = &self.upstream_api_key {
            key.check("upstream_api_key")?;
        }
        if let Some(token) = &self.admin_token {
            token.check("admin_token")?;
        }
        Ok(())
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':')
}

fn check_host(key: &str, host: &str) -> Result<(), ConfigError> {
    if host.contains("://") {
        return Err(ConfigError::new(key, host, "give the host alone, without a scheme"));
    }
    if host.is_empty()
        || host.len() > 255
        || !host.chars().all(|c| is_name(c) || matches!(c, '[' | ']' | '%'))
    {
        return Err(ConfigError::new(key, host, "this is no host name or address"));
    }
    Ok(())
}
