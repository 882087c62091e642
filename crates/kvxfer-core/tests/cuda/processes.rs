//! Device memory of another process.

use crate::copies::{SOON, bytes, noise};
use crate::{harness, raw, standin};
use kvxfer_core::cuda::Device;
use kvxfer_core::gather::Layout;
use kvxfer_core::memory::HugePages;
use kvxfer_core::{Access, Agent, ErrorCode, Memory, Peer, Piece, Region, TransferOptions, TransportKind};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

const KIND: &str = "KVXFER_TEST_PEER_MEMORY";
const LEN: usize = 200_000;

/// Regions of a peer that has many.
const MANY: u64 = 40;
const EACH: usize = 10_000;

/// The other process with many small regions, each with noise of its own, until its input ends.
fn many_regions(make: impl Fn() -> Arc<Memory>) {
    let agent = Agent::builder().name("peer").listen("tcp://127.0.0.1:0").build().unwrap();
    let regions: Vec<_> = (0..MANY)
        .map(|i| {
            let memory = make();
            memory.write_at(0, &noise(EACH, i)).unwrap();
            let region = agent.register(memory).unwrap();
            agent.export(&region, &format!("memory{i}"), Access::ReadWrite).unwrap();
            region
        })
        .collect();
    println!("@@{}", agent.addresses()[0]);
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
    println!("@@ended");
    agent.shutdown(SOON).unwrap();
    drop(regions);
}

/// The other process: exports memory of a kind, filled with noise, until its input ends.
pub(crate) fn peer_entry() {
    let Ok(kind) = std::env::var(KIND) else { return };
    let device = || Device::get(0).unwrap();
    match kind.as_str() {
        "many" => return many_regions(|| Memory::device(&device(), EACH).unwrap()),
        "many shareable" => return many_regions(|| Memory::device_shareable(&device(), EACH).unwrap()),
        _ => {}
    }
    let part = (kind == "part").then(|| raw::Allocation::new(0, LEN + 4096));
    let memory: Arc<Memory> = match kind.as_str() {
        "device" => Memory::device(&device(), LEN).unwrap(),
        "shareable" => Memory::device_shareable(&device(), LEN).unwrap(),
        "pool" => Memory::shared(LEN, HugePages::Never).unwrap(),
        _ => foreign(part.as_ref().unwrap().address + 768),
    };
    memory.write_at(0, &noise(LEN, 42)).unwrap();
    let agent = Agent::builder().name("peer").listen("tcp://127.0.0.1:0").build().unwrap();
    let region = agent.register(memory.clone()).unwrap();
    agent.export(&region, "memory", Access::ReadWrite).unwrap();
    println!("@@{}", agent.addresses()[0]);
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
    // What was written meanwhile.
    println!("@@{:x}", xxhash_rust::xxh3::xxh3_64(&bytes(&memory)));
    agent.shutdown(SOON).unwrap();
    drop((region, memory));
    if let Some(part) = part {
        part.free();
    }
}

#[expect(unsafe_code, reason = "freed by the caller after the last use")]
fn foreign(address: u64) -> Arc<Memory> {
    // SAFETY: the caller frees it after the region is gone.
    unsafe { Memory::device_foreign(address, LEN) }.unwrap()
}

struct Other {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<std::process::ChildStdout>,
    address: String,
}

/// Words before the command of a process in a PID namespace of its own, which ends with the first of them.
const APART: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// True where such processes can be started; says so where they cannot.
fn namespaces() -> bool {
    let can = Command::new(APART[0]).args(&APART[1..]).arg("true").output().is_ok_and(|o| o.status.success());
    if !can {
        println!("SKIPPED: no PID namespace can be made here (unshare needs root)");
    }
    can
}

impl Other {
    fn start(kind: &str, variables: &[(&str, &str)]) -> Self {
        Self::start_behind(&[], kind, variables)
    }
    fn start_behind(words: &[&str], kind: &str, variables: &[(&str, &str)]) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut command = match words.split_first() {
            None => Command::new(own),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(own);
                command
            }
        };
        let mut child = command
            .args(["peer_entry", "--exact", "--nocapture", "--test-threads=1"])
            .env(KIND, kind)
            .env(harness::UNDER, "1")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut other = Self { child, input, output, address: String::new() };
        other.address = other.line();
        other
    }
    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the peer said nothing");
            if let Some((_, text)) = line.split_once("@@") {
                return text.trim().to_owned();
            }
        }
    }
    fn connect(&self, agent: &Agent) -> Peer {
        agent.connect(&self.address, SOON).unwrap()
    }
    /// Ends it; gives the digest of its memory.
    fn end(mut self) -> String {
        drop(self.input.take());
        let digest = self.line();
        assert!(self.child.wait().unwrap().success());
        digest
    }
}

