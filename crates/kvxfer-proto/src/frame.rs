//! Frames of a control connection: cutting a byte stream into messages without trusting it.
//!
//! A frame is a little-endian `u32` length and that many bytes. [`Decoder`] is fed whatever the socket gave and hands
//! out whole frames; a length beyond its limit is an error at once, before anything of that frame is kept, so memory
//! is bounded by the limit. Before authentication the limit is [`MAX_FRAME_BEFORE_AUTH`].

use crate::wire::{self, Message};

/// First bytes of a control connection.
pub const PREAMBLE_CONTROL: [u8; 8] = *b"KVXFER\0C";
/// First bytes of a data connection; 16 bytes of session and a little-endian `u16` lane follow.
pub const PREAMBLE_DATA: [u8; 8] = *b"KVXFER\0D";
/// Bytes of a data connection's preamble with session and lane.
pub const PREAMBLE_DATA_LEN: usize = 8 + 16 + 2;
/// Largest frame of a peer that has not yet proved who it is.
pub const MAX_FRAME_BEFORE_AUTH: usize = 64 << 10;

/// A frame cannot be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length prefix exceeds the limit.
    #[error("a frame of {len} bytes was announced; at most {limit} are allowed here")]
    TooLarge {
        /// As announced, or as encoded.
        len: u64,
        /// The limit at this point of the conversation.
        limit: usize,
    },
    /// The payload is no message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    limit: usize,
}

impl Decoder {
    /// Refuses frames of more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, limit }
    }

    /// Changes the limit for frames not yet handed out.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes bytes as they came. Call [`Decoder::next_frame`] until `None` before the next push to stay within the limit.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && (self.start == self.buffer.len() || self.start > 64 << 10) {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame's payload, if it has arrived.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((prefix, body)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(*prefix) as usize;
        if len > self.limit {
            return Err(FrameError::TooLarge { len: len as u64, limit: self.limit });
        }
        if body.len() < len {
            return Ok(None);
        }
        let from = self.start + 4;
        self.start = from + len;
        Ok(Some(&self.buffer[from..from + len]))
    }

    /// The next whole message, if it has arrived.
    pub fn next_message(&mut self) -> Result<Option<Message>, FrameError> {
        self.next_frame()?.map(decode).transpose()
    }

    /// Bytes kept that no frame has been made of yet.
    pub fn buffered(&self) -> usize {
        self.buffer.len() - self.start
    }
}

/// A message as a frame, length prefix included.
pub fn encode(message: &Message) -> Result<Vec<u8>, FrameError> {
    let body = wire::encode(message).map_err(|e| FrameError::Malformed(e.to_string()))?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// A frame's payload as a message.
pub fn decode(payload: &[u8]) -> Result<Message, FrameError> {
    wire::decode(payload).map_err(|e| FrameError::Malformed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::MAX_FRAME;
    use proptest::prelude::*;

    fn ping(nonce: u64) -> Message {
        Message::Ping { nonce }
    }

    #[test]
    fn a_huge_length_is_refused_before_its_bytes_arrive() {
        let mut d = Decoder::new(MAX_FRAME_BEFORE_AUTH);
        d.push(&u32::MAX.to_le_bytes());
        assert_eq!(
            d.next_frame(),
            Err(FrameError::TooLarge { len: u64::from(u32::MAX), limit: MAX_FRAME_BEFORE_AUTH })
        );
    }

    #[test]
    fn a_truncated_frame_is_not_handed_out() {
        let frame = encode(&ping(7)).unwrap();
        let mut d = Decoder::new(MAX_FRAME);
        d.push(&frame[..frame.len() - 1]);
        assert_eq!(d.next_message(), Ok(None));
        d.push(&frame[frame.len() - 1..]);
        assert_eq!(d.next_message(), Ok(Some(ping(7))));
        assert_eq!(d.buffered(), 0);
    }

    #[test]
    fn bytes_after_the_message_are_an_error() {
        let mut frame = encode(&ping(1)).unwrap();
        frame.push(0);
        assert!(matches!(decode(&frame[4..]), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn memory_stays_bounded_over_many_frames() {
        let mut d = Decoder::new(MAX_FRAME);
        let frame = encode(&Message::Notify { payload: vec![3; 4000] }).unwrap();
        for _ in 0..10_000 {
            d.push(&frame);
            assert!(d.next_message().unwrap().is_some());
        }
        assert!(d.buffer.capacity() < 1 << 20, "{}", d.buffer.capacity());
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_messages(nonces in prop::collection::vec(any::<u64>(), 1..20), step in 1usize..50) {
            let bytes: Vec<u8> = nonces.iter().flat_map(|n| encode(&ping(*n)).unwrap()).collect();
            let mut d = Decoder::new(1024);
            let mut got = Vec::new();
            for part in bytes.chunks(step) {
                d.push(part);
                while let Some(m) = d.next_message().unwrap() { got.push(m); }
            }
            prop_assert_eq!(got, nonces.into_iter().map(ping).collect::<Vec<_>>());
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut d = Decoder::new(1024);
            d.push(&bytes);
            while let Ok(Some(_)) = d.next_message() {}
            let _ = decode(&bytes);
        }
    }
}
