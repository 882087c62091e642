//! Devices and the context everything of kvxfer runs in: a device's primary one, which torch and the CUDA runtime use too.

use super::driver::{self, check, check_drop};
use crate::{Error, Result};
use cudarc::driver::sys;
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock, Weak};

/// A CUDA device with its primary context, retained while a clone of this lives.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    ordinal: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    uuid: [u8; 16],
    processors: u32,
    total: u64,
    /// Devices whose memory kernels running here may touch, by ordinal.
    reaches: Mutex<HashSet<i32>>,
}

// SAFETY: contexts and devices are handles that the driver lets any thread use; it locks by itself.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// The calling thread works in a device's context until this is dropped. Never across a call into foreign code.
pub(crate) struct Entered<'a> {
    device: &'a Device,
}

static DEVICES: LazyLock<Mutex<HashMap<i32, Weak<Inner>>>> = LazyLock::new(Mutex::default);

impl Device {
    /// Device `ordinal` of those that `CUDA_VISIBLE_DEVICES` leaves visible.
    pub fn get(ordinal: i32) -> Result<Self> {
        driver::driver()?;
        let mut known = DEVICES.lock();
        if let Some(inner) = known.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(Self(inner));
        }
        let count = count()?;
        if ordinal < 0 || ordinal >= count {
            return Err(Error::failed(
                ErrorCode::NotAvailable,
                format!(
                    "CUDA device {ordinal} is not visible; there are {count} (check CUDA_VISIBLE_DEVICES)"
                ),
            ));
        }
        let inner = Arc::new(open(ordinal)?);
        known.insert(ordinal, Arc::downgrade(&inner));
        Ok(Self(inner))
    }

    /// One that is in use already, so that no context is made for its sake; else the first.
    pub(crate) fn any() -> Result<Self> {
        let known = DEVICES.lock().values().find_map(Weak::upgrade);
        known.map_or_else(|| Self::get(0), |inner| Ok(Self(inner)))
    }

    /// The visible device of that UUID.
    pub(crate) fn with_uuid(uuid: &[u8; 16]) -> Result<Self> {
        driver::driver()?;
        for ordinal in 0..count()? {
            if uuid_of(handle(ordinal)?)? == *uuid {
                return Self::get(ordinal);
            }
        }
        Err(Error::failed(
            ErrorCode::NotAvailable,
            format!(
                "the peer's device {} is not visible here; both processes must see both devices (CUDA_VISIBLE_DEVICES)",
                uuid_text(uuid)
            ),
        ))
    }

    /// Its number among the visible devices.
    pub fn ordinal(&self) -> i32 {
        self.0.ordinal
    }
    /// Its product name.
    pub fn name(&self) -> &str {
        &self.0.name
    }
    /// Its UUID, the same in every process of the host.
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid
    }
    /// Multiprocessors; what a persistent grid is sized by.
    pub fn processors(&self) -> u32 {
        self.0.processors
    }
    /// Bytes of its memory.
    pub fn total_bytes(&self) -> u64 {
        self.0.total
    }
    /// Whether `self` and `other` are the same device.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.device == other.0.device
    }
    pub(crate) fn raw(&self) -> sys::CUdevice {
        self.0.device
    }
    pub(crate) fn context(&self) -> sys::CUcontext {
        self.0.context
    }

    /// Makes its context the calling thread's until the guard is dropped.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained by `self`.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.0.context) })?;
        Ok(Entered { device: self })
    }

    /// Whether kernels of this device touch the memory of `other`, which is allowed here if it can be; false where the machine has no such
    /// path (copies then go through the copy engines, which always have one).
    pub fn reaches(&self, other: &Self) -> Result<bool> {
        if self.is(other) {
            return Ok(true);
        }
        let mut reaches = self.0.reaches.lock();
        if reaches.contains(&other.0.ordinal) {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: both handles are devices of this driver; the pointer is to a live integer.
        check("cuDeviceCanAccessPeer", unsafe {
            sys::cuDeviceCanAccessPeer(&raw mut can, self.0.device, other.0.device)
        })?;
        if can == 0 {
            return Ok(false);
        }
        let _here = self.enter()?;
        // SAFETY: both contexts are retained; flags must be zero.
        match unsafe { sys::cuCtxEnablePeerAccess(other.0.context, 0) } {
            // Somebody else in this process (torch, NCCL) was first.
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
                reaches.insert(other.0.ordinal);
                Ok(true)
            }
            other => Err(driver::error("cuCtxEnablePeerAccess", other)),
        }
    }

    /// Loads kvxfer's kernels on this device; the error is the driver's.
    pub fn try_kernels(&self) -> Result<()> {
        super::kernels::Kernels::load(self).map(drop)
    }

    /// Least and greatest stream priority; the greater the number, the lower the priority.
    pub(crate) fn priorities(&self) -> Result<(i32, i32)> {
        let _here = self.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: two pointers to live integers.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)
        })?;
        Ok((least, greatest))
    }

    /// Compute capability, major and minor.
    pub(crate) fn capability(&self) -> Result<(i32, i32)> {
        use sys::CUdevice_attribute as A;
        let mut found = [0; 2];
        let wanted = [
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        ];
        for (out, attribute) in found.iter_mut().zip(wanted) {
            // SAFETY: the pointer is to a live integer.
            check("cuDeviceGetAttribute", unsafe {
                sys::cuDeviceGetAttribute(out, attribute, self.0.device)
            })?;
        }
        Ok((found[0], found[1]))
    }

    /// Bus address of the device as sysfs names it (`0000:4f:00.0`); it tells the NUMA node.
    pub fn pci_bus_id(&self) -> Result<String> {
        let mut text = [0u8; 32];
        // SAFETY: the buffer has the length that is stated.
        check("cuDeviceGetPCIBusId", unsafe {
            sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as i32, self.0.device)
        })?;
        Ok(c_text(&text).to_ascii_lowercase())
    }

    /// NUMA node the device hangs at; `None` where the system does not say.
    pub fn numa_node(&self) -> Option<u32> {
        let id = self.pci_bus_id().ok()?;
        let node = std::fs::read_to_string(format!("/sys/bus/pci/devices/{id}/numa_node")).ok()?;
        // -1 where there is one node only.
        u32::try_from(node.trim().parse::<i32>().ok()?).ok()
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.0.ordinal, self.0.name)
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{}", self.0.ordinal)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `open` retained it; nothing made in it through this value lives any more, since all that keeps a `Device`.
        check_drop("cuDevicePrimaryCtxRelease", unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) });
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this thread.
        let result = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        check_drop("cuCtxPopCurrent", result);
        debug_assert!(result != sys::CUresult::CUDA_SUCCESS || popped == self.device.0.context);
    }
}

