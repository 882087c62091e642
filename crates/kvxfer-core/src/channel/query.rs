//! Reading back: which published chunks a receiver still has, and their bytes, read one-sidedly from its pages.
//!
//! ```text
//! Sender::query ─ Query ──────────► pool: pins what is there, under a lease
//!               ◄───────── Found ─┘
//! Found::read   ─ Peer::read (bytes) ◄── the pool's memory
//!               ─ Release ─────────► pins back
//!    digest     ◄────── Released ─┘ held until now, or not
//! ```
//!
//! What was read is good when the receiver says that its pages stayed as they were until it had been read, and when the bytes fit
//! the digest that their writer committed them with. Everything here runs on the caller's thread and ends by its deadline.

use super::digest::Bytes;
use super::sender::{ChunkSource, Handle};
use super::session::Session;
use crate::transport::{Capabilities, TransportKind};
use crate::{Error, Piece, Region, Result, Transfer, TransferOptions};
use kvxfer_proto::integrity::Binding;
use kvxfer_proto::plan::{PlanChunk, Striping, plan};
use kvxfer_proto::query;
use kvxfer_proto::wire::{Check, FoundChunk};
use kvxfer_proto::{ChunkKey, ErrorCode, Integrity, RegionId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a transfer that has been cancelled is waited for before it is looked at again.
const SETTLE: Duration = Duration::from_millis(100);

/// Chunks that a receiver has, held for reading. Dropping it gives them back.
pub struct Found {
    session: Arc<Session>,
    /// Keeps the sender open.
    _handle: Arc<Handle>,
    /// `None` where nothing is held.
    held: Option<Held>,
    keys: Vec<ChunkKey>,
    chunks: Vec<FoundChunk>,
    lease: Duration,
}

/// How reading went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReport {
    /// Chunks read.
    pub chunks: u32,
    /// Bytes read.
    pub bytes: u64,
    /// From the call to the certainty that they are good.
    pub took: Duration,
    /// What carried them.
    pub transport: TransportKind,
}

/// A query whose pages are held; dropping it gives them back.
pub(super) struct Held {
    session: Arc<Session>,
    query: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Nobody waits for the answer, and a receiver that is gone needs no word.
        let _ = self.session.say(|a| Ok(((), a.give_up(self.query))));
    }
}

impl Held {
    /// Tells the receiver that nothing is read any more.
    fn release(&self) -> Result<()> {
        self.session.say(|a| Ok(((), a.release(self.query))))
    }

    /// Waits for the receiver's word that the pages were held until it heard of the release.
    fn confirmed(&self, deadline: Instant, timeout: Duration) -> Result<()> {
        match self.session.wait_for(deadline, |a| a.released(self.query)) {
            Some(Ok(())) => Ok(()),
            Some(Err(f)) => Err(Error::failed(f.code, f.text)),
            None => {
                let peer = self.session.peer().name();
                let operation = format!("the word of agent {peer} that its chunks were held");
                Err(Error::TimedOut { operation, after: timeout })
            }
        }
    }
}

/// Asks, and waits for the answer: what is held, if anything, and what was found.
pub(super) fn ask(
    session: &Arc<Session>,
    keys: &[ChunkKey],
    lease: Duration,
    deadline: Instant,
) -> Result<(Option<Held>, query::Found)> {
    session.peer().check_may_wait("Sender::query")?;
    let started = Instant::now();
    // Given back on every way out but one.
    let mut held = Held { session: session.clone(), query: 0 };
    session.say(|a| {
        let asked = a.ask(keys.to_vec(), lease).map_err(|e| Error::failed(e.code(), e.to_string()))?;
        held.query = asked.0;
        Ok(((), Some(asked.1)))
    })?;
    match session.wait_for(deadline, |a| a.found(held.query)) {
        Some(Ok(found)) => Ok(((!found.lease.is_zero()).then_some(held), found)),
        Some(Err(f)) => Err(Error::failed(f.code, f.text)),
        None => Err(Error::TimedOut {
            operation: format!("asking agent {} for {} chunks", session.peer().name(), keys.len()),
            after: started.elapsed(),
        }),
    }
}

