//! The prefiller's whole side: requests in steps, to any number of receivers, with word to the proxy.

use super::agent::kvxfer_agent_t;
use super::args::{
    Out, OutStruct, fixed, flag, invalid, list, list_mut, optional_text, optional_timeout, read_struct, text,
    timeout, versioned,
};
use super::fence::{fence, kvxfer_fence_t};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::result::{KVXFER_OK, code, kvxfer_result_t, number};
use super::sender::{kvxfer_chunk_source_t, kvxfer_sender_config_t, sender_config, source};
use kvxfer_core::channel::{Batch, Outbox, OutboxConfig, OutboxEvent};
use kvxfer_core::proto::wire::ChunkSpec;
use kvxfer_core::{Agent, ChunkKey, Error, ErrorCode, RequestId, Result};
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Duration;

/// Sends requests to receivers that it connects to by itself. Usable from any thread.
pub struct kvxfer_outbox_t {
    _opaque: [u8; 0],
}

/// Nothing reads the batch's bytes any more.
pub const KVXFER_OUTBOX_RELEASED: u32 = 1;
/// A request has ended.
pub const KVXFER_OUTBOX_ENDED: u32 = 2;

/// Settings of an outbox.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_outbox_config_t {
    /// `sizeof(kvxfer_outbox_config_t)`.
    pub struct_size: usize,
    /// Pool, geometry, integrity and request time-out towards every receiver; needed.
    pub sender: *const kvxfer_sender_config_t,
    /// Notification socket of the proxy, `tcp://host:port`; NULL: nobody is told. One that is not kvxfer's hears
    /// of successes only, in `LMCache`'s words.
    pub proxy: *const c_char,
    /// How long a receiver that cannot be reached is waited for, milliseconds; 0: 10 seconds.
    pub patience_ms: u64,
}
versioned! { kvxfer_outbox_config_t, 32; }

/// Part of a request. Its bytes must stay as they are until the batch is released.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_batch_t {
    /// `sizeof(kvxfer_batch_t)`.
    pub struct_size: usize,
    /// The request, as the proxy knows it.
    pub request: *const c_char,
    /// Where its chunks go, `tcp://host:port`.
    pub receiver: *const c_char,
    /// The chunks; a NULL region: in the place that `kvxfer_outbox_place` gave, and one run `{0, length}`.
    pub chunks: *const kvxfer_chunk_source_t,
    /// Number of chunks; 0 is possible in the last batch.
    pub count: usize,
    /// Chunks of the whole request, in the first batch: pages for all of them are asked for at once. 0: only these.
    pub total: u32,
    /// 1 in the first batch of a request: an earlier request of that name is over.
    pub first: u32,
    /// 1 in the last batch.
    pub last: u32,
    /// Zero.
    pub reserved: u32,
    /// The chunks' bytes are complete at this point of a CUDA stream; NULL: now.
    pub after: *const kvxfer_fence_t,
}
versioned! { kvxfer_batch_t, 56; }

/// Where a chunk's bytes are to be produced; see `kvxfer_outbox_place`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_place_t {
    /// First byte of its page, in this process or on the device; NULL: it has no place here.
    pub address: *mut c_void,
    /// Its bytes.
    pub length: u64,
}

/// What happened. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_outbox_event_t {
    /// `sizeof(kvxfer_outbox_event_t)`, set by the caller.
    pub struct_size: usize,
    /// `KVXFER_OUTBOX_...`.
    pub kind: u32,
    /// Of a request: `KVXFER_OK` when every chunk is published, or why it failed.
    pub result: kvxfer_result_t,
    /// Of a release: number of the batch.
    pub batch: u64,
    /// Bytes that crossed; chunks that were there already do not.
    pub bytes: u64,
    /// Wait for admission, nanoseconds.
    pub queued_ns: u64,
    /// From admission to the end, nanoseconds.
    pub moved_ns: u64,
    /// From the first batch to the end, nanoseconds.
    pub took_ns: u64,
    /// From the last batch to the end, nanoseconds; 0 where the last one had not come.
    pub after_last_ns: u64,
    /// Chunks written.
    pub written: u32,
    /// Chunks that were there already.
    pub present: u32,
    /// `KVXFER_TRANSPORT_...`: what carried the bytes.
    pub transport: u32,
    /// Events that waited after this one: while there are any, the next call takes one at once.
    pub more: u32,
    /// The request's id, NUL-terminated.
    pub request: [c_char; 264],
    /// A failure in words, NUL-terminated, cut when longer.
    pub text: [c_char; 512],
}
versioned! { kvxfer_outbox_event_t, 856; }

