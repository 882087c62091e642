//! What the tests of the C ABI share.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod header;
pub(crate) mod nulls;
pub(crate) mod program;
