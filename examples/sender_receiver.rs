//! A prefiller hands a prompt's KV cache to a decoder, chunk by chunk while it is computed; every byte is compared.
//!
//! `cargo run --example sender_receiver` starts the second process itself. On two terminals: `sender_receiver receiver` prints an
//! address, `sender_receiver sender ADDRESS` uses it.

use kvxfer::channel::{ChunkSource, ReceiverEvent};
use kvxfer::proto::wire::ChunkSpec;
use kvxfer::{
    Agent, ChunkKey, Error, ErrorCode, Geometry, Receiver, ReceiverConfig, RequestId, Result, Sender,
    SenderConfig,
};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);
const PAGE: u64 = 256 << 10;
const CHUNKS: u64 = 6;
/// The last chunk is partial: only its valid bytes travel.
const TAIL: u64 = 100_000;

fn geometry() -> Geometry {
    Geometry {
        model: "example/tiny-llama".into(),
        dtype: "bfloat16".into(),
        layout: "KV_2LTD".into(),
        page_bytes: PAGE,
        chunk_tokens: 256,
        tp_size: 1,
        ..Geometry::default()
    }
}

fn key(chunk: u64) -> Result<ChunkKey> {
    Ok(ChunkKey::new(format!("example@1@0@{chunk:08x}@bfloat16"))?)
}

fn bytes(chunk: u64) -> Vec<u8> {
    let len = if chunk + 1 == CHUNKS { TAIL } else { PAGE };
    (0..len).map(|i| (i * 7 + i / 4096 + chunk * 53) as u8).collect()
}

fn receiver() -> Result<()> {
    let agent = Agent::builder().name("decoder").listen("tcp://127.0.0.1:0").build()?;
    let config = ReceiverConfig { pages: 8, geometry: geometry(), ..ReceiverConfig::default() };
    let pool = Receiver::new(&agent, config)?;
    println!("ADDRESS {}", agent.addresses()[0]);
    let _ = std::io::stdout().flush();

    match pool.next_event(WAIT) {
        Some(ReceiverEvent::Ready { sender, request }) => println!("request {request} of {sender} is ready"),
        Some(ReceiverEvent::Failed { code, text, .. }) => return Err(Error::failed(code, text)),
        None => return Err(Error::TimedOut { operation: "a request".into(), after: WAIT }),
    }
    for c in 0..CHUNKS {
        let chunk = pool.acquire(&key(c)?)?; // pinned until it is dropped
        let mut found = vec![0; chunk.len() as usize];
        chunk.read_at(0, &mut found)?;
        if found != bytes(c) {
            return Err(Error::failed(ErrorCode::Corrupt, format!("chunk {c} differs")));
        }
        drop(chunk);
        pool.remove(&key(c)?); // loaded into the engine: the page may be used again
    }
    let stats = pool.stats();
    if stats.free != stats.pages {
        return Err(Error::failed(
            ErrorCode::Busy,
            format!("{} of {} pages are free", stats.free, stats.pages),
        ));
    }
    pool.close(WAIT)?;
    println!("OK receiver: {CHUNKS} chunks as expected, all pages free");
    Ok(())
}

fn sender(address: &str) -> Result<()> {
    let agent = Agent::builder().name("prefiller").build()?;
    let region = agent.allocate((CHUNKS * PAGE) as usize)?;
    let config = SenderConfig { geometry: geometry(), ..SenderConfig::default() };
    let sender = Sender::connect(&agent, address, config, WAIT)?;

    let chunks = (0..CHUNKS)
        .map(|c| Ok(ChunkSpec { key: key(c)?, len: bytes(c).len() as u64 }))
        .collect::<Result<Vec<_>>>()?;
    let reservation = sender.reserve(RequestId::new("request-1")?, chunks, Some(WAIT))?;
    reservation.wait_admitted(WAIT)?;
    for c in 0..CHUNKS {
        let computed = bytes(c); // the prefill of this chunk
        region.memory().write_at(c * PAGE, &computed)?;
        let runs = vec![(c * PAGE, computed.len() as u64)];
        reservation.write(c as usize, ChunkSource::new(region.clone(), runs))?;
    }
    let report = reservation.finish().wait(WAIT)?;
    println!(
        "{} bytes in {} chunks over {} in {:?}",
        report.bytes, report.written, report.transport, report.moved
    );
    println!("OK sender: published at the receiver");
    Ok(())
}

fn gone() -> Error {
    Error::failed(ErrorCode::PeerGone, "the other process has ended")
}

/// Plays the sender against a receiver in a second process.
fn both() -> Result<()> {
    let system =
        |e| Error::system("starting the receiver", e, "run the example from a folder that allows it");
    let exe = std::env::current_exe().map_err(system)?;
    let mut child = Command::new(exe).arg("receiver").stdout(Stdio::piped()).spawn().map_err(system)?;
    let mut lines = BufReader::new(child.stdout.take().ok_or_else(gone)?).lines();
    let address = lines
        .by_ref()
        .map_while(std::result::Result::ok)
        .find_map(|l| l.strip_prefix("ADDRESS ").map(str::to_owned));
    let result = address.ok_or_else(gone).and_then(|a| sender(&a));
    if result.is_err() {
        let _ = child.kill();
    }
    lines.map_while(std::result::Result::ok).for_each(|l| println!("{l}"));
    let status = child.wait().map_err(system)?;
    result?;
    if status.success() { Ok(()) } else { Err(gone()) }
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let result = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => both(),
        ["receiver"] => receiver(),
        ["sender", address] => sender(address),
        _ => {
            eprintln!("usage: sender_receiver [receiver | sender ADDRESS]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{} ({}){}", e, e.code(), if e.is_retryable() { ", may be tried again" } else { "" });
            ExitCode::FAILURE
        }
    }
}
