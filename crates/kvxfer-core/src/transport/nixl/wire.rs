//! Offers and tickets as bytes, and the checks on what arrives.
//!
//! Both carry NIXL's own metadata, which NIXL itself parses. What it would take on trust is checked here first: the
//! metadata must speak for the agent that was introduced, or one peer could replace what is known of another.

use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use nixl_sys::MemType;

/// First byte of offers and tickets.
const VERSION: u8 = 1;
/// Longest agent name, bytes: `agent name/epoch`.
const MAX_NAME: usize = 256;
/// Most metadata of one offer or ticket, bytes.
const MAX_METADATA: usize = 1 << 20;
/// How NIXL's serialised metadata starts: its tag, then the agent's name with a 64-bit length.
const METADATA_HEAD: &[u8] = b"nixlSerDes|Agent";

/// How to reach an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// Name of the NIXL agent.
    pub name: String,
    /// This side has an RDMA device with an active port, and UCX may use it.
    pub rdma: bool,
    /// Its connection metadata.
    pub metadata: Vec<u8>,
}

/// How to reach a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    /// Name of the NIXL agent that registered it.
    pub name: String,
    /// Kind of memory.
    pub kind: MemType,
    /// Device, for device memory.
    pub device: u64,
    /// Where it starts in the owner's address space.
    pub address: u64,
    /// Its length, bytes.
    pub len: u64,
    /// Length of one registration, bytes; the last one may be shorter.
    pub slice: u64,
    /// NIXL's metadata of the registrations.
    pub metadata: Vec<u8>,
}

impl Offer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.rdma)];
        put_text(&mut out, &self.name);
        out.extend_from_slice(&self.metadata);
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Input { rest: bytes, what: "offer" };
        input.version()?;
        let rdma = input.byte()? & 1 != 0;
        let name = input.text()?;
        let metadata = input.metadata(&name)?;
        Ok(Self { name, rdma, metadata })
    }
}

impl Ticket {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, kind_byte(self.kind)];
        for number in [self.device, self.address, self.len, self.slice] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        put_text(&mut out, &self.name);
        out.extend_from_slice(&self.metadata);
        out
    }

    /// Checks everything but the metadata's inside; `len` is what the region's advert said, `name` whom we talk to.
    pub(super) fn decode(bytes: &[u8], len: u64, name: &str) -> Result<Self> {
        let mut input = Input { rest: bytes, what: "ticket" };
        input.version()?;
        let kind = match input.byte()? {
            0 => MemType::Dram,
            1 => MemType::Vram,
            other => return Err(input.wrong(&format!("{other} is no kind of memory"))),
        };
        let [device, address, stated, slice] =
            [input.number()?, input.number()?, input.number()?, input.number()?];
        let owner = input.text()?;
        if owner != name {
            return Err(input.wrong(&format!("it was made by {owner:?}, the peer is {name:?}")));
        }
        if stated != len || len == 0 {
            return Err(input.wrong(&format!("it covers {stated} bytes, {len} were announced")));
        }
        if slice == 0 || address == 0 || address.checked_add(len).is_none() {
            return Err(input.wrong(&format!("{len} bytes at {address:#x} in slices of {slice} cannot be")));
        }
        let metadata = input.metadata(&owner)?;
        Ok(Self { name: owner, kind, device, address, len, slice, metadata })
    }
}

fn kind_byte(kind: MemType) -> u8 {
    u8::from(kind == MemType::Vram)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// What is left of a message.
struct Input<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Input<'a> {
    fn wrong(&self, why: &str) -> Error {
        Error::failed(ErrorCode::Protocol, format!("the peer's nixl {} is not valid: {why}", self.what))
    }
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.wrong("it is cut short"))?;
        self.rest = rest;
        Ok(head)
    }
    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }
    fn version(&mut self) -> Result<()> {
        match self.byte()? {
            VERSION => Ok(()),
            other => Err(self.wrong(&format!("version {other} is not {VERSION}"))),
        }
    }
    fn number(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(bytes))
    }
    fn text(&mut self) -> Result<String> {
        let len = usize::from(self.byte()?) | usize::from(self.byte()?) << 8;
        if len == 0 || len > MAX_NAME {
            return Err(self.wrong(&format!("a name of {len} bytes; 1 to {MAX_NAME} are allowed")));
        }
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| self.wrong("a name is not UTF-8"))?;
        if text.contains('\0') {
            return Err(self.wrong("a name contains a zero byte"));
        }
        Ok(text.to_owned())
    }
    /// The rest, which must be metadata of the agent called `name`.
    fn metadata(&mut self, name: &str) -> Result<Vec<u8>> {
        let metadata = std::mem::take(&mut self.rest);
        if metadata.is_empty() || metadata.len() > MAX_METADATA {
            return Err(
                self.wrong(&format!("{} bytes of metadata; 1 to {MAX_METADATA} are allowed", metadata.len()))
            );
        }
        // A later NIXL may write it differently; then NIXL's own parser decides, and the name is compared after loading.
        if let Some(rest) = metadata.strip_prefix(METADATA_HEAD) {
            let spoken_for = rest.get(8..8 + name.len());
            let len = rest.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
            if spoken_for != Some(name.as_bytes()) || len != Some(name.len() as u64) {
                return Err(self.wrong(&format!("its metadata does not speak for {name:?}")));
            }
        }
        Ok(metadata.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn metadata(name: &str) -> Vec<u8> {
        let mut out = METADATA_HEAD.to_vec();
        out.extend_from_slice(&(name.len() as u64).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"|Conns");
        out
    }

    fn ticket() -> Ticket {
        Ticket {
            name: "decoder/7".into(),
            kind: MemType::Dram,
            device: 0,
            address: 0x7f00_0000_0000,
            len: 1 << 20,
            slice: 1 << 30,
            metadata: metadata("decoder/7"),
        }
    }

    #[test]
    fn both_come_back_as_they_were() {
        let offer = Offer { name: "decoder/7".into(), rdma: true, metadata: metadata("decoder/7") };
        assert_eq!(Offer::decode(&offer.encode()).expect("valid"), offer);
        assert_eq!(Ticket::decode(&ticket().encode(), 1 << 20, "decoder/7").expect("valid"), ticket());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_values() {
        let says = |bytes: &[u8], len, name: &str| {
            let e = Ticket::decode(bytes, len, name).expect_err("refused");
            assert_eq!(e.code(), ErrorCode::Protocol);
            e.to_string()
        };
        let good = ticket().encode();
        assert!(says(&good, 4096, "decoder/7").contains("4096 were announced"));
        assert!(says(&good, 1 << 20, "other/7").contains("other/7"));
        let foreign = Ticket { metadata: metadata("victim/9"), ..ticket() }.encode();
        assert!(says(&foreign, 1 << 20, "decoder/7").contains("does not speak for"));
        let wrapping = Ticket { address: u64::MAX - 10, ..ticket() }.encode();
        assert!(says(&wrapping, 1 << 20, "decoder/7").contains("cannot be"));
        assert!(says(&[9], 1, "x").contains("version 9"));
        for cut in 0..good.len() - metadata("decoder/7").len() {
            assert!(says(&good[..cut], 1 << 20, "decoder/7").contains("not valid"));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200), len in any::<u64>()) {
            let _ = Offer::decode(&bytes);
            let _ = Ticket::decode(&bytes, len, "decoder/7");
        }
    }
}
