//! A peer's process on this host: recognised, watched, known to be gone.
//!
//! A process id alone may be reused; together with the process's start time it names one process. The descriptor
//! ([`PeerProcess::exited`]) then follows exactly that one.

use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;

/// What a process says of itself in an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Card {
    pub(super) pid: u32,
    /// In clock ticks since boot; zero when `/proc` did not tell.
    pub(super) started: u64,
}

/// A watched process.
#[derive(Debug)]
pub(super) struct PeerProcess {
    pub(super) pid: u32,
    fd: OwnedFd,
}

impl Card {
    pub(super) const LEN: usize = 12;

    /// This process.
    pub(super) fn own() -> Self {
        let pid = std::process::id();
        Self { pid, started: started(pid).unwrap_or(0) }
    }
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pid.to_le_bytes());
        out.extend_from_slice(&self.started.to_le_bytes());
    }
    pub(super) fn decode(bytes: [u8; Self::LEN]) -> Self {
        let [p0, p1, p2, p3, started @ ..] = bytes;
        Self { pid: u32::from_le_bytes([p0, p1, p2, p3]), started: u64::from_le_bytes(started) }
    }
}

impl PeerProcess {
    /// Opens the process described by `card`, which the control connection says has id `pid`.
    pub(super) fn open(card: Card, pid: u32) -> Result<Self> {
        let unreachable = |text: String| Error::failed(ErrorCode::Unreachable, text);
        if card.pid != pid {
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!("the offer names process {}, the connection process {pid}", card.pid),
            ));
        }
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| Error::failed(ErrorCode::Protocol, format!("{pid} is no process id")))?;
        let fd = pidfd_open(raw, PidfdFlags::empty()).map_err(|e| match e {
            rustix::io::Errno::SRCH => unreachable(format!(
                "process {pid} does not exist here; is the peer in another PID namespace?"
            )),
            e => Error::system(
                format!("pidfd_open of process {pid}"),
                e,
                "needs Linux 5.3, a free file descriptor (ulimit -n) and a seccomp policy that allows it",
            ),
        })?;
        // Looked up after the descriptor was opened: had the id been reused before, the start time would differ.
        match started(pid) {
            Some(started) if card.started != 0 && started != card.started => Err(unreachable(format!(
                "process {pid} started at tick {started}, the peer at {}: its id was reused",
                card.started
            ))),
            _ => Ok(Self { pid, fd }),
        }
    }

    /// True once every thread of the process has ended; its memory is gone then. An error counts as not known to be gone.
    pub(super) fn exited(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
    }
}

/// Start time of a process in clock ticks since boot, from `/proc`.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold spaces and parentheses; the fields after the last one do not. The start
    // time is field 22, the state behind the parenthesis field 3.
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn tells_a_living_process_from_a_dead_one_and_from_a_stranger() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        let card = Card { pid, started: started(pid).unwrap() };
        let mut bytes = Vec::new();
        card.encode(&mut bytes);
        assert_eq!(Card::decode(bytes.try_into().unwrap()), card);
        let process = PeerProcess::open(card, pid).unwrap();
        assert!(!process.exited());
        let reused = Card { started: card.started + 1, ..card };
        assert_eq!(PeerProcess::open(reused, pid).unwrap_err().code(), ErrorCode::Unreachable);
        assert_eq!(PeerProcess::open(card, pid + 1).unwrap_err().code(), ErrorCode::Protocol);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.exited());
        assert_eq!(PeerProcess::open(card, pid).unwrap_err().code(), ErrorCode::Unreachable);
        for pid in [0, u32::MAX] {
            assert_eq!(
                PeerProcess::open(Card { pid, started: 0 }, pid).unwrap_err().code(),
                ErrorCode::Protocol
            );
        }
    }
}
