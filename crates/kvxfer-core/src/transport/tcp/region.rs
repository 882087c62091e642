//! Memory that peers may reach, and the proof a frame must carry to reach it.
//!
//! A region gets a random 64-bit capability with its first ticket. A frame must bring it back, so a peer touches only
//! regions it was given; guessing ends the connection at the first wrong try.

use super::frame::{TablePiece, Ticket};
use super::scatter::Scatter;
use crate::agent::Access;
use crate::transport::Op;
use crate::{Error, Memory, Result};
use kvxfer_proto::{ErrorCode, RegionId};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;

/// All registered regions of one agent.
#[derive(Default)]
pub(super) struct Regions(RwLock<HashMap<RegionId, Registered>>);

struct Registered {
    memory: Arc<Memory>,
    /// Zero until the first ticket: nobody can reach it.
    capability: u64,
    access: Option<Access>,
}

/// Why a frame may not touch memory.
pub(super) enum Denied {
    /// An honest peer can meet this: the frame is answered with the code.
    Refused(ErrorCode),
    /// Only a broken or hostile peer sends this: the connection ends.
    Violation(String),
}

impl Regions {
    pub(super) fn register(&self, region: RegionId, memory: &Arc<Memory>) {
        self.0.write().entry(region).or_insert_with(|| Registered {
            memory: memory.clone(),
            capability: 0,
            access: Some(Access::ReadWrite),
        });
    }

    pub(super) fn deregister(&self, region: RegionId) {
        self.0.write().remove(&region);
    }

    pub(super) fn clear(&self) {
        self.0.write().clear();
    }

    /// What peers may do from now on.
    pub(super) fn allow(&self, region: RegionId, access: Option<Access>) {
        if let Some(r) = self.0.write().get_mut(&region) {
            r.access = access;
        }
    }

    pub(super) fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Ticket> {
        self.register(region, memory);
        let mut regions = self.0.write();
        let Some(r) = regions.get_mut(&region) else {
            return Err(Error::NotFound { what: "region", name: region.to_string() });
        };
        while r.capability == 0 {
            r.capability = getrandom::u64().map_err(|e| {
                Error::system(
                    "getrandom",
                    std::io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO)),
                    "the system's random source is needed to protect exported regions",
                )
            })?;
        }
        Ok(Ticket { capability: r.capability, len: r.memory.len() as u64 })
    }

    /// The memory behind a frame's pieces, when the frame may do `op` (seen from the peer) to it.
    pub(super) fn resolve(
        &self,
        region: RegionId,
        capability: u64,
        op: Op,
        pieces: &[TablePiece],
    ) -> Result<Scatter, Denied> {
        let (memory, access) = {
            let regions = self.0.read();
            let Some(r) = regions.get(&region) else { return Err(Denied::Refused(ErrorCode::NotFound)) };
            if capability == 0 || capability != r.capability {
                return Err(Denied::Violation(format!("wrong capability for region {region}")));
            }
            (r.memory.clone(), r.access)
        };
        match (access, op) {
            (Some(Access::ReadWrite), _)
            | (Some(Access::Read), Op::Read)
            | (Some(Access::Write), Op::Write) => {}
            (None, _) => return Err(Denied::Refused(ErrorCode::NotFound)),
            _ => return Err(Denied::Refused(ErrorCode::Unsupported)),
        }
        let limit = memory.len();
        Scatter::new(memory, pieces.iter().map(|p| (p.offset, p.len))).map_err(|(offset, len)| {
            Denied::Violation(format!(
                "offset {offset} + length {len} does not lie within the {limit} bytes of region {region}"
            ))
        })
    }
}
