//! What the agent tests share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod child;

use kvxfer_core::{Agent, AgentBuilder, ErrorCode, Peer, TransportKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A limit no test comes near unless something hangs.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A builder with a name of its own and no listener.
pub(crate) fn builder(allow: &[TransportKind]) -> AgentBuilder {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    Agent::builder().name(format!("agent-{}-{n}", std::process::id())).allow(allow.iter().copied())
}

/// An agent that listens on a port of the system's choice.
pub(crate) fn agent(allow: &[TransportKind]) -> Agent {
    builder(allow).listen("tcp://127.0.0.1:0").build().unwrap()
}

/// Two agents of this process, connected over the given transports; `None` (said aloud) when they do not reach here.
pub(crate) fn pair_with(allow: &[TransportKind]) -> Option<(Agent, Agent, Peer)> {
    let (a, b) = (agent(allow), agent(allow));
    match a.connect(&b.addresses()[0], LONG) {
        Ok(peer) => Some((a, b, peer)),
        Err(e) if e.code() == ErrorCode::NotAvailable && !allow.is_empty() => {
            eprintln!("SKIPPED {allow:?}: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Bytes that differ by position and seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .collect()
}

/// All bytes of a memory.
pub(crate) fn bytes(memory: &kvxfer_core::Memory) -> Vec<u8> {
    let mut all = vec![0; memory.len()];
    memory.read_at(0, &mut all).unwrap();
    all
}

/// Waits until `what` holds; panics when it does not within [`LONG`].
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < limit, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// True when the descriptor is readable within the time.
pub(crate) fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let t = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&t)).unwrap() > 0
}

/// The smallest executor there is.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    let limit = Instant::now() + LONG;
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(v) => return v,
            std::task::Poll::Pending => std::thread::park_timeout(LONG),
        }
        assert!(Instant::now() < limit, "a future was never woken");
    }
}

/// Open descriptors and threads of this process.
pub(crate) fn resources() -> (usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}
