//! Device memory that no backend takes, on its way through pinned host memory that they do.
//!
//! A job is cut into slices of at most a slot. A write's slice is copied from the device into a slot and posted from
//! there; a read's is posted into the slot and copied on, and has arrived when that copy has ended. Several slices are
//! under way at a time, so copies and requests overlap. Nothing waits here: whoever drives a job looks at its copies as
//! he looks at its requests.

use super::agent::{failed, register};
use super::job::{Local, Route, Tools};
use super::link::Remote;
use super::plan::Descriptor;
use crate::cuda::{self, Device, Landing};
use crate::transport::Op;
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use nixl_sys::{Agent, Backend, MemType, RegistrationHandle, XferRequest};

/// Bytes of a slot, and the most a slice has: large enough for the network, small enough that the first one leaves soon.
pub(super) const SLOT: u64 = 4 << 20;
/// Slots kept for later, if `depth` is not more; to make one takes milliseconds.
const KEPT: usize = 16;

/// The slots of an agent. Peers do not wait for each other: each may have `depth` of them.
pub(super) struct Slots {
    depth: usize,
    idle: Vec<Slot>,
    /// Those whose requests did not end before their connection was given up: NIXL may still look at them.
    lost: Vec<Slot>,
}

/// Pinned memory near a device, registered with the backends.
pub(super) struct Slot {
    // The registration goes before the memory.
    _registration: RegistrationHandle,
    pinned: cuda::Slot,
    device: i32,
}

impl Slots {
    pub(super) fn new(depth: usize) -> Self {
        Self { depth, idle: Vec::new(), lost: Vec::new() }
    }

    /// Whether a transfer with that peer may have one more.
    pub(super) fn has_room(&self, remote: &Remote) -> bool {
        remote.slots() < self.depth
    }

    fn take(
        &mut self,
        agent: &Agent,
        backends: &[Backend],
        remote: &Remote,
        device: &Device,
    ) -> Result<Slot> {
        let known = self.idle.iter().rposition(|s| s.device == device.ordinal());
        let slot = known.map_or_else(|| Slot::new(agent, backends, device), |i| Ok(self.idle.remove(i)))?;
        remote.slot_taken();
        Ok(slot)
    }

    /// `retired`: ended requests that may refer to it.
    fn give_back(&mut self, slot: Slot, remote: &Remote, retired: &mut Vec<XferRequest>) {
        remote.slot_given_back();
        if self.idle.len() < self.depth.max(KEPT) {
            self.idle.push(slot);
        } else {
            retired.clear();
            drop(slot);
        }
    }
}

impl Slot {
    fn new(agent: &Agent, backends: &[Backend], device: &Device) -> Result<Self> {
        let pinned = cuda::Slot::new(device, SLOT as usize)?;
        let memory = pinned.memory();
        let registration = register(agent, backends, memory, (memory.as_ptr() as usize, memory.len()))?;
        Ok(Self { _registration: registration, pinned, device: device.ordinal() })
    }
}

/// Why something of a job did not arrive.
#[derive(Debug)]
pub(super) enum Fault {
    /// The job was to end early.
    Dropped,
    /// NIXL failed; the connection is not used any more.
    Request(Error),
    /// A copy between device and slot failed, or no slot could be had; the connection is as good as before.
    Copy(Error),
}

/// Bytes on their way through a slot.
pub(super) struct Slice {
    // Goes before the slot.
    phase: Phase,
    /// The slot's side and the peer's.
    descriptors: Vec<Descriptor>,
    /// The device's side, in the order of the slot: offset and length.
    ranges: Vec<(u64, u32)>,
    /// Until the end, when it is given back.
    slot: Option<Slot>,
}

enum Phase {
    /// From the device into the slot.
    Filling(Landing),
    /// Between the slot and the peer.
    Posted(XferRequest),
    /// From the slot to the device.
    Emptying(Landing),
    /// Nothing of it is under way any more.
    Ended(Result<(), Fault>),
}

impl Phase {
    /// What a copy that was asked for has become.
    fn copying(started: Result<Landing>, phase: fn(Landing) -> Self) -> Self {
        started.map_or_else(|e| Self::Ended(Err(Fault::Copy(e))), phase)
    }
}

impl Slice {
    /// Starts with the bytes in `tools.scratch`, at most a slot's, whose local side is the device. What fails is told at its end.
    pub(super) fn start(route: Route<'_>, tools: &mut Tools<'_>) -> Self {
        let ranges = pack(tools.scratch, route.import.slice);
        let mut slice =
            Self { phase: Phase::Ended(Ok(())), descriptors: tools.scratch.clone(), ranges, slot: None };
        let slot = route
            .job
            .local
            .on_device()
            .ok_or_else(|| Error::failed(ErrorCode::Unsupported, "not a GPU's memory"))
            .and_then(|device| tools.slots.take(tools.agent, tools.backends, route.remote, device));
        let next = match slot {
            Err(e) => Phase::Ended(Err(Fault::Copy(e))),
            Ok(slot) => {
                let slot = slice.slot.insert(slot);
                match route.job.op {
                    Op::Write => Phase::copying(
                        slot.pinned.fill(&route.job.local, &slice.ranges, None),
                        Phase::Filling,
                    ),
                    Op::Read => post(slot, &slice.descriptors, &slice.ranges, route, tools),
                }
            }
        };
        slice.enter(next, route, tools);
        slice
    }

