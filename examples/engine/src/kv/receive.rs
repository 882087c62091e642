//! The decoder's half: a pool that prefillers fill, and taking a prompt's cache out of it.
//!
//! Nothing tells the decoder which chunks belong to a request, and nothing needs to: it computes the prompt's keys and takes the
//! longest prefix it finds. What is found is complete and checked. A chunk is removed once it has been copied into the
//! sequence's own cache; what is missing is computed here.

use super::Terms;
use crate::model::{Cache, unpack};
use kvxfer::channel::{Lookup, PoolStats, ReceiverEvent};
use kvxfer::{Agent, ChunkKey, Receiver, ReceiverConfig, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long one wait for an event lasts.
const WATCH: Duration = Duration::from_secs(3600);

/// Takes caches from prefillers.
pub(crate) struct Inbox {
    terms: Terms,
    receiver: Receiver,
    /// For tests: what was received is replaced by zeros, which must change the answers.
    zeroed: bool,
    counters: Counters,
}

/// What happened so far, for metrics.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) asked: AtomicU64,
}

/// What a prompt finds.
pub(crate) enum Found {
    /// Its next chunk is on its way: ask again.
    Pending,
    /// The cache of the first tokens, maybe of none.
    Cache(Cache, usize),
}

impl Inbox {
    /// Opens a pool of `bytes` bytes on an agent that listens.
    pub(crate) fn new(agent: &Agent, terms: Terms, bytes: u64, zeroed: bool) -> Result<Arc<Self>> {
        let pages = (bytes / terms.geometry.page_bytes).clamp(1, u64::from(u32::MAX)) as u32;
        let config = ReceiverConfig { pages, geometry: terms.geometry.clone(), ..ReceiverConfig::default() };
        let receiver = Receiver::new(agent, config)?;
        tracing::info!(
            address = ?agent.addresses(),
            pages,
            page_bytes = terms.geometry.page_bytes,
            "ready to receive caches"
        );
        Ok(Arc::new(Self { terms, receiver, zeroed, counters: Counters::default() }))
    }

    /// Copies the longest prefix of `tokens` that has arrived out of the pool and frees its pages.
    ///
    /// With `patient`, a chunk that is being written just now is [`Found::Pending`]; otherwise it counts as missing.
    pub(crate) fn take(&self, tokens: &[u32], patient: bool) -> Result<Found> {
        let shape = self.terms.shape;
        let mut prefix: Vec<(ChunkKey, usize)> = Vec::new();
        let mut chain = self.terms.chain();
        let mut chunks = tokens.chunks(shape.tokens).peekable();
        // Full chunks, as far as they go.
        while let Some(chunk) = chunks.next_if(|c| c.len() == shape.tokens) {
            let before = chain.clone();
            let key = self.terms.key(chain.after(chunk))?;
            match self.receiver.lookup(&key) {
                Lookup::Present(_) => prefix.push((key, shape.tokens)),
                Lookup::Pending if patient => return Ok(Found::Pending),
                Lookup::Pending | Lookup::Absent => {
                    chain = before;
                    chunks = chunk.chunks(shape.tokens).peekable();
                    break;
                }
            }
        }
        // Then a partial one: prompts end anywhere, so every length is asked for, the longest first.
        if let Some(rest) = chunks.next() {
            for len in (1..=rest.len().min(shape.tokens - 1)).rev() {
                let key = self.terms.key(chain.clone().after(&rest[..len]))?;
                match self.receiver.lookup(&key) {
                    Lookup::Present(_) => {
                        prefix.push((key, len));
                        break;
                    }
                    Lookup::Pending if patient => return Ok(Found::Pending),
                    Lookup::Pending | Lookup::Absent => {}
                }
            }
        }

        let mut cache = Cache::new(shape);
        let mut found = 0;
        for (key, len) in prefix {
            // Pinned while it is copied.
            let Ok(chunk) = self.receiver.acquire(&key) else { break };
            if chunk.len() != shape.bytes(len) as u64 {
                break;
            }
            let copied = unpack(shape, len, |out| if self.zeroed { Ok(()) } else { chunk.read_at(0, out) })
                .map_err(|e| {
                kvxfer::Error::failed(kvxfer::ErrorCode::System, format!("copying chunk {key}: {e}"))
            })?;
            cache.push(copied?);
            drop(chunk);
            self.receiver.remove(&key);
            found += len;
        }
        self.counters.asked.fetch_add(tokens.len() as u64, Ordering::Relaxed);
        self.counters.hits.fetch_add(found as u64, Ordering::Relaxed);
        Ok(Found::Cache(cache, found))
    }

    /// Logs what happens to requests until the pool is closed; runs on a thread of its own.
    pub(crate) fn watch(self: &Arc<Self>) {
        let receiver = self.receiver.clone();
        let log = move || {
            loop {
                let asked = Instant::now();
                match receiver.next_event(WATCH) {
                    Some(ReceiverEvent::Ready { sender, request }) => {
                        tracing::debug!(%sender, %request, "a cache has arrived");
                    }
                    Some(ReceiverEvent::Failed { sender, request, code, text }) => {
                        tracing::warn!(%sender, %request, code = code.as_str(), text, "a cache will not arrive");
                    }
                    None if asked.elapsed() < WATCH => return,
                    None => {}
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name("kv-events".into()).spawn(log) {
            tracing::warn!(error = %e, "what happens to caches will not be logged");
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The pool's pages by state.
    pub(crate) fn pages(&self) -> PoolStats {
        self.receiver.stats()
    }
}
