//! Pinned host memory for bytes on their way between a device and a link that cannot reach it.
//!
//! A link that sends from host memory takes a [`Slot`], has it filled from the device while the slot before is being sent, and the other
//! way round at the receiving end: copy and network overlap, and each byte crosses the host's memory once. Slots lie on the device's
//! NUMA node. They come from a pool that grows with demand (a link bounds what it has under way), or belong to a link that keeps them itself.

use super::device::Device;
use super::engine::{Flight, Move};
use crate::memory::{HugePages, near_node};
use crate::{Memory, Result};
use parking_lot::Mutex;
use std::sync::Arc;

/// Called when a copy has ended; short.
pub(crate) type Then = Box<dyn FnOnce() + Send>;

/// Slots that nobody uses now.
#[derive(Default)]
pub(crate) struct Staging {
    idle: Mutex<Vec<Arc<Memory>>>,
}

/// A piece of pinned memory, given back when dropped if it came from a pool.
pub(crate) struct Slot {
    memory: Arc<Memory>,
    home: Option<Arc<Staging>>,
}

/// A copy between a slot and a device, under way.
pub(crate) struct Landing {
    flight: Flight,
    /// The device's side; the slot is kept by whoever holds this.
    _device: Arc<Memory>,
}

/// Smallest slot.
const LEAST: usize = 1 << 20;
/// Most slots kept for later.
const KEPT: usize = 64;

impl Staging {
    /// A slot of at least `len` bytes near `device`.
    pub(crate) fn slot(self: &Arc<Self>, device: &Device, len: usize) -> Result<Slot> {
        let known = {
            let mut idle = self.idle.lock();
            idle.iter().position(|m| m.len() >= len).map(|i| idle.swap_remove(i))
        };
        let memory = known.map_or_else(|| make(device, len), Ok)?;
        Ok(Slot { memory, home: Some(self.clone()) })
    }
}

fn make(device: &Device, len: usize) -> Result<Arc<Memory>> {
    let len = len.next_power_of_two().max(LEAST);
    let memory = near_node(device.numa_node(), || Memory::shared(len, HugePages::Try))?;
    memory.pin()?;
    Ok(memory)
}

impl Slot {
    /// One of at least `len` bytes near `device`, that belongs to no pool.
    #[cfg(feature = "nixl")]
    pub(crate) fn new(device: &Device, len: usize) -> Result<Self> {
        Ok(Self { memory: make(device, len)?, home: None })
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Starts to bring `ranges` of device memory here, one after the other. Whoever drives the landing anyway needs no call at its end.
    pub(crate) fn fill(
        &self,
        from: &Arc<Memory>,
        ranges: &[(u64, u32)],
        then: Option<Then>,
    ) -> Result<Landing> {
        self.start(from, ranges, true, then)
    }

    /// Starts to take what is here to `ranges` of device memory.
    pub(crate) fn empty(
        &self,
        to: &Arc<Memory>,
        ranges: &[(u64, u32)],
        then: Option<Then>,
    ) -> Result<Landing> {
        self.start(to, ranges, false, then)
    }

    fn start(
        &self,
        far: &Arc<Memory>,
        ranges: &[(u64, u32)],
        fill: bool,
        then: Option<Then>,
    ) -> Result<Landing> {
        let near = &self.memory;
        let block = far.block().ok_or_else(|| {
            crate::Error::failed(kvxfer_proto::ErrorCode::Unsupported, "not a GPU's memory")
        })?;
        let total: u64 = ranges.iter().map(|r| u64::from(r.1)).sum();
        near.range(0, total)?;
        let mut at = near.as_ptr() as u64;
        let mut moves: Vec<Move> = Vec::with_capacity(ranges.len());
        for (offset, len) in ranges {
            let (here, there) = (at, far.range(*offset, u64::from(*len))? as u64);
            let (src, dst, len) =
                if fill { (there, here, u64::from(*len)) } else { (here, there, u64::from(*len)) };
            at += len;
            Move { src, dst, len }.append_to(&mut moves);
        }
        let engine = block.engine()?;
        let stream = engine.pick();
        // SAFETY: both sides were range-checked; the landing keeps the device's, whoever holds it keeps the slot, and its end is awaited
        // when it is dropped.
        let flight = unsafe { engine.start(stream, &moves, None, true) }?;
        // Without the call the end is seen by whoever looks the next time.
        if let Some(then) = then
            && let Err(e) = engine.when_done(stream, then)
        {
            tracing::debug!(error = %e, "no call at the end of a staged copy");
        }
        Ok(Landing { flight, _device: far.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(home) = &self.home else { return };
        let mut idle = home.idle.lock();
        if idle.len() < KEPT {
            idle.push(self.memory.clone());
        }
    }
}

impl Landing {
    /// Whether it has ended; an error when the device failed.
    pub(crate) fn is_done(&mut self) -> Result<bool> {
        self.flight.poll()
    }
    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.flight.wait()
    }
}
