//! Between a GPU's paged cache and contiguous chunks, or from pages to pages: what lies where, checked, and how it is moved.
//!
//! A [`Layout`] says how one layer lays out its tokens, in bytes; a [`View`] is that over memory, with the tokens that are meant. A
//! [`Gather`] of two views is checked once and then carried out as often as wanted: by a kernel that moves each byte once, whatever the two
//! layouts are ([`Gather::start`], where the memory is in reach of a device of this process), or as a list of byte runs for a transfer to
//! a peer ([`Gather::runs`] with [`crate::Peer::write`]), which the `cuda_ipc` transport gives to a kernel of its own: one pass from
//! the pages into the peer's memory.
//!
//! Which of the two: runs as long as a block (keys and values with all heads together, the layouts of most engines) are as good as it gets as
//! a list. Runs of one head and token, where heads come before tokens or only some of them are wanted, are too many for a list from some
//! ten thousand on: gather first, then send the chunk.
//!
//! Everything here is pure but the start on a device; see `docs/kernels.md` for the shapes and the digest.

mod digest;
mod layout;
mod params;
#[cfg(feature = "cuda")]
mod run;
#[cfg(test)]
mod tests;
mod view;

pub use digest::digest;
pub use layout::{Layout, Order};
#[cfg(feature = "cuda")]
pub(crate) use params::Params;
#[cfg(feature = "cuda")]
pub use run::{Gathered, Gathering};
pub use view::{Gather, Tokens, View};