/// What an outbox's handle stands for.
struct OutboxObject {
    outbox: Outbox,
    agent: Agent,
}
object!(OutboxObject, kvxfer_outbox_t, OUTBOX);

fn outbox(outbox: *const kvxfer_outbox_t) -> Result<Arc<OutboxObject>> {
    borrow("outbox", outbox)
}

/// Makes an outbox on an agent. Nothing is connected before the first batch. Free it with `kvxfer_outbox_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_new(
    agent: *mut kvxfer_agent_t,
    config: *const kvxfer_outbox_config_t,
    outbox_out: *mut *mut kvxfer_outbox_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_new", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("outbox_out", outbox_out)?;
        let c = read_struct("config", config)?;
        let config = OutboxConfig {
            sender: sender_config("config.sender", c.sender)?,
            patience: optional_timeout("config.patience_ms", c.patience_ms)?
                .unwrap_or(Duration::from_secs(10)),
            proxy: optional_text("config.proxy", c.proxy)?.map(str::to_owned),
        };
        let outbox = Outbox::new(&agent, config)?;
        out.set(into_raw(OutboxObject { outbox, agent })?);
        Ok(KVXFER_OK)
    })
}

/// Takes a batch; never waits for anything. `batch_out` gets its number, which its release will name; 0 when nothing of it is
/// read, because its bytes are all in their places, and then no release follows. What is wrong with the batch itself is the
/// answer, and then nothing was taken; what happens to its request is an event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_put(
    outbox: *mut kvxfer_outbox_t,
    batch: *const kvxfer_batch_t,
    batch_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_put", || unsafe {
        let object = self::outbox(outbox)?;
        let out = Out::new("batch_out", batch_out)?;
        let batch = self::batch(&object.agent, batch)?;
        out.set(object.outbox.put(batch)?.unwrap_or(0));
        Ok(KVXFER_OK)
    })
}

/// What a caller's batch comes to.
unsafe fn batch(agent: &Agent, batch: *const kvxfer_batch_t) -> Result<Batch> {
    // SAFETY: pointer arguments are as the header asks.
    unsafe {
        let b = read_struct("batch", batch)?;
        if b.reserved != 0 {
            return Err(invalid("batch.reserved", format!("is {}, must be 0", b.reserved)));
        }
        let after = fence("batch.after", b.after)?;
        let chunks = list("batch.chunks", b.chunks, b.count)?
            .iter()
            .map(|c| {
                let (source, len) = if c.region.is_null() {
                    (None, length(c)?)
                } else {
                    let (source, len) = source(agent, "chunks.region", c.region, c.runs, c.run_count)?;
                    (Some(source), len)
                };
                Ok((ChunkSpec { key: ChunkKey::new(text("chunks.key", c.key)?)?, len }, source))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Batch {
            request: RequestId::new(text("batch.request", b.request)?)?,
            receiver: text("batch.receiver", b.receiver)?.to_owned(),
            first: flag("batch.first", b.first)?,
            total: b.total,
            last: flag("batch.last", b.last)?,
            chunks,
            after,
        })
    }
}

/// Bytes of a chunk in a place.
unsafe fn length(c: &kvxfer_chunk_source_t) -> Result<u64> {
    // SAFETY: pointer arguments are as the header asks.
    match unsafe { list("chunks.runs", c.runs, c.run_count) }? {
        [run] if run.offset == 0 && run.length > 0 => Ok(run.length),
        _ => Err(invalid("chunks.runs", "a chunk without a region has one run, {0, length of the chunk}")),
    }
}

/// Asks for the chunks of a batch to be produced where they are to be: names them at the receiver and gives the pages that they got,
/// as addresses of this process, where the receiver's pool is mapped in it (`shm`; `cuda_ipc` for a GPU's). Fill them, then put the
/// same batch, with a NULL `region` for each chunk that was filled there. A chunk whose `address` is NULL, or whose place was not used, is put
/// from a region.
///
/// A chunk in `batch` needs no `region`, and has one run `{0, length}` then; what regions hold and `after` are not looked at. `device` is -1 for host memory, or
/// the CUDA device whose memory is wanted. `places` has room for `batch.count`. Waits for admission at most `patience_ms`; whatever
/// prevents places gives NULLs, loses nothing, and is no error. Addresses are the caller's until the batch is put or given up with
/// `kvxfer_outbox_give_up`, also when the request fails meanwhile; afterwards nothing may be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_place(
    outbox: *mut kvxfer_outbox_t,
    batch: *const kvxfer_batch_t,
    device: i32,
    patience_ms: u64,
    places: *mut kvxfer_place_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_place", || unsafe {
        let object = self::outbox(outbox)?;
        let batch = self::batch(&object.agent, batch)?;
        let out = list_mut("places", places, batch.chunks.len())?;
        let patience = timeout("patience_ms", patience_ms)?;
        let device = (device >= 0).then_some(device);
        let given = object.outbox.place(&batch, device, patience)?;
        for (slot, place) in out.iter_mut().zip(&given) {
            let (address, length) =
                place.as_ref().map_or((std::ptr::null_mut(), 0), |p| (p.as_ptr().cast(), p.len));
            *slot = kvxfer_place_t { address, length };
        }
        Ok(KVXFER_OK)
    })
}

