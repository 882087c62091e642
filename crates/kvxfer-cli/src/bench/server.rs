//! The benchmark's far side: memory to be written and read, a pool, raw sockets, and answers to pings.

use super::cases::Pattern;
use super::raw;
use super::wire::{Answer, Ask, Numbered, PING, PLAIN, PONG, POOL, SHARED, chunk_key, encode};
use crate::agents::Manner;
use crate::{Failure, agents, child, machine};
use kvxfer_core::agent::Access;
use kvxfer_core::channel::ReceiverConfig;
use kvxfer_core::{
    Agent, ChunkKey, Geometry, Memory, Notification, Peer, Piece, Receiver, Region, TransferOptions,
    TransportKind,
};
use serde::{Deserialize, Serialize};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);
/// Largest working set a client may ask for, in bytes.
const MAX_BYTES: u64 = 16 << 30;

/// First words between parent and child.
#[derive(Serialize, Deserialize)]
pub(crate) struct Start {
    pub key: String,
    pub manner: Manner,
    /// Process that may use `process_vm_writev` on this one, for the baseline.
    pub parent: u32,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Started {
    pub address: String,
}

/// The child process of `kvxfer bench`.
pub(crate) fn run_child() -> Result<(), Failure> {
    let Some(Start { key, manner, parent }) = child::listen()? else {
        return Err(Failure::new("the server was not told its key"));
    };
    permit(parent);
    let config = agents::settings_for(&key, manner)?;
    let agent = Agent::builder().config(config).name("bench-server").listen("tcp://127.0.0.1:0").build()?;
    let address =
        agent.addresses().into_iter().next().ok_or_else(|| Failure::new("the agent listens nowhere"))?;
    child::say(&Started { address })?;
    // Input is closed when the parent is done; until then it is silent.
    let (end, ended) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        while let Ok(Some(())) = child::listen::<()>() {}
        drop(end);
    });
    Server::new(agent).serve(|| ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected))
}

/// `kvxfer bench --server ADDR`: until interrupted.
pub(crate) fn run_host(address: &str) -> Result<(), Failure> {
    let config = agents::settings()?;
    if config.auth_key.is_none() && config.auth_key_file.is_none() {
        eprintln!(
            "kvxfer: no KVXFER_AUTH_KEY is set: anyone who reaches the address below can use this server"
        );
    }
    let agent = Agent::builder().config(config).name("bench-server").listen(address).build()?;
    for address in agent.addresses() {
        println!("serving on {address}; measure from another host with: kvxfer bench --client {address}");
    }
    Server::new(agent).serve(|| false)
}

/// Yama's `ptrace_scope` 1 lets a process be written to by its descendants only, unless it says otherwise.
pub(crate) fn permit(pid: u32) {
    use rustix::process::{PTracer, Pid, set_ptracer};
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(Err(e)) = pid.map(|p| set_ptracer(PTracer::ProcessID(p))) {
        // Without Yama the kernel does not know the call, and does not need it.
        tracing::debug!("PR_SET_PTRACER: {e}");
    }
}

struct Server {
    agent: Agent,
    shared: Option<Region>,
    plain: Option<Region>,
    pool: Option<Receiver>,
}

impl Server {
    fn new(agent: Agent) -> Self {
        Self { agent, shared: None, plain: None, pool: None }
    }

    fn serve(mut self, ended: impl Fn() -> bool) -> Result<(), Failure> {
        while !ended() {
            let Some(note) = self.agent.notification(Duration::from_millis(250))? else { continue };
            let Ok(Numbered { id, body }) = serde_json::from_slice::<Numbered<Ask>>(&note.payload) else {
                tracing::debug!("{}: a notification that is no question", note.peer);
                continue;
            };
            let Some(peer) = self.agent.peer(note.peer.as_str()) else { continue };
            let ping_pong = match &body {
                Ask::PingPong { kind, count, poll } => Some((*kind, *count, *poll)),
                _ => None,
            };
            let answer = self.answer(&peer, body).unwrap_or_else(|e| Answer::Failed(e.text));
            let good = !matches!(answer, Answer::Failed(_));
            if let Err(e) = peer.notify(&encode(&Numbered { id, body: answer })?) {
                tracing::warn!("{}: {e}", note.peer);
            }
            if let (Some((kind, count, poll)), true) = (ping_pong, good)
                && let Err(e) = self.ping_pong(&peer, kind, count, poll)
            {
                tracing::warn!("ping-pong with {}: {e}", note.peer);
            }
        }
        Ok(self.agent.shutdown(Duration::from_secs(2))?)
    }

