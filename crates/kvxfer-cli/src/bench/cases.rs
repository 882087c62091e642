//! What is measured: sections, patterns, and the pieces of a pass.

use crate::args::BenchArgs;
use crate::content::Rng;
use crate::machine::Machine;
use crate::units::size;
use crate::{Failure, units};
use clap::ValueEnum;
use kvxfer_core::{Integrity, Op, Piece, TransportKind};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Order of the pieces in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// One after the other on both sides.
    Ordered,
    /// Permuted on both sides, each in its own way, as block tables are.
    Random,
}

/// Parts of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// GB/s by transport, direction, piece size and order, beside a baseline.
    Throughput,
    /// One-way time of 64 bytes with a notification.
    Latency,
    /// Time spent in the submitting call, per descriptor.
    Submit,
    /// What checking costs, through sender and receiver channels.
    Integrity,
    /// Processor time of an agent with nothing to do.
    Idle,
}

impl Pattern {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ordered => "ordered",
            Self::Random => "random",
        }
    }

    /// `total / piece` pieces that cover `0..total` once on each side.
    pub(crate) fn pieces(self, total: u64, piece: u64, seed: u64) -> Vec<Piece> {
        let n = (total / piece) as usize;
        let (local, remote) = match self {
            Self::Ordered => ((0..n as u32).collect::<Vec<_>>(), (0..n as u32).collect::<Vec<_>>()),
            Self::Random => {
                let mut rng = Rng::new(seed);
                (rng.permutation(n), rng.permutation(n))
            }
        };
        local
            .into_iter()
            .zip(remote)
            .map(|(l, r)| Piece {
                local_offset: u64::from(l) * piece,
                remote_offset: u64::from(r) * piece,
                len: piece,
            })
            .collect()
    }
}

/// One line of the throughput table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub kind: TransportKind,
    pub op: Op,
    pub piece: u64,
    pub pattern: Pattern,
    pub integrity: Integrity,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        format!(
            "{}.{}.{}.{}.{}",
            self.kind,
            op_name(self.op),
            size(self.piece).replace(' ', ""),
            self.pattern.as_str(),
            level_name(self.integrity)
        )
    }
}

pub(crate) fn op_name(op: Op) -> &'static str {
    match op {
        Op::Write => "write",
        Op::Read => "read",
    }
}

pub(crate) fn level_name(level: Integrity) -> &'static str {
    match level {
        Integrity::Off => "off",
        Integrity::Bound => "bound",
        Integrity::Full => "full",
    }
}

/// Everything a run has been asked to do, with the defaults filled in.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub kinds: Vec<TransportKind>,
    pub ops: Vec<Op>,
    pub pieces: Vec<u64>,
    pub patterns: Vec<Pattern>,
    pub integrity: Vec<Integrity>,
    pub bytes: u64,
    pub reps: u32,
    /// A case stops repeating after this long (at least three repetitions).
    pub budget: Duration,
    pub quick: bool,
    sections: Vec<Section>,
}

impl Plan {
    pub(crate) fn new(args: &BenchArgs, machine: &Machine) -> Result<Self, Failure> {
        let floor = 2 * machine.l3_bytes;
        let default = if args.quick { 64 << 20 } else { 256 << 20 };
        // A whole number of the largest pieces, so that every size covers the same bytes.
        let bytes = args.bytes.unwrap_or(default.max(floor)).next_multiple_of(32 << 20);
        if bytes > machine.available_bytes / 8 {
            return Err(Failure::usage(format!(
                "--bytes: a working set of {} needs about eight times that in memory (both sides, two kinds of memory, baselines), and {} are available",
                size(bytes),
                size(machine.available_bytes)
            )));
        }
        if bytes < floor {
            tracing::warn!(
                "a working set of {} is less than twice the last-level cache ({}): rates will be those of the cache",
                size(bytes),
                size(machine.l3_bytes)
            );
        }
        let or =
            |given: &[u64], default: &[u64]| if given.is_empty() { default.to_vec() } else { given.to_vec() };
        let pieces = if args.quick {
            or(&args.piece, &[16 << 10, 64 << 10, 1 << 20])
        } else {
            or(&args.piece, &[4 << 10, 16 << 10, 64 << 10, 1 << 20, 32 << 20])
        };
        if let Some(bad) = pieces.iter().find(|p| **p > bytes || **p < 64) {
            return Err(Failure::usage(format!(
                "--piece: {} is not between 64 B and the working set of {}",
                units::size(*bad),
                size(bytes)
            )));
        }
        let patterns = match (args.pattern.is_empty(), args.quick) {
            (false, _) => args.pattern.clone(),
            (true, true) => vec![Pattern::Random],
            (true, false) => vec![Pattern::Ordered, Pattern::Random],
        };
        Ok(Self {
            kinds: args.transport.clone(),
            ops: args.op.iter().map(|o| (*o).into()).collect(),
            pieces,
            patterns,
            integrity: args.integrity.iter().map(|i| (*i).into()).collect(),
            bytes,
            reps: args.reps.unwrap_or(if args.quick { 3 } else { 7 }),
            budget: Duration::from_millis(if args.quick { 400 } else { 1200 }),
            quick: args.quick,
            sections: args.only.clone(),
        })
    }

    pub(crate) fn has(&self, section: Section) -> bool {
        self.sections.is_empty() || self.sections.contains(&section)
    }

    /// The throughput cases over these transports.
    pub(crate) fn cases(&self, kinds: &[TransportKind]) -> Vec<Case> {
        let mut cases = Vec::new();
        for &kind in kinds {
            for &op in &self.ops {
                for &piece in &self.pieces {
                    for &pattern in &self.patterns {
                        for integrity in self.levels(kind) {
                            cases.push(Case { kind, op, piece, pattern, integrity });
                        }
                    }
                }
            }
        }
        cases
    }

    fn levels(&self, kind: TransportKind) -> Vec<Integrity> {
        if !self.integrity.is_empty() {
            return self.integrity.clone();
        }
        match kind {
            TransportKind::Tcp | TransportKind::Nixl => vec![Integrity::Off, Integrity::Full],
            _ => vec![Integrity::Bound],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_both_sides_once() {
        for pattern in [Pattern::Ordered, Pattern::Random] {
            let pieces = pattern.pieces(1 << 20, 4096, 3);
            for side in [|p: &Piece| p.local_offset, |p: &Piece| p.remote_offset] {
                let mut at: Vec<u64> = pieces.iter().map(side).collect();
                assert_eq!(at.is_sorted(), pattern == Pattern::Ordered);
                at.sort_unstable();
                assert_eq!(at, (0..256).map(|i| i * 4096).collect::<Vec<u64>>());
            }
        }
        assert_eq!(
            Pattern::Random.pieces(1 << 20, 4096, 3),
            Pattern::Random.pieces(1 << 20, 4096, 3),
            "both processes compute the same"
        );
    }
}
