//! Raw primitives the benchmarks compare against: one thread's memcpy, `process_vm_writev`/`readv`, plain sockets.
//!
//! Each moves the same [`Piece`]s between the same [`Memory`] as a transport would, with nothing in between: no agent,
//! no control messages, no checking. They are the roofline, not a way to move a cache.

use crate::{Error, Memory, Piece, Result};
use kvxfer_proto::ErrorCode;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Pieces handed to the kernel in one call (its own limit is 1024).
pub const IOV_BATCH: usize = 512;

/// Copies each piece from `local` to `remote` with this thread, one `memcpy` per piece.
pub fn copy(local: &Memory, remote: &Memory, pieces: &[Piece]) -> Result<()> {
    check(local, pieces, |p| p.local_offset)?;
    check(remote, pieces, |p| p.remote_offset)?;
    if std::ptr::eq(local, remote) {
        return Err(Error::InvalidArgument {
            argument: "remote",
            problem: "is the local memory itself".into(),
        });
    }
    for p in pieces {
        // SAFETY: `check` has seen every piece within both mappings, which live as long as the borrowed values; two
        // different `Memory` values map different ranges, so source and destination do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                local.as_ptr().add(p.local_offset as usize),
                remote.as_ptr().add(p.remote_offset as usize),
                p.len as usize,
            );
        }
    }
    Ok(())
}

/// Memory of another process, by its address there.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    pid: i32,
    base: u64,
    len: u64,
}

impl ProcessMemory {
    /// `len` bytes from `base` on in process `pid`, which said so and keeps them mapped. Not this process itself.
    pub fn new(pid: u32, base: u64, len: u64) -> Result<Self> {
        let bad = |problem: String| Error::InvalidArgument { argument: "pid", problem };
        if pid == std::process::id() {
            return Err(bad(format!("{pid} is this process; use copy instead")));
        }
        let pid = i32::try_from(pid).map_err(|_| bad(format!("{pid} is no process id")))?;
        if base == 0 || base.checked_add(len).is_none() {
            return Err(Error::OutOfRange {
                what: "memory of a process".into(),
                offset: base,
                len,
                limit: u64::MAX,
            });
        }
        Ok(Self { pid, base, len })
    }

    /// `process_vm_writev`: local pieces to the other process.
    pub fn write(&self, local: &Memory, pieces: &[Piece]) -> Result<()> {
        self.transfer(local, pieces, true)
    }

    /// `process_vm_readv`: the other process's pieces here.
    pub fn read(&self, local: &Memory, pieces: &[Piece]) -> Result<()> {
        self.transfer(local, pieces, false)
    }

    fn transfer(&self, local: &Memory, pieces: &[Piece], write: bool) -> Result<()> {
        check(local, pieces, |p| p.local_offset)?;
        for (i, p) in pieces.iter().enumerate() {
            if p.remote_offset.checked_add(p.len).is_none_or(|end| end > self.len) {
                return Err(out_of_range(i, p.remote_offset, p.len, self.len));
            }
        }
        let mut here = Vec::with_capacity(IOV_BATCH);
        let mut there = Vec::with_capacity(IOV_BATCH);
        for batch in pieces.chunks(IOV_BATCH) {
            let mut done = 0_u64;
            let total: u64 = batch.iter().map(|p| p.len).sum();
            while done < total {
                here.clear();
                there.clear();
                remaining(batch, done, |p, cut| {
                    let local = local_iovec(local, p, cut);
                    let remote = (self.base + p.remote_offset + cut) as *mut libc::c_void;
                    there.push(libc::iovec { iov_base: remote, iov_len: local.iov_len });
                    here.push(local);
                });
                done += self.call(&here, &there, write)?;
            }
        }
        Ok(())
    }

    fn call(&self, here: &[libc::iovec], there: &[libc::iovec], write: bool) -> Result<u64> {
        let (n, m) = (here.len() as libc::c_ulong, there.len() as libc::c_ulong);
        // SAFETY: the local iovecs lie within one live mapping; the remote ones name addresses of another process, which
        // the kernel checks; both arrays outlive the call.
        let moved = unsafe {
            if write {
                libc::process_vm_writev(self.pid, here.as_ptr(), n, there.as_ptr(), m, 0)
            } else {
                libc::process_vm_readv(self.pid, here.as_ptr(), n, there.as_ptr(), m, 0)
            }
        };
        let call = if write { "process_vm_writev" } else { "process_vm_readv" };
        match moved {
            0 => {
                Err(Error::failed(ErrorCode::System, format!("{call} to process {} moved nothing", self.pid)))
            }
            n if n > 0 => Ok(n as u64),
            _ => Err(Error::system(
                format!("{call} to process {}", self.pid),
                io::Error::last_os_error(),
                "both processes need the same user, and Yama's ptrace_scope or the container's seccomp profile must allow it",
            )),
        }
    }
}

/// Sends the local side of every piece over a blocking socket, [`IOV_BATCH`] pieces in a call.
pub fn send(stream: &TcpStream, memory: &Memory, pieces: &[Piece]) -> Result<()> {
    stream_pieces(stream, memory, pieces, true)
}

/// Receives the local side of every piece from a blocking socket, in order, [`IOV_BATCH`] pieces in a call.
pub fn receive(stream: &TcpStream, memory: &Memory, pieces: &[Piece]) -> Result<()> {
    stream_pieces(stream, memory, pieces, false)
}

