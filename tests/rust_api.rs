//! The Rust API as its users meet it, and where it touches the C ABI. Idioms are shown, and run, by the crate's doc-tests.

use kvxfer::agent::Access;
use kvxfer::memory::MemoryKind;
use kvxfer::transport::{Capabilities, Link, LocalTicket, PeerInfo, Transport};
use kvxfer::{
    Agent, AgentConfig, ErrorCode, Integrity, Memory, Piece, Result, TransferOptions, TransportKind, c,
};
use std::ffi::CStr;
use std::future::Future;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(20);

/// The examples as `cargo test` has built them.
#[test]
fn examples_run_as_two_processes() {
    let exe = std::env::current_exe().expect("path of the test");
    let folder = exe.ancestors().nth(2).expect("target folder").join("examples");
    for example in ["one_sided", "sender_receiver"] {
        let binary = folder.join(example);
        if !binary.is_file() {
            let text = format!("SKIPPED: {} is not built (cargo build --examples)", binary.display());
            assert!(std::env::var_os("CI").is_none(), "{text}");
            eprintln!("{text}");
            continue;
        }
        let out = Command::new(&binary).output().expect("run the example");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{example}: {text}{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(text.lines().filter(|l| l.starts_with("OK ")).count(), 2, "{example}: {text}");
    }
}

/// Wakes a parked thread: all an executor needs here.
struct Unpark(std::thread::Thread, AtomicBool);
impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.1.store(true, Ordering::Release);
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let unpark = Arc::new(Unpark(std::thread::current(), AtomicBool::new(false)));
    let waker = Waker::from(unpark.clone());
    let mut future = pin!(future);
    let deadline = Instant::now() + WAIT;
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        while !unpark.1.swap(false, Ordering::AcqRel) {
            assert!(Instant::now() < deadline, "not woken");
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }
}

#[test]
fn transfers_are_futures_of_any_executor() {
    let target = Agent::builder().name("async-target").listen("tcp://127.0.0.1:0").build().unwrap();
    let inbox = target.allocate(1 << 20).unwrap();
    target.export(&inbox, "inbox", Access::ReadWrite).unwrap();
    let agent = Agent::builder().name("async-writer").build().unwrap();
    let local = agent.allocate(1 << 20).unwrap();
    let content: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    local.memory().write_at(0, &content).unwrap();
    let peer = agent.connect(&target.addresses()[0], WAIT).unwrap();
    let remote = peer.region("inbox", WAIT).unwrap();
    let pieces: Vec<_> = (0..256)
        .map(|i| Piece { local_offset: i << 12, remote_offset: (255 - i) << 12, len: 4096 })
        .collect();
    for integrity in [Integrity::Off, Integrity::Full] {
        let options = TransferOptions { integrity: Some(integrity), ..TransferOptions::default() };
        let report = block_on(peer.write(&local, &remote, &pieces, options).unwrap());
        report.ok().unwrap();
        assert_eq!(report.bytes, 1 << 20);
    }
    let mut page = vec![0; 4096];
    inbox.memory().read_at(255 << 12, &mut page).unwrap();
    assert_eq!(page, content[..4096]);
}

#[test]
fn configurations_name_what_is_wrong() {
    for (yaml, word) in [
        ("nmae: typo", "nmae"),
        ("transfer_timeout: soon", "soon"),
        ("transports: { allow: [pigeon] }", "pigeon"),
        ("integrity: perfect", "perfect"),
        ("tcp: { streams: -1 }", "streams"),
    ] {
        let error = AgentConfig::from_yaml(yaml).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{yaml}");
        assert!(error.to_string().contains(word), "{yaml}: {error}");
    }
    let config = AgentConfig::from_json(r#"{"name": "a", "auth_key": "hush", "listen": []}"#).unwrap();
    assert!(!format!("{config:?}").contains("hush"), "a key must not show in debug output");
}

fn last_error() -> String {
    // SAFETY: NUL-terminated, valid until this thread's next failure.
    unsafe { CStr::from_ptr(c::kvxfer_last_error()) }.to_string_lossy().into_owned()
}

/// A transport with a bug.
struct Panics;
impl Transport for Panics {
    fn kind(&self) -> TransportKind {
        TransportKind::CudaIpc
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            same_process: true,
            same_host: true,
            other_pid_namespace: false,
            verifies_arrival: false,
            fuses_digest: false,
            needs_poll: false,
            device_memory: false,
            follows_streams: false,
            default_integrity: Integrity::Off,
        }
    }
    fn offer(&self, _: &PeerInfo) -> Option<Vec<u8>> {
        None
    }
    fn ticket(&self, _: kvxfer::proto::RegionId, _: &Arc<Memory>) -> Result<Option<LocalTicket>> {
        Ok(None)
    }
    fn register(&self, _: kvxfer::proto::RegionId, memory: &Arc<Memory>) -> Result<()> {
        assert!(memory.len() != 4711, "this transport cannot take {} bytes", memory.len());
        Ok(())
    }
    fn deregister(&self, _: kvxfer::proto::RegionId) {}
    fn connect(&self, _: &PeerInfo, _: &[u8], _: Instant) -> Result<Arc<dyn Link>> {
        Err(kvxfer::Error::failed(ErrorCode::Unsupported, "never offered"))
    }
}

