//! Word to the proxy: pushes a request's notifications ([`kvxfer_proto::notify`]) into the `ZeroMQ` PULL socket it listens on.
//!
//! One thread and one connection; a message waits there until the proxy can be reached or its time is over. A proxy that says it
//! is kvxfer's hears everything; to any other goes `LMCache`'s own message, and failures, which it does not know, stay here.
//! ZMTP confirms nothing, so before each message the connection is looked at: one whose other end has gone is not used.

use crate::agent::address::Address;
use crate::{Error, Result};
use kvxfer_proto::notify::{Notification, encode};
use kvxfer_proto::zmtp::{
    COMMAND, GREETING, MAX_COMMAND, Ready, check_greeting, greeting, message, parse_ready, ready,
};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a message may wait for the proxy.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long connecting, the greeting and one write may take.
const STEP: Duration = Duration::from_secs(2);
/// Shortest and longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Messages that wait at most; beyond it the oldest is given up.
const MOST: usize = 65_536;

/// Sends notifications to one proxy. Dropping it gives up what has not been sent; see [`Notifier::flush`].
pub struct Notifier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    host: String,
    port: u16,
    state: Mutex<State>,
    changed: Condvar,
    /// For the pause after a failed attempt: what is queued meanwhile wakes nobody.
    closing: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Instant, Notification)>,
    /// The thread has taken one and is at it.
    busy: bool,
    closed: bool,
}

impl Notifier {
    /// For the proxy at `endpoint`, `tcp://host:port`. Connects with the first message.
    pub fn new(endpoint: &str) -> Result<Self> {
        let wrong = |problem: String| Error::InvalidArgument { argument: "proxy", problem };
        let (host, port) = match Address::parse(endpoint).map_err(wrong)? {
            Address::Tcp(_, 0) => return Err(wrong(format!("{endpoint}: port 0 is nobody's"))),
            Address::Tcp(host, port) => (host, port),
            _ => return Err(wrong(format!("{endpoint}: the proxy listens on tcp://host:port"))),
        };
        let shared = Arc::new(Shared {
            host,
            port,
            state: Mutex::default(),
            changed: Condvar::new(),
            closing: Condvar::new(),
        });
        let for_thread = shared.clone();
        let thread = crate::threads::spawn("kvxfer-notify", move || for_thread.run()).map_err(|e| {
            Error::system("starting a thread for notifications", e, "raise the limit on threads")
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Queues a notification; returns at once.
    pub fn send(&self, notification: Notification) {
        let mut state = self.shared.state.lock();
        if state.waiting.len() >= MOST
            && let Some((_, lost)) = state.waiting.pop_front()
        {
            tracing::error!(proxy = %self.shared, request = lost.req_id(), "too many notifications wait: one is lost");
        }
        state.waiting.push_back((Instant::now() + PATIENCE, notification));
        self.shared.changed.notify_all();
    }

    /// Waits until everything has been sent or given up, at most `timeout`; false when something is left.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        while state.busy || !state.waiting.is_empty() {
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() {
                return !state.busy && state.waiting.is_empty();
            }
        }
        true
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
        self.shared.closing.notify_all();
        if let Some(thread) = self.thread.take() {
            // It is at most one step from looking at `closed`.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Shared {
    fn run(&self) {
        let mut connection = None;
        while let Some((deadline, notification)) = self.next() {
            self.deliver(&mut connection, &notification, deadline);
            self.state.lock().busy = false;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<(Instant, Notification)> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(next) = state.waiting.pop_front() {
                state.busy = true;
                return Some(next);
            }
            self.changed.wait(&mut state);
        }
    }

    fn deliver(&self, connection: &mut Option<Push>, notification: &Notification, deadline: Instant) {
        let mut pause = PAUSE.0;
        loop {
            match self.attempt(connection, notification) {
                Ok(()) => return,
                Err(e) => {
                    *connection = None;
                    if Instant::now() + pause >= deadline || self.rest(pause) {
                        tracing::error!(
                            proxy = %self, request = notification.req_id(), error = %e,
                            "the proxy was not told about a request: is it running, and is its address right?"
                        );
                        return;
                    }
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }

    /// Pauses; true when the notifier was closed meanwhile.
    fn rest(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.state.lock();
        while !state.closed {
            if self.closing.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.closed
    }

    fn attempt(&self, connection: &mut Option<Push>, notification: &Notification) -> io::Result<()> {
        if connection.as_mut().is_some_and(|push| !push.is_alive()) {
            *connection = None;
        }
        let push = match connection {
            Some(push) => push,
            None => connection.insert(Push::connect(&self.host, self.port)?),
        };
        let bytes = match (push.kvxfer, notification) {
            (false, Notification::KvFailed { req_id, code, .. }) => {
                tracing::debug!(req_id, code, "this proxy knows no word for a failure");
                return Ok(());
            }
            (false, Notification::KvReady { req_id, .. }) => {
                encode(&Notification::ProxyNotif { req_id: req_id.clone() })
            }
            (_, other) => encode(other),
        };
        match bytes {
            Ok(bytes) => push.stream.write_all(&message(&bytes)),
            Err(e) => {
                tracing::error!(request = notification.req_id(), error = %e, "a notification cannot travel");
                Ok(())
            }
        }
    }
}

/// A connected PUSH socket.
struct Push {
    stream: TcpStream,
    /// The other side speaks kvxfer's notifications.
    kvxfer: bool,
}

impl Push {
    fn connect(host: &str, port: u16) -> io::Result<Self> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, STEP).and_then(Self::greet) {
                Ok(push) => return Ok(push),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn greet(mut stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STEP))?;
        stream.set_write_timeout(Some(STEP))?;
        stream.write_all(&greeting())?;
        let mut theirs = [0; GREETING];
        stream.read_exact(&mut theirs)?;
        check_greeting(&theirs).map_err(bad)?;
        stream.write_all(&ready("PUSH", false))?;
        let mut head = [0; 2];
        stream.read_exact(&mut head)?;
        if head[0] != COMMAND || u64::from(head[1]) > MAX_COMMAND {
            return Err(bad("no READY command after the greeting".into()));
        }
        let mut body = vec![0; usize::from(head[1])];
        stream.read_exact(&mut body)?;
        let Ready { socket_type, kvxfer } = parse_ready(&body).map_err(bad)?;
        if socket_type != "PULL" {
            return Err(bad(format!("a {socket_type} socket; the proxy's is PULL")));
        }
        Ok(Self { stream, kvxfer })
    }

    /// False once the other end has closed. What it says (heartbeats) is read and forgotten.
    fn is_alive(&mut self) -> bool {
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        let mut scratch = [0; 256];
        let alive = loop {
            match self.stream.read(&mut scratch) {
                Ok(0) => break false,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break false,
            }
        };
        alive && self.stream.set_nonblocking(false).is_ok()
    }
}

fn bad(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests;
