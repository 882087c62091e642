//! Layers of a cache in memory with the tokens that are meant; and two of those, checked against each other.

use super::layout::Layout;
use crate::transport::Piece;
use crate::{Error, Memory, Result};
use std::sync::Arc;

/// Which tokens of a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// One after the other from this one on.
    From(u32),
    /// Of these blocks, one after the other, from this token of the first block on.
    Blocks {
        /// Block of each `block_tokens` tokens.
        ids: Vec<u32>,
        /// Tokens of the first block that are left out.
        first: u32,
    },
    /// A slot for each, `block * block_tokens + place in the block`.
    Slots(Vec<i64>),
}

/// A cache's layers in memory.
#[derive(Clone, Debug)]
pub struct View {
    /// What each layer looks like.
    pub layout: Layout,
    /// Where they are.
    pub memory: Arc<Memory>,
    /// Offset of each layer that is meant; any subset, in any order.
    pub layers: Vec<u64>,
    /// Which of its tokens.
    pub tokens: Tokens,
}

/// The same tokens of two views, from the first to the second.
#[derive(Clone, Debug)]
pub struct Gather {
    pub(super) from: View,
    pub(super) to: View,
    pub(super) tokens: u32,
}

/// No model has so many; more is a wild number.
const MAX_LAYERS: usize = 1 << 16;

impl View {
    /// A chunk `[2, layers, tokens, heads * head]` (`KV_2LTD`) at `offset` of a memory, all its tokens.
    pub fn chunk(
        memory: Arc<Memory>,
        offset: u64,
        layers: u32,
        tokens: u32,
        heads: u32,
        head_bytes: u64,
    ) -> Self {
        let step = u64::from(tokens) * u64::from(heads) * head_bytes;
        let at = (0..u64::from(layers)).map(|i| offset.saturating_add(i.saturating_mul(step))).collect();
        let layout = Layout::chunk(layers, tokens, heads, head_bytes);
        Self { layout, memory, layers: at, tokens: Tokens::From(0) }
    }

    fn check(&self, side: &'static str, tokens: u32) -> Result<()> {
        let bad = |problem: String| Error::InvalidArgument { argument: side, problem };
        self.layout.check()?;
        if self.layers.is_empty() || self.layers.len() > MAX_LAYERS {
            return Err(bad(format!("{} layers; 1 to {MAX_LAYERS} are possible", self.layers.len())));
        }
        let extent = self.layout.extent().unwrap_or(u64::MAX);
        for (i, offset) in self.layers.iter().enumerate() {
            if offset.checked_add(extent).is_none_or(|end| end > self.memory.len() as u64) {
                return Err(Error::OutOfRange {
                    what: format!("{side}: layer {i}"),
                    offset: *offset,
                    len: extent,
                    limit: self.memory.len() as u64,
                });
            }
        }
        let (l, wanted) = (&self.layout, u64::from(tokens));
        match &self.tokens {
            Tokens::From(first) => {
                if u64::from(*first) + wanted > l.capacity() {
                    return Err(bad(format!(
                        "{tokens} tokens from token {first} on, but there are {}",
                        l.capacity()
                    )));
                }
            }
            Tokens::Blocks { ids, first } => {
                if let Some(i) = ids.iter().position(|id| *id >= l.blocks) {
                    return Err(bad(format!("block {} (number {i} of the table) of {}", ids[i], l.blocks)));
                }
                let room = ids.len() as u64 * u64::from(l.block_tokens);
                if u64::from(*first) + wanted > room {
                    return Err(bad(format!(
                        "{tokens} tokens from token {first} on, but the table's {} blocks of {} hold {room}",
                        ids.len(),
                        l.block_tokens
                    )));
                }
            }
            Tokens::Slots(slots) => {
                if slots.len() as u64 != wanted {
                    return Err(bad(format!("{} slots for {tokens} tokens", slots.len())));
                }
                let outside = |s: &i64| u64::try_from(*s).map_or(true, |s| s >= l.capacity());
                if let Some(i) = slots.iter().position(outside) {
                    return Err(bad(format!(
                        "slot {} (token {i}) does not lie within {} blocks of {} tokens",
                        slots[i], l.blocks, l.block_tokens
                    )));
                }
            }
        }
        Ok(())
    }

    /// Offset in the memory of a token's first head.
    pub(super) fn place(&self, layer: usize, plane: u32, token: u32) -> u64 {
        let l = &self.layout;
        let per = u64::from(l.block_tokens);
        let (block, within) = match &self.tokens {
            Tokens::From(first) => {
                let at = u64::from(*first) + u64::from(token);
                (at / per, at % per)
            }
            Tokens::Blocks { ids, first } => {
                let at = u64::from(*first) + u64::from(token);
                (u64::from(ids[(at / per) as usize]), at % per)
            }
            Tokens::Slots(slots) => {
                let slot = slots[token as usize] as u64;
                (slot / per, slot % per)
            }
        };
        self.layers[layer] + u64::from(plane) * l.plane + block * l.block + within * l.token
    }
}

impl Gather {
    /// `tokens` tokens from one view to the other. Both have the same layers, planes, heads and bytes of a head; wrong shapes, tables and
    /// ranges are refused here, before anything moves. The views must not overlap.
    pub fn new(from: View, to: View, tokens: u32) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::InvalidArgument { argument: "tokens", problem: "is 0".into() });
        }
        from.check("from", tokens)?;
        to.check("to", tokens)?;
        let (a, b) = (&from.layout, &to.layout);
        for (what, x, y) in [
            ("layers", from.layers.len() as u64, to.layers.len() as u64),
            ("planes", u64::from(a.planes), u64::from(b.planes)),
            ("heads", u64::from(a.heads), u64::from(b.heads)),
            ("bytes of a head", a.head_bytes, b.head_bytes),
        ] {
            if x != y {
                return Err(Error::InvalidArgument {
                    argument: "to",
                    problem: format!("{what}: {x} in one view, {y} in the other"),
                });
            }
        }
        Ok(Self { from, to, tokens })
    }

    /// Bytes that move.
    pub fn bytes(&self) -> u64 {
        let l = &self.from.layout;
        self.from.layers.len() as u64
            * u64::from(l.planes)
            * u64::from(self.tokens)
            * u64::from(l.heads)
            * l.head_bytes
    }

    /// Run length, and runs of a token: all heads at once where both sides keep them together.
    pub(super) fn units(&self) -> (u64, u32) {
        let l = &self.from.layout;
        if l.is_whole() && self.to.layout.is_whole() {
            (u64::from(l.heads) * l.head_bytes, 1)
        } else {
            (l.head_bytes, l.heads)
        }
    }

    /// The byte runs, from offset to offset, neighbours joined: for [`crate::Peer::write`] (`from` is the local region) or
    /// [`crate::Peer::read`] with the sides exchanged.
    pub fn runs(&self) -> Vec<Piece> {
        let (unit, units) = self.units();
        let mut runs: Vec<Piece> = Vec::new();
        for plane in 0..self.from.layout.planes {
            for layer in 0..self.from.layers.len() {
                for head in 0..u64::from(units) {
                    for token in 0..self.tokens {
                        let from = self.from.place(layer, plane, token) + head * self.from.layout.head;
                        let to = self.to.place(layer, plane, token) + head * self.to.layout.head;
                        match runs.last_mut() {
                            Some(r) if r.local_offset + r.len == from && r.remote_offset + r.len == to => {
                                r.len += unit;
                            }
                            _ => runs.push(Piece { local_offset: from, remote_offset: to, len: unit }),
                        }
                    }
                }
            }
        }
        runs
    }
}
