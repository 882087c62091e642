//! Rates of the copying transports beside the raw calls they stand on, side by side in one run.
//!
//! `cargo bench -p kvxfer-core --bench movers [-- shm|cma|submit]`. Source and destination are 256 MiB each; every row
//! is the best of several rounds, in which baseline and transport take turns, each on one thread that is not the main
//! one; `helped` adds the waiting thread. The `cma` rows use a second process.

use kvxfer_core::baseline::{self, ProcessMemory};
use kvxfer_core::memory::HugePages;
use kvxfer_core::proto::integrity::SEGMENT;
use kvxfer_core::proto::wire::HostIdentity;
use kvxfer_core::proto::{AgentName, Epoch, Integrity, RegionId, TransferId};
use kvxfer_core::transport::cma::CmaTransport;
use kvxfer_core::transport::mover::Mover;
use kvxfer_core::transport::shm::ShmTransport;
use kvxfer_core::transport::{
    Job, Link, Op, PeerInfo, Piece, RemoteKey, RemoteTicket, Role, SegmentDigests, Tracker, Transport,
};
use kvxfer_core::{AgentConfig, Memory};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

const TOTAL: u64 = 256 << 20;
const SIZES: [u64; 5] = [4 << 10, 16 << 10, 64 << 10, 1 << 20, 32 << 20];
const CHILD: &str = "KVXFER_BENCH_PEER";

fn main() {
    if let Ok(parent) = std::env::var(CHILD) {
        serve(parent.parse().expect("a process id"));
        return;
    }
    let only = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let wanted = |name: &str| only.as_deref().is_none_or(|o| o == name);
    if wanted("shm") {
        shm();
    }
    if wanted("cma") {
        cma();
    }
    if wanted("submit") {
        submit();
    }
}

fn pieces(size: u64, random: bool) -> Arc<[Piece]> {
    let count = (TOTAL / size) as usize;
    let order = |seed: u64| {
        let mut at: Vec<u64> = (0..count as u64).map(|i| i * size).collect();
        let mut x = seed;
        for i in (1..if random { count } else { 0 }).rev() {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            at.swap(i, (x % (i as u64 + 1)) as usize);
        }
        at
    };
    order(88_172_645_463_325_252)
        .into_iter()
        .zip(order(1_234_567_891_011))
        .map(|(local_offset, remote_offset)| Piece { local_offset, remote_offset, len: size })
        .collect()
}

fn job(local: &Arc<Memory>, remote: RemoteKey, op: Op, pieces: &Arc<[Piece]>, integrity: Integrity) -> Job {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Job {
        transfer: TransferId(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)),
        op,
        local_region: RegionId(1),
        local: Arc::clone(local),
        remote,
        pieces: Arc::clone(pieces),
        integrity,
        after: None,
        digest: None,
        tracker: Arc::new(Tracker::new(pieces.len())),
    }
}

/// Submits and waits as an agent's caller does; with `help`, the waiting thread takes slices as well.
fn run(link: &dyn Link, job: Job, help: bool) -> Duration {
    let (tracker, transfer) = (Arc::clone(&job.tracker), job.transfer);
    let begun = Instant::now();
    link.submit(job).expect("submitted");
    while help && link.assist(transfer) {}
    assert!(tracker.wait_until(Instant::now() + Duration::from_secs(60)));
    let took = begun.elapsed();
    assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
    took
}

/// Runs the baseline where the transport runs: on another thread than the caller's.
fn elsewhere(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(work);
    });
}

fn rate(best: Duration) -> f64 {
    TOTAL as f64 / best.as_secs_f64() / 1e9
}

fn filled() -> Arc<Memory> {
    let memory = Memory::shared(TOTAL as usize, HugePages::Try).expect("memory");
    let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for at in (0..TOTAL).step_by(block.len()) {
        memory.write_at(at, &block).expect("in range");
    }
    memory
}

fn host(pid: u32) -> PeerInfo {
    PeerInfo {
        name: AgentName::new("bench").expect("a name"),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: String::new(),
            pid_namespace: 1,
            net_namespace: 1,
            pid,
            process: 1,
            side_socket: String::new(),
        },
        same_host: true,
        same_kernel: true,
        same_process: false,
        role: Role::Initiator,
        address: None,
        session: [1; 16],
    }
}

