//! Settings of the agents this command runs.

use crate::Failure;
use kvxfer_core::AgentConfig;
use serde::{Deserialize, Serialize};

/// The library's settings as the environment gives them, except for what this command decides itself: name and listening
/// addresses (several agents run at once).
pub(crate) fn settings() -> Result<AgentConfig, Failure> {
    let config = AgentConfig::default().overlay(|var| match var {
        "KVXFER_NAME" | "KVXFER_LISTEN" => None,
        var => std::env::var(var).ok(),
    })?;
    Ok(AgentConfig { name: None, listen: Vec::new(), ..config })
}

/// The same for a pair of processes of our own, which share a key made for this run.
pub(crate) fn settings_with_key(key: &str) -> Result<AgentConfig, Failure> {
    let key = Some(key.to_owned().into());
    Ok(AgentConfig { auth_key: key, auth_key_file: None, ..settings()? })
}

/// How the agents of a benchmark differ from others.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Manner {
    /// Waiting threads sleep at once.
    pub no_spin: bool,
    /// NIXL within the host as well. It has threads of its own, so that other transports are measured without it.
    pub nixl: bool,
}

/// The same for a benchmark.
pub(crate) fn settings_for(key: &str, manner: Manner) -> Result<AgentConfig, Failure> {
    let mut config = settings_with_key(key)?;
    config.nixl.same_host |= manner.nixl;
    Ok(if manner.no_spin { AgentConfig { spin: std::time::Duration::ZERO, ..config } } else { config })
}
