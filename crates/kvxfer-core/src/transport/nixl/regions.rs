//! Registered memory of this side, and the tickets that tell peers of it.

use super::agent::{backend_args, failed, place_of, register};
use super::wire::Ticket;
use crate::{Memory, Result};
use kvxfer_proto::RegionId;
use nixl_sys::{Agent, Backend, RegDescList, RegistrationHandle};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

/// Longest single registration: larger ones are slower on some NICs.
pub(super) const SLICE: u64 = 7 << 29;

/// Regions that the backends take.
#[derive(Default)]
pub(super) struct Regions {
    ranges: HashMap<(usize, usize), Range>,
    regions: HashMap<RegionId, (usize, usize)>,
}

/// Registered memory; equal ranges of several regions share it, because NIXL tells registrations apart by range only.
pub(super) struct Range {
    // The registration goes before the memory.
    _handles: Vec<RegistrationHandle>,
    _memory: Arc<Memory>,
    users: usize,
}

impl Regions {
    /// Registers a region's memory and makes its ticket.
    pub(super) fn register(
        &mut self,
        agent: &Agent,
        backends: &[Backend],
        name: &str,
        region: RegionId,
        memory: &Arc<Memory>,
    ) -> Result<Vec<u8>> {
        let key = (memory.as_ptr() as usize, memory.len());
        let range = match self.ranges.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let handles = slices(key)
                    .map(|slice| register(agent, backends, memory, slice))
                    .collect::<Result<_>>()?;
                new.insert(Range { _handles: handles, _memory: Arc::clone(memory), users: 0 })
            }
        };
        let ticket = ticket(agent, backends, name, memory, key);
        if ticket.is_ok() {
            range.users += 1;
            self.regions.insert(region, key);
        } else if range.users == 0 {
            self.ranges.remove(&key);
        }
        ticket
    }

    /// Forgets a region; gives the registration when it was the last of that range.
    pub(super) fn remove(&mut self, region: RegionId) -> Option<Range> {
        let key = self.regions.remove(&region)?;
        let range = self.ranges.get_mut(&key)?;
        range.users -= 1;
        if range.users > 0 { None } else { self.ranges.remove(&key) }
    }
}

/// What a peer needs to reach registered memory of the agent called `name`.
fn ticket(
    agent: &Agent,
    backends: &[Backend],
    name: &str,
    memory: &Memory,
    key: (usize, usize),
) -> Result<Vec<u8>> {
    let (kind, device) = place_of(memory);
    let mut list = RegDescList::new(kind).map_err(|e| failed("create_reg_dlist", &e))?;
    for (address, len) in slices(key) {
        list.add_desc(address, len, device);
    }
    let args = backend_args(backends)?;
    let metadata =
        agent.get_local_partial_md(&list, args.as_ref()).map_err(|e| failed("get_local_partial_md", &e))?;
    let ticket = Ticket {
        name: name.to_owned(),
        kind,
        device,
        address: key.0 as u64,
        len: key.1 as u64,
        slice: SLICE,
        metadata,
    };
    Ok(ticket.encode())
}

/// The registrations a range of memory is cut into: address and length of each.
fn slices((address, len): (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(SLICE as usize).map(move |at| (address + at, (len - at).min(SLICE as usize)))
}
