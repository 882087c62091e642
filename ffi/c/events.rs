//! The agent's event descriptor, for epoll and asyncio.

use super::agent::kvxfer_agent_t;
use super::args::Out;
use super::panic::guard;
use super::result::{KVXFER_OK, kvxfer_result_t};
use std::ffi::c_int;
use std::os::fd::AsRawFd;

/// A descriptor that is readable while something has happened since `kvxfer_agent_clear_event`: a transfer
/// ended or a notification came. It belongs to the agent: poll it, do not read or close it, and take it out of
/// your epoll set before freeing the agent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_event_fd(
    agent: *const kvxfer_agent_t,
    fd_out: *mut c_int,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_event_fd", || unsafe {
        let agent = super::agent::agent(agent)?;
        Out::new("fd_out", fd_out)?.set(agent.event_fd().as_raw_fd());
        Ok(KVXFER_OK)
    })
}

/// Makes the event descriptor unreadable until the next event. Call it **before** looking at transfers and
/// notifications, so that nothing is missed in between.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_clear_event(agent: *mut kvxfer_agent_t) -> kvxfer_result_t {
    guard("kvxfer_agent_clear_event", || {
        super::agent::agent(agent)?.clear_event();
        Ok(KVXFER_OK)
    })
}
