//! The kernel between paged caches and chunks, under the stand-in driver or on this machine's GPU, against a model that copies row by row.
#![cfg(feature = "cuda")]

#[path = "cuda/harness.rs"]
mod harness;
#[expect(dead_code, reason = "only streams are needed here")]
#[path = "cuda/raw.rs"]
mod raw;
#[path = "cuda/standin.rs"]
mod standin;

#[path = "common/mod.rs"]
mod common;

use common::bytes as all;
use kvxfer_core::cuda::Device;
use kvxfer_core::gather::{Gather, Layout, Order, Tokens, View, digest};
use kvxfer_core::memory::HugePages;
use kvxfer_core::{ErrorCode, Memory};
use std::sync::Arc;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

macro_rules! scenarios {
    ($($name:ident $([$($key:ident = $value:expr),*])?;)*) => {$(
        mod $name {
            #[test]
            fn gather() {
                super::harness::run(concat!(stringify!($name), "::gather"), &[$($((stringify!($key), $value)),*)?], super::$name);
            }
        }
    )*};
}

scenarios! {
    every_layout_to_a_chunk_and_back;
    pages_to_pages;
    latent_attention;
    layer_by_layer;
    many_layers_take_several_launches;
    some_heads_only;
    the_peer_gets_it_in_one_pass;
    pinned_host_memory_and_what_is_not_reached;
    a_fence_is_kept;
    kernels_between_devices_touch_no_host_memory;
    skipped_tokens_count_once [KVXSTANDIN_DEVICES = "1"];
    a_failing_step_is_an_error_and_leaves_nothing [KVXSTANDIN_DEVICES = "1"];
    without_kernels_copies_do_the_same [KVXSTANDIN_FAIL = "cuModuleLoadDataEx:0:218", KVXFER_NVRTC = "0"];
    a_driver_too_old_for_the_ptx_gets_machine_code [KVXSTANDIN_FAIL = "cuModuleLoadDataEx:1:222", LD_LIBRARY_PATH = "nvrtc"];
    a_compiler_that_is_asked_for_serves_a_driver_without_one [KVXSTANDIN_FAIL = "cuModuleLoadDataEx:1:221,cuModuleLoadDataEx:2:221", KVXFER_NVRTC = "installed"];
    kernels_compiled_because_it_is_asked_for [KVXFER_NVRTC = "installed"];
    an_error_that_is_not_the_ptx_is_not_answered_by_compiling [KVXSTANDIN_FAIL = "cuModuleLoadDataEx:1:2", LD_LIBRARY_PATH = "nvrtc"];
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
    fn shuffled(&mut self, n: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n).collect();
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
}

fn device(bytes: u64) -> Arc<Memory> {
    Memory::device(&Device::get(0).unwrap(), bytes as usize).unwrap()
}

/// Where a token's head lies, by the layout's own words; the list of runs is tested against shapes elsewhere.
fn place(view: &View, layer: usize, plane: u32, token: u32, head: u32) -> usize {
    let l = &view.layout;
    let at = match &view.tokens {
        Tokens::From(first) => u64::from(first + token),
        Tokens::Blocks { ids, first } => {
            let t = first + token;
            u64::from(ids[(t / l.block_tokens) as usize] * l.block_tokens + t % l.block_tokens)
        }
        Tokens::Slots(slots) => slots[token as usize] as u64,
    };
    let (block, within) = (at / u64::from(l.block_tokens), at % u64::from(l.block_tokens));
    (view.layers[layer]
        + u64::from(plane) * l.plane
        + block * l.block
        + within * l.token
        + u64::from(head) * l.head) as usize
}

/// Carries it out on the device, and compares target, surroundings and digest.
fn check(from: View, to: View, tokens: u32, what: &str) {
    let (source, mut expected) = (all(&from.memory), all(&to.memory));
    let mut in_order = Vec::new();
    let l = from.layout;
    for plane in 0..l.planes {
        for layer in 0..from.layers.len() {
            for token in 0..tokens {
                for head in 0..l.heads {
                    let (a, b) =
                        (place(&from, layer, plane, token, head), place(&to, layer, plane, token, head));
                    let n = l.head_bytes as usize;
                    in_order.extend_from_slice(&source[a..a + n]);
                    expected[b..b + n].copy_from_slice(&source[a..a + n]);
                }
            }
        }
    }
    let target = to.memory.clone();
    let gather = Gather::new(from, to, tokens).unwrap();
    let done = gather.start(None, true).unwrap().wait(SOON).unwrap();
    assert_eq!(done.bytes, in_order.len() as u64, "{what}");
    assert!(all(&target) == expected, "{what}: the bytes, or those around them");
    assert_eq!(done.digest, Some(digest(&in_order)), "{what}: digest");
    // The list of runs comes to the same.
    let mut by_runs = all(&target);
    for r in gather.runs() {
        let (a, b, n) = (r.local_offset as usize, r.remote_offset as usize, r.len as usize);
        by_runs[b..b + n].copy_from_slice(&source[a..a + n]);
    }
    assert!(by_runs == expected, "{what}: runs");
}

