//! Device memory over NIXL with backends that move host memory only: through slots.
#![expect(unsafe_code, reason = "the environment of a process of one test is set before NIXL is loaded")]

use crate::common::eventually;
use crate::copies::{Pair, SOON, bytes, keeps_the_fence, noise, whole};
use crate::standin;
use kvxfer_core::config::{AgentConfig, NixlConfig};
use kvxfer_core::cuda::Device;
use kvxfer_core::memory::HugePages;
use kvxfer_core::transport::Outcome;
use kvxfer_core::transport::nixl::{Bare, find};
use kvxfer_core::{ErrorCode, Memory, Piece, Transfer, TransferOptions, TransportKind};
use std::sync::Arc;
use std::time::Duration;

/// What a slot holds, and how many a peer's transfers have unless configured.
const SLOT: usize = 4 << 20;
const DEPTH: i64 = 4;
const NIXL: [TransportKind; 1] = [TransportKind::Nixl];

/// Runs `body` where NIXL is installed, without UCX's CUDA modules.
fn host_only(body: impl FnOnce()) {
    // SAFETY: the process runs this test alone, and nothing else reads the environment now.
    unsafe { std::env::set_var("UCX_TLS", "^cuda") };
    match find::load(&NixlConfig::default()) {
        Ok(_) => body(),
        Err(e) => {
            println!("SKIPPED: NIXL not installed: {e}");
            assert!(
                std::env::var_os("KVXFER_REQUIRE_NIXL").is_none(),
                "KVXFER_REQUIRE_NIXL is set and NIXL is not here"
            );
        }
    }
}

fn on_device(len: usize) -> Arc<Memory> {
    Memory::device(&Device::get(0).unwrap(), len).unwrap()
}
fn on_host(len: usize) -> Arc<Memory> {
    Memory::shared(len, HugePages::Try).unwrap()
}

/// Slots made so far: nothing else here is pinned.
fn slots() -> i64 {
    standin::calls("cuMemHostRegister_v2").expect("the stand-in driver")
}

pub(crate) fn host_only_backends_refuse_device_memory() {
    host_only(|| {
        let mut agent = Bare::new("alone", &NixlConfig::default()).unwrap();
        let e = agent.register(&on_device(1 << 20)).unwrap_err();
        assert!(e.to_string().contains("could not register 1048576 bytes of vram memory"), "{e}");
        agent.register(&on_host(1 << 20)).unwrap();
        agent.close();
    });
}

/// Every byte, there and back, in few and in many pieces, more than all slots hold together.
pub(crate) fn device_memory_through_slots() {
    const LEN: usize = 6 * SLOT + 12_345;
    host_only(|| {
        let (local, target) = (on_device(LEN), on_host(LEN));
        let pair = Pair::over(&NIXL, local.clone(), target.clone());
        for (round, n) in [1, 7, 3000, 20_000].into_iter().enumerate() {
            let len = LEN as u64 / n;
            let pieces: Vec<_> = (0..n)
                .map(|i| Piece { local_offset: (n - 1 - i) * len, remote_offset: i * len, len })
                .collect();
            let source = noise(LEN, round as u64 + 1);
            local.write_at(0, &source).unwrap();
            target.write_at(0, &vec![0; LEN]).unwrap();
            let t = pair.peer.write(&pair.local, &pair.remote, &pieces, TransferOptions::default()).unwrap();
            assert_eq!(t.transport(), TransportKind::Nixl);
            let report = t.wait(SOON).unwrap();
            assert_eq!((report.error, report.bytes), (None, n * len), "{report:?}");
            let arrived = bytes(&target);
            for p in &pieces {
                let (a, b, n) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
                assert!(arrived[b..b + n] == source[a..a + n], "write of {} pieces", pieces.len());
            }
            assert!(arrived[(n * len) as usize..].iter().all(|b| *b == 0), "wrote beyond its pieces");
            local.write_at(0, &vec![0; LEN]).unwrap();
            let t = pair.peer.read(&pair.local, &pair.remote, &pieces, TransferOptions::default()).unwrap();
            assert_eq!(t.transport(), TransportKind::Nixl);
            assert_eq!(t.wait(SOON).unwrap().error, None);
            // At the moment of the end they are on the device, not in a slot.
            let back = bytes(&local);
            let end = (n * len) as usize;
            assert!(back[..end] == source[..end], "read of {} pieces", pieces.len());
            assert!(back[end..].iter().all(|b| *b == 0), "read beyond its pieces");
        }
        assert_eq!(slots(), DEPTH, "slots are made once and used again");
        pair.end();
    });
}

/// Many transfers at the same time, which nobody waits for.
pub(crate) fn no_more_slots_than_configured() {
    const LEN: usize = 3 * SLOT;
    host_only(|| {
        for depth in [1, 3] {
            let before = slots();
            let nixl = NixlConfig { staging_depth: depth, ..NixlConfig::default() };
            let config = AgentConfig { nixl, ..AgentConfig::default() };
            let (local, target) = (on_device(LEN), on_host(LEN));
            let source = noise(LEN, depth as u64);
            local.write_at(0, &source).unwrap();
            let pair = Pair::configured(&config, &NIXL, local, target.clone());
            let write = |_| {
                let options = TransferOptions::default();
                pair.peer.write(&pair.local, &pair.remote, &whole(LEN), options).unwrap()
            };
            let transfers: Vec<_> = (0..12).map(write).collect();
            eventually("they end by themselves", || transfers.iter().all(Transfer::is_finished));
            for t in &transfers {
                assert_eq!(t.wait(SOON).unwrap().error, None);
            }
            assert!(bytes(&target) == source);
            assert_eq!(slots() - before, depth as i64);
            pair.end();
        }
    });
}

