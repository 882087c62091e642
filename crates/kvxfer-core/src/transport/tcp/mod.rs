//! `tcp`: several sockets per peer, bytes straight from and into registered memory.
//!
//! The side that opened the control connection also opens the data connections, to the same address; each starts
//! with a [`frame::Preamble`] by which the other side's listener knows the peer and hands the socket over
//! ([`Transport::adopt`]). From then on both sides are equal: each may write and read. Jobs are cut into frames
//! (`job`); whichever stream can send takes the next frame of the job whose turn it is (`link`), so a transfer
//! is striped over the streams and several transfers share them fairly. A frame carries many small pieces or a part
//! of a large one. The kernel copies between sockets and the registered memory itself (`scatter`); host memory is not
//! staged. Device memory passes through pinned slots, frame by frame: while a frame is sent the next ones are copied from the
//! device, and while one is received those before it are copied to the device. Each stream is a pair of small state machines (`lane`) driven by an I/O thread (`engine`).
//!
//! Writes are acknowledged frame by frame after the bytes have arrived and passed their check. Answers go ahead of
//! new frames and receiving never waits for sending, so two sides that saturate each other cannot block each other.
//! What a peer may touch is decided by `region`; a frame that breaks the rules ends that peer's link and nothing else.

mod engine;
pub mod frame;
mod job;
mod lane;
mod link;
mod receive;
mod region;
mod scatter;
mod send;

use super::{Capabilities, Link, LocalTicket, PeerInfo, Role, Transport, TransportKind};
use crate::agent::Access;
use crate::config::TcpConfig;
use crate::cuda::Staging;
use crate::{Error, Memory, Result};
use engine::Engine;
use frame::{MAX_PAYLOAD, MAX_STREAMS, Offer, Preamble};
use kvxfer_proto::{ErrorCode, Integrity, RegionId};
use link::{Inner, TcpLink};
use parking_lot::RwLock;
use region::Regions;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The transport of one agent. Threads start with the first link and end with [`Transport::shutdown`] or the last handle.
pub struct TcpTransport {
    config: TcpConfig,
    peer_timeout: Duration,
    regions: Arc<Regions>,
    engine: Arc<Engine>,
    staging: Arc<Staging>,
    listening: RwLock<Vec<SocketAddr>>,
}

/// How long an I/O thread looks around after small messages before it sleeps, unless said otherwise.
const SPIN: Duration = Duration::from_micros(20);

impl TcpTransport {
    /// Checks the settings. A peer that does not take bytes for `peer_timeout` is gone.
    pub fn new(config: &TcpConfig, peer_timeout: Duration) -> Result<Self> {
        let check = |argument, value: u64, allowed: std::ops::RangeInclusive<u64>| {
            if allowed.contains(&value) {
                return Ok(());
            }
            let problem = format!("{value}; {} to {} are allowed", allowed.start(), allowed.end());
            Err(Error::InvalidArgument { argument, problem })
        };
        check("tcp.streams", config.streams.into(), 1..=MAX_STREAMS.into())?;
        check("tcp.io_threads", config.io_threads as u64, 1..=64)?;
        check("tcp.staging_depth", config.staging_depth as u64, 1..=64)?;
        check("tcp.frame_bytes", config.frame_bytes.into(), 4096..=MAX_PAYLOAD.into())?;
        Ok(Self {
            config: config.clone(),
            peer_timeout,
            regions: Arc::default(),
            staging: Arc::default(),
            engine: Engine::new(config.io_threads, SPIN),
            listening: RwLock::default(),
        })
    }

    /// Sets how long an I/O thread looks around after small messages before it sleeps ([`crate::AgentConfig::spin`]); zero:
    /// it sleeps at once. For a new transport: links of an earlier setting are lost.
    pub fn spinning(mut self, spin: Duration) -> Self {
        self.engine.shutdown();
        self.engine = Engine::new(self.config.io_threads, spin);
        self
    }
}

