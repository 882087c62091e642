//! What travels on a data connection: preamble, frames, offers and tickets. Pure: bytes in, values out.
//!
//! A connection starts with a [`PREAMBLE_LEN`]-byte preamble from the side that opened it; after that both sides
//! send frames. A frame is a fixed [`Header`], a table (pieces or acknowledgements), the payload and, when the
//! transfer is checked, an 8-byte digest behind the payload. The header's check covers header and table, so no
//! byte is placed by a damaged table. All numbers are little-endian.
//!
//! | kind | table | payload | answered by |
//! |---|---|---|---|
//! | `Write` | remote pieces | their bytes | one acknowledgement |
//! | `Read` | remote pieces | none | one `Data` frame with the same job and number |
//! | `Data` | none | the bytes asked for, or none and a code | nothing |
//! | `Ack` | acknowledgements, in the order the writes came | none | nothing |

use kvxfer_proto::{ErrorCode, Integrity, RegionId};
use std::net::{IpAddr, SocketAddr};

/// First four bytes of every frame; the last one is the version.
pub const MAGIC: u32 = u32::from_le_bytes(*b"KVX1");
/// Bytes of an encoded [`Header`].
pub const HEADER_LEN: usize = 56;
/// Most pieces in one frame.
pub const MAX_PIECES: usize = 512;
/// Bytes of one entry of a piece table.
pub const PIECE_LEN: usize = 12;
/// Most acknowledgements in one frame.
pub const MAX_ACKS: usize = 256;
/// Bytes of one acknowledgement.
pub const ACK_LEN: usize = 16;
/// Largest table, in bytes.
pub const MAX_TABLE: usize = MAX_PIECES * PIECE_LEN;
/// Largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: u32 = 16 << 20;
/// Bytes of the digest behind the payload.
pub const DIGEST_LEN: usize = 8;
/// First bytes of a data connection.
pub const PREAMBLE_TAG: [u8; 8] = *b"KVXFER\0D";
/// Bytes of the preamble: tag, session, lane.
pub const PREAMBLE_LEN: usize = 26;

const _: () = assert!(MAX_ACKS * ACK_LEN <= MAX_TABLE);

/// Why bytes are not a frame. The connection they came on is unusable afterwards.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Other first bytes.
    #[error("frame starts with {0:#010x}, expected {MAGIC:#010x} (another version, or not a kvxfer peer)")]
    Magic(u32),
    /// The header's check does not match.
    #[error("frame header or table is damaged: check {found:#018x}, expected {expected:#018x}")]
    Check {
        /// In the frame.
        found: u64,
        /// Computed.
        expected: u64,
    },
    /// A field has a value that is not allowed.
    #[error("{field} is {value}, allowed is {allowed}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        allowed: &'static str,
    },
    /// The input ends too early.
    #[error("{what} needs {need} bytes, {have} are there")]
    Truncated {
        /// Of what.
        what: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes present.
        have: usize,
    },
}

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes for the receiver's memory.
    Write = 1,
    /// Outcomes of writes.
    Ack = 2,
    /// A request for bytes of the receiver's memory.
    Read = 3,
    /// The answer to a `Read`.
    Data = 4,
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Kind of frame.
    pub kind: Kind,
    /// Level of the check behind the payload.
    pub integrity: Integrity,
    /// Outcome, in a `Data` frame; otherwise `Ok`.
    pub code: ErrorCode,
    /// Number of the job on this link, chosen by the side that submitted it.
    pub job: u64,
    /// Number of the frame within the job.
    pub seq: u32,
    /// Entries in the table.
    pub count: u32,
    /// Payload bytes; in a `Read`, the bytes asked for.
    pub payload: u32,
    /// Region at the receiver of a `Write` or `Read`.
    pub region: RegionId,
    /// Proof that the region was given to this peer: from its ticket.
    pub capability: u64,
}

/// One entry of a piece table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TablePiece {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// Outcome of one `Write` frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// From the frame.
    pub job: u64,
    /// From the frame.
    pub seq: u32,
    /// How it went.
    pub code: ErrorCode,
}

