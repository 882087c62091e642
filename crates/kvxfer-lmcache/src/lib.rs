//! What `LMCache`'s configuration files say, in today's words.
//!
//! `LMCache` renamed its keys for disaggregated prefill twice, and reads files with the older names without a word: disaggregation is
//! then silently off. [`config::translate`] turns such a file into one that says the same today, and tells what became of every
//! key. Pure: text in, a value out.
#![forbid(unsafe_code)]

pub mod config;