fn pieces(n: u64) -> Vec<Piece> {
    let len = LEN as u64 / n;
    (0..n).map(|i| Piece { local_offset: (n - 1 - i) * len, remote_offset: i * len, len }).collect()
}

/// Reads what the other process has, writes something else, and has it say what it sees.
fn exchange(kind: &str, local: &Arc<Memory>) {
    exchange_with(Other::start(kind, &[]), kind, local);
}

fn exchange_with(mut other: Other, kind: &str, local: &Arc<Memory>) {
    let agent = Agent::builder().name("me").build().unwrap();
    let region: Region = agent.register(local.clone()).unwrap();
    let peer = other.connect(&agent);
    let remote = peer.region("memory", SOON).unwrap();
    for n in [1, 5, 100] {
        let options =
            || TransferOptions { transport: Some(TransportKind::CudaIpc), ..TransferOptions::default() };
        let read = peer.read(&region, &remote, &pieces(n), options()).unwrap();
        assert_eq!(read.wait(SOON).unwrap().error, None);
        if n == 1 {
            assert_eq!(bytes(local), noise(LEN, 42), "{kind}: read");
        }
        local.write_at(0, &noise(LEN, n)).unwrap();
        let write = peer.write(&region, &remote, &pieces(n), options()).unwrap();
        assert_eq!(write.wait(SOON).unwrap().error, None);
        let mut expected = vec![0; LEN];
        let sent = noise(LEN, n);
        for p in pieces(n) {
            let (a, b, len) = (p.local_offset as usize, p.remote_offset as usize, p.len as usize);
            expected[b..b + len].copy_from_slice(&sent[a..a + len]);
        }
        if n == 100 {
            drop((remote, peer));
            drop(region);
            agent.shutdown(SOON).unwrap();
            let digest = other.end();
            assert_eq!(digest, format!("{:x}", xxhash_rust::xxh3::xxh3_64(&expected)), "{kind}: write");
            return;
        }
        let _ = &mut other;
    }
}

pub(crate) fn regions_by_handle() {
    let device = Device::get(0).unwrap();
    exchange("device", &Memory::device(&device, LEN).unwrap());
    exchange("part", &Memory::device(&device, LEN).unwrap());
    exchange("device", &Memory::shared(LEN, HugePages::Never).unwrap());
    exchange("part", &Memory::anonymous(LEN).unwrap());
}

pub(crate) fn regions_by_descriptor_where_handles_are_refused() {
    let device = Device::get(0).unwrap();
    exchange("shareable", &Memory::device(&device, LEN).unwrap());
    exchange("shareable", &Memory::device_shareable(&device, LEN).unwrap());
}

/// A paged cache goes into a chunk at the peer in one launch, heads and tokens the other way round than there.
pub(crate) fn a_gather_straight_into_the_memory_of_another_process() {
    use kvxfer_core::gather::{Gather, Order, Tokens, View};
    let device = Device::get(0).unwrap();
    let (layers, tokens, heads, head_bytes) = (3u32, 50u32, 4u32, 64u64);
    let paged = Layout::paged(Order::KvFirst, true, 12, 16, heads, head_bytes);
    let one = 2 * 12 * 16 * u64::from(heads) * head_bytes;
    let cache = Memory::device(&device, (u64::from(layers) * one) as usize).unwrap();
    cache.write_at(0, &noise(cache.len(), 7)).unwrap();
    let from = || View {
        memory: cache.clone(),
        layout: paged,
        layers: (0..u64::from(layers)).map(|i| i * one).collect(),
        tokens: Tokens::Blocks { ids: vec![7, 2, 11, 0], first: 3 },
    };
    let chunk = Layout::chunk(layers, tokens, heads, head_bytes);
    let row = u64::from(tokens * heads) * head_bytes;
    let to = |memory: &Arc<Memory>, at: u64| View {
        memory: memory.clone(),
        layout: chunk,
        layers: (0..u64::from(layers)).map(|i| at + i * row).collect(),
        tokens: Tokens::From(0),
    };
    let chunk_bytes = (2 * u64::from(layers) * row) as usize;
    let here = Memory::device(&device, chunk_bytes).unwrap();
    Gather::new(from(), to(&here, 0), tokens).unwrap().start(None, false).unwrap().wait(SOON).unwrap();

    let other = Other::start("part", &[]);
    let agent = Agent::builder().name("me").build().unwrap();
    let peer = other.connect(&agent);
    let remote = peer.region("memory", SOON).unwrap();
    let e = peer.map(&remote, None).unwrap_err();
    assert!(e.code() == ErrorCode::NotAvailable && e.to_string().contains("host memory"), "{e}");
    let there = peer.map(&remote, Some(0)).unwrap();
    let at = 4096;
    let gather = Gather::new(from(), to(there.memory(), at), tokens).unwrap();
    gather.start(None, false).unwrap().wait(SOON).unwrap();
    let mut expected = noise(LEN, 42);
    expected[at as usize..at as usize + chunk_bytes].copy_from_slice(&bytes(&here));
    drop((gather, there, remote, peer));
    agent.shutdown(SOON).unwrap();
    assert_eq!(other.end(), format!("{:x}", xxhash_rust::xxh3::xxh3_64(&expected)));
}

