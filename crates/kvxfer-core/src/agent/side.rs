//! The side socket between two agents on one host: file descriptors, each under a label.
//!
//! A `SOCK_SEQPACKET` Unix socket with an abstract name told in the handshake. The connecting side names the session it
//! belongs to and the kernel vouches for both process ids (`SO_PEERCRED`). A descriptor is always sent before the
//! control message that names its label, so whoever reads that message finds it in the socket: no thread waits for another.

use super::address::wait_for;
use super::identity::random;
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::handshake::SESSION_LEN;
use parking_lot::Mutex;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Label of the mailbox's memory.
pub(crate) const MAILBOX: u64 = 1;
/// Label of the mailbox's eventfd.
pub(crate) const MAILBOX_EVENT: u64 = 2;
/// Label of the memory of the lane, for control messages.
pub(crate) const LANE: u64 = 3;
/// Label of the lane's eventfd.
pub(crate) const LANE_EVENT: u64 = 4;
/// Labels of tickets start here.
const FIRST_TICKET: u64 = 16;
/// Descriptors that arrived and nobody has asked for; more than these are closed.
const MAX_WAITING: usize = 256;
/// Answer to a session token that is known.
const WELCOME: &[u8] = b"KVXSIDE1";

/// Where agents of this host bring their descriptors.
pub(crate) struct SideListener {
    pub(crate) fd: OwnedFd,
    /// As told in the handshake.
    pub(crate) name: String,
}

impl SideListener {
    pub(crate) fn bind() -> std::io::Result<Self> {
        let token = u128::from_le_bytes(random().map_err(|_| std::io::Error::other("no random bytes"))?);
        let name = format!("kvxfer-{token:032x}");
        let fd = socket()?;
        rustix::net::bind(&fd, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        rustix::net::listen(&fd, 64)?;
        Ok(Self { fd, name: format!("@{name}") })
    }

    pub(crate) fn accept(&self) -> std::result::Result<OwnedFd, Errno> {
        rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}

fn socket() -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The process at the far end, as the kernel saw it when it connected or listened.
fn peer_pid(fd: impl AsFd) -> std::io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(fd)?.pid.as_raw_nonzero().get().cast_unsigned())
}

/// A descriptor of the process at the far end, without a look at process ids. The text says why there is none.
fn peer_process(fd: impl AsFd) -> std::result::Result<OwnedFd, String> {
    // Linux 6.5; not in the libc crate for every target.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut found: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an integer of the stated length, on an open socket.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    if result != 0 || found < 0 {
        let e = std::io::Error::last_os_error();
        return Err(format!(
            "the peer is in another PID namespace, and this kernel gives no descriptor of its process (SO_PEERPIDFD, Linux 6.5: {e})"
        ));
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(found) })
}

/// A connected side socket.
pub(crate) struct SideChannel {
    pub(crate) fd: OwnedFd,
    arrived: Mutex<HashMap<u64, Option<OwnedFd>>>,
    next_label: AtomicU64,
}