/// One thread's work against one thread's memcpy (`off`, `bound`, `full`, `digest`), and with the waiter's help.
fn shm() {
    let config = AgentConfig::default();
    let mover = Mover::new(&config);
    let transport = ShmTransport::new(&config, &mover).expect("shm");
    let peer = host(std::process::id());
    let deadline = Instant::now() + Duration::from_secs(10);
    let link = transport.connect(&peer, &transport.offer(&peer).expect("offered"), deadline).expect("link");
    let (local, remote) = (filled(), filled());
    let ticket = transport.ticket(RegionId(2), &remote).expect("ticket").expect("a memfd");
    // A second mapping, as a peer would have it.
    let ticket = RemoteTicket { region: RegionId(2), len: TOTAL, payload: ticket.payload, fd: ticket.fd };
    let key = link.import(ticket).expect("imported");
    println!(
        "{:>9} {:<8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}   bound/memcpy full/off digest/off",
        "shm", "GB/s", "memcpy", "off", "bound", "full", "digest", "helped"
    );
    for size in SIZES {
        for random in [false, true] {
            let pieces = pieces(size, random);
            let mut best = [Duration::MAX; 6];
            for _ in 0..6 {
                let begun = Instant::now();
                elsewhere(|| baseline::copy(&local, &remote, &pieces).expect("copied"));
                best[0] = best[0].min(begun.elapsed());
                for (i, level) in [Integrity::Off, Integrity::Bound, Integrity::Full].into_iter().enumerate()
                {
                    let took = run(&*link, job(&local, key, Op::Write, &pieces, level), false);
                    best[1 + i] = best[1 + i].min(took);
                }
                if !random {
                    let mut job = job(&local, key, Op::Write, &pieces, Integrity::Full);
                    let hashes = (0..TOTAL / SEGMENT).map(|_| AtomicU64::new(0)).collect();
                    job.digest = Some(Arc::new(SegmentDigests { base: 0, len: TOTAL, hashes }));
                    best[4] = best[4].min(run(&*link, job, false));
                }
                let took = run(&*link, job(&local, key, Op::Write, &pieces, Integrity::Bound), true);
                best[5] = best[5].min(took);
            }
            let r = best.map(rate);
            println!(
                "{size:>9} {:<8}{:>8.2}{:>8.2}{:>8.2}{:>8.2}{:>8.2}{:>8.2}   {:>12.2}{:>9.2}{:>11.2}",
                if random { "random" } else { "ordered" },
                r[0],
                r[1],
                r[2],
                r[3],
                r[4],
                r[5],
                r[2] / r[0],
                r[3] / r[1],
                r[4] / r[1]
            );
        }
    }
}

/// The other process: holds memory, says where.
fn serve(parent: u32) {
    let config = AgentConfig::default();
    let transport = CmaTransport::new(&config, &Mover::new(&config)).expect("cma");
    let memory = Memory::anonymous(TOTAL as usize).expect("memory");
    memory.write_at(0, &vec![1; TOTAL as usize]).expect("in range");
    let ticket = transport.ticket(RegionId(2), &memory).expect("ticket").expect("any memory");
    let offer = transport.offer(&host(parent)).expect("offered");
    for part in [&offer, &ticket.payload] {
        for byte in part {
            print!("{byte:02x}");
        }
        print!(" ");
    }
    println!();
    std::io::stdout().flush().expect("written");
    let _ = std::io::stdin().lines().next();
}

