//! What a layer of a paged cache looks like.

use super::invalid;
use crate::Result;

/// In which order the attention kernels keep the elements of a (block, head).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PagedVariant {
    /// vLLM's `vec` and `vec16` kernels: keys `[head size][block size]`, values `[block size][head size]`.
    Vec,
    /// vLLM's `amx` kernels, two bytes an element: keys `[block size / 16][head size / 2][16][2]`, values
    /// `[head size / 16][block size / 2][16][2]`.
    Amx,
}

/// Shape of each layer of a paged cache, `[blocks, heads, block_size, 2 * head_size]`, contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedLayout {
    /// Order of the elements.
    pub variant: PagedVariant,
    /// Blocks.
    pub blocks: usize,
    /// Heads of keys and of values.
    pub heads: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Elements of a head.
    pub head_size: usize,
    /// Bytes of an element: 2 or 4.
    pub element_bytes: usize,
}

/// Tokens that AMX keys, and elements that AMX values, have in a group.
pub(super) const GROUP: usize = 16;
/// The attention kernels for AMX take blocks and heads in multiples of this.
const AMX_MULTIPLE: usize = 32;

impl PagedLayout {
    /// Bytes of a layer.
    pub fn layer_bytes(&self) -> usize {
        self.blocks * self.block_bytes()
    }

    /// Bytes of a token's keys, or of its values, in one layer of a chunk.
    pub fn row_bytes(&self) -> usize {
        self.heads * self.head_bytes()
    }

    /// Bytes of one head of a token.
    pub(super) fn head_bytes(&self) -> usize {
        self.head_size * self.element_bytes
    }

    /// Bytes of the keys, or of the values, of a (block, head).
    pub(super) fn half_bytes(&self) -> usize {
        self.block_size * self.head_bytes()
    }

    pub(super) fn block_bytes(&self) -> usize {
        2 * self.heads * self.half_bytes()
    }

    pub(super) fn slots(&self) -> u64 {
        self.blocks as u64 * self.block_size as u64
    }

    pub(super) fn check(&self) -> Result<()> {
        let sizes = [
            ("blocks", self.blocks),
            ("heads", self.heads),
            ("block_size", self.block_size),
            ("head_size", self.head_size),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(invalid(name, "is 0"));
        }
        if ![2, 4].contains(&self.element_bytes) {
            return Err(invalid(
                "element_bytes",
                format!("is {}; elements of 2 and 4 bytes are known", self.element_bytes),
            ));
        }
        let bytes =
            sizes.iter().try_fold(2 * self.element_bytes, |bytes, (_, size)| bytes.checked_mul(*size));
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            return Err(invalid("blocks", format!("{self:?} is larger than memory can be")));
        }
        if self.variant == PagedVariant::Amx {
            if self.element_bytes != 2 {
                let bytes = self.element_bytes;
                return Err(invalid(
                    "element_bytes",
                    format!("is {bytes}; the amx layout is known for elements of 2 bytes"),
                ));
            }
            for (name, size) in &sizes[2..] {
                if size % AMX_MULTIPLE != 0 {
                    return Err(invalid(
                        name,
                        format!("is {size}; the amx layout has multiples of {AMX_MULTIPLE}"),
                    ));
                }
            }
        }
        Ok(())
    }
}
