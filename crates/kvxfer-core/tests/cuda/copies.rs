//! Transfers between two agents of one process: every pair of memories, by copies and by the kernel, and behind fences.
#![expect(unsafe_code, reason = "foreign memory and streams are used by promise")]

pub(crate) use crate::common::{bytes, pattern as noise};
use crate::raw;
use kvxfer_core::config::AgentConfig;
use kvxfer_core::cuda::{Device, Fence};
use kvxfer_core::memory::HugePages;
use kvxfer_core::{Access, Agent, Memory, Peer, Piece, Region, RemoteRegion, TransferOptions, TransportKind};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Two connected agents with a region each.
pub(crate) struct Pair {
    pub(crate) active: Agent,
    passive: Agent,
    pub(crate) peer: Peer,
    pub(crate) local: Region,
    target: Region,
    pub(crate) remote: RemoteRegion,
}

impl Pair {
    pub(crate) fn new(local: Arc<Memory>, target: Arc<Memory>) -> Self {
        Self::over(&TransportKind::ALL, local, target)
    }
    pub(crate) fn over(allow: &[TransportKind], local: Arc<Memory>, target: Arc<Memory>) -> Self {
        Self::configured(&AgentConfig::default(), allow, local, target)
    }
    pub(crate) fn configured(
        config: &AgentConfig,
        allow: &[TransportKind],
        local: Arc<Memory>,
        target: Arc<Memory>,
    ) -> Self {
        let build = |name| Agent::builder().config(config.clone()).name(name).allow(allow.iter().copied());
        let passive = build("passive").listen("tcp://127.0.0.1:0").build().unwrap();
        let active = build("active").build().unwrap();
        let (local, target) = (active.register(local).unwrap(), passive.register(target).unwrap());
        passive.export(&target, "target", Access::ReadWrite).unwrap();
        let peer = active.connect(&passive.addresses()[0], SOON).unwrap();
        let remote = peer.region("target", SOON).unwrap();
        Self { active, passive, peer, local, target, remote }
    }
    pub(crate) fn end(self) {
        let Self { active, passive, peer, local, target, remote } = self;
        drop((remote, peer, local, target));
        active.shutdown(SOON).unwrap();
        passive.shutdown(SOON).unwrap();
    }
    pub(crate) fn write(&self, pieces: &[Piece], options: TransferOptions) {
        let t = self.peer.write(&self.local, &self.remote, pieces, options).unwrap();
        let report = t.wait(SOON).unwrap();
        assert_eq!(report.error, None, "{report:?}");
        assert_eq!(report.bytes, pieces.iter().map(|p| p.len).sum::<u64>());
    }
}