const LAYOUTS: [(Order, bool); 4] = [
    (Order::KvFirst, false),
    (Order::BlocksFirst, false),
    (Order::KvFirst, true),
    (Order::BlocksFirst, true),
];

fn paged(layout: Layout, layers: u64, gap: u64, random: &mut Random, tokens: Tokens) -> View {
    let bytes = layout.plane * u64::from(layout.planes - 1)
        + u64::from(layout.blocks - 1) * layout.block
        + u64::from(layout.block_tokens - 1) * layout.token
        + u64::from(layout.heads - 1) * layout.head
        + layout.head_bytes;
    let step = bytes.next_multiple_of(16) + gap;
    let memory = device(gap + layers * step);
    memory.write_at(0, &random.bytes(memory.len())).unwrap();
    View { layout, memory, layers: (0..layers).map(|i| gap + i * step).collect(), tokens }
}

fn table(random: &mut Random, blocks: u32, block_tokens: u32) -> (Tokens, u32) {
    if random.below(2) == 0 {
        let first = random.below(block_tokens.into()) as u32;
        let count = 1 + random.below((blocks * block_tokens - first).into()) as u32;
        return (Tokens::Blocks { ids: random.shuffled(blocks), first }, count);
    }
    let slots: Vec<i64> = random.shuffled(blocks * block_tokens).into_iter().map(i64::from).collect();
    let count = 1 + random.below(slots.len() as u64) as usize;
    (Tokens::Slots(slots[..count].to_vec()), count as u32)
}

fn every_layout_to_a_chunk_and_back() {
    let mut random = Random(11);
    for round in 0..6 {
        for (order, heads_first) in LAYOUTS {
            // Heads of 8-byte multiples take the narrow kernel, the others the wide one.
            let head_bytes = [256, 64, 24, 8, 128, 40][round];
            let (blocks, block_tokens, heads) =
                (1 + random.below(6) as u32, [16, 8, 3, 1, 32, 5][round], 1 + random.below(8) as u32);
            let layers = 1 + random.below(5);
            let layout = Layout::paged(order, heads_first, blocks, block_tokens, heads, head_bytes);
            let (tokens, count) = table(&mut random, blocks, block_tokens);
            let pages = paged(layout, layers, 64, &mut random, tokens);
            let chunk_bytes = 2 * layers * u64::from(count) * u64::from(heads) * head_bytes;
            let memory = device(chunk_bytes + 128);
            memory.write_at(0, &random.bytes(memory.len())).unwrap();
            let chunk = View::chunk(memory, 64, layers as u32, count, heads, head_bytes);
            let what = format!("{layout:?}, {count} tokens");
            check(pages.clone(), chunk.clone(), count, &format!("gather {what}"));
            check(chunk, pages, count, &format!("scatter {what}"));
        }
    }
}

fn pages_to_pages() {
    let mut random = Random(12);
    for (from, from_hnd) in LAYOUTS {
        for (to, to_hnd) in LAYOUTS {
            let (heads, head_bytes) = (4, 32);
            let a = Layout::paged(from, from_hnd, 5, 16, heads, head_bytes);
            let b = Layout::paged(to, to_hnd, 12, 8, heads, head_bytes);
            let source = Tokens::Blocks { ids: random.shuffled(5), first: 3 };
            let target = Tokens::Blocks { ids: random.shuffled(12), first: 5 };
            let a = paged(a, 3, 32, &mut random, source);
            let b = paged(b, 3, 16, &mut random, target);
            check(a, b, 70, &format!("{from:?} {from_hnd} to {to:?} {to_hnd}"));
        }
    }
}

