//! The prefiller's side: reserve, write, commit.

use super::agent::kvxfer_agent_t;
use super::args::{
    Out, flag, invalid, list, optional_text, optional_timeout, read_struct, text, timeout, versioned,
};
use super::config::integrity;
use super::delivery::{DeliveryObject, kvxfer_delivery_t};
use super::fence::{fence, kvxfer_fence_t};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::peer::{PeerObject, kvxfer_peer_t};
use super::receiver::{geometry, kvxfer_geometry_t};
use super::region::{kvxfer_region_t, region_of};
use super::result::{KVXFER_OK, code, kvxfer_result_t};
use kvxfer_core::channel::{ChunkSource, Reservation};
use kvxfer_core::proto::wire::ChunkSpec;
use kvxfer_core::{Agent, ChunkKey, Error, ErrorCode, RequestId, Result, Sender, SenderConfig};
use parking_lot::RwLock;
use std::ffi::c_char;
use std::sync::Arc;

/// A channel to one receiver's pool; reconnects by itself when the receiver was restarted. Usable from any
/// thread.
pub struct kvxfer_sender_t {
    _opaque: [u8; 0],
}

/// A request under way: declared, then admitted, then written chunk by chunk.
pub struct kvxfer_reservation_t {
    _opaque: [u8; 0],
}

/// Settings of a sender. Zero or NULL in a field means its default, where there is one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_sender_config_t {
    /// `sizeof(kvxfer_sender_config_t)`.
    pub struct_size: usize,
    /// The receiver's pool; default `kv`.
    pub pool: *const c_char,
    /// Must equal the receiver's; needed.
    pub geometry: *const kvxfer_geometry_t,
    /// Deadline of a request that states none, admission included, milliseconds.
    pub request_timeout_ms: u64,
    /// `KVXFER_INTEGRITY_...`.
    pub integrity: u32,
    /// Zero.
    pub reserved: u32,
}
versioned! { kvxfer_sender_config_t, 40; }

/// One chunk of a request.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_chunk_spec_t {
    /// Content key, made by the engine; equal keys mean equal bytes.
    pub key: *const c_char,
    /// Valid bytes; at most a page.
    pub length: u64,
}

/// A run of bytes of a region.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_run_t {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// Length, bytes; not zero.
    pub length: u64,
}

/// One chunk of a request with the place of its bytes: runs of a region, concatenated. Their sum is the
/// chunk's length.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_chunk_source_t {
    /// Content key.
    pub key: *const c_char,
    /// The region.
    pub region: *const kvxfer_region_t,
    /// The runs, in the order of the chunk's bytes.
    pub runs: *const kvxfer_run_t,
    /// Number of runs.
    pub run_count: usize,
}

/// What a sender's handle stands for.
pub(super) struct SenderObject {
    pub(super) sender: Sender,
    pub(super) agent: Agent,
}
object!(SenderObject, kvxfer_sender_t, SENDER);

/// What a reservation's handle stands for: empty once finished or aborted. Read-locked by calls on it, so
/// several may run at once.
struct ReservationObject {
    inner: RwLock<Option<Reservation>>,
    agent: Agent,
}
object!(ReservationObject, kvxfer_reservation_t, RESERVATION);

impl ReservationObject {
    fn with<R>(&self, call: impl FnOnce(&Reservation) -> Result<R>) -> Result<R> {
        call(self.inner.read().as_ref().ok_or_else(ended)?)
    }
}

impl Drop for ReservationObject {
    fn drop(&mut self) {
        if let Some(reservation) = self.inner.get_mut().take() {
            reservation.abort(ErrorCode::Cancelled);
        }
    }
}

fn ended() -> Error {
    Error::failed(ErrorCode::Closed, "the reservation was finished or aborted already")
}

pub(super) fn sender(sender: *const kvxfer_sender_t) -> Result<Arc<SenderObject>> {
    borrow("sender", sender)
}

fn reservation(reservation: *const kvxfer_reservation_t) -> Result<Arc<ReservationObject>> {
    borrow("reservation", reservation)
}

