//! The demo's receiver process: a pool that checks what arrives.

use super::prompt::Prompt;
use super::protocol::{Checked, Opened, Pool, ToReceiver};
use crate::{Failure, agents, child};
use kvxfer_core::channel::{Lookup, ReceiverConfig};
use kvxfer_core::{Agent, Receiver};
use std::time::Duration;

/// A pool and the agent it belongs to.
pub(super) struct ReceiverSide {
    agent: Agent,
    receiver: Receiver,
    pages: u32,
}

impl ReceiverSide {
    pub(super) fn open(prompt: Prompt, pages: u32, key: &str, nixl: bool) -> Result<Self, Failure> {
        let mut config = agents::settings_with_key(key)?;
        config.nixl.same_host |= nixl;
        let agent =
            Agent::builder().config(config).name("demo-receiver").listen("tcp://127.0.0.1:0").build()?;
        let config = ReceiverConfig { pages, geometry: prompt.geometry(), ..ReceiverConfig::default() };
        let receiver = Receiver::new(&agent, config)?;
        Ok(Self { agent, receiver, pages })
    }

    pub(super) fn address(&self) -> Result<String, Failure> {
        let first = self.agent.addresses().into_iter().next();
        first.ok_or_else(|| Failure::new("the receiver's agent listens nowhere"))
    }

    /// Compares every byte of every published chunk with what it should be.
    pub(super) fn check(&self, prompt: Prompt) -> Result<Checked, Failure> {
        let mut found = Checked { chunks: 0, bytes: 0, wrong: None };
        let mut tile = vec![0_u8; 256 << 10];
        for i in 0..prompt.chunks() {
            let key = prompt.key(i)?;
            let Lookup::Present(len) = self.receiver.lookup(&key) else { continue };
            let chunk = self.receiver.acquire(&key)?;
            let want = prompt.chunk_bytes(i);
            if len != want || chunk.len() != want {
                found.wrong.get_or_insert(format!("chunk {i} has {} bytes instead of {want}", chunk.len()));
                continue;
            }
            let mut at = 0;
            while at < want {
                let tile = &mut tile[..(want - at).min(256 << 10) as usize];
                chunk.read_at(at, tile)?;
                if let Err(offset) = prompt.content(i).check(at, tile) {
                    found.wrong.get_or_insert(format!("chunk {i} differs at byte {offset}"));
                    break;
                }
                at += tile.len() as u64;
                found.bytes += tile.len() as u64;
            }
            found.chunks += 1;
        }
        Ok(found)
    }

    pub(super) fn forget(&self, prompt: Prompt) -> Result<(), Failure> {
        for i in 0..prompt.chunks() {
            self.receiver.remove(&prompt.key(i)?);
        }
        Ok(())
    }

    pub(super) fn pool(&self) -> Pool {
        Pool::new(self.receiver.stats())
    }

    fn close(&self) -> Result<(), Failure> {
        self.receiver.close(Duration::from_secs(2))?;
        Ok(self.agent.shutdown(Duration::from_secs(2))?)
    }
}

/// The child process.
pub(crate) fn run() -> Result<(), Failure> {
    let Some(ToReceiver::Open { prompt, pages, key, nixl }) = child::listen()? else {
        return Err(Failure::new("the receiver was not told what to open"));
    };
    let side = ReceiverSide::open(prompt, pages, &key, nixl)?;
    child::say(&Opened { address: side.address()?, pages: side.pages })?;
    while let Some(message) = child::listen()? {
        match message {
            ToReceiver::Open { .. } => return Err(Failure::new("the receiver is open already")),
            ToReceiver::Check { prompt } => child::say(&side.check(prompt)?)?,
            ToReceiver::Drop { prompt } => {
                side.forget(prompt)?;
                child::say(&side.pool())?;
            }
            ToReceiver::Stats => child::say(&side.pool())?,
        }
    }
    side.close()
}