/// Puts the batch for which `kvxfer_outbox_place` has given places, each of its chunks one, and which is as it was named: all of its
/// bytes are there, or will be when a CUDA stream has passed `after`; NULL: they are. Never waits; no release follows.
/// `KVXFER_NOT_FOUND` when the request has no places; `KVXFER_INVALID_ARGUMENT` when one of its chunks has none, and then
/// the request is given up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_put_placed(
    outbox: *mut kvxfer_outbox_t,
    request: *const c_char,
    after: *const kvxfer_fence_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_put_placed", || unsafe {
        let object = self::outbox(outbox)?;
        let request = RequestId::new(text("request", request)?)?;
        object.outbox.put_placed(&request, fence("after", after)?)?;
        Ok(KVXFER_OK)
    })
}

/// Gives up the places of a batch that is not put after all, and its request: once a CUDA stream that may still write there has passed
/// `after`; NULL: nobody does. `KVXFER_NOT_FOUND` when the request has none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_give_up(
    outbox: *mut kvxfer_outbox_t,
    request: *const c_char,
    after: *const kvxfer_fence_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_give_up", || unsafe {
        let object = self::outbox(outbox)?;
        let request = RequestId::new(text("request", request)?)?;
        if object.outbox.give_up(&request, fence("after", after)?.as_ref()) {
            Ok(KVXFER_OK)
        } else {
            Err(Error::NotFound { what: "request with places", name: request.to_string() })
        }
    })
}

/// Gives a request up for the reason `why` (`KVXFER_CANCELLED`, usually); `KVXFER_NOT_FOUND` when none of that
/// name is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_abort(
    outbox: *mut kvxfer_outbox_t,
    request: *const c_char,
    why: kvxfer_result_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_abort", || unsafe {
        let object = self::outbox(outbox)?;
        let request = RequestId::new(text("request", request)?)?;
        let why = match code(why) {
            ErrorCode::Ok => {
                return Err(invalid("why", "is KVXFER_OK; state a reason, KVXFER_CANCELLED usually"));
            }
            why => why,
        };
        if object.outbox.abort(&request, why) {
            Ok(KVXFER_OK)
        } else {
            Err(Error::NotFound { what: "request", name: request.to_string() })
        }
    })
}

/// Gives up the youngest request that its receiver has not admitted yet, to have the memory of its batches back:
/// for an engine that has none left for the next step of another one. `KVXFER_NOT_FOUND` when all are admitted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_shed(outbox: *mut kvxfer_outbox_t) -> kvxfer_result_t {
    guard("kvxfer_outbox_shed", || match self::outbox(outbox)?.outbox.shed() {
        Some(_) => Ok(KVXFER_OK),
        None => Err(Error::NotFound { what: "request", name: "that waits for admission".into() }),
    })
}

