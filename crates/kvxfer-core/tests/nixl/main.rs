//! The `nixl` transport against the real NIXL library, and against libraries that are not fit.
//!
//! NIXL and UCX keep state of the process, so every test runs its body in a process of its own ([`isolated`]). What
//! needs the real library runs where it is found and says loudly where it is not (`scripts/install-nixl.sh` gets it).
#![cfg(feature = "nixl")]

#[cfg(feature = "cuda")]
#[path = "../cuda/harness.rs"]
mod harness;
mod library;
mod peers;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
#[path = "../cuda/standin.rs"]
mod standin;
mod support;
mod transfers;
