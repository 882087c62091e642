//! Finds out whether there is a CUDA driver and which devices it has, without needing any of it to build or to start.

use crate::{Error, Result};
use kvxfer_proto::ErrorCode;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The driver's CUDA version, e.g. `12.8`.
    pub driver: String,
    /// Names of the visible devices.
    pub devices: Vec<String>,
}

/// Loads the driver library and asks it. [`ErrorCode::NotAvailable`] where there is none.
#[cfg(feature = "cuda")]
pub fn probe() -> Result<Probe> {
    use cudarc::driver::{result, sys};
    let failed = |call: &str, e: result::DriverError| {
        Error::failed(ErrorCode::NotAvailable, format!("CUDA not available: {call}: {e:?}"))
    };
    // SAFETY: opens the driver library, whose initialisers are NVIDIA's; nothing of it is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::failed(
            ErrorCode::NotAvailable,
            "CUDA not available: libcuda.so.1 cannot be loaded; it comes with the NVIDIA driver",
        ));
    }
    result::init().map_err(|e| failed("cuInit", e))?;
    let mut version = 0;
    // SAFETY: the driver is initialised and the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|e| failed("cuDriverGetVersion", e))?;
    let count = result::device::get_count().map_err(|e| failed("cuDeviceGetCount", e))?;
    let devices = (0..count)
        .map(|i| result::device::get(i).and_then(result::device::get_name))
        .collect::<Result<_, _>>()
        .map_err(|e| failed("cuDeviceGetName", e))?;
    Ok(Probe { driver: format!("{}.{}", version / 1000, version % 1000 / 10), devices })
}

/// Always an error in this build.
#[cfg(not(feature = "cuda"))]
pub fn probe() -> Result<Probe> {
    Err(Error::failed(ErrorCode::NotAvailable, "CUDA not available: built without the feature `cuda`"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn without_a_driver_it_is_an_ordinary_error() {
        match super::probe() {
            Ok(found) => assert!(!found.driver.is_empty(), "{found:?}"),
            Err(e) => assert_eq!(e.code(), super::ErrorCode::NotAvailable, "{e}"),
        }
    }
}
