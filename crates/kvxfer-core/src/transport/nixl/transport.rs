//! The transport: one NIXL agent for one kvxfer agent.

use super::engine::Engine;
use super::find;
use super::keeper::Keeper;
use super::link::{NixlLink, Remote};
use super::wire::Offer;
use crate::config::{AgentConfig, NixlConfig};
use crate::transport::{Capabilities, Link, LocalTicket, PeerInfo, Transport, TransportKind};
use crate::{Error, Memory, Result};
use kvxfer_proto::{AgentName, Epoch, ErrorCode, Integrity, RegionId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Longest wait for a peer's greeting; the rest of the time is for other transports.
const GREETING: Duration = Duration::from_secs(3);

/// NIXL as a transport.
///
/// NIXL and UCX are large and keep state of the process (handlers, threads, sockets), so they are loaded and started
/// only when needed: at the first peer on another host, or at once when the configuration asks for them
/// (`nixl.same_host`, or `nixl` in `transports.allow`). Peers on the same host are offered NIXL in the second case only:
/// `shm` and `cma` are there for them.
///
/// What NIXL cannot do shows here. There is no cancel: a transfer is made of requests of at most 16 MiB, and one that
/// must end early posts no further request and ends when those under way have. There is no access control: a peer
/// that has a region's ticket may read and write it until the region is deregistered, whatever was exported, and UCX's
/// listeners accept connections from anybody who can reach their ports; use it in a trusted network. Arrival is not
/// checked below the channels: integrity `full` of a one-sided transfer is what the plug-in's wire protocol gives.
///
/// A device's memory that the backends do not take is a local side all the same (`staged`), but no remote one: it has no ticket.
pub struct NixlTransport {
    /// Name of the NIXL agent, unique among all that may meet.
    name: String,
    config: NixlConfig,
    asked_for: bool,
    inline_bytes: u64,
    running: OnceLock<Running>,
    /// Guards the start, and knows the regions registered before it.
    regions: Mutex<HashMap<RegionId, Arc<Memory>>>,
    keeper: Keeper,
    closed: AtomicBool,
}

/// What exists once NIXL has been started.
struct Running {
    engine: Arc<Engine>,
    library: find::Library,
    rdma: bool,
}

/// [`NixlTransport::new`] as the agent wants it; exists, and fails, in builds without the feature as well.
pub fn start(name: &AgentName, epoch: Epoch, config: &AgentConfig) -> Result<Arc<dyn Transport>> {
    Ok(NixlTransport::new(name, epoch, config)?)
}

impl NixlTransport {
    /// Fails with [`ErrorCode::NotAvailable`] when NIXL is not there; when the configuration asks for NIXL, also when
    /// it is not fit or a backend cannot be made.
    pub fn new(name: &AgentName, epoch: Epoch, config: &AgentConfig) -> Result<Arc<Self>> {
        let depth = config.nixl.staging_depth;
        if !(1..=64).contains(&depth) {
            return Err(Error::InvalidArgument {
                argument: "nixl.staging_depth",
                problem: format!("{depth} is not within 1 to 64"),
            });
        }
        let asked_for = config.nixl.same_host || config.transports.allow.contains(&TransportKind::Nixl);
        let transport = Arc::new(Self {
            name: format!("{name}/{epoch}"),
            config: config.nixl.clone(),
            asked_for,
            inline_bytes: config.inline_bytes,
            running: OnceLock::new(),
            regions: Mutex::default(),
            keeper: Keeper::default(),
            closed: AtomicBool::new(false),
        });
        if asked_for {
            transport.run()?;
        } else {
            find::glance(&config.nixl)?;
        }
        Ok(transport)
    }

    /// Starts NIXL unless it runs.
    fn run(&self) -> Result<&Running> {
        if let Some(running) = self.running.get() {
            return Ok(running);
        }
        let regions = self.regions.lock();
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::failed(ErrorCode::Closed, "the agent was shut down"));
        }
        if self.running.get().is_none() {
            let library = find::load(&self.config)?;
            let engine = Engine::new(self.name.clone(), &self.config)?;
            for (id, memory) in regions.iter() {
                engine.register(*id, memory)?;
            }
            let _ = self.running.set(Running { engine, library, rdma: rdma_here() });
        }
        drop(regions);
        self.running
            .get()
            .ok_or_else(|| Error::failed(ErrorCode::NotAvailable, "NIXL not available: it did not start"))
    }

    fn engine(&self) -> Option<&Arc<Engine>> {
        self.running.get().map(|r| &r.engine)
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
            other_pid_namespace: false,
            verifies_arrival: false,
            fuses_digest: false,
            needs_poll: true,
            device_memory: true,
            follows_streams: false,
            default_integrity: Integrity::Full,
        }
    }

    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        if peer.same_host && !self.asked_for {
            return None;
        }
        let offer = self.run().and_then(|running| {
            let metadata = running.engine.connection_metadata()?;
            Ok(Offer { name: self.name.clone(), rdma: running.rdma, metadata }.encode())
        });
        match offer {
            Ok(offer) => Some(offer),
            Err(error) => {
                tracing::warn!(%error, peer = %peer.name, "no nixl offer");
                None
            }
        }
    }

    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        if !memory.is_device() || self.engine().is_some() {
            self.register(region, memory)?;
        }
        let payload = self.engine().and_then(|engine| engine.ticket(region));
        Ok(payload.map(|payload| LocalTicket { payload: payload.to_vec(), fd: None }))
    }

    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        // The lock keeps a start from missing it.
        let mut regions = self.regions.lock();
        if let Some(engine) = self.engine() {
            engine.register(region, memory)?;
        }
        regions.insert(region, Arc::clone(memory));
        Ok(())
    }

    fn deregister(&self, region: RegionId) {
        let mut regions = self.regions.lock();
        if let Some(engine) = self.engine() {
            engine.deregister(region);
        }
        regions.remove(&region);
    }

    fn connect(&self, peer: &PeerInfo, offer: &[u8], deadline: Instant) -> Result<Arc<dyn Link>> {
        let start = Instant::now();
        let offer = Offer::decode(offer)?;
        let running = self.run()?;
        let engine = &running.engine;
        if offer.name == self.name {
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
        let under = self.under(running, peer, &offer);
        let description = self.describe(running, under);
        let needs_help = matches!(under, Under::Sockets | Under::Unknown);
        // From here on dropping the link takes back what was done.
        let link = NixlLink::new(
            Arc::clone(engine),
            remote,
            offer.metadata,
            self.inline_bytes,
            description,
            needs_help,
        );
        link.connect()?;
        self.keeper.attend(engine).map_err(|e| {
            Error::system("start the thread kvxfer-nixl", e, "check the limit on threads (ulimit -u)")
        })?;
        let until = deadline.min(start + GREETING);
        if !engine.greet(&offer.name, peer.session, until)? {
            return Err(Error::failed(
                ErrorCode::Unreachable,
                format!(
                    "{} did not answer over NIXL ({}) within {:?}; check UCX_TLS and UCX_NET_DEVICES on both sides and that \
                     no firewall is between them",
                    peer.name,
                    self.config.backends.join("+"),
                    until - start
                ),
            ));
        }
        Ok(Arc::new(link))
    }

    fn poll(&self) -> bool {
        self.engine().is_some_and(|engine| engine.poll())
    }

    fn shutdown(&self) {
        self.closed.store(true, Ordering::Release);
        self.keeper.stop();
        // A start that is under way ends first.
        self.regions.lock().clear();
        if let Some(engine) = self.engine() {
            engine.shutdown();
        }
    }
}

