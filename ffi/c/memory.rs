//! Shareable memory without an agent: for engines that allocate their buffers before they know what will use them.

use super::args::{Out, invalid};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::result::{KVXFER_OK, kvxfer_result_t};
use kvxfer_core::Memory;
use kvxfer_core::memory::HugePages;
use std::ffi::c_void;
use std::sync::Arc;

/// Memory that peers on the same host can map. Usable from any thread.
pub struct kvxfer_memory_t {
    _opaque: [u8; 0],
}

/// What a memory's handle stands for.
struct MemoryObject(Arc<Memory>);
object!(MemoryObject, kvxfer_memory_t, MEMORY);

/// Allocates `length` bytes, zeroed, on huge pages where there are any. An agent that is given exactly this range
/// (`kvxfer_region_register`, a receiver's `memory`) recognises it, and peers on the same host reach it as
/// fast as memory that kvxfer allocated for a region. It stays until the handle is freed and nothing uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_memory_new(
    length: u64,
    memory_out: *mut *mut kvxfer_memory_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_memory_new", || unsafe {
        let out = Out::new("memory_out", memory_out)?;
        if length == 0 || length > isize::MAX as u64 {
            return Err(invalid("length", format!("{length} bytes cannot be allocated")));
        }
        out.set(into_raw(MemoryObject(Memory::shared(length as usize, HugePages::Try)?))?);
        Ok(KVXFER_OK)
    })
}

/// First byte of the memory, valid until the handle is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_memory_base(
    memory: *const kvxfer_memory_t,
    base_out: *mut *mut c_void,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_memory_base", || unsafe {
        let memory = borrow::<MemoryObject>("memory", memory)?;
        Out::new("base_out", base_out)?.set(memory.0.as_ptr().cast());
        Ok(KVXFER_OK)
    })
}

/// Frees the handle; regions and pools over the memory keep it until they are gone. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_memory_free(memory: *mut kvxfer_memory_t) -> kvxfer_result_t {
    guard("kvxfer_memory_free", || take::<MemoryObject>("memory", memory).map(|_| KVXFER_OK))
}
