//! A control connection: a non-blocking socket, a bounded queue of frames not yet written, and its end.
//!
//! To a peer on this host messages take a lane in shared memory once the handshake is over; the socket then only says that it ends.
//!
//! Any thread sends; the progress thread reads, and writes what the socket did not take at once. A reader that is too
//! slow fills the queue and the senders get `NoCapacity`: memory stays bounded and nobody blocks.

use super::lane;
use super::mailbox::{Producer, Pushed};
use super::reactor::{Command, Reactor};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::wire::Message;
use parking_lot::Mutex;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Most bytes that wait for a slow reader.
pub(crate) const MAX_QUEUED: usize = 16 << 20;

/// One control connection.
pub(crate) struct Conn {
    state: Mutex<State>,
    reactor: Arc<Reactor>,
    pub(crate) token: u64,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts about a socket, not states")]
struct State {
    fd: Option<OwnedFd>,
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the first frame that have been written.
    written: usize,
    queued: usize,
    lane: Option<Producer>,
    watched: bool,
    writable_wanted: bool,
    finish: bool,
    broken: bool,
}

impl Conn {
    /// Takes a connected, non-blocking socket; not yet watched.
    pub(crate) fn new(fd: OwnedFd, reactor: Arc<Reactor>) -> Arc<Self> {
        let token = reactor.token();
        Arc::new(Self {
            state: Mutex::new(State {
                fd: Some(fd),
                queue: VecDeque::new(),
                written: 0,
                queued: 0,
                lane: None,
                watched: false,
                writable_wanted: false,
                finish: false,
                broken: false,
            }),
            reactor,
            token,
        })
    }

    /// What is sent from now on takes this lane. What waits already goes through the socket; it belongs to the handshake, which the far
    /// end reads first.
    pub(crate) fn use_lane(&self, lane: Producer) {
        self.state.lock().lane = Some(lane);
    }

    /// Starts watching it for input, and for output if something waits.
    pub(crate) fn watch(&self) -> Result<()> {
        let mut s = self.state.lock();
        let Some(fd) = &s.fd else { return Ok(()) };
        let mut flags = EventFlags::IN | EventFlags::RDHUP;
        if !s.queue.is_empty() {
            flags |= EventFlags::OUT;
        }
        self.reactor.watch(fd, self.token, flags)?;
        s.writable_wanted = flags.contains(EventFlags::OUT);
        s.watched = true;
        Ok(())
    }

    /// Queues a message; writes at once what the socket takes.
    pub(crate) fn send(&self, message: &Message) -> Result<()> {
        self.send_frame(&encode(message)?, false)
    }

    /// Like [`Conn::send`] for something whose space was accounted for earlier: never refused for lack of it.
    pub(crate) fn send_accounted(&self, message: &Message) -> Result<()> {
        self.send_frame(&encode(message)?, true)
    }

    /// Queues a message without writing it: whatever is sent from now on comes after it. [`Conn::flush`] lets it go.
    pub(crate) fn hold(&self, message: &Message) -> Result<()> {
        let frame = encode(message)?;
        let mut s = self.state.lock();
        s.queued += frame.len();
        s.queue.push_back(frame);
        Ok(())
    }

    /// Bytes that have not been written.
    pub(crate) fn waiting(&self) -> usize {
        self.state.lock().waiting()
    }

    /// True when a sender should hold back.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting() >= MAX_QUEUED
    }

    /// Sends what is no message.
    #[cfg(test)]
    pub(crate) fn send_bytes(&self, bytes: &[u8]) {
        self.send_frame(bytes, true).expect("sent");
    }

    fn send_frame(&self, frame: &[u8], accounted: bool) -> Result<()> {
        let mut s = self.state.lock();
        if s.fd.is_none() || s.broken || s.finish {
            return Err(Error::failed(ErrorCode::PeerGone, "the control connection is closed"));
        }
        if !accounted && s.waiting() + frame.len() > MAX_QUEUED {
            return Err(Error::failed(
                ErrorCode::NoCapacity,
                format!(
                    "{} bytes of control messages wait for the peer already (at most {MAX_QUEUED}); it reads too slowly",
                    s.waiting()
                ),
            ));
        }
        if let Some(lane) = &s.lane {
            if lane::push(lane, frame)? == Pushed::Waiting {
                self.reactor.command(Command::Blocked(self.token));
            }
            return Ok(());
        }
        let mut from = 0;
        if s.queue.is_empty() {
            from = s.write(frame);
        }
        if from < frame.len() && !s.broken {
            s.queued += frame.len() - from;
            s.queue.push_back(frame[from..].to_vec());
            self.want_writable(&mut s);
        }
        Ok(())
    }

