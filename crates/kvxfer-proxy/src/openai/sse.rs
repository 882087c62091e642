//! Server-sent events, read piece by piece as the network delivers them, and written.
//!
//! The reader follows the WHATWG grammar: lines end with LF, CR or CRLF, a byte-order mark may come first, lines that
//! begin with a colon are comments, several `data` lines make one event's data joined by LF, and an event without
//! data is dropped. What it holds back is bounded.

use bytes::{Buf, Bytes, BytesMut};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The `event` field; empty when there was none.
    pub name: Bytes,
    /// The `data` lines, joined by LF.
    pub data: Bytes,
}

/// Why a stream cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// An event is larger than the reader was told to hold.
    #[error("an event of more than {limit} bytes; the engine's stream is not what it should be")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The stream ended inside an event.
    #[error("the stream ended inside an event")]
    CutOff,
}

/// An incremental reader of events. Feed it with [`push`](Self::push), take events with [`next`](Self::next) until it
/// gives `None`, and call [`finish`](Self::finish) when the stream has ended.
#[derive(Debug)]
pub struct SseReader {
    buffer: BytesMut,
    /// Bytes of `buffer` already searched for a line's end.
    searched: usize,
    /// The last line ended with CR, so an LF that follows belongs to it.
    after_cr: bool,
    at_start: bool,
    name: Bytes,
    data: Option<Bytes>,
    /// Second and later data lines of one event, joined.
    joined: BytesMut,
    limit: usize,
}

impl SseReader {
    /// A reader that refuses events of more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            searched: 0,
            after_cr: false,
            at_start: true,
            name: Bytes::new(),
            data: None,
            joined: BytesMut::new(),
            limit,
        }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete event. After an error the reader must not be used again.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would end at the first None; this one goes on"
    )]
    pub fn next(&mut self) -> Result<Option<Event>, SseError> {
        while let Some(line) = self.next_line() {
            if line.is_empty() {
                if let Some(event) = self.dispatch() {
                    return Ok(Some(event));
                }
            } else {
                // The same line is refused whether it came at once or in pieces.
                self.check(line.len())?;
                self.field(&line);
            }
        }
        self.check(self.buffer.len())?;
        Ok(None)
    }

    /// The stream has ended: an error when it ended inside an event.
    pub fn finish(&self) -> Result<(), SseError> {
        let pending = self.buffer.iter().any(|b| *b != b'\n' && *b != b'\r');
        if self.data.is_some() || pending { Err(SseError::CutOff) } else { Ok(()) }
    }

    fn check(&self, waiting: usize) -> Result<(), SseError> {
        let held = self.data.as_ref().map_or(0, Bytes::len) + self.joined.len() + self.name.len() + waiting;
        if held > self.limit { Err(SseError::TooLarge { limit: self.limit }) } else { Ok(()) }
    }

    /// The next line without its end.
    fn next_line(&mut self) -> Option<Bytes> {
        if self.at_start && !self.skip_mark() {
            return None;
        }
        if self.after_cr && !self.buffer.is_empty() {
            self.after_cr = false;
            if self.buffer[0] == b'\n' {
                self.buffer.advance(1);
                self.searched = self.searched.saturating_sub(1);
            }
        }
        let at = self.buffer[self.searched..].iter().position(|b| *b == b'\n' || *b == b'\r');
        let Some(at) = at.map(|at| at + self.searched) else {
            self.searched = self.buffer.len();
            return None;
        };
        self.after_cr = self.buffer[at] == b'\r';
        let line = self.buffer.split_to(at).freeze();
        self.buffer.advance(1);
        self.searched = 0;
        Some(line)
    }

    /// Drops a byte-order mark; false while it may still be arriving.
    fn skip_mark(&mut self) -> bool {
        const MARK: &[u8] = b"\xef\xbb\xbf";
        if self.buffer.starts_with(MARK) {
            self.buffer.advance(MARK.len());
        } else if self.buffer.len() < MARK.len() && MARK.starts_with(&self.buffer) {
            return false;
        }
        self.at_start = false;
        true
    }

    fn field(&mut self, line: &Bytes) {
        let colon = line.iter().position(|b| *b == b':').unwrap_or(line.len());
        let mut value = line.slice((colon + 1).min(line.len())..);
        if value.first() == Some(&b' ') {
            value.advance(1);
        }
        match &line[..colon] {
            b"data" => match &self.data {
                None => self.data = Some(value),
                Some(first) => {
                    if self.joined.is_empty() {
                        self.joined.extend_from_slice(first);
                    }
                    self.joined.extend_from_slice(b"\n");
                    self.joined.extend_from_slice(&value);
                }
            },
            b"event" => self.name = value,
            // Comments, ids and reconnection times mean nothing between two servers.
            _ => {}
        }
    }

    fn dispatch(&mut self) -> Option<Event> {
        let name = std::mem::take(&mut self.name);
        let data = self.data.take()?;
        let data = if self.joined.is_empty() { data } else { self.joined.split().freeze() };
        // `data:` alone is an empty string, which the grammar drops.
        (!data.is_empty()).then_some(Event { name, data })
    }
}

/// Appends one event to a stream. `data` must not hold a line's end, which JSON on one line never does.
pub fn write_event(out: &mut Vec<u8>, data: &[u8]) {
    out.reserve(data.len() + 8);
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
}
