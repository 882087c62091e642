//! `tcp` against raw sockets, in one run: the same bytes, the same pattern, the same number of streams, two processes.
//!
//! Raw sockets: one blocking thread per stream and side, a piece per `write_all` and `read_exact`, straight from and into
//! the memory. Each row alternates raw and kvxfer at every level and shows medians. `cargo bench -p kvxfer-core --bench
//! tcp`; arguments: `STREAMS MIB ROUNDS`.
#![allow(missing_docs, reason = "a program")]

use kvxfer_core::config::TcpConfig;
use kvxfer_core::proto::wire::HostIdentity;
use kvxfer_core::proto::{AgentName, Epoch, RegionId, TransferId};
use kvxfer_core::transport::tcp::TcpTransport;
use kvxfer_core::transport::tcp::frame::{PREAMBLE_LEN, Preamble};
use kvxfer_core::transport::{
    Job, Link, Op, PeerInfo, Piece, RemoteKey, RemoteTicket, Role, Tracker, Transport,
};
use kvxfer_core::{Integrity, Memory};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHILD: &str = "KVXFER_BENCH_TCP_CHILD";
const SESSION: [u8; 16] = *b"bench-tcp-bench!";
const REGION: RegionId = RegionId(1);

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let arg = |i: usize, default| numbers.get(i).copied().unwrap_or(default);
    let (streams, total, rounds) = (arg(0, 2), arg(1, 256) << 20, arg(2, 5));
    match std::env::var(CHILD) {
        Ok(_) => serve(streams, total),
        Err(_) => measure(streams, total, rounds),
    }
}

fn transport(streams: usize) -> TcpTransport {
    let config = TcpConfig { streams: streams as u16, ..TcpConfig::default() };
    TcpTransport::new(&config, Duration::from_secs(10)).expect("settings")
}

fn peer(role: Role, address: SocketAddr) -> PeerInfo {
    let host = HostIdentity {
        boot_id: String::new(),
        pid_namespace: 0,
        net_namespace: 0,
        pid: 0,
        process: 0,
        side_socket: String::new(),
    };
    PeerInfo {
        name: AgentName::new("bench").expect("name"),
        epoch: Epoch(1),
        host,
        same_host: true,
        same_kernel: true,
        same_process: false,
        role,
        address: Some(address),
        session: SESSION,
    }
}

fn memory(len: usize, fill: u8) -> Arc<Memory> {
    let m = Memory::anonymous(len).expect("memory");
    m.write_at(0, &vec![fill; len]).expect("fill");
    m
}

/// The memory as a slice for raw sockets.
fn slice(m: &Memory) -> &'static mut [u8] {
    // SAFETY: the memory lives until the process ends (the caller leaks an `Arc` of it), and the runs follow one another,
    // so nobody else looks at these bytes during a raw run; the threads of one run use disjoint pieces.
    unsafe { std::slice::from_raw_parts_mut(m.as_ptr(), m.len()) }
}

/// Offsets of the pieces of one run, on the side where they are scattered.
fn offsets(total: usize, piece: usize, random: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..total / piece).map(|i| i * piece).collect();
    if random {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for i in (1..order.len()).rev() {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(i, (x >> 33) as usize % (i + 1));
        }
    }
    order
}

// ---- the far side ----

fn serve(streams: usize, total: usize) {
    let m = memory(total, 1);
    std::mem::forget(m.clone());
    let t = Arc::new(transport(streams));
    t.register(REGION, &m).expect("register");
    let ticket = t.ticket(REGION, &m).expect("ticket").expect("host memory");
    let (data, raw) = (listen(), listen());
    let hex = ticket.payload.iter().fold(String::new(), |s, b| format!("{s}{b:02x}"));
    let addresses = [&data, &raw].map(|l| l.local_addr().expect("address").to_string());
    println!("{} {} {hex}", addresses[0], addresses[1]);
    let info = peer(Role::Acceptor, data.local_addr().expect("address"));
    let offer = t.offer(&info).expect("offer");
    let _link = t.connect(&info, &offer, Instant::now() + Duration::from_secs(60)).expect("connect");
    let adopter = t.clone();
    std::thread::spawn(move || {
        for mut s in data.incoming().flatten() {
            let mut p = [0; PREAMBLE_LEN];
            s.read_exact(&mut p).expect("preamble");
            let p = Preamble::decode(&p).expect("preamble");
            adopter.adopt(p.session, p.lane, s);
        }
    });
    std::thread::spawn(move || {
        for s in raw.incoming().flatten() {
            let m = m.clone();
            std::thread::spawn(move || raw_side(s, &m, total));
        }
    });
    // The parent ends us by closing our standard input.
    let _ = std::io::stdin().read(&mut [0]);
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("bind")
}

