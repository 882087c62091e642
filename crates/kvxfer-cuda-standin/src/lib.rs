//! A CUDA driver over host memory, for tests on machines without a GPU.
//!
//! It is a real `libcuda.so.1`, loaded the way the real one is: start a process with [`folder`] in `LD_LIBRARY_PATH`. What it is true
//! to, and what it does not model, is in `docs/cuda-standin.md`; in short: device memory that the host cannot touch, streams that run by
//! themselves, events, IPC between processes, virtual memory with file descriptors, launches of the CPU twins of kvxfer's kernels, errors
//! as documented, and an account of everything that was made and not freed.
//!
//! Environment of the process:
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `KVXSTANDIN_DEVICES` | number of devices | 1 |
//! | `KVXSTANDIN_MEMORY` | bytes of each device | 2 GiB |
//! | `KVXSTANDIN_VERSION` | version of the driver | 12080 |
//! | `KVXSTANDIN_DELAY_US` | microseconds each operation of a stream takes at least | 0 |
//! | `KVXSTANDIN_FAIL` | `call:n:code`, comma-separated: the n-th call of that name (0: each) fails with that CUDA error | |
//! | `KVXSTANDIN_NO_IPC` | 1: memory cannot be shared by handle | |
//! | `KVXSTANDIN_NO_PEER` | 1: devices do not reach each other's memory | |
//! | `KVXSTANDIN_REPORT` | file that gets a line of JSON at the end of the process: what was not freed, and the number of each call | |

use std::path::PathBuf;

const BUILT: &str = env!("KVXFER_CUDA_STANDIN");

/// Whether it could be built: there was a C++ compiler.
pub fn available() -> bool {
    !BUILT.is_empty()
}

/// Folder of the stand-in driver, for `LD_LIBRARY_PATH`.
pub fn folder() -> PathBuf {
    PathBuf::from(BUILT).join("new")
}

/// Folder of an older one, without the batched copies of CUDA 12.8.
pub fn folder_of_an_older_one() -> PathBuf {
    PathBuf::from(BUILT).join("old")
}
