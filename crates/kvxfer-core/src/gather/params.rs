//! The kernel's parameters, `struct Paged` of `kernels/paged.cu`, field for field.

#[cfg(feature = "cuda")]
use super::view::{Gather, Tokens, View};

/// Layers of one launch.
#[cfg(feature = "cuda")]
pub(super) const LAYERS: usize = 64;

#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
#[repr(C)]
struct Side {
    table: u64,
    plane: u64,
    block: u64,
    token: u64,
    head: u64,
    mode: u32,
    block_tokens: u32,
    blocks: u32,
    first: u32,
    layers: [u64; LAYERS],
}

/// Parameters of one launch.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Params {
    from: Side,
    to: Side,
    digest: u64,
    skipped: u64,
    layers: u32,
    planes: u32,
    tokens: u32,
    group: u32,
    unit: u32,
    units: u32,
    first_layer: u32,
    all_layers: u32,
}

// The twin of the kernel asserts the same numbers.
#[cfg(feature = "cuda")]
const _: () = assert!(size_of::<Side>() == 568 && size_of::<Params>() == 1184);

/// Bytes that a warp moves before it takes another part.
#[cfg(feature = "cuda")]
const PART: u64 = 8 << 10;

/// Addresses that a launch needs beside the plan.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Addresses {
    /// Tables of the two sides, where they have one.
    pub(super) tables: [u64; 2],
    /// Zero: no digest.
    pub(super) digest: u64,
    pub(super) skipped: u64,
}

#[cfg(feature = "cuda")]
impl Params {
    /// Work items of the launch: what its grid is sized by.
    pub(crate) fn items(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.planes) * u64::from(self.tokens.div_ceil(self.group))
    }
}

#[cfg(feature = "cuda")]
impl Gather {
    /// One set of parameters for each launch.
    pub(super) fn params(&self, at: Addresses) -> Vec<Params> {
        let (unit, units) = self.units();
        let group = (PART / (unit * u64::from(units)).max(1)).clamp(1, 1 << 16) as u32;
        let all = self.from.layers.len();
        (0..all)
            .step_by(LAYERS)
            .map(|first| {
                let count = (all - first).min(LAYERS);
                Params {
                    from: side(&self.from, first, count, at.tables[0]),
                    to: side(&self.to, first, count, at.tables[1]),
                    digest: at.digest,
                    skipped: at.skipped,
                    layers: count as u32,
                    planes: self.from.layout.planes,
                    tokens: self.tokens,
                    group,
                    unit: unit as u32,
                    units,
                    first_layer: first as u32,
                    all_layers: all as u32,
                }
            })
            .collect()
    }

    /// Every address and step is a multiple of 16: the kernel with accesses of 16 bytes may be used.
    pub(super) fn is_wide(&self) -> bool {
        [&self.from, &self.to].into_iter().all(|v| {
            let l = &v.layout;
            let base = v.memory.as_ptr() as u64;
            [l.plane, l.block, l.token, l.head, l.head_bytes].iter().all(|n| n % 16 == 0)
                && v.layers.iter().all(|o| (base + o).is_multiple_of(16))
        })
    }

    /// The same for 8 bytes.
    pub(super) fn is_narrow(&self) -> bool {
        [&self.from, &self.to].into_iter().all(|v| {
            let l = &v.layout;
            let base = v.memory.as_ptr() as u64;
            [l.plane, l.block, l.token, l.head].iter().all(|n| n % 8 == 0)
                && v.layers.iter().all(|o| (base + o).is_multiple_of(8))
        })
    }
}

#[cfg(feature = "cuda")]
fn side(view: &View, first: usize, count: usize, table: u64) -> Side {
    let l = &view.layout;
    let base = view.memory.as_ptr() as u64;
    let mut layers = [0; LAYERS];
    for (slot, offset) in layers.iter_mut().zip(&view.layers[first..first + count]) {
        *slot = base + offset;
    }
    let (mode, first) = match &view.tokens {
        Tokens::From(first) if l.blocks == 1 => (0, *first),
        // Straight tokens of several blocks get a table, too.
        Tokens::From(first) | Tokens::Blocks { first, .. } => (1, *first),
        Tokens::Slots(_) => (2, 0),
    };
    Side {
        table,
        plane: l.plane,
        block: l.block,
        token: l.token,
        head: l.head,
        mode,
        block_tokens: l.block_tokens,
        blocks: l.blocks,
        first,
        layers,
    }
}
