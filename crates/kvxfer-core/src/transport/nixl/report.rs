//! The shape of a report on NIXL; the same whether this build has it or not.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The library.
    pub library: PathBuf,
    /// Its version, where it can be told.
    pub version: Option<String>,
    /// Folder of the plug-ins.
    pub plugin_dir: Option<PathBuf>,
    /// The configured backends, in their order.
    pub backends: Vec<BackendProbe>,
    /// Other plug-ins that are there; they can be named in `nixl.backends`.
    pub other_plugins: Vec<String>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendProbe {
    /// Its name, e.g. `UCX`.
    pub name: String,
    /// Kinds of memory it moves: `dram`, `vram`, `file`, …
    pub memory: Vec<String>,
    /// Why it cannot be used; `None` when it can.
    pub problem: Option<String>,
}
