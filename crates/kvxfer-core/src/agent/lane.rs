//! Control messages between two agents on one host: the stream of a control connection, through a ring in shared memory.
//!
//! A ring per direction, made by its consumer and handed over with the side socket's descriptors, like a mailbox. What is sent after
//! the handshake goes through it, in pieces; the connection itself stays, and its end is still the end of the stream. A consumer that is
//! awake is reached without a system call, one that sleeps is woken through an eventfd.

use super::mailbox::{Consumer, Producer, Pushed};
use crate::Result;
use kvxfer_proto::wire::MAX_NOTIFICATION;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The consumer's half.
pub(crate) struct Lane {
    pub(crate) ring: Consumer,
    /// Threads of the user that look at it.
    attended: AtomicUsize,
}

impl Lane {
    pub(crate) fn new(ring: Consumer) -> Self {
        Self { ring, attended: AtomicUsize::new(0) }
    }

    /// A thread looks at it from now on: nobody needs to be woken.
    pub(super) fn attend(&self) {
        self.attended.fetch_add(1, Ordering::SeqCst);
        self.ring.disarm();
    }

    /// The thread looks no more. True when something has come that it has not seen, for which nobody may have been woken.
    pub(super) fn leave(&self) -> bool {
        self.attended.fetch_sub(1, Ordering::SeqCst) == 1 && self.arm()
    }

    /// Asks for the progress thread to be woken, unless a thread looks at it. True when something is there already.
    pub(super) fn arm(&self) -> bool {
        if self.attended.load(Ordering::SeqCst) == 0 {
            self.ring.arm();
        }
        self.ring.has_some()
    }
}

/// The producer's half: sends a frame in pieces.
pub(super) fn push(ring: &Producer, frame: &[u8]) -> Result<Pushed> {
    let mut last = Pushed::Written;
    for piece in frame.chunks(MAX_NOTIFICATION) {
        last = ring.push(piece, true)?;
    }
    Ok(last)
}
