//! The lists of runs against a model that knows shapes and nothing of strides, and what is refused.

use super::*;
use crate::Memory;
use crate::memory::HugePages;
use kvxfer_proto::ErrorCode;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A shape as engines write it, and where the bytes of (plane, block, token, head) begin.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// `[2, blocks, block, heads, head]`
    KvBlocksTokensHeads,
    /// `[blocks, 2, block, heads, head]`
    BlocksKvTokensHeads,
    /// `[2, blocks, heads, block, head]`
    KvBlocksHeadsTokens,
    /// `[blocks, 2, heads, block, head]`
    BlocksKvHeadsTokens,
}

const SHAPES: [Shape; 4] = [
    Shape::KvBlocksTokensHeads,
    Shape::BlocksKvTokensHeads,
    Shape::KvBlocksHeadsTokens,
    Shape::BlocksKvHeadsTokens,
];

#[derive(Clone, Copy, Debug)]
struct Sizes {
    blocks: u64,
    block: u64,
    heads: u64,
    head: u64,
}

impl Shape {
    fn index(self, s: Sizes, plane: u64, b: u64, t: u64, h: u64) -> u64 {
        let flat = |indices: [u64; 4], sizes: [u64; 4]| {
            indices.iter().zip(sizes).fold(0, |at, (i, n)| {
                assert!(*i < n);
                at * n + i
            }) * s.head
        };
        match self {
            Self::KvBlocksTokensHeads => flat([plane, b, t, h], [2, s.blocks, s.block, s.heads]),
            Self::BlocksKvTokensHeads => flat([b, plane, t, h], [s.blocks, 2, s.block, s.heads]),
            Self::KvBlocksHeadsTokens => flat([plane, b, h, t], [2, s.blocks, s.heads, s.block]),
            Self::BlocksKvHeadsTokens => flat([b, plane, h, t], [s.blocks, 2, s.heads, s.block]),
        }
    }
    fn layout(self, s: Sizes) -> Layout {
        let (order, heads_first) = match self {
            Self::KvBlocksTokensHeads => (Order::KvFirst, false),
            Self::BlocksKvTokensHeads => (Order::BlocksFirst, false),
            Self::KvBlocksHeadsTokens => (Order::KvFirst, true),
            Self::BlocksKvHeadsTokens => (Order::BlocksFirst, true),
        };
        Layout::paged(order, heads_first, s.blocks as u32, s.block as u32, s.heads as u32, s.head)
    }
}

fn memory(bytes: u64) -> Arc<Memory> {
    Memory::shared(bytes as usize, HugePages::Never).unwrap()
}

/// Source offset by target offset, 8 bytes at a time.
fn moved(runs: &[crate::Piece]) -> BTreeMap<u64, u64> {
    let mut map = BTreeMap::new();
    for r in runs {
        for at in (0..r.len).step_by(8) {
            assert_eq!(map.insert(r.remote_offset + at, r.local_offset + at), None, "written twice");
        }
    }
    map
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn runs_are_what_the_shapes_say(
        shape in 0usize..4,
        (blocks, block, heads, head) in (1u64..6, 1u64..5, 1u64..4, 1u64..4),
        layers in 1u64..4,
        seed in any::<u64>(),
        slots in any::<bool>(),
    ) {
        let (shape, s) = (SHAPES[shape], Sizes { blocks, block, heads, head: head * 8 });
        let layer_bytes = 2 * s.blocks * s.block * s.heads * s.head;
        let capacity = s.blocks * s.block;
        let mut x = seed | 1;
        let mut random = |n: u64| { x ^= x << 13; x ^= x >> 7; x ^= x << 17; x % n };
        // Tokens in any order, or a table of blocks with a part of the first.
        let (tokens, count, place): (Tokens, u64, Vec<u64>) = if slots {
            let count = 1 + random(capacity);
            let mut all: Vec<u64> = (0..capacity).collect();
            for i in (1..all.len()).rev() { all.swap(i, random(i as u64 + 1) as usize); }
            all.truncate(count as usize);
            (Tokens::Slots(all.iter().map(|s| *s as i64).collect()), count, all)
        } else {
            let mut ids: Vec<u64> = (0..s.blocks).collect();
            for i in (1..ids.len()).rev() { ids.swap(i, random(i as u64 + 1) as usize); }
            let first = random(s.block);
            let count = 1 + random(capacity - first);
            let place = (first..first + count).map(|t| ids[(t / s.block) as usize] * s.block + t % s.block).collect();
            (Tokens::Blocks { ids: ids.iter().map(|b| *b as u32).collect(), first: first as u32 }, count, place)
        };
        let cache = memory(layers * layer_bytes);
        let chunk = memory(2 * layers * count * s.heads * s.head);
        // The layers backwards, as any subset may be.
        let offsets: Vec<u64> = (0..layers).rev().map(|l| l * layer_bytes).collect();
        let paged = View { layout: shape.layout(s), memory: cache, layers: offsets.clone(), tokens };
        let straight = View::chunk(chunk, 0, layers as u32, count as u32, s.heads as u32, s.head);
        let mut expected = BTreeMap::new();
        for plane in 0..2 {
            for (l, offset) in offsets.iter().enumerate() {
                for (t, at) in place.iter().enumerate() {
                    for h in 0..s.heads {
                        let from = offset + shape.index(s, plane, at / s.block, at % s.block, h);
                        let to = (((plane * layers + l as u64) * count + t as u64) * s.heads + h) * s.head;
                        for byte in (0..s.head).step_by(8) {
                            expected.insert(to + byte, from + byte);
                        }
                    }
                }
            }
        }
        let gather = Gather::new(paged.clone(), straight.clone(), count as u32).unwrap();
        prop_assert_eq!(gather.bytes(), 8 * expected.len() as u64);
        prop_assert_eq!(&moved(&gather.runs()), &expected);
        let back = Gather::new(straight, paged, count as u32).unwrap();
        let turned: BTreeMap<u64, u64> = expected.into_iter().map(|(to, from)| (from, to)).collect();
        prop_assert_eq!(moved(&back.runs()), turned);
    }
}

