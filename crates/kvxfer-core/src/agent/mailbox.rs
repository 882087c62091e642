//! Notifications between two agents on one host: a ring in shared memory, one per direction.
//!
//! The consumer allocates the ring (a sealed memfd) and an eventfd and passes both to the producer. A notification is
//! a copy and a store; the eventfd is written only when the consumer has *armed* the ring before going to sleep, so a
//! consumer that polls costs nobody a system call, and no third thread stands between the two.
//!
//! ```text
//! offset 0    head   u64   consumer's position, written by the consumer
//! offset 128  tail   u64   producer's position, written by the producer
//! offset 256  armed  u32   1: the consumer sleeps, wake it
//! offset 4096 data         CAPACITY bytes; records of u64 length and payload, padded to 8
//! ```
//!
//! Neither side trusts the other: each keeps its own position privately, checks what it reads from the other's, and
//! copies a payload out before anybody looks at it.

use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::wire::MAX_NOTIFICATION;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of records; a power of two.
const CAPACITY: u64 = 256 << 10;
const HEADER: usize = 4096;
const TOTAL: usize = HEADER + CAPACITY as usize;
/// Most bytes that wait in the process for space in the ring.
const MAX_SPILLED: usize = 4 << 20;

/// The mapping both halves are built on.
struct Map(*mut u8);

// SAFETY: the mapping belongs to the value; all access goes through atomics or range-checked copies below.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(fd: impl AsFd) -> std::io::Result<Self> {
        let flags = MapFlags::SHARED;
        // SAFETY: a fresh mapping at an address of the kernel's choice; `fd` is `TOTAL` bytes long and sealed against
        // shrinking (checked by both callers), so every byte of it stays accessible.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), TOTAL, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0)?
        };
        Ok(Self(at.cast()))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset + 8 <= HEADER && offset.is_multiple_of(8));
        // SAFETY: within the header of the live mapping, aligned; shared words are only ever accessed atomically.
        unsafe { &*self.0.add(offset).cast() }
    }
    fn head(&self) -> &AtomicU64 {
        self.word(0)
    }
    fn tail(&self) -> &AtomicU64 {
        self.word(128)
    }
    fn armed(&self) -> &AtomicU32 {
        // SAFETY: as in `word`; this half of the word at 256 is accessed as a u32 only.
        unsafe { &*self.0.add(256).cast() }
    }

    /// Copies out of the data area from position `at`, around its end.
    fn copy_out(&self, at: u64, into: &mut [u8]) {
        let (offset, first) = Self::split(at, into.len());
        // SAFETY: `split` keeps both runs inside the data area; `into` is private memory. The peer may write at the
        // same time, which can only change the bytes that arrive in `into`.
        unsafe {
            let data = self.0.add(HEADER);
            std::ptr::copy_nonoverlapping(data.add(offset), into.as_mut_ptr(), first);
            std::ptr::copy_nonoverlapping(data, into.as_mut_ptr().add(first), into.len() - first);
        }
    }

    /// Copies into the data area from position `at` on, around its end.
    fn copy_in(&self, at: u64, bytes: &[u8]) {
        let (offset, first) = Self::split(at, bytes.len());
        // SAFETY: as in `copy_out`, the other way.
        unsafe {
            let data = self.0.add(HEADER);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), data.add(offset), first);
            std::ptr::copy_nonoverlapping(bytes.as_ptr().add(first), data, bytes.len() - first);
        }
    }

    fn split(at: u64, len: usize) -> (usize, usize) {
        assert!(len <= CAPACITY as usize);
        let offset = (at % CAPACITY) as usize;
        (offset, len.min(CAPACITY as usize - offset))
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), TOTAL) };
    }
}

/// Space a payload takes.
const fn record(len: usize) -> u64 {
    8 + (len as u64).next_multiple_of(8)
}

/// The receiving half, made by the consumer.
pub(crate) struct Consumer {
    map: Map,
    /// Written by the producer to wake us.
    pub(crate) event: OwnedFd,
    head: Mutex<u64>,
    /// The same, for a look without the lock.
    seen: AtomicU64,
    broken: AtomicBool,
}

/// What the producer needs.
pub(crate) struct Invitation {
    pub(crate) memory: OwnedFd,
    pub(crate) event: OwnedFd,
}

impl Consumer {
    /// Makes a ring and what its producer needs.
    pub(crate) fn new() -> std::io::Result<(Self, Invitation)> {
        let memory =
            rustix::fs::memfd_create("kvxfer-mailbox", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memory, TOTAL as u64)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let map = Map::new(&memory)?;
        let theirs = event.try_clone()?;
        let ours =
            Self { map, event, head: Mutex::new(0), seen: AtomicU64::new(0), broken: AtomicBool::new(false) };
        Ok((ours, Invitation { memory, event: theirs }))
    }