fn latent_attention() {
    let mut random = Random(13);
    for row in [1152, 72] {
        let (tokens, count) = table(&mut random, 7, 16);
        let pages = paged(Layout::latent(7, 16, row), 3, 16, &mut random, tokens);
        let memory = device(3 * u64::from(count) * row);
        let layers = (0..3).map(|i| i * u64::from(count) * row).collect();
        let chunk =
            View { layout: Layout::latent_chunk(count, row), memory, layers, tokens: Tokens::From(0) };
        check(pages.clone(), chunk.clone(), count, "latent");
        check(chunk, pages, count, "latent, back");
    }
}

/// Keys and values of a token side by side, as an engine moves them layer by layer.
fn layer_by_layer() {
    let mut random = Random(19);
    for (order, heads_first) in LAYOUTS {
        let (tokens, count) = table(&mut random, 6, 16);
        let pages = paged(Layout::paged(order, heads_first, 6, 16, 4, 48), 3, 16, &mut random, tokens);
        let chunk = Layout::layer_chunk(count, 4, 48);
        let chunk = paged(chunk, 3, 0, &mut random, Tokens::From(0));
        // Token after token, keys before values: the test's own words for it.
        assert_eq!(
            place(&chunk, 0, 1, 0, 0) + place(&chunk, 0, 0, count - 1, 3),
            (2 * count as usize * 4 - 1) * 48
        );
        check(pages.clone(), chunk.clone(), count, "layer by layer");
        check(chunk, pages, count, "layer by layer, back");
    }
}

fn many_layers_take_several_launches() {
    let mut random = Random(14);
    let layout = Layout::paged(Order::KvFirst, false, 3, 4, 2, 16);
    let pages = paged(layout, 130, 16, &mut random, Tokens::Blocks { ids: vec![2, 0, 1], first: 0 });
    let chunk = View::chunk(device(2 * 130 * 11 * 32), 0, 130, 11, 2, 16);
    check(pages.clone(), chunk, 11, "130 layers");
    // A subset, in another order.
    let some = View { layers: vec![pages.layers[77], pages.layers[3], pages.layers[128]], ..pages };
    check(some, View::chunk(device(2 * 3 * 12 * 32), 0, 3, 12, 2, 16), 12, "three of 130");
}

/// A rank of four with two of eight heads: they lie within the whole row on one side, alone on the other.
fn some_heads_only() {
    let mut random = Random(15);
    for heads_first in [false, true] {
        let whole = Layout::paged(Order::BlocksFirst, heads_first, 4, 16, 8, 64);
        let pages = paged(whole, 2, 0, &mut random, Tokens::Blocks { ids: vec![3, 1, 0, 2], first: 0 });
        for first in [0u64, 2, 6] {
            let layers = pages.layers.iter().map(|l| l + first * whole.head).collect();
            let part = View { layout: whole.with_heads(2), layers, ..pages.clone() };
            let chunk = View::chunk(device(2 * 2 * 50 * 128), 0, 2, 50, 2, 64);
            check(part.clone(), chunk.clone(), 50, "heads of a rank");
            check(chunk, part, 50, "heads of a rank, back");
        }
    }
}

fn pinned_host_memory_and_what_is_not_reached() {
    let mut random = Random(16);
    let layout = Layout::paged(Order::KvFirst, false, 4, 16, 2, 64);
    let pages = paged(layout, 2, 0, &mut random, Tokens::Blocks { ids: vec![1, 0, 3, 2], first: 0 });
    let host = Memory::shared(2 * 2 * 60 * 128, HugePages::Never).unwrap();
    let chunk = View::chunk(host.clone(), 0, 2, 60, 2, 64);
    let e = Gather::new(pages.clone(), chunk.clone(), 60).unwrap().start(None, false).unwrap_err();
    assert_eq!(e.code(), ErrorCode::Unsupported);
    assert!(e.to_string().contains("not pinned"), "{e}");
    host.pin().unwrap();
    check(pages.clone(), chunk.clone(), 60, "to pinned host memory");
    check(chunk.clone(), pages.clone(), 60, "from pinned host memory");
    let e = Gather::new(chunk.clone(), chunk, 60).unwrap().start(None, false).unwrap_err();
    assert!(e.to_string().contains("neither view is a GPU's"), "{e}");
    // An address that is not a multiple of 8.
    let odd = View { layers: vec![4], ..View::chunk(device(2 * 60 * 128 + 8), 0, 1, 60, 2, 64) };
    let one = View { layers: vec![pages.layers[0]], ..pages };
    let e = Gather::new(one, odd, 60).unwrap().start(None, false).unwrap_err();
    assert!(e.to_string().contains("multiples of 8"), "{e}");
}

