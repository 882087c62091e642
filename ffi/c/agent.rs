//! Agents: one endpoint of a process.

use super::args::{Buffer, Out, text, timeout};
use super::config::{environment, kvxfer_config_t, read, read_json, read_yaml};
use super::handle::{borrow, into_raw, object, take};
use super::panic::{Answer, guard};
use super::result::{KVXFER_OK, kvxfer_result_t};
use kvxfer_core::agent::TransportStatus;
use kvxfer_core::{Agent, AgentConfig, Error, ErrorCode, Notification, Result};
use parking_lot::Mutex;
use std::ffi::c_char;
use std::time::Duration;

/// One endpoint of this process: its regions, its peers and one progress thread. Usable from any thread.
pub struct kvxfer_agent_t {
    _opaque: [u8; 0],
}

/// What an agent's handle stands for.
pub(super) struct AgentObject {
    pub(super) agent: Agent,
    /// A notification that did not fit into the caller's buffer and is next to be handed out.
    pub(super) unread: Mutex<Option<Notification>>,
}
object!(AgentObject, kvxfer_agent_t, AGENT);

/// How long freeing an agent waits for its transfers to end.
const FREE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn agent(agent: *const kvxfer_agent_t) -> Result<Agent> {
    Ok(borrow::<AgentObject>("agent", agent)?.agent.clone())
}

/// Gives an agent made in Rust (with transports of one's own, say) to C code, which frees it with
/// [`kvxfer_agent_free`].
pub fn agent_into_raw(agent: Agent) -> Result<*mut kvxfer_agent_t> {
    into_raw(AgentObject { agent, unread: Mutex::new(None) })
}

/// The Rust agent behind a C handle. Both stay usable.
pub fn agent_from_raw(handle: *const kvxfer_agent_t) -> Result<Agent> {
    agent(handle)
}

fn start(config: AgentConfig, environment: bool) -> Result<*mut kvxfer_agent_t> {
    let builder = Agent::builder().config(config);
    let builder = if environment { builder.env()? } else { builder };
    agent_into_raw(builder.build()?)
}

/// Starts an agent: its listeners are bound and its progress thread runs when this returns.
///
/// `config` may be NULL for the defaults (no listener, every transport). Free it with `kvxfer_agent_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_new(
    config: *const kvxfer_config_t,
    agent_out: *mut *mut kvxfer_agent_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_new", || unsafe {
        let out = Out::new("agent_out", agent_out)?;
        let (config, environment) = read(config)?;
        out.set(start(config, environment)?);
        Ok(KVXFER_OK)
    })
}

/// Starts an agent from YAML text, in which every setting can be stated (`docs/c-abi.md` lists them); unknown
/// keys are errors. `flags` is 0 or `KVXFER_CONFIG_ENVIRONMENT`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_new_from_yaml(
    yaml: *const c_char,
    flags: u32,
    agent_out: *mut *mut kvxfer_agent_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_new_from_yaml", || unsafe {
        let out = Out::new("agent_out", agent_out)?;
        out.set(start(read_yaml(yaml)?, environment("flags", flags)?)?);
        Ok(KVXFER_OK)
    })
}

/// Starts an agent from JSON text; as `kvxfer_agent_new_from_yaml`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_new_from_json(
    json: *const c_char,
    flags: u32,
    agent_out: *mut *mut kvxfer_agent_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_new_from_json", || unsafe {
        let out = Out::new("agent_out", agent_out)?;
        out.set(start(read_json(json)?, environment("flags", flags)?)?);
        Ok(KVXFER_OK)
    })
}

/// Starts an agent from the defaults and the `KVXFER_*` environment variables.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_new_from_env(agent_out: *mut *mut kvxfer_agent_t) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_new_from_env", || unsafe {
        let out = Out::new("agent_out", agent_out)?;
        out.set(start(AgentConfig::default(), true)?);
        Ok(KVXFER_OK)
    })
}

