//! `kvxfer bench --gpu`: GPU memory between two processes, beside what the driver and NIXL do with the same bytes.
//!
//! This process owns a device's memory and submits; a child owns memory on the same device or another one, and a pinned pool of host
//! memory. Subject and baselines take turns; a ratio is the median of the pairwise ones. What has been moved is compared byte for byte
//! once per row.

mod cases;
mod far;
mod near;
mod rows;

pub(crate) use far::run_child;

use crate::args::BenchArgs;
use crate::{Failure, Verdict};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvxfer_core::cuda::{self, Device};
use near::Near;
use rows::{Header, Run};
use std::io::IsTerminal;

/// Sizes of a run.
pub(crate) struct Plan {
    /// Ours and the child's.
    pub devices: (i32, i32),
    /// Bytes of the bulk row, in chunks.
    pub bulk: u64,
    pub chunk: u64,
    /// Scattered blocks, and the bytes of one.
    pub blocks: u64,
    pub block: u64,
    /// Tokens of the guide's store.
    pub tokens: u64,
    /// Bytes between device and host.
    pub host: u64,
    pub pings: u32,
    pub reps: u32,
}

impl Plan {
    fn new(args: &BenchArgs) -> Result<Self, Failure> {
        let &[a, b] = args.gpu_devices.as_slice() else {
            return Err(Failure::usage(format!(
                "--gpu-devices wants two numbers, this process's device and the other's: 0,0 or 0,1, not {:?}",
                args.gpu_devices
            )));
        };
        let full = Self {
            devices: (a, b),
            bulk: 2 << 30,
            chunk: 32 << 20,
            blocks: 20_032,
            block: 32 << 10,
            tokens: 5271,
            host: 1 << 30,
            pings: 2000,
            reps: args.reps.unwrap_or(15),
        };
        if !args.quick {
            return Ok(full);
        }
        Ok(Self {
            bulk: 32 << 20,
            chunk: 4 << 20,
            blocks: 640,
            tokens: 300,
            host: 16 << 20,
            pings: 50,
            reps: args.reps.unwrap_or(3),
            ..full
        })
    }
}

/// Moves a few bytes between this process on one device and a child on another, directly, and compares them.
pub(crate) fn try_pair(near: i32, far: i32) -> Result<(), Failure> {
    let plan = Plan {
        devices: (near, far),
        bulk: 1 << 20,
        chunk: 1 << 20,
        blocks: 64,
        block: 4096,
        tokens: 1,
        host: 1 << 20,
        pings: 0,
        reps: 1,
    };
    let mut near = Near::open(plan, false)?;
    let outcome = cases::one(&mut near);
    near.close();
    outcome
}

pub(crate) fn run(args: &BenchArgs) -> Result<Verdict, Failure> {
    let plan = Plan::new(args)?;
    let probe = cuda::probe()?;
    let (ours, theirs) = (Device::get(plan.devices.0)?, Device::get(plan.devices.1)?);
    let show = !args.no_progress && std::io::stderr().is_terminal();
    let bar = ProgressBar::with_draw_target(
        Some(0),
        if show { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
    );
    if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {eta:>4} {msg}") {
        bar.set_style(style);
    }
    let header = Header {
        kvxfer: env!("CARGO_PKG_VERSION").into(),
        driver: probe.driver,
        devices: [ours.name().to_owned(), theirs.name().to_owned()],
        one_device: plan.devices.0 == plan.devices.1,
        standin: ours.name().contains("stand-in"),
        repetitions: plan.reps,
        quick: args.quick,
        command: std::env::args().skip(1).fold("kvxfer".into(), |line, word| line + " " + &word),
    };
    drop((ours, theirs));
    let mut near = Near::open(plan, true)?;
    let rows = cases::all(&mut near, &bar)?;
    bar.finish_and_clear();
    let notes = near.close();
    let run = Run { header, rows, notes };
    let json = serde_json::to_string_pretty(&run).map_err(|e| Failure::new(e.to_string()))? + "\n";
    match &args.json {
        Some(file) if file.as_os_str() == "-" => print!("{json}"),
        other => {
            if let Some(file) = other {
                super::write(file, &json)?;
            }
            print!("{}", if args.markdown { run.markdown() } else { run.terminal() });
        }
    }
    Ok(Verdict::Held)
}
