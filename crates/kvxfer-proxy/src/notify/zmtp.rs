//! The reading side of [`kvxfer_proto::zmtp`], as a PULL socket needs it.

use bytes::{Buf, Bytes, BytesMut};
use kvxfer_proto::notify::MAX_MESSAGE;
use kvxfer_proto::zmtp::{
    COMMAND, GREETING, LONG, MAX_COMMAND, MORE, check_greeting, greeting, parse_ready, ready,
};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Largest frame that is read and skipped; a longer one ends the connection.
const MAX_SKIPPED: u64 = 1 << 20;
/// Most parts of a message.
const MAX_PARTS: u32 = 64;

/// What was received.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// One frame.
    Single(Bytes),
    /// Several frames, which no notification has.
    Parts(u32),
    /// One frame, larger than any notification.
    TooLarge(u64),
}

/// The receiving end of one connection.
pub(super) struct Pull {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Pull {
    /// Greets a peer, which must be a PUSH socket.
    pub(super) async fn accept(mut stream: TcpStream) -> io::Result<Self> {
        stream.write_all(&greeting()).await?;
        let mut pull = Self { stream, buffer: BytesMut::with_capacity(512) };
        pull.fill(GREETING).await?;
        let mut theirs = [0; GREETING];
        pull.buffer.copy_to_slice(&mut theirs);
        check_greeting(&theirs).map_err(|e| bad(&e))?;
        // Engines of ours are told that failures are understood here.
        pull.stream.write_all(&ready("PULL", true)).await?;
        let (flags, len) = pull.header().await?.ok_or_else(cut_off)?;
        if flags & COMMAND == 0 || len > MAX_COMMAND {
            return Err(bad("no READY command after the greeting"));
        }
        pull.fill(len as usize).await?;
        let command = pull.buffer.split_to(len as usize);
        let kind = parse_ready(&command).map_err(|e| bad(&e))?.socket_type;
        if kind != "PUSH" {
            return Err(bad(&format!("a {kind} socket; this one talks to PUSH")));
        }
        Ok(pull)
    }

    /// The next message; `None` when the peer has closed.
    pub(super) async fn next(&mut self) -> io::Result<Option<Message>> {
        let mut parts = 0;
        let mut single = None;
        loop {
            let Some((flags, len)) = self.header().await? else {
                return if parts == 0 { Ok(None) } else { Err(cut_off()) };
            };
            if flags & COMMAND != 0 {
                self.command(len).await?;
                continue;
            }
            parts += 1;
            let more = flags & MORE != 0;
            if parts > MAX_PARTS {
                return Err(bad("a message of too many parts"));
            }
            if len > MAX_MESSAGE as u64 {
                self.skip(len).await?;
                if parts == 1 && !more {
                    return Ok(Some(Message::TooLarge(len)));
                }
            } else {
                self.fill(len as usize).await?;
                let frame = self.buffer.split_to(len as usize);
                if parts == 1 {
                    single = Some(frame);
                }
            }
            if !more {
                return Ok(Some(match (parts, single) {
                    (1, Some(frame)) => Message::Single(frame.freeze()),
                    _ => Message::Parts(parts),
                }));
            }
        }
    }

    /// Answers a heartbeat, skips every other command.
    async fn command(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_COMMAND {
            return Err(bad("a command of more than 4096 bytes"));
        }
        self.fill(len as usize).await?;
        let body = self.buffer.split_to(len as usize);
        // `PING`, two bytes of time to live, up to 16 bytes of context that come back.
        if let Some(rest) = body.strip_prefix(b"\x04PING")
            && let Some(context) = rest.get(2..)
            && context.len() <= 16
        {
            let mut pong = vec![COMMAND, 5 + context.len() as u8];
            pong.extend_from_slice(b"\x04PONG");
            pong.extend_from_slice(context);
            self.stream.write_all(&pong).await?;
        }
        Ok(())
    }

    /// Flags and length of the next frame; `None` when the peer has closed between two frames.
    async fn header(&mut self) -> io::Result<Option<(u8, u64)>> {
        if self.buffer.is_empty() && self.read().await? == 0 {
            return Ok(None);
        }
        let flags = self.buffer[0];
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(bad("a frame with unknown flags"));
        }
        let wide = if flags & LONG == 0 { 1 } else { 8 };
        self.fill(1 + wide).await?;
        let len = match wide {
            1 => u64::from(self.buffer[1]),
            _ => (&self.buffer[1..9]).get_u64(),
        };
        self.buffer.advance(1 + wide);
        Ok(Some((flags, len)))
    }

