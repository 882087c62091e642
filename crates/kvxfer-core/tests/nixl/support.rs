//! Processes of their own, two ends of a link, and waiting with a deadline.

use kvxfer_core::config::{AgentConfig, NixlConfig};
use kvxfer_core::proto::wire::HostIdentity;
use kvxfer_core::proto::{RegionId, TransferId};
use kvxfer_core::transport::nixl::{NixlTransport, find};
use kvxfer_core::transport::{Job, Link, PeerInfo, RemoteKey, RemoteTicket, Role, Tracker, Transport};
use kvxfer_core::{AgentName, Epoch, Integrity, Memory, Op, Piece};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nothing here takes that long; a test that does has hung.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const CHILD: &str = "KVXFER_NIXL_TEST";

/// Runs `body` in a process of its own: this test binary again, with only `test`.
pub(crate) fn isolated(test: &str, body: impl FnOnce()) {
    if std::env::var(CHILD).is_ok_and(|t| t == test) {
        return body();
    }
    let mut child = again(test, test, Stdio::inherit(), Stdio::inherit(), &[]);
    let status = ended(&mut child, LIMIT);
    assert!(status.is_some_and(|s| s.success()), "{test} in its own process: {status:?}");
}

/// [`isolated`], where NIXL is there.
pub(crate) fn with_nixl(test: &str, body: impl FnOnce()) {
    if nixl_is_here(test) {
        isolated(test, body);
    }
}

/// Whether NIXL is installed; says so loudly where it is not.
pub(crate) fn nixl_is_here(test: &str) -> bool {
    if std::env::var(CHILD).is_err() {
        // Asked in a process of its own: to ask is to load.
        let found = Command::new(std::env::current_exe().expect("this test's file"))
            .args(["support::is_nixl_here", "--exact", "--nocapture"])
            .env(CHILD, "probe")
            .output()
            .expect("the test binary runs again");
        if !found.status.success() {
            eprintln!(
                "SKIPPED {test} (NIXL not installed: {})",
                String::from_utf8_lossy(&found.stdout).trim()
            );
            assert!(
                std::env::var_os("KVXFER_REQUIRE_NIXL").is_none(),
                "KVXFER_REQUIRE_NIXL is set and NIXL is not here"
            );
            return false;
        }
    }
    true
}

#[test]
fn is_nixl_here() {
    if std::env::var(CHILD).is_ok_and(|t| t == "probe")
        && let Err(e) = find::load(&NixlConfig::default())
    {
        println!("{e}");
        std::process::exit(1);
    }
}

fn again(test: &str, role: &str, input: Stdio, output: Stdio, env: &[(&str, &str)]) -> Child {
    Command::new(std::env::current_exe().expect("this test's file"))
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, role)
        .envs(env.iter().copied())
        .stdin(input)
        .stdout(output)
        .spawn()
        .expect("the test binary runs again")
}

/// Waits for a child; kills it when it takes longer.
pub(crate) fn ended(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// One end: a transport with one region of `len` bytes.
pub(crate) struct End {
    pub(crate) name: AgentName,
    pub(crate) epoch: Epoch,
    pub(crate) transport: Arc<NixlTransport>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) len: u64,
}

pub(crate) const REGION: RegionId = RegionId(1);

impl End {
    pub(crate) fn new(name: &str, len: usize) -> Self {
        let nixl = NixlConfig { same_host: true, ..NixlConfig::default() };
        Self::configured(name, len, &AgentConfig { nixl, ..AgentConfig::default() })
    }

    pub(crate) fn configured(name: &str, len: usize, config: &AgentConfig) -> Self {
        Self::over(name, Memory::anonymous(len).expect("memory"), config)
    }

    pub(crate) fn over(name: &str, memory: Arc<Memory>, config: &AgentConfig) -> Self {
        let name = AgentName::new(name).expect("a name");
        let epoch = Epoch(u64::from(std::process::id()) << 20);
        let transport = NixlTransport::new(&name, epoch, config).expect("NIXL is here");
        transport.register(REGION, &memory).expect("register");
        let len = memory.len() as u64;
        Self { name, epoch, transport, memory, len }
    }

    pub(crate) fn ticket(&self) -> Vec<u8> {
        self.transport.ticket(REGION, &self.memory).expect("ticket").expect("reachable").payload
    }

    pub(crate) fn fill(&self, seed: u64) {
        self.memory.write_at(0, &pattern(seed, self.len as usize)).expect("in range");
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_at(at, &mut out).expect("in range");
        out
    }

    pub(crate) fn job(&self, op: Op, remote: RemoteKey, pieces: &[Piece]) -> Job {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Job {
            transfer: TransferId(NEXT.fetch_add(1, Ordering::Relaxed)),
            op,
            local_region: REGION,
            local: Arc::clone(&self.memory),
            remote,
            pieces: pieces.into(),
            integrity: Integrity::Full,
            after: None,
            digest: None,
            tracker: Arc::new(Tracker::new(pieces.len())),
        }
    }

    /// Submits and drives to the end.
    pub(crate) fn run(&self, link: &dyn Link, op: Op, remote: RemoteKey, pieces: &[Piece]) -> Arc<Tracker> {
        let job = self.job(op, remote, pieces);
        let (id, tracker) = (job.transfer, Arc::clone(&job.tracker));
        link.submit(job).expect("accepted");
        self.wait(link, id, &tracker);
        tracker
    }

    /// Waits as an agent does: the caller assists, the progress thread polls.
    pub(crate) fn wait(&self, link: &dyn Link, id: TransferId, tracker: &Tracker) {
        let deadline = Instant::now() + LIMIT;
        while !tracker.is_finished() {
            if !link.assist(id) {
                self.transport.poll();
            }
            assert!(Instant::now() < deadline, "transfer {id} does not end: {tracker:?}");
        }
    }