/// Writes and reads with few and with many pieces, aligned and not; compares every byte.
fn round_trips(local: &Arc<Memory>, target: &Arc<Memory>) {
    let pair = Pair::new(local.clone(), target.clone());
    let len = local.len().min(target.len()) as u64;
    let sizes: &[&[u64]] = &[
        &[len],
        &[len / 2, len / 3],
        &[4096; 16],
        &[1; 40],
        &[15, 1, 64, 7, 100, 33, 4095, 8, 65_537, 9, 2],
    ];
    for (round, sizes) in sizes.iter().enumerate() {
        for skew in [0, 3, 8] {
            // Pieces one after the other locally, the other way round at the peer, apart by a few bytes.
            let total: u64 = sizes.iter().sum::<u64>();
            if total + skew * (sizes.len() as u64 + 1) > len {
                continue;
            }
            let (mut near, mut far) = (0, total + skew * sizes.len() as u64);
            let pieces: Vec<Piece> = sizes
                .iter()
                .map(|n| {
                    far -= n + skew;
                    near += n;
                    Piece { local_offset: near - n, remote_offset: far + skew, len: *n }
                })
                .collect();
            let source = noise(local.len(), round as u64 + skew);
            local.write_at(0, &source).unwrap();
            let mut expected = noise(target.len(), 99);
            target.write_at(0, &expected).unwrap();
            pair.write(&pieces, TransferOptions::default());
            for p in &pieces {
                let (a, b, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
                expected[b..b + n].copy_from_slice(&source[a..a + n]);
            }
            assert!(bytes(target) == expected, "write, round {round}, {skew} apart");
            // And back, into a local memory that was cleared.
            local.write_at(0, &vec![0; local.len()]).unwrap();
            let t = pair.peer.read(&pair.local, &pair.remote, &pieces, TransferOptions::default()).unwrap();
            let carried = if local.is_device() || target.is_device() {
                TransportKind::CudaIpc
            } else {
                TransportKind::Inproc
            };
            assert_eq!(t.transport(), carried);
            assert_eq!(t.wait(SOON).unwrap().error, None);
            let back = bytes(local);
            for p in &pieces {
                let (a, n) = (p.local_offset as usize, p.len as usize);
                assert!(back[a..a + n] == source[a..a + n], "read, round {round}, {skew} apart");
            }
            assert!(back[total as usize..].iter().all(|b| *b == 0), "read wrote beyond its pieces");
        }
    }
    pair.end();
}

const LEN: usize = 300_000;

pub(crate) fn every_pair_of_memories() {
    let device = Device::get(0).unwrap();
    let memories = || {
        [
            Memory::device(&device, LEN).unwrap(),
            Memory::device_shareable(&device, LEN).unwrap(),
            Memory::shared(LEN, HugePages::Never).unwrap(),
            Memory::anonymous(LEN).unwrap(),
        ]
    };
    for local in memories() {
        for target in memories() {
            round_trips(&local, &target);
        }
    }
}

pub(crate) fn two_devices() {
    let on = |n| Memory::device(&Device::get(n).unwrap(), LEN).unwrap();
    round_trips(&on(0), &on(1));
    round_trips(&on(1), &on(0));
    round_trips(&on(1), &Memory::shared(LEN, HugePages::Never).unwrap());
}

pub(crate) fn two_devices_that_do_not_reach_each_other() {
    two_devices();
}

pub(crate) fn a_driver_without_batched_copies() {
    let device = Device::get(0).unwrap();
    round_trips(&Memory::device(&device, LEN).unwrap(), &Memory::device(&device, LEN).unwrap());
}

pub(crate) fn kernels_that_do_not_load_are_replaced_by_copies() {
    a_driver_without_batched_copies();
    assert_eq!(crate::standin::calls("cuLaunchKernel"), Some(0));
}

/// Sockets reach no device: bytes pass through pinned slots, several frames at a time, in both directions and with either side or both
/// on a device.
pub(crate) fn sockets() {
    const LEN: usize = 5 << 20;
    let device = Device::get(0).unwrap();
    let on_device = || Memory::device(&device, LEN).unwrap();
    let on_host = || Memory::shared(LEN, HugePages::Try).unwrap();
    for (local, target) in [(on_device(), on_device()), (on_device(), on_host()), (on_host(), on_device())] {
        let pair = Pair::over(&[TransportKind::Tcp], local.clone(), target.clone());
        for (round, n) in [1, 7, 3000].into_iter().enumerate() {
            let len = LEN as u64 / n;
            let pieces: Vec<_> = (0..n)
                .map(|i| Piece { local_offset: (n - 1 - i) * len, remote_offset: i * len, len })
                .collect();
            let source = noise(LEN, round as u64 + 1);
            local.write_at(0, &source).unwrap();
            target.write_at(0, &vec![0; LEN]).unwrap();
            pair.write(&pieces, TransferOptions::default());
            let arrived = bytes(&target);
            for p in &pieces {
                let (a, b, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
                assert!(arrived[b..b + n] == source[a..a + n], "write of {} pieces", pieces.len());
            }
            local.write_at(0, &vec![0; LEN]).unwrap();
            let t = pair.peer.read(&pair.local, &pair.remote, &pieces, TransferOptions::default()).unwrap();
            assert_eq!(t.transport(), TransportKind::Tcp);
            assert_eq!(t.wait(SOON).unwrap().error, None);
            let whole = (len * pieces.len() as u64) as usize;
            assert!(bytes(&local)[..whole] == source[..whole], "read of {} pieces", pieces.len());
        }
        // Cancelled in the middle: once it has ended no byte changes.
        for round in 0..20 {
            let t =
                pair.peer.write(&pair.local, &pair.remote, &whole(LEN), TransferOptions::default()).unwrap();
            std::thread::sleep(Duration::from_micros(round * 200));
            t.cancel();
            t.wait(SOON).unwrap();
            let at_end = bytes(&target);
            local.write_at(0, &noise(LEN, round)).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            assert!(bytes(&target) == at_end, "a byte changed after the end");
        }
        pair.end();
    }
}

/// A later transfer finds what an earlier one made, also when nothing was under way in between.
pub(crate) fn streams_and_kernels_are_made_once() {
    const LEN: usize = 1 << 20;
    let device = Device::get(0).unwrap();
    let scattered: Vec<_> = (0..40u64)
        .map(|i| Piece { local_offset: i * 8192, remote_offset: (39 - i) * 8192, len: 4096 })
        .collect();
    let made =
        || ["cuModuleLoadDataEx", "cuStreamCreateWithPriority", "cuMemHostAlloc"].map(crate::standin::calls);
    let on_device = || Memory::device(&device, LEN).unwrap();
    let on_host = || Memory::shared(LEN, HugePages::Never).unwrap();
    for (kind, local, target) in [
        (TransportKind::CudaIpc, on_device(), on_device()),
        (TransportKind::CudaIpc, on_host(), on_device()),
        (TransportKind::Tcp, on_device(), on_host()),
    ] {
        let pair = Pair::over(&[kind], local, target);
        pair.write(&scattered, TransferOptions::default());
        let first = made();
        for _ in 0..10 {
            pair.write(&scattered, TransferOptions::default());
        }
        assert_eq!(made(), first, "{kind}");
        pair.end();
    }
}

/// Copies that fail on the way to or from a socket fail the transfer, and the next one is right.
pub(crate) fn sockets_and_a_failing_device() {
    const LEN: usize = 3 << 20;
    let device = Device::get(0).unwrap();
    let memory = || Memory::device(&device, LEN).unwrap();
    let (local, target) = (memory(), memory());
    let source = noise(LEN, 3);
    local.write_at(0, &source).unwrap();
    let pair = Pair::over(&[TransportKind::Tcp], local, target.clone());
    let mut failed = 0;
    for _ in 0..12 {
        crate::standin::fails("cuMemcpyAsync", 1);
        let t = pair.peer.write(&pair.local, &pair.remote, &whole(LEN), TransferOptions::default()).unwrap();
        let report = t.wait(SOON).unwrap();
        failed += u32::from(report.error.is_some());
        pair.write(&whole(LEN), TransferOptions::default());
        assert!(bytes(&target) == source);
    }
    assert!(failed > 0);
    pair.end();
}

/// 20,032 blocks by one transfer, in a random order.
pub(crate) fn scattered_blocks_of_a_whole_prompt() {
    const BLOCK: u64 = 512;
    const BLOCKS: u64 = 20_032;
    let device = Device::get(0).unwrap();
    let local = Memory::device(&device, (BLOCK * BLOCKS) as usize).unwrap();
    let target = Memory::device(&device, (BLOCK * BLOCKS) as usize).unwrap();
    let source = noise(local.len(), 5);
    local.write_at(0, &source).unwrap();
    let mut table: Vec<u64> = (0..BLOCKS).collect();
    for i in (1..table.len()).rev() {
        table.swap(i, (i * 7919 + 13) % (i + 1));
    }
    let pieces: Vec<_> = table
        .iter()
        .enumerate()
        .map(|(i, b)| Piece { local_offset: b * BLOCK, remote_offset: i as u64 * BLOCK, len: BLOCK })
        .collect();
    let pair = Pair::new(local, target.clone());
    pair.write(&pieces, TransferOptions { notify: Some(b"done".to_vec()), ..TransferOptions::default() });
    assert_eq!(pair.passive.notification(SOON).unwrap().unwrap().payload, b"done");
    let arrived = bytes(&target);
    for (i, b) in table.iter().enumerate() {
        let (to, from) = (i * BLOCK as usize, (b * BLOCK) as usize);
        assert!(arrived[to..to + BLOCK as usize] == source[from..from + BLOCK as usize], "block {i}");
    }
    pair.end();
}

pub(crate) fn whole(len: usize) -> [Piece; 1] {
    [Piece { local_offset: 0, remote_offset: 0, len: len as u64 }]
}

/// A producer that fills memory on its stream after a while; the transfer is submitted at once.
pub(crate) fn produced(memory: &Memory, stream: &raw::Stream, byte: u8) -> Fence {
    stream.sleep(100);
    stream.fill(memory.as_ptr() as u64, byte, memory.len());
    // SAFETY: the stream lives until the test's end.
    unsafe { Fence::of_stream(0, stream.address()) }.unwrap()
}

pub(crate) fn nothing_is_read_before_the_fence() {
    let device = Device::get(0).unwrap();
    let memory = || Memory::device(&device, 1 << 16).unwrap();
    let (local, target) = (memory(), memory());
    let pair = Pair::new(local.clone(), target.clone());
    keeps_the_fence(&pair, &local, &target, [1, 64]);
    pair.end();
}

/// Bytes of a stream that is still producing them are not read before, in transfers of so many pieces.
pub(crate) fn keeps_the_fence(pair: &Pair, local: &Memory, target: &Memory, pieces: [u64; 2]) {
    let stream = raw::Stream::new(0);
    for (byte, n) in [7, 9].into_iter().zip(pieces) {
        let fence = produced(local, &stream, byte);
        assert!(!fence.is_done().unwrap());
        let len = (1 << 16) / n;
        let pieces: Vec<_> =
            (0..n).map(|i| Piece { local_offset: i * len, remote_offset: (n - 1 - i) * len, len }).collect();
        pair.write(&pieces, TransferOptions { after: Some(fence.clone()), ..TransferOptions::default() });
        assert!(fence.is_done().unwrap());
        assert!(bytes(target).iter().all(|b| *b == byte), "read before it was written");
    }
    // Without the fence the old bytes leave: what the fence is for, and that this test can see it.
    let fence = produced(local, &stream, 11);
    pair.write(&whole(1 << 16), TransferOptions::default());
    assert!(bytes(target).iter().all(|b| *b == 9), "the producer was faster than it should be");
    fence.wait().unwrap();
    stream.end();
}

/// Host memory that a stream is still filling, carried by a transport that knows nothing of streams.
pub(crate) fn other_transports_wait_for_the_fence() {
    let (local, target) = (
        Memory::shared(1 << 16, HugePages::Never).unwrap(),
        Memory::shared(1 << 16, HugePages::Never).unwrap(),
    );
    local.pin().unwrap();
    let produced_by = Memory::device(&Device::get(0).unwrap(), 1 << 16).unwrap();
    let pair = Pair::new(local.clone(), target.clone());
    let stream = raw::Stream::new(0);
    let fence = produced(&produced_by, &stream, 3);
    local.write_at(0, &vec![1; 1 << 16]).unwrap();
    let options = TransferOptions { after: Some(fence.clone()), ..TransferOptions::default() };
    let t = pair.peer.write(&pair.local, &pair.remote, &whole(1 << 16), options).unwrap();
    assert_eq!(t.transport(), TransportKind::Inproc);
    assert!(!t.is_finished(), "it did not wait");
    local.write_at(0, &vec![2; 1 << 16]).unwrap();
    assert_eq!(t.wait(SOON).unwrap().error, None);
    assert!(fence.is_done().unwrap());
    assert!(bytes(&target).iter().all(|b| *b == 2), "read before the fence");
    stream.end();
    pair.end();
}

pub(crate) fn a_transfer_cancelled_before_its_fence_ends() {
    let device = Device::get(0).unwrap();
    for host in [true, false] {
        let memory = || {
            if host {
                Memory::shared(4096, HugePages::Never).unwrap()
            } else {
                Memory::device(&device, 4096).unwrap()
            }
        };
        let (local, target) = (memory(), memory());
        let pair = Pair::new(local, target.clone());
        let filled = Memory::device(&device, 4096).unwrap();
        let stream = raw::Stream::new(0);
        let fence = produced(&filled, &stream, 3);
        let options = TransferOptions { after: Some(fence), ..TransferOptions::default() };
        let t = pair.peer.write(&pair.local, &pair.remote, &whole(4096), options).unwrap();
        t.cancel();
        let report = t.wait(SOON).unwrap();
        // On a device it was queued behind the fence already: it ends with that, as what it is.
        if host {
            assert_eq!(report.error, Some(kvxfer_core::ErrorCode::Cancelled));
        }
        let at_end = bytes(&target);
        stream.end();
        assert_eq!(bytes(&target), at_end);
        pair.end();
    }
}