    fn answer(&mut self, peer: &Peer, ask: Ask) -> Result<Answer, Failure> {
        Ok(match ask {
            Ask::Prepare { bytes } => self.prepare(bytes)?,
            Ask::Stamp { region, pattern, piece, bytes, seed, stamp } => {
                let memory = self.region(&region)?.memory().clone();
                stamp_pieces(&memory, &remote(pattern, bytes, piece, seed), stamp)?;
                Answer::Done
            }
            Ask::Inspect { region, pattern, piece, bytes, seed, stamp } => {
                let memory = self.region(&region)?.memory().clone();
                Answer::Bad(count_unstamped(&memory, &remote(pattern, bytes, piece, seed), stamp)?)
            }
            Ask::PingPong { .. } => {
                peer.region(PONG, DEADLINE)?;
                Answer::Done
            }
            Ask::Cpu => Answer::Cpu { ns: machine::cpu_time_ns() },
            Ask::Raw { streams } => {
                let ip = self.listening_ip()?;
                let listener = TcpListener::bind((ip, 0))
                    .map_err(|e| Failure::new(format!("raw sockets cannot listen on {ip}: {e}")))?;
                let address = listener.local_addr().map_err(|e| Failure::new(e.to_string()))?.to_string();
                let token = crate::secret()?;
                raw::serve(listener, token.clone(), streams.min(64), self.region(SHARED)?.memory().clone());
                Answer::Raw { address, token }
            }
            Ask::Pool { pages, page_bytes } => {
                if u64::from(pages).checked_mul(page_bytes).is_none_or(|b| b > MAX_BYTES) {
                    return Err(Failure::new(format!(
                        "a pool of {pages} pages of {page_bytes} bytes is too large"
                    )));
                }
                let geometry = Geometry { page_bytes, ..Geometry::default() };
                let config =
                    ReceiverConfig { pool: POOL.into(), pages, geometry, ..ReceiverConfig::default() };
                self.pool = None;
                self.pool = Some(Receiver::new(&self.agent, config)?);
                Answer::Done
            }
            Ask::Forget { run, chunks } => {
                let pool = self.pool.as_ref().ok_or_else(|| Failure::new("there is no pool"))?;
                let mut absent = 0;
                for i in 0..chunks {
                    absent += u64::from(!pool.remove(&ChunkKey::new(chunk_key(run, i))?));
                }
                Answer::Bad(absent)
            }
        })
    }

    fn prepare(&mut self, bytes: u64) -> Result<Answer, Failure> {
        if bytes > MAX_BYTES {
            return Err(Failure::new(format!("a working set of {bytes} bytes is larger than {MAX_BYTES}")));
        }
        if self.shared.as_ref().is_none_or(|r| r.len() < bytes) {
            for name in [SHARED, PLAIN] {
                // Not exported yet at the first time.
                let _ = self.agent.unexport(name);
            }
            let shared = self.agent.allocate(bytes as usize)?;
            let plain = self.agent.register(Memory::anonymous(bytes as usize)?)?;
            touch(shared.memory())?;
            touch(plain.memory())?;
            self.agent.export(&shared, SHARED, Access::ReadWrite)?;
            self.agent.export(&plain, PLAIN, Access::ReadWrite)?;
            (self.shared, self.plain) = (Some(shared), Some(plain));
        }
        let plain = self.region(PLAIN)?;
        Ok(Answer::Prepared {
            pid: std::process::id(),
            plain_address: plain.memory().as_ptr() as u64,
            bytes: plain.len(),
        })
    }

