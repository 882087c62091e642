//! What a peer needs to map a region, on the wire: fixed fields, little-endian, checked for length before anything is read.
//!
//! ```text
//! u8 version | u8 kind | u64 agent | u64 region | u64 length | [u8; 16] device | u64 buffer | u64 offset | u64 size | [u8; 64] handle
//! ```

use super::VERSION;
use crate::cuda::{Export, HANDLE, Way};
use crate::{Error, Result};
use kvxfer_proto::{ErrorCode, RegionId};
use std::os::fd::OwnedFd;

/// Read from a peer's bytes. Nothing of it is trusted yet.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) instance: u64,
    pub(super) region: RegionId,
    pub(super) what: What,
}

/// What is shown to a peer, or was shown by one.
#[derive(Debug)]
pub(super) enum What {
    /// A block of device memory; in what was read, `offset..offset + len` lies within `size`.
    Block(Export),
    /// A pool of host memory.
    Pool(OwnedFd),
    /// Host memory that its own process alone reaches.
    Private,
}

const LEN: usize = 2 + 3 * 8 + 16 + 3 * 8 + HANDLE;
const KIND_HANDLE: u8 = 1;
const KIND_DESCRIPTOR: u8 = 2;
const KIND_POOL: u8 = 3;
const KIND_PRIVATE: u8 = 4;

impl What {
    /// The ticket of a region of `len` bytes.
    pub(super) fn encode(&self, instance: u64, region: RegionId, len: u64) -> Vec<u8> {
        const NO_HANDLE: &[u8; HANDLE] = &[0; HANDLE];
        let (kind, uuid, numbers, handle) = match self {
            Self::Block(e) => {
                let (kind, handle) = match &e.way {
                    Way::Handle(handle) => (KIND_HANDLE, handle),
                    Way::Descriptor(_) => (KIND_DESCRIPTOR, NO_HANDLE),
                };
                (kind, e.uuid, [e.buffer, e.offset, e.size], handle)
            }
            Self::Pool(_) => (KIND_POOL, [0; 16], [0, 0, len], NO_HANDLE),
            Self::Private => (KIND_PRIVATE, [0; 16], [0, 0, len], NO_HANDLE),
        };
        let mut out = Vec::with_capacity(LEN);
        out.extend_from_slice(&[VERSION, kind]);
        for n in [instance, region.0, len] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&uuid);
        for n in numbers {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(handle);
        out
    }

    /// The descriptor that goes with it.
    pub(super) fn into_fd(self) -> Option<OwnedFd> {
        match self {
            Self::Block(Export { way: Way::Descriptor(fd), .. }) | Self::Pool(fd) => Some(fd),
            Self::Block(_) | Self::Private => None,
        }
    }
}

impl Read {
    /// Reads a ticket for a region of `len` bytes.
    pub(super) fn new(bytes: &[u8], len: u64, fd: Option<OwnedFd>) -> Result<Self> {
        let refused = |problem: String| {
            Error::failed(ErrorCode::Protocol, format!("cuda_ipc ticket of {} bytes: {problem}", bytes.len()))
        };
        if bytes.len() != LEN || bytes.first() != Some(&VERSION) {
            return Err(refused(format!(
                "{LEN} bytes of version {VERSION} were expected, this is version {:?}",
                bytes.first()
            )));
        }
        let mut rest = &bytes[2..];
        let mut take = |n: usize| {
            let (now, later) = rest.split_at(n);
            rest = later;
            now
        };
        let number = |b: &[u8]| b.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let (instance, region, stated) = (number(take(8)), number(take(8)), number(take(8)));
        let mut uuid = [0; 16];
        uuid.copy_from_slice(take(16));
        let (buffer, offset, size) = (number(take(8)), number(take(8)), number(take(8)));
        let mut handle = [0; HANDLE];
        handle.copy_from_slice(take(HANDLE));
        if stated != len {
            return Err(refused(format!("made for {stated} bytes, {len} were announced")));
        }
        if offset > size || len > size - offset {
            return Err(refused(format!("{len} bytes at {offset} do not lie within {size}")));
        }
        let what = match (bytes[1], fd) {
            (KIND_HANDLE, _) => What::Block(Export { uuid, buffer, offset, size, way: Way::Handle(handle) }),
            (KIND_DESCRIPTOR, Some(fd)) => {
                What::Block(Export { uuid, buffer, offset, size, way: Way::Descriptor(fd) })
            }
            (KIND_POOL, Some(fd)) => What::Pool(fd),
            (KIND_PRIVATE, _) => What::Private,
            (KIND_DESCRIPTOR | KIND_POOL, None) => {
                return Err(refused("no file descriptor came with it".into()));
            }
            (kind, _) => return Err(refused(format!("kind {kind} is unknown"))),
        };
        Ok(Self { instance, region: RegionId(region), what })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export() -> Export {
        Export { uuid: [7; 16], buffer: 5, offset: 4096, size: 1 << 20, way: Way::Handle([9; HANDLE]) }
    }

    #[test]
    fn a_ticket_comes_back_as_it_went() {
        let what = What::Block(export());
        let bytes = what.encode(3, RegionId(8), 1000);
        assert!(what.into_fd().is_none());
        let read = Read::new(&bytes, 1000, None).unwrap();
        assert_eq!((read.instance, read.region), (3, RegionId(8)));
        let What::Block(e) = read.what else { panic!("{read:?}") };
        assert_eq!((e.uuid, e.buffer, e.offset, e.size), ([7; 16], 5, 4096, 1 << 20));
        assert!(matches!(e.way, Way::Handle(h) if h == [9; HANDLE]));
    }

    #[test]
    fn hostile_tickets_are_refused_by_name() {
        let good = What::Block(export()).encode(3, RegionId(8), 1000);
        let says = |bytes: &[u8], len: u64, what: &str| {
            let e = Read::new(bytes, len, None).unwrap_err();
            assert_eq!(e.code(), ErrorCode::Protocol);
            assert!(e.to_string().contains(what), "{e}");
        };
        says(&[], 1000, "expected");
        says(&good[..good.len() - 1], 1000, "expected");
        says(&good, 1001, "made for 1000 bytes");
        let patched = |at: usize, with: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + with.len()].copy_from_slice(with);
            bytes
        };
        says(&patched(0, &[9]), 1000, "version Some(9)");
        says(&patched(1, &[77]), 1000, "kind 77");
        says(&patched(1, &[KIND_DESCRIPTOR]), 1000, "no file descriptor");
        says(&patched(1, &[KIND_POOL]), 1000, "no file descriptor");
        let offset = 2 + 24 + 16 + 8;
        says(&patched(offset, &u64::MAX.to_le_bytes()), 1000, "do not lie within");
        says(&patched(offset, &((1u64 << 20) - 999).to_le_bytes()), 1000, "do not lie within");
        says(&patched(offset + 8, &0u64.to_le_bytes()), 1000, "do not lie within");
    }
}
