//! For the transports' tests: jobs, and a second real process that serves one region.
//!
//! The second process is this test binary again, told by an environment variable to run one function. It talks over a
//! socket pair that is its standard input; descriptors travel with the messages.

use super::cma::CmaTransport;
use super::mover::Mover;
use super::shm::ShmTransport;
use super::{Job, Op, PeerInfo, Piece, RemoteKey, RemoteTicket, Role, SegmentDigests, Tracker, Transport};
use crate::memory::HugePages;
use crate::{AgentConfig, Memory};
use kvxfer_proto::integrity::SEGMENT;
use kvxfer_proto::wire::HostIdentity;
use kvxfer_proto::{AgentName, Epoch, Integrity, RegionId, TransferId};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ROLE: &str = "KVXFER_TEST_PEER";
static NEXT: AtomicU64 = AtomicU64::new(1);

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = vec![0; len];
    for word in out.chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes()[..word.len()]);
    }
    out
}

pub(super) fn bytes(memory: &Memory) -> Vec<u8> {
    let mut out = vec![0; memory.len()];
    memory.read_at(0, &mut out).unwrap();
    out
}

pub(super) fn job(
    op: Op,
    local: &Arc<Memory>,
    remote: RemoteKey,
    pieces: Vec<Piece>,
    integrity: Integrity,
) -> Job {
    Job {
        transfer: TransferId(NEXT.fetch_add(1, Ordering::Relaxed)),
        op,
        local_region: RegionId(1),
        local: Arc::clone(local),
        remote,
        tracker: Arc::new(Tracker::new(pieces.len())),
        pieces: pieces.into(),
        integrity,
        after: None,
        digest: None,
    }
}

/// `total` bytes as pieces of `size`, the remote side backwards.
pub(super) fn backwards(total: u64, size: u64) -> Vec<Piece> {
    (0..total / size)
        .map(|i| Piece { local_offset: i * size, remote_offset: total - (i + 1) * size, len: size })
        .collect()
}

/// One piece over everything.
pub(super) fn whole(len: u64) -> Vec<Piece> {
    vec![Piece { local_offset: 0, remote_offset: 0, len }]
}

pub(super) fn digests(len: u64) -> Arc<SegmentDigests> {
    let hashes = (0..len.div_ceil(SEGMENT)).map(|_| AtomicU64::new(0)).collect();
    Arc::new(SegmentDigests { base: 0, len, hashes })
}

pub(super) fn peer_info(pid: u32) -> PeerInfo {
    PeerInfo {
        name: AgentName::new("peer").unwrap(),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: "boot".into(),
            pid_namespace: 1,
            net_namespace: 1,
            pid,
            process: u64::from(pid),
            side_socket: String::new(),
        },
        same_host: true,
        same_kernel: true,
        same_process: pid == std::process::id(),
        role: Role::Initiator,
        address: None,
        session: [7; 16],
    }
}

/// The other process.
pub(super) struct PeerProcess {
    child: Child,
    socket: OwnedFd,
    pub(super) shm_offer: Vec<u8>,
    pub(super) cma_offer: Vec<u8>,
    shm_ticket: Vec<u8>,
    cma_ticket: Vec<u8>,
    memfd: Option<OwnedFd>,
    len: u64,
}

