//! What the operating system says of this machine.

use serde::{Deserialize, Serialize};
use std::fs;

/// The facts that matter to a measured rate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Host name.
    pub host: String,
    /// Kernel release.
    pub kernel: String,
    /// Processor's name.
    pub cpu: String,
    /// Logical processors this process may use.
    pub cores: usize,
    /// Vector instruction sets found.
    pub simd: Vec<String>,
    /// Last-level cache in bytes.
    pub l3_bytes: u64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Memory that can be had now, limits of the control group included, in bytes.
    pub available_bytes: u64,
}

impl Machine {
    /// Looks around.
    pub(crate) fn detect() -> Self {
        let uname = rustix::system::uname();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|l| l.starts_with(name))
                .and_then(|l| l.split_once(':'))
                .map(|(_, v)| v.trim().to_owned())
        };
        let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
        let simd = ["avx2", "avx512f", "amx_tile", "asimd", "sve"]
            .into_iter()
            .filter(|want| flags.split(' ').any(|have| have == *want))
            .map(str::to_owned)
            .collect();
        Self {
            host: uname.nodename().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu: field("model name").unwrap_or_else(|| uname.machine().to_string_lossy().into_owned()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            simd,
            l3_bytes: l3().unwrap_or(32 << 20),
            memory_bytes: meminfo("MemTotal").unwrap_or(0),
            available_bytes: available(),
        }
    }
}

/// A line of `/proc/meminfo` in bytes (or a plain count where it has no unit).
pub(crate) fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')))?;
    let mut words = line.split_whitespace().skip(1);
    let value: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") { value << 10 } else { value })
}

/// A one-line file, trimmed.
pub(crate) fn line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned()).filter(|s| !s.is_empty())
}

/// CPU time of this process, all threads, in nanoseconds.
pub(crate) fn cpu_time_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn l3() -> Option<u64> {
    (0..=4)
        .filter_map(|i| {
            let dir = format!("/sys/devices/system/cpu/cpu0/cache/index{i}");
            let level: u32 = line(&format!("{dir}/level"))?.parse().ok()?;
            let size = crate::units::parse_size(&line(&format!("{dir}/size"))?).ok()?;
            (level >= 2).then_some((level, size))
        })
        .max()
        .map(|(_, size)| size)
}

fn available() -> u64 {
    let system = meminfo("MemAvailable").unwrap_or(u64::MAX);
    // Control groups, second version then first; "max" or an absurd number means no limit.
    let group = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ]
    .into_iter()
    .filter_map(|(max, used)| {
        let max: u64 = line(max)?.parse().ok()?;
        let used: u64 = line(used)?.parse().ok()?;
        Some(max.saturating_sub(used))
    })
    .min()
    .unwrap_or(u64::MAX);
    system.min(group)
}

#[cfg(test)]
mod tests {
    #[test]
    fn facts_are_plausible() {
        let m = super::Machine::detect();
        assert!(m.cores >= 1 && m.l3_bytes >= 1 << 18, "{m:?}");
        assert!(m.memory_bytes > 0 && m.available_bytes > 0, "{m:?}");
        assert!(!m.kernel.is_empty() && !m.cpu.is_empty(), "{m:?}");
    }
}
