//! The `nixl` transport against the real NIXL library, and against libraries that are not fit.
//!
//! NIXL and UCX keep state of the process, so every test runs its body in a process of its own ([`isolated`]). What
//! needs the real library runs where it is found and says loudly where it is not (`scripts/install-nixl.sh` gets it).
#![cfg(feature = "nixl")]

mod library;
mod peers;
mod support;
mod transfers;
