//! Looks after NIXL when nobody else does.
//!
//! Some of what a peer does needs this side's help: building a connection, and over sockets every transfer (NIXL's UCX
//! moves those bytes itself). Nothing tells when help is needed, so a thread looks, often while something happens and
//! less and less often afterwards: at last every 10 ms where bytes go by CMA or RDMA, which is a fraction of a percent of
//! a core, and every millisecond where a peer needs help, which is a few percent and the price of NIXL over sockets. It
//! runs only while peers are connected, and it stays out of the way of a thread that waits for a transfer.

use super::engine::{Engine, Seen};
use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// After the last activity it looks without sleeping for this long.
const HOT: Duration = Duration::from_micros(100);
/// Sleep while somebody else drives, and how long ago that may have been. A peer's flush may have to wait for it: UCX
/// asks over a socket even where the bytes go by CMA, once both sides have written to each other.
pub(super) const ASIDE: Duration = Duration::from_micros(200);
/// Longest sleep, and that where a peer needs help.
const COLD: Duration = Duration::from_millis(10);
const COLD_HELPING: Duration = Duration::from_millis(1);

/// The thread and how to end it.
#[derive(Default)]
pub(super) struct Keeper {
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Signal {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    stop: bool,
    /// Asked to look now.
    nudged: bool,
}

impl Keeper {
    /// Starts the thread unless it runs, and makes it look at once.
    pub(super) fn attend(&self, engine: &Arc<Engine>) -> std::io::Result<()> {
        let mut thread = self.thread.lock();
        let stopped = self.signal.state.lock().stop;
        if thread.is_none() && !stopped {
            let (engine, signal) = (Arc::downgrade(engine), Arc::clone(&self.signal));
            let run = move || keep(&engine, &signal);
            *thread = Some(crate::threads::spawn("kvxfer-nixl", run)?);
        }
        self.signal.state.lock().nudged = true;
        self.signal.wake.notify_all();
        Ok(())
    }

    /// Ends the thread and waits for it.
    pub(super) fn stop(&self) {
        self.signal.state.lock().stop = true;
        self.signal.wake.notify_all();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn keep(engine: &Weak<Engine>, signal: &Signal) {
    let mut last = Instant::now();
    loop {
        let Some(strong) = engine.upgrade() else { return };
        let seen = strong.keep();
        let connected = strong.links() > 0 || strong.jobs() > 0;
        let cold = if strong.helps() { COLD_HELPING } else { COLD };
        drop(strong);
        let now = Instant::now();
        if seen != Seen::Nothing {
            last = now;
        }
        let idle = now - last;
        let mut state = signal.state.lock();
        if state.stop {
            return;
        }
        if std::mem::take(&mut state.nudged) {
            last = now;
        } else if !connected {
            signal.wake.wait(&mut state);
        } else if seen == Seen::OthersAtWork {
            let _ = signal.wake.wait_for(&mut state, ASIDE);
        } else if idle < HOT {
            drop(state);
            std::thread::yield_now();
        } else {
            let _ = signal.wake.wait_for(&mut state, (idle / 16).min(cold));
        }
    }
}
