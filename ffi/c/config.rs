//! Settings of an agent as C states them.

use super::args::{invalid, optional_text, optional_timeout, read_struct, texts, versioned};
use super::args::{list, text};
use kvxfer_core::config::Secret;
use kvxfer_core::{AgentConfig, Error, Integrity, Result, TransportKind};
use std::ffi::c_char;

/// Level of checking as configured, by default by transport.
pub const KVXFER_INTEGRITY_DEFAULT: u32 = 0;
/// Nothing beside the protocol's own bookkeeping.
pub const KVXFER_INTEGRITY_OFF: u32 = 1;
/// Request, key, length and page generation, plus sampled cache lines.
pub const KVXFER_INTEGRITY_BOUND: u32 = 2;
/// Every byte.
pub const KVXFER_INTEGRITY_FULL: u32 = 3;

/// Flag: overlay the `KVXFER_*` environment variables over the configuration given.
pub const KVXFER_CONFIG_ENVIRONMENT: u32 = 1;

/// Settings of an agent. Set everything to zero and `struct_size` to `sizeof(kvxfer_config_t)`; then zero or
/// NULL in a field means its default. For the settings not listed here see `kvxfer_agent_new_from_yaml`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_config_t {
    /// `sizeof(kvxfer_config_t)`.
    pub struct_size: usize,
    /// Name of the agent, stable over restarts; default `host-pid`.
    pub name: *const c_char,
    /// Addresses to listen on, `tcp://127.0.0.1:7300` (port 0 picks one) or `unix:///run/kvxfer.sock`; default
    /// none.
    pub listen: *const *const c_char,
    /// Number of addresses in `listen`.
    pub listen_count: usize,
    /// Pre-shared key: bytes; when set, every control connection must prove that it holds the same.
    pub auth_key: *const u8,
    /// Length of `auth_key` in bytes.
    pub auth_key_length: usize,
    /// Allow only these transports, in this order (`inproc`, `shm`, `cma`, `tcp`, `nixl`, `cuda_ipc`); default
    /// all.
    pub allow: *const *const c_char,
    /// Number of names in `allow`.
    pub allow_count: usize,
    /// Never use these transports.
    pub forbid: *const *const c_char,
    /// Number of names in `forbid`.
    pub forbid_count: usize,
    /// At least one of these must carry a peer's bytes or connecting fails: transports, `nvlink`, `rdma` or
    /// `same_host`.
    pub require: *const *const c_char,
    /// Number of names in `require`.
    pub require_count: usize,
    /// `KVXFER_INTEGRITY_...`.
    pub integrity: u32,
    /// `KVXFER_CONFIG_...` flags, or 0.
    pub flags: u32,
    /// Deadline of a connection attempt with its handshake, milliseconds.
    pub connect_timeout_ms: u64,
    /// Deadline of a transfer that states none, milliseconds.
    pub transfer_timeout_ms: u64,
    /// A peer silent for this long is gone, milliseconds.
    pub peer_timeout_ms: u64,
}
versioned! { kvxfer_config_t, 128; }

/// Reads a configuration; NULL is the default one. The flag says whether to overlay the environment.
pub(super) unsafe fn read(config: *const kvxfer_config_t) -> Result<(AgentConfig, bool)> {
    let mut out = AgentConfig::default();
    if config.is_null() {
        return Ok((out, false));
    }
    // SAFETY: pointers inside the struct are as the header asks.
    unsafe {
        let c = read_struct("config", config)?;
        out.name = optional_text("config.name", c.name)?.map(str::to_owned);
        out.listen = texts("config.listen", c.listen, c.listen_count)?;
        let key = list("config.auth_key", c.auth_key, c.auth_key_length)?;
        out.auth_key = if key.is_empty() { None } else { Some(Secret::new(key)) };
        out.transports.allow = kinds("config.allow", c.allow, c.allow_count)?;
        out.transports.forbid = kinds("config.forbid", c.forbid, c.forbid_count)?;
        out.transports.require = texts("config.require", c.require, c.require_count)?;
        out.integrity = integrity("config.integrity", c.integrity)?;
        for (argument, ms, field) in [
            ("config.connect_timeout_ms", c.connect_timeout_ms, &mut out.connect_timeout),
            ("config.transfer_timeout_ms", c.transfer_timeout_ms, &mut out.transfer_timeout),
            ("config.peer_timeout_ms", c.peer_timeout_ms, &mut out.peer_timeout),
        ] {
            if let Some(t) = optional_timeout(argument, ms)? {
                *field = t;
            }
        }
        Ok((out, environment("config.flags", c.flags)?))
    }
}

/// Reads YAML text with the field names of [`AgentConfig`]; empty text is the default.
pub(super) unsafe fn read_yaml(yaml: *const c_char) -> Result<AgentConfig> {
    // SAFETY: the pointer is as the header asks.
    let yaml = unsafe { text("yaml", yaml) }?;
    if yaml.trim().is_empty() { Ok(AgentConfig::default()) } else { AgentConfig::from_yaml(yaml) }
}

/// Reads JSON text with the field names of [`AgentConfig`].
pub(super) unsafe fn read_json(json: *const c_char) -> Result<AgentConfig> {
    // SAFETY: the pointer is as the header asks.
    AgentConfig::from_json(unsafe { text("json", json) }?)
}

/// Reads the flags.
pub(super) fn environment(argument: &'static str, flags: u32) -> Result<bool> {
    match flags {
        0 => Ok(false),
        KVXFER_CONFIG_ENVIRONMENT => Ok(true),
        _ => Err(invalid(argument, format!("{flags:#x} holds bits that are no KVXFER_CONFIG_ flag"))),
    }
}

/// Reads a level of checking.
pub(super) fn integrity(argument: &'static str, level: u32) -> Result<Option<Integrity>> {
    Ok(match level {
        KVXFER_INTEGRITY_DEFAULT => None,
        KVXFER_INTEGRITY_OFF => Some(Integrity::Off),
        KVXFER_INTEGRITY_BOUND => Some(Integrity::Bound),
        KVXFER_INTEGRITY_FULL => Some(Integrity::Full),
        _ => {
            return Err(invalid(argument, format!("{level} is none of the KVXFER_INTEGRITY_ values 0 to 3")));
        }
    })
}

unsafe fn kinds(
    argument: &'static str,
    names: *const *const c_char,
    count: usize,
) -> Result<Vec<TransportKind>> {
    // SAFETY: passed on.
    unsafe { texts(argument, names, count) }?
        .iter()
        .map(|name| name.parse().map_err(|e: Error| invalid(argument, e.to_string())))
        .collect()
}