impl Header {
    /// Bytes of the table that follows.
    pub fn table_len(&self) -> usize {
        self.count as usize * if self.kind == Kind::Ack { ACK_LEN } else { PIECE_LEN }
    }
    /// Payload bytes that follow the table on the wire.
    pub fn wire_payload(&self) -> usize {
        if matches!(self.kind, Kind::Write | Kind::Data) { self.payload as usize } else { 0 }
    }
    /// Digest bytes that follow the payload.
    pub fn digest_len(&self) -> usize {
        if self.wire_payload() > 0 && self.integrity != Integrity::Off { DIGEST_LEN } else { 0 }
    }

    /// Appends header and table to `out` and returns the check, to which the payload's digest is bound.
    pub fn encode(&self, table: &[u8], out: &mut Vec<u8>) -> u64 {
        debug_assert_eq!(table.len(), self.table_len());
        let start = out.len();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.push(self.kind as u8);
        out.push(self.integrity as u8);
        out.extend_from_slice(&u16::from(self.code).to_le_bytes());
        out.extend_from_slice(&self.job.to_le_bytes());
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.payload.to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&self.region.0.to_le_bytes());
        out.extend_from_slice(&self.capability.to_le_bytes());
        let check = header_check(&out[start..], table);
        out.extend_from_slice(&check.to_le_bytes());
        out.extend_from_slice(table);
        check
    }

    /// Reads the fixed part and checks every field against its limits. The check is verified once the table is
    /// there, by [`verify`].
    pub fn decode(b: &[u8; HEADER_LEN]) -> Result<(Self, u64), FrameError> {
        let magic = u32_at(b, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let bad = |field, value: u64, allowed| Err(FrameError::Field { field, value, allowed });
        let kind = match b[4] {
            1 => Kind::Write,
            2 => Kind::Ack,
            3 => Kind::Read,
            4 => Kind::Data,
            n => return bad("frame kind", n.into(), "1 to 4"),
        };
        let integrity = match b[5] {
            0 => Integrity::Off,
            1 => Integrity::Bound,
            2 => Integrity::Full,
            n => return bad("integrity level", n.into(), "0 to 2"),
        };
        let header = Self {
            kind,
            integrity,
            code: ErrorCode::from(u16::from_le_bytes([b[6], b[7]])),
            job: u64_at(b, 8),
            seq: u32_at(b, 16),
            count: u32_at(b, 20),
            payload: u32_at(b, 24),
            region: RegionId(u64_at(b, 32)),
            capability: u64_at(b, 40),
        };
        let (count, payload) = (header.count, header.payload);
        if u32_at(b, 28) != 0 {
            return bad("reserved field", u32_at(b, 28).into(), "0");
        }
        if payload > MAX_PAYLOAD {
            return bad("payload length", payload.into(), "at most 16 MiB");
        }
        match kind {
            Kind::Write | Kind::Read => {
                if count == 0 || count as usize > MAX_PIECES {
                    return bad("piece count", count.into(), "1 to 512");
                }
                if payload == 0 {
                    return bad("payload length", 0, "at least 1");
                }
            }
            Kind::Ack => {
                if count == 0 || count as usize > MAX_ACKS {
                    return bad("acknowledgement count", count.into(), "1 to 256");
                }
                if payload != 0 {
                    return bad("payload length of an acknowledgement", payload.into(), "0");
                }
            }
            Kind::Data => {
                if count != 0 {
                    return bad("piece count of a data frame", count.into(), "0");
                }
                if (payload == 0) == (header.code == ErrorCode::Ok) {
                    return bad(
                        "payload length of a data frame",
                        payload.into(),
                        "0 exactly with an error code",
                    );
                }
            }
        }
        if kind != Kind::Data && header.code != ErrorCode::Ok {
            return bad("code", u16::from(header.code).into(), "0 outside data frames");
        }
        if !matches!(kind, Kind::Write | Kind::Read) && (header.region.0 | header.capability) != 0 {
            return bad("region of an answer", header.region.0, "0");
        }
        Ok((header, u64_at(b, 48)))
    }
}

