//! Regions: memory that transfers may use, allocated by kvxfer or owned by the caller.

use super::agent::kvxfer_agent_t;
use super::args::{Out, flag, invalid, list, list_mut, text};
use super::handle::{borrow, into_raw, object, take};
use super::panic::guard;
use super::peer::{RemoteRegionObject, kvxfer_peer_t, kvxfer_remote_region_t};
use super::result::{KVXFER_OK, kvxfer_result_t};
use kvxfer_core::agent::Access;
use kvxfer_core::cuda::Device;
use kvxfer_core::memory::MemoryKind;
use kvxfer_core::{Agent, Error, ErrorCode, Memory, Region, Result};
use parking_lot::Mutex;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Registered memory. Usable from any thread.
pub struct kvxfer_region_t {
    _opaque: [u8; 0],
}

/// Peers may read an exported region.
pub const KVXFER_ACCESS_READ: u32 = 1;
/// Peers may write an exported region.
pub const KVXFER_ACCESS_WRITE: u32 = 2;
/// Peers may do both.
pub const KVXFER_ACCESS_READ_WRITE: u32 = 3;

/// What a region's handle stands for.
pub(super) struct RegionObject {
    agent: Agent,
    /// Empty once the handle is being freed.
    region: Mutex<Option<Region>>,
    /// Names it was exported under through this handle.
    exports: Mutex<Vec<String>>,
    /// Set for the caller's memory, which may not be given up while something still uses it.
    foreign: Option<Weak<Memory>>,
}
object!(RegionObject, kvxfer_region_t, REGION);

impl RegionObject {
    fn new(agent: Agent, region: Region) -> Self {
        let foreign = matches!(region.memory().kind(), MemoryKind::Foreign | MemoryKind::ForeignDevice)
            .then(|| Arc::downgrade(region.memory()));
        Self { agent, region: Mutex::new(Some(region)), exports: Mutex::default(), foreign }
    }

    fn get(&self) -> Result<Region> {
        self.region.lock().clone().ok_or_else(|| {
            Error::failed(
                ErrorCode::Closed,
                "the region is being freed: kvxfer_region_free answered KVXFER_BUSY",
            )
        })
    }

    /// Gives the region up; fails while the caller's memory is still in use.
    fn release(&self) -> Result<()> {
        for name in self.exports.lock().drain(..) {
            // The name may be taken back already, or the agent shut down.
            let _ = self.agent.unexport(&name);
        }
        drop(self.region.lock().take());
        still_used(self.foreign.as_ref())
    }
}

/// How long a thread that has just ended a transfer may take to let go of its memory: it is seen as ended a moment before.
const LETTING_GO: Duration = Duration::from_millis(200);

/// Fails with `Busy` while anything keeps the caller's memory.
pub(super) fn still_used(foreign: Option<&Weak<Memory>>) -> Result<()> {
    let used = || foreign.is_some_and(|memory| memory.strong_count() > 0);
    let deadline = Instant::now() + LETTING_GO;
    while used() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(100));
    }
    if used() {
        return Err(Error::failed(
            ErrorCode::Busy,
            "transfers, chunks or another region still use this memory: wait for them or cancel them, then free \
             the handle again; keep the memory until then",
        ));
    }
    Ok(())
}

pub(super) fn region(argument: &'static str, region: *const kvxfer_region_t) -> Result<Region> {
    borrow::<RegionObject>(argument, region)?.get()
}

/// A region that must belong to `agent`.
pub(super) fn region_of(
    agent: &Agent,
    argument: &'static str,
    region: *const kvxfer_region_t,
) -> Result<Region> {
    let object = borrow::<RegionObject>(argument, region)?;
    if !object.agent.same(agent) {
        let (here, there) = (agent.name(), object.agent.name());
        return Err(invalid(
            argument,
            format!("is a region of agent {there}, not of agent {here}: register it there"),
        ));
    }
    object.get()
}

