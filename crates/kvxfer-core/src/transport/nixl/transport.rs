//! The transport: one NIXL agent for one kvxfer agent.

use super::engine::Engine;
use super::find;
use super::keeper::Keeper;
use super::link::{Imports, NixlLink, Remote};
use super::wire::Offer;
use crate::config::AgentConfig;
use crate::transport::{Capabilities, Link, LocalTicket, PeerInfo, Transport, TransportKind};
use crate::{Error, Memory, Result};
use kvxfer_proto::{AgentName, Epoch, ErrorCode, Integrity, RegionId};
use parking_lot::Mutex;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for a peer's greeting; the rest of the time is for other transports.
const GREETING: Duration = Duration::from_secs(3);

/// NIXL as a transport.
///
/// What NIXL cannot do shows here. There is no cancel: a transfer is made of requests of at most 16 MiB, and one that
/// must end early posts no further request and ends when those under way have. There is no access control: a peer
/// that has a region's ticket may read and write it until the region is deregistered, whatever was exported, and UCX's
/// listeners accept connections from anybody who can reach their ports; use it in a trusted network. Arrival is not
/// checked below the channels: integrity `full` of a one-sided transfer is what the plug-in's wire protocol gives.
pub struct NixlTransport {
    engine: Arc<Engine>,
    keeper: Keeper,
    inline_bytes: u64,
    rdma: bool,
    library: find::Library,
    backends: String,
}

/// [`NixlTransport::new`] as the agent wants it; exists, and fails, in builds without the feature as well.
pub fn start(name: &AgentName, epoch: Epoch, config: &AgentConfig) -> Result<Arc<dyn Transport>> {
    Ok(NixlTransport::new(name, epoch, config)?)
}

impl NixlTransport {
    /// Loads NIXL if need be and makes the agent with its backends. Fails with [`ErrorCode::NotAvailable`] when NIXL
    /// is not there, is not fit, or a backend cannot be made.
    pub fn new(name: &AgentName, epoch: Epoch, config: &AgentConfig) -> Result<Arc<Self>> {
        let library = find::load(&config.nixl)?;
        let engine = Engine::new(format!("{name}/{epoch}"), &config.nixl)?;
        Ok(Arc::new(Self {
            engine,
            keeper: Keeper::default(),
            inline_bytes: config.inline_bytes,
            rdma: rdma_here(),
            library,
            backends: config.nixl.backends.join("+"),
        }))
    }

    /// The library it runs on.
    pub fn library(&self) -> &find::Library {
        &self.library
    }
}

impl Transport for NixlTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Nixl
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: false,
            same_host: false,
            verifies_arrival: false,
            fuses_digest: false,
            needs_poll: true,
            default_integrity: Integrity::Full,
        }
    }

    fn offer(&self, _peer: &PeerInfo) -> Option<Vec<u8>> {
        match self.engine.connection_metadata() {
            Ok(metadata) => {
                Some(Offer { name: self.engine.name.clone(), rdma: self.rdma, metadata }.encode())
            }
            Err(error) => {
                tracing::warn!(%error, "no nixl offer");
                None
            }
        }
    }

    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        self.register(region, memory)?;
        Ok(self.engine.ticket(region).map(|payload| LocalTicket { payload: payload.to_vec(), fd: None }))
    }

    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        self.engine.register(region, memory)
    }

    fn deregister(&self, region: RegionId) {
        self.engine.deregister(region);
    }

    fn connect(&self, peer: &PeerInfo, offer: &[u8], deadline: Instant) -> Result<Arc<dyn Link>> {
        let start = Instant::now();
        let offer = Offer::decode(offer)?;
        if offer.name == self.engine.name {
            return Err(Error::failed(
                ErrorCode::Mismatch,
                format!(
                    "{} and this agent both call their NIXL agent {:?}; give them different names",
                    peer.name, offer.name
                ),
            ));
        }
        let process = if peer.same_host { process_of(peer.host.pid) } else { None };
        let remote = Arc::new(Remote::new(peer.name.clone(), offer.name.clone(), peer.session, process));
        self.engine.link_begins();
        let link = NixlLink {
            engine: Arc::clone(&self.engine),
            remote,
            description: self.describe(peer, &offer),
            offer: offer.metadata,
            imports: Mutex::new(Imports::default()),
            inline_bytes: self.inline_bytes,
        };
        // From here on dropping the link takes back what was done.
        self.engine.load(&offer.name, &link.offer)?;
        self.keeper.attend(&self.engine).map_err(|e| {
            Error::system("start the thread kvxfer-nixl", e, "check the limit on threads (ulimit -u)")
        })?;
        let until = deadline.min(start + GREETING);
        if !self.engine.greet(&offer.name, peer.session, until)? {
            return Err(Error::failed(
                ErrorCode::Unreachable,
                format!(
                    "{} did not answer over NIXL ({}) within {:?}; check UCX_TLS and UCX_NET_DEVICES on both sides and that \
                     no firewall is between them",
                    peer.name,
                    self.backends,
                    until - start
                ),
            ));
        }
        Ok(Arc::new(link))
    }

    fn poll(&self) -> bool {
        self.engine.poll()
    }

    fn shutdown(&self) {
        self.keeper.stop();
        self.engine.shutdown();
    }
}

impl NixlTransport {
    /// NIXL does not say which of UCX's transports carries a connection. UCX takes RDMA before sockets, and CMA
    /// before both within a host; so between hosts that both have a usable RDMA port it is RDMA.
    fn describe(&self, peer: &PeerInfo, offer: &Offer) -> String {
        let under = if peer.same_host {
            ""
        } else if self.rdma && offer.rdma {
            ", rdma"
        } else {
            ", sockets"
        };
        let version = self.library.version.as_deref().map(|v| format!(" {v}")).unwrap_or_default();
        format!("NIXL{version} {}{under}", self.backends)
    }
}

impl Drop for NixlTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A handle that tells when the process has ended; the peer is alive now, its control connection is open.
fn process_of(pid: u32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// An RDMA port is active here and `UCX_TLS` does not keep UCX from it.
fn rdma_here() -> bool {
    let allowed = std::env::var("UCX_TLS").map_or(true, |tls| {
        let named = tls.trim_start_matches('^').split(',').any(|t| {
            matches!(
                t.trim(),
                "all" | "ib" | "rc" | "rc_v" | "rc_x" | "rc_verbs" | "rc_mlx5" | "dc" | "dc_x" | "dc_mlx5"
            )
        });
        named != tls.starts_with('^')
    });
    let folders = |path: &std::path::Path| {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>()
    };
    allowed
        && folders("/sys/class/infiniband".as_ref())
            .iter()
            .flat_map(|device| folders(&device.join("ports")))
            .any(|port| std::fs::read_to_string(port.join("state")).is_ok_and(|s| s.contains("ACTIVE")))
}
