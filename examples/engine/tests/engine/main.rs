//! The engine as its users meet it: real processes, real HTTP, real transports.

mod api;
mod faults;
mod folder;
mod harness;
mod pair;