/// The caller's memory as the core sees it.
///
/// # Safety
/// As for [`Memory::foreign`].
pub(super) unsafe fn foreign(base: *mut c_void, length: u64) -> Result<Arc<Memory>> {
    if base.is_null() {
        return Err(invalid("base", "is NULL"));
    }
    if length == 0 || usize::try_from(length).is_ok_and(|l| base.addr().checked_add(l).is_none()) {
        return Err(invalid("length", format!("{length} bytes from {base:p} on are not a range of memory")));
    }
    // Shareable memory that was allocated here before is recognised.
    if let Some(memory) = Memory::shared_at(base.addr(), length as usize) {
        return Ok(memory);
    }
    // SAFETY: the caller's promise.
    unsafe {
        if kvxfer_core::cuda::is_device_address(base.addr() as u64) {
            return Memory::device_foreign(base.addr() as u64, length as usize);
        }
        Memory::foreign(base.cast(), length as usize)
    }
}

/// Allocates `length` bytes of shareable memory (zeroed, huge pages where available) and registers them. Peers
/// on the same host reach such memory fastest. The memory lives until the region and every transfer on it are
/// gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_allocate(
    agent: *mut kvxfer_agent_t,
    length: u64,
    region_out: *mut *mut kvxfer_region_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_allocate", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("region_out", region_out)?;
        if length == 0 || length > isize::MAX as u64 {
            return Err(invalid("length", format!("{length} bytes cannot be allocated")));
        }
        let region = agent.allocate(length as usize)?;
        out.set(into_raw(RegionObject::new(agent, region))?);
        Ok(KVXFER_OK)
    })
}

/// Registers memory of the caller's own, `length` bytes from `base` on, readable and writable: host memory, or a GPU's (a
/// `CUdeviceptr` as a pointer, a torch tensor's `data_ptr()`), which is recognised. It must stay as it is until `kvxfer_region_free` has answered `KVXFER_OK`; and peers that were allowed to reach it must be
/// disconnected, or must have ended their transfers, before it goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_register(
    agent: *mut kvxfer_agent_t,
    base: *mut c_void,
    length: u64,
    region_out: *mut *mut kvxfer_region_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks; the memory stays as long as `release` says it is used.
    guard("kvxfer_region_register", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("region_out", region_out)?;
        let region = agent.register(foreign(base, length)?)?;
        out.set(into_raw(RegionObject::new(agent, region))?);
        Ok(KVXFER_OK)
    })
}

/// Takes the region's exports back, deregisters it and frees the handle. NULL is fine.
///
/// For memory of the caller's own the answer is `KVXFER_BUSY` while a transfer still uses it: the handle then
/// stays, and is to be freed again once the transfer has ended; only after `KVXFER_OK` may the memory go.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_free(region: *mut kvxfer_region_t) -> kvxfer_result_t {
    guard("kvxfer_region_free", || {
        if !region.is_null() {
            borrow::<RegionObject>("region", region)?.release()?;
            take::<RegionObject>("region", region)?;
        }
        Ok(KVXFER_OK)
    })
}

/// Allocates `length` zeroed bytes on CUDA device `device` (its number among the visible ones) and registers them. With
/// `shareable` 1 they come from the driver's virtual memory management (in pages of 2 MiB), which also reaches peers that no
/// CUDA IPC handle reaches; 0 is the ordinary way. `KVXFER_NOT_AVAILABLE` without a driver or device, `KVXFER_NO_CAPACITY` when
/// the device is full.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_allocate_device(
    agent: *mut kvxfer_agent_t,
    device: i32,
    length: u64,
    shareable: u32,
    region_out: *mut *mut kvxfer_region_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_allocate_device", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("region_out", region_out)?;
        if length == 0 || length > isize::MAX as u64 {
            return Err(invalid("length", format!("{length} bytes cannot be allocated")));
        }
        let device = Device::get(device)?;
        let memory = if flag("shareable", shareable)? {
            Memory::device_shareable(&device, length as usize)?
        } else {
            Memory::device(&device, length as usize)?
        };
        let region = agent.register(memory)?;
        out.set(into_raw(RegionObject::new(agent, region))?);
        Ok(KVXFER_OK)
    })
}