    /// True when something may be there.
    pub(crate) fn has_some(&self) -> bool {
        self.map.tail().load(Ordering::Acquire) != self.seen.load(Ordering::Relaxed)
            && !self.broken.load(Ordering::Relaxed)
    }

    /// Takes the next one. An error means that the producer does not keep the rules; nothing is taken from it any more.
    pub(crate) fn pop(&self) -> Result<Option<Vec<u8>>> {
        if !self.has_some() {
            return Ok(None);
        }
        let mut head = self.head.lock();
        let available = self.map.tail().load(Ordering::Acquire).wrapping_sub(*head);
        if available == 0 {
            return Ok(None);
        }
        let mut word = [0u8; 8];
        if (8..=CAPACITY).contains(&available) {
            self.map.copy_out(*head, &mut word);
        }
        let len = u64::from_le_bytes(word);
        if available > CAPACITY
            || !available.is_multiple_of(8)
            || len > MAX_NOTIFICATION as u64
            || record(len as usize) > available
        {
            self.broken.store(true, Ordering::Relaxed);
            return Err(Error::failed(
                ErrorCode::Protocol,
                format!("the peer's mailbox holds {available} bytes and a notification of {len}"),
            ));
        }
        let mut payload = vec![0; len as usize];
        self.map.copy_out(head.wrapping_add(8), &mut payload);
        *head = head.wrapping_add(record(payload.len()));
        self.seen.store(*head, Ordering::Relaxed);
        self.map.head().store(*head, Ordering::Release);
        Ok(Some(payload))
    }

    /// Asks to be woken by the next notification. Look once more after this, then sleep.
    pub(crate) fn arm(&self) {
        self.map.armed().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whoever asked to be woken looks by itself.
    pub(crate) fn disarm(&self) {
        self.map.armed().store(0, Ordering::SeqCst);
    }

    /// Makes the eventfd unreadable. Never blocks, whatever the producer does to the shared descriptor.
    pub(crate) fn drain_event(&self) {
        drain_eventfd(&self.event);
    }
}

/// Reads an eventfd that somebody else may have made blocking.
pub(crate) fn drain_eventfd(event: impl AsFd) {
    let mut count = [0u8; 8];
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    let _ = rustix::io::preadv2(event, &mut [IoSliceMut::new(&mut count)], u64::MAX, flags);
}

/// What became of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It is in the ring.
    Written,
    /// It waits for space; call [`Producer::flush`] now and then.
    Waiting,
}

/// The sending half, made from an invitation.
pub(crate) struct Producer {
    map: Map,
    event: OwnedFd,
    state: Mutex<ProducerState>,
}

#[derive(Default)]
struct ProducerState {
    tail: u64,
    waiting: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Producer {
    /// Checks what the peer has sent and maps it.
    pub(crate) fn new(invitation: Invitation) -> Result<Self> {
        let refuse = |text: String| Error::failed(ErrorCode::Protocol, text);
        let size = rustix::fs::fstat(&invitation.memory).map_or(0, |s| s.st_size);
        let seals = rustix::fs::fcntl_get_seals(&invitation.memory).unwrap_or(SealFlags::empty());
        if size != TOTAL as i64 || !seals.contains(SealFlags::SHRINK) {
            return Err(refuse(format!("the peer's mailbox has {size} bytes and seals {seals:?}")));
        }
        let map = Map::new(&invitation.memory).map_err(|e| {
            Error::system("mapping the peer's mailbox", e, "check the limit on memory mappings")
        })?;
        Ok(Self { map, event: invitation.event, state: Mutex::default() })
    }

    /// Sends a notification after all earlier ones. `accounted`: its space was granted before, it is never refused.
    pub(crate) fn push(&self, payload: &[u8], accounted: bool) -> Result<Pushed> {
        let mut s = self.state.lock();
        if s.waiting.is_empty() && self.write(&mut s, payload) {
            return Ok(Pushed::Written);
        }
        if !accounted && s.bytes + payload.len() > MAX_SPILLED {
            return Err(full(s.bytes));
        }
        s.bytes += payload.len().max(64);
        s.waiting.push_back(payload.into());
        Ok(Pushed::Waiting)
    }

    /// True when senders should hold back.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting() >= MAX_SPILLED
    }

    /// Bytes that wait for space in the ring.
    pub(crate) fn waiting(&self) -> usize {
        self.state.lock().bytes
    }

    /// Moves what waits into the ring; true when nothing waits any more.
    pub(crate) fn flush(&self) -> bool {
        let mut s = self.state.lock();
        while let Some(payload) = s.waiting.pop_front() {
            if !self.write(&mut s, &payload) {
                s.waiting.push_front(payload);
                return false;
            }
            s.bytes -= payload.len().max(64);
        }
        true
    }

