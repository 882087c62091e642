//! NIXL with as little around it as possible: the baseline that `kvxfer bench` compares the `nixl` transport with.
//!
//! One agent, no progress thread, one request per call, waiting by polling. Nothing is split, checked, cancelled or
//! timed beyond the deadline of [`Bare::transfer`]. The side that is written to or read from must call
//! [`Bare::progress`] in a loop while the other side transfers: NIXL moves some messages through its worker.

use super::RemotePlace;
use super::agent::{create_agent, failed, only_backend, place_of, place_on, register, xfer_list};
use crate::config::NixlConfig;
use crate::transport::{Op, Piece};
use crate::{Error, Memory, Result};
use nixl_sys::{Agent, Backend, NotificationMap, RegistrationHandle, XferOp};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A NIXL agent and its registrations. Not for use from several threads at once.
pub struct Bare {
    // Dropped in this order: registrations go before the memory they cover, the agent last.
    registrations: Vec<RegistrationHandle>,
    memories: Vec<Arc<Memory>>,
    backends: Vec<Backend>,
    agent: Agent,
}

impl Bare {
    /// Loads NIXL if need be and makes an agent called `name` (unique among those it talks to) with the configured backends.
    pub fn new(name: &str, config: &NixlConfig) -> Result<Self> {
        let (agent, backends) = create_agent(name, config)?;
        Ok(Self { registrations: Vec::new(), memories: Vec::new(), backends, agent })
    }

    /// Registers memory, the host's or a device's; it stays registered as long as this value lives.
    pub fn register(&mut self, memory: &Arc<Memory>) -> Result<()> {
        let handle = register(&self.agent, &self.backends, memory, (memory.as_ptr() as usize, memory.len()))?;
        self.registrations.push(handle);
        self.memories.push(Arc::clone(memory));
        Ok(())
    }

    /// What a peer needs to reach everything registered so far; bytes to be carried over by any means.
    pub fn metadata(&self) -> Result<Vec<u8>> {
        self.agent.get_local_md().map_err(|e| failed("get_local_md", &e))
    }

    /// Makes the peer behind `metadata` reachable and answers with its name.
    pub fn connect(&mut self, metadata: &[u8]) -> Result<String> {
        self.agent.load_remote_md(metadata).map_err(|e| failed("load_remote_md", &e))
    }

    /// Moves `pieces` between `local` (registered) and memory of `peer`, with one request, and polls until it has ended. Offsets are
    /// not checked here; NIXL refuses what is not registered.
    pub fn transfer(
        &self,
        op: Op,
        local: &Memory,
        peer: &str,
        remote: RemotePlace,
        pieces: &[Piece],
        timeout: Duration,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let base = local.as_ptr() as u64;
        let (kind, device) = place_of(local);
        let (far_kind, far_device) = place_on(remote.device);
        let mut locals = xfer_list(kind)?;
        let mut remotes = xfer_list(far_kind)?;
        for piece in pieces {
            locals.add_desc((base + piece.local_offset) as usize, piece.len as usize, device);
            remotes.add_desc((remote.address + piece.remote_offset) as usize, piece.len as usize, far_device);
        }
        let args = only_backend(&self.backends, &self.backends[0])?;
        let direction = match op {
            Op::Write => XferOp::Write,
            Op::Read => XferOp::Read,
        };
        let request = self
            .agent
            .create_xfer_req(direction, &locals, &remotes, peer, args.as_ref())
            .map_err(|e| failed("create_xfer_req", &e))?;
        let mut moving = self.agent.post_xfer_req(&request, None).map_err(|e| failed("post_xfer_req", &e))?;
        while moving {
            moving = !self
                .agent
                .get_xfer_status(&request)
                .map_err(|e| failed("get_xfer_status", &e))?
                .is_success();
            if moving && Instant::now() > deadline {
                return Err(Error::TimedOut { operation: "a bare NIXL transfer".into(), after: timeout });
            }
        }
        Ok(())
    }

    /// Takes NIXL down.
    pub fn close(self) {
        drop(self);
    }

    /// Lets NIXL do what peers asked for; to be called in a loop by the passive side.
    pub fn progress(&self) -> Result<()> {
        let mut notifications = NotificationMap::new().map_err(|e| failed("create_notif_map", &e))?;
        self.agent.get_notifications(&mut notifications, None).map_err(|e| failed("get_notifs", &e))
    }
}
