//! One stream: its socket, what it owes and what it is owed, and the bounded step an I/O thread takes with it.

use super::engine::Worker;
use super::frame::Ack;
use super::job::Cut;
use super::link::{Finished, Inner};
use super::receive::Receiver;
use super::scatter::Scatter;
use super::send::Sender;
use crate::cuda::Landing;
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, Integrity};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// One stream of a link.
pub(super) struct Lane {
    pub(super) token: u64,
    pub(super) index: u16,
    /// Both ends, for humans.
    pub(super) addresses: String,
    /// It could send now; a hint.
    open: AtomicBool,
    /// In the worker's queue.
    pub(super) queued: AtomicBool,
    link: Arc<Inner>,
    worker: Arc<Worker>,
    readable: AtomicBool,
    writable: AtomicBool,
    io: Mutex<Io>,
}

struct Io {
    socket: Option<TcpStream>,
    readable: bool,
    writable: bool,
    receiver: Receiver,
    sender: Sender,
    ledger: Ledger,
}

/// A cut that was sent (or asked for) and not yet answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) job: u64,
    pub(super) seq: u32,
    pub(super) cut: Cut,
}

/// The answer to a peer's read.
pub(super) struct Reply {
    pub(super) job: u64,
    pub(super) seq: u32,
    pub(super) integrity: Integrity,
    /// The bytes are still on their way from a device. Goes before what they are written to.
    pub(super) filling: Option<Landing>,
    pub(super) bytes: Result<Scatter, ErrorCode>,
}

/// What this stream owes and is owed. Everything in it is bounded: by our windows, or by the peer's, which we enforce.
#[derive(Default)]
pub(super) struct Ledger {
    /// Writes not yet acknowledged, oldest first.
    pub(super) sent: VecDeque<Sent>,
    pub(super) sent_bytes: u64,
    /// Reads not yet answered, oldest first.
    pub(super) asked: VecDeque<Sent>,
    pub(super) asked_bytes: u64,
    /// Acknowledgements to send.
    pub(super) acks: VecDeque<Ack>,
    /// What arrived and is being taken to a device, or came after such bytes: acknowledged in the order of its coming.
    pub(super) landing: VecDeque<Arrived>,
    /// Wakes this stream when a copy has ended.
    wake: Weak<Lane>,
    /// Answers to send.
    pub(super) replies: VecDeque<Reply>,
}

/// A frame whose payload has arrived and passed its check.
pub(super) struct Arrived {
    /// Keeps the slot until the bytes are on the device.
    pub(super) landing: Option<(Landing, Scatter)>,
    pub(super) then: Then,
}

/// What follows once its bytes are where they belong.
#[derive(Clone, Copy)]
pub(super) enum Then {
    Ack(Ack),
    /// A read of ours is complete.
    Read(Sent),
}

impl Ledger {
    /// To be called when a copy of this stream has ended.
    pub(super) fn waker(&self) -> crate::cuda::Then {
        let wake = self.wake.clone();
        Box::new(move || {
            if let Some(lane) = wake.upgrade() {
                lane.kick();
            }
        })
    }

    /// Goes on with what has landed on a device.
    pub(super) fn landed(&mut self, link: &Inner, finished: &mut Finished) {
        while let Some(arrived) = self.landing.front_mut() {
            let code = match arrived.landing.as_mut().map(|(landing, _)| landing.is_done()) {
                Some(Ok(false)) => return,
                None | Some(Ok(true)) => None,
                Some(Err(e)) => {
                    tracing::warn!(peer = link.name, error = %e, "bytes that arrived did not reach the device");
                    Some(ErrorCode::Transport)
                }
            };
            match arrived.then {
                Then::Ack(ack) => self.acks.push_back(Ack { code: code.unwrap_or(ack.code), ..ack }),
                Then::Read(sent) => {
                    link.end_receive(sent.job, Some((sent.cut, code.unwrap_or(ErrorCode::Ok))), finished);
                }
            }
            self.landing.pop_front();
        }
    }

