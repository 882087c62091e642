//! Registered memory: ours, and what peers have exported to us.

use super::peer::PeerInner;
use super::state::Inner;
use super::{Access, Region, RemoteRegion, choose, identity};
use crate::transport::{LocalTicket, Mapping, RemoteKey, RemoteTicket, TransportKind};
use crate::{Error, Memory, Result};
use kvxfer_proto::wire::{RegionAdvert, Ticket};
use kvxfer_proto::{ErrorCode, RegionId};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One registration; taken back when the last user handle, export and transfer are gone.
pub(crate) struct RegionInner {
    pub(crate) agent: Arc<Inner>,
    pub(crate) id: RegionId,
    pub(crate) memory: Arc<Memory>,
    /// Transports that took it, and those that did not with the reason.
    pub(crate) usable: Vec<TransportKind>,
    refused: Vec<(TransportKind, String)>,
    /// Of a peer's memory: what its link wants alive meanwhile.
    _held: Option<Arc<dyn std::any::Any + Send + Sync>>,
}

impl RegionInner {
    /// Registers `memory` with every transport that takes it.
    pub(crate) fn register(agent: &Arc<Inner>, memory: Arc<Memory>) -> Result<Arc<Self>> {
        Self::register_mapped(agent, Mapping { memory, held: None })
    }

    /// The same for a peer's memory.
    pub(crate) fn register_mapped(agent: &Arc<Inner>, mapping: Mapping) -> Result<Arc<Self>> {
        let id = RegionId(agent.id());
        let Mapping { memory, held } = mapping;
        let mut region =
            Self { agent: agent.clone(), id, memory, usable: Vec::new(), refused: Vec::new(), _held: held };
        for slot in &agent.slots {
            let registered = if region.memory.is_device() && !slot.caps.device_memory {
                Err(Error::failed(ErrorCode::Unsupported, "moves host memory only, this is a GPU's"))
            } else {
                slot.transport.register(id, &region.memory)
            };
            match registered {
                Ok(()) => region.usable.push(slot.kind),
                Err(e) => {
                    tracing::debug!(transport = %slot.kind, region = %id, error = %e, "not registered");
                    region.refused.push((slot.kind, e.to_string()));
                }
            }
        }
        if region.usable.is_empty() {
            let reasons: Vec<_> = region.refused.iter().map(|(k, r)| format!("{k}: {r}")).collect();
            return Err(Error::failed(
                ErrorCode::Unsupported,
                format!(
                    "no transport takes {:?} memory of {} bytes ({})",
                    region.memory.kind(),
                    region.memory.len(),
                    if reasons.is_empty() { "none is enabled".to_owned() } else { reasons.join("; ") }
                ),
            ));
        }
        Ok(Arc::new(region))
    }

    pub(crate) fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// What `peer` must know to reach this region. Descriptors go ahead over the side socket.
    pub(crate) fn advert(self: &Arc<Self>, peer: &PeerInner, name: &str, access: Access) -> RegionAdvert {
        let mut tickets = Vec::new();
        for path in &peer.paths {
            let kind = path.candidate.kind;
            let Some(slot) = self.agent.slot(kind).filter(|_| self.usable.contains(&kind)) else { continue };
            let made = slot.transport.ticket(self.id, &self.memory).and_then(|t| match t {
                None => Ok(None),
                Some(LocalTicket { payload, fd }) => {
                    let fd_label = match &fd {
                        None => 0,
                        Some(fd) => peer.pass(fd.as_fd())?,
                    };
                    Ok(Some(Ticket { transport: kind.as_str().into(), payload, fd_label }))
                }
            });
            match made {
                Ok(ticket) => tickets.extend(ticket),
                Err(e) if kind == TransportKind::CudaIpc => {
                    tracing::warn!(peer = %peer.info.name, region = name, error = %e, "not offered over cuda_ipc");
                }
                Err(e) => tracing::debug!(peer = %peer.info.name, transport = %kind, error = %e, "no ticket"),
            }
        }
        RegionAdvert {
            id: self.id,
            name: name.to_owned(),
            len: self.len(),
            readable: matches!(access, Access::Read | Access::ReadWrite),
            writable: matches!(access, Access::Write | Access::ReadWrite),
            tickets,
        }
    }
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        if identity::forked_since(self.agent.made_in) {
            // The registration is the parent's. Keep the child's copy of the agent from ever being torn down.
            std::mem::forget(self.agent.clone());
            return;
        }
        for kind in &self.usable {
            if let Some(slot) = self.agent.slot(*kind) {
                slot.transport.deregister(self.id);
            }
        }
    }
}

impl Region {
    /// Its id.
    pub fn id(&self) -> RegionId {
        self.inner.id
    }
    /// Its memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.inner.memory
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.len()
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// Transports this memory is registered with.
    pub fn transports(&self) -> Vec<TransportKind> {
        self.inner.usable.clone()
    }
    /// Transports that refused this memory, each with the reason.
    pub fn refused(&self) -> &[(TransportKind, String)] {
        &self.inner.refused
    }
    /// True while a clone, an export or a transfer still uses it: dropping this handle would not end the registration.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("id", &self.inner.id).field("len", &self.len()).finish_non_exhaustive()
    }
}

