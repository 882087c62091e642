//! Cross-memory attach, tried for real: a child offers memory, this process writes to it and reads it back.

use super::{Check, Standing};
use crate::bench::server::permit;
use crate::child::{self, Child};
use crate::content::Content;
use crate::machine::line;
use crate::{Failure, bench};
use kvxfer_core::baseline::ProcessMemory;
use kvxfer_core::{Memory, Piece};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LEN: usize = 64 << 10;
const DEADLINE: Duration = Duration::from_secs(10);
const AREA: &str = "libraries and kernel paths";

#[derive(Serialize, Deserialize)]
enum ToTarget {
    /// Who will write. Answer: [`Offered`].
    Offer { writer: u32 },
    /// Is this stream's content there? Answer: a boolean.
    Holds { stream: u64 },
}

#[derive(Serialize, Deserialize)]
struct Offered {
    address: u64,
}

/// The child.
pub(crate) fn run_target() -> Result<(), Failure> {
    let memory = Memory::anonymous(LEN)?;
    bench::server::touch(&memory)?;
    while let Some(message) = child::listen()? {
        match message {
            ToTarget::Offer { writer } => {
                permit(writer);
                child::say(&Offered { address: memory.as_ptr() as u64 })?;
            }
            ToTarget::Holds { stream } => {
                let mut bytes = vec![0; LEN];
                memory.read_at(0, &mut bytes)?;
                child::say(&Content::new(0, stream).check(0, &bytes).is_ok())?;
            }
        }
    }
    Ok(())
}

pub(super) fn check() -> Check {
    let scope = line("/proc/sys/kernel/yama/ptrace_scope");
    let yama = match scope.as_deref() {
        None => "no Yama".to_owned(),
        Some("0") => "ptrace_scope 0".into(),
        Some("1") => "ptrace_scope 1: kvxfer grants each peer by PR_SET_PTRACER".into(),
        Some(other) => format!("ptrace_scope {other}"),
    };
    match attempt() {
        Ok(()) => Check::new(
            "cma-syscall",
            AREA,
            Standing::Ok,
            format!("process_vm_writev and readv work between processes ({yama})"),
        ),
        Err(why) => {
            let fix = match scope.as_deref() {
                Some("2") => "sysctl kernel.yama.ptrace_scope=1, or give the engines CAP_SYS_PTRACE",
                Some("3") => "ptrace_scope 3 stays until a reboot; start with kernel.yama.ptrace_scope=1",
                _ => {
                    "containers: same user and PID namespace, and a seccomp profile that allows process_vm_readv/writev (--cap-add SYS_PTRACE)"
                }
            };
            Check::new("cma-syscall", AREA, Standing::Missing, format!("{why} ({yama})"))
                .fix(format!("{fix}; until then shm (kvxfer's own memory) and tcp are used"))
        }
    }
}

fn attempt() -> Result<(), Failure> {
    let mut target = Child::start("CMA self-test", &["internal-child", "cma-target"])?;
    let offered: Offered = target.ask(&ToTarget::Offer { writer: std::process::id() }, DEADLINE)?;
    let there = ProcessMemory::new(target.pid(), offered.address, LEN as u64)?;
    let memory = Memory::anonymous(LEN)?;
    let mut bytes = vec![0; LEN];
    Content::new(0, 1).fill(0, &mut bytes);
    memory.write_at(0, &bytes)?;
    let all = [Piece { local_offset: 0, remote_offset: 0, len: LEN as u64 }];
    there.write(&memory, &all)?;
    let arrived: bool = target.ask(&ToTarget::Holds { stream: 1 }, DEADLINE)?;
    let back = Memory::anonymous(LEN)?;
    there.read(&back, &all)?;
    back.read_at(0, &mut bytes)?;
    target.finish(Duration::from_secs(1));
    if arrived && Content::new(0, 1).check(0, &bytes).is_ok() {
        Ok(())
    } else {
        Err(Failure::new("bytes written by process_vm_writev did not arrive"))
    }
}