/// Compares the check of a header with the one computed over it and its table.
pub fn verify(header: &[u8; HEADER_LEN], table: &[u8]) -> Result<(), FrameError> {
    let (found, expected) = (u64_at(header, 48), header_check(&header[..48], table));
    if found == expected { Ok(()) } else { Err(FrameError::Check { found, expected }) }
}

fn header_check(fixed: &[u8], table: &[u8]) -> u64 {
    let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    crc.update(fixed);
    crc.update(table);
    crc.finalize()
}

/// Appends one entry to a piece table.
pub fn push_piece(table: &mut Vec<u8>, piece: TablePiece) {
    table.extend_from_slice(&piece.offset.to_le_bytes());
    table.extend_from_slice(&piece.len.to_le_bytes());
}

/// Reads a piece table; `payload` is what the lengths must add up to.
pub fn decode_pieces(table: &[u8], payload: u32) -> Result<Vec<TablePiece>, FrameError> {
    let mut sum = 0u64;
    let mut pieces = Vec::with_capacity(table.len() / PIECE_LEN);
    for entry in table.chunks_exact(PIECE_LEN) {
        let piece = TablePiece { offset: u64_at(entry, 0), len: u32_at(entry, 8) };
        if piece.len == 0 {
            return Err(FrameError::Field { field: "piece length", value: 0, allowed: "at least 1" });
        }
        sum += u64::from(piece.len);
        pieces.push(piece);
    }
    if sum != u64::from(payload) {
        return Err(FrameError::Field {
            field: "sum of the piece lengths",
            value: sum,
            allowed: "the payload length",
        });
    }
    Ok(pieces)
}

/// Appends one acknowledgement to a table.
pub fn push_ack(table: &mut Vec<u8>, ack: Ack) {
    table.extend_from_slice(&ack.job.to_le_bytes());
    table.extend_from_slice(&ack.seq.to_le_bytes());
    table.extend_from_slice(&u32::from(u16::from(ack.code)).to_le_bytes());
}

/// Reads a table of acknowledgements.
pub fn decode_acks(table: &[u8]) -> impl Iterator<Item = Ack> {
    table.chunks_exact(ACK_LEN).map(|e| Ack {
        job: u64_at(e, 0),
        seq: u32_at(e, 8),
        code: ErrorCode::from(u16::try_from(u32_at(e, 12)).unwrap_or(u16::MAX)),
    })
}

/// Walks a byte stream as a receiver would and returns how many complete frames it holds. For fuzzing and tools;
/// an incomplete last frame is not an error.
pub fn walk(mut input: &[u8]) -> Result<usize, FrameError> {
    let mut frames = 0;
    while let Some((fixed, rest)) = input.split_first_chunk::<HEADER_LEN>() {
        let (header, _) = Header::decode(fixed)?;
        let Some((table, rest)) = rest.split_at_checked(header.table_len()) else { break };
        verify(fixed, table)?;
        match header.kind {
            Kind::Write | Kind::Read => drop(decode_pieces(table, header.payload)?),
            Kind::Ack => decode_acks(table).for_each(drop),
            Kind::Data => {}
        }
        let Some(rest) = rest.get(header.wire_payload() + header.digest_len()..) else { break };
        input = rest;
        frames += 1;
    }
    Ok(frames)
}

/// First bytes of a data connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Which peer it belongs to.
    pub session: [u8; 16],
    /// Which of its lanes.
    pub lane: u16,
}

impl Preamble {
    /// As bytes.
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&PREAMBLE_TAG);
        out[8..24].copy_from_slice(&self.session);
        out[24..].copy_from_slice(&self.lane.to_le_bytes());
        out
    }
    /// From bytes.
    pub fn decode(b: &[u8; PREAMBLE_LEN]) -> Result<Self, FrameError> {
        if b[..8] != PREAMBLE_TAG {
            return Err(FrameError::Magic(u32_at(b, 0)));
        }
        let mut session = [0; 16];
        session.copy_from_slice(&b[8..24]);
        Ok(Self { session, lane: u16::from_le_bytes([b[24], b[25]]) })
    }
}

