//! The raw-socket baseline: as many connections as the `tcp` transport has streams, one thread each, and nothing but the
//! pieces on the wire. Which pieces is agreed before the clock starts.

use super::cases::Pattern;
use super::wire::RawPass;
use crate::Failure;
use kvxfer_core::{Memory, Op, Piece, baseline};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// No call on a raw socket takes longer.
const DEADLINE: Duration = Duration::from_secs(60);
const TOKEN: usize = 64;

/// Serves connections that present `token` until they close. Returns at once.
pub(crate) fn serve(listener: TcpListener, token: String, streams: u16, memory: Arc<Memory>) {
    std::thread::spawn(move || {
        for _ in 0..streams {
            let Ok((stream, _)) = listener.accept() else { return };
            let (token, memory) = (token.clone(), memory.clone());
            std::thread::spawn(move || {
                if let Err(e) = serve_stream(&stream, &token, &memory) {
                    tracing::debug!("raw connection: {e}");
                }
            });
        }
    });
}

fn serve_stream(mut stream: &TcpStream, token: &str, memory: &Memory) -> Result<(), Failure> {
    stream.set_nodelay(true).map_err(|e| io(&e))?;
    stream.set_write_timeout(Some(DEADLINE)).map_err(|e| io(&e))?;
    let mut presented = [0; TOKEN];
    stream.read_exact(&mut presented).map_err(|e| io(&e))?;
    if presented != token.as_bytes() {
        return Err(Failure::new("a raw connection with a wrong token was refused"));
    }
    let mut header = [0; RawPass::LEN];
    // The end of the connection is the end of the service.
    while stream.read_exact(&mut header).is_ok() {
        let Some(pass) = RawPass::decode(&header, memory.len() as u64) else {
            return Err(Failure::new("a raw connection asked for what cannot be"));
        };
        // The server's side of a piece is the remote one.
        let pieces: Vec<Piece> =
            lane(pass).into_iter().map(|p| Piece { local_offset: p.remote_offset, ..p }).collect();
        stream.write_all(b"r").map_err(|e| io(&e))?;
        match pass.op {
            Op::Write => {
                baseline::receive(stream, memory, &pieces)?;
                stream.write_all(b"d").map_err(|e| io(&e))?;
            }
            Op::Read => {
                expect(stream, b'g')?;
                baseline::send(stream, memory, &pieces)?;
            }
        }
    }
    Ok(())
}

/// The client's connections.
pub(crate) struct RawClient {
    streams: Vec<TcpStream>,
}

impl RawClient {
    pub(crate) fn connect(address: &str, token: &str, streams: u16) -> Result<Self, Failure> {
        let open = |_| {
            let mut stream = TcpStream::connect(address).map_err(|e| io(&e))?;
            stream.set_nodelay(true).map_err(|e| io(&e))?;
            stream.set_read_timeout(Some(DEADLINE)).map_err(|e| io(&e))?;
            stream.set_write_timeout(Some(DEADLINE)).map_err(|e| io(&e))?;
            stream.write_all(token.as_bytes()).map_err(|e| io(&e))?;
            Ok(stream)
        };
        Ok(Self { streams: (0..streams).map(open).collect::<Result<_, Failure>>()? })
    }

    /// One pass; the time from the first byte sent to the last one received (and, for a write, confirmed).
    pub(crate) fn pass(
        &self,
        local: &Memory,
        op: Op,
        pattern: Pattern,
        bytes: u64,
        piece: u64,
        seed: u64,
    ) -> Result<Duration, Failure> {
        let lanes = self.streams.len() as u32;
        let mut work = Vec::new();
        for (mut stream, i) in self.streams.iter().zip(0..) {
            let pass = RawPass { op, pattern, lane: i, lanes, piece, bytes, seed };
            stream.write_all(&pass.encode()).map_err(|e| io(&e))?;
            work.push((stream, lane(pass)));
        }
        for (stream, _) in &work {
            expect(stream, b'r')?;
        }
        let start = Instant::now();
        let one = |(mut stream, pieces): (&TcpStream, Vec<Piece>)| match op {
            Op::Write => {
                baseline::send(stream, local, &pieces)?;
                expect(stream, b'd')
            }
            Op::Read => {
                stream.write_all(b"g").map_err(|e| io(&e))?;
                Ok(baseline::receive(stream, local, &pieces)?)
            }
        };
        std::thread::scope(|scope| {
            let last = work.pop();
            let threads: Vec<_> = work.into_iter().map(|w| scope.spawn(move || one(w))).collect();
            let mine = last.map_or(Ok(()), one);
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(Failure::new("a raw-socket thread panicked"))))
                .fold(mine, Result::and)
        })?;
        Ok(start.elapsed())
    }
}

/// The pieces one connection carries: every `lanes`-th one.
fn lane(pass: RawPass) -> Vec<Piece> {
    pass.pattern
        .pieces(pass.bytes, pass.piece, pass.seed)
        .into_iter()
        .skip(pass.lane as usize)
        .step_by(pass.lanes as usize)
        .collect()
}

fn expect(mut stream: &TcpStream, want: u8) -> Result<(), Failure> {
    let mut got = [0];
    stream.read_exact(&mut got).map_err(|e| io(&e))?;
    if got[0] == want { Ok(()) } else { Err(Failure::new("a raw connection is out of step")) }
}

fn io(e: &std::io::Error) -> Failure {
    Failure::new(format!("raw socket: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cross_raw_sockets_both_ways_to_where_they_belong() {
        const LEN: u64 = 1 << 20;
        let memory = || Memory::anonymous(LEN as usize).expect("memory");
        let (near, far) = (memory(), memory());
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let token = crate::secret().expect("token");
        serve(listener, token.clone(), 2, far.clone());
        let client = RawClient::connect(&address, &token, 2).expect("connect");
        for op in [Op::Write, Op::Read] {
            let (from, to) = if op == Op::Write { (&near, &far) } else { (&far, &near) };
            let pieces = Pattern::Random.pieces(LEN, 4096, 5);
            for (i, p) in pieces.iter().enumerate() {
                let at = if op == Op::Write { p.local_offset } else { p.remote_offset };
                from.write_at(at, &[i as u8; 4096]).expect("fill");
            }
            client.pass(&near, op, Pattern::Random, LEN, 4096, 5).expect("pass");
            for (i, p) in pieces.iter().enumerate() {
                let at = if op == Op::Write { p.remote_offset } else { p.local_offset };
                let mut got = [0; 4096];
                to.read_at(at, &mut got).expect("read");
                assert!(got.iter().all(|b| *b == i as u8), "{op:?}: piece {i} is not where it belongs");
            }
        }
    }

    #[test]
    fn a_stranger_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let memory = Memory::anonymous(4096).expect("memory");
        serve(listener, crate::secret().expect("token"), 1, memory.clone());
        let client = RawClient::connect(&address, &crate::secret().expect("token"), 1).expect("connect");
        assert!(client.pass(&memory, Op::Write, Pattern::Ordered, 4096, 4096, 0).is_err());
    }
}
