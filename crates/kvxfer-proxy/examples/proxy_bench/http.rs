//! As much HTTP/1.1 as the benchmark needs, and no more, so that its own work stays small next to the proxies'.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest head or line of a chunk.
const MOST_HEAD: usize = 64 << 10;

/// One connection, at either end.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were used up.
    used: usize,
}

/// The head of a message.
#[derive(Debug)]
pub(crate) struct Head {
    /// `POST /path HTTP/1.1` or `HTTP/1.1 200 OK`.
    pub(crate) line: String,
    length: Option<usize>,
    chunked: bool,
}

impl Head {
    /// The second word: a request's path, an answer's status.
    pub(crate) fn second(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or("")
    }
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096), used: 0 })
    }

    /// Writes all of it at once.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next message's head; `None` when the other side has closed before it.
    pub(crate) async fn head(&mut self) -> std::io::Result<Option<Head>> {
        let end = loop {
            if let Some(at) = find(self.rest(), b"\r\n\r\n") {
                break at;
            }
            if self.rest().len() > MOST_HEAD {
                return Err(bad("a head without end"));
            }
            if self.more().await? == 0 {
                return if self.rest().is_empty() {
                    Ok(None)
                } else {
                    Err(bad("the connection ended inside a head"))
                };
            }
        };
        let text = String::from_utf8_lossy(&self.rest()[..end]);
        let mut lines = text.split("\r\n");
        let mut head = Head { line: lines.next().unwrap_or("").to_owned(), length: None, chunked: false };
        for line in lines {
            let Some((name, value)) = line.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                head.length = value.trim().parse().ok();
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                head.chunked = value.trim().eq_ignore_ascii_case("chunked");
            }
        }
        self.used += end + 4;
        Ok(Some(head))
    }

    /// The body, piece by piece as it comes.
    pub(crate) async fn body(&mut self, head: &Head, mut piece: impl FnMut(&[u8])) -> std::io::Result<()> {
        if !head.chunked {
            return self.take(head.length.unwrap_or(0), &mut piece).await;
        }
        loop {
            let line = self.line().await?;
            let length =
                usize::from_str_radix(line.trim(), 16).map_err(|_| bad("a chunk without a length"))?;
            self.take(length, &mut piece).await?;
            self.line().await?;
            if length == 0 {
                return Ok(());
            }
        }
    }

    async fn take(&mut self, mut length: usize, piece: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
        while length > 0 {
            if self.rest().is_empty() && self.more().await? == 0 {
                return Err(bad("the connection ended inside a body"));
            }
            let part = self.rest().len().min(length);
            piece(&self.buffer[self.used..self.used + part]);
            self.used += part;
            length -= part;
        }
        Ok(())
    }

    async fn line(&mut self) -> std::io::Result<String> {
        loop {
            if let Some(at) = find(self.rest(), b"\r\n") {
                let line = String::from_utf8_lossy(&self.rest()[..at]).into_owned();
                self.used += at + 2;
                return Ok(line);
            }
            if self.rest().len() > MOST_HEAD || self.more().await? == 0 {
                return Err(bad("a line without end"));
            }
        }
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    async fn more(&mut self) -> std::io::Result<usize> {
        self.buffer.drain(..self.used);
        self.used = 0;
        self.stream.read_buf(&mut self.buffer).await
    }
}

/// Where `part` begins in `whole`.
pub(crate) fn find(whole: &[u8], part: &[u8]) -> Option<usize> {
    let first = *part.first()?;
    let mut from = 0;
    while let Some(at) = whole.get(from..)?.iter().position(|b| *b == first) {
        from += at;
        if whole[from..].starts_with(part) {
            return Some(from);
        }
        from += 1;
    }
    None
}

pub(crate) fn bad(what: &str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, what)
}