/// An agent made in Rust with a transport of one's own, used from C: what panics inside comes out as a number.
#[test]
fn panics_are_contained_at_the_c_boundary() {
    let agent = Agent::builder().name("rust-made").transport(Arc::new(Panics)).build().unwrap();
    let handle = c::agent_into_raw(agent).unwrap();
    let mut region = std::ptr::null_mut();
    // SAFETY: a live handle and a place for the result.
    let result = unsafe { c::kvxfer_region_allocate(handle, 4711, &raw mut region) };
    assert_eq!(result, c::KVXFER_PANIC);
    assert!(region.is_null());
    let text = last_error();
    assert!(text.contains("a bug in kvxfer") && text.contains("cannot take 4711 bytes"), "{text}");

    // The agent goes on, and both languages see the same one.
    let agent = c::agent_from_raw(handle).unwrap();
    assert_eq!(agent.name().as_str(), "rust-made");
    // SAFETY: a live handle and places for the results; the handle is freed once.
    unsafe {
        assert_eq!(c::kvxfer_region_allocate(handle, 4096, &raw mut region), c::KVXFER_OK);
        let mut base = std::ptr::null_mut();
        assert_eq!(c::kvxfer_region_memory(region, &raw mut base, std::ptr::null_mut()), c::KVXFER_OK);
        base.cast::<u8>().write(42);
        assert_eq!(c::kvxfer_region_free(region), c::KVXFER_OK);
        assert_eq!(c::kvxfer_region_free(region), c::KVXFER_INVALID_ARGUMENT);
        assert_eq!(c::kvxfer_agent_free(handle), c::KVXFER_OK);
    }
    assert!(c::agent_from_raw(handle).is_err());
    assert_eq!(agent.allocate(4096).err().map(|e| e.code()), Some(ErrorCode::Closed));
}

/// The caller's memory may not be given up while something uses it.
#[test]
fn regions_over_foreign_memory_are_busy_while_in_use() {
    let agent = Agent::builder().name("foreign").build().unwrap();
    let handle = c::agent_into_raw(agent.clone()).unwrap();
    let mut memory = vec![0_u8; 65_536];
    let mut region = std::ptr::null_mut();
    // SAFETY: the vector outlives the region, which is freed below, and is not touched meanwhile.
    let result =
        unsafe { c::kvxfer_region_register(handle, memory.as_mut_ptr().cast(), 65_536, &raw mut region) };
    assert_eq!(result, c::KVXFER_OK, "{}", last_error());
    // SAFETY: same promise, for the second registration of the same bytes.
    let second = unsafe { Memory::foreign(memory.as_mut_ptr(), 65_536) }.unwrap();
    assert_eq!(second.kind(), MemoryKind::Foreign);
    drop(second);

    // A target that never answers keeps the transfer, and so the memory, in use.
    let target = Agent::builder().name("foreign-target").listen("tcp://127.0.0.1:0").build().unwrap();
    let inbox = target.allocate(65_536).unwrap();
    target.export(&inbox, "inbox", Access::Write).unwrap();
    let faults = kvxfer::transport::fault::FaultPlan { stall_after: Some(0), ..Default::default() };
    let stalling =
        AgentConfig { name: Some("staller".into()), faults: Some(faults), ..AgentConfig::default() };
    let staller = Agent::builder().config(stalling).build().unwrap();
    let handle2 = c::agent_into_raw(staller.clone()).unwrap();
    let mut busy = std::ptr::null_mut();
    // SAFETY: the vector outlives this region too.
    let result =
        unsafe { c::kvxfer_region_register(handle2, memory.as_mut_ptr().cast(), 65_536, &raw mut busy) };
    assert_eq!(result, c::KVXFER_OK, "{}", last_error());
    let address = std::ffi::CString::new(target.addresses()[0].as_str()).unwrap();
    // SAFETY: live handles, NUL-terminated texts, places for results; each handle is freed once.
    unsafe {
        let (mut peer, mut remote, mut transfer) =
            (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!(c::kvxfer_agent_connect(handle2, address.as_ptr(), 20_000, &raw mut peer), c::KVXFER_OK);
        assert_eq!(c::kvxfer_peer_region(peer, c"inbox".as_ptr(), 20_000, &raw mut remote), c::KVXFER_OK);
        let piece = c::kvxfer_piece_t { local_offset: 0, remote_offset: 0, length: 65_536 };
        let options = std::ptr::null();
        let result =
            c::kvxfer_peer_write(peer, busy, remote, &raw const piece, 1, options, &raw mut transfer);
        assert_eq!(result, c::KVXFER_OK, "{}", last_error());
        assert_eq!(c::kvxfer_transfer_wait(transfer, 20), c::KVXFER_IN_PROGRESS);

        assert_eq!(c::kvxfer_region_free(busy), c::KVXFER_BUSY);
        assert!(last_error().contains("still use this memory"), "{}", last_error());
        let mut id = 0;
        assert_eq!(c::kvxfer_region_id(busy, &raw mut id), c::KVXFER_CLOSED);
        assert_eq!(c::kvxfer_region_free(busy), c::KVXFER_BUSY);

        c::kvxfer_transfer_cancel(transfer);
        assert_eq!(c::kvxfer_transfer_wait(transfer, 20_000), c::KVXFER_CANCELLED);
        assert_eq!(c::kvxfer_transfer_free(transfer), c::KVXFER_OK);
        let deadline = Instant::now() + WAIT;
        while c::kvxfer_region_free(busy) == c::KVXFER_BUSY {
            assert!(Instant::now() < deadline, "the memory is never given back");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(c::kvxfer_remote_region_free(remote), c::KVXFER_OK);
        assert_eq!(c::kvxfer_peer_free(peer), c::KVXFER_OK);
        assert_eq!(c::kvxfer_region_free(region), c::KVXFER_OK);
        assert_eq!(c::kvxfer_agent_free(handle2), c::KVXFER_OK);
        assert_eq!(c::kvxfer_agent_free(handle), c::KVXFER_OK);
    }
    memory.fill(1);
}