/// Serves runs on one raw stream: direction, lane, streams, piece, random.
fn raw_side(mut s: TcpStream, m: &Memory, total: usize) {
    s.set_nodelay(true).expect("nodelay");
    let mut order = [0; 5];
    while s.read_exact(&mut order).is_ok() {
        let [read, lane, streams, log2, random] = order.map(usize::from);
        let all = slice(m);
        for at in offsets(total, 1 << log2, random == 1).into_iter().skip(lane).step_by(streams) {
            let piece = &mut all[at..at + (1 << log2)];
            if read == 1 { s.write_all(piece) } else { s.read_exact(piece) }.expect("raw");
        }
        if read == 0 {
            s.write_all(&[1]).expect("raw");
        }
    }
}

// ---- the near side ----

fn measure(streams: usize, total: usize, rounds: usize) {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args([streams, total >> 20].map(|n| n.to_string()))
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("child");
    let mut hello = String::new();
    BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut hello).expect("child's addresses");
    let mut words = hello.split_whitespace();
    let mut word = || words.next().expect("child's addresses");
    let (address, raw, hex) = (word().parse().expect("address"), word().to_owned(), word());
    let payload = (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"));

    let m = memory(total, 2);
    std::mem::forget(m.clone());
    let t = transport(streams);
    let info = peer(Role::Initiator, address);
    let offer = t.offer(&info).expect("offer");
    let link = t.connect(&info, &offer, Instant::now() + Duration::from_secs(10)).expect("connect");
    let ticket = RemoteTicket { region: REGION, len: total as u64, payload: payload.collect(), fd: None };
    let key = link.import(ticket).expect("import");
    let mut sockets: Vec<TcpStream> =
        (0..streams).map(|_| TcpStream::connect(&raw).expect("raw connect")).collect();
    for s in &sockets {
        s.set_nodelay(true).expect("nodelay");
    }

    println!("{streams} streams, {} MiB a run, medians of {rounds}; GB/s (ratio to raw)", total >> 20);
    println!(
        "{:>9} {:>8} {:>6} {:>6}  {:>14} {:>14} {:>14}",
        "piece", "pattern", "op", "raw", "off", "bound", "full"
    );
    for (log2, random) in [(12, true), (14, true), (16, true), (16, false), (20, false), (25, false)] {
        for op in [Op::Write, Op::Read] {
            let mut rates = [const { Vec::new() }; 4];
            for _ in 0..rounds {
                rates[0].push(rate(total, || raw_run(&mut sockets, &m, total, op, log2, random)));
                for (i, level) in [Integrity::Off, Integrity::Bound, Integrity::Full].into_iter().enumerate()
                {
                    rates[i + 1].push(run(&link, key, &m, total, op, 1 << log2, random, level));
                }
            }
            let [raw, off, bound, full] = rates.map(|mut r| {
                r.sort_by(f64::total_cmp);
                r[r.len() / 2]
            });
            let cell = |x: f64| format!("{x:.2} ({:.2})", x / raw);
            println!(
                "{:>9} {:>8} {:>6} {raw:>6.2}  {:>14} {:>14} {:>14}",
                if log2 < 20 {
                    format!("{} KiB", 1 << (log2 - 10))
                } else {
                    format!("{} MiB", 1 << (log2 - 20))
                },
                if random { "random" } else { "ordered" },
                if op == Op::Write { "write" } else { "read" },
                cell(off),
                cell(bound),
                cell(full)
            );
        }
    }
    latency(&link, key, &m);
    link.close();
    t.shutdown();
    drop(child.stdin.take());
    child.wait().expect("child");
}

