//! A small listener in place of the agent's, and helpers to move bytes and compare them.

use kvxfer_core::config::TcpConfig;
use kvxfer_core::proto::wire::HostIdentity;
use kvxfer_core::proto::{AgentName, Epoch, RegionId, TransferId};
use kvxfer_core::transport::tcp::TcpTransport;
use kvxfer_core::transport::tcp::frame::{PREAMBLE_LEN, Preamble};
use kvxfer_core::transport::{
    Job, Link, Op, PeerInfo, Piece, RemoteKey, RemoteTicket, Role, Tracker, Transport,
};
use kvxfer_core::{Integrity, Memory};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Upper bound for anything that has to happen; reached only when a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A fresh number.
pub fn fresh() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn config(streams: u16) -> TcpConfig {
    TcpConfig { streams, io_threads: 1, frame_bytes: 256 << 10, ..TcpConfig::default() }
}

/// A transport with a listener.
pub struct Node {
    pub transport: Arc<TcpTransport>,
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    pub fn new(config: &TcpConfig) -> Self {
        Self::with_timeout(config, Duration::from_secs(10))
    }

    pub fn with_timeout(config: &TcpConfig, peer_timeout: Duration) -> Self {
        let transport = Arc::new(TcpTransport::new(config, peer_timeout).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (t, s) = (transport.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if s.load(Ordering::Acquire) {
                    return;
                }
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut preamble = [0; PREAMBLE_LEN];
                if stream.read_exact(&mut preamble).is_ok()
                    && let Ok(p) = Preamble::decode(&preamble)
                {
                    t.adopt(p.session, p.lane, stream);
                }
            }
        });
        Self { transport, address, stop, thread: Some(thread) }
    }

    /// Registers memory and makes its ticket.
    pub fn export(&self, memory: &Arc<Memory>) -> Exported {
        let region = RegionId(fresh());
        self.transport.register(region, memory).unwrap();
        let ticket = self.transport.ticket(region, memory).unwrap().unwrap();
        Exported { region, len: memory.len() as u64, payload: ticket.payload }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.transport.shutdown();
        self.stop.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone)]
pub struct Exported {
    pub region: RegionId,
    pub len: u64,
    pub payload: Vec<u8>,
}

impl Exported {
    pub fn import(&self, link: &Arc<dyn Link>) -> RemoteKey {
        let Self { region, len, payload } = self.clone();
        link.import(RemoteTicket { region, len, payload, fd: None }).unwrap()
    }
}

pub fn session() -> [u8; 16] {
    let mut s = [0; 16];
    s[..8].copy_from_slice(&fresh().to_le_bytes());
    s[8..].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
    s
}

pub fn peer(role: Role, address: SocketAddr, session: [u8; 16]) -> PeerInfo {
    PeerInfo {
        name: AgentName::new("peer").unwrap(),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: String::new(),
            pid_namespace: 0,
            net_namespace: 0,
            pid: 0,
            process: 0,
            side_socket: String::new(),
        },
        same_host: true,
        same_kernel: true,
        same_process: false,
        role,
        address: Some(address),
        session,
    }
}

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Two connected nodes. `a` opened the connections, possibly through a proxy at `via`.
pub fn connect(a: &Node, b: &Node, via: Option<SocketAddr>) -> (Arc<dyn Link>, Arc<dyn Link>) {
    let session = session();
    let from_b = peer(Role::Initiator, via.unwrap_or(b.address), session);
    let from_a = peer(Role::Acceptor, a.address, session);
    let (offer_a, offer_b) = (a.transport.offer(&from_b).unwrap(), b.transport.offer(&from_a).unwrap());
    let link_b = b.transport.connect(&from_a, &offer_a, soon()).unwrap();
    let link_a = a.transport.connect(&from_b, &offer_b, soon()).unwrap();
    (link_a, link_b)
}

/// Submits a job that is accepted and returns its tracker.
pub fn start(
    link: &Arc<dyn Link>,
    op: Op,
    local: &Arc<Memory>,
    remote: RemoteKey,
    pieces: &[Piece],
    integrity: Integrity,
) -> (TransferId, Arc<Tracker>) {
    submit(link, op, local, remote, pieces, integrity).unwrap()
}

/// Submits a job.
pub fn submit(
    link: &Arc<dyn Link>,
    op: Op,
    local: &Arc<Memory>,
    remote: RemoteKey,
    pieces: &[Piece],
    integrity: Integrity,
) -> kvxfer_core::Result<(TransferId, Arc<Tracker>)> {
    let tracker = Arc::new(Tracker::new(pieces.len()));
    let transfer = TransferId(fresh());
    let job = Job {
        transfer,
        op,
        local_region: RegionId(0),
        local: local.clone(),
        remote,
        pieces: pieces.into(),
        integrity,
        after: None,
        digest: None,
        tracker: tracker.clone(),
    };
    link.submit(job)?;
    Ok((transfer, tracker))
}

pub fn wait(tracker: &Tracker) {
    assert!(tracker.wait_until(soon()), "{tracker:?} did not finish");
}

/// Waits and expects success.
pub fn good(tracker: &Tracker) {
    wait(tracker);
    assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
    assert_eq!(tracker.failed_pieces(), 0);
}

/// A repeatable stream of numbers.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 33);
        x.wrapping_mul(0xff51_afd7_ed55_8ccd) ^ (x >> 29)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Memory filled with bytes that differ everywhere.
pub fn filled(len: usize, seed: u64) -> Arc<Memory> {
    let m = Memory::anonymous(len).unwrap();
    let mut rng = Rng(seed);
    let bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.next().to_le_bytes()).take(len).collect();
    m.write_at(0, &bytes).unwrap();
    m
}

pub fn zeroed(len: usize) -> Arc<Memory> {
    Memory::anonymous(len).unwrap()
}

pub fn bytes(m: &Memory) -> Vec<u8> {
    let mut v = vec![0; m.len()];
    m.read_at(0, &mut v).unwrap();
    v
}

/// What `to` must hold after the pieces were moved from `from`.
pub fn expect(op: Op, local: &[u8], remote: &[u8], pieces: &[Piece]) -> Vec<u8> {
    let (from, mut to) = match op {
        Op::Write => (local, remote.to_vec()),
        Op::Read => (remote, local.to_vec()),
    };
    for p in pieces {
        let (mut source, mut target) = (p.local_offset as usize, p.remote_offset as usize);
        if op == Op::Read {
            std::mem::swap(&mut source, &mut target);
        }
        to[target..][..p.len as usize].copy_from_slice(&from[source..][..p.len as usize]);
    }
    to
}

/// Waits until something is true.
pub fn until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = soon();
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
