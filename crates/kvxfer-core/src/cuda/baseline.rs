//! What transfers of device memory are measured against: the driver's own copies, waited for one by one.

use super::device::Device;
use super::driver::check;
use super::stream::Stream;
use crate::transport::Piece;
use crate::{Error, Memory, Result};
use cudarc::driver::sys;
use std::time::{Duration, Instant};

/// Copies on a stream of its own.
pub struct Copier {
    device: Device,
    stream: Stream,
}

impl Copier {
    /// On a device.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), stream: Stream::new(device)? })
    }

    /// One `cuMemcpyAsync` of the first `len` bytes, and the wait for it.
    pub fn copy(&self, from: &Memory, to: &Memory, len: u64) -> Result<Duration> {
        self.copy_each(from, to, &[Piece { local_offset: 0, remote_offset: 0, len }])
    }

    /// One `cuMemcpyAsync` per piece (from local to remote offset), and the wait for all. Host memory must be pinned.
    pub fn copy_each(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<Duration> {
        for side in [from, to] {
            if !side.is_device() && !side.is_pinned() {
                return Err(Error::InvalidArgument {
                    argument: "memory",
                    problem: "host memory that is not pinned".into(),
                });
            }
        }
        let ends = pieces
            .iter()
            .map(|p| {
                Ok((
                    from.range(p.local_offset, p.len)? as u64,
                    to.range(p.remote_offset, p.len)? as u64,
                    p.len as usize,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        let here = self.device.enter()?;
        let start = Instant::now();
        for (src, dst, len) in ends {
            // SAFETY: both ranges were checked against memories that live across the call, whose end is awaited below.
            check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(dst, src, len, self.stream.raw()) })?;
        }
        drop(here);
        self.stream.synchronize()?;
        Ok(start.elapsed())
    }
}
