//! The other process: device memory and a pinned pool to be written and read, answers to pings.

use crate::bench::server::{await_ping, ping_options};
use crate::content::Content;
use crate::{Failure, agents, child};
use kvxfer_core::agent::Access;
use kvxfer_core::cuda::Device;
use kvxfer_core::memory::HugePages;
use kvxfer_core::{Agent, Memory, Piece, Region, TransportKind};
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub(super) const DEVICE: &str = "device";
pub(super) const POOL: &str = "pool";
/// What the near side exports, for the pings' way back.
pub(super) const BACK: &str = "back";
/// Longest answer.
pub(super) const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Serialize, Deserialize)]
pub(super) struct Start {
    pub key: String,
    pub device: i32,
    pub device_bytes: u64,
    pub pool_bytes: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Started {
    pub address: String,
}

/// What the near side may ask.
#[derive(Serialize, Deserialize)]
pub(super) enum Ask {
    /// xxh3-64 of the first bytes of a region.
    Digest { region: String, bytes: u64 },
    /// Fills the first bytes of a region with [`pattern`].
    Fill { region: String, bytes: u64, seed: u64 },
    /// Answers that many pings, each with a write and a notification.
    Echo { bytes: u64, count: u32 },
}

#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Digest(u64),
}

/// Bytes that differ by place and seed.
pub(super) fn pattern(bytes: u64, seed: u64) -> Vec<u8> {
    let mut out = vec![0; bytes.next_multiple_of(8) as usize];
    Content::new(seed, 0).fill(0, &mut out);
    out.truncate(bytes as usize);
    out
}

pub(super) fn digest(memory: &Memory, bytes: u64) -> Result<u64, Failure> {
    let mut out = vec![0; bytes as usize];
    memory.read_at(0, &mut out)?;
    Ok(kvxfer_core::proto::integrity::segment_hash(&out))
}

pub(crate) fn run_child() -> Result<(), Failure> {
    let Some(start) = child::listen::<Start>()? else {
        return Err(Failure::new("the GPU server was not told what to offer"));
    };
    let config = agents::settings_for(&start.key, agents::Manner { nixl: false, no_spin: false })?;
    let agent = Agent::builder().config(config).name("gpu-far").listen("tcp://127.0.0.1:0").build()?;
    let device = Device::get(start.device)?;
    let region = agent.register(Memory::device(&device, start.device_bytes as usize)?)?;
    let pool = Memory::shared(start.pool_bytes as usize, HugePages::Try)?;
    pool.pin()?;
    let pool = agent.register(pool)?;
    agent.export(&region, DEVICE, Access::ReadWrite)?;
    agent.export(&pool, POOL, Access::ReadWrite)?;
    let address =
        agent.addresses().into_iter().next().ok_or_else(|| Failure::new("the agent listens nowhere"))?;
    child::say(&Started { address })?;
    while let Some(ask) = child::listen::<Ask>()? {
        let of = |name: &str| -> &Region { if name == DEVICE { &region } else { &pool } };
        let answer = match ask {
            Ask::Digest { region, bytes } => Answer::Digest(digest(of(&region).memory(), bytes)?),
            Ask::Fill { region, bytes, seed } => {
                of(&region).memory().write_at(0, &pattern(bytes, seed))?;
                Answer::Done
            }
            Ask::Echo { bytes, count } => {
                echo(&agent, &region, bytes, count)?;
                Answer::Done
            }
        };
        child::say(&answer)?;
    }
    drop((region, pool));
    agent.shutdown(Duration::from_secs(5))?;
    Ok(())
}

fn echo(agent: &Agent, region: &Region, bytes: u64, count: u32) -> Result<(), Failure> {
    let peer =
        agent.peers().into_iter().next().ok_or_else(|| Failure::new("nobody is connected to be answered"))?;
    let back = peer.region(BACK, DEADLINE)?;
    let piece = [Piece { local_offset: 0, remote_offset: 0, len: bytes }];
    child::say(&Answer::Done)?;
    for _ in 0..count {
        if await_ping(agent, true, Duration::from_secs(10))?.is_none() {
            return Err(Failure::new("no ping came"));
        }
        // Its end is what sends the notification; who waits for it lends a hand.
        peer.write(region, &back, &piece, ping_options(TransportKind::CudaIpc))?.wait(DEADLINE)?;
    }
    Ok(())
}
