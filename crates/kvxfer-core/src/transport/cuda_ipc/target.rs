//! The remote side of a job: an imported region as device-visible addresses of this process.

use super::TABLE;
use crate::cuda::{Device, Engine, Opened};
use crate::{Error, Memory, Result};
use kvxfer_proto::{ErrorCode, RegionId};
use parking_lot::Mutex;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

/// An imported region.
pub(super) enum Target {
    /// Device memory of another process.
    Opened { opened: Arc<Opened>, offset: u64, len: u64 },
    /// A region of this very process; its owner may drop it at any time.
    Here { owner: u64, region: RegionId, device: Option<Device> },
    /// A host pool of another process, mapped and pinned when a device first wants it.
    Pool(Arc<Pool>),
}

/// A host pool of another process.
pub(super) struct Pool {
    len: usize,
    fd: Mutex<Option<OwnedFd>>,
    memory: OnceLock<Result<Arc<Memory>>>,
}

/// A region held for one job.
#[derive(Clone)]
pub(super) enum Held {
    Opened { opened: Arc<Opened>, offset: u64 },
    Memory(Arc<Memory>),
}

impl Target {
    /// The device it lies on; `None` for host memory.
    pub(super) fn device(&self) -> Option<&Device> {
        match self {
            Self::Opened { opened, .. } => Some(opened.device()),
            Self::Here { device, .. } => device.as_ref(),
            Self::Pool(_) => None,
        }
    }

    /// What copies on that device.
    pub(super) fn engine(&self) -> Result<Arc<Engine>> {
        let no_device = || {
            Error::failed(
                ErrorCode::Unsupported,
                "cuda_ipc carries transfers with a GPU on one side at least",
            )
        };
        match self {
            Self::Opened { opened, .. } => opened.engine(),
            Self::Here { owner, region, .. } => {
                here(*owner, *region)?.block().ok_or_else(no_device)?.engine()
            }
            Self::Pool(_) => Err(no_device()),
        }
    }
}

/// The region of an agent of this process.
pub(super) fn here(owner: u64, region: RegionId) -> Result<Arc<Memory>> {
    TABLE.lock().regions.get(&(owner, region)).and_then(std::sync::Weak::upgrade).ok_or_else(|| {
        Error::failed(
            ErrorCode::NotFound,
            format!("region {region} is not registered at the peer any more; look it up again"),
        )
    })
}

impl Held {
    pub(super) fn base(&self) -> u64 {
        match self {
            Self::Opened { opened, offset } => opened.base() + offset,
            Self::Memory(memory) => memory.as_ptr() as u64,
        }
    }
}

impl Pool {
    pub(super) fn new(fd: OwnedFd, len: usize) -> Self {
        Self { len, fd: Mutex::new(Some(fd)), memory: OnceLock::new() }
    }

    /// Maps and pins it, once. Takes a while: not on a thread that others wait for.
    pub(super) fn open(&self) -> Result<Arc<Memory>> {
        self.memory
            .get_or_init(|| {
                let fd = self.fd.lock().take().ok_or_else(|| {
                    Error::failed(ErrorCode::Closed, "the pool's descriptor was used up by a failed attempt")
                })?;
                let memory = Memory::from_fd(fd, self.len)?;
                memory.pin()?;
                Ok(memory)
            })
            .clone()
    }

    /// Mapped and pinned, if that has been done.
    pub(super) fn ready(&self) -> Option<Arc<Memory>> {
        self.memory.get().and_then(|m| m.as_ref().ok()).cloned()
    }
}
