//! A chunk's page at the receiver, in the sender's own address space: bytes that are produced there need no transfer.
//!
//! While a [`Place`] lives it is a write under way, to the receiver as to the sender's machine: whatever happens to the request, the page
//! is not given to anybody else before the place is committed or dropped, or this process has ended.

use super::digest::Bytes;
use super::sender::ChunkSource;
use super::session::{Session, failed, part};
use crate::cuda::Fence;
use crate::transport::{Mapping, TransportKind};
use crate::{Error, Memory, Result};
use kvxfer_proto::integrity::Binding;
use kvxfer_proto::sender::Write;
use kvxfer_proto::wire::Check;
use kvxfer_proto::{ErrorCode, Integrity};
use std::sync::Arc;
use std::time::Instant;

/// Where a chunk's bytes are to be produced: [`super::Reservation::place`]. Commit it when they are there; dropping it instead gives
/// the request up. Nobody else writes there meanwhile, and nothing may be written there afterwards.
pub struct Place {
    open: Option<Open>,
}

/// The write that a place is.
pub(super) struct Open {
    pub(super) session: Arc<Session>,
    pub(super) write: Write,
    pub(super) binding: Binding,
    pub(super) kind: TransportKind,
    pub(super) mapping: Mapping,
    /// Where the page begins in the mapping.
    pub(super) offset: u64,
    pub(super) level: Integrity,
    pub(super) since: Instant,
}

/// Where a chunk's bytes are to be produced.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The receiver's pool as it is mapped here, kept as long as this lives.
    pub memory: Arc<Memory>,
    /// Where the chunk begins in it.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
}

impl Placed {
    /// First byte; for device memory an address that kernels and copies of the device can use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr().wrapping_add(self.offset as usize)
    }
}

impl Place {
    pub(super) fn new(open: Open) -> Self {
        Self { open: Some(open) }
    }

    fn open(&self) -> &Open {
        self.open.as_ref().unwrap_or_else(|| unreachable!("taken by calls only that consume the place"))
    }

    /// Where it is.
    pub fn at(&self) -> Placed {
        let open = self.open();
        Placed { memory: open.mapping.memory.clone(), offset: open.offset, len: open.binding.len }
    }

    /// The bytes are there, or will be at that point of a CUDA stream. Does not wait for it.
    pub fn commit(mut self, after: Option<Fence>) {
        if let Some(open) = self.open.take() {
            let now = !open.mapping.memory.is_device() && open.level != Integrity::Full && after.is_none();
            open.settle(now, move |open| {
                after.map_or(Ok(()), |fence| fence.wait())?;
                open.check()
            });
        }
    }

    /// The bytes are somewhere else after all: they are written here like any others ([`super::Reservation::write`]).
    pub fn write(mut self, source: ChunkSource) {
        if let Some(Open { session, write, mapping, .. }) = self.open.take() {
            drop(mapping);
            session.write_instead(write, source);
            part(session);
        }
    }

    /// Gives the request up, once a CUDA stream that may still write there has passed that point.
    pub fn give_up(mut self, after: Option<Fence>) {
        if let Some(open) = self.open.take() {
            open.settle(after.is_none(), move |_| {
                if let Some(fence) = after {
                    fence.wait()?;
                }
                Err(given_up())
            });
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            open.settle(true, |_| Err(given_up()));
        }
    }
}

fn given_up() -> Error {
    Error::failed(ErrorCode::Cancelled, "the chunk was given up in its place")
}

impl Open {
    /// Ends the write with what `f` says, here or on the session's thread for what takes long.
    fn settle(self, now: bool, f: impl FnOnce(&Self) -> Result<Check> + Send + 'static) {
        if now {
            let result = f(&self);
            self.end(result);
            return;
        }
        let (session, mapping) = (self.session.clone(), self.mapping.clone());
        let started = session.aside(move || {
            let result = f(&self);
            self.end(result);
        });
        if let Err(e) = started {
            // Without a thread there is no way to know when a stream has passed: the page stays mapped and taken until this process ends.
            tracing::error!(error = %e, "a chunk in its place cannot be ended");
            std::mem::forget(mapping);
        }
        part(session);
    }

    fn check(&self) -> Result<Check> {
        let runs = [(self.offset, self.binding.len)];
        let bytes = Bytes { memory: &self.mapping.memory, runs: &runs };
        Ok(match self.level {
            Integrity::Off => Check::None,
            Integrity::Bound => Check::Bound(bytes.bound(&self.binding)?),
            Integrity::Full => Check::Full(bytes.full(&self.binding)?),
        })
    }

    fn end(self, result: Result<Check>) {
        let Self { session, write, binding, kind, mapping, since, .. } = self;
        if result.is_ok() {
            session.peer().count_placed(kind, binding.len, since.elapsed());
        }
        // The mapping goes first: from the next line on the page may be anybody's.
        drop(mapping);
        session.write_ended(write, result.map_err(|e| failed(e.code(), e.to_string())));
        part(session);
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("write", &self.open().write).finish_non_exhaustive()
    }
}
