//! Peers: connected remote agents and what they export.

use super::agent::kvxfer_agent_t;
use super::args::{Buffer, Out, OutStruct, list, text, timeout, versioned};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::result::{KVXFER_OK, kvxfer_result_t, number};
use kvxfer_core::agent::PeerState;
use kvxfer_core::metrics::PathStats;
use kvxfer_core::{Error, Peer, RemoteRegion, Result};
use std::ffi::{c_char, c_void};

/// A connected remote agent of one epoch. Stays valid, and answers with errors, after the peer is gone.
pub struct kvxfer_peer_t {
    _opaque: [u8; 0],
}

/// A peer's exported region.
pub struct kvxfer_remote_region_t {
    _opaque: [u8; 0],
}

/// What a peer's handle stands for.
pub(super) struct PeerObject(pub(super) Peer);
object!(PeerObject, kvxfer_peer_t, PEER);

/// What a remote region's handle stands for.
pub(super) struct RemoteRegionObject(pub(super) RemoteRegion);
object!(RemoteRegionObject, kvxfer_remote_region_t, REMOTE_REGION);

pub(super) fn peer(peer: *const kvxfer_peer_t) -> Result<Peer> {
    Ok(borrow::<PeerObject>("peer", peer)?.0.clone())
}

/// Connects to a listening agent, `tcp://host:port` or `unix:///path`. A peer that is connected already under
/// the same address and still up is returned as it is, with a handle of its own. `KVXFER_MISMATCH`,
/// `KVXFER_UNAUTHENTICATED`, `KVXFER_UNREACHABLE`, `KVXFER_REQUIREMENT` and `KVXFER_TIMED_OUT` are the usual
/// failures.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_connect(
    agent: *mut kvxfer_agent_t,
    address: *const c_char,
    timeout_ms: u64,
    peer_out: *mut *mut kvxfer_peer_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_connect", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("peer_out", peer_out)?;
        let peer = agent.connect(text("address", address)?, timeout("timeout_ms", timeout_ms)?)?;
        out.set(into_raw(PeerObject(peer))?);
        Ok(KVXFER_OK)
    })
}

/// The connected peer of that name, whichever side opened the connection; `KVXFER_NOT_FOUND` when there is
/// none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_agent_peer(
    agent: *const kvxfer_agent_t,
    name: *const c_char,
    peer_out: *mut *mut kvxfer_peer_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_agent_peer", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("peer_out", peer_out)?;
        let name = text("name", name)?;
        let peer = agent
            .peer(name)
            .ok_or_else(|| Error::NotFound { what: "connected peer", name: name.to_owned() })?;
        out.set(into_raw(PeerObject(peer))?);
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; the connection stays (see `kvxfer_peer_disconnect`). NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_free(peer: *mut kvxfer_peer_t) -> kvxfer_result_t {
    guard("kvxfer_peer_free", || take::<PeerObject>("peer", peer).map(|_| KVXFER_OK))
}

/// Removes the peer: the connection is closed and transfers under way end with `KVXFER_PEER_GONE`. The handle
/// is still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_disconnect(peer: *mut kvxfer_peer_t) -> kvxfer_result_t {
    guard("kvxfer_peer_disconnect", || {
        self::peer(peer)?.disconnect();
        Ok(KVXFER_OK)
    })
}

/// The peer's name. The buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_name(
    peer: *const kvxfer_peer_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_name", || unsafe {
        let peer = self::peer(peer)?;
        Buffer::new("buffer", buffer.cast(), capacity, length_out)?.set_text(peer.name().as_str())
    })
}

/// The peer's epoch; another one means another process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_epoch(
    peer: *const kvxfer_peer_t,
    epoch_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_epoch", || unsafe {
        let peer = self::peer(peer)?;
        Out::new("epoch_out", epoch_out)?.set(peer.epoch().0);
        Ok(KVXFER_OK)
    })
}

/// `*state_out` becomes `KVXFER_OK` while the peer is connected, and the reason once it is gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_state(
    peer: *const kvxfer_peer_t,
    state_out: *mut kvxfer_result_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_state", || unsafe {
        let peer = self::peer(peer)?;
        Out::new("state_out", state_out)?.set(match peer.state() {
            PeerState::Up => KVXFER_OK,
            PeerState::Gone(code) => number(code),
        });
        Ok(KVXFER_OK)
    })
}

/// Transports connected to the peer, best first, one a line: name, tab, description (address, streams,
/// protocol underneath). The buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_paths(
    peer: *const kvxfer_peer_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_paths", || unsafe {
        let peer = self::peer(peer)?;
        let buffer = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        let lines: Vec<_> = peer.paths().iter().map(|(kind, what)| format!("{kind}\t{what}")).collect();
        buffer.set_text(&lines.join("\n"))
    })
}

