//! Settings of the agents this command runs.

use crate::Failure;
use kvxfer_core::AgentConfig;

/// The library's settings.
pub(crate) fn settings() -> Result<AgentConfig, Failure> {
    Ok(AgentConfig::default())
}

/// The same for a pair of processes of our own, which share a key made for this run.
pub(crate) fn settings_with_key(key: &str) -> Result<AgentConfig, Failure> {
    let key = Some(key.to_owned().into());
    Ok(AgentConfig { auth_key: key, ..settings()? })
}