    /// One turn: true when something of it has ended. `stopping`: no step that has not begun begins.
    pub(super) fn advance(&mut self, route: Route<'_>, stopping: bool, tools: &mut Tools<'_>) -> bool {
        let Self { phase, descriptors, ranges, slot: Some(slot) } = self else { return false };
        let next = match phase {
            Phase::Ended(_) => return false,
            Phase::Filling(copy) => match copy.is_done() {
                Ok(false) => return false,
                Ok(true) if stopping => Phase::Ended(Err(Fault::Dropped)),
                Ok(true) => post(slot, descriptors, ranges, route, tools),
                Err(e) => Phase::Ended(Err(Fault::Copy(e))),
            },
            Phase::Posted(request) => match tools.agent.get_xfer_status(request) {
                Ok(status) if !status.is_success() => return false,
                Ok(_) if stopping && route.job.op == Op::Read => Phase::Ended(Err(Fault::Dropped)),
                Ok(_) => crossed(slot, ranges, route),
                Err(e) => Phase::Ended(Err(Fault::Request(failed("get_xfer_status", &e)))),
            },
            Phase::Emptying(copy) => match copy.is_done() {
                Ok(false) => return false,
                Ok(true) => Phase::Ended(Ok(())),
                Err(e) => Phase::Ended(Err(Fault::Copy(e))),
            },
        };
        self.enter(next, route, tools);
        true
    }

    pub(super) fn is_posted(&self) -> bool {
        matches!(self.phase, Phase::Posted(_))
    }

    /// How it ended, once it has.
    pub(super) fn ended(&mut self) -> Option<Result<(), Fault>> {
        match &mut self.phase {
            Phase::Ended(how) => Some(std::mem::replace(how, Ok(()))),
            _ => None,
        }
    }

    /// Gives up a request that does not end. A copy goes on: the turns that follow see its end.
    pub(super) fn give_up(&mut self, slots: &mut Slots) {
        if self.is_posted() {
            self.phase = Phase::Ended(Err(Fault::Dropped));
            slots.lost.extend(self.slot.take());
        }
    }

    fn enter(&mut self, next: Phase, route: Route<'_>, tools: &mut Tools<'_>) {
        if let Phase::Posted(request) = std::mem::replace(&mut self.phase, next) {
            tools.retired.push(request);
        }
        if matches!(self.phase, Phase::Ended(_))
            && let Some(slot) = self.slot.take()
        {
            tools.slots.give_back(slot, route.remote, tools.retired);
        }
    }
}

/// Moves the bytes between a slot and the peer.
fn post(
    slot: &Slot,
    descriptors: &[Descriptor],
    ranges: &[(u64, u32)],
    route: Route<'_>,
    tools: &mut Tools<'_>,
) -> Phase {
    let local = Local { kind: MemType::Dram, device: 0, base: slot.pinned.memory().as_ptr() as u64 };
    match tools.request(route, local, descriptors).and_then(|r| Ok((tools.post(&r)?, r))) {
        Ok((true, request)) => Phase::Posted(request),
        Ok((false, request)) => {
            tools.retired.push(request);
            crossed(slot, ranges, route)
        }
        Err(e) => Phase::Ended(Err(Fault::Request(e))),
    }
}

/// The request has ended well: what was read goes on to the device.
fn crossed(slot: &Slot, ranges: &[(u64, u32)], route: Route<'_>) -> Phase {
    match route.job.op {
        Op::Write => Phase::Ended(Ok(())),
        Op::Read => Phase::copying(slot.pinned.empty(&route.job.local, ranges, None), Phase::Emptying),
    }
}

/// Puts the local bytes one after the other, as they are in a slot, and tells where they were. What is scattered on the device but not
/// at the peer becomes one descriptor; none crosses the border of two registrations there.
fn pack(descriptors: &mut Vec<Descriptor>, remote_slice: u64) -> Vec<(u64, u32)> {
    let mut at = 0;
    let ranges = descriptors
        .iter_mut()
        .map(|d| {
            let range = (d.local, d.len as u32);
            d.local = at;
            at += d.len;
            range
        })
        .collect();
    descriptors.dedup_by(|next, last| {
        let joins = last.remote + last.len == next.remote && !next.remote.is_multiple_of(remote_slice);
        if joins {
            last.len += next.len;
        }
        joins
    });
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scattered_on_the_device_alone_is_one_descriptor() {
        let d = |local, remote, len| Descriptor { local, remote, len };
        let mut list = vec![d(900, 100, 10), d(50, 110, 20), d(7, 130, 3), d(10, 200, 5), d(400, 205, 5)];
        let ranges = pack(&mut list, 130);
        assert_eq!(ranges, [(900, 10), (50, 20), (7, 3), (10, 5), (400, 5)]);
        // 130 is where the peer's second registration begins.
        assert_eq!(list, [d(0, 100, 30), d(30, 130, 3), d(33, 200, 10)]);
    }
}
