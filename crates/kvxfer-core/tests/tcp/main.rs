//! The `tcp` transport between two transports of one process and of two, with real sockets throughout.
#![allow(missing_docs, unreachable_pub, reason = "helpers of a test, not an interface")]

mod data;
mod faults;
mod harness;
mod hostile;
mod process;
mod proxy;