/// A peer's region as a region of this agent, where it lies in this process's address space (`shm`, `cuda_ipc`): host memory for a
/// `device` of -1, else that device's. Copies and kernels work on it as on memory of one's own; a gather to it is a gather and a write
/// in one pass. Nobody tells the peer when that has ended: notify it then, and stop before it takes its export back.
/// `KVXFER_NOT_AVAILABLE` when it is not there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_map(
    agent: *mut kvxfer_agent_t,
    peer: *const kvxfer_peer_t,
    remote: *const kvxfer_remote_region_t,
    device: i32,
    region_out: *mut *mut kvxfer_region_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_map", || unsafe {
        let agent = super::agent::agent(agent)?;
        let out = Out::new("region_out", region_out)?;
        let remote = borrow::<RemoteRegionObject>("remote", remote)?;
        let region = super::peer::peer(peer)?.map(&remote.0, (device >= 0).then_some(device))?;
        let object = RegionObject { foreign: None, ..RegionObject::new(agent, region) };
        out.set(into_raw(object)?);
        Ok(KVXFER_OK)
    })
}

/// Pins the region's host memory for CUDA devices, so that transfers between it and device memory need no copy in between. Takes
/// about a third of a second a gibibyte; again, or on device memory, it does nothing. Transfers do it themselves at first use: this
/// is for a moment when nobody waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_pin(region: *mut kvxfer_region_t) -> kvxfer_result_t {
    guard("kvxfer_region_pin", || {
        self::region("region", region)?.memory().pin()?;
        Ok(KVXFER_OK)
    })
}

/// First byte and length of the region's memory, valid while the region lives; of a GPU's memory the address is the device's, which
/// the host cannot touch. `length_out` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_memory(
    region: *const kvxfer_region_t,
    base_out: *mut *mut c_void,
    length_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_memory", || unsafe {
        let region = self::region("region", region)?;
        let (base, length) = (Out::new("base_out", base_out)?, Out::optional(length_out));
        base.set(region.memory().as_ptr().cast());
        if let Some(length) = length {
            length.set(region.len());
        }
        Ok(KVXFER_OK)
    })
}

/// Number of the CUDA device whose memory the region is, among the visible ones; -1 for host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_device(
    region: *const kvxfer_region_t,
    device_out: *mut i32,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_device", || unsafe {
        let region = self::region("region", region)?;
        Out::new("device_out", device_out)?.set(region.memory().on_device().map_or(-1, Device::ordinal));
        Ok(KVXFER_OK)
    })
}

/// Copies `length` bytes from `offset` of the region to `data`, also from a GPU's memory, and waits for it. For looking at bytes, not
/// for moving caches.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_read(
    region: *const kvxfer_region_t,
    offset: u64,
    length: usize,
    data: *mut c_void,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_read", || unsafe {
        let region = self::region("region", region)?;
        region.memory().read_at(offset, list_mut("data", data.cast::<u8>(), length)?)?;
        Ok(KVXFER_OK)
    })
}

/// Copies `length` bytes from `data` to `offset` of the region, also to a GPU's memory, and waits for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_write(
    region: *mut kvxfer_region_t,
    offset: u64,
    data: *const c_void,
    length: usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_write", || unsafe {
        let region = self::region("region", region)?;
        region.memory().write_at(offset, list("data", data.cast::<u8>(), length)?)?;
        Ok(KVXFER_OK)
    })
}

/// The region's id, unique within its agent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_id(
    region: *const kvxfer_region_t,
    id_out: *mut u64,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_id", || unsafe {
        let region = self::region("region", region)?;
        Out::new("id_out", id_out)?.set(region.id().0);
        Ok(KVXFER_OK)
    })
}

/// Makes the region reachable for every authenticated peer under `name`; `access` is a `KVXFER_ACCESS_...`
/// value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_region_export(
    region: *mut kvxfer_region_t,
    name: *const c_char,
    access: u32,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_region_export", || unsafe {
        let object = borrow::<RegionObject>("region", region)?;
        let name = text("name", name)?;
        let access = match access {
            KVXFER_ACCESS_READ => Access::Read,
            KVXFER_ACCESS_WRITE => Access::Write,
            KVXFER_ACCESS_READ_WRITE => Access::ReadWrite,
            _ => {
                return Err(invalid(
                    "access",
                    format!("{access} is none of the KVXFER_ACCESS_ values 1 to 3"),
                ));
            }
        };
        object.agent.export(&object.get()?, name, access)?;
        object.exports.lock().push(name.to_owned());
        Ok(KVXFER_OK)
    })
}