pub(crate) fn cancelled_in_the_middle_no_byte_changes_afterwards() {
    const LEN: usize = 8 * SLOT;
    host_only(|| {
        let (local, target) = (on_device(LEN), on_host(LEN));
        let pair = Pair::over(&NIXL, local.clone(), target.clone());
        let pieces: Vec<_> = (0..LEN as u64 >> 20)
            .map(|i| Piece { local_offset: i << 20, remote_offset: i << 20, len: 1 << 20 })
            .collect();
        let mut some = 0;
        for round in 0..16 {
            let read = round % 2 == 1;
            let (from, to) = if read { (&target, &local) } else { (&local, &target) };
            let (before, source) = (noise(LEN, 4 * round + 1), noise(LEN, 4 * round + 3));
            to.write_at(0, &before).unwrap();
            from.write_at(0, &source).unwrap();
            let options = TransferOptions::default();
            let t = if read {
                pair.peer.read(&pair.local, &pair.remote, &pieces, options)
            } else {
                pair.peer.write(&pair.local, &pair.remote, &pieces, options)
            }
            .unwrap();
            // At any time, and when some of it has arrived.
            let _ = t.wait(Duration::from_millis(round / 2));
            while round >= 8 && t.outcome(0) != Some(Outcome::Done) {
                let _ = t.wait(Duration::ZERO);
            }
            t.cancel();
            let report = t.wait(SOON).unwrap();
            let at_end = bytes(to);
            from.write_at(0, &vec![0; LEN]).unwrap();
            for (i, p) in pieces.iter().enumerate() {
                let range = p.local_offset as usize..(p.local_offset + p.len) as usize;
                if t.outcome(i) == Some(Outcome::Done) {
                    assert!(
                        at_end[range.clone()] == source[range],
                        "piece {i} of round {round} is not whole"
                    );
                }
            }
            some += u32::from(report.error == Some(ErrorCode::Cancelled) && report.bytes > 0);
            std::thread::sleep(Duration::from_millis(5));
            assert!(bytes(to) == at_end, "a byte changed after the end of round {round}");
        }
        assert!(some > 0, "no round was cancelled in the middle");
        local.write_at(0, &noise(LEN, 77)).unwrap();
        pair.write(&whole(LEN), TransferOptions::default());
        assert!(bytes(&target) == noise(LEN, 77));
        assert!(slots() <= DEPTH, "cancelled transfers give their slots back");
        pair.end();
    });
}

pub(crate) fn nothing_is_staged_before_the_fence() {
    host_only(|| {
        let (local, target) = (on_device(1 << 16), on_host(1 << 16));
        let pair = Pair::over(&NIXL, local.clone(), target.clone());
        keeps_the_fence(&pair, &local, &target, [1, 1]);
        pair.end();
    });
}

/// Copies that fail, in either direction, and slots that cannot be made: an error that says why, and the connection goes on.
pub(crate) fn a_failing_device_fails_its_transfer_alone() {
    const LEN: usize = 2 * SLOT;
    host_only(|| {
        let source = noise(LEN, 3);
        for call in ["cuMemHostRegister_v2", "cuMemcpyAsync"] {
            for read in [false, true] {
                let (local, target) = (on_device(LEN), on_host(LEN));
                let pair = Pair::over(&NIXL, local.clone(), target.clone());
                target.write_at(0, &source).unwrap();
                standin::fails(call, 1);
                let options = TransferOptions::default();
                let t = if read {
                    pair.peer.read(&pair.local, &pair.remote, &whole(LEN), options)
                } else {
                    pair.peer.write(&pair.local, &pair.remote, &whole(LEN), options)
                };
                let report = t.unwrap().wait(SOON).unwrap();
                assert_eq!(report.error, Some(ErrorCode::Transport), "{call}, read: {read}");
                let detail = report.detail.unwrap_or_default();
                assert!(
                    detail.contains(call.trim_end_matches("_v2")) && detail.contains("CUDA_ERROR_UNKNOWN"),
                    "{detail}"
                );
                local.write_at(0, &source).unwrap();
                target.write_at(0, &vec![0; LEN]).unwrap();
                pair.write(&whole(LEN), TransferOptions::default());
                assert!(bytes(&target) == source);
                pair.end();
            }
        }
    });
}

/// Memory without a ticket: over `tcp` where that may be used, else an error that says what reaches what.
pub(crate) fn a_peers_device_is_reached_another_way() {
    const LEN: usize = 1 << 20;
    host_only(|| {
        for local in [on_device(LEN), on_host(LEN)] {
            let both = [TransportKind::Nixl, TransportKind::Tcp];
            let target = on_device(LEN);
            let pair = Pair::over(&both, local.clone(), target.clone());
            let source = noise(LEN, 5);
            local.write_at(0, &source).unwrap();
            let t =
                pair.peer.write(&pair.local, &pair.remote, &whole(LEN), TransferOptions::default()).unwrap();
            assert_eq!(t.transport(), TransportKind::Tcp);
            assert_eq!(t.wait(SOON).unwrap().error, None);
            assert!(bytes(&target) == source);
            pair.end();
        }
    });
}
