//! GPUs: what they are, whether kvxfer's kernels load, and whether two processes share their memory, tried for real.

use super::{Check, Standing};
use crate::bench::gpu;
use kvxfer_core::Result;
use kvxfer_core::cuda::{self, Device, Probe};

const AREA: &str = "GPUs";

/// Nothing where there is no driver: the line on libraries says so.
pub(super) fn checks() -> Vec<Check> {
    let Ok(probe) = cuda::probe() else { return Vec::new() };
    let mut out = vec![batched(&probe)];
    let devices: Vec<Device> = (0..probe.devices.len() as i32)
        .filter_map(|i| match Device::get(i) {
            Ok(device) => {
                out.push(examined(&device));
                Some(device)
            }
            Err(e) => {
                let check = Check::new(format!("cuda-device-{i}"), AREA, Standing::Missing, e.to_string());
                out.push(
                    check.fix("is it in exclusive mode, or used up by other processes? nvidia-smi tells"),
                );
                None
            }
        })
        .collect();
    for (i, device) in devices.iter().enumerate() {
        // The same device, and its neighbour: what an engine with several GPUs uses.
        for other in [Some(device), devices.get(i + 1)].into_iter().flatten() {
            out.push(pair(device, other));
        }
    }
    out
}

fn batched(probe: &Probe) -> Check {
    let id = "cuda-batch";
    if probe.batched_copies {
        return Check::new(
            id,
            AREA,
            Standing::Ok,
            format!("driver {}: many copies in one call", probe.driver),
        );
    }
    Check::new(
        id,
        AREA,
        Standing::Degraded,
        format!("driver {}: each copy is a call of its own", probe.driver),
    )
    .fix("a driver of CUDA 12.8 or newer (R570) copies large scattered pieces with less work")
}

fn examined(device: &Device) -> Check {
    let id = format!("cuda-device-{}", device.ordinal());
    let pci = device.pci_bus_id().unwrap_or_else(|_| "unknown".into());
    let node = device.numa_node().map_or_else(|| "not told".into(), |n| n.to_string());
    let found = format!(
        "{}, {:.0} GiB, {} multiprocessors, PCI {pci}, NUMA node {node}",
        device.name(),
        device.total_bytes() as f64 / f64::from(1 << 30),
        device.processors()
    );
    match device.try_kernels() {
        Ok(()) => Check::new(id, AREA, Standing::Ok, format!("{found}; the kernels load")),
        Err(e) => Check::new(id, AREA, Standing::Degraded, format!("{found}; {e}")).fix(
            "scattered blocks take the copy engines; kernels need compute capability 8.0 (Ampere) or newer",
        ),
    }
}

/// A child on one device, this process on the other, and bytes between them that are compared.
fn pair(near: &Device, far: &Device) -> Check {
    let (a, b) = (near.ordinal(), far.ordinal());
    let id = format!("cuda-ipc-{a}-{b}");
    let reach: Result<bool> = near.reaches(far);
    let way = match reach {
        Ok(true) if a == b => "one device",
        Ok(true) => "peer access: kernels write across",
        Ok(false) => "no peer access: the copy engines go through the host",
        Err(_) => "peer access not known",
    };
    match gpu::try_pair(a, b) {
        Ok(()) => {
            let standing = if matches!(reach, Ok(true)) { Standing::Ok } else { Standing::Degraded };
            let check = Check::new(id, AREA, standing, format!("two processes share memory ({way}); bytes compared"));
            if standing == Standing::Ok { check } else { check.fix("NVLink, or GPUs below one PCIe root (nvidia-smi topo -m)") }
        }
        Err(why) => Check::new(id, AREA, Standing::Missing, format!("two processes do not share memory ({way}): {why}"))
            .fix("containers need one PID and IPC namespace (--pid=host --ipc=host), and both devices visible to both"),
    }
}
