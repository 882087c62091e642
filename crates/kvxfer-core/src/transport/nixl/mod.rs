//! NIXL's plug-ins (UCX by default) as a transport: `NVLink`, RDMA, sockets, whatever they carry.
//!
//! [`find`] loads `libnixl_capi.so` at run time; nothing of NIXL is needed to start. Without the feature `nixl` the
//! same names exist and answer that this build is without it.

mod report;

#[cfg(feature = "nixl")]
mod agent;
#[cfg(feature = "nixl")]
mod bare;
#[cfg(feature = "nixl")]
mod engine;
#[cfg(feature = "nixl")]
pub mod find;
#[cfg(feature = "nixl")]
mod job;
#[cfg(feature = "nixl")]
mod keeper;
#[cfg(feature = "nixl")]
mod link;
#[cfg(feature = "nixl")]
mod plan;
#[cfg(feature = "nixl")]
mod probe;
#[cfg(feature = "nixl")]
mod regions;
#[cfg(feature = "nixl")]
mod staged;
#[cfg(feature = "nixl")]
mod symbols;
#[cfg(feature = "nixl")]
mod transport;
#[cfg(feature = "nixl")]
mod wire;

#[cfg(not(feature = "nixl"))]
mod absent;

#[cfg(not(feature = "nixl"))]
pub use absent::{Bare, probe, start};
#[cfg(feature = "nixl")]
pub use bare::Bare;
#[cfg(feature = "nixl")]
pub use probe::probe;
pub use report::{BackendProbe, Probe};
#[cfg(feature = "nixl")]
pub use transport::{NixlTransport, start};

/// Where a peer's memory begins, as its owner tells it to whoever uses a [`Bare`].
#[derive(Clone, Copy, Debug)]
pub struct RemotePlace {
    /// In the peer's process.
    pub address: u64,
    /// Number of the CUDA device it lies on, as the peer counts; none for host memory.
    pub device: Option<i32>,
}