#[test]
fn neighbours_become_one_run() {
    let s = Sizes { blocks: 8, block: 16, heads: 8, head: 256 };
    let layout = Shape::KvBlocksTokensHeads.layout(s);
    let cache = memory(4 * layout.extent().unwrap());
    let layers: Vec<u64> = (0..4).map(|l| l * layout.extent().unwrap()).collect();
    let tokens = Tokens::Blocks { ids: vec![5, 2, 3, 7], first: 0 };
    let paged = View { layout, memory: cache, layers, tokens };
    let chunk = View::chunk(memory(4 * 2 * 60 * 2048), 0, 4, 60, 8, 256);
    // 60 tokens: blocks 5, 2 and 3 (neighbours), and 12 tokens of block 7; for each of 4 layers and 2 planes.
    let runs = Gather::new(paged, chunk, 60).unwrap().runs();
    let lengths: Vec<_> = runs.iter().take(3).map(|r| r.len / 2048).collect();
    assert_eq!((runs.len(), lengths), (3 * 8, vec![16, 32, 12]));
}

#[test]
fn what_does_not_fit_is_named() {
    let s = Sizes { blocks: 4, block: 16, heads: 2, head: 64 };
    let layout = Shape::BlocksKvTokensHeads.layout(s);
    let bytes = layout.extent().unwrap();
    let paged = |layout, layers, tokens| View { layout, memory: memory(bytes), layers, tokens };
    let chunk = |tokens, heads, head| View::chunk(memory(1 << 20), 0, 1, tokens, heads, head);
    let table = |ids: &[u32], first| Tokens::Blocks { ids: ids.to_vec(), first };
    let good = || paged(layout, vec![0], table(&[0, 1], 0));
    let says = |from: View, to: View, tokens, what: &str| {
        let e = Gather::new(from, to, tokens).unwrap_err();
        assert!(e.to_string().contains(what), "{e}");
        assert!(matches!(e.code(), ErrorCode::InvalidArgument | ErrorCode::OutOfRange), "{e}");
    };
    Gather::new(good(), chunk(32, 2, 64), 32).unwrap();
    says(good(), chunk(32, 2, 64), 0, "tokens: is 0");
    says(good(), chunk(33, 2, 64), 33, "hold 32");
    says(good(), chunk(31, 2, 64), 32, "there are 31");
    says(good(), chunk(32, 4, 64), 32, "heads: 2 in one view, 4");
    says(good(), chunk(32, 2, 32), 32, "bytes of a head: 64 in one view, 32");
    says(
        paged(layout, vec![0], table(&[0, 4], 0)),
        chunk(32, 2, 64),
        32,
        "block 4 (number 1 of the table) of 4",
    );
    says(paged(layout, vec![0], table(&[0, 1], 1)), chunk(32, 2, 64), 32, "hold 32");
    says(paged(layout, vec![0], Tokens::Slots(vec![0, 64])), chunk(2, 2, 64), 2, "slot 64 (token 1)");
    says(paged(layout, vec![0], Tokens::Slots(vec![-1])), chunk(1, 2, 64), 1, "slot -1 (token 0)");
    says(paged(layout, vec![0], Tokens::Slots(vec![0])), chunk(2, 2, 64), 2, "1 slots for 2 tokens");
    says(paged(layout, vec![], table(&[0], 0)), chunk(1, 2, 64), 1, "0 layers");
    says(paged(layout, vec![8], table(&[0], 0)), chunk(1, 2, 64), 1, "from: layer 0");
    says(paged(layout, vec![u64::MAX], table(&[0], 0)), chunk(1, 2, 64), 1, "from: layer 0");
    says(paged(layout, vec![0, 0], table(&[0], 0)), chunk(1, 2, 64), 1, "layers: 2 in one view, 1");
    says(paged(Layout { heads: 0, ..layout }, vec![0], table(&[0], 0)), chunk(1, 2, 64), 1, "heads is 0");
    says(paged(Layout { planes: 3, ..layout }, vec![0], table(&[0], 0)), chunk(1, 2, 64), 1, "3 planes");
    says(paged(Layout { head_bytes: 12, ..layout }, vec![0], table(&[0], 0)), chunk(1, 2, 64), 1, "12 bytes");
    let wild = Layout { heads: 1, head_bytes: (1 << 32) + 64, ..layout };
    says(paged(wild, vec![0], table(&[0], 0)), chunk(1, 2, 64), 1, "1 heads of 4294967360 bytes");
    says(
        paged(Layout { block: u64::MAX, ..layout }, vec![0], table(&[0], 0)),
        chunk(1, 2, 64),
        1,
        "larger than memory",
    );
    let latent = View {
        layout: Layout::latent(4, 16, 64),
        memory: memory(bytes),
        layers: vec![0],
        tokens: table(&[0], 0),
    };
    says(latent, chunk(1, 1, 64), 1, "planes: 1 in one view, 2");
}

#[test]
fn the_digest_tells_places_apart() {
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
    let mut swapped = bytes.clone();
    swapped.swap(0, 8);
    assert_ne!(digest(&bytes), digest(&swapped));
    assert_eq!(digest(&[]), 0);
    // Zeros in another number of words differ.
    assert_ne!(digest(&[0; 8]), digest(&[0; 16]));
    // Fixed for both sides of a transfer, whatever their versions.
    assert_eq!(digest(&bytes), 0xaa3b_68fe_4769_c78f);
}