    fn want_writable(&self, s: &mut State) {
        let wanted = !s.queue.is_empty();
        if s.watched && wanted != s.writable_wanted {
            let mut flags = EventFlags::IN | EventFlags::RDHUP;
            if wanted {
                flags |= EventFlags::OUT;
            }
            if let Some(fd) = &s.fd {
                let data = epoll::EventData::new_u64(self.token);
                let _ = epoll::modify(&self.reactor.epoll, fd, data, flags);
            }
            s.writable_wanted = wanted;
        }
    }

    /// Writes what waits, as far as the socket takes it. True when nothing waits any more.
    pub(crate) fn flush(&self) -> bool {
        let mut s = self.state.lock();
        while let Some(frame) = s.queue.pop_front() {
            let from = s.written;
            let n = s.write(&frame[from..]);
            s.queued -= n;
            if from + n < frame.len() && !s.broken {
                s.written = from + n;
                s.queue.push_front(frame);
                break;
            }
            s.written = 0;
        }
        if s.broken {
            s.queue.clear();
            s.queued = 0;
        }
        let through = s.lane.as_ref().is_none_or(Producer::flush);
        if s.queue.is_empty() && through && s.finish {
            s.shutdown();
        }
        self.want_writable(&mut s);
        s.queue.is_empty() && through
    }

    /// Reads what is there; `Ok(0)` is the end.
    pub(crate) fn read(&self, into: &mut [u8]) -> std::result::Result<usize, Errno> {
        let s = self.state.lock();
        let fd = s.fd.as_ref().ok_or(Errno::NOTCONN)?;
        rustix::net::recv(fd, into, RecvFlags::DONTWAIT).map(|(n, _)| n)
    }

    /// Says "no more from here" once the queue is written. To the peer this is the proof that nothing of ours is under way.
    pub(crate) fn finish(&self) {
        let mut s = self.state.lock();
        if !s.finish {
            s.finish = true;
            if s.queue.is_empty() && s.lane.as_ref().is_none_or(Producer::flush) {
                s.shutdown();
            }
        }
    }

    /// Stops watching without closing: the far end has closed, or is to be ignored.
    pub(crate) fn unwatch(&self) {
        let mut s = self.state.lock();
        if let (true, Some(fd)) = (s.watched, &s.fd) {
            self.reactor.unwatch(fd);
        }
        s.watched = false;
    }

    /// Closes the socket.
    pub(crate) fn close(&self) {
        self.unwatch();
        let mut s = self.state.lock();
        s.fd = None;
        s.lane = None;
        s.queue.clear();
        s.queued = 0;
    }

    /// Gives the socket up without closing it: closing would tell the peer that nothing of ours is under way, which
    /// nobody knows. It ends with the process.
    pub(crate) fn abandon(&self) {
        self.unwatch();
        std::mem::forget(self.state.lock().fd.take());
    }
}

impl State {
    /// Bytes of messages that the far end has not made room for.
    fn waiting(&self) -> usize {
        self.queued + self.lane.as_ref().map_or(0, Producer::waiting)
    }

    /// Writes at most `bytes`; how much the socket took.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(fd) = &self.fd else { return 0 };
        let mut done = 0;
        while done < bytes.len() {
            match rustix::net::send(fd, &bytes[done..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    // The progress thread sees the end of the connection too and cleans up.
                    self.broken = true;
                    break;
                }
            }
        }
        done
    }

    fn shutdown(&self) {
        if let Some(fd) = &self.fd {
            let _ = rustix::net::shutdown(fd, Shutdown::Write);
        }
    }
}

/// A message as bytes; too large a one is the caller's mistake.
pub(crate) fn encode(message: &Message) -> Result<Vec<u8>> {
    kvxfer_proto::frame::encode(message).map_err(|e| Error::failed(ErrorCode::TooLarge, e.to_string()))
}
