//! The decoder's side: a pool of pages that senders fill and the engine reads.

use super::agent::kvxfer_agent_t;
use super::args::{
    Out, OutStruct, fixed, list_mut, optional_text, optional_timeout, read_struct, text, timeout, versioned,
};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::region::{foreign, still_used};
use super::result::{KVXFER_OK, kvxfer_result_t, number};
use kvxfer_core::channel::{Chunk, Lookup, ReceiverEvent};
use kvxfer_core::{
    ChunkKey, Error, ErrorCode, Geometry, Memory, Receiver, ReceiverConfig, RequestId, Result,
};
use parking_lot::Mutex;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Weak};

/// A pool of pages open to senders. Usable from any thread.
pub struct kvxfer_receiver_t {
    _opaque: [u8; 0],
}

/// A published chunk, pinned: its bytes stay as they are until the handle is freed.
pub struct kvxfer_chunk_t {
    _opaque: [u8; 0],
}

/// Nothing is known of the key.
pub const KVXFER_LOOKUP_ABSENT: u32 = 0;
/// The chunk is on its way.
pub const KVXFER_LOOKUP_PENDING: u32 = 1;
/// The chunk is published: complete and checked.
pub const KVXFER_LOOKUP_PRESENT: u32 = 2;

/// Every chunk of the request is published.
pub const KVXFER_EVENT_READY: u32 = 1;
/// The request ended otherwise.
pub const KVXFER_EVENT_FAILED: u32 = 2;

/// What the two sides of a pool must agree on; compared field by field when a sender connects. Zero or NULL
/// means "not stated" and is compared like any other value.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_geometry_t {
    /// `sizeof(kvxfer_geometry_t)`.
    pub struct_size: usize,
    /// Fingerprint or name of the model.
    pub model: *const c_char,
    /// Element type, e.g. `bfloat16`.
    pub dtype: *const c_char,
    /// Layout of a chunk, e.g. `KV_2LTD`.
    pub layout: *const c_char,
    /// What the engine's content hashes depend on beside the content (Python: `PYTHONHASHSEED`).
    pub hash_seed: *const c_char,
    /// Bytes of one page: a full chunk's keys and values of this rank. Not zero.
    pub page_bytes: u64,
    /// Tokens of a full chunk.
    pub chunk_tokens: u32,
    /// Transformer layers held by this rank.
    pub layers: u32,
    /// KV heads held by this rank.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Tensor-parallel size.
    pub tp_size: u32,
}

/// Settings of a pool. Zero or NULL in a field means its default, where there is one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_receiver_config_t {
    /// `sizeof(kvxfer_receiver_config_t)`.
    pub struct_size: usize,
    /// Name senders attach to; default `kv`.
    pub pool: *const c_char,
    /// What the pages hold; needed.
    pub geometry: *const kvxfer_geometry_t,
    /// Number of pages; needed.
    pub pages: u32,
    /// Longest queue of requests that wait for pages.
    pub max_queue: u32,
    /// A sender that neither commits nor renews for this long loses its lease, milliseconds.
    pub lease_ms: u64,
    /// A request not admitted for this long is refused, milliseconds.
    pub admission_timeout_ms: u64,
    /// A published chunk nobody has acquired is dropped after this long, milliseconds.
    pub retention_ms: u64,
    /// Memory of the caller's own for the pages, the host's or a GPU's; NULL: host memory allocated by kvxfer, which peers on the same
    /// host reach fastest. It must stay until `kvxfer_receiver_free` has answered `KVXFER_OK`.
    pub memory: *mut c_void,
    /// Length of `memory`, at least `pages * page_bytes`.
    pub memory_length: u64,
}

/// What happened to a request. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_receiver_event_t {
    /// `sizeof(kvxfer_receiver_event_t)`, set by the caller.
    pub struct_size: usize,
    /// `KVXFER_EVENT_...`.
    pub kind: u32,
    /// `KVXFER_OK`, or why the request failed.
    pub result: kvxfer_result_t,
    /// Name of the sender's agent, NUL-terminated.
    pub sender: [c_char; 136],
    /// The request's id, NUL-terminated.
    pub request: [c_char; 264],
    /// The failure in words, NUL-terminated, cut when longer.
    pub text: [c_char; 512],
}