/// The runs of a gather as one transfer: from pages here into a chunk of a peer.
fn the_peer_gets_it_in_one_pass() {
    use kvxfer_core::{Access, Agent, TransferOptions, TransportKind};
    let mut random = Random(17);
    let layout = Layout::paged(Order::KvFirst, false, 40, 16, 2, 64);
    let pages = paged(layout, 4, 0, &mut random, Tokens::Blocks { ids: random_table(40), first: 0 });
    let chunk = View::chunk(device(2 * 4 * 600 * 128), 0, 4, 600, 2, 64);
    let gather = Gather::new(pages.clone(), chunk.clone(), 600).unwrap();
    let passive = Agent::builder().name("passive").listen("tcp://127.0.0.1:0").build().unwrap();
    let active = Agent::builder().name("active").build().unwrap();
    let (local, target) =
        (active.register(pages.memory.clone()).unwrap(), passive.register(chunk.memory.clone()).unwrap());
    passive.export(&target, "chunk", Access::Write).unwrap();
    let peer = active.connect(&passive.addresses()[0], SOON).unwrap();
    let remote = peer.region("chunk", SOON).unwrap();
    let t = peer.write(&local, &remote, &gather.runs(), TransferOptions::default()).unwrap();
    assert_eq!(t.transport(), TransportKind::CudaIpc);
    assert_eq!(t.wait(SOON).unwrap().error, None);
    let arrived = all(&chunk.memory);
    // What the kernel of one process makes of it.
    let beside = View { memory: device(chunk.memory.len() as u64), ..chunk };
    let done =
        Gather::new(pages, beside.clone(), 600).unwrap().start(None, true).unwrap().wait(SOON).unwrap();
    assert!(arrived == all(&beside.memory));
    assert_eq!(done.digest, Some(digest(&arrived)));
    drop((remote, peer, local, target));
    active.shutdown(SOON).unwrap();
    passive.shutdown(SOON).unwrap();
}

fn random_table(n: u32) -> Vec<u32> {
    Random(99).shuffled(n)
}

/// A gather behind a fence that has not passed is not done, and moves what the producer wrote.
fn a_fence_is_kept() {
    use kvxfer_core::cuda::Fence;
    let mut random = Random(18);
    let layout = Layout::paged(Order::KvFirst, true, 4, 16, 2, 64);
    let pages = paged(layout, 2, 0, &mut random, Tokens::Blocks { ids: vec![1, 0, 3, 2], first: 0 });
    let chunk = View::chunk(device(2 * 2 * 60 * 128), 0, 2, 60, 2, 64);
    // A producer that writes the pages on its own stream after a while.
    let stream = raw::Stream::new(0);
    stream.sleep(100);
    stream.fill(pages.memory.as_ptr() as u64, 0xa5, pages.memory.len());
    #[expect(unsafe_code, reason = "a fence takes a stream by its address")]
    // SAFETY: the stream lives until the end of the test.
    let fence = unsafe { Fence::of_stream(0, stream.address()) }.unwrap();
    let gather = Gather::new(pages, chunk.clone(), 60).unwrap();
    let mut started = gather.start(Some(&fence), false).unwrap();
    assert!(!fence.is_done().unwrap() && !started.is_done().unwrap(), "the producer is still at it");
    let e = started.wait(Duration::from_millis(1)).unwrap_err();
    assert_eq!(e.code(), ErrorCode::TimedOut, "{e}; it goes on and can be waited for again");
    let done = started.wait(SOON).unwrap();
    assert_eq!((done.bytes, done.digest), (gather.bytes(), None));
    assert!(all(&chunk.memory).iter().all(|&b| b == 0xa5), "what the producer wrote, nothing earlier");
    stream.end();
    // Dropped without waiting: its end is awaited all the same.
    drop(gather.start(None, true).unwrap());
    drop(chunk);
}