/// A chunk's bytes as runs of a region, checked, with their sum.
pub(super) unsafe fn source(
    agent: &Agent,
    argument: &'static str,
    handle: *const kvxfer_region_t,
    runs: *const kvxfer_run_t,
    count: usize,
) -> Result<(ChunkSource, u64)> {
    let region = region_of(agent, argument, handle)?;
    // SAFETY: pointer arguments are as the header asks.
    let runs = unsafe { list("runs", runs, count) }?;
    let mut sum = 0_u64;
    for (i, run) in runs.iter().enumerate() {
        if run.offset.checked_add(run.length).is_none_or(|end| end > region.len()) {
            let (what, offset, len) = (format!("run {i} of the source region"), run.offset, run.length);
            return Err(Error::OutOfRange { what, offset, len, limit: region.len() });
        }
        sum = sum.saturating_add(run.length);
    }
    if sum == 0 {
        return Err(invalid("runs", format!("{count} runs with no byte: a chunk has at least one")));
    }
    let runs = runs.iter().map(|run| (run.offset, run.length)).collect();
    Ok((ChunkSource::new(region, runs), sum))
}

/// What a sender's settings come to.
pub(super) unsafe fn sender_config(
    argument: &'static str,
    config: *const kvxfer_sender_config_t,
) -> Result<SenderConfig> {
    // SAFETY: pointer arguments are as the header asks.
    unsafe {
        let c = read_struct(argument, config)?;
        if c.reserved != 0 {
            return Err(invalid("config.reserved", format!("is {}, must be 0", c.reserved)));
        }
        let mut config = SenderConfig {
            geometry: geometry("config.geometry", c.geometry)?,
            integrity: integrity("config.integrity", c.integrity)?,
            ..SenderConfig::default()
        };
        if let Some(pool) = optional_text("config.pool", c.pool)? {
            pool.clone_into(&mut config.pool);
        }
        if let Some(t) = optional_timeout("config.request_timeout_ms", c.request_timeout_ms)? {
            config.request_timeout = t;
        }
        Ok(config)
    }
}

/// Connects to the receiver's agent, `tcp://host:port` or `unix:///path`, attaches to its pool and compares
/// geometries (`KVXFER_MISMATCH` names both values). Free it with `kvxfer_sender_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_connect(
    agent: *mut kvxfer_agent_t,
    address: *const c_char,
    config: *const kvxfer_sender_config_t,
    timeout_ms: u64,
    sender_out: *mut *mut kvxfer_sender_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_connect", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("sender_out", sender_out)?;
        let address = text("address", address)?;
        let config = sender_config("config", config)?;
        let sender = Sender::connect(&agent, address, config, timeout("timeout_ms", timeout_ms)?)?;
        out.set(into_raw(SenderObject { sender, agent })?);
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; requests under way go on. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_free(sender: *mut kvxfer_sender_t) -> kvxfer_result_t {
    guard("kvxfer_sender_free", || take::<SenderObject>("sender", sender).map(|_| KVXFER_OK))
}

/// The receiver's agent as a peer; free it with `kvxfer_peer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_peer(
    sender: *const kvxfer_sender_t,
    peer_out: *mut *mut kvxfer_peer_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_peer", || unsafe {
        let sender = self::sender(sender)?;
        let out = Out::new("peer_out", peer_out)?;
        out.set(into_raw(PeerObject(sender.sender.peer()))?);
        Ok(KVXFER_OK)
    })
}

