//! What stands in CUDA's place in a build without it: types that no value has.

use crate::{Error, Memory, Result};
use kvxfer_proto::ErrorCode;
use std::sync::Arc;

pub(super) fn error() -> Error {
    Error::failed(ErrorCode::NotAvailable, "CUDA not available: built without the feature `cuda`")
}

#[derive(Clone, Copy, Debug)]
enum Never {}

/// A CUDA device; this build has none.
#[derive(Clone, Debug)]
pub struct Device(Never);

/// A point in a stream; this build has none.
#[derive(Clone, Debug)]
pub struct Fence(Never);

#[derive(Debug)]
pub(crate) struct Block(Never);

#[derive(Debug)]
pub(crate) struct Pin(Never);

impl Device {
    /// Always an error in this build.
    pub fn get(_ordinal: i32) -> Result<Self> {
        Err(error())
    }
    pub(crate) fn any() -> Result<Self> {
        Err(error())
    }
    /// Its number among the visible devices.
    pub fn ordinal(&self) -> i32 {
        match self.0 {}
    }
    /// Its product name.
    pub fn name(&self) -> &str {
        match self.0 {}
    }
    /// NUMA node the device hangs at.
    pub fn numa_node(&self) -> Option<u32> {
        match self.0 {}
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {}
    }
}

impl Fence {
    /// Always an error in this build.
    ///
    /// # Safety
    /// Nothing is done with the stream.
    pub unsafe fn of_stream(_ordinal: i32, _stream: usize) -> Result<Self> {
        Err(error())
    }
    /// Whether the producer's work has been done.
    pub fn is_done(&self) -> Result<bool> {
        match self.0 {}
    }
    /// Blocks until the producer's work has been done.
    pub fn wait(&self) -> Result<()> {
        match self.0 {}
    }
}

impl Block {
    pub(crate) fn allocate(_device: &Device, _len: usize) -> Result<Self> {
        Err(error())
    }
    pub(crate) fn shareable(_device: &Device, _len: usize) -> Result<Self> {
        Err(error())
    }
    pub(crate) unsafe fn foreign(_base: u64, _len: usize) -> Result<Self> {
        Err(error())
    }
    pub(crate) fn device(&self) -> &Device {
        match self.0 {}
    }
    pub(crate) fn base(&self) -> u64 {
        match self.0 {}
    }
    pub(crate) fn read(&self, _offset: u64, _out: &mut [u8]) -> Result<()> {
        match self.0 {}
    }
    pub(crate) fn read_runs(&self, _runs: &[(u64, u64)], _out: &mut [u8]) -> Result<()> {
        match self.0 {}
    }
    pub(crate) fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        match self.0 {}
    }
}

impl Pin {
    pub(crate) unsafe fn new(_device: &Device, _base: usize, _len: usize) -> Result<Self> {
        Err(error())
    }
}

pub(crate) type Then = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(crate) struct Staging;

pub(crate) struct Slot(Never);

pub(crate) struct Landing(Never);

impl Staging {
    #[expect(clippy::unused_self, reason = "as with CUDA")]
    pub(crate) fn slot(self: &Arc<Self>, _device: &Device, _len: usize) -> Result<Slot> {
        Err(error())
    }
}

impl Slot {
    #[cfg(feature = "nixl")]
    pub(crate) fn new(_device: &Device, _len: usize) -> Result<Self> {
        Err(error())
    }
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        match self.0 {}
    }
    pub(crate) fn fill(
        &self,
        _from: &Arc<Memory>,
        _ranges: &[(u64, u32)],
        _then: Option<Then>,
    ) -> Result<Landing> {
        match self.0 {}
    }
    pub(crate) fn empty(
        &self,
        _to: &Arc<Memory>,
        _ranges: &[(u64, u32)],
        _then: Option<Then>,
    ) -> Result<Landing> {
        match self.0 {}
    }
}

impl Landing {
    pub(crate) fn is_done(&mut self) -> Result<bool> {
        match self.0 {}
    }
    pub(crate) fn wait(&mut self) -> Result<()> {
        match self.0 {}
    }
}