fn rate(total: usize, run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    total as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn raw_run(sockets: &mut [TcpStream], m: &Memory, total: usize, op: Op, log2: u8, random: bool) {
    let streams = sockets.len();
    std::thread::scope(|scope| {
        for (lane, s) in sockets.iter_mut().enumerate() {
            scope.spawn(move || {
                let all = slice(m);
                let order = [u8::from(op == Op::Read), lane as u8, streams as u8, log2, u8::from(random)];
                s.write_all(&order).expect("raw");
                for i in (lane..total >> log2).step_by(streams) {
                    let piece = &mut all[i << log2..(i + 1) << log2];
                    if op == Op::Read { s.read_exact(piece) } else { s.write_all(piece) }.expect("raw");
                }
                if op == Op::Write {
                    s.read_exact(&mut [0]).expect("raw");
                }
            });
        }
    });
}

#[expect(clippy::too_many_arguments, reason = "the axes of the table")]
fn run(
    link: &Arc<dyn Link>,
    key: RemoteKey,
    m: &Arc<Memory>,
    total: usize,
    op: Op,
    piece: usize,
    random: bool,
    level: Integrity,
) -> f64 {
    let pieces: Vec<Piece> = offsets(total, piece, random)
        .into_iter()
        .enumerate()
        .map(|(i, at)| Piece {
            local_offset: (i * piece) as u64,
            remote_offset: at as u64,
            len: piece as u64,
        })
        .collect();
    let tracker = Arc::new(Tracker::new(pieces.len()));
    let job = job(key, m, op, pieces.into(), level, &tracker);
    rate(total, || {
        link.submit(job).expect("submit");
        assert!(tracker.wait_until(Instant::now() + Duration::from_secs(60)), "a transfer hangs");
        assert_eq!(tracker.error(), None, "{:?}", tracker.detail());
    })
}

fn job(
    remote: RemoteKey,
    local: &Arc<Memory>,
    op: Op,
    pieces: Arc<[Piece]>,
    integrity: Integrity,
    tracker: &Arc<Tracker>,
) -> Job {
    Job {
        transfer: TransferId(1),
        op,
        local_region: RegionId(9),
        local: local.clone(),
        remote,
        pieces,
        integrity,
        after: None,
        digest: None,
        tracker: tracker.clone(),
    }
}

/// A small write from submit to acknowledgement, and the cost of submitting many descriptors.
fn latency(link: &Arc<dyn Link>, key: RemoteKey, m: &Arc<Memory>) {
    let one: Arc<[Piece]> = [Piece { local_offset: 0, remote_offset: 64, len: 64 }].into();
    let mut times: Vec<Duration> = (0..5000)
        .map(|_| {
            let tracker = Arc::new(Tracker::new(1));
            let start = Instant::now();
            link.submit(job(key, m, Op::Write, one.clone(), Integrity::Full, &tracker)).expect("submit");
            assert!(tracker.wait_until(Instant::now() + Duration::from_secs(10)), "a transfer hangs");
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("64 B write, submit to acknowledged: p50 {:?}, p99 {:?}", times[2500], times[4950]);
    let many: Arc<[Piece]> =
        (0..16_384).map(|i| Piece { local_offset: i * 64, remote_offset: i * 64, len: 64 }).collect();
    let mut costs: Vec<f64> = (0..20)
        .map(|_| {
            let tracker = Arc::new(Tracker::new(many.len()));
            let job = job(key, m, Op::Write, many.clone(), Integrity::Off, &tracker);
            let start = Instant::now();
            link.submit(job).expect("submit");
            let cost = start.elapsed().as_nanos() as f64 / many.len() as f64;
            assert!(tracker.wait_until(Instant::now() + Duration::from_secs(10)), "a transfer hangs");
            cost
        })
        .collect();
    costs.sort_by(f64::total_cmp);
    println!("submit of {} descriptors: {:.1} ns each", many.len(), costs[costs.len() / 2]);
}