/// Where data connections may go, best first.
fn candidates(peer: &PeerInfo, offer: &Offer) -> Result<Vec<SocketAddr>> {
    let listed = offer.addresses.iter().copied().filter_map(|mut a| {
        if a.ip().is_unspecified() {
            // Bound to every address: without a control connection over TCP only the loopback is known.
            if !peer.same_host {
                return None;
            }
            a.set_ip(if a.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        Some(a)
    });
    let found: Vec<_> = match peer.address {
        Some(address) => vec![address],
        None => listed.collect(),
    };
    if found.is_empty() {
        let text = format!(
            "{} was not reached over TCP and offers no address: let it listen on tcp://, or forbid tcp",
            peer.name
        );
        return Err(Error::failed(ErrorCode::Unreachable, text));
    }
    Ok(found)
}

/// Opens a data connection to the first address that answers.
fn open_first(addresses: &[SocketAddr], preamble: Preamble, deadline: Instant) -> Result<TcpStream> {
    let (last, others) = addresses
        .split_last()
        .ok_or_else(|| Error::NotFound { what: "address", name: "none was offered".into() })?;
    for address in others {
        match open(*address, preamble, deadline) {
            Ok(stream) => return Ok(stream),
            Err(e) => tracing::debug!(%address, error = %e, "tcp data connection: next address"),
        }
    }
    open(*last, preamble, deadline)
}

/// Opens one data connection.
fn open(address: SocketAddr, preamble: Preamble, deadline: Instant) -> Result<TcpStream> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timed_out = || Error::TimedOut { operation: format!("connect to {address}"), after: left };
    if left.is_zero() {
        return Err(timed_out());
    }
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => timed_out(),
        _ => {
            let advice = advice(&e);
            Error::system(format!("connect to {address}"), e, advice)
        }
    };
    let mut stream = TcpStream::connect_timeout(&address, left).map_err(failed)?;
    stream.set_write_timeout(Some(left)).map_err(failed)?;
    stream.write_all(&preamble.encode()).map_err(failed)?;
    Ok(stream)
}

fn advice(e: &std::io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n) or lower tcp.streams",
        Some(libc::ECONNREFUSED) => "nothing listens there: check the peer's address and that it runs",
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => "no route: check the network and the peer's address",
        Some(libc::EADDRNOTAVAIL) => {
            "no local port is free: fewer connections, or a wider ip_local_port_range"
        }
        _ => "check the network between the hosts",
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: false,
            same_host: false,
            other_pid_namespace: false,
            verifies_arrival: true,
            fuses_digest: false,
            needs_poll: false,
            device_memory: true,
            follows_streams: false,
            default_integrity: Integrity::Full,
        }
    }

    fn offer(&self, peer: &PeerInfo) -> Option<Vec<u8>> {
        let addresses = self.listening.read().clone();
        // The side that was connected to must have an address that data connections can go to.
        let reachable = peer.role == Role::Initiator || peer.address.is_some() || !addresses.is_empty();
        reachable.then(|| Offer { streams: self.config.streams, addresses }.encode())
    }

    fn listening(&self, addresses: &[SocketAddr]) {
        *self.listening.write() = addresses.to_vec();
    }

    fn ticket(&self, region: RegionId, memory: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        let ticket = self.regions.ticket(region, memory)?;
        Ok(Some(LocalTicket { payload: ticket.encode(), fd: None }))
    }

    fn register(&self, region: RegionId, memory: &Arc<Memory>) -> Result<()> {
        self.regions.register(region, memory);
        Ok(())
    }

    fn allow(&self, region: RegionId, access: Option<Access>) {
        self.regions.allow(region, access);
    }

    fn deregister(&self, region: RegionId) {
        self.regions.deregister(region);
    }

    fn connect(&self, peer: &PeerInfo, offer: &[u8], deadline: Instant) -> Result<Arc<dyn Link>> {
        let offer = Offer::decode(offer)
            .map_err(|e| Error::failed(ErrorCode::Protocol, format!("offer of {}: {e}", peer.name)))?;
        let link = Inner::new(
            peer.name.to_string(),
            peer.session,
            &TcpConfig { streams: offer.streams.min(self.config.streams), ..self.config.clone() },
            self.peer_timeout,
            self.staging.clone(),
            self.regions.clone(),
            self.engine.clone(),
        );
        // From here on an early return drops the handle, which closes the link and what it holds.
        let handle = TcpLink(link.clone());
        if peer.role == Role::Initiator {
            let mut address = None;
            for lane in 0..link.streams {
                let preamble = Preamble { session: peer.session, lane };
                let stream = match address {
                    Some(address) => open(address, preamble, deadline)?,
                    None => open_first(&candidates(peer, &offer)?, preamble, deadline)?,
                };
                address = stream.peer_addr().ok();
                link.add_lane(lane, stream)?;
            }
        }
        self.engine.admit(&link, deadline)?;
        Ok(Arc::new(handle))
    }

    fn adopt(&self, session: [u8; 16], lane: u16, stream: TcpStream) {
        self.engine.adopt(session, lane, stream);
    }

    fn shutdown(&self) {
        self.engine.shutdown();
        self.regions.clear();
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}