/// Declares a request of which only the first chunks are known, as in a prefill that is cut into steps: pages for
/// up to `more` further ones are granted with them; `kvxfer_reservation_extend` names those. Otherwise as
/// `kvxfer_sender_reserve`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_reserve_more(
    sender: *mut kvxfer_sender_t,
    request: *const c_char,
    chunks: *const kvxfer_chunk_spec_t,
    count: usize,
    more: u32,
    timeout_ms: u64,
    reservation_out: *mut *mut kvxfer_reservation_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_reserve_more", || unsafe {
        let sender = self::sender(sender)?;
        let out = Out::new("reservation_out", reservation_out)?;
        let request = RequestId::new(text("request", request)?)?;
        let (chunks, timeout) = (specs(chunks, count)?, optional_timeout("timeout_ms", timeout_ms)?);
        let reservation = sender.sender.reserve_more(request, chunks, more, timeout)?;
        let (inner, agent) = (RwLock::new(Some(reservation)), sender.agent.clone());
        out.set(into_raw(ReservationObject { inner, agent })?);
        Ok(KVXFER_OK)
    })
}

unsafe fn specs(chunks: *const kvxfer_chunk_spec_t, count: usize) -> Result<Vec<ChunkSpec>> {
    // SAFETY: pointer arguments are as the header asks.
    unsafe { list("chunks", chunks, count) }?
        .iter()
        // SAFETY: as above.
        .map(|c| Ok(ChunkSpec { key: ChunkKey::new(unsafe { text("chunks.key", c.key) }?)?, len: c.length }))
        .collect()
}

/// Declares a request with all its chunks. Returns at once; wait for its pages with
/// `kvxfer_reservation_wait_admitted`. `timeout_ms` is the deadline of the whole request, 0 for the sender's.
/// Free it with `kvxfer_reservation_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_reserve(
    sender: *mut kvxfer_sender_t,
    request: *const c_char,
    chunks: *const kvxfer_chunk_spec_t,
    count: usize,
    timeout_ms: u64,
    reservation_out: *mut *mut kvxfer_reservation_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_reserve", || unsafe {
        let sender = self::sender(sender)?;
        let out = Out::new("reservation_out", reservation_out)?;
        let request = RequestId::new(text("request", request)?)?;
        let chunks = specs(chunks, count)?;
        let reservation =
            sender.sender.reserve(request, chunks, optional_timeout("timeout_ms", timeout_ms)?)?;
        let (inner, agent) = (RwLock::new(Some(reservation)), sender.agent.clone());
        out.set(into_raw(ReservationObject { inner, agent })?);
        Ok(KVXFER_OK)
    })
}

/// Reserves, writes and commits a request in one go. Returns at once: the bytes must stay until the delivery
/// has ended. `timeout_ms` as for `kvxfer_sender_reserve`. Free the delivery with `kvxfer_delivery_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_sender_send(
    sender: *mut kvxfer_sender_t,
    request: *const c_char,
    chunks: *const kvxfer_chunk_source_t,
    count: usize,
    timeout_ms: u64,
    delivery_out: *mut *mut kvxfer_delivery_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_sender_send", || unsafe {
        let sender = self::sender(sender)?;
        let out = Out::new("delivery_out", delivery_out)?;
        let request = RequestId::new(text("request", request)?)?;
        let chunks = list("chunks", chunks, count)?
            .iter()
            .map(|c| {
                let (source, len) = source(&sender.agent, "chunks.region", c.region, c.runs, c.run_count)?;
                Ok((ChunkSpec { key: ChunkKey::new(text("chunks.key", c.key)?)?, len }, source))
            })
            .collect::<Result<Vec<_>>>()?;
        let delivery = sender.sender.send(request, chunks, optional_timeout("timeout_ms", timeout_ms)?)?;
        out.set(into_raw(DeliveryObject(delivery))?);
        Ok(KVXFER_OK)
    })
}

/// Waits until the request is admitted: all its pages at once. A refusal is the answer (`KVXFER_TOO_LARGE`,
/// `KVXFER_NO_CAPACITY`, ...); `KVXFER_TIMED_OUT` when `timeout_ms` passes first: the request then goes on
/// waiting until its own deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_wait_admitted(
    reservation: *const kvxfer_reservation_t,
    timeout_ms: u64,
) -> kvxfer_result_t {
    guard("kvxfer_reservation_wait_admitted", || {
        let reservation = self::reservation(reservation)?;
        let timeout = timeout("timeout_ms", timeout_ms)?;
        reservation.with(|r| r.wait_admitted(timeout))?;
        Ok(KVXFER_OK)
    })
}

