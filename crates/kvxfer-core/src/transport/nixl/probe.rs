//! What NIXL offers on this machine, for reports.

use super::agent::{create_backend, empty_agent, failed, plugins};
use super::find;
use super::report::{BackendProbe, Probe};
use crate::Result;
use crate::config::NixlConfig;
use nixl_sys::MemType;

/// Loads NIXL, creates each configured backend in an agent of its own and takes it down again.
///
/// NIXL stays loaded in this process. Fails as [`find::load`] does; a backend that fails is reported in its entry.
pub fn probe(config: &NixlConfig) -> Result<Probe> {
    let library = find::load(config)?;
    let agent = empty_agent(&format!("kvxfer-probe-{}", std::process::id()), config)?;
    let mut other_plugins = plugins(&agent)?;
    other_plugins.retain(|name| !config.backends.contains(name));
    let backends = config
        .backends
        .iter()
        .map(|name| {
            let created = create_backend(&agent, name, config).and_then(|backend| {
                let (memory, _) =
                    agent.get_backend_params(&backend).map_err(|e| failed("get_backend_params", &e))?;
                Ok(memory.iter().flatten().map(memory_name).map(str::to_owned).collect())
            });
            match created {
                Ok(memory) => BackendProbe { name: name.clone(), memory, problem: None },
                Err(e) => {
                    BackendProbe { name: name.clone(), memory: Vec::new(), problem: Some(e.to_string()) }
                }
            }
        })
        .collect();
    Ok(Probe {
        library: library.path,
        version: library.version,
        plugin_dir: library.plugin_dir,
        backends,
        other_plugins,
    })
}

pub(super) fn memory_name(kind: MemType) -> &'static str {
    match kind {
        MemType::Dram => "dram",
        MemType::Vram => "vram",
        MemType::Block => "block",
        MemType::Object => "object",
        MemType::File => "file",
        MemType::Unknown => "unknown",
    }
}