/// Tables and numbers lie on the device while a kernel runs, and what holds them is made once.
fn kernels_between_devices_touch_no_host_memory() {
    use kvxfer_core::cuda::Fence;
    let mut random = Random(20);
    let layout = Layout::paged(Order::KvFirst, true, 6, 16, 2, 64);
    let source = Tokens::Blocks { ids: random.shuffled(6), first: 3 };
    let slots: Vec<i64> = random.shuffled(6 * 16).into_iter().map(i64::from).take(80).collect();
    let a = paged(layout, 3, 0, &mut random, source);
    let b = paged(layout, 3, 0, &mut random, Tokens::Slots(slots));
    let before = standin::kernel_host_accesses();
    check(a.clone(), b.clone(), 80, "blocks to slots");
    assert_eq!(standin::kernel_host_accesses(), before, "a kernel reached over to the host");

    let gather = Gather::new(a, b, 80).unwrap();
    let once = ["cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreateWithPriority", "cuModuleLoadDataEx"];
    let made = || once.map(standin::calls);
    let first = made();
    for _ in 0..20 {
        gather.start(None, true).unwrap().wait(SOON).unwrap();
    }
    assert_eq!(made(), first, "the second gather takes what the first one used");
    // Many at a time need one each, of which a few are kept.
    let live = || ["allocations", "pinned allocations"].map(standin::live);
    let before = live();
    let stream = raw::Stream::new(0);
    stream.sleep(200);
    #[expect(unsafe_code, reason = "a fence takes a stream by its address")]
    // SAFETY: the stream lives until the end of the test.
    let fence = unsafe { Fence::of_stream(0, stream.address()) }.unwrap();
    let started: Vec<_> = (0..40).map(|_| gather.start(Some(&fence), true).unwrap()).collect();
    assert!(!fence.is_done().unwrap(), "40 submissions waited for the device");
    for mut one in started {
        one.wait(SOON).unwrap();
    }
    for (now, before) in live().into_iter().zip(before).filter_map(|(n, b)| n.zip(b)) {
        assert!(now < before + 16, "{now} allocations, {before} before");
    }
    stream.end();
}

/// The tables on the device are damaged by somebody: what cannot be found is left out, and each token counts once, however many layers,
/// planes, heads and launches there are, and whichever side lacks it.
fn skipped_tokens_count_once() {
    const LOST: u32 = 0x7fff_ffff;
    let mut random = Random(22);
    // Words of the kernel's parameters: the tables of both sides.
    let (from_table, to_table) = (0, 568 / 8);
    for (layers, heads_first, head_bytes) in [(130, false, 64), (3, true, 64), (3, true, 24), (1, false, 8)] {
        let layout = Layout::paged(Order::KvFirst, heads_first, 6, 8, 2, head_bytes);
        let a = paged(layout, layers, 0, &mut random, Tokens::Blocks { ids: random_table(6), first: 3 });
        let slots: Vec<i64> = random.shuffled(48).into_iter().map(i64::from).take(40).collect();
        let b = paged(layout, layers, 0, &mut random, Tokens::Slots(slots));
        let (source, mut expected) = (all(&a.memory), all(&b.memory));
        let gather = Gather::new(a.clone(), b.clone(), 40).unwrap();
        // Tokens 5 to 12 lie in the table's second block; a slot's upper half makes it one that there is not.
        standin::poke(from_table, 4, LOST);
        for token in [0, 7, 39] {
            standin::poke(to_table, 8 * token + 4, LOST);
        }
        let lost = |token: u32| (5..13).contains(&token) || [0, 39].contains(&token);
        let error = gather.start(None, true).unwrap().wait(SOON).unwrap_err();
        standin::poke_no_more();
        assert_eq!(error.code(), ErrorCode::Corrupt);
        assert!(
            error.to_string().contains("10 of 40 tokens named blocks that do not exist"),
            "{layers} layers: {error}"
        );
        for (plane, layer) in (0..2).flat_map(|p| (0..layers as usize).map(move |l| (p, l))) {
            for (token, head) in (0..40).filter(|t| !lost(*t)).flat_map(|t| [(t, 0), (t, 1)]) {
                let len = head_bytes as usize;
                let (at, to) = (place(&a, layer, plane, token, head), place(&b, layer, plane, token, head));
                expected[to..to + len].copy_from_slice(&source[at..at + len]);
            }
        }
        assert!(all(&b.memory) == expected, "{layers} layers: the other tokens, and nothing else");
        check(a, b, 40, "the same again, undamaged");
    }
}