    /// An acknowledgement that is due, after all that came before.
    pub(super) fn acknowledge(&mut self, ack: Ack) {
        if self.landing.is_empty() {
            self.acks.push_back(ack);
        } else {
            self.landing.push_back(Arrived { landing: None, then: Then::Ack(ack) });
        }
    }
    pub(super) fn may_write(&self) -> bool {
        self.sent.len() < WINDOW_FRAMES && self.sent_bytes < WRITE_WINDOW
    }
    pub(super) fn may_ask(&self) -> bool {
        self.asked.len() < WINDOW_FRAMES && self.asked_bytes < READ_WINDOW
    }
    fn has_room(&self) -> bool {
        self.may_write() && self.may_ask()
    }
}

/// Frames of each kind that may be unanswered on a stream.
pub(super) const WINDOW_FRAMES: usize = 256;
/// Bytes written and not acknowledged on a stream, beyond which nothing more is sent.
pub(super) const WRITE_WINDOW: u64 = 16 << 20;
/// Bytes asked for and not arrived on a stream, beyond which nothing more is asked for.
pub(super) const READ_WINDOW: u64 = 8 << 20;
/// Bytes a stream moves in each direction before the next stream has its turn.
pub(super) const STEP_BYTES: usize = 1 << 20;

/// Why a stream, and with it the link, cannot go on.
pub(super) struct Broken {
    pub(super) code: ErrorCode,
    pub(super) text: String,
}

impl Broken {
    pub(super) fn protocol(text: impl std::fmt::Display) -> Self {
        Self { code: ErrorCode::Protocol, text: format!("the peer broke the protocol: {text}") }
    }
    pub(super) fn io(call: &str, e: &std::io::Error) -> Self {
        let code = match e.raw_os_error() {
            Some(
                libc::ECONNRESET | libc::EPIPE | libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH,
            ) => ErrorCode::PeerGone,
            _ => ErrorCode::Transport,
        };
        Self { code, text: format!("{call}: {e}") }
    }
}

/// What an I/O thread carries from step to step.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) iov: Vec<libc::iovec>,
    pub(super) table: Vec<u8>,
    pub(super) finished: Finished,
    /// Bytes moved in this round.
    pub(super) moved: usize,
}

impl Lane {
    /// Takes a connected socket into service.
    pub(super) fn start(link: &Arc<Inner>, index: u16, socket: TcpStream) -> Result<Arc<Self>> {
        tune(&socket, link.peer_timeout).map_err(|e| {
            Error::system("setsockopt of a data connection", e, "is the socket still connected?")
        })?;
        let text = |a: std::io::Result<std::net::SocketAddr>| a.map_or("?".into(), |a| a.to_string());
        let addresses = format!("{} to {}", text(socket.local_addr()), text(socket.peer_addr()));
        let (worker, token) = link.engine.worker()?;
        let lane = Arc::new_cyclic(|me| Self {
            token,
            index,
            addresses,
            open: AtomicBool::new(true),
            queued: AtomicBool::new(false),
            link: link.clone(),
            worker: worker.clone(),
            readable: AtomicBool::new(false),
            writable: AtomicBool::new(false),
            io: Mutex::new(Io {
                socket: None,
                readable: true,
                writable: true,
                receiver: Receiver::new(),
                sender: Sender::new(is_local(&socket)),
                ledger: Ledger { wake: me.clone(), ..Ledger::default() },
            }),
        });
        let mut io = lane.io.lock();
        worker.watch(&lane, socket.as_fd())?;
        io.socket = Some(socket);
        drop(io);
        lane.kick();
        Ok(lane)
    }

    /// Asks for a step.
    pub(super) fn kick(self: &Arc<Self>) {
        self.worker.kick(self);
    }

    /// True when it could send now, as far as one can tell from outside.
    pub(super) fn open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// The socket became ready.
    pub(super) fn ready(&self, readable: bool, writable: bool) {
        if readable {
            self.readable.store(true, Ordering::Release);
        }
        if writable {
            self.writable.store(true, Ordering::Release);
        }
    }