fn cma() {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .env(CHILD, std::process::id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a second process");
    let mut told = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut told).expect("read");
    let parts: Vec<Vec<u8>> = told
        .split_whitespace()
        .map(|w| {
            (0..w.len()).step_by(2).map(|i| u8::from_str_radix(&w[i..i + 2], 16).expect("hex")).collect()
        })
        .collect();
    let (offer, payload) = (&parts[0], &parts[1]);
    let config = AgentConfig::default();
    let transport = CmaTransport::new(&config, &Mover::new(&config)).expect("cma");
    let deadline = Instant::now() + Duration::from_secs(10);
    let link = transport.connect(&host(child.id()), offer, deadline).expect("link");
    let address = u64::from_le_bytes(payload[1..9].try_into().expect("eight bytes"));
    let ticket = RemoteTicket { region: RegionId(2), len: TOTAL, payload: payload.clone(), fd: None };
    let key = link.import(ticket).expect("imported");
    let raw = ProcessMemory::new(child.id(), address, TOTAL).expect("process");
    let local = filled();
    println!(
        "{:>9} {:<8}{:>6}{:>8}{:>8}{:>8}{:>8}{:>8}   bound/raw",
        "cma", "GB/s", "op", "raw", "off", "bound", "full", "helped"
    );
    for size in SIZES {
        for random in [false, true] {
            for op in [Op::Write, Op::Read] {
                let pieces = pieces(size, random);
                let mut best = [Duration::MAX; 5];
                for _ in 0..6 {
                    let begun = Instant::now();
                    elsewhere(|| match op {
                        Op::Write => raw.write(&local, &pieces).expect("written"),
                        Op::Read => raw.read(&local, &pieces).expect("read"),
                    });
                    best[0] = best[0].min(begun.elapsed());
                    for (i, level) in
                        [Integrity::Off, Integrity::Bound, Integrity::Full].into_iter().enumerate()
                    {
                        let took = run(&*link, job(&local, key, op, &pieces, level), false);
                        best[1 + i] = best[1 + i].min(took);
                    }
                    let took = run(&*link, job(&local, key, op, &pieces, Integrity::Bound), true);
                    best[4] = best[4].min(took);
                }
                let r = best.map(rate);
                println!(
                    "{size:>9} {:<8}{:>6}{:>8.2}{:>8.2}{:>8.2}{:>8.2}{:>8.2}   {:>9.2}",
                    if random { "random" } else { "ordered" },
                    if op == Op::Write { "write" } else { "read" },
                    r[0],
                    r[1],
                    r[2],
                    r[3],
                    r[4],
                    r[2] / r[0]
                );
            }
        }
    }
    drop(child.stdin.take());
    let _ = child.wait();
}

/// What submit itself costs a descriptor, and a small job from submit to its end.
fn submit() {
    let config = AgentConfig::default();
    let mover = Mover::new(&config);
    let transport = ShmTransport::new(&config, &mover).expect("shm");
    let peer = host(std::process::id());
    let deadline = Instant::now() + Duration::from_secs(10);
    let link = transport.connect(&peer, &transport.offer(&peer).expect("offered"), deadline).expect("link");
    let (local, remote) = (filled(), filled());
    let ticket = transport.ticket(RegionId(2), &remote).expect("ticket").expect("a memfd");
    let ticket = RemoteTicket { region: RegionId(2), len: TOTAL, payload: ticket.payload, fd: ticket.fd };
    let key = link.import(ticket).expect("imported");
    let many = pieces(16 << 10, true);
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let job = job(&local, key, Op::Write, &many, Integrity::Bound);
        let tracker = Arc::clone(&job.tracker);
        let begun = Instant::now();
        link.submit(job).expect("submitted");
        best = best.min(begun.elapsed());
        assert!(tracker.wait_until(Instant::now() + Duration::from_secs(60)));
    }
    println!(
        "submit of {} descriptors: {:.1} µs, {:.2} ns each",
        many.len(),
        best.as_secs_f64() * 1e6,
        best.as_secs_f64() * 1e9 / many.len() as f64
    );
    for size in [64, 4096, 65_536, 262_144, 1 << 20] {
        let piece: Arc<[Piece]> = [Piece { local_offset: 0, remote_offset: 0, len: size }].into();
        let mut times: Vec<_> = (0..2000)
            .map(|_| run(&*link, job(&local, key, Op::Write, &piece, Integrity::Bound), true))
            .collect();
        times.sort_unstable();
        let p50 = times[times.len() / 2];
        println!(
            "one piece of {size} bytes, submit to end: p50 {p50:?}, p99 {:?}",
            times[times.len() * 99 / 100]
        );
    }
}