    fn write(&self, s: &mut ProducerState, payload: &[u8]) -> bool {
        let used = s.tail.wrapping_sub(self.map.head().load(Ordering::Acquire));
        let need = record(payload.len());
        // A head beyond our tail (a consumer that does not keep the rules) reads as a ring that is full.
        if used > CAPACITY || CAPACITY - used < need {
            return false;
        }
        self.map.copy_in(s.tail, &(payload.len() as u64).to_le_bytes());
        self.map.copy_in(s.tail.wrapping_add(8), payload);
        s.tail = s.tail.wrapping_add(need);
        self.map.tail().store(s.tail, Ordering::Release);
        // Either the consumer sees the new tail after arming, or we see that it has armed.
        fence(Ordering::SeqCst);
        if self.map.armed().load(Ordering::Relaxed) != 0 && self.map.armed().swap(0, Ordering::SeqCst) != 0 {
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
        true
    }
}

fn full(bytes: usize) -> Error {
    Error::failed(
        ErrorCode::NoCapacity,
        format!("{bytes} bytes of notifications wait for the peer already; it does not fetch them"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Consumer, Producer) {
        let (c, invitation) = Consumer::new().unwrap();
        (c, Producer::new(invitation).unwrap())
    }

    fn readable(c: &Consumer) -> bool {
        super::super::address::wait_for(&c.event, rustix::event::PollFlags::IN, std::time::Instant::now())
            .unwrap()
    }

    #[test]
    fn payloads_of_every_length_arrive_in_order_around_the_end() {
        let (c, p) = pair();
        for i in 0..2000usize {
            let payload = vec![i as u8; i * 37 % (MAX_NOTIFICATION + 1)];
            assert_eq!(p.push(&payload, false).unwrap(), Pushed::Written);
            assert_eq!(c.pop().unwrap(), Some(payload));
        }
        assert_eq!(c.pop().unwrap(), None);
    }

    #[test]
    fn a_full_ring_spills_keeps_the_order_and_refuses_in_the_end() {
        let (c, p) = pair();
        let mut sent = 0u64;
        while p.push(&[sent.to_le_bytes(); 64].concat(), false).is_ok() {
            sent += 1;
        }
        assert!(p.is_full() && !p.flush());
        assert_eq!(p.push(&[0; 512], false).unwrap_err().code(), ErrorCode::NoCapacity);
        for i in 0..sent {
            p.flush();
            let got = c.pop().unwrap().unwrap();
            assert_eq!(got[..8], i.to_le_bytes());
        }
        assert!(p.flush() && c.pop().unwrap().is_none());
    }

    #[test]
    fn only_an_armed_consumer_is_woken() {
        let (c, p) = pair();
        p.push(b"a", false).unwrap();
        assert!(!readable(&c));
        c.arm();
        p.push(b"b", false).unwrap();
        assert!(readable(&c));
        c.drain_event();
        p.push(b"c", false).unwrap();
        assert!(!readable(&c), "woken once per arming");
    }

    #[test]
    fn a_hostile_producer_is_found_out() {
        for (tail, len) in [(8u64, u64::MAX), (8, 8), (CAPACITY + 8, 0), (12, 0), (u64::MAX, 0), (4112, 4104)]
        {
            let (c, p) = pair();
            p.map.copy_in(0, &len.to_le_bytes());
            p.map.tail().store(tail, Ordering::Release);
            assert_eq!(c.pop().unwrap_err().code(), ErrorCode::Protocol, "tail {tail} len {len}");
            assert_eq!(c.pop().unwrap(), None, "nothing more is taken");
        }
    }

    #[test]
    fn a_hostile_consumer_only_stops_its_own_notifications() {
        let (c, p) = pair();
        c.map.head().store(99, Ordering::Release);
        assert_eq!(p.push(b"x", false).unwrap(), Pushed::Waiting);
    }

    #[test]
    fn an_unsealed_or_short_mailbox_is_refused() {
        for size in [TOTAL as u64, 4096] {
            let memory =
                rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            rustix::fs::ftruncate(&memory, size).unwrap();
            let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            assert!(Producer::new(Invitation { memory, event }).is_err());
        }
    }

    #[test]
    fn two_threads_lose_nothing_while_one_sleeps() {
        let (c, p) = pair();
        let count = 20_000u32;
        let writer = std::thread::spawn(move || {
            for i in 0..count {
                p.push(&i.to_le_bytes(), true).unwrap();
            }
            while !p.flush() {
                std::thread::yield_now();
            }
            p
        });
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
        for i in 0..count {
            let got = loop {
                if let Some(got) = c.pop().unwrap() {
                    break got;
                }
                c.arm();
                if !c.has_some() {
                    let woken =
                        super::super::address::wait_for(&c.event, rustix::event::PollFlags::IN, limit)
                            .unwrap();
                    assert!(woken, "a wake-up was lost at {i}");
                    c.drain_event();
                }
            };
            assert_eq!(got, i.to_le_bytes());
        }
        writer.join().unwrap();
    }
}