pub(crate) fn a_host_pool_of_another_process() {
    exchange("pool", &Memory::device(&Device::get(0).unwrap(), LEN).unwrap());
}

pub(crate) fn memory_that_cannot_be_shared_is_named() {
    let other = Other::start("device", &[]);
    // Nothing but the direct way: sockets would do otherwise.
    let agent = Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap();
    let peer = other.connect(&agent);
    let e = peer.region("memory", SOON).unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotAvailable, "{e}");
    assert!(e.to_string().contains("the peer gave no ticket"), "{e}");
    drop(peer);
    agent.shutdown(SOON).unwrap();
    other.end();
}

/// Mappings of regions that were imported and forgotten: a few are kept, for the next import of the same, and no more of them however many
/// there were.
pub(crate) fn mappings_of_forgotten_regions_are_bounded() {
    const KEPT: i64 = 16;
    let opened = || standin::live("opened handles").unwrap_or(KEPT);
    let openings = || standin::calls("cuIpcOpenMemHandle_v2");
    let other = Other::start("many", &[]);
    let agent = Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap();
    let local = Memory::device(&Device::get(0).unwrap(), EACH).unwrap();
    let region = agent.register(local.clone()).unwrap();
    let peer = other.connect(&agent);
    let visit = |i: u64| {
        let remote = peer.region(&format!("memory{i}"), SOON).unwrap();
        let whole = [Piece { local_offset: 0, remote_offset: 0, len: EACH as u64 }];
        let read = peer.read(&region, &remote, &whole, TransferOptions::default()).unwrap();
        assert_eq!(read.wait(SOON).unwrap().error, None);
        assert!(bytes(&local) == noise(EACH, i), "region {i}");
    };
    for i in 0..MANY {
        visit(i);
        assert!(opened() <= KEPT, "{} mappings after {i} regions", opened());
    }
    assert_eq!(opened(), KEPT);
    let before = openings();
    // The latest one, which was kept, and the first, which was not.
    visit(MANY - 1);
    assert_eq!(openings(), before, "a mapping that was kept was made again");
    visit(0);
    assert_eq!(openings(), before.map(|n| n + 1));
    visit(MANY - 1);
    visit(0);
    assert_eq!((openings(), opened()), (before.map(|n| n + 1), KEPT));
    // Many at a time, all of which are wanted.
    let all: Vec<_> = (0..MANY).map(|i| peer.region(&format!("memory{i}"), SOON).unwrap()).collect();
    assert!(standin::live("opened handles").is_none_or(|n| n == MANY as i64), "{}", opened());
    drop(all);
    assert_eq!(opened(), KEPT);
    drop((peer, region));
    agent.shutdown(SOON).unwrap();
    other.end();
}

/// What came as a descriptor is not found by a later import, so none of it is kept: it would hold the peer's memory for nothing.
pub(crate) fn descriptors_of_forgotten_regions_are_given_back() {
    let other = Other::start("many shareable", &[]);
    let agent = Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap();
    let peer = other.connect(&agent);
    let before = standin::live("mappings");
    for i in 0..MANY {
        drop(peer.region(&format!("memory{i}"), SOON).unwrap());
        assert_eq!(standin::live("mappings"), before, "after {i} regions");
    }
    drop(peer);
    agent.shutdown(SOON).unwrap();
    other.end();
}

