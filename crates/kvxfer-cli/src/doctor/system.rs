//! What the operating system allows and holds ready.

use super::{Check, Standing};
use crate::machine::{Machine, line, meminfo};
use crate::units::size;
use rustix::process::{Resource, getrlimit};
use std::net::TcpListener;

const HOST: &str = "host";
const LIMITS: &str = "limits";

pub(super) fn checks(machine: &Machine, ports: &[u16]) -> Vec<Check> {
    let mut out = vec![kernel(machine), processor(machine), memory(machine)];
    out.extend([memlock(machine), descriptors(), shared_memory(), huge_pages(), transparent_huge_pages()]);
    out.extend(ports.iter().map(|p| port(*p)));
    out
}

fn kernel(machine: &Machine) -> Check {
    // memfd_create came with 3.17, pidfds and their polling with 5.3.
    let mut parts = machine.kernel.split(['.', '-']).map_while(|p| p.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let found = format!("Linux {}", machine.kernel);
    if version >= (5, 3) {
        Check::new("kernel", HOST, Standing::Ok, found)
    } else {
        Check::new("kernel", HOST, Standing::Degraded, found)
            .fix("Linux 5.3 or newer tells at once (pidfd) when a peer's process has ended; older ones only by its sockets")
    }
}

fn processor(machine: &Machine) -> Check {
    let simd = if machine.simd.is_empty() { "no wide vectors".into() } else { machine.simd.join(" ") };
    let cores = if machine.cores == 1 { "1 core".into() } else { format!("{} cores", machine.cores) };
    let found = format!("{}, {cores}, {simd}, last-level cache {}", machine.cpu, size(machine.l3_bytes));
    if machine.cores > 1 {
        return Check::new("cpu", HOST, Standing::Ok, found);
    }
    Check::new("cpu", HOST, Standing::Degraded, found)
        .fix("with a single core, sender and receiver take turns; give each process a core of its own")
}

fn memory(machine: &Machine) -> Check {
    let found = format!(
        "{} of {} available{}",
        size(machine.available_bytes),
        size(machine.memory_bytes),
        if line("/sys/fs/cgroup/memory.max").is_some_and(|m| m != "max") {
            " (control group's limit included)"
        } else {
            ""
        }
    );
    // The guides' pool on both sides.
    if machine.available_bytes >= 2 << 30 {
        Check::new("memory", HOST, Standing::Ok, found)
    } else {
        Check::new("memory", HOST, Standing::Degraded, found)
            .fix("two pools of 1 GiB (8,192 tokens of Llama-3.1-8B) need 2 GiB; choose smaller pools or free memory")
    }
}

fn memlock(machine: &Machine) -> Check {
    let limit = getrlimit(Resource::Memlock).current;
    let privileged = line("/proc/self/status").is_some_and(|s| has_capability(&s, 14));
    let found = match limit {
        None => "unlimited".to_owned(),
        Some(n) => format!("{}{}", size(n.max(1)), if privileged { ", lifted by CAP_IPC_LOCK" } else { "" }),
    };
    let enough = privileged || limit.is_none_or(|n| n >= machine.memory_bytes / 2);
    if enough {
        Check::new("memlock", LIMITS, Standing::Ok, found)
    } else {
        Check::new("memlock", LIMITS, Standing::Degraded, found).fix(
            "RDMA and pinned memory need locked pages: ulimit -l unlimited (containers: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)",
        )
    }
}

/// Whether `CapEff` in a process's status has this bit.
fn has_capability(status: &str, bit: u32) -> bool {
    status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps >> bit & 1 == 1)
}

fn descriptors() -> Check {
    let limit = getrlimit(Resource::Nofile);
    let found = match limit.current {
        None => "unlimited open files".into(),
        Some(n) => format!("{n} open files"),
    };
    if limit.current.is_none_or(|n| n >= 4096) {
        return Check::new("fd-limit", LIMITS, Standing::Ok, found);
    }
    let hard = limit.maximum.map_or("unlimited".into(), |n| n.to_string());
    Check::new("fd-limit", LIMITS, Standing::Degraded, found)
        .fix(format!("a peer takes about ten descriptors; raise it with ulimit -n (hard limit {hard})"))
}

fn shared_memory() -> Check {
    let works = rustix::fs::memfd_create("kvxfer-doctor", rustix::fs::MemfdFlags::CLOEXEC);
    let dev_shm = rustix::fs::statvfs("/dev/shm").map(|s| {
        format!(
            "/dev/shm has {} free of {}",
            size((s.f_bavail * s.f_frsize).max(1)),
            size((s.f_blocks * s.f_frsize).max(1))
        )
    });
    let dev_shm = dev_shm.unwrap_or_else(|e| format!("/dev/shm: {e}"));
    match works {
        Ok(_) => Check::new("memfd", LIMITS, Standing::Ok, format!("memfd works (bounded by memory, not by /dev/shm); {dev_shm}")),
        Err(e) => Check::new("memfd", LIMITS, Standing::Missing, format!("memfd_create: {e}; {dev_shm}"))
            .fix("the container's seccomp profile forbids memfd_create; allow it, or cma and tcp are used instead of shm"),
    }
}

fn huge_pages() -> Check {
    let (total, free) = (meminfo("HugePages_Total").unwrap_or(0), meminfo("HugePages_Free").unwrap_or(0));
    let each = meminfo("Hugepagesize").unwrap_or(2 << 20);
    if free > 0 {
        return Check::new(
            "huge-pages",
            LIMITS,
            Standing::Ok,
            format!("{free} of {total} explicit pages of {} free", size(each)),
        );
    }
    let found = if total == 0 {
        "no explicit huge pages".into()
    } else {
        format!("all {total} explicit huge pages are in use")
    };
    let wanted = (1_u64 << 30) / each.max(1);
    Check::new("huge-pages", LIMITS, Standing::Degraded, found).fix(format!(
        "for a pool of 1 GiB: sysctl vm.nr_hugepages={wanted} (early, before memory is fragmented); pools work without them"
    ))
}

fn transparent_huge_pages() -> Check {
    let chosen = |path: &str| {
        let text = line(path)?;
        let start = text.find('[')? + 1;
        Some(text[start..start + text[start..].find(']')?].to_owned())
    };
    let private = chosen("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_else(|| "absent".into());
    let shared =
        chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_else(|| "absent".into());
    let found = format!("{private} for private memory, {shared} for shared memory");
    if matches!(shared.as_str(), "advise" | "always" | "within_size" | "force") {
        return Check::new("thp", LIMITS, Standing::Ok, found);
    }
    Check::new("thp", LIMITS, Standing::Degraded, found)
        .fix("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled lets pools use huge pages without reserving any")
}

fn port(port: u16) -> Check {
    let id = format!("port-{port}");
    match TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => Check::new(id, LIMITS, Standing::Ok, format!("127.0.0.1:{port} is free")),
        Err(e) => Check::new(id, LIMITS, Standing::Degraded, format!("127.0.0.1:{port}: {e}")).fix(format!(
            "something listens there already (ss -ltnp 'sport = :{port}' names it); stop it or configure another port"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_seen_and_a_free_one_too() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
        let number = taken.local_addr().expect("address").port();
        assert_eq!(port(number).verdict, Standing::Degraded);
        drop(taken);
        assert_eq!(port(0).verdict, Standing::Ok);
    }

    #[test]
    fn capabilities_are_read_from_their_bits() {
        assert!(has_capability("Name:\tx\nCapEff:\t0000000000004000\n", 14));
        assert!(!has_capability("CapEff:\t0000000000003fff\n", 14));
        assert!(!has_capability("", 14));
    }
}