/// Number of visible devices.
pub(crate) fn count() -> Result<i32> {
    driver::driver()?;
    let mut count = 0;
    // SAFETY: the driver is initialised; the pointer is to a live integer.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(count)
}

fn handle(ordinal: i32) -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: as above.
    check(format_args!("cuDeviceGet({ordinal})"), unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
    Ok(device)
}

/// The device's name, without making a context.
pub(crate) fn name(ordinal: i32) -> Result<String> {
    let device = handle(ordinal)?;
    let mut text = [0u8; 256];
    // SAFETY: the buffer has the length that is stated.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(text.as_mut_ptr().cast(), text.len() as i32, device)
    })?;
    Ok(c_text(&text))
}

fn uuid_of(device: sys::CUdevice) -> Result<[u8; 16]> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the pointer is to a live structure of that type.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    Ok(uuid.bytes.map(|b| b as u8))
}

/// As `nvidia-smi -L` writes it.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(*uuid));
    format!(
        "GPU-{}-{}-{}-{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..]
    )
}

fn open(ordinal: i32) -> Result<Inner> {
    let device = handle(ordinal)?;
    let mut processors = 0;
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    // SAFETY: the pointer is to a live integer.
    check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&raw mut processors, attribute, device)
    })?;
    let mut total = 0;
    // SAFETY: as above.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut total, device) })?;
    let (name, uuid) = (name(ordinal)?, uuid_of(device)?);
    let mut context = std::ptr::null_mut();
    // Last, so that nothing after it can fail and leave it retained.
    // SAFETY: the pointer is to a live handle.
    check(format_args!("cuDevicePrimaryCtxRetain of device {ordinal}"), unsafe {
        sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
    })?;
    Ok(Inner {
        ordinal,
        device,
        context,
        name,
        uuid,
        processors: u32::try_from(processors).unwrap_or(1).max(1),
        total: total as u64,
        reaches: Mutex::default(),
    })
}

fn c_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}
