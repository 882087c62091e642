//! Launches of the kernel between paged caches and chunks.

use super::engine::{Engine, Flight, Scratch};
use super::stream::Fence;
use crate::Result;
use crate::gather::Params;
use std::sync::Arc;

/// A launch under way, with the tables it reads and the numbers it leaves.
pub(crate) struct Paged {
    /// Goes first: it waits for the end of what reads and writes the scratch.
    flight: Flight,
    scratch: Scratch,
    digest: bool,
}

/// Bytes of the numbers at the beginning of the scratch: digest, and tokens skipped.
const NUMBERS: usize = 16;

impl Engine {
    /// Copies `tables` beside the numbers, and launches what `params` makes of their addresses (the two tables, the digest or 0, the
    /// skipped tokens), after `after`.
    pub(crate) fn paged(
        self: &Arc<Self>,
        tables: &[Vec<u8>; 2],
        digest: bool,
        wide: bool,
        after: Option<&Fence>,
        params: impl FnOnce([u64; 4]) -> Vec<Params>,
    ) -> Result<Paged> {
        let kernels = self.kernels()?;
        let aligned = |n: usize| n.next_multiple_of(16);
        let second = NUMBERS + aligned(tables[0].len());
        let scratch = self.scratch(second + aligned(tables[1].len()))?;
        scratch.put(0, &[0; NUMBERS]);
        scratch.put(NUMBERS, &tables[0]);
        scratch.put(second, &tables[1]);
        let base = scratch.address();
        let launches =
            params([base + NUMBERS as u64, base + second as u64, if digest { base } else { 0 }, base + 8]);
        let stream = self.pick();
        let flight = self.fly(stream, after, |stream| {
            launches.iter().try_for_each(|p| kernels.paged(stream, p, p.items(), wide))
        })?;
        Ok(Paged { flight, scratch, digest })
    }
}

impl Paged {
    pub(crate) fn is_done(&mut self) -> Result<bool> {
        self.flight.poll()
    }

    /// Digest, where one was taken, and skipped tokens; once it has ended.
    pub(crate) fn results(&self) -> (Option<u64>, u64) {
        (self.digest.then(|| self.scratch.word(0)), self.scratch.word(1))
    }
}

impl std::fmt::Debug for Paged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged").field("digest", &self.digest).finish_non_exhaustive()
    }
}
