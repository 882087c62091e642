//! The hot pieces by themselves: planning a scattered request, digests, control messages, and the submitting call.
//!
//! `kvxfer bench` measures whole transfers between processes; this tells which piece changed when that does.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kvxfer::agent::Access;
use kvxfer::proto::integrity::{Binding, segment_hash};
use kvxfer::proto::layout::Layout;
use kvxfer::proto::plan::{PlanChunk, Striping, plan};
use kvxfer::proto::wire::{ChunkSpec, Message};
use kvxfer::proto::{ChunkKey, Generation, Integrity, PageIndex, RequestId, frame};
use kvxfer::{Agent, Piece, TransferOptions, TransportKind};
use std::hint::black_box;
use std::time::Duration;

const PAGE: u64 = 32 << 20;
const DESCRIPTORS: u64 = 16_384;

fn key(i: u64) -> ChunkKey {
    ChunkKey::new(format!("meta-llama/Llama-3.1-8B-Instruct@1@0@{i:016x}@bfloat16")).expect("a valid key")
}

/// A request of 32 chunks, each of 512 runs of 64 KiB in an order that nothing can merge.
fn planning(c: &mut Criterion) {
    let layout = Layout::new(PAGE, 32).expect("a pool");
    let runs: Vec<(u64, u64)> = (0..512_u64).map(|i| (i * 7 % 512 * (64 << 10), 64 << 10)).collect();
    let chunks: Vec<PlanChunk<'_>> = (0..32)
        .map(|i| PlanChunk { chunk: i, page: PageIndex(31 - i), len: PAGE, source_len: PAGE, runs: &runs })
        .collect();
    let mut group = c.benchmark_group("plan");
    group.throughput(Throughput::Elements(DESCRIPTORS));
    group.bench_function("16384 runs, one lane", |b| {
        b.iter(|| plan(&layout, black_box(&chunks), Striping::NONE));
    });
    let striped = Striping { lanes: 4, frame_bytes: 1 << 20 };
    group.bench_function("16384 runs, four lanes", |b| b.iter(|| plan(&layout, black_box(&chunks), striped)));
    group.finish();
}

fn digests(c: &mut Criterion) {
    let bytes = vec![0x5A_u8; 256 << 10];
    let binding = Binding {
        request: RequestId::new("cmpl-1").expect("a valid id"),
        key: key(1),
        len: PAGE,
        page: PageIndex(3),
        generation: Generation(9),
    };
    let mut group = c.benchmark_group("digest");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("one segment of 256 KiB", |b| b.iter(|| segment_hash(black_box(&bytes))));
    group.throughput(Throughput::Elements(1));
    group.bench_function("bound, a chunk of 32 MiB", |b| {
        b.iter(|| {
            black_box(&binding).bound(|offset, out| {
                out.fill(offset as u8);
                Ok::<(), ()>(())
            })
        });
    });
    group.finish();
}

fn messages(c: &mut Criterion) {
    let reserve = Message::Reserve {
        channel: 1,
        serial: 1,
        request: RequestId::new("cmpl-1").expect("a valid id"),
        chunks: (0..32).map(|i| ChunkSpec { key: key(i), len: PAGE }).collect(),
        deadline_ms: 60_000,
        integrity: Integrity::Bound,
        more: 0,
        places: Vec::new(),
        advance: 0,
    };
    let encoded = frame::encode(&reserve).expect("encodes");
    let mut group = c.benchmark_group("reserve of 32 chunks");
    group.bench_function("encode", |b| b.iter(|| frame::encode(black_box(&reserve))));
    // A frame is its payload behind a length of four bytes.
    group.bench_function("decode", |b| b.iter(|| frame::decode(black_box(&encoded[4..]))));
    group.finish();
}

/// The submitting call between two agents of this process; the transfer's end is waited for outside the measured time.
fn submit(c: &mut Criterion) {
    let target = Agent::builder().name("target").listen("tcp://127.0.0.1:0").build().expect("an agent");
    let source = Agent::builder().name("source").build().expect("an agent");
    let wait = Duration::from_secs(30);
    let len = (DESCRIPTORS * 4096) as usize;
    let (here, there) = (source.allocate(len).expect("memory"), target.allocate(len).expect("memory"));
    target.export(&there, "pool", Access::ReadWrite).expect("exported");
    let peer = source.connect(&target.addresses()[0], wait).expect("connected");
    let remote = peer.region("pool", wait).expect("found");
    let pieces: Vec<Piece> = (0..DESCRIPTORS)
        .map(|i| Piece { local_offset: i * 4096, remote_offset: i * 5 % DESCRIPTORS * 4096, len: 4096 })
        .collect();
    let mut group = c.benchmark_group("submit");
    group.sample_size(20);
    group.throughput(Throughput::Elements(DESCRIPTORS));
    group.bench_function("16384 descriptors of 4 KiB, inproc", |b| {
        b.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                let options =
                    TransferOptions { transport: Some(TransportKind::Inproc), ..TransferOptions::default() };
                let start = std::time::Instant::now();
                let transfer = peer.write(&here, &remote, black_box(&pieces), options).expect("submitted");
                spent += start.elapsed();
                transfer.wait(wait).expect("ended").ok().expect("moved");
            }
            spent
        });
    });
    group.bench_function("a 64-byte write to its end, inproc", |b| {
        let one = [Piece { local_offset: 0, remote_offset: 0, len: 64 }];
        b.iter_batched(
            TransferOptions::default,
            |options| {
                peer.write(&here, &remote, &one, options).expect("submitted").wait(wait).expect("ended")
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, planning, digests, messages, submit);
criterion_main!(benches);