    pub(crate) fn info(&self, session: u8) -> PeerInfo {
        info(self.name.as_str(), self.epoch, std::process::id(), session)
    }
}

pub(crate) fn info(name: &str, epoch: Epoch, pid: u32, session: u8) -> PeerInfo {
    PeerInfo {
        name: AgentName::new(name).expect("a name"),
        epoch,
        host: HostIdentity {
            boot_id: "test".into(),
            pid_namespace: 1,
            net_namespace: 1,
            pid,
            process: 1,
            side_socket: String::new(),
        },
        same_host: true,
        same_kernel: true,
        same_process: pid == std::process::id(),
        role: Role::Initiator,
        address: None,
        session: [session; 16],
    }
}

/// Two ends of this process, connected.
pub(crate) fn pair(a: &End, b: &End, session: u8) -> (Arc<dyn Link>, Arc<dyn Link>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (info_a, info_b) = (a.info(session), b.info(session));
    let offer_a = a.transport.offer(&info_b).expect("offer");
    let offer_b = b.transport.offer(&info_a).expect("offer");
    std::thread::scope(|s| {
        let other = s.spawn(|| b.transport.connect(&info_a, &offer_a, deadline).expect("connect"));
        let ours = a.transport.connect(&info_b, &offer_b, deadline).expect("connect");
        (ours, other.join().expect("the other side connects"))
    })
}

pub(crate) fn remote_ticket(payload: Vec<u8>, len: u64) -> RemoteTicket {
    RemoteTicket { region: REGION, len, payload, fd: None }
}

pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

pub(crate) fn piece(local_offset: u64, remote_offset: u64, len: u64) -> Piece {
    Piece { local_offset, remote_offset, len }
}

/// A second process with an [`End`] that serves whatever NIXL asks of it. Killed when dropped.
pub(crate) struct Other {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) info: PeerInfo,
    pub(crate) ticket: Vec<u8>,
    pub(crate) link: Arc<dyn Link>,
}

impl Other {
    /// Starts `test` again in the role `other`, where [`serve`] must be called, and connects to it.
    pub(crate) fn start(test: &str, ours: &End, len: usize, env: &[(&str, &str)]) -> Self {
        let len_text = len.to_string();
        let mut env = env.to_vec();
        env.push(("KVXFER_NIXL_LEN", &len_text));
        let mut child = again(test, "other", Stdio::piped(), Stdio::piped(), &env);
        let mut input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let told = read_message(&mut output);
        let epoch = Epoch(u64::from_le_bytes(told[0][..8].try_into().expect("8 bytes")));
        let info = info("other", epoch, child.id(), 7);
        write_message(
            &mut input,
            &[&ours.epoch.0.to_le_bytes(), &ours.transport.offer(&info).expect("offer")],
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        let link = ours.transport.connect(&info, &told[1], deadline).expect("connect");
        Self { child, input, output, info, ticket: told[2].clone(), link }
    }

    /// Asks for bytes of the other's region.
    pub(crate) fn bytes(&mut self, at: u64, len: usize) -> Vec<u8> {
        write_message(&mut self.input, &[b"bytes", &at.to_le_bytes(), &(len as u64).to_le_bytes()]);
        read_message(&mut self.output).remove(0)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("the child is ours");
        self.child.wait().expect("the child is ours");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// True in the second process of a test, which serves until its input ends.
pub(crate) fn serve() -> bool {
    if std::env::var(CHILD).as_deref() != Ok("other") {
        return false;
    }
    let len = std::env::var("KVXFER_NIXL_LEN").ok().and_then(|l| l.parse().ok()).expect("told by the parent");
    let end = End::new("other", len);
    end.fill(99);
    let (mut input, mut output) = (BufReader::new(std::io::stdin()), std::io::stdout());
    let parent = std::os::unix::process::parent_id();
    let to = |epoch| info("ours", epoch, parent, 7);
    let offer = end.transport.offer(&to(Epoch(0))).expect("offer");
    write_message(&mut output, &[&end.epoch.0.to_le_bytes(), &offer, &end.ticket()]);
    let told = read_message(&mut input);
    let epoch = Epoch(u64::from_le_bytes(told[0][..8].try_into().expect("8 bytes")));
    let deadline = Instant::now() + Duration::from_secs(10);
    let _link = end.transport.connect(&to(epoch), &told[1], deadline).expect("connect");
    loop {
        let asked = read_message(&mut input);
        let number = |i: usize| u64::from_le_bytes(asked[i][..8].try_into().expect("8 bytes"));
        match asked.first().map(Vec::as_slice) {
            Some(b"bytes") => write_message(&mut output, &[&end.bytes(number(1), number(2) as usize)]),
            _ => return true,
        }
    }
}

/// A line of hexadecimal fields behind a mark that the test harness's own output does not have.
fn write_message(out: &mut impl Write, fields: &[&[u8]]) {
    let mut line = String::new();
    for (i, field) in fields.iter().enumerate() {
        if i > 0 {
            line.push(' ');
        }
        for byte in *field {
            line.extend([byte >> 4, byte & 15].map(|n| char::from(b"0123456789abcdef"[usize::from(n)])));
        }
    }
    writeln!(out, "\n#> {line}").and_then(|()| out.flush()).expect("the other process listens");
}

fn read_message(input: &mut impl BufRead) -> Vec<Vec<u8>> {
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).expect("readable") == 0 {
            return Vec::new();
        }
        if let Some(fields) = line.trim_end().strip_prefix("#> ") {
            let byte =
                |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex");
            return fields.split(' ').map(|f| f.as_bytes().chunks(2).map(byte).collect()).collect();
        }
    }
}