/// A peer's region as imported on the transports that reach it.
pub(crate) struct RemoteInner {
    pub(crate) peer: Arc<PeerInner>,
    pub(crate) made_in: u32,
    pub(crate) id: RegionId,
    pub(crate) name: String,
    pub(crate) len: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Index of the path and the key on it, in the paths' order.
    pub(crate) keys: Vec<(usize, RemoteKey)>,
    /// Transports that could not import it, with the reason.
    pub(crate) refused: Vec<(TransportKind, String)>,
    pub(crate) revoked: AtomicBool,
}

impl RemoteInner {
    /// Imports what the peer has told of a region; at least one transport must take its ticket.
    pub(crate) fn import(agent: &Inner, peer: &Arc<PeerInner>, advert: &RegionAdvert) -> Result<Arc<Self>> {
        if advert.len == 0 {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!("the peer's region {:?} is empty", advert.name),
            ));
        }
        let deadline = Instant::now()
            + if agent.reactor.is_progress_thread() {
                // The descriptor was sent before the message that brought us here.
                Duration::from_millis(100)
            } else {
                Duration::from_secs(2)
            };
        let mut refused = Vec::new();
        let mut keys = Vec::new();
        for ticket in &advert.tickets {
            let Some((index, path)) =
                peer.paths.iter().enumerate().find(|(_, p)| p.candidate.kind.as_str() == ticket.transport)
            else {
                continue;
            };
            if !choose::satisfies(&agent.config.transports, path.candidate) {
                refused
                    .push((path.candidate.kind, "not among the required ones (transports.require)".into()));
                continue;
            }
            if keys.iter().any(|(i, _)| *i == index) {
                continue;
            }
            let imported = (|| {
                let fd = match (ticket.fd_label, peer.side()) {
                    (0, _) => None,
                    (label, Some(side)) => side.take(label, deadline)?,
                    (_, None) => {
                        return Err(Error::failed(
                            ErrorCode::Protocol,
                            "a descriptor was named without a side socket",
                        ));
                    }
                };
                path.link.import(RemoteTicket {
                    region: advert.id,
                    len: advert.len,
                    payload: ticket.payload.clone(),
                    fd,
                })
            })();
            match imported {
                Ok(key) => keys.push((index, key)),
                Err(e) => {
                    if path.candidate.kind == TransportKind::CudaIpc {
                        // Other ways are much slower: whoever wonders why finds it here.
                        tracing::warn!(peer = %peer.info.name, region = advert.name, error = %e, "not reached by cuda_ipc");
                    }
                    tracing::debug!(peer = %peer.info.name, transport = ticket.transport, error = %e, "not imported");
                    refused.push((path.candidate.kind, e.to_string()));
                }
            }
        }
        keys.sort_by_key(|(index, _)| *index);
        if keys.is_empty() {
            let reasons: Vec<_> = refused.iter().map(|(k, r)| format!("{k}: {r}")).collect();
            let required = !agent.config.transports.require.is_empty();
            return Err(Error::failed(
                if required { ErrorCode::Requirement } else { ErrorCode::NotAvailable },
                format!(
                    "no connected transport reaches region {:?} of agent {:?} ({})",
                    advert.name,
                    peer.info.name.as_str(),
                    if reasons.is_empty() {
                        "the peer gave no ticket for one".to_owned()
                    } else {
                        reasons.join("; ")
                    }
                ),
            ));
        }
        let region = Arc::new(Self {
            peer: peer.clone(),
            made_in: agent.made_in,
            id: advert.id,
            name: advert.name.clone(),
            len: advert.len,
            readable: advert.readable,
            writable: advert.writable,
            keys,
            refused,
            revoked: AtomicBool::new(false),
        });
        peer.remember(&region);
        Ok(region)
    }
}

impl Drop for RemoteInner {
    fn drop(&mut self) {
        if identity::forked_since(self.made_in) {
            std::mem::forget(self.peer.clone());
            return;
        }
        for (index, key) in &self.keys {
            self.peer.paths[*index].link.forget(*key);
        }
    }
}

impl RemoteRegion {
    /// The name it is exported under.
    pub fn name(&self) -> &str {
        &self.inner.name
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.len
    }
    /// Never true.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// False once the peer has taken the export back or is gone.
    pub fn is_valid(&self) -> bool {
        !self.inner.revoked.load(Ordering::Acquire) && self.inner.peer.is_up()
    }
    /// Transports that reach it, best first.
    pub fn transports(&self) -> Vec<TransportKind> {
        self.inner.keys.iter().map(|(i, _)| self.inner.peer.paths[*i].candidate.kind).collect()
    }
    /// Transports that could not import it, each with the reason.
    pub fn refused(&self) -> &[(TransportKind, String)] {
        &self.inner.refused
    }
}

impl std::fmt::Debug for RemoteRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteRegion")
            .field("peer", &self.inner.peer.info.name.as_str())
            .field("name", &self.inner.name)
            .field("len", &self.inner.len)
            .finish_non_exhaustive()
    }
}