/// Names further chunks of a request, at most as many as `kvxfer_sender_reserve_more` announced; `last`, 0 or 1,
/// says that none will follow and gives pages that were kept for more back (`count` may be 0 then).
/// `first_out` gets the index of the first, for `kvxfer_reservation_write`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_extend(
    reservation: *mut kvxfer_reservation_t,
    chunks: *const kvxfer_chunk_spec_t,
    count: usize,
    last: u32,
    first_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_reservation_extend", || unsafe {
        let reservation = self::reservation(reservation)?;
        let out = Out::new("first_out", first_out)?;
        let (chunks, last) = (specs(chunks, count)?, flag("last", last)?);
        out.set(reservation.with(|r| r.extend(chunks, last))?);
        Ok(KVXFER_OK)
    })
}

/// Writes and commits chunk number `index` from runs of `region`, whose sum is the chunk's declared length.
/// Returns at once: the bytes must stay until the delivery has ended. Call it as soon as the chunk's bytes are
/// final, while the prefill goes on; a chunk that the receiver has already costs nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_write(
    reservation: *mut kvxfer_reservation_t,
    index: usize,
    region: *const kvxfer_region_t,
    runs: *const kvxfer_run_t,
    run_count: usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_reservation_write", || unsafe {
        let reservation = self::reservation(reservation)?;
        let (source, _) = source(&reservation.agent, "region", region, runs, run_count)?;
        reservation.with(|r| r.write(index, source))?;
        Ok(KVXFER_OK)
    })
}

/// The same, for bytes that a CUDA stream is still producing: they are read once `after` has been passed. NULL: at once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_write_after(
    reservation: *mut kvxfer_reservation_t,
    index: usize,
    region: *const kvxfer_region_t,
    runs: *const kvxfer_run_t,
    run_count: usize,
    after: *const kvxfer_fence_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_reservation_write_after", || unsafe {
        let reservation = self::reservation(reservation)?;
        let (mut source, _) = source(&reservation.agent, "region", region, runs, run_count)?;
        source.after = fence("after", after)?;
        reservation.with(|r| r.write(index, source))?;
        Ok(KVXFER_OK)
    })
}

/// States that every chunk has been given to `kvxfer_reservation_write`; the rest can be waited for with the
/// delivery (free it with `kvxfer_delivery_free`). Further calls on the reservation answer `KVXFER_CLOSED`; it
/// is still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_finish(
    reservation: *mut kvxfer_reservation_t,
    delivery_out: *mut *mut kvxfer_delivery_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_reservation_finish", || unsafe {
        let reservation = self::reservation(reservation)?;
        let out = Out::new("delivery_out", delivery_out)?;
        let inner = reservation.inner.write().take().ok_or_else(ended)?;
        out.set(into_raw(DeliveryObject(inner.finish()))?);
        Ok(KVXFER_OK)
    })
}

/// Gives the request up for the reason `why` (`KVXFER_CANCELLED`, usually). Its pages are used again once no
/// write can land. Further calls on the reservation answer `KVXFER_CLOSED`; it is still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_abort(
    reservation: *mut kvxfer_reservation_t,
    why: kvxfer_result_t,
) -> kvxfer_result_t {
    guard("kvxfer_reservation_abort", || {
        let reservation = self::reservation(reservation)?;
        let why = match code(why) {
            ErrorCode::Ok => {
                return Err(invalid("why", "is KVXFER_OK; state a reason, KVXFER_CANCELLED usually"));
            }
            why => why,
        };
        let inner = reservation.inner.write().take().ok_or_else(ended)?;
        inner.abort(why);
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; a reservation neither finished nor aborted is aborted. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_reservation_free(reservation: *mut kvxfer_reservation_t) -> kvxfer_result_t {
    guard("kvxfer_reservation_free", || {
        take::<ReservationObject>("reservation", reservation).map(|_| KVXFER_OK)
    })
}
