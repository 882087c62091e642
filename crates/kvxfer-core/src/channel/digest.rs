//! Digests over registered memory.
//!
//! Such memory may be written by others at any time, so it is never looked at through a Rust slice: sampled lines are
//! copied out first, and whole segments go through the kernels that also hash while copying.

use crate::{Memory, Result, copy};
use kvxfer_proto::integrity::{self, Binding};

/// A chunk's bytes: runs of one memory, concatenated.
pub(super) struct Bytes<'a> {
    pub(super) memory: &'a Memory,
    pub(super) runs: &'a [(u64, u64)],
}

impl Bytes<'_> {
    /// Digest at level `bound`.
    pub(super) fn bound(&self, binding: &Binding) -> Result<u64> {
        if self.memory.is_device() {
            // One visit to the device for all lines.
            let mut lines = Vec::new();
            let mut cursor = Cursor::new(self);
            for (offset, len) in binding.lines() {
                cursor.parts(offset, len, |start, n| {
                    lines.push((start, n as u64));
                    Ok(())
                })?;
            }
            let mut bytes = vec![0; lines.iter().map(|l| l.1 as usize).sum()];
            self.memory.read_runs(&lines, &mut bytes)?;
            let mut rest = bytes.as_slice();
            return binding.bound(|_, out| {
                let (now, later) = rest.split_at(out.len());
                out.copy_from_slice(now);
                rest = later;
                Ok(())
            });
        }
        let mut cursor = Cursor::new(self);
        binding.bound(|offset, out| cursor.read(offset, out))
    }

    /// Digest at level `full`.
    pub(super) fn full(&self, binding: &Binding) -> Result<u64> {
        let mut left = binding.len;
        let mut runs = Vec::with_capacity(self.runs.len());
        for &(start, len) in self.runs {
            let len = len.min(left);
            runs.push((start, len));
            left -= len;
        }
        if left > 0 {
            return Err(crate::Error::OutOfRange {
                what: "the chunk's source".into(),
                offset: 0,
                len: binding.len,
                limit: binding.len - left,
            });
        }
        if self.memory.is_device() {
            return Ok(binding.full(self.hashes_by_way_of_the_host(&runs, binding.len)?));
        }
        Ok(binding.full(copy::segment_hashes(self.memory, &runs)?))
    }

    /// Hashes of a chunk on a device, which is read a few segments at a time.
    fn hashes_by_way_of_the_host(&self, runs: &[(u64, u64)], len: u64) -> Result<Vec<u64>> {
        const STEP: u64 = 16 * integrity::SEGMENT;
        let whole = Bytes { memory: self.memory, runs };
        let mut cursor = Cursor::new(&whole);
        let mut host = vec![0; len.min(STEP) as usize];
        let mut hashes = Vec::new();
        for at in (0..len).step_by(STEP as usize) {
            let now = &mut host[..(len - at).min(STEP) as usize];
            let mut parts = Vec::new();
            cursor.parts(at, now.len(), |start, n| {
                parts.push((start, n as u64));
                Ok(())
            })?;
            self.memory.read_runs(&parts, now)?;
            hashes.extend(now.chunks(integrity::SEGMENT as usize).map(integrity::segment_hash));
        }
        Ok(hashes)
    }
}

/// Reads a chunk front to back, with gaps but never back.
struct Cursor<'a> {
    memory: &'a Memory,
    runs: &'a [(u64, u64)],
    /// Offset in the chunk at which `runs[0]` begins.
    base: u64,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &Bytes<'a>) -> Self {
        Self { memory: bytes.memory, runs: bytes.runs, base: 0 }
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<()> {
        let (memory, mut at) = (self.memory, 0);
        self.parts(offset, out.len(), |start, n| {
            memory.read_at(start, &mut out[at..at + n])?;
            at += n;
            Ok(())
        })
    }

    /// Where `len` bytes of the chunk lie in the memory: offset and length of each part, in order.
    fn parts(
        &mut self,
        mut offset: u64,
        mut left: usize,
        mut part: impl FnMut(u64, usize) -> Result<()>,
    ) -> Result<()> {
        while let Some(&(start, len)) = self.runs.first()
            && left > 0
        {
            if offset >= self.base + len {
                self.base += len;
                self.runs = &self.runs[1..];
                continue;
            }
            let within = offset - self.base;
            let n = left.min((len - within) as usize);
            part(start + within, n)?;
            left -= n;
            offset += n as u64;
        }
        if left == 0 {
            return Ok(());
        }
        Err(crate::Error::OutOfRange {
            what: "the chunk's source".into(),
            offset,
            len: left as u64,
            limit: self.base,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvxfer_proto::integrity::SEGMENT;
    use kvxfer_proto::{ChunkKey, Generation, PageIndex, RequestId};

    #[test]
    fn runs_and_one_piece_give_the_same_digests() {
        let len = SEGMENT + 5000;
        let binding = Binding {
            request: RequestId::new("r").expect("valid"),
            key: ChunkKey::new("k").expect("valid"),
            len,
            page: PageIndex(1),
            generation: Generation(2),
        };
        let memory = Memory::anonymous(2 * len as usize).expect("memory");
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + (i >> 9)) as u8).collect();
        memory.write_at(0, &bytes).expect("inside");
        // The same bytes again, in three runs that are apart.
        let cuts = [(0, 10), (10, 70_000), (70_010, len - 70_010)];
        let mut runs = Vec::new();
        let mut at = len;
        for (start, n) in cuts {
            memory.write_at(at, &bytes[start as usize..(start + n) as usize]).expect("inside");
            runs.push((at, n));
            at += n;
        }
        let whole = Bytes { memory: &memory, runs: &[(0, len)] };
        let parts = Bytes { memory: &memory, runs: &runs };
        let segments = bytes.chunks(SEGMENT as usize).map(integrity::segment_hash);
        assert_eq!(whole.full(&binding).expect("readable"), binding.full(segments));
        assert_eq!(parts.full(&binding).expect("readable"), whole.full(&binding).expect("readable"));
        assert_eq!(parts.bound(&binding).expect("readable"), whole.bound(&binding).expect("readable"));
        let short = Bytes { memory: &memory, runs: &[(0, len - 1)] };
        assert!(short.full(&binding).is_err() && short.bound(&binding).is_err());
    }
}
