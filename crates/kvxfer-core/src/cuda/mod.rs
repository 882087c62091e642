//! CUDA through the driver's own interface, loaded at run time: nothing of CUDA is needed to build or to start.
//!
//! Everything runs in a device's *primary context*, the one torch and the CUDA runtime use, and no context of the calling thread
//! is ever left changed. A context is made when device memory is first registered or imported, not before: an agent that moves
//! host memory costs no device anything. A machine without a driver says so once, in the log, and works on.
//!
//! Data flows: a `Block` is the device side of a [`crate::Memory`]; `ipc` shows it to other processes of the host; an `Engine` copies
//! between device-visible addresses, behind a [`Fence`] of the producer's stream; the `cuda_ipc` transport drives it.

#[cfg(feature = "cuda")]
pub mod baseline;
#[cfg(feature = "cuda")]
mod block;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod engine;
#[cfg(feature = "cuda")]
mod ipc;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod nvrtc;
#[cfg(feature = "cuda")]
mod paged;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod vmm;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Block, Landing, Pin, Slot, Staging, Then};
#[cfg(not(feature = "cuda"))]
pub use absent::{Device, Fence};
#[cfg(feature = "cuda")]
pub(crate) use block::{Block, Pin};
#[cfg(feature = "cuda")]
pub use device::Device;
#[cfg(feature = "cuda")]
pub(crate) use driver::library;
#[cfg(feature = "cuda")]
pub(crate) use engine::{Engine, Flight, Move};
#[cfg(feature = "cuda")]
pub(crate) use ipc::{Export, HANDLE, Opened, Way, export};
#[cfg(feature = "cuda")]
pub(crate) use paged::Paged;
#[cfg(feature = "cuda")]
pub(crate) use staging::{Landing, Slot, Staging, Then};
#[cfg(feature = "cuda")]
pub use stream::Fence;

use crate::Result;

/// Whether an address is a GPU's memory of this process.
///
/// CUDA is not woken for the question: as long as nobody in this process has initialised the driver there is no device memory.
#[cfg(feature = "cuda")]
pub fn is_device_address(address: u64) -> bool {
    driver::is_awake() && block::is_device(address)
}

/// Never, in this build.
#[cfg(not(feature = "cuda"))]
pub fn is_device_address(_address: u64) -> bool {
    false
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The driver's CUDA version, e.g. `12.8`.
    pub driver: String,
    /// Names of the visible devices.
    pub devices: Vec<String>,
    /// It takes many copies in one call (CUDA 12.8).
    pub batched_copies: bool,
}

/// Loads the driver library and asks it, without making a context. [`kvxfer_proto::ErrorCode::NotAvailable`] where there is none.
#[cfg(feature = "cuda")]
pub fn probe() -> Result<Probe> {
    let driver::Driver { version, batch } = *driver::driver()?;
    let devices = (0..device::count()?).map(device::name).collect::<Result<_>>()?;
    Ok(Probe {
        driver: format!("{}.{}", version / 1000, version % 1000 / 10),
        devices,
        batched_copies: batch,
    })
}

/// Always an error in this build.
#[cfg(not(feature = "cuda"))]
pub fn probe() -> Result<Probe> {
    Err(absent::error())
}

#[cfg(test)]
mod tests {
    #[test]
    fn without_a_driver_it_is_an_ordinary_error() {
        match super::probe() {
            Ok(found) => assert!(!found.driver.is_empty(), "{found:?}"),
            Err(e) => assert_eq!(e.code(), kvxfer_proto::ErrorCode::NotAvailable, "{e}"),
        }
    }
}