/// Version of offers and tickets.
const VERSION: u8 = 1;
/// Most streams to one peer.
pub const MAX_STREAMS: u16 = 64;

/// Most addresses in an offer.
pub const MAX_ADDRESSES: usize = 16;

/// What one side tells the other before data connections are opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Streams it wants; the smaller number of both is used.
    pub streams: u16,
    /// Where it listens, for a peer whose control connection has no TCP address (a Unix socket).
    pub addresses: Vec<SocketAddr>,
}

impl Offer {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.streams.to_le_bytes());
        out.push(self.addresses.len().min(MAX_ADDRESSES) as u8);
        for a in self.addresses.iter().take(MAX_ADDRESSES) {
            match a.ip() {
                IpAddr::V4(ip) => {
                    out.push(4);
                    out.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    out.push(6);
                    out.extend_from_slice(&ip.octets());
                }
            }
            out.extend_from_slice(&a.port().to_le_bytes());
        }
        out
    }

    /// From bytes; what follows the known fields is ignored.
    pub fn decode(b: &[u8]) -> Result<Self, FrameError> {
        let short = |need| FrameError::Truncated { what: "tcp offer", need, have: b.len() };
        let bad = |field, value: u64, allowed| Err(FrameError::Field { field, value, allowed });
        let Some((&[version, x, y, count], mut rest)) = b.split_first_chunk::<4>() else {
            return Err(short(4));
        };
        let streams = u16::from_le_bytes([x, y]);
        if version != VERSION {
            return bad("tcp offer version", version.into(), "1");
        }
        if streams == 0 || streams > MAX_STREAMS {
            return bad("stream count", streams.into(), "1 to 64");
        }
        if usize::from(count) > MAX_ADDRESSES {
            return bad("address count", count.into(), "at most 16");
        }
        let mut addresses = Vec::new();
        for _ in 0..count {
            let (ip, tail): (IpAddr, &[u8]) = match rest.split_first() {
                Some((4, r)) => {
                    r.split_first_chunk::<4>().map(|(ip, r)| ((*ip).into(), r)).ok_or(short(b.len() + 1))?
                }
                Some((6, r)) => {
                    r.split_first_chunk::<16>().map(|(ip, r)| ((*ip).into(), r)).ok_or(short(b.len() + 1))?
                }
                Some((n, _)) => return bad("address family", (*n).into(), "4 or 6"),
                None => return Err(short(b.len() + 1)),
            };
            let Some((port, tail)) = tail.split_first_chunk::<2>() else { return Err(short(b.len() + 1)) };
            addresses.push(SocketAddr::new(ip, u16::from_le_bytes(*port)));
            rest = tail;
        }
        Ok(Self { streams, addresses })
    }
}

/// What lets a peer reach one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Comes back in every frame that names the region.
    pub capability: u64,
    /// Bytes of the region.
    pub len: u64,
}