impl SideChannel {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, arrived: Mutex::default(), next_label: AtomicU64::new(FIRST_TICKET) }
    }

    /// Connects to a peer of process `pid` (`None`: one of another PID namespace) and shows the session token. The text says why it
    /// could not be reached.
    pub(crate) fn connect(
        name: &str,
        pid: Option<u32>,
        session: &[u8; SESSION_LEN],
        deadline: Instant,
    ) -> std::result::Result<Self, String> {
        let name = name.strip_prefix('@').ok_or("the peer has no side socket")?;
        let say = |e: std::io::Error| format!("side socket @{name}: {e}");
        let fd = socket().map_err(say)?;
        let at = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(|e| say(e.into()))?;
        // A listener whose queue is full says so at once.
        while let Err(e) = rustix::net::connect(&fd, &at) {
            if e != Errno::AGAIN || Instant::now() >= deadline {
                return Err(say(e.into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match pid {
            // Its end must be known when it comes.
            None => drop(peer_process(&fd)?),
            Some(pid) => {
                let real = peer_pid(&fd).map_err(say)?;
                if real != pid {
                    return Err(format!(
                        "side socket @{name} belongs to process {real}, the peer said {pid}"
                    ));
                }
            }
        }
        rustix::net::send(&fd, session, SendFlags::NOSIGNAL).map_err(|e| say(e.into()))?;
        let mut answer = [0u8; WELCOME.len()];
        if !wait_for(&fd, PollFlags::IN, deadline).map_err(say)? {
            return Err(format!("side socket @{name}: no answer in time"));
        }
        let n = rustix::net::recv(&fd, &mut answer, RecvFlags::DONTWAIT).map_err(|e| say(e.into()))?.0;
        if &answer[..n] != WELCOME {
            return Err(format!("side socket @{name}: the peer did not take the session"));
        }
        Ok(Self::new(fd))
    }

    /// Accepts a socket whose session token was found; `pid` is what the session's peer said it was, `None` where its word means nothing
    /// here.
    pub(crate) fn accept(fd: OwnedFd, pid: Option<u32>) -> std::result::Result<Self, String> {
        match pid {
            None => drop(peer_process(&fd)?),
            Some(pid) => {
                let real = peer_pid(&fd).map_err(|e| e.to_string())?;
                if real != pid {
                    return Err(format!(
                        "a side socket of process {real} came for a peer that said it was {pid}"
                    ));
                }
            }
        }
        rustix::net::send(&fd, WELCOME, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            .map_err(|e| e.to_string())?;
        Ok(Self::new(fd))
    }

    /// The process at the far end, whatever PID namespace it is in.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        peer_process(&self.fd).ok()
    }

    /// A label nobody used before.
    pub(crate) fn label(&self) -> u64 {
        self.next_label.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a descriptor (or the word that there is none) under `label`. Waits at most a moment for space.
    pub(crate) fn send(&self, label: u64, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(100);
        let word = label.to_le_bytes();
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.fd, &[IoSlice::new(&word)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if matches!(wait_for(&self.fd, PollFlags::OUT, deadline), Ok(true)) => {}
                Err(e) => {
                    return Err(Error::system(
                        "passing a file descriptor to the peer",
                        e,
                        "raise the limit on open files (ulimit -n) on both sides",
                    ));
                }
            }
        }
    }

    /// Takes in what has arrived; false once the far end has closed. Never blocks.
    pub(crate) fn drain(&self) -> bool {
        self.drain_into(&mut self.arrived.lock())
    }

    fn drain_into(&self, arrived: &mut HashMap<u64, Option<OwnedFd>>) -> bool {
        loop {
            match receive(&self.fd) {
                Ok(Some((word, fd))) => {
                    if let Ok(word) = <[u8; 8]>::try_from(word.as_slice())
                        && arrived.len() < MAX_WAITING
                    {
                        arrived.insert(u64::from_le_bytes(word), fd);
                    }
                }
                // A far end that closed with packets unread reports that first; what it sent is still there.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => return true,
                Ok(None) | Err(_) => return false,
            }
        }
    }

    /// The descriptor sent under `label`; waits for it until `deadline`.
    pub(crate) fn take(&self, label: u64, deadline: Instant) -> Result<Option<OwnedFd>> {
        loop {
            let open = {
                let mut arrived = self.arrived.lock();
                let open = self.drain_into(&mut arrived);
                if let Some(fd) = arrived.remove(&label) {
                    return Ok(fd);
                }
                open
            };
            // Another thread may take the packet in: look again at short intervals.
            let soon = deadline.min(Instant::now() + Duration::from_millis(5));
            if !open || Instant::now() >= deadline {
                return Err(Error::failed(
                    ErrorCode::Transport,
                    format!("the peer named file descriptor {label} and did not send it"),
                ));
            }
            let _ = wait_for(&self.fd, PollFlags::IN, soon);
        }
    }
}

/// One packet with at most one descriptor; `None` at the end.
#[expect(clippy::type_complexity, reason = "a packet is a word and perhaps a descriptor")]
pub(crate) fn receive(fd: impl AsFd) -> std::result::Result<Option<(Vec<u8>, Option<OwnedFd>)>, Errno> {
    let mut word = [0u8; 32];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(fd, &mut [IoSliceMut::new(&mut word)], &mut control, flags)?;
    let mut found = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            found = fds.last();
        }
    }
    Ok((got.bytes > 0).then(|| (word[..got.bytes].to_vec(), found)))
}