impl Found {
    pub(super) fn new(
        handle: Arc<Handle>,
        session: Arc<Session>,
        keys: Vec<ChunkKey>,
        (held, found): (Option<Held>, query::Found),
    ) -> Self {
        let query::Found { chunks, lease } = found;
        Self { session, _handle: handle, held, keys, chunks, lease }
    }

    /// What is there, in the order of the query; a key that is not here is absent.
    pub fn chunks(&self) -> &[FoundChunk] {
        &self.chunks
    }

    /// How long the pages are held, counted from the receiver's answer; zero when nothing is.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Reads chunks to where `targets` say, each named by its place in the query, and gives everything back. On success every byte is
    /// there and is the chunk's. [`ErrorCode::Stale`]: the lease ended first; [`ErrorCode::Corrupt`]: the bytes do not fit their
    /// writer's digest. After an error the targets may hold anything, and nothing changes them any more.
    pub fn read(mut self, targets: &[(u32, ChunkSource)], timeout: Duration) -> Result<ReadReport> {
        self.session.peer().check_may_wait("Found::read")?;
        let (started, deadline) = (Instant::now(), Instant::now() + timeout);
        let held = self.held.take().ok_or_else(|| Error::InvalidArgument {
            argument: "found",
            problem: "nothing is held for reading: no chunk was found, or the query asked for no lease"
                .into(),
        })?;
        let reads = self.reads(targets)?;
        let carried = self.carry(&reads, deadline)?;
        // The digests are computed while the receiver answers.
        held.release()?;
        let good = reads.iter().try_for_each(Read::verify);
        held.confirmed(deadline, timeout)?;
        good?;
        let bytes = reads.iter().map(|r| r.chunk.len).sum();
        let (chunks, took) = (reads.len() as u32, started.elapsed());
        tracing::debug!(peer = %self.session.peer().name(), chunks, bytes, ?took, transport = %carried, "read back");
        Ok(ReadReport { chunks, bytes, took, transport: carried })
    }

    /// Targets joined with what was found for them, checked.
    fn reads<'a>(&'a self, targets: &'a [(u32, ChunkSource)]) -> Result<Vec<Read<'a>>> {
        let wrong = |problem| Error::InvalidArgument { argument: "targets", problem };
        if targets.is_empty() {
            return Err(wrong("none".into()));
        }
        let (remote, _, level) = self.session.pool()?;
        let stated = self.session.stated_integrity();
        let mut reads = Vec::with_capacity(targets.len());
        for (index, target) in targets {
            let chunk = self.chunks.iter().find(|c| c.index == *index);
            let chunk = chunk.ok_or_else(|| wrong(format!("chunk {index} of the query was not found")))?;
            let (_, caps) = self.session.peer().carrier(&target.region, &remote).ok_or_else(|| {
                let paths = self.session.peer().paths();
                let text = format!(
                    "no transport carries the chunk from the pool to this memory; connected: {paths:?}"
                );
                Error::failed(ErrorCode::NotAvailable, text)
            })?;
            let level = stated.unwrap_or(level.max(caps.default_integrity));
            let binding = Binding {
                request: chunk.request.clone(),
                key: self.keys[*index as usize].clone(),
                len: chunk.len,
                page: chunk.page,
                generation: chunk.generation,
            };
            let read = Read { chunk, target, caps, level, binding };
            read.check_level(stated)?;
            reads.push(read);
        }
        Ok(reads)
    }

