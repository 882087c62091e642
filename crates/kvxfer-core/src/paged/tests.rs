//! Against a model that knows where each element is and nothing else.

use super::*;
use proptest::prelude::*;

/// Where the element `(place, dim)` of a (block, head) is, counted in elements from its half's first.
fn element(layout: &PagedLayout, values: bool, place: usize, dim: usize) -> usize {
    let (block, head) = (layout.block_size, layout.head_size);
    match (layout.variant, values) {
        (PagedVariant::Vec, false) => dim * block + place,
        (PagedVariant::Vec, true) => place * head + dim,
        (PagedVariant::Amx, false) => (place / 16) * 16 * head + (dim / 2) * 32 + (place % 16) * 2 + dim % 2,
        (PagedVariant::Amx, true) => (dim / 16) * 16 * block + (place / 2) * 32 + (dim % 16) * 2 + place % 2,
    }
}

/// Every element of a chunk: where it is there, and where in which layer; in bytes.
fn places(layout: &PagedLayout, layers: usize, slots: &[i64], skip: usize) -> Vec<(usize, usize, usize)> {
    let mut places = Vec::new();
    let tokens = slots.len();
    for values in [false, true] {
        for layer in 0..layers {
            for (token, slot) in slots.iter().enumerate().skip(skip) {
                let (block, place) = (*slot as usize / layout.block_size, *slot as usize % layout.block_size);
                for head in 0..layout.heads {
                    let half =
                        ((block * layout.heads + head) * 2 + usize::from(values)) * layout.half_bytes();
                    for dim in 0..layout.head_size {
                        let row = (usize::from(values) * layers + layer) * tokens + token;
                        let chunk =
                            ((row * layout.heads + head) * layout.head_size + dim) * layout.element_bytes;
                        let paged = half + element(layout, values, place, dim) * layout.element_bytes;
                        places.push((chunk, layer, paged));
                    }
                }
            }
        }
    }
    places
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Bytes that begin at the start of a cache line, or so many bytes behind one.
#[derive(Clone)]
struct Bytes {
    all: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Bytes {
    fn new(content: &[u8], shift: usize) -> Self {
        let mut bytes = vec![0; content.len() + 128];
        let begin = bytes.as_ptr().align_offset(64) + shift;
        bytes[begin..][..content.len()].copy_from_slice(content);
        Self { all: bytes, begin, len: content.len() }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.all[self.begin..][..self.len]
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.all[self.begin..][..self.len]
    }
}

/// A cache in vectors, and chunks.
struct Setting {
    layout: PagedLayout,
    layers: Vec<Bytes>,
    chunks: Vec<(Vec<i64>, usize, Bytes)>,
    threads: usize,
}

impl Setting {
    fn new(layout: PagedLayout, layers: usize, slots: Vec<(Vec<i64>, usize)>, threads: usize) -> Self {
        let chunk = |(i, (slots, skip)): (usize, (Vec<i64>, usize))| {
            let bytes = 2 * layers * slots.len() * layout.row_bytes();
            (slots, skip, Bytes::new(&noise(bytes, 1000 + i as u64), 0))
        };
        Self {
            layout,
            layers: (0..layers).map(|i| Bytes::new(&noise(layout.layer_bytes(), i as u64), 0)).collect(),
            chunks: slots.into_iter().enumerate().map(chunk).collect(),
            threads,
        }
    }

    /// The same with all memory so many bytes behind a cache line.
    fn shifted(mut self, shift: usize) -> Self {
        for bytes in self.layers.iter_mut().chain(self.chunks.iter_mut().map(|c| &mut c.2)) {
            *bytes = Bytes::new(bytes, shift);
        }
        self
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        self.layers.iter().chain(self.chunks.iter().map(|c| &c.2)).map(|b| b.to_vec()).collect()
    }

    fn run(&mut self, gather: bool) -> Result<()> {
        let layers: Vec<*mut u8> = self.layers.iter_mut().map(|l| l.as_mut_ptr()).collect();
        // SAFETY: each vector has as many bytes as a layer, and lives longer than the cache.
        let cache = unsafe { PagedCache::new(self.layout, &layers) }?;
        let chunks: Vec<_> = self
            .chunks
            .iter_mut()
            .map(|(slots, skip, data)| PagedChunk {
                slots,
                skip: *skip,
                data: data.as_mut_ptr(),
                len: data.len() as u64,
            })
            .collect();
        // SAFETY: the vectors are nobody else's.
        unsafe {
            if gather { cache.gather(&chunks, self.threads) } else { cache.scatter(&chunks, self.threads) }
        }
    }

    /// Moves both ways and compares every byte on both sides.
    fn check(mut self) {
        let before: Vec<_> = self.chunks.iter().map(|c| c.2.to_vec()).collect();
        self.run(true).unwrap();
        for ((slots, skip, chunk), mut expected) in self.chunks.iter().zip(before) {
            for (at, layer, paged) in places(&self.layout, self.layers.len(), slots, *skip) {
                let bytes = self.layout.element_bytes;
                expected[at..at + bytes].copy_from_slice(&self.layers[layer][paged..paged + bytes]);
            }
            assert!(**chunk == *expected, "gathered chunk differs");
        }
        for (i, chunk) in self.chunks.iter_mut().enumerate() {
            let new = noise(chunk.2.len(), 2000 + i as u64);
            chunk.2.copy_from_slice(&new);
        }
        let mut expected: Vec<_> = self.layers.iter().map(|l| l.to_vec()).collect();
        for (slots, skip, chunk) in &self.chunks {
            for (at, layer, paged) in places(&self.layout, self.layers.len(), slots, *skip) {
                let bytes = self.layout.element_bytes;
                expected[layer][paged..paged + bytes].copy_from_slice(&chunk[at..at + bytes]);
            }
        }
        self.run(false).unwrap();
        assert!(self.layers.iter().zip(&expected).all(|(a, b)| **a == **b), "scattered cache differs");
    }
}

fn vec(
    blocks: usize,
    heads: usize,
    block_size: usize,
    head_size: usize,
    element_bytes: usize,
) -> PagedLayout {
    PagedLayout { variant: PagedVariant::Vec, blocks, heads, block_size, head_size, element_bytes }
}

fn amx(blocks: usize, heads: usize, block_size: usize, head_size: usize) -> PagedLayout {
    PagedLayout { variant: PagedVariant::Amx, ..vec(blocks, heads, block_size, head_size, 2) }
}

/// Blocks in an order of their own, all tokens of each.
fn whole_blocks(layout: &PagedLayout, blocks: &[usize]) -> Vec<i64> {
    let slots = |b: &usize| (b * layout.block_size) as i64..((b + 1) * layout.block_size) as i64;
    blocks.iter().flat_map(slots).collect()
}

#[test]
fn large_moves_are_streamed_and_arrive_like_small_ones() {
    let layouts = [
        vec(6, 4, 128, 64, 2),
        vec(6, 4, 64, 64, 4),
        vec(6, 3, 96, 80, 2),
        amx(6, 4, 128, 64),
        amx(6, 3, 64, 96),
    ];
    for layout in layouts {
        for threads in [1, 3] {
            let mut slots = whole_blocks(&layout, &[4, 0, 2, 5]);
            // A part of a block at either end, and a chunk whose begin is left alone.
            slots.extend(layout.block_size as i64 + 3..layout.block_size as i64 + 24);
            let other = slots.split_off(5);
            let chunks = vec![(slots, 0), (other, 7)];
            for shift in [0, 16, 6] {
                let setting = Setting::new(layout, 9, chunks.clone(), threads).shifted(shift);
                assert!(setting.chunks[1].2.len() > 2 << 20, "large enough to be streamed");
                setting.check();
            }
        }
    }
}

#[test]
fn of_slots_that_are_named_twice_the_later_token_stays() {
    let layout = vec(4, 2, 32, 64, 2);
    let slots = vec![(vec![5, 6, 7, 5, 6], 0), (vec![7, 6, 90, 7], 1)];
    for threads in [1, 4] {
        Setting::new(layout, 3, slots.clone(), threads).check();
    }
    // Streamed: whole blocks, one of them twice, and then a part of it.
    let layout = vec(4, 4, 128, 64, 2);
    let mut slots = whole_blocks(&layout, &[1, 3, 1, 0, 2]);
    slots.extend(140..150);
    Setting::new(layout, 8, vec![(slots, 0)], 2).check();
}

#[test]
fn nothing_to_move_is_fine() {
    Setting::new(vec(2, 1, 16, 32, 2), 2, vec![(vec![], 0), (vec![3, 4], 2)], 0).check();
    Setting::new(vec(2, 1, 16, 32, 2), 2, vec![], 0).check();
}

#[test]
fn wrong_arguments_are_named_and_nothing_moves() {
    fn refused(setting: &mut Setting, words: &[&str]) {
        for gather in [true, false] {
            let before = setting.bytes();
            let text = setting.run(gather).unwrap_err().to_string();
            for word in words {
                assert!(text.contains(word), "{text:?} lacks {word:?}");
            }
            assert!(before == setting.bytes(), "something moved: {text}");
        }
    }
    let good = || Setting::new(vec(3, 2, 16, 32, 2), 2, vec![(vec![1, 2, 3], 0), (vec![9; 2], 0)], 1);
    good().run(true).unwrap();

    let mut s = good();
    s.chunks[1].0[1] = 48;
    refused(&mut s, &["chunk 1", "token 1", "slot 48", "3 blocks of 16"]);
    s.chunks[1].0[1] = -1;
    refused(&mut s, &["slot -1"]);
    s.chunks[1].1 = 3;
    refused(&mut s, &["chunk 1 skips 3 of 2"]);
    s.chunks[1].2.len -= 1;
    refused(&mut s, &["chunk 1 has 1023 bytes", "2 tokens of 2 layers", "1024"]);
    s.layout.head_size = 0;
    refused(&mut s, &["head_size", "is 0"]);
    s.layout = vec(3, 2, 16, 32, 1);
    refused(&mut s, &["element_bytes", "is 1"]);
    s.layout = vec(usize::MAX / 2, 2, 16, 32, 2);
    refused(&mut s, &["larger than memory"]);
    s.layout = PagedLayout { element_bytes: 4, ..amx(3, 2, 32, 32) };
    refused(&mut s, &["amx", "is 4", "2 bytes"]);
    s.layout = amx(3, 2, 48, 32);
    refused(&mut s, &["block_size", "48", "multiples of 32"]);
    s.layout = amx(3, 2, 32, 80);
    refused(&mut s, &["head_size", "80"]);
    s.layout = vec(3, 2, 16, 32, 2);
    s.layers.clear();
    refused(&mut s, &["layers", "0 of them"]);
}

#[test]
fn memory_that_would_be_written_twice_or_read_while_written_is_refused() {
    let layout = vec(2, 1, 16, 32, 2);
    let mut layers = vec![vec![0_u8; layout.layer_bytes() + 64]; 2];
    let mut data = vec![0_u8; 1024];
    let bases: Vec<_> = layers.iter_mut().map(Vec::as_mut_ptr).collect();
    let chunk = |data: *mut u8| PagedChunk { slots: &[0, 1], skip: 0, data, len: 512 };
    let data = data.as_mut_ptr();
    let text = |r: Result<()>| r.unwrap_err().to_string();
    // SAFETY: for all of these: the vectors are large enough, live to the end, and are nobody else's.
    unsafe {
        let cache = PagedCache::new(layout, &bases).unwrap();
        let both = [chunk(data), chunk(data.add(511))];
        assert!(text(cache.gather(&both, 1)).contains("chunk 0 and chunk 1 share memory"));
        cache.scatter(&both, 1).unwrap();
        let inside = [chunk(data), chunk(bases[1].add(8))];
        assert!(text(cache.gather(&inside, 1)).contains("chunk 1 and layer 1 share memory"));
        assert!(text(cache.scatter(&inside, 1)).contains("layer 1 and chunk 1 share memory"));
        let twice = PagedCache::new(layout, &[bases[0], bases[0].add(32)]).unwrap();
        assert!(text(twice.scatter(&[chunk(data)], 1)).contains("layer 0 and layer 1 share memory"));
        twice.gather(&[chunk(data)], 1).unwrap();
        assert!(PagedCache::new(layout, &[bases[0], std::ptr::null_mut()]).is_err());
    }
}

prop_compose! {
    fn layouts()(
        kind in 0..3_usize, blocks in 1..5_usize, heads in 1..4_usize, block in 1..70_usize, head in 1..90_usize,
        blocks_of_32 in 1..3_usize, heads_of_32 in 1..4_usize,
    ) -> PagedLayout {
        match kind {
            0 => vec(blocks, heads, block, head, 2),
            1 => vec(blocks, heads, block, head, 4),
            _ => amx(blocks, heads, 32 * blocks_of_32, 32 * heads_of_32),
        }
    }
}

prop_compose! {
    /// Neighbours mostly, as an engine's are, with jumps.
    fn slots(limit: i64)(pieces in prop::collection::vec((0..limit, 1..50_i64), 0..8)) -> Vec<i64> {
        pieces.into_iter().flat_map(|(first, count)| first..(first + count).min(limit)).collect()
    }
}

fn settings() -> impl Strategy<Value = Setting> {
    layouts().prop_flat_map(|layout| {
        let chunk = (slots((layout.blocks * layout.block_size) as i64), 0..4_usize);
        (1..4_usize, prop::collection::vec(chunk, 0..4), 1..4_usize).prop_map(
            move |(layers, chunks, threads)| {
                let chunks =
                    chunks.into_iter().map(|(slots, skip)| (slots.clone(), skip.min(slots.len()))).collect();
                Setting::new(layout, layers, chunks, threads)
            },
        )
    })
}

impl std::fmt::Debug for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let chunks: Vec<_> = self.chunks.iter().map(|(slots, skip, _)| (slots, skip)).collect();
        write!(f, "{:?}, {} layers, {} threads, {chunks:?}", self.layout, self.layers.len(), self.threads)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn every_element_is_where_the_layout_says_and_nothing_else_changes(setting in settings()) {
        setting.check();
    }
}