    /// Moves a bounded amount; true when there is more to do at once. I/O thread only.
    pub(super) fn step(&self, scratch: &mut Scratch) -> bool {
        let (outcome, open) = {
            let mut io = self.io.lock();
            io.readable |= self.readable.swap(false, Ordering::AcqRel);
            io.writable |= self.writable.swap(false, Ordering::AcqRel);
            let outcome = io.step(&self.link, scratch);
            (outcome, io.writable && io.ledger.has_room())
        };
        let was_open = self.open.swap(open, Ordering::SeqCst);
        if !open {
            // What came for this stream while it filled up can go another way.
            self.link.pass_on();
        }
        // Work that came since the last look found this stream closed and did not wake it.
        let missed = open && !was_open && self.link.waiting();
        let outcome = outcome.map(|more| more || missed);
        outcome.unwrap_or_else(|broken| {
            let text = format!("connection {} with {}: {}", self.addresses, self.link.name, broken.text);
            self.link.end(broken.code, &text, &mut scratch.finished);
            false
        })
    }

    /// From here on no byte goes into the local memory of these read jobs.
    pub(super) fn abandon(&self, jobs: &[u64], finished: &mut Finished) {
        let mut io = self.io.lock();
        if let Some(job) = io.receiver.abandon(jobs) {
            self.link.end_receive(job, None, finished);
        }
        // What is on its way to a device cannot be called back, but it is there in a moment.
        for arrived in &mut io.ledger.landing {
            if let (Then::Read(sent), Some((landing, _))) = (arrived.then, &mut arrived.landing)
                && jobs.contains(&sent.job)
                && let Err(e) = landing.wait()
            {
                tracing::debug!(error = %e, "an abandoned read");
            }
        }
        io.ledger.landed(&self.link, finished);
    }

    /// Closes the socket and lets go of all memory.
    pub(super) fn shut(&self) {
        let mut io = self.io.lock();
        if let Some(socket) = io.socket.take() {
            self.worker.unwatch(self, socket.as_fd());
            if io.sender.in_payload() || !io.ledger.sent.is_empty() {
                // Bytes that wait in the kernel belong to transfers that have failed: they should not arrive any more.
                if let Err(e) = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)) {
                    tracing::debug!(error = %e, "SO_LINGER");
                }
            }
        }
        io.receiver = Receiver::new();
        io.sender.clear();
        io.ledger = Ledger::default();
    }
}

impl Io {
    fn step(&mut self, link: &Inner, scratch: &mut Scratch) -> Result<bool, Broken> {
        let Some(socket) = &self.socket else { return Ok(false) };
        self.ledger.landed(link, &mut scratch.finished);
        if self.readable {
            self.readable = self.receiver.pump(socket.as_fd(), link, &mut self.ledger, scratch)?;
        }
        let mut more = self.readable;
        if self.writable {
            match self.sender.pump(socket.as_fd(), link, &mut self.ledger, scratch)? {
                Pumped::Blocked => self.writable = false,
                Pumped::Drained => {}
                Pumped::Budget => more = true,
            }
        }
        Ok(more)
    }
}

/// How sending ended.
pub(super) enum Pumped {
    /// The socket takes no more now.
    Blocked,
    /// Nothing to send.
    Drained,
    /// Enough for one step.
    Budget,
}

/// Socket buffers within a host, in bytes: enough for both sides to work at once, little enough to stay in the cache.
/// Between hosts the kernel chooses them by the path.
const LOCAL_SEND: usize = 1 << 20;
const LOCAL_RECEIVE: usize = 2 << 20;

/// Small frames go out at once; a dead or stopped peer ends the connection within about `peer_timeout`.
fn tune(socket: &TcpStream, peer_timeout: Duration) -> std::io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let s = socket2::SockRef::from(socket);
    s.set_tcp_user_timeout(Some(peer_timeout.max(Duration::from_secs(1))))?;
    let probe = Duration::from_secs((peer_timeout.as_secs() / 4).max(1));
    s.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(3))?;
    if is_local(socket) {
        s.set_send_buffer_size(LOCAL_SEND)?;
        s.set_recv_buffer_size(LOCAL_RECEIVE)?;
    }
    Ok(())
}

/// True when both ends are on this host.
fn is_local(socket: &TcpStream) -> bool {
    matches!((socket.peer_addr(), socket.local_addr()), (Ok(far), Ok(near)) if far.ip() == near.ip())
}
