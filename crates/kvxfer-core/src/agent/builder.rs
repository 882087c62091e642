//! Building an agent: settings, listeners, transports, thread.

use super::address::{self, Address};
use super::inbox::Inbox;
use super::reactor::Reactor;
use super::side::SideListener;
use super::state::{Inner, Parts};
use super::{Agent, Handle, identity, progress, transports};
use crate::config::AgentConfig;
use crate::metrics::Metrics;
use crate::transport::{Transport, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::AgentName;
use parking_lot::Mutex;
use std::sync::Arc;

/// Builds an [`Agent`]; starts from [`AgentConfig::default`] and, when asked, the environment.
#[derive(Default)]
pub struct AgentBuilder {
    config: AgentConfig,
    transports: Vec<Arc<dyn Transport>>,
}

impl AgentBuilder {
    /// Replaces the whole configuration.
    pub fn config(mut self, config: AgentConfig) -> Self {
        self.config = config;
        self
    }
    /// Sets the name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.config.name = Some(name.into());
        self
    }
    /// Adds a listening address, `tcp://host:port` or `unix:///path`.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.config.listen.push(address.into());
        self
    }
    /// Sets the pre-shared key.
    pub fn auth_key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.config.auth_key = Some(crate::config::Secret::new(key));
        self
    }
    /// Allows only these transports, in this order.
    pub fn allow(mut self, kinds: impl IntoIterator<Item = TransportKind>) -> Self {
        self.config.transports.allow = kinds.into_iter().collect();
        self
    }
    /// Adds a transport of the caller's own (or a decorated one); it takes the place of the built-in one of its kind.
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transports.push(transport);
        self
    }
    /// Overlays `KVXFER_*` environment variables (the only place that reads them).
    pub fn env(mut self) -> Result<Self> {
        self.config = self.config.overlay(|name| std::env::var(name).ok())?;
        Ok(self)
    }

    /// Starts the agent: listeners are bound and the progress thread runs when this returns.
    pub fn build(self) -> Result<Agent> {
        let Self { mut config, transports: own } = self;
        config.validate()?;
        let key = config.key()?;
        let name = AgentName::new(config.name.clone().unwrap_or_else(identity::default_name))?;
        config.name = Some(name.to_string());
        identity::generation();
        let listeners = config
            .listen
            .iter()
            .map(|text| {
                let parsed = Address::parse(text).map_err(|e| Error::InvalidArgument {
                    argument: "listen",
                    problem: format!("{text:?}: {e}"),
                })?;
                address::bind(&parsed)
            })
            .collect::<Result<Vec<_>>>()?;
        let side = SideListener::bind()
            .inspect_err(|e| tracing::debug!(error = %e, "no side socket: shm and cma are not offered"))
            .ok();
        let host = identity::host_identity(side.as_ref().map_or_else(String::new, |s| s.name.clone()))?;
        let reactor = Reactor::new()?;
        let inbox = Inbox::new().map_err(|e| {
            Error::system("creating eventfds", e, "raise the limit on open files (ulimit -n)")
        })?;
        let epoch = identity::new_epoch();
        let (slots, status) = transports::create(&name, epoch, &config, &own);
        let sockets: Vec<_> = listeners.iter().filter_map(|l| l.socket).collect();
        if !sockets.is_empty() {
            for slot in &slots {
                slot.transport.listening(&sockets);
            }
        }
        let inner = Inner::new(Parts {
            config,
            key,
            name,
            epoch,
            host,
            slots,
            status,
            listeners,
            side,
            reactor,
            inbox: Arc::new(inbox),
            metrics: Arc::new(Metrics::new()),
        });
        let theirs = inner.clone();
        let thread = crate::threads::spawn("kvx-progress", move || progress::run(&theirs))
            .map_err(|e| Error::system("starting the progress thread", e, "raise the limit on threads"))?;
        tracing::debug!(agent = %inner.name, epoch = %inner.epoch, "agent started");
        Ok(Agent { handle: Arc::new(Handle { inner, thread: Mutex::new(Some(thread)) }) })
    }
}