/// Pages by state, and the queue. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_pool_stats_t {
    /// `sizeof(kvxfer_pool_stats_t)`, set by the caller.
    pub struct_size: usize,
    /// All pages.
    pub pages: u32,
    /// Free pages.
    pub free_pages: u32,
    /// Granted and being written.
    pub writing: u32,
    /// Published.
    pub published: u32,
    /// Published and pinned.
    pub pinned: u32,
    /// Waiting until no write can land any more.
    pub quarantined: u32,
    /// Requests waiting for pages.
    pub queued: u32,
    /// Requests admitted and not ended.
    pub active: u32,
    /// In the hands of senders, for requests to come; they return them when others wait.
    pub advanced: u32,
    /// Pages a new request could have: free ones, and published ones whose consumers have come and gone.
    pub available: u32,
}
versioned! {
    kvxfer_geometry_t, 72;
    kvxfer_receiver_config_t, 72;
    kvxfer_receiver_event_t, 928;
    kvxfer_pool_stats_t, 40;
}

/// What a receiver's handle stands for.
struct ReceiverObject {
    /// Empty once the handle is being freed.
    receiver: Mutex<Option<Receiver>>,
    /// Set for the caller's memory.
    foreign: Option<Weak<Memory>>,
}
object!(ReceiverObject, kvxfer_receiver_t, RECEIVER);

/// What a chunk's handle stands for.
struct ChunkObject {
    chunk: Chunk,
    memory: Arc<Memory>,
}
object!(ChunkObject, kvxfer_chunk_t, CHUNK);

fn receiver(receiver: *const kvxfer_receiver_t) -> Result<Receiver> {
    borrow::<ReceiverObject>("receiver", receiver)?.receiver.lock().clone().ok_or_else(|| {
        Error::failed(
            ErrorCode::Closed,
            "the receiver is being freed: kvxfer_receiver_free answered KVXFER_BUSY",
        )
    })
}

unsafe fn key(key: *const c_char) -> Result<ChunkKey> {
    // SAFETY: pointer arguments are as the header asks.
    Ok(ChunkKey::new(unsafe { text("key", key) }?)?)
}

/// Reads a geometry.
pub(super) unsafe fn geometry(
    argument: &'static str,
    geometry: *const kvxfer_geometry_t,
) -> Result<Geometry> {
    // SAFETY: the struct and its pointers are as the header asks.
    unsafe {
        let g = read_struct(argument, geometry)?;
        let text = |name, t| Ok::<_, Error>(optional_text(name, t)?.unwrap_or_default().to_owned());
        Ok(Geometry {
            model: text("geometry.model", g.model)?,
            dtype: text("geometry.dtype", g.dtype)?,
            layout: text("geometry.layout", g.layout)?,
            page_bytes: g.page_bytes,
            chunk_tokens: g.chunk_tokens,
            layers: g.layers,
            kv_heads: g.kv_heads,
            head_dim: g.head_dim,
            tp_rank: g.tp_rank,
            tp_size: g.tp_size,
            hash_seed: text("geometry.hash_seed", g.hash_seed)?,
        })
    }
}

/// Opens a pool to senders, in memory allocated by kvxfer or in the caller's (`config->memory`). Free it with
/// `kvxfer_receiver_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_new(
    agent: *mut kvxfer_agent_t,
    config: *const kvxfer_receiver_config_t,
    receiver_out: *mut *mut kvxfer_receiver_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_new", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("receiver_out", receiver_out)?;
        let c = read_struct("config", config)?;
        let mut config = ReceiverConfig {
            geometry: geometry("config.geometry", c.geometry)?,
            pages: c.pages,
            ..ReceiverConfig::default()
        };
        if let Some(pool) = optional_text("config.pool", c.pool)? {
            pool.clone_into(&mut config.pool);
        }
        if c.max_queue > 0 {
            config.max_queue = c.max_queue as usize;
        }
        for (argument, ms, field) in [
            ("config.lease_ms", c.lease_ms, &mut config.lease),
            ("config.admission_timeout_ms", c.admission_timeout_ms, &mut config.admission_timeout),
            ("config.retention_ms", c.retention_ms, &mut config.retention),
        ] {
            if let Some(t) = optional_timeout(argument, ms)? {
                *field = t;
            }
        }
        let (receiver, foreign) = if c.memory.is_null() {
            (Receiver::new(&agent, config)?, None)
        } else {
            let memory = foreign(c.memory, c.memory_length)?;
            let weak = Arc::downgrade(&memory);
            (Receiver::with_memory(&agent, config, memory)?, Some(weak))
        };
        out.set(into_raw(ReceiverObject { receiver: Mutex::new(Some(receiver)), foreign })?);
        Ok(KVXFER_OK)
    })
}