/// Whichever call of a gather fails, the gather fails with its name, and the next one is right.
fn a_failing_step_is_an_error_and_leaves_nothing() {
    let mut random = Random(21);
    let layout = Layout::paged(Order::KvFirst, false, 4, 16, 2, 64);
    let pages = paged(layout, 130, 0, &mut random, Tokens::Blocks { ids: vec![1, 0, 3, 2], first: 0 });
    let chunk = View::chunk(device(2 * 130 * 60 * 128), 0, 130, 60, 2, 64);
    let gather = Gather::new(pages.clone(), chunk.clone(), 60).unwrap();
    // The first one makes what the others use again. Tables go there and numbers come back, with three launches in between.
    for (call, n) in [
        ("cuMemHostAlloc", 1),
        ("cuMemAlloc_v2", 1),
        ("cuMemcpyAsync", 1),
        ("cuLaunchKernel", 1),
        ("cuLaunchKernel", 3),
        ("cuMemcpyAsync", 2),
        ("cuEventRecord", 1),
    ] {
        standin::fails(call, n);
        let e = gather.start(None, true).unwrap_err().to_string();
        let name =
            if call == "cuLaunchKernel" { "launch of kvx_paged" } else { call.trim_end_matches("_v2") };
        assert!(e.contains(name) && e.contains("CUDA_ERROR_UNKNOWN"), "{call}: {e}");
        if n > 1 || call == "cuEventRecord" {
            check(pages.clone(), chunk.clone(), 60, call);
        }
    }
}

/// What was kept in the cache folder, which is a new one.
fn compiled() -> Vec<String> {
    let folder = std::env::var_os("XDG_CACHE_HOME").unwrap();
    let files = std::fs::read_dir(std::path::Path::new(&folder).join("kvxfer/ptx"));
    let mut names: Vec<_> =
        files.into_iter().flatten().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn one_gather() {
    let mut random = Random(23);
    let layout = Layout::paged(Order::KvFirst, false, 4, 16, 2, 64);
    let pages = paged(layout, 2, 0, &mut random, Tokens::Blocks { ids: vec![1, 0, 3, 2], first: 0 });
    check(pages, View::chunk(device(2 * 2 * 60 * 128), 0, 2, 60, 2, 64), 60, "one gather");
}

/// A gather by kernels, and that they were loaded at the `loads`-th attempt, from images kept with these beginnings and ends.
fn kernels_run(loads: i64, kept: &[(&str, &str)]) {
    one_gather();
    assert!(standin::calls("cuLaunchKernel").unwrap() > 0, "no kernel ran");
    assert_eq!(standin::calls("cuModuleLoadDataEx"), Some(loads));
    let names = compiled();
    let right = names.iter().zip(kept).all(|(n, (begin, end))| n.starts_with(begin) && n.ends_with(end));
    assert!(right && names.len() == kept.len(), "{names:?} instead of {kept:?}");
}

/// The driver does not know the version of the shipped PTX; there is a compiler on the loader's path.
fn a_driver_too_old_for_the_ptx_gets_machine_code() {
    kernels_run(2, &[("sm_90-", ".cubin")]);
}

/// Neither the PTX that was asked for nor the shipped one loads.
fn a_compiler_that_is_asked_for_serves_a_driver_without_one() {
    kernels_run(3, &[("compute_90-", ".ptx"), ("sm_90-", ".cubin")]);
}

fn kernels_compiled_because_it_is_asked_for() {
    kernels_run(1, &[("compute_90-", ".ptx")]);
}

/// A device without memory for a module, say: copies, and a try is not made a second time.
fn an_error_that_is_not_the_ptx_is_not_answered_by_compiling() {
    one_gather();
    assert_eq!((standin::calls("cuModuleLoadDataEx"), standin::calls("cuLaunchKernel")), (Some(1), Some(0)));
    assert_eq!(compiled(), [""; 0]);
}

/// The kernels do not load: bytes, surroundings and digest are the same.
fn without_kernels_copies_do_the_same() {
    let e = Device::get(0).unwrap().try_kernels().unwrap_err().to_string();
    assert!(e.contains("CUDA_ERROR_INVALID_PTX") && e.contains("KVXFER_NVRTC=0 forbids"), "{e}");
    latent_attention();
    some_heads_only();
    every_layout_to_a_chunk_and_back();
    pinned_host_memory_and_what_is_not_reached();
    assert_eq!(standin::calls("cuLaunchKernel"), Some(0));
}
