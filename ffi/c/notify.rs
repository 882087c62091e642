//! Notifications that peers sent.

use super::agent::{AgentObject, kvxfer_agent_t};
use super::args::{Buffer, invalid, timeout};
use super::handle::borrow;
use super::panic::{Answer, guard};
use super::result::kvxfer_result_t;
use kvxfer_core::{Error, ErrorCode};
use std::ffi::{c_char, c_void};
use std::time::Duration;

/// Longest payload of a notification, bytes: a buffer of this size always suffices.
pub const KVXFER_MAX_NOTIFICATION: usize = 4096;
/// Longest name of an agent, region or pool, bytes without the NUL.
pub const KVXFER_MAX_NAME: usize = 128;

const _: () = assert!(
    KVXFER_MAX_NOTIFICATION == kvxfer_core::proto::wire::MAX_NOTIFICATION
        && KVXFER_MAX_NAME == kvxfer_core::proto::ids::MAX_NAME
);

unsafe fn next(
    agent: *mut kvxfer_agent_t,
    wait: Option<Duration>,
    peer: *mut c_char,
    peer_capacity: usize,
    payload: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> Answer {
    let object = borrow::<AgentObject>("agent", agent)?;
    // SAFETY: pointer arguments are as the header asks.
    unsafe {
        let buffer = Buffer::new("payload_out", payload.cast(), capacity, length)?;
        if buffer.asks_for_length() {
            return Err(invalid("payload_out", "is NULL; KVXFER_MAX_NOTIFICATION bytes always suffice"));
        }
        if !peer.is_null() && peer_capacity <= KVXFER_MAX_NAME {
            return Err(invalid(
                "peer_capacity",
                format!("{peer_capacity} bytes may be too few for a name; pass KVXFER_MAX_NAME + 1 = 129"),
            ));
        }
        let mut unread = object.unread.lock();
        let notification = match (unread.take(), wait) {
            (Some(n), _) => Some(n),
            (None, None) => object.agent.try_notification(),
            (None, Some(wait)) => {
                // Not under the lock: other threads may wait as well.
                drop(unread);
                let n = object.agent.notification(wait)?;
                unread = object.unread.lock();
                n
            }
        };
        let Some(notification) = notification else {
            return Err(match wait {
                None => Error::failed(ErrorCode::NotFound, "no notification is there"),
                Some(after) => Error::TimedOut { operation: "a notification".into(), after },
            });
        };
        if !buffer.fits(notification.payload.len()) {
            let answer = buffer.set(&notification.payload);
            *unread = Some(notification);
            return answer;
        }
        if !peer.is_null() {
            let name = notification.peer.as_str();
            peer.copy_from_nonoverlapping(name.as_ptr().cast(), name.len());
            peer.add(name.len()).write(0);
        }
        buffer.set(&notification.payload)
    }
}

/// Takes the next notification, if one is there; `KVXFER_NOT_FOUND` otherwise. Never blocks.
///
/// `peer_out` (may be NULL) becomes the sender's name, NUL-terminated; it holds at least `KVXFER_MAX_NAME + 1`
/// bytes. A payload longer than `capacity` is kept: the answer is `KVXFER_TOO_LARGE`, and `*length_out` tells
/// its length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_try_notification(
    agent: *mut kvxfer_agent_t,
    peer_out: *mut c_char,
    peer_capacity: usize,
    payload_out: *mut c_void,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_try_notification", || unsafe {
        next(agent, None, peer_out, peer_capacity, payload_out, capacity, length_out)
    })
}

/// Waits for the next notification; `KVXFER_TIMED_OUT` when none came in `timeout_ms`. Otherwise as
/// `kvxfer_agent_try_notification`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_wait_notification(
    agent: *mut kvxfer_agent_t,
    timeout_ms: u64,
    peer_out: *mut c_char,
    peer_capacity: usize,
    payload_out: *mut c_void,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_wait_notification", || unsafe {
        let wait = Some(timeout("timeout_ms", timeout_ms)?);
        next(agent, wait, peer_out, peer_capacity, payload_out, capacity, length_out)
    })
}