/// Refuses new requests, ends the ones under way and waits until the pages are quiet. The handle is still to
/// be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_close(
    receiver: *mut kvxfer_receiver_t,
    timeout_ms: u64,
) -> kvxfer_result_t {
    guard("kvxfer_receiver_close", || {
        let receiver = self::receiver(receiver)?;
        receiver.close(timeout("timeout_ms", timeout_ms)?)?;
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; senders are told. Chunks acquired before stay valid. NULL is fine. For memory of the
/// caller's own the answer is `KVXFER_BUSY` while something still uses it, as for `kvxfer_region_free`: close
/// the pool, free its chunks, and free it again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_free(receiver: *mut kvxfer_receiver_t) -> kvxfer_result_t {
    guard("kvxfer_receiver_free", || {
        if !receiver.is_null() {
            let object = borrow::<ReceiverObject>("receiver", receiver)?;
            drop(object.receiver.lock().take());
            still_used(object.foreign.as_ref())?;
            take::<ReceiverObject>("receiver", receiver)?;
        }
        Ok(KVXFER_OK)
    })
}

/// What is known of a key now: `*state_out` becomes a `KVXFER_LOOKUP_...` value, and `*length_out` (may be
/// NULL) the chunk's valid bytes, 0 unless it is present.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_lookup(
    receiver: *const kvxfer_receiver_t,
    key: *const c_char,
    state_out: *mut u32,
    length_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_lookup", || unsafe {
        let receiver = self::receiver(receiver)?;
        let (state, length) = (Out::new("state_out", state_out)?, Out::optional(length_out));
        let (found, bytes) = match receiver.lookup(&self::key(key)?) {
            Lookup::Absent => (KVXFER_LOOKUP_ABSENT, 0),
            Lookup::Pending => (KVXFER_LOOKUP_PENDING, 0),
            Lookup::Present(bytes) => (KVXFER_LOOKUP_PRESENT, bytes),
        };
        state.set(found);
        if let Some(length) = length {
            length.set(bytes);
        }
        Ok(KVXFER_OK)
    })
}

/// Pins a published chunk; `KVXFER_IN_PROGRESS` while it is being written, `KVXFER_NOT_FOUND` when unknown.
/// Free the chunk with `kvxfer_chunk_free` soon: its page cannot be used for another until then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_acquire(
    receiver: *mut kvxfer_receiver_t,
    key: *const c_char,
    chunk_out: *mut *mut kvxfer_chunk_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_acquire", || unsafe {
        let receiver = self::receiver(receiver)?;
        let out = Out::new("chunk_out", chunk_out)?;
        let chunk = receiver.acquire(&self::key(key)?)?;
        out.set(into_raw(ChunkObject { chunk, memory: receiver.memory().clone() })?);
        Ok(KVXFER_OK)
    })
}

/// Drops a published chunk; its page is free once the last pin is gone. `KVXFER_NOT_FOUND` when there was none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_remove(
    receiver: *mut kvxfer_receiver_t,
    key: *const c_char,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_remove", || unsafe {
        let receiver = self::receiver(receiver)?;
        let key = self::key(key)?;
        if receiver.remove(&key) {
            Ok(KVXFER_OK)
        } else {
            Err(Error::NotFound { what: "published chunk", name: key.to_string() })
        }
    })
}

/// Waits until the request has ended: `KVXFER_OK` when every chunk is published, its failure otherwise;
/// `KVXFER_TIMED_OUT` when `timeout_ms` passes first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_wait_request(
    receiver: *const kvxfer_receiver_t,
    request: *const c_char,
    timeout_ms: u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_wait_request", || unsafe {
        let receiver = self::receiver(receiver)?;
        let request = RequestId::new(text("request", request)?)?;
        receiver.wait_request(&request, timeout("timeout_ms", timeout_ms)?)?;
        Ok(KVXFER_OK)
    })
}

