//! The calls of `nixl-sys` that the transport, the baseline and the probe share.

use super::find;
use crate::config::NixlConfig;
use crate::{Error, Memory, Result};
use kvxfer_proto::ErrorCode;
use nixl_sys::{
    Agent, AgentConfig, Backend, MemType, MemoryRegion, NixlDescriptor, NixlError, OptArgs, Params,
    RegistrationHandle, ThreadSync, XferDescList,
};

/// A call of NIXL failed. The library tells only a class; its own words go to its log on stderr.
pub(super) fn failed(call: &str, error: &NixlError) -> Error {
    Error::failed(
        ErrorCode::Transport,
        format!("NIXL's {call} failed: {error} (NIXL_LOG_LEVEL=DEBUG tells more)"),
    )
}

/// Loads NIXL and makes an agent without threads of its own, with the configured backends in their order.
pub(super) fn create_agent(name: &str, config: &NixlConfig) -> Result<(Agent, Vec<Backend>)> {
    let agent = empty_agent(name, config)?;
    let mut backends = Vec::new();
    for plugin in &config.backends {
        backends.push(create_backend(&agent, plugin, config)?);
    }
    if backends.is_empty() {
        return Err(Error::InvalidArgument {
            argument: "nixl.backends",
            problem: "the list is empty; name at least one, e.g. UCX".into(),
        });
    }
    Ok((agent, backends))
}

/// An agent without any backend.
pub(super) fn empty_agent(name: &str, config: &NixlConfig) -> Result<Agent> {
    find::load(config)?;
    let threads_off = AgentConfig {
        enable_prog_thread: false,
        enable_listen_thread: false,
        // Every call is made under one lock.
        thread_sync: ThreadSync::None,
        ..AgentConfig::default()
    };
    Agent::new_configured(name, &threads_off).map_err(|e| failed("create_configured_agent", &e))
}

/// One backend with the parameters configured for it.
pub(super) fn create_backend(agent: &Agent, plugin: &str, config: &NixlConfig) -> Result<Backend> {
    let params = Params::from(config.params.get(plugin).into_iter().flatten())
        .map_err(|e| failed("create_params", &e))?;
    agent.create_backend(plugin, &params).map_err(|e| {
        let known = plugins(agent).unwrap_or_default().join(", ");
        Error::failed(
            ErrorCode::NotAvailable,
            format!(
                "NIXL's backend {plugin:?} could not be created: {e}; plug-ins found: {}; see nixl.backends, nixl.params \
                 and nixl.plugin_dir",
                if known.is_empty() { "none" } else { &known }
            ),
        )
    })
}

/// Names of the plug-ins NIXL sees.
pub(super) fn plugins(agent: &Agent) -> Result<Vec<String>> {
    let list = agent.get_available_plugins().map_err(|e| failed("get_available_plugins", &e))?;
    let mut names: Vec<String> = list.iter().filter_map(|s| s.ok().map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

/// The argument that limits a call to the given backends.
pub(super) fn backend_args(backends: &[Backend]) -> Result<Option<OptArgs>> {
    let mut args = OptArgs::new().map_err(|e| failed("create_opt_args", &e))?;
    for backend in backends {
        args.add_backend(backend).map_err(|e| failed("opt_args_add_backend", &e))?;
    }
    Ok(Some(args))
}

/// The argument that limits a call to one backend; `None` when there is no other.
pub(super) fn only_backend(backends: &[Backend], backend: &Backend) -> Result<Option<OptArgs>> {
    if backends.len() < 2 {
        return Ok(None);
    }
    backend_args(std::slice::from_ref(backend))
}

/// What NIXL calls the place of a memory: its kind, and the number of the device.
pub(super) fn place_of(memory: &Memory) -> (MemType, u64) {
    place_on(memory.on_device().map(crate::cuda::Device::ordinal))
}

/// The same by the number of a CUDA device; none for host memory.
pub(super) fn place_on(device: Option<i32>) -> (MemType, u64) {
    device.map_or((MemType::Dram, 0), |ordinal| (MemType::Vram, ordinal as u64))
}

/// An empty list of transfer descriptors.
pub(super) fn xfer_list(kind: MemType) -> Result<XferDescList<'static>> {
    XferDescList::new(kind).map_err(|e| failed("create_xfer_dlist", &e))
}

/// Registers a range. The caller keeps the memory valid until the handle is dropped.
pub(super) fn register(
    agent: &Agent,
    backends: &[Backend],
    memory: &Memory,
    (address, len): (usize, usize),
) -> Result<RegistrationHandle> {
    let args = backend_args(backends)?;
    let (kind, device) = place_of(memory);
    // UCX asks the driver about device memory in the calling thread's context.
    #[cfg(feature = "cuda")]
    let _here = memory.on_device().map(crate::cuda::Device::enter).transpose()?;
    agent.register_memory(&Range { address, len, kind, device }, args.as_ref()).map_err(|e| {
        Error::failed(
            ErrorCode::Transport,
            format!(
                "NIXL could not register {len} bytes of {} memory at {address:#x}: {e}; {}",
                super::probe::memory_name(kind),
                if kind == MemType::Vram {
                    "UCX needs its CUDA modules for it (UCX_TLS must allow cuda_copy and cuda_ipc), and for RDMA the driver's \
                     peer memory module (nvidia_peermem) or dma-buf"
                } else {
                    "for RDMA check `ulimit -l` and the NIC's limits on memory regions"
                }
            ),
        )
    })
}

/// A range of memory as NIXL wants to see it.
#[derive(Debug)]
struct Range {
    address: usize,
    len: usize,
    kind: MemType,
    device: u64,
}

impl MemoryRegion for Range {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.address as *const u8
    }
    fn size(&self) -> usize {
        self.len
    }
}

impl NixlDescriptor for Range {
    fn mem_type(&self) -> MemType {
        self.kind
    }
    fn device_id(&self) -> u64 {
        self.device
    }
}