/// Two containers with one network but each with processes of its own: descriptors pass, handles do not open.
pub(crate) fn another_pid_namespace_is_reached_by_descriptor() {
    if !namespaces() {
        return;
    }
    let device = Device::get(0).unwrap();
    let local = Memory::device(&device, LEN).unwrap();
    exchange_with(Other::start_behind(&APART, "shareable", &[]), "shareable", &local);
    // A host pool in the other namespace.
    exchange_with(Other::start_behind(&APART, "pool", &[]), "pool", &local);

    let other = Other::start_behind(&APART, "device", &[]);
    let agent = Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap();
    let peer = other.connect(&agent);
    let e = peer.region("memory", SOON).unwrap_err();
    assert!(e.to_string().contains("another PID namespace") && e.to_string().contains("shareable"), "{e}");
    drop(peer);
    agent.shutdown(SOON).unwrap();
    other.end();
}

/// The end of a process there is noticed, by a descriptor of it, and what it could write to is free again.
pub(crate) fn a_peer_killed_in_another_pid_namespace() {
    if !namespaces() {
        return;
    }
    let local = Memory::device_shareable(&Device::get(0).unwrap(), LEN).unwrap();
    let agent = Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap();
    let region = agent.register(local).unwrap();
    let mut other = Other::start_behind(&APART, "shareable", &[]);
    let peer = other.connect(&agent);
    let remote = peer.region("memory", SOON).unwrap();
    let write = |n| peer.write(&region, &remote, &pieces(n), TransferOptions::default());
    assert_eq!(write(20).unwrap().wait(SOON).unwrap().error, None);
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while peer.state() == kvxfer_core::PeerState::Up {
        assert!(std::time::Instant::now() < deadline, "the peer's end was not noticed");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(matches!(
        write(1).unwrap_err().code(),
        ErrorCode::PeerGone | ErrorCode::NotFound | ErrorCode::Closed
    ));
    drop((remote, peer, region));
    // Every peer is fenced: an agent that could not be sure would say so here.
    agent.shutdown(SOON).unwrap();
}

/// The peer dies by SIGKILL while we write into its memory, again and again: every transfer ends, none of them hangs or crashes.
pub(crate) fn a_peer_killed_with_its_memory_mapped() {
    let local = Memory::device(&Device::get(0).unwrap(), LEN).unwrap();
    let agent = Agent::builder().name("me").build().unwrap();
    let region = agent.register(local).unwrap();
    for round in 0..3 {
        let mut other = Other::start("device", &[]);
        let peer = other.connect(&agent);
        let remote = peer.region("memory", SOON).unwrap();
        let mut ended = 0;
        for i in 0..200 {
            if i == 50 + round {
                other.child.kill().unwrap();
            }
            match peer.write(&region, &remote, &pieces(20), TransferOptions::default()) {
                Ok(t) => drop(t.wait(SOON).unwrap()),
                Err(e) => {
                    assert!(
                        matches!(e.code(), ErrorCode::PeerGone | ErrorCode::NotFound | ErrorCode::Closed),
                        "{e}"
                    );
                    ended += 1;
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        assert!(ended > 0, "the peer's end was not noticed");
        other.child.wait().unwrap();
    }
    drop(region);
    agent.shutdown(SOON).unwrap();
}

/// The peer's device is one that we do not see.
pub(crate) fn a_hidden_device_is_named() {
    let other = Other::start("device", &[("CUDA_VISIBLE_DEVICES", "1")]);
    // Ours is the other one. Set before the driver is asked for the first time.
    let agent = hidden_from_us();
    let peer = other.connect(&agent);
    let e = peer.region("memory", SOON).unwrap_err();
    assert!(e.to_string().contains("GPU-") && e.to_string().contains("CUDA_VISIBLE_DEVICES"), "{e}");
    drop(peer);
    agent.shutdown(SOON).unwrap();
    other.end();
}

#[expect(unsafe_code, reason = "the environment is changed by the only thread")]
fn hidden_from_us() -> Agent {
    // SAFETY: no other thread of this process reads the environment at this moment.
    unsafe { std::env::set_var("CUDA_VISIBLE_DEVICES", "0") };
    Agent::builder().name("me").allow([TransportKind::CudaIpc]).build().unwrap()
}
