//! `kvxfer` moves LLM key/value caches between inference engines. This crate is the public Rust API and the C ABI.

pub mod c;

pub use kvxfer_core::*;