/// Takes the next event; `KVXFER_TIMED_OUT` when none came in `timeout_ms`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_next_event(
    receiver: *mut kvxfer_receiver_t,
    timeout_ms: u64,
    event_out: *mut kvxfer_receiver_event_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_next_event", || unsafe {
        let receiver = self::receiver(receiver)?;
        let out = OutStruct::new("event_out", event_out)?;
        let after = timeout("timeout_ms", timeout_ms)?;
        let (kind, sender, request, result, words) = match receiver.next_event(after) {
            None => return Err(Error::TimedOut { operation: "an event of the pool".into(), after }),
            Some(ReceiverEvent::Ready { sender, request }) => {
                (KVXFER_EVENT_READY, sender, request, KVXFER_OK, String::new())
            }
            Some(ReceiverEvent::Failed { sender, request, code, text }) => {
                (KVXFER_EVENT_FAILED, sender, request, number(code), text)
            }
        };
        out.set(&kvxfer_receiver_event_t {
            struct_size: 0,
            kind,
            result,
            sender: fixed(sender.as_str()),
            request: fixed(request.as_str()),
            text: fixed(&words),
        });
        Ok(KVXFER_OK)
    })
}

/// Pages by state, and the queue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_stats(
    receiver: *const kvxfer_receiver_t,
    stats_out: *mut kvxfer_pool_stats_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_stats", || unsafe {
        let receiver = self::receiver(receiver)?;
        let out = OutStruct::new("stats_out", stats_out)?;
        let s = receiver.stats();
        out.set(&kvxfer_pool_stats_t {
            struct_size: 0,
            pages: s.pages,
            free_pages: s.free,
            writing: s.writing,
            published: s.published,
            pinned: s.pinned,
            quarantined: s.quarantined,
            queued: s.queued,
            active: s.active,
            advanced: s.advanced,
            available: s.available,
        });
        Ok(KVXFER_OK)
    })
}

/// First byte and length of the pool's memory, valid while the receiver lives; page `i` begins at `i *
/// page_bytes`. Read a page only while you hold its chunk. `length_out` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_receiver_memory(
    receiver: *const kvxfer_receiver_t,
    base_out: *mut *mut c_void,
    length_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_receiver_memory", || unsafe {
        let receiver = self::receiver(receiver)?;
        let (base, length) = (Out::new("base_out", base_out)?, Out::optional(length_out));
        base.set(receiver.memory().as_ptr().cast());
        if let Some(length) = length {
            length.set(receiver.memory().len() as u64);
        }
        Ok(KVXFER_OK)
    })
}

/// First byte and number of valid bytes of the chunk; they stay as they are until `kvxfer_chunk_free`. Where the pool is a GPU's memory
/// the address is the device's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_chunk_data(
    chunk: *const kvxfer_chunk_t,
    data_out: *mut *const c_void,
    length_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks; the chunk lies within its pool's memory.
    guard("kvxfer_chunk_data", || unsafe {
        let object = borrow::<ChunkObject>("chunk", chunk)?;
        let (data, length) = (Out::new("data_out", data_out)?, Out::new("length_out", length_out)?);
        data.set(object.memory.as_ptr().add(object.chunk.offset() as usize).cast_const().cast());
        length.set(object.chunk.len());
        Ok(KVXFER_OK)
    })
}

/// Copies `length` bytes from `offset` of the chunk to `data`, also where the pool is a GPU's memory, and waits for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_chunk_read(
    chunk: *const kvxfer_chunk_t,
    offset: u64,
    length: usize,
    data: *mut c_void,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_chunk_read", || unsafe {
        let object = borrow::<ChunkObject>("chunk", chunk)?;
        object.chunk.read_at(offset, list_mut("data", data.cast::<u8>(), length)?)?;
        Ok(KVXFER_OK)
    })
}

/// Number of the chunk's page, and the offset of its first byte in the pool's memory (either may be NULL).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_chunk_page(
    chunk: *const kvxfer_chunk_t,
    page_out: *mut u32,
    offset_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_chunk_page", || unsafe {
        let object = borrow::<ChunkObject>("chunk", chunk)?;
        if let Some(page) = Out::optional(page_out) {
            page.set(object.chunk.page().0);
        }
        if let Some(offset) = Out::optional(offset_out) {
            offset.set(object.chunk.offset());
        }
        Ok(KVXFER_OK)
    })
}

/// Unpins the chunk and frees the handle; its bytes must not be looked at any more. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_chunk_free(chunk: *mut kvxfer_chunk_t) -> kvxfer_result_t {
    guard("kvxfer_chunk_free", || take::<ChunkObject>("chunk", chunk).map(|_| KVXFER_OK))
}