/// What has been exchanged with a peer over one transport, or over all, since the connection came up. Set
/// `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_path_stats_t {
    /// `sizeof(kvxfer_path_stats_t)`, set by the caller.
    pub struct_size: usize,
    /// Bytes moved to the peer.
    pub write_bytes: u64,
    /// Transfers to the peer that ended, failed ones included.
    pub write_transfers: u64,
    /// Those that failed.
    pub write_failed: u64,
    /// Sum of their durations, nanoseconds; those that overlapped count twice.
    pub write_busy_ns: u64,
    /// Bytes moved from the peer.
    pub read_bytes: u64,
    /// Transfers from the peer that ended, failed ones included.
    pub read_transfers: u64,
    /// Those that failed.
    pub read_failed: u64,
    /// Sum of their durations, nanoseconds.
    pub read_busy_ns: u64,
    /// Transfers under way, over any transport.
    pub in_flight: u64,
}
versioned! { kvxfer_path_stats_t, 80; }

/// What this agent has moved to and from the peer: over one transport (`KVXFER_TRANSPORT_...`;
/// `KVXFER_NOT_FOUND` when it is not connected), or over all of them with `KVXFER_TRANSPORT_ANY`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_stats(
    peer: *const kvxfer_peer_t,
    transport: u32,
    stats_out: *mut kvxfer_path_stats_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_stats", || unsafe {
        let peer = self::peer(peer)?;
        let out = OutStruct::new("stats_out", stats_out)?;
        let wanted = super::transfer::transport("transport", transport)?;
        let all = peer.stats();
        let paths: Vec<_> =
            all.paths.iter().filter(|path| wanted.is_none_or(|kind| kind == path.transport)).collect();
        if let (Some(kind), true) = (wanted, paths.is_empty()) {
            return Err(Error::NotFound { what: "connected transport", name: kind.to_string() });
        }
        let sum = |field: fn(&PathStats) -> u64| paths.iter().map(|path| field(path)).sum();
        out.set(&kvxfer_path_stats_t {
            struct_size: 0,
            write_bytes: sum(|p| p.write.bytes),
            write_transfers: sum(|p| p.write.transfers),
            write_failed: sum(|p| p.write.failed),
            write_busy_ns: sum(|p| p.write.busy.as_nanos() as u64),
            read_bytes: sum(|p| p.read.bytes),
            read_transfers: sum(|p| p.read.transfers),
            read_failed: sum(|p| p.read.failed),
            read_busy_ns: sum(|p| p.read.busy.as_nanos() as u64),
            in_flight: all.in_flight,
        });
        Ok(KVXFER_OK)
    })
}

/// Sends a notification without data, at most `KVXFER_MAX_NOTIFICATION` bytes. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_notify(
    peer: *mut kvxfer_peer_t,
    payload: *const c_void,
    length: usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_notify", || unsafe {
        let peer = self::peer(peer)?;
        peer.notify(list("payload", payload.cast::<u8>(), length)?)?;
        Ok(KVXFER_OK)
    })
}

/// Looks up a region the peer exports; `KVXFER_NOT_FOUND` when there is none of that name. Free it with
/// `kvxfer_remote_region_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_peer_region(
    peer: *mut kvxfer_peer_t,
    name: *const c_char,
    timeout_ms: u64,
    remote_region_out: *mut *mut kvxfer_remote_region_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_peer_region", || unsafe {
        let peer = self::peer(peer)?;
        let out = Out::new("remote_region_out", remote_region_out)?;
        let region = peer.region(text("name", name)?, timeout("timeout_ms", timeout_ms)?)?;
        out.set(into_raw(RemoteRegionObject(region))?);
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; transfers under way keep what they need. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_remote_region_free(
    remote_region: *mut kvxfer_remote_region_t,
) -> kvxfer_result_t {
    guard("kvxfer_remote_region_free", || {
        take::<RemoteRegionObject>("remote_region", remote_region).map(|_| KVXFER_OK)
    })
}

/// Length of the remote region in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_remote_region_length(
    remote_region: *const kvxfer_remote_region_t,
    length_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_remote_region_length", || unsafe {
        let region = borrow::<RemoteRegionObject>("remote_region", remote_region)?;
        Out::new("length_out", length_out)?.set(region.0.len());
        Ok(KVXFER_OK)
    })
}

/// Names of the transports that reach the remote region, best first, one a line. The buffer is used as in
/// `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_remote_region_transports(
    remote_region: *const kvxfer_remote_region_t,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_remote_region_transports", || unsafe {
        let region = borrow::<RemoteRegionObject>("remote_region", remote_region)?;
        let buffer = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        let names: Vec<_> = region.0.transports().iter().map(|kind| kind.as_str()).collect();
        buffer.set_text(&names.join("\n"))
    })
}