impl PeerProcess {
    /// Serves `len` bytes of memory of the kind `shared`, `anonymous` or `foreign`.
    pub(super) fn start(kind: &str, len: u64) -> Self {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::testing::peer_process", "--nocapture", "--test-threads=1"])
            .env(ROLE, format!("{kind} {len} {}", std::process::id()))
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut peer = Self {
            child,
            socket: ours,
            shm_offer: vec![],
            cma_offer: vec![],
            shm_ticket: vec![],
            cma_ticket: vec![],
            memfd: None,
            len,
        };
        peer.shm_offer = peer.receive().0;
        peer.cma_offer = peer.receive().0;
        (peer.shm_ticket, peer.memfd) = peer.receive();
        peer.cma_ticket = peer.receive().0;
        peer
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
    pub(super) fn info(&self) -> PeerInfo {
        peer_info(self.pid())
    }
    pub(super) fn shm_ticket(&self) -> RemoteTicket {
        let fd = self.memfd.as_ref().map(|fd| fd.try_clone().unwrap());
        RemoteTicket { region: RegionId(3), len: self.len, payload: self.shm_ticket.clone(), fd }
    }
    pub(super) fn cma_ticket(&self) -> RemoteTicket {
        RemoteTicket { region: RegionId(3), len: self.len, payload: self.cma_ticket.clone(), fd: None }
    }
    /// Sends a command, returns the answer.
    pub(super) fn ask(&self, command: &str) -> Vec<u8> {
        send(self.socket.as_fd(), command.as_bytes(), None);
        self.receive().0
    }
    /// The hash of its memory, as it sees it.
    pub(super) fn hash(&self) -> u64 {
        u64::from_le_bytes(self.ask("hash").try_into().unwrap())
    }
    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
    fn receive(&self) -> (Vec<u8>, Option<OwnedFd>) {
        receive(self.socket.as_fd()).expect("the other process has ended")
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(socket: BorrowedFd<'_>, message: &[u8], fd: Option<BorrowedFd<'_>>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn receive(socket: BorrowedFd<'_>) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut message)];
    let got = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let fd = control.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    message.truncate(got.bytes);
    (got.bytes > 0).then_some((message, fd))
}

/// The other process's life; nothing when this is an ordinary test run.
#[test]
fn peer_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut words = role.split(' ');
    let (kind, len, parent) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let len: usize = len.parse().unwrap();
    let stdin = std::io::stdin();
    let socket = stdin.as_fd();
    let mut owned = vec![0_u8; if kind == "foreign" { len } else { 0 }];
    let memory = match kind {
        "shared" => Memory::shared(len, HugePages::Try).unwrap(),
        "anonymous" => Memory::anonymous(len).unwrap(),
        // SAFETY: `owned` outlives every use and is not touched otherwise.
        _ => unsafe { Memory::foreign(owned.as_mut_ptr(), len) }.unwrap(),
    };
    let config = AgentConfig::default();
    let mover = Mover::new(&config);
    let (shm, cma) =
        (ShmTransport::new(&config, &mover).unwrap(), CmaTransport::new(&config, &mover).unwrap());
    let parent = peer_info(parent.parse().unwrap());
    send(socket, &shm.offer(&parent).unwrap(), None);
    send(socket, &cma.offer(&parent).unwrap(), None);
    match shm.ticket(RegionId(3), &memory).unwrap() {
        Some(ticket) => send(socket, &ticket.payload, ticket.fd.as_ref().map(AsFd::as_fd)),
        None => send(socket, b"none", None),
    }
    send(socket, &cma.ticket(RegionId(3), &memory).unwrap().unwrap().payload, None);
    while let Some((command, _)) = receive(socket) {
        let command = String::from_utf8(command).unwrap();
        let answer = match command.split_once(' ') {
            None if command == "hash" => xxhash_rust::xxh3::xxh3_64(&bytes(&memory)).to_le_bytes().to_vec(),
            Some(("fill", seed)) => {
                memory.write_at(0, &noise(len, seed.parse().unwrap())).unwrap();
                b"ok".to_vec()
            }
            None if command == "undumpable" => {
                rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
                    .unwrap();
                b"ok".to_vec()
            }
            // What the limits of this process do to it; only a process of its own can try.
            None if command == "no-descriptors" => {
                limit(rustix::process::Resource::Nofile, 0);
                let ticket = shm.ticket(RegionId(4), &memory).unwrap_err().to_string();
                let pool = Memory::shared(4096, HugePages::Never).unwrap_err().to_string();
                format!("{ticket}|{pool}").into_bytes()
            }
            None if command == "small-files" => {
                limit(rustix::process::Resource::Fsize, 1 << 20);
                Memory::shared(2 << 20, HugePages::Never).unwrap_err().to_string().into_bytes()
            }
            None if command == "small-address-space" => {
                limit(rustix::process::Resource::As, 256 << 20);
                let shared = Memory::shared(512 << 20, HugePages::Try).unwrap_err().to_string();
                let anonymous = Memory::anonymous(512 << 20).unwrap_err().to_string();
                format!("{shared}|{anonymous}").into_bytes()
            }
            _ => panic!("unknown command {command:?}"),
        };
        send(socket, &answer, None);
    }
}

fn limit(resource: rustix::process::Resource, to: u64) {
    rustix::process::setrlimit(resource, rustix::process::Rlimit { current: Some(to), maximum: Some(to) })
        .unwrap();
}
