//! Metrics as text.

use super::agent::kvxfer_agent_t;
use super::args::Buffer;
use super::panic::guard;
use super::result::kvxfer_result_t;
use std::ffi::c_char;

/// The agent's metrics in Prometheus text format. The buffer is used as in `kvxfer_agent_name`; the text may
/// grow between two calls, so ask for some more room than the length told.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_metrics(
    agent: *const kvxfer_agent_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_metrics", || unsafe {
        let agent = super::agent::agent(agent)?;
        Buffer::new("buffer", buffer.cast(), capacity, length_out)?.set_text(&agent.metrics())
    })
}