/// Takes the next event; `KVXFER_TIMED_OUT` when none came in `timeout_ms`. Of several threads that wait here the one that came
/// last is woken first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_next_event(
    outbox: *mut kvxfer_outbox_t,
    timeout_ms: u64,
    event_out: *mut kvxfer_outbox_event_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_next_event", || unsafe {
        let object = self::outbox(outbox)?;
        let out = OutStruct::new("event_out", event_out)?;
        let after = timeout("timeout_ms", timeout_ms)?;
        tell(&object, object.outbox.next_event(after), after, out)
    })
}

/// The next event for a thread that has nothing to do but wait for it: it looks after the receivers' answers itself, for at most
/// `max_us` microseconds, which spares the time until other threads have been woken for them. `KVXFER_TIMED_OUT` when there is
/// none yet. No other thread is woken for events that come meanwhile: take them with `kvxfer_outbox_next_event` until there are none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_attend(
    outbox: *mut kvxfer_outbox_t,
    max_us: u64,
    event_out: *mut kvxfer_outbox_event_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_outbox_attend", || unsafe {
        let object = self::outbox(outbox)?;
        let out = OutStruct::new("event_out", event_out)?;
        let after = timeout("max_us / 1000", max_us / 1000).map(|_| Duration::from_micros(max_us))?;
        tell(&object, object.outbox.attend(after), after, out)
    })
}

/// An event into the caller's struct.
fn tell(
    object: &OutboxObject,
    event: Option<OutboxEvent>,
    after: Duration,
    out: OutStruct<kvxfer_outbox_event_t>,
) -> Result<kvxfer_result_t> {
    let Some(event) = event else {
        return Err(Error::TimedOut { operation: "an event of the outbox".into(), after });
    };
    let mut event = event_of(&event);
    event.more = u32::try_from(object.outbox.waiting_events()).unwrap_or(u32::MAX);
    out.set(&event);
    Ok(KVXFER_OK)
}

fn event_of(event: &OutboxEvent) -> kvxfer_outbox_event_t {
    let mut e = kvxfer_outbox_event_t {
        struct_size: 0,
        kind: KVXFER_OUTBOX_RELEASED,
        result: KVXFER_OK,
        batch: 0,
        bytes: 0,
        queued_ns: 0,
        moved_ns: 0,
        took_ns: 0,
        after_last_ns: 0,
        written: 0,
        present: 0,
        transport: 0,
        more: 0,
        request: fixed(""),
        text: fixed(""),
    };
    match event {
        OutboxEvent::Released { batch } => e.batch = *batch,
        OutboxEvent::Ended { request, result, took, after_last } => {
            e.kind = KVXFER_OUTBOX_ENDED;
            e.request = fixed(request.as_str());
            (e.took_ns, e.after_last_ns) = (took.as_nanos() as u64, after_last.as_nanos() as u64);
            match result {
                Ok(r) => {
                    (e.bytes, e.written, e.present) = (r.bytes, r.written, r.present);
                    (e.queued_ns, e.moved_ns) = (r.queued.as_nanos() as u64, r.moved.as_nanos() as u64);
                    e.transport = r.transport as u32;
                }
                Err(failure) => {
                    e.result = number(failure.code());
                    e.text = fixed(&failure.to_string());
                }
            }
        }
    }
    e
}

/// Gives everything up and waits until no batch's bytes are read any more and the proxy has been told, at most
/// `timeout_ms`. Events that are left can still be taken.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_close(
    outbox: *mut kvxfer_outbox_t,
    timeout_ms: u64,
) -> kvxfer_result_t {
    guard("kvxfer_outbox_close", || {
        self::outbox(outbox)?.outbox.close(timeout("timeout_ms", timeout_ms)?)?;
        Ok(KVXFER_OK)
    })
}

/// Gives up what is under way and frees the handle. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_outbox_free(outbox: *mut kvxfer_outbox_t) -> kvxfer_result_t {
    guard("kvxfer_outbox_free", || take::<OutboxObject>("outbox", outbox).map(|_| KVXFER_OK))
}
