//! A gather on a device.

use super::digest::digest_from;
use super::params::Addresses;
use super::view::{Gather, Tokens, View};
use crate::cuda::{Device, Fence, Move, Paged};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use std::time::{Duration, Instant};

/// A gather under way. Dropping it waits for its end.
#[derive(Debug)]
pub struct Gathering {
    paged: Paged,
    gather: Gather,
    /// What is still to be taken by the host, because no kernel takes it.
    owed: bool,
    /// The digest that the host took.
    by_host: Option<u64>,
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
    /// this one reaches, or in pinned host memory. `digest`: take one on the way. Where the kernels do not load, copies do the same; then the
    /// host takes the digest, of the source, when the end is first seen.
    pub fn start(&self, after: Option<&Fence>, digest: bool) -> Result<Gathering> {
        let (here, there) = (self.from.memory.block(), self.to.memory.block());
        let block = here.or(there).ok_or_else(|| {
            Error::failed(
                ErrorCode::Unsupported,
                "neither view is a GPU's memory; see the paged module for host memory",
            )
        })?;
        for view in [&self.from, &self.to] {
            reached(block.device(), view)?;
        }
        if !self.is_narrow() {
            return Err(Error::InvalidArgument {
                argument: "layout",
                problem: "addresses and steps that are not multiples of 8 bytes".into(),
            });
        }
        let engine = block.engine()?;
        if !engine.has_kernels() {
            let paged = engine.paged_by_copies(&self.moves(), after)?;
            return Ok(Gathering { paged, gather: self.clone(), owed: digest, by_host: None });
        }
        let tables = [table(&self.from), table(&self.to)];
        let paged = engine.paged(&tables, digest, self.is_wide(), after, |addresses| {
            let [a, b, digest, skipped] = addresses;
            self.params(Addresses { tables: [a, b], digest, skipped })
        })?;
        Ok(Gathering { paged, gather: self.clone(), owed: false, by_host: None })
    }

    /// The byte runs as addresses.
    fn moves(&self) -> Vec<Move> {
        let (src, dst) = (self.from.memory.as_ptr() as u64, self.to.memory.as_ptr() as u64);
        let runs = self.runs().into_iter();
        runs.map(|r| Move { src: src + r.local_offset, dst: dst + r.remote_offset, len: r.len }).collect()
    }

    /// The digest of the source, read by the host a layer and plane at a time.
    fn digest_by_host(&self) -> Result<u64> {
        let l = &self.from.layout;
        let row = u64::from(l.heads) * l.head_bytes;
        let mut bytes = vec![0; (u64::from(self.tokens) * row) as usize];
        let (mut sum, mut first) = (0u64, 0);
        for plane in 0..l.planes {
            for layer in 0..self.from.layers.len() {
                let head = |at: u64| (0..u64::from(l.heads)).map(move |h| (at + h * l.head, l.head_bytes));
                let places = (0..self.tokens).map(|token| self.from.place(layer, plane, token));
                let runs: Vec<_> = places.flat_map(head).collect();
                self.from.memory.read_runs(&runs, &mut bytes)?;
                sum = sum.wrapping_add(digest_from(first, &bytes));
                first += bytes.len() as u64 / 8;
            }
        }
        Ok(sum)
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
        if !self.paged.is_done()? {
            return Ok(false);
        }
        if self.owed {
            self.by_host = Some(self.gather.digest_by_host()?);
            self.owed = false;
        }
        Ok(true)
    }

    /// Waits for its end, at most `timeout` long: on [`Error::TimedOut`] it goes on, and can be waited for again.
    pub fn wait(&mut self, timeout: Duration) -> Result<Gathered> {
        let deadline = Instant::now() + timeout;
        while !self.is_done()? {
            if Instant::now() >= deadline {
                return Err(Error::TimedOut { operation: "a gather on a device".into(), after: timeout });
            }
            std::hint::spin_loop();
        }
        let (digest, skipped) = self.paged.results();
        if skipped > 0 {
            // The tables were checked before, and what the kernel reads is a copy of our own.
            return Err(Error::failed(
                ErrorCode::Corrupt,
                format!(
                    "{skipped} of {} tokens named blocks that do not exist and were left out: something overwrote the tables in the device's memory (compute-sanitizer finds stray writes of kernels)",
                    self.gather.tokens
                ),
            ));
        }
        Ok(Gathered { bytes: self.gather.bytes(), digest: digest.or(self.by_host) })
    }
}
