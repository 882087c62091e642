//! Gather and scatter between a paged cache and chunks, beside the same done element by element and beside a plain copy.
//!
//! `cargo bench -p kvxfer-core --bench paged`. 1024 tokens of Llama-3.2-1B, 16 layers with 8 heads of 64 elements of 2 bytes: 32 MiB in
//! four chunks, from blocks of 128 tokens that lie in no order.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvxfer_core::{PagedCache, PagedChunk, PagedLayout, PagedVariant};

const LAYERS: usize = 16;
const CHUNK: usize = 256;
const CHUNKS: usize = 4;
const PAGE: usize = 4096;
const VARIANTS: [(&str, PagedVariant); 2] = [("vec", PagedVariant::Vec), ("amx", PagedVariant::Amx)];

fn layout(variant: PagedVariant) -> PagedLayout {
    PagedLayout { variant, blocks: 64, heads: 8, block_size: 128, head_size: 64, element_bytes: 2 }
}

/// Bytes that begin with a page, as an engine's do.
struct Bytes {
    all: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Bytes {
    fn new(value: u8, len: usize) -> Self {
        let bytes = vec![value; len + PAGE];
        Self { begin: bytes.as_ptr().align_offset(PAGE), all: bytes, len }
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

/// What each measurement moves: eight blocks, spread over the cache.
struct Setting {
    layout: PagedLayout,
    layers: Vec<Bytes>,
    slots: Vec<i64>,
    data: Bytes,
}

impl Setting {
    fn new(variant: PagedVariant) -> Self {
        let layout = layout(variant);
        let block = layout.block_size;
        let slots =
            (0..CHUNK * CHUNKS).map(|t| ((t / block * 29 % layout.blocks) * block + t % block) as i64);
        Self {
            layout,
            layers: (0..LAYERS).map(|i| Bytes::new(i as u8 + 1, layout.layer_bytes())).collect(),
            slots: slots.collect(),
            data: Bytes::new(1, 2 * LAYERS * CHUNK * CHUNKS * layout.row_bytes()),
        }
    }

    fn with(&mut self, f: impl FnOnce(&PagedCache, &[PagedChunk<'_>])) {
        let layers: Vec<_> = self.layers.iter_mut().map(|l| l.as_mut_ptr()).collect();
        // SAFETY: each vector has a layer's bytes.
        let cache = unsafe { PagedCache::new(self.layout, &layers) }.expect("a cache");
        let bytes = self.data.len() / CHUNKS;
        let chunks: Vec<_> = self
            .data
            .chunks_mut(bytes)
            .zip(self.slots.chunks(CHUNK))
            .map(|(data, slots)| PagedChunk { slots, skip: 0, data: data.as_mut_ptr(), len: bytes as u64 })
            .collect();
        f(&cache, &chunks);
    }

    /// Element by element, in the order of the chunk.
    fn naive(&mut self, gather: bool) {
        let l = self.layout;
        let half = l.block_size * l.head_size * 2;
        for (c, slots) in self.slots.chunks(CHUNK).enumerate() {
            for side in 0..2 {
                for layer in 0..LAYERS {
                    for (token, slot) in slots.iter().enumerate() {
                        let (block, place) = (*slot as usize / l.block_size, *slot as usize % l.block_size);
                        for head in 0..l.heads {
                            for dim in 0..l.head_size {
                                let row = ((c * 2 + side) * LAYERS + layer) * CHUNK + token;
                                let chunk = ((row * l.heads + head) * l.head_size + dim) * 2;
                                let inside = match (l.variant, side) {
                                    (PagedVariant::Vec, 0) => dim * l.block_size + place,
                                    (PagedVariant::Vec, _) => place * l.head_size + dim,
                                    (_, 0) => {
                                        (place / 16 * l.head_size / 2 + dim / 2) * 32
                                            + place % 16 * 2
                                            + dim % 2
                                    }
                                    (_, _) => {
                                        (dim / 16 * l.block_size / 2 + place / 2) * 32
                                            + dim % 16 * 2
                                            + place % 2
                                    }
                                };
                                let paged = ((block * l.heads + head) * 2 + side) * half + inside * 2;
                                let (cache, data) = (&mut self.layers[layer], &mut self.data);
                                if gather {
                                    data[chunk..chunk + 2].copy_from_slice(&cache[paged..paged + 2]);
                                } else {
                                    cache[paged..paged + 2].copy_from_slice(&data[chunk..chunk + 2]);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn paged(c: &mut Criterion) {
    let mut group = c.benchmark_group("paged");
    group.sample_size(20);
    for (name, variant) in VARIANTS {
        let mut setting = Setting::new(variant);
        group.throughput(Throughput::Bytes(setting.data.len() as u64));
        for threads in [1, 2] {
            group.bench_function(format!("gather, {name}, {threads} threads"), |b| {
                setting.with(|cache, chunks| {
                    // SAFETY: the vectors are this function's alone.
                    b.iter(|| unsafe { cache.gather(chunks, threads) }.expect("gathers"));
                });
            });
            group.bench_function(format!("scatter, {name}, {threads} threads"), |b| {
                setting.with(|cache, chunks| {
                    // SAFETY: as above.
                    b.iter(|| unsafe { cache.scatter(chunks, threads) }.expect("scatters"));
                });
            });
        }
        group.bench_function(format!("gather, {name}, element by element"), |b| {
            b.iter(|| setting.naive(true));
        });
        group.bench_function(format!("scatter, {name}, element by element"), |b| {
            b.iter(|| setting.naive(false));
        });
    }
    let from = vec![1_u8; Setting::new(PagedVariant::Vec).data.len()];
    let mut to = vec![0_u8; from.len()];
    group.bench_function("a plain copy", |b| {
        b.iter(|| to.copy_from_slice(&from));
    });
    group.finish();
}

criterion_group!(benches, paged);
criterion_main!(benches);