    fn region(&self, name: &str) -> Result<&Region, Failure> {
        let region = if name == SHARED { &self.shared } else { &self.plain };
        region.as_ref().ok_or_else(|| Failure::new("the regions are not prepared"))
    }

    fn listening_ip(&self) -> Result<std::net::IpAddr, Failure> {
        self.agent
            .addresses()
            .iter()
            .rev()
            .filter_map(|a| a.strip_prefix("tcp://"))
            .find_map(|a| a.parse::<std::net::SocketAddr>().ok())
            .map(|a| a.ip())
            .ok_or_else(|| Failure::new("the agent listens on no TCP address"))
    }

    /// The far half of a ping-pong: each notification is answered with the same operation.
    fn ping_pong(&self, peer: &Peer, kind: TransportKind, count: u32, poll: bool) -> Result<(), Failure> {
        let remote = peer.region(PONG, DEADLINE)?;
        let local = self.region(if kind == TransportKind::Cma { PLAIN } else { SHARED })?;
        let piece = [Piece { local_offset: 0, remote_offset: 0, len: 64 }];
        for _ in 0..count {
            if await_ping(&self.agent, poll, Duration::from_secs(5))?.is_none() {
                return Err(Failure::new("the client stopped"));
            }
            peer.write(local, &remote, &piece, ping_options(kind))?;
        }
        Ok(())
    }
}

/// How both halves of a ping-pong write.
pub(crate) fn ping_options(kind: TransportKind) -> TransferOptions {
    TransferOptions { notify: Some(PING.to_vec()), transport: Some(kind), ..TransferOptions::default() }
}

/// Waits for a ping: looking all the time, or sleeping. Anything else that arrives is dropped.
pub(crate) fn await_ping(
    agent: &Agent,
    poll: bool,
    timeout: Duration,
) -> Result<Option<Notification>, Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        let note = if poll {
            agent.try_notification()
        } else {
            agent.notification(deadline.saturating_duration_since(Instant::now()))?
        };
        match note {
            Some(note) if note.payload == PING => return Ok(Some(note)),
            Some(_) => {}
            None if Instant::now() >= deadline => return Ok(None),
            None => std::hint::spin_loop(),
        }
    }
}

/// The server's view of a pass: its own side first.
fn remote(pattern: Pattern, bytes: u64, piece: u64, seed: u64) -> Vec<Piece> {
    if piece == 0 || bytes > MAX_BYTES {
        return Vec::new();
    }
    let swap = |p: Piece| Piece { local_offset: p.remote_offset, remote_offset: p.local_offset, ..p };
    pattern.pieces(bytes, piece, seed).into_iter().map(swap).collect()
}

/// Writes `stamp + i` into the first eight bytes of piece `i`.
pub(crate) fn stamp_pieces(memory: &Memory, pieces: &[Piece], stamp: u64) -> Result<(), Failure> {
    for (p, i) in pieces.iter().zip(0..) {
        memory.write_at(p.local_offset, &stamp.wrapping_add(i).to_le_bytes())?;
    }
    Ok(())
}

/// How many pieces do not begin with their stamp.
pub(crate) fn count_unstamped(memory: &Memory, pieces: &[Piece], stamp: u64) -> Result<u64, Failure> {
    let mut bad = 0;
    for (p, i) in pieces.iter().zip(0..) {
        let mut got = [0; 8];
        memory.read_at(p.local_offset, &mut got)?;
        bad += u64::from(u64::from_le_bytes(got) != stamp.wrapping_add(i));
    }
    Ok(bad)
}

/// Makes every page present, so that no pass pays for first touches.
pub(crate) fn touch(memory: &Memory) -> Result<(), Failure> {
    let block = vec![0x5A_u8; 1 << 20];
    let mut at = 0;
    while at < memory.len() {
        let n = block.len().min(memory.len() - at);
        memory.write_at(at as u64, &block[..n])?;
        at += n;
    }
    Ok(())
}
