//! Making an agent's transports. One that cannot be made is a remembered reason, not an error.

use super::TransportStatus;
use super::choose;
use super::state::Slot;
use crate::config::AgentConfig;
use crate::transport::cma::CmaTransport;
use crate::transport::fault::FaultTransport;
use crate::transport::inproc::InprocTransport;
use crate::transport::mover::Mover;
use crate::transport::nixl;
use crate::transport::shm::ShmTransport;
use crate::transport::tcp::TcpTransport;
use crate::transport::{Transport, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::{AgentName, Epoch, ErrorCode};
use std::sync::Arc;

/// Every transport that the policy allows and this machine has; the caller's own take the place of built-in ones.
pub(crate) fn create(
    name: &AgentName,
    epoch: Epoch,
    config: &AgentConfig,
    own: &[Arc<dyn Transport>],
) -> (Vec<Slot>, Vec<TransportStatus>) {
    let mover = Mover::new(config);
    let mut slots = Vec::new();
    let mut status = Vec::new();
    for kind in TransportKind::ALL {
        let made = match choose::excluded(&config.transports, kind) {
            Some(reason) => Err(Error::failed(ErrorCode::NotAvailable, reason)),
            None => match own.iter().find(|t| t.kind() == kind) {
                Some(transport) => Ok(transport.clone()),
                None if kind == TransportKind::Nixl => nixl::start(name, epoch, config),
                None => built_in(config, kind, &mover),
            },
        };
        let reason = match made {
            Ok(transport) => {
                let transport: Arc<dyn Transport> = match &config.faults {
                    Some(plan) => FaultTransport::new(transport, plan.clone()),
                    None => transport,
                };
                slots.push(Slot { kind, caps: transport.capabilities(), transport });
                None
            }
            Err(e) => {
                tracing::debug!(transport = %kind, reason = %e, "transport not available");
                Some(e.to_string())
            }
        };
        status.push(TransportStatus { kind, reason });
    }
    (slots, status)
}

fn built_in(config: &AgentConfig, kind: TransportKind, mover: &Arc<Mover>) -> Result<Arc<dyn Transport>> {
    match kind {
        TransportKind::Inproc => Ok(InprocTransport::new(config, mover)?),
        TransportKind::Shm => Ok(ShmTransport::new(config, mover)?),
        TransportKind::Cma => Ok(CmaTransport::new(config, mover)?),
        TransportKind::Tcp => Ok(Arc::new(TcpTransport::new(&config.tcp, config.peer_timeout)?)),
        #[cfg(feature = "cuda")]
        TransportKind::CudaIpc => Ok(crate::transport::cuda_ipc::CudaIpcTransport::new()?),
        other => Err(Error::failed(ErrorCode::NotAvailable, format!("{other} is not part of this build"))),
    }
}
