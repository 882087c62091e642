//! Launches of the kernel between paged caches and chunks, and copies in their place.

use super::engine::{Engine, Flight, Move, Scratch};
use super::stream::Fence;
use crate::Result;
use crate::gather::Params;
use std::sync::Arc;

/// A launch under way, with the tables it reads and the numbers it leaves; or copies, which need and leave none.
///
/// Both lie on the device while it runs, since every warp reads its tokens' places, and many add to the numbers: a trip to host memory for
/// each of these would cost more than the two short copies around the launch. That goes for small tables, too: their entries are
/// read once for each layer and plane.
pub(crate) struct Paged {
    engine: Arc<Engine>,
    flight: Flight,
    scratch: Option<Scratch>,
    digest: bool,
}

/// Bytes of the numbers at the beginning of the scratch, before the tables: digest, and tokens skipped.
const NUMBERS: usize = 16;

impl Engine {
    /// Brings zeroed numbers and `tables` to the device, launches what `params` makes of their addresses (the two tables, the digest or 0,
    /// the skipped tokens), after `after`, and brings the numbers back.
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
        let used = second + aligned(tables[1].len());
        let scratch = self.scratch_on_both(used)?;
        scratch.put(0, &[0; NUMBERS]);
        scratch.put(NUMBERS, &tables[0]);
        scratch.put(second, &tables[1]);
        let base = scratch.far();
        let launches =
            params([base + NUMBERS as u64, base + second as u64, if digest { base } else { 0 }, base + 8]);
        let stream = self.pick();
        let flight = self.fly(stream, after, |stream| {
            scratch.to_device(stream, used)?;
            launches.iter().try_for_each(|p| kernels.paged(stream, p, p.items(), wide))?;
            scratch.to_host(stream, NUMBERS)
        })?;
        Ok(Paged { engine: self.clone(), flight, scratch: Some(scratch), digest })
    }

    /// Whether there are kernels on this device.
    pub(crate) fn has_kernels(&self) -> bool {
        self.kernels().is_ok()
    }

    /// The same by copies, where there are no kernels. As with `paged`, whoever made the moves has checked every range, and keeps the
    /// memories until the end.
    pub(crate) fn paged_by_copies(self: &Arc<Self>, moves: &[Move], after: Option<&Fence>) -> Result<Paged> {
        // SAFETY: the ranges lie within memories that the gather, which owns them, checked and keeps until the flight has ended.
        let flight = unsafe { self.start(self.pick(), moves, after, false) }?;
        Ok(Paged { engine: self.clone(), flight, scratch: None, digest: false })
    }
}

impl Paged {
    pub(crate) fn is_done(&mut self) -> Result<bool> {
        self.flight.poll()
    }

    /// Digest, where the kernel took one, and skipped tokens; once it has ended.
    pub(crate) fn results(&self) -> (Option<u64>, u64) {
        let Some(scratch) = &self.scratch else { return (None, 0) };
        (self.digest.then(|| scratch.word(0)), scratch.word(1))
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        // What reads and writes the scratch must have ended before the next one gets it.
        if let Err(e) = self.flight.wait() {
            tracing::debug!(error = %e, "a gather was dropped");
        }
        if let Some(scratch) = self.scratch.take() {
            self.engine.keep(scratch);
        }
    }
}

impl std::fmt::Debug for Paged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged").field("digest", &self.digest).finish_non_exhaustive()
    }
}
