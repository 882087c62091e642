//! Libraries and devices that carry bytes when they are there: NIXL and its backends, CUDA, RDMA.

use super::{Check, Standing};
use crate::agents;
use crate::machine::line;
use kvxfer_core::transport::nixl;
use std::fs;

const AREA: &str = "libraries and kernel paths";

pub(super) fn checks() -> Vec<Check> {
    let mut out = nixl_checks();
    out.push(cuda());
    out.push(rdma());
    out
}

fn nixl_checks() -> Vec<Check> {
    let config = match agents::settings() {
        Ok(config) => config,
        Err(why) => {
            return vec![
                Check::new("settings", AREA, Standing::Missing, why.text)
                    .fix("correct or unset the KVXFER_* variable named here"),
            ];
        }
    };
    match nixl::probe(&config.nixl) {
        Err(why) => vec![Check::new("nixl-library", AREA, Standing::Missing, why.to_string()).fix(
            "pip install nixl-cu12 (or nixl-cu13); no GPU is needed, and everything else works without it",
        )],
        Ok(probe) => {
            let version = probe.version.as_deref().unwrap_or("of unknown version");
            let plugins =
                probe.plugin_dir.as_ref().map_or("its own folder".into(), |d| d.display().to_string());
            let mut out = vec![Check::new(
                "nixl-library",
                AREA,
                Standing::Ok,
                format!("NIXL {version}, {}, plug-ins in {plugins}", probe.library.display()),
            )];
            for b in probe.backends {
                let id = format!("nixl-{}", b.name.to_lowercase());
                out.push(match b.problem {
                    None => Check::new(id, AREA, Standing::Ok, format!("backend {} moves {}", b.name, b.memory.join(", "))),
                    Some(why) => Check::new(id, AREA, Standing::Missing, format!("backend {}: {why}", b.name))
                        .fix("name a backend that is there in KVXFER_NIXL_BACKENDS, or set NIXL_PLUGIN_DIR to the folder of its plug-in"),
                });
            }
            if !probe.other_plugins.is_empty() {
                out.push(Check::new(
                    "nixl-plugins",
                    AREA,
                    Standing::Info,
                    format!("also there: {}", probe.other_plugins.join(", ")),
                ));
            }
            out
        }
    }
}

fn cuda() -> Check {
    match kvxfer_core::cuda::probe() {
        Ok(cuda) => {
            let devices: Vec<String> =
                cuda.devices.iter().enumerate().map(|(i, d)| format!("{i}: {d}")).collect();
            let found = format!(
                "CUDA driver {}, {}",
                cuda.driver,
                if devices.is_empty() { "no device".into() } else { devices.join("; ") }
            );
            let standing = if devices.is_empty() { Standing::Degraded } else { Standing::Ok };
            let check = Check::new("cuda", AREA, standing, found);
            if devices.is_empty() { check.fix("check CUDA_VISIBLE_DEVICES and nvidia-smi") } else { check }
        }
        Err(why) => {
            let hardware =
                fs::metadata("/proc/driver/nvidia/version").is_ok() || fs::metadata("/dev/nvidiactl").is_ok();
            if hardware {
                Check::new("cuda", AREA, Standing::Missing, format!("an NVIDIA driver is loaded, but {why}"))
                    .fix("make libcuda.so.1 visible (containers: --gpus all with the NVIDIA container toolkit)")
            } else {
                Check::new("cuda", AREA, Standing::Info, format!("no NVIDIA GPU here: {why}"))
            }
        }
    }
}

fn rdma() -> Check {
    let mut ports = Vec::new();
    let mut active = false;
    for device in fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten() {
        for port in fs::read_dir(device.path().join("ports")).into_iter().flatten().flatten() {
            let read = |name: &str| line(&port.path().join(name).to_string_lossy()).unwrap_or_default();
            let (state, rate, layer) = (read("state"), read("rate"), read("link_layer"));
            active |= state.contains("ACTIVE");
            ports.push(format!(
                "{} port {}: {layer}, {rate}, {state}",
                device.file_name().to_string_lossy(),
                port.file_name().to_string_lossy()
            ));
        }
    }
    if ports.is_empty() {
        return Check::new("rdma", AREA, Standing::Info, "no RDMA device");
    }
    let check =
        Check::new("rdma", AREA, if active { Standing::Ok } else { Standing::Degraded }, ports.join("; "));
    if active { check } else { check.fix("no port is active: check the cable, the switch and `ibstat`") }
}