fn stream_pieces(stream: &TcpStream, memory: &Memory, pieces: &[Piece], sending: bool) -> Result<()> {
    check(memory, pieces, |p| p.local_offset)?;
    let mut iov = Vec::with_capacity(IOV_BATCH);
    for batch in pieces.chunks(IOV_BATCH) {
        let total: u64 = batch.iter().map(|p| p.len).sum();
        let mut done = 0_u64;
        while done < total {
            iov.clear();
            remaining(batch, done, |p, cut| iov.push(local_iovec(memory, p, cut)));
            let (fd, n) = (stream.as_raw_fd(), iov.len() as libc::c_int);
            // SAFETY: the iovecs lie within one live mapping (`check`); the socket is open while it is borrowed. Others may
            // change the bytes meanwhile (they are a benchmark's payload); nothing here depends on their values.
            let moved = unsafe {
                if sending { libc::writev(fd, iov.as_ptr(), n) } else { libc::readv(fd, iov.as_ptr(), n) }
            };
            match moved {
                0 => return Err(broken(&io::ErrorKind::UnexpectedEof.into())),
                n if n > 0 => done += n as u64,
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(broken(&e)),
                },
            }
        }
    }
    Ok(())
}

/// What is left of a batch after its first `done` bytes: each piece with the bytes to skip in it.
fn remaining(batch: &[Piece], mut done: u64, mut each: impl FnMut(&Piece, u64)) {
    for p in batch {
        let cut = done.min(p.len);
        done -= cut;
        if cut < p.len {
            each(p, cut);
        }
    }
}

/// The local side of a checked piece without its first `cut` bytes.
fn local_iovec(memory: &Memory, p: &Piece, cut: u64) -> libc::iovec {
    // SAFETY: callers have seen the piece within the mapping (`check`).
    let at = unsafe { memory.as_ptr().add((p.local_offset + cut) as usize) };
    libc::iovec { iov_base: at.cast(), iov_len: (p.len - cut) as usize }
}

fn check(memory: &Memory, pieces: &[Piece], offset: impl Fn(&Piece) -> u64) -> Result<()> {
    let limit = memory.len() as u64;
    for (i, p) in pieces.iter().enumerate() {
        let at = offset(p);
        if p.len == 0 || at.checked_add(p.len).is_none_or(|end| end > limit) {
            return Err(out_of_range(i, at, p.len, limit));
        }
    }
    Ok(())
}

fn out_of_range(i: usize, offset: u64, len: u64, limit: u64) -> Error {
    Error::OutOfRange { what: format!("piece {i}"), offset, len, limit }
}

fn broken(e: &io::Error) -> Error {
    let code = match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ErrorCode::TimedOut,
        _ => ErrorCode::Transport,
    };
    Error::failed(code, format!("raw socket: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(len: usize, byte: u8) -> std::sync::Arc<Memory> {
        let m = Memory::anonymous(len).expect("memory");
        m.write_at(0, &vec![byte; len]).expect("fill");
        m
    }

    #[test]
    fn copy_moves_the_named_bytes_and_nothing_else() {
        let (a, b) = (memory(8192, 1), memory(8192, 2));
        let piece = Piece { local_offset: 0, remote_offset: 100, len: 1000 };
        copy(&a, &b, &[piece]).expect("copy");
        let mut out = vec![0; 8192];
        b.read_at(0, &mut out).expect("read");
        assert!(out[100..1100].iter().all(|&x| x == 1));
        assert!(out[..100].iter().chain(&out[1100..]).all(|&x| x == 2));
        let beyond = Piece { local_offset: 8000, remote_offset: 0, len: 193 };
        assert_eq!(copy(&a, &b, &[beyond]).expect_err("beyond").code(), ErrorCode::OutOfRange);
        let wraps = Piece { local_offset: u64::MAX, remote_offset: 0, len: 2 };
        assert_eq!(copy(&a, &b, &[wraps]).expect_err("wraps").code(), ErrorCode::OutOfRange);
        assert!(copy(&a, &a, &[piece]).is_err(), "a memory is not copied onto itself");
    }

    #[test]
    fn sockets_carry_pieces_in_order_over_short_transfers() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let near = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (far, _) = listener.accept().expect("accept");
        let pieces: Vec<Piece> = (0..2000_u64)
            .rev()
            .map(|i| Piece { local_offset: i * 4096, remote_offset: 0, len: 4000 })
            .collect();
        let (from, to) = (memory(2000 * 4096, 0), memory(2000 * 4096, 0));
        for i in 0..2000_u64 {
            from.write_at(i * 4096, &[i as u8; 4000]).expect("fill");
        }
        std::thread::scope(|s| {
            s.spawn(|| send(&near, &from, &pieces).expect("send"));
            receive(&far, &to, &pieces).expect("receive");
        });
        for i in 0..2000_u64 {
            let mut got = [0; 4096];
            to.read_at(i * 4096, &mut got).expect("read");
            assert!(
                got[..4000].iter().all(|&x| x == i as u8) && got[4000..].iter().all(|&x| x == 0),
                "piece {i}"
            );
        }
        drop(near);
        assert_eq!(receive(&far, &to, &pieces[..1]).expect_err("closed").code(), ErrorCode::Transport);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(ProcessMemory::new(std::process::id(), 4096, 4096).is_err(), "not this process");
        assert!(ProcessMemory::new(1, u64::MAX, 4096).is_err(), "wraps");
        let there = ProcessMemory::new(i32::MAX as u32, 4096, 4096).expect("plausible");
        let m = memory(4096, 0);
        let e = there
            .write(&m, &[Piece { local_offset: 0, remote_offset: 0, len: 64 }])
            .expect_err("no such process");
        assert!(e.to_string().contains("process_vm_writev"), "{e}");
        let e =
            there.read(&m, &[Piece { local_offset: 0, remote_offset: 4090, len: 64 }]).expect_err("beyond");
        assert_eq!(e.code(), ErrorCode::OutOfRange);
    }
}
