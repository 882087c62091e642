//! Chunks that are made in their places: which page, as an address of this process.

use super::{Session, State, binding};
use crate::Result;
use crate::channel::place::{Open, Place};
use crate::channel::sender::ChunkSource;
use crate::channel::ticket::Ticket;
use kvxfer_proto::sender::{Standing, Write};
use std::sync::Arc;
use std::time::Instant;

impl Session {
    /// The page of a chunk, when it gets one until `deadline` and this process has it mapped.
    pub(in crate::channel) fn place(
        self: &Arc<Self>,
        ticket: &Ticket,
        chunk: u32,
        device: Option<i32>,
        deadline: Instant,
    ) -> Result<Option<Place>> {
        let (remote, layout, level) = self.pool()?;
        let Some((kind, caps, mapping)) = self.peer.mapping(&remote, device) else { return Ok(None) };
        let Some(spec) = ticket.spec(chunk as usize) else { return Ok(None) };
        let standing = |state: &State| match &state.attached {
            Some(Ok(a)) => Some(a.machine.standing(ticket.serial, chunk)),
            _ => None,
        };
        self.attend(|| Instant::now() >= deadline || standing(&self.state.lock()) != Some(Standing::Unknown));
        let mut state = self.state.lock();
        loop {
            match standing(&state) {
                None => return Err(ticket.error()),
                Some(Standing::HasPage) => break,
                Some(Standing::NoPage) => return Ok(None),
                Some(Standing::Unknown) if Instant::now() >= deadline => return Ok(None),
                Some(Standing::Unknown) => self.changed.wait_until(&mut state, deadline),
            };
        }
        let State { attached: Some(Ok(a)), requests, .. } = &mut *state else { return Err(ticket.error()) };
        let Some(r) = requests.get_mut(&ticket.serial) else { return Err(ticket.error()) };
        r.placing = Some((chunk, None));
        a.machine.supply(ticket.serial, chunk)?;
        self.carry_out(state);
        let mut state = self.state.lock();
        let r = state.requests.get_mut(&ticket.serial);
        let Some((r, (_, Some(write)))) = r.and_then(|r| r.placing.take().map(|p| (r, p))) else {
            return Err(ticket.error());
        };
        r.carried = Some(kind);
        drop(state);
        Ok(Some(Place::new(Open {
            session: self.clone(),
            write,
            binding: binding(&ticket.request, spec, write),
            kind,
            mapping,
            offset: layout.offset(write.page).unwrap_or(0),
            level: self.level(level, caps, device.is_some()),
            since: Instant::now(),
        })))
    }

    /// Writes a chunk that was to be made in its place after all.
    pub(in crate::channel) fn write_instead(&self, write: Write, source: ChunkSource) {
        if let Some(r) = self.state.lock().requests.get_mut(&write.serial) {
            r.sources[write.chunk as usize] = Some(Arc::new(source));
        }
        self.start(write);
    }

    /// Whether pages of the pool are in this process's address space.
    pub(in crate::channel) fn maps(&self, device: Option<i32>) -> bool {
        self.pool().is_ok_and(|(remote, ..)| self.peer.mapping(&remote, device).is_some())
    }
}