impl Ticket {
    /// As bytes.
    pub fn encode(self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.capability.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
        out
    }
    /// From bytes; what follows the known fields is ignored.
    pub fn decode(b: &[u8]) -> Result<Self, FrameError> {
        if b.len() < 17 {
            return Err(FrameError::Truncated { what: "tcp ticket", need: 17, have: b.len() });
        }
        if b[0] != VERSION {
            return Err(FrameError::Field { field: "tcp ticket version", value: b[0].into(), allowed: "1" });
        }
        Ok(Self { capability: u64_at(b, 1), len: u64_at(b, 9) })
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(n)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write_frame(pieces: &[TablePiece]) -> (Header, Vec<u8>) {
        let mut table = Vec::new();
        for p in pieces {
            push_piece(&mut table, *p);
        }
        let header = Header {
            kind: Kind::Write,
            integrity: Integrity::Full,
            code: ErrorCode::Ok,
            job: 7,
            seq: 3,
            count: pieces.len() as u32,
            payload: pieces.iter().map(|p| p.len).sum(),
            region: RegionId(11),
            capability: 0xfeed,
        };
        let mut out = Vec::new();
        header.encode(&table, &mut out);
        (header, out)
    }

    #[test]
    fn a_frame_survives_encoding() {
        let pieces = [TablePiece { offset: 1 << 40, len: 5 }, TablePiece { offset: 0, len: 1 }];
        let (header, mut bytes) = write_frame(&pieces);
        let fixed = bytes.first_chunk::<HEADER_LEN>().unwrap();
        assert_eq!(Header::decode(fixed).unwrap().0, header);
        verify(fixed, &bytes[HEADER_LEN..]).unwrap();
        assert_eq!(decode_pieces(&bytes[HEADER_LEN..], 6).unwrap(), pieces);
        assert_eq!(walk(&bytes), Ok(0), "payload and digest are missing");
        bytes.extend_from_slice(&[0; 6 + DIGEST_LEN]);
        assert_eq!(walk(&bytes), Ok(1));
    }

    #[test]
    fn wire_format_is_fixed() {
        let (_, bytes) = write_frame(&[TablePiece { offset: 0x0102, len: 0x0304 }]);
        let hex = bytes.iter().fold(String::new(), |text, b| format!("{text}{b:02x}"));
        assert_eq!(
            &hex[..96],
            "4b565831010200000700000000000000030000000100000004030000000000000b00000000000000edfe000000000000"
        );
        assert_eq!(&hex[112..], "020100000000000004030000");
        let p = Preamble { session: [9; 16], lane: 2 };
        assert_eq!(Preamble::decode(&p.encode()), Ok(p));
        assert_eq!(&p.encode()[..8], b"KVXFER\0D");
    }

    #[test]
    fn offers_and_tickets_survive_encoding() {
        let offer = Offer {
            streams: 3,
            addresses: vec!["127.0.0.1:80".parse().unwrap(), "[::1]:65535".parse().unwrap()],
        };
        let bytes = offer.encode();
        assert_eq!(Offer::decode(&bytes), Ok(offer));
        for n in 0..bytes.len() {
            assert!(Offer::decode(&bytes[..n]).is_err(), "{n} bytes of {}", bytes.len());
        }
        let ticket = Ticket { capability: 5, len: 6 };
        assert_eq!(Ticket::decode(&ticket.encode()), Ok(ticket));
        assert!(Ticket::decode(&ticket.encode()[..16]).is_err());
    }

    #[test]
    fn limits_are_named() {
        let (_, good) = write_frame(&[TablePiece { offset: 0, len: 1 }]);
        let with = |at: usize, v: &[u8]| {
            let mut b = *good.first_chunk::<HEADER_LEN>().unwrap();
            b[at..at + v.len()].copy_from_slice(v);
            Header::decode(&b).map_or_else(|e| e.to_string(), |_| "accepted".into())
        };
        assert!(with(20, &u32::MAX.to_le_bytes()).contains("piece count is 4294967295"));
        assert!(with(24, &u32::MAX.to_le_bytes()).contains("payload length is 4294967295"));
        assert!(with(4, &[9]).contains("frame kind is 9"));
        assert!(with(5, &[3]).contains("integrity level is 3"));
        assert!(with(28, &[1]).contains("reserved"));
        assert!(with(0, b"HTTP").contains("not a kvxfer peer"));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_header_or_table_is_noticed(bit in 0usize..(HEADER_LEN + PIECE_LEN) * 8) {
            let (_, mut bytes) = write_frame(&[TablePiece { offset: 64, len: 4 }]);
            bytes.extend_from_slice(&[0; 4 + DIGEST_LEN]);
            bytes[bit / 8] ^= 1 << (bit % 8);
            // A larger count or payload makes the frame incomplete; it is never taken for a good one.
            prop_assert_ne!(walk(&bytes), Ok(1));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = walk(&bytes);
            let _ = Offer::decode(&bytes);
            let _ = Ticket::decode(&bytes);
            let mut framed = write_frame(&[TablePiece { offset: 0, len: 1 }]).1;
            framed.extend_from_slice(&bytes);
            let _ = walk(&framed);
        }
    }
}
