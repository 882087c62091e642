//! A gather on a device.

use super::params::Addresses;
use super::view::{Gather, Tokens, View};
use crate::cuda::{Device, Engine, Fence, Paged};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use std::time::{Duration, Instant};

/// A gather under way. Dropping it waits for its end.
#[derive(Debug)]
pub struct Gathering {
    paged: Paged,
    gather: Gather,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gathered {
    /// Bytes moved.
    pub bytes: u64,
    /// The digest of [`super::digest`], where it was asked for.
    pub digest: Option<u64>,
}

impl Gather {
    /// Starts it on the device that one of the views lies on, after `after`; does not wait. The other view may be on another device that
    /// this one reaches, or in pinned host memory. `digest`: take one on the way.
    pub fn start(&self, after: Option<&Fence>, digest: bool) -> Result<Gathering> {
        let (here, there) = (self.from.memory.on_device(), self.to.memory.on_device());
        let device = here.or(there).ok_or_else(|| {
            Error::failed(
                ErrorCode::Unsupported,
                "neither view is a GPU's memory; see the paged module for host memory",
            )
        })?;
        for view in [&self.from, &self.to] {
            reached(device, view)?;
        }
        if !self.is_narrow() {
            return Err(Error::InvalidArgument {
                argument: "layout",
                problem: "addresses and steps that are not multiples of 8 bytes".into(),
            });
        }
        let engine = Engine::of(device)?;
        let tables = [table(&self.from), table(&self.to)];
        let paged = engine.paged(&tables, digest, self.is_wide(), after, |addresses| {
            let [a, b, digest, skipped] = addresses;
            self.params(Addresses { tables: [a, b], digest, skipped })
        })?;
        Ok(Gathering { paged, gather: self.clone() })
    }
}

/// Words of a side's table, as bytes; empty where it needs none.
fn table(view: &View) -> Vec<u8> {
    match &view.tokens {
        Tokens::From(_) if view.layout.blocks == 1 => Vec::new(),
        Tokens::From(_) => (0..view.layout.blocks).flat_map(u32::to_le_bytes).collect(),
        Tokens::Blocks { ids, .. } => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        Tokens::Slots(slots) => slots.iter().flat_map(|s| s.to_le_bytes()).collect(),
    }
}

fn reached(device: &Device, view: &View) -> Result<()> {
    match view.memory.on_device() {
        Some(other) if device.reaches(other)? => Ok(()),
        Some(other) => Err(Error::failed(
            ErrorCode::Unsupported,
            format!(
                "{device} does not reach the memory of {other}; a transfer of Gather::runs goes through the host"
            ),
        )),
        None if view.memory.is_pinned() => Ok(()),
        None => Err(Error::failed(ErrorCode::Unsupported, "host memory that is not pinned; see Memory::pin")),
    }
}

impl Gathering {
    /// Whether it has ended.
    pub fn is_done(&mut self) -> Result<bool> {
        self.paged.is_done()
    }

    /// Waits for its end, at most `timeout` long.
    pub fn wait(mut self, timeout: Duration) -> Result<Gathered> {
        let deadline = Instant::now() + timeout;
        while !self.paged.is_done()? {
            if Instant::now() >= deadline {
                return Err(Error::TimedOut { operation: "a gather on a device".into(), after: timeout });
            }
            std::hint::spin_loop();
        }
        let (digest, skipped) = self.paged.results();
        if skipped > 0 {
            // The table was checked before; somebody changed what it lies in.
            return Err(Error::failed(
                ErrorCode::Corrupt,
                format!("{skipped} tokens named blocks that do not exist"),
            ));
        }
        Ok(Gathered { bytes: self.gather.bytes(), digest })
    }
}
