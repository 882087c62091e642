//! What remains in a build without the feature `nixl`: the answer that it is not there.

use super::{Probe, RemotePlace};
use crate::config::{AgentConfig, NixlConfig};
use crate::transport::{Op, Piece, Transport};
use crate::{Error, Memory, Result};
use kvxfer_proto::{AgentName, Epoch, ErrorCode};
use std::sync::Arc;
use std::time::Duration;

fn absent<T>() -> Result<T> {
    Err(Error::failed(
        ErrorCode::NotAvailable,
        "NIXL not available: built without the feature `nixl`; build with it (needs libclang and g++)",
    ))
}

/// Always an error in this build.
pub fn start(_name: &AgentName, _epoch: Epoch, _config: &AgentConfig) -> Result<Arc<dyn Transport>> {
    absent()
}

/// Always an error in this build.
pub fn probe(_config: &NixlConfig) -> Result<Probe> {
    absent()
}

/// Cannot be made in this build.
pub enum Bare {}

impl Bare {
    /// Always an error in this build.
    pub fn new(_name: &str, _config: &NixlConfig) -> Result<Self> {
        absent()
    }
    /// Not reached.
    pub fn register(&mut self, _memory: &Arc<Memory>) -> Result<()> {
        match *self {}
    }
    /// Not reached.
    pub fn metadata(&self) -> Result<Vec<u8>> {
        match *self {}
    }
    /// Not reached.
    pub fn connect(&mut self, _metadata: &[u8]) -> Result<String> {
        match *self {}
    }
    /// Not reached.
    pub fn transfer(
        &self,
        _op: Op,
        _local: &Memory,
        _peer: &str,
        _remote: RemotePlace,
        _pieces: &[Piece],
        _timeout: Duration,
    ) -> Result<()> {
        match *self {}
    }
    /// Not reached.
    pub fn close(self) {
        match self {}
    }
    /// Not reached.
    pub fn progress(&self) -> Result<()> {
        match *self {}
    }
}
