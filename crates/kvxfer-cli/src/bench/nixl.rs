//! The NIXL baseline: the library through our thinnest wrapper, one agent here and one in a child of its own, on the same
//! kinds of memory and the same devices as the subject's.

use super::client::DEADLINE;
use super::server::touch;
use crate::child::{self, Child};
use crate::units::hex;
use crate::{Failure, agents};
use kvxfer_core::transport::nixl;
use kvxfer_core::{AgentConfig, Memory, Op, Piece};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{TryRecvError, channel};
use std::time::{Duration, Instant};

/// To the child: our metadata, and how much memory to offer.
#[derive(Serialize, Deserialize)]
struct Meet {
    metadata: String,
    bytes: u64,
    /// Memory of this CUDA device; the host's without.
    device: Option<i32>,
    config: AgentConfig,
}

/// From the child.
#[derive(Serialize, Deserialize)]
struct Met {
    metadata: String,
    address: u64,
}

/// This side.
pub(crate) struct Bare {
    agent: nixl::Bare,
    memory: Arc<Memory>,
    peer: String,
    remote: nixl::RemotePlace,
    child: Child,
}

impl Bare {
    /// Starts the child, which offers as much memory of CUDA device `far`, or of the host, and connects.
    pub(crate) fn open(memory: Arc<Memory>, far: Option<i32>) -> Result<Self, Failure> {
        let config = agents::settings()?;
        let mut agent = nixl::Bare::new("kvxfer-bench-near", &config.nixl)?;
        agent.register(&memory)?;
        let metadata = hex(&agent.metadata()?);
        let mut child = Child::start("bare NIXL", &["internal-child", "bench-nixl"])?;
        let met: Met =
            child.ask(&Meet { metadata, bytes: memory.len() as u64, device: far, config }, DEADLINE)?;
        let peer = agent.connect(&unhex(&met.metadata)?)?;
        let remote = nixl::RemotePlace { address: met.address, device: far };
        Ok(Self { agent, memory, peer, remote, child })
    }

    /// One pass as one request.
    pub(crate) fn pass(&mut self, op: Op, pieces: &[Piece]) -> Result<Duration, Failure> {
        let start = Instant::now();
        self.agent.transfer(op, &self.memory, &self.peer, self.remote, pieces, DEADLINE)?;
        Ok(start.elapsed())
    }

    /// Ends the child.
    pub(crate) fn close(self) {
        // Before the child it is connected to.
        self.agent.close();
        self.child.finish(Duration::from_secs(2));
    }
}

/// The child: offers memory and lets NIXL progress now and then, until its input closes.
pub(crate) fn run_child() -> Result<(), Failure> {
    let Some(Meet { metadata, bytes, device, config }) = child::listen()? else {
        return Err(Failure::new("the NIXL child was not told whom to meet"));
    };
    let memory = match device {
        Some(device) => Memory::device(&kvxfer_core::cuda::Device::get(device)?, bytes as usize)?,
        None => Memory::anonymous(bytes as usize)?,
    };
    touch(&memory)?;
    let mut agent = nixl::Bare::new("kvxfer-bench-far", &config.nixl)?;
    agent.register(&memory)?;
    agent.connect(&unhex(&metadata)?)?;
    child::say(&Met { metadata: hex(&agent.metadata()?), address: memory.as_ptr() as u64 })?;
    let (end, ended) = channel::<()>();
    std::thread::spawn(move || {
        while let Ok(Some(())) = child::listen::<()>() {}
        drop(end);
    });
    // Host memory moves by the near side's hand alone; only the wire-up needs this side, so it rests in between instead
    // of taking a core from what is measured.
    while ended.try_recv() == Err(TryRecvError::Empty) {
        agent.progress()?;
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Version of the library found, for the report's header.
pub(crate) fn version() -> Option<String> {
    // Only a fact for the header: where NIXL cannot be had the notes say why.
    let probe = nixl::probe(&agents::settings().ok()?.nixl).ok()?;
    Some(probe.version.unwrap_or_else(|| "of unknown version".into()))
}

fn unhex(text: &str) -> Result<Vec<u8>, Failure> {
    let byte = |i: usize| text.get(i..i + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    (0..text.len())
        .step_by(2)
        .map(byte)
        .collect::<Option<_>>()
        .ok_or_else(|| Failure::new("metadata that is not hexadecimal"))
}