/// Shuts the agent down (waiting at most 5 s for its transfers to end) and frees the handle, whatever the
/// result, unless that is `KVXFER_INVALID_ARGUMENT`. NULL is fine. Handles made from this agent stay valid,
/// answer `KVXFER_CLOSED`, and are still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_free(agent: *mut kvxfer_agent_t) -> kvxfer_result_t {
    guard("kvxfer_agent_free", || match take::<AgentObject>("agent", agent)? {
        None => Ok(KVXFER_OK),
        Some(object) => closed(object.agent.shutdown(FREE_TIMEOUT)),
    })
}

/// Ends everything in order: transfers are cancelled, peers told, the thread joined. Further calls on the
/// agent and on what was made from it answer `KVXFER_CLOSED`; the handle is still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_shutdown(
    agent: *mut kvxfer_agent_t,
    timeout_ms: u64,
) -> kvxfer_result_t {
    guard("kvxfer_agent_shutdown", || {
        let agent = self::agent(agent)?;
        closed(agent.shutdown(timeout("timeout_ms", timeout_ms)?))
    })
}

/// Shutting down what is shut down already is no failure.
fn closed(result: Result<()>) -> Answer {
    match result {
        Err(Error::Failed { code: ErrorCode::Closed, .. }) | Ok(()) => Ok(KVXFER_OK),
        Err(e) => Err(e),
    }
}

/// The agent's name as NUL-terminated text; `KVXFER_MAX_NAME + 1` bytes are enough. `*length_out` is its
/// length without the NUL, also when the answer is `KVXFER_TOO_LARGE`; with `buffer` NULL and `capacity` 0
/// only the length is told.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_name(
    agent: *const kvxfer_agent_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_name", || unsafe {
        let agent = self::agent(agent)?;
        Buffer::new("buffer", buffer.cast(), capacity, length_out)?.set_text(agent.name().as_str())
    })
}

/// The agent's epoch: new at each start, and larger than the one before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_epoch(
    agent: *const kvxfer_agent_t,
    epoch_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_epoch", || unsafe {
        let agent = self::agent(agent)?;
        Out::new("epoch_out", epoch_out)?.set(agent.epoch().0);
        Ok(KVXFER_OK)
    })
}

/// Address number `index` the agent listens on, with the real port where 0 was asked for; `KVXFER_NOT_FOUND`
/// past the last. The buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_address(
    agent: *const kvxfer_agent_t,
    index: usize,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_address", || unsafe {
        let agent = self::agent(agent)?;
        let buffer = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        match agent.addresses().get(index) {
            Some(address) => buffer.set_text(address),
            None => Err(Error::NotFound { what: "listening address", name: index.to_string() }),
        }
    })
}

/// Names of the connected peers, one a line. The buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_peers(
    agent: *const kvxfer_agent_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_peers", || unsafe {
        let agent = self::agent(agent)?;
        let buffer = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        let mut names: Vec<_> = agent.peers().iter().map(|p| p.name().to_string()).collect();
        names.sort();
        buffer.set_text(&names.join("\n"))
    })
}

/// Every transport this library knows, one a line: name, tab, `ok` or why it cannot be used by this agent. The
/// buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_transports(
    agent: *const kvxfer_agent_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_transports", || unsafe {
        let agent = self::agent(agent)?;
        let buffer = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        let line = |t: &TransportStatus| format!("{}\t{}", t.kind, t.reason.as_deref().unwrap_or("ok"));
        buffer.set_text(&agent.transports().iter().map(line).collect::<Vec<_>>().join("\n"))
    })
}

/// Takes back the export of a region; peers' later transfers on it fail.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_unexport(
    agent: *mut kvxfer_agent_t,
    name: *const c_char,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_unexport", || unsafe {
        let agent = self::agent(agent)?;
        agent.unexport(text("name", name)?)?;
        Ok(KVXFER_OK)
    })
}