impl NixlTransport {
    /// What a connection to that peer runs over. NIXL does not say: UCX takes CMA before RDMA and RDMA before sockets
    /// where both sides have it and `UCX_TLS` does not forbid it.
    fn under(&self, running: &Running, peer: &PeerInfo, offer: &Offer) -> Under {
        if self.config.backends != ["UCX"] {
            Under::Unknown
        } else if peer.same_host && ucx_may_use(&["cma", "sm", "shm"]) {
            Under::Cma
        } else if running.rdma && offer.rdma {
            Under::Rdma
        } else {
            Under::Sockets
        }
    }

    fn describe(&self, running: &Running, under: Under) -> String {
        let version = running.library.version.as_deref().map(|v| format!(" {v}")).unwrap_or_default();
        let under = match under {
            Under::Cma => ", cma",
            Under::Rdma => ", rdma",
            Under::Sockets => ", sockets",
            Under::Unknown => "",
        };
        format!("NIXL{version} {}{under}", self.config.backends.join("+"))
    }
}

/// What carries the bytes below NIXL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Under {
    Cma,
    Rdma,
    Sockets,
    Unknown,
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
    let inside = |path: &Path| {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>()
    };
    ucx_may_use(&["ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5"])
        && inside("/sys/class/infiniband".as_ref())
            .iter()
            .flat_map(|device| inside(&device.join("ports")))
            .any(|port| std::fs::read_to_string(port.join("state")).is_ok_and(|s| s.contains("ACTIVE")))
}

/// `UCX_TLS` allows one of these.
fn ucx_may_use(transports: &[&str]) -> bool {
    std::env::var("UCX_TLS").map_or(true, |tls| allowed(&tls, transports))
}

fn allowed(tls: &str, transports: &[&str]) -> bool {
    let (list, negated) = tls.strip_prefix('^').map_or((tls, false), |rest| (rest, true));
    let named = list.split(',').map(str::trim).any(|t| t == "all" || transports.contains(&t));
    named != negated
}

#[cfg(test)]
mod tests {
    use super::allowed;

    #[test]
    fn ucx_tls_is_read_as_ucx_does() {
        let cma = ["cma", "sm", "shm"];
        for (tls, may) in [
            ("all", true),
            ("tcp", false),
            ("tcp, cma", true),
            ("sm,rc", true),
            ("^tcp", true),
            ("^sm", false),
        ] {
            assert_eq!(allowed(tls, &cma), may, "{tls}");
        }
    }
}