    /// Moves the bytes: one transfer for each local region, all at once. Returns when no byte of any moves.
    fn carry(&self, reads: &[Read<'_>], deadline: Instant) -> Result<TransportKind> {
        let (remote, layout, _) = self.session.pool()?;
        let mut by_region: BTreeMap<RegionId, (&Region, Integrity, Vec<PlanChunk<'_>>)> = BTreeMap::new();
        for r in reads {
            let region = &r.target.region;
            let (_, level, chunks) =
                by_region.entry(region.id()).or_insert_with(|| (region, Integrity::Off, Vec::new()));
            *level = r.on_the_way().max(*level);
            chunks.push(PlanChunk {
                chunk: r.chunk.index,
                page: r.chunk.page,
                len: r.chunk.len,
                source_len: region.len(),
                runs: &r.target.runs,
            });
        }
        let mut transfers: Vec<Transfer> = Vec::new();
        let mut failure = None;
        for (region, integrity, chunks) in by_region.into_values() {
            let submitted = plan(&layout, &chunks, Striping::NONE)
                .map_err(|e| Error::InvalidArgument { argument: "targets", problem: e.to_string() })
                .and_then(|pieces| {
                    // A plan knows writes; here the local side is where the bytes go.
                    let pieces: Vec<Piece> = pieces
                        .into_iter()
                        .map(|p| Piece { local_offset: p.source, remote_offset: p.destination, len: p.len })
                        .collect();
                    let left = deadline.saturating_duration_since(Instant::now());
                    let options = TransferOptions {
                        timeout: Some(left.max(Duration::from_millis(1))),
                        integrity: Some(integrity),
                        ..TransferOptions::default()
                    };
                    self.session.peer().read(region, &remote, &pieces, options)
                });
            match submitted {
                Ok(transfer) => transfers.push(transfer),
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        for transfer in &transfers {
            if failure.is_some() {
                transfer.cancel();
            }
            if let Err(e) = settle(transfer, deadline) {
                failure.get_or_insert(e);
            }
        }
        match failure {
            Some(e) => Err(e),
            None => Ok(transfers.first().map_or(TransportKind::Inproc, Transfer::transport)),
        }
    }
}

/// Waits for a transfer's end, whatever it is: memory that may still change is not given back.
fn settle(transfer: &Transfer, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match transfer.wait(left.max(SETTLE)) {
            Ok(report) => {
                return report.error.map_or(Ok(()), |code| {
                    Err(Error::failed(code, report.detail.unwrap_or_else(|| code.to_string())))
                });
            }
            // Its own deadline ends it; this one only lends a hand.
            Err(Error::TimedOut { .. }) => {
                transfer.cancel();
            }
            Err(e) => return Err(e),
        }
    }
}

/// One chunk to be read.
struct Read<'a> {
    chunk: &'a FoundChunk,
    target: &'a ChunkSource,
    caps: Capabilities,
    level: Integrity,
    binding: Binding,
}

impl Read<'_> {
    /// Every byte is to be checked, because the configuration says so: by the path, or by a digest of every byte.
    fn check_level(&self, stated: Option<Integrity>) -> Result<()> {
        let every_byte = self.caps.verifies_arrival || matches!(self.chunk.check, Check::Full(_));
        if stated == Some(Integrity::Full) && !every_byte {
            return Err(Error::failed(
                ErrorCode::NotAvailable,
                format!(
                    "chunk {} was written without a digest of every byte, and this path does not check every byte by itself, but the \
                     level is full: configure the same level for its writer",
                    self.binding.key
                ),
            ));
        }
        Ok(())
    }

    fn on_the_way(&self) -> Integrity {
        match self.level {
            Integrity::Full if !self.caps.verifies_arrival => Integrity::Bound,
            level => level,
        }
    }

    /// Compares the bytes with their writer's digest, where there is one.
    fn verify(&self) -> Result<()> {
        if self.level == Integrity::Off {
            return Ok(());
        }
        let bytes = Bytes { memory: self.target.region.memory(), runs: &self.target.runs };
        let (ours, theirs) = match self.chunk.check {
            Check::None => return Ok(()),
            Check::Bound(digest) => (bytes.bound(&self.binding)?, digest),
            Check::Full(digest) => (bytes.full(&self.binding)?, digest),
        };
        if ours == theirs {
            return Ok(());
        }
        Err(Error::failed(
            ErrorCode::Corrupt,
            format!(
                "chunk {} was read back, and its bytes do not fit their writer's digest",
                self.binding.key
            ),
        ))
    }
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Found")
            .field("asked", &self.keys.len())
            .field("found", &self.chunks.len())
            .field("held", &self.held.is_some())
            .finish_non_exhaustive()
    }
}
