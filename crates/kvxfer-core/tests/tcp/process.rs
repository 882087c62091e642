//! Two processes: this test binary runs itself again as the other side.

use crate::harness::*;
use kvxfer_core::proto::RegionId;
use kvxfer_core::transport::{Link, Op, Piece, Role, Transport};
use kvxfer_core::{ErrorCode, Integrity};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const ROLE: &str = "KVXFER_TCP_TEST_ROLE";
const LEN: usize = 32 << 20;
const SESSION: [u8; 16] = *b"two-processes-01";

/// Does nothing in an ordinary run; in a child, plays its role.
#[test]
fn child() {
    match std::env::var(ROLE).as_deref() {
        Ok("peer") => serve(),
        Ok("tidy") => leave_nothing_behind(),
        Ok("fd-limit") => meet_the_fd_limit(),
        _ => {}
    }
}

fn spawn(role: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["process::child", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The far side: exports memory and waits for the end of its standard input.
fn serve() {
    let node = Node::new(&config(2));
    let info = peer(Role::Acceptor, node.address, SESSION);
    let offer = node.transport.offer(&info).unwrap();
    let _link = node.transport.connect(&info, &offer, soon()).unwrap();
    let exported = node.export(&filled(LEN, 42));
    let hex = exported.payload.iter().fold(String::new(), |s, b| format!("{s}{b:02x}"));
    println!("\nREADY {} {} {hex}", node.address, exported.region);
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}

/// A child that is killed when the test ends, whichever way.
struct Far {
    child: Child,
    link: Arc<dyn Link>,
    key: kvxfer_core::transport::RemoteKey,
    _node: Node,
}

impl Far {
    fn new(peer_timeout: Duration) -> Self {
        let mut child = spawn("peer");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|l| l.unwrap().strip_prefix("READY ").map(str::to_owned)).unwrap();
        let words: Vec<&str> = ready.split(' ').collect();
        let node = Node::with_timeout(&config(2), peer_timeout);
        let info = peer(Role::Initiator, words[0].parse().unwrap(), SESSION);
        let offer = node.transport.offer(&info).unwrap();
        let link = node.transport.connect(&info, &offer, soon()).unwrap();
        let payload = (0..words[2].len() / 2)
            .map(|i| u8::from_str_radix(&words[2][2 * i..2 * i + 2], 16).unwrap())
            .collect();
        let region = RegionId(words[1].parse().unwrap());
        let key = Exported { region, len: LEN as u64, payload }.import(&link);
        Self { child, link, key, _node: node }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Far {
    /// Stops the child and returns once every one of its threads has stopped.
    fn stop(&self) {
        self.signal(Signal::STOP);
        until("every thread of the child to stop", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
            tasks.flatten().all(|t| {
                let stat = std::fs::read_to_string(t.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|s| s.starts_with('T'))
            })
        });
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn all() -> [Piece; 1] {
    [Piece { local_offset: 0, remote_offset: 0, len: LEN as u64 }]
}

#[test]
fn bytes_travel_between_processes() {
    let far = Far::new(Duration::from_secs(10));
    let mine = zeroed(LEN);
    let (_, t) = start(&far.link, Op::Read, &mine, far.key, &all(), Integrity::Full);
    good(&t);
    assert!(bytes(&mine) == bytes(&filled(LEN, 42)));
    let source = filled(LEN, 43);
    let (_, t) = start(&far.link, Op::Write, &source, far.key, &all(), Integrity::Full);
    good(&t);
    let (_, t) = start(&far.link, Op::Read, &mine, far.key, &all(), Integrity::Bound);
    good(&t);
    assert!(bytes(&mine) == bytes(&source));
}

#[test]
fn a_killed_peer_ends_every_transfer() {
    for op in [Op::Write, Op::Read] {
        let mut far = Far::new(Duration::from_secs(10));
        let mine = filled(LEN, 1);
        let begin = || start(&far.link, op, &mine, far.key, &all(), Integrity::Full).1;
        let mut trackers: Vec<_> = (0..20).map(|_| begin()).collect();
        until("the first transfer", || trackers[0].is_finished());
        // Stopped first, so that something is certainly under way when it dies.
        far.stop();
        trackers.extend((0..4).map(|_| begin()));
        far.child.kill().unwrap();
        for t in &trackers {
            wait(t);
        }
        let last = &trackers[23];
        assert_eq!(last.error(), Some(ErrorCode::PeerGone), "{:?}", last.detail());
        assert_eq!(far.link.broken(), Some(ErrorCode::PeerGone));
    }
}

#[test]
fn with_a_stopped_peer_reads_can_be_cancelled_and_close_ends_the_rest() {
    let far = Far::new(Duration::from_secs(600));
    let mine = filled(LEN, 1);
    far.stop();
    let (write_id, write) = start(&far.link, Op::Write, &mine, far.key, &all(), Integrity::Full);
    let (read_id, read) = start(&far.link, Op::Read, &zeroed(LEN), far.key, &all(), Integrity::Full);
    std::thread::sleep(Duration::from_millis(100));
    for (t, id) in [(&write, write_id), (&read, read_id)] {
        assert!(!t.is_finished());
        t.request_cancel(ErrorCode::TimedOut);
        far.link.cancel(id);
    }
    wait(&read);
    assert_eq!(read.error(), Some(ErrorCode::TimedOut));
    assert!(!write.is_finished(), "its bytes may land when the peer goes on");
    far.link.close();
    wait(&write);
    assert!(far.link.fenced());
    far.signal(Signal::CONT);
}

#[test]
fn a_stopped_peer_is_given_up_after_its_timeout() {
    let far = Far::new(Duration::from_secs(1));
    let mine = filled(LEN, 1);
    far.stop();
    let (_, t) = start(&far.link, Op::Write, &mine, far.key, &all(), Integrity::Full);
    wait(&t);
    assert_eq!(t.error(), Some(ErrorCode::PeerGone), "{:?}", t.detail());
}

fn passes(role: &str) {
    let out = spawn(role).wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn no_thread_and_no_descriptor_is_left() {
    passes("tidy");
}

#[test]
fn the_fd_limit_is_named() {
    passes("fd-limit");
}

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count()
}

fn leave_nothing_behind() {
    let round = || {
        let (a, b) = (Node::new(&config(3)), Node::new(&config(3)));
        let (link, keep) = connect(&a, &b, None);
        let (mine, theirs) = (filled(1 << 20, 1), zeroed(1 << 20));
        let key = b.export(&theirs).import(&link);
        let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 1 << 20 }];
        for op in [Op::Write, Op::Read] {
            good(&start(&link, op, &mine, key, &pieces, Integrity::Full).1);
        }
        let weak = Arc::downgrade(&theirs);
        drop((link, keep, a, b, theirs));
        assert!(weak.upgrade().is_none(), "memory is still held");
    };
    // What the standard library opens once is not ours.
    round();
    let before = (count("task"), count("fd"));
    for _ in 0..5 {
        round();
    }
    // A joined thread shows in /proc for a moment longer, so also the first count may have one too many; five rounds
    // that leave something behind leave more than that.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while count("task") > before.0 || count("fd") > before.1 {
        assert!(std::time::Instant::now() < deadline, "more than {before:?}: {:?}", left());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Names of the threads and targets of the descriptors that are there.
fn left() -> Vec<String> {
    let names = |what: &str, name: &dyn Fn(std::path::PathBuf) -> std::io::Result<String>| {
        let entries = std::fs::read_dir(format!("/proc/self/{what}")).unwrap();
        entries.flatten().filter_map(|e| name(e.path()).ok()).collect::<Vec<_>>()
    };
    let mut all = names("task", &|p| std::fs::read_to_string(p.join("comm")).map(|s| s.trim().to_owned()));
    all.extend(names("fd", &|p| std::fs::read_link(p).map(|t| t.display().to_string())));
    all
}

fn meet_the_fd_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let (a, b) = (Node::new(&config(8)), Node::new(&config(8)));
    // Threads and their descriptors exist from the first link on.
    let (_link, accepted) = connect(&a, &b, None);
    until("every stream", || accepted.describe().contains("8 of 8"));
    let before = getrlimit(Resource::Nofile);
    let mut low = before;
    low.current = Some(count("fd") as u64 + 4);
    setrlimit(Resource::Nofile, low).unwrap();
    // Nobody takes these connections, so all descriptors are ours.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let open = count("fd");
    let info = peer(Role::Initiator, silent.local_addr().unwrap(), session());
    let offer = a.transport.offer(&info).unwrap();
    let e = a.transport.connect(&info, &offer, soon()).map(drop).unwrap_err();
    assert_eq!(e.code(), ErrorCode::System, "{e}");
    assert!(e.to_string().contains("ulimit -n"), "{e}");
    assert_eq!(count("fd"), open, "the streams that were opened are closed again");
    setrlimit(Resource::Nofile, before).unwrap();
    let (link, _keep) = connect(&a, &b, None);
    let (mine, theirs) = (filled(4096, 1), zeroed(4096));
    let key = b.export(&theirs).import(&link);
    let pieces = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    good(&start(&link, Op::Write, &mine, key, &pieces, Integrity::Full).1);
}