    async fn skip(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(bad(&format!("a frame of {len} bytes")));
        }
        let mut left = len as usize;
        loop {
            let here = left.min(self.buffer.len());
            self.buffer.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            if self.read().await? == 0 {
                return Err(cut_off());
            }
        }
    }

    async fn fill(&mut self, len: usize) -> io::Result<()> {
        while self.buffer.len() < len {
            if self.read().await? == 0 {
                return Err(cut_off());
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> io::Result<usize> {
        self.buffer.reserve(512);
        self.stream.read_buf(&mut self.buffer).await
    }
}

fn bad(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed inside a message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;
    use zeromq::{PushSocket, Socket as _, SocketSend as _};

    async fn pair() -> (tokio::task::JoinHandle<io::Result<Pull>>, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let at = listener.local_addr().expect("bound");
        let pull = tokio::spawn(async move { Pull::accept(listener.accept().await?.0).await });
        (pull, at)
    }

    #[tokio::test]
    async fn another_implementations_push_socket_is_understood() {
        let (pull, at) = pair().await;
        let mut push = PushSocket::new();
        push.connect(&format!("tcp://{at}")).await.expect("connected");
        let mut pull = pull.await.expect("no panic").expect("greeted");
        let big = vec![7; MAX_MESSAGE];
        for bytes in [b"one".to_vec(), Vec::new(), big.clone(), vec![1; MAX_MESSAGE + 1], b"last".to_vec()] {
            push.send(bytes.into()).await.expect("sent");
        }
        let mut parts = zeromq::ZmqMessage::from(b"a".to_vec());
        parts.push_back(b"b".to_vec().into());
        push.send(parts).await.expect("sent");
        let mut seen = Vec::new();
        for _ in 0..6 {
            seen.push(pull.next().await.expect("readable").expect("open"));
        }
        assert_eq!(
            seen,
            [
                Message::Single(Bytes::from_static(b"one")),
                Message::Single(Bytes::new()),
                Message::Single(big.into()),
                Message::TooLarge(MAX_MESSAGE as u64 + 1),
                Message::Single(Bytes::from_static(b"last")),
                Message::Parts(2),
            ]
        );
        push.close().await;
        assert_eq!(pull.next().await.expect("readable"), None);
    }

    async fn say(bytes: Vec<u8>) -> io::Result<Option<Message>> {
        let (pull, at) = pair().await;
        let mut peer = TcpStream::connect(at).await.expect("connected");
        // A refused peer may be gone before it has said everything.
        let _ = peer.write_all(&bytes).await;
        let _ = peer.shutdown().await;
        pull.await.expect("no panic")?.next().await
    }

    #[tokio::test]
    async fn whoever_is_no_push_socket_is_told_apart() {
        let hello = |kind: &str| [greeting().to_vec(), ready(kind, false)].concat();
        let mut curve = hello("PUSH");
        curve[12..17].copy_from_slice(b"CURVE");
        let mut old = hello("PUSH");
        old[10] = 1;
        let cases = [
            (
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a browser of some kind or other\r\n\r\n"
                    .to_vec(),
                "not a ZeroMQ peer",
            ),
            (curve, "CURVE"),
            (old, "older"),
            (hello("DEALER"), "DEALER"),
            (greeting()[..40].to_vec(), "closed inside"),
            (
                [greeting().to_vec(), vec![COMMAND | LONG, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]]
                    .concat(),
                "READY",
            ),
            ([greeting().to_vec(), b"\x04\x0b\x05READY\xffabcd".to_vec()].concat(), "damaged"),
            // A frame of an exabyte is refused before a byte of it is waited for.
            ([hello("PUSH"), vec![LONG, 0x10, 0, 0, 0, 0, 0, 0, 0]].concat(), "a frame of"),
            ([hello("PUSH"), vec![0xf0, 1, 0]].concat(), "unknown flags"),
            ([hello("PUSH"), vec![0, 5, 1]].concat(), "closed inside"),
            ([hello("PUSH"), [MORE, 0].repeat(70)].concat(), "too many parts"),
        ];
        for (bytes, says) in cases {
            let problem = say(bytes).await.expect_err("refused").to_string();
            assert!(problem.contains(says), "{problem:?} should say {says:?}");
        }
    }

    #[tokio::test]
    async fn heartbeats_are_answered() {
        let (pull, at) = pair().await;
        let mut peer = TcpStream::connect(at).await.expect("connected");
        peer.write_all(&[greeting().to_vec(), ready("PUSH", false)].concat()).await.expect("sent");
        peer.write_all(b"\x04\x0a\x04PING\x00\x10abc\x00\x01x").await.expect("sent");
        let mut pull = pull.await.expect("no panic").expect("greeted");
        assert_eq!(pull.next().await.expect("readable"), Some(Message::Single(Bytes::from_static(b"x"))));
        let mut answer = vec![0; 64 + ready("PULL", true).len() + 10];
        peer.read_exact(&mut answer).await.expect("answered");
        assert!(answer.ends_with(b"\x04\x08\x04PONGabc"));
    }
}
