//! One-sided write and read between two processes; every byte is compared.
//!
//! `cargo run --example one_sided` starts the second process itself. On two terminals: `one_sided target` prints an address,
//! `one_sided writer ADDRESS` uses it.

use kvxfer::agent::Access;
use kvxfer::{Agent, Error, ErrorCode, Piece, Result, TransferOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);
const PIECES: u64 = 64;
const PIECE: u64 = 16 << 10;
const LEN: usize = (PIECES * PIECE) as usize;

/// What the target's memory must be in the end.
fn expected() -> Vec<u8> {
    (0..LEN).map(|i| (i * 31 + i / PIECE as usize) as u8).collect()
}

fn check(found: &[u8], at: &str) -> Result<()> {
    match found.iter().zip(expected()).position(|(a, b)| *a != b) {
        None => Ok(()),
        Some(i) => Err(Error::failed(ErrorCode::Corrupt, format!("{at}: byte {i} is {}", found[i]))),
    }
}

fn target() -> Result<()> {
    let agent = Agent::builder().name("target").listen("tcp://127.0.0.1:0").build()?;
    let inbox = agent.allocate(LEN)?;
    agent.export(&inbox, "inbox", Access::ReadWrite)?;
    println!("ADDRESS {}", agent.addresses()[0]);
    let _ = std::io::stdout().flush();

    let from = expect(agent.notification(WAIT)?)?;
    let mut bytes = vec![0; LEN];
    inbox.memory().read_at(0, &mut bytes)?;
    check(&bytes, "target")?;
    let writer = agent.peer(from.peer.as_str()).ok_or_else(gone)?;
    writer.notify(b"checked")?;
    expect(agent.notification(WAIT)?)?;
    println!("OK target: {LEN} bytes as expected");
    Ok(())
}

fn writer(address: &str) -> Result<()> {
    let agent = Agent::builder().name("writer").build()?;
    let local = agent.allocate(LEN)?;
    let peer = agent.connect(address, WAIT)?;
    let inbox = peer.region("inbox", WAIT)?;

    // The pieces lie in shuffled order here and are put into order there.
    let pieces: Vec<_> = (0..PIECES)
        .map(|n| Piece { local_offset: (n * 37 + 11) % PIECES * PIECE, remote_offset: n * PIECE, len: PIECE })
        .collect();
    let all = expected();
    for p in &pieces {
        let at = p.remote_offset as usize;
        local.memory().write_at(p.local_offset, &all[at..at + p.len as usize])?;
    }
    let options = TransferOptions { notify: Some(b"written".to_vec()), ..TransferOptions::default() };
    let report = peer.write(&local, &inbox, &pieces, options)?.wait(WAIT)?;
    report.ok()?;
    println!("wrote {} bytes over {} in {:?}", report.bytes, report.transport, report.duration);

    expect(agent.notification(WAIT)?)?;
    local.memory().write_at(0, &vec![0; LEN])?;
    let back = Piece { local_offset: 0, remote_offset: 0, len: LEN as u64 };
    peer.read(&local, &inbox, &[back], TransferOptions::default())?.wait(WAIT)?.ok()?;
    let mut bytes = vec![0; LEN];
    local.memory().read_at(0, &mut bytes)?;
    check(&bytes, "writer, read back")?;
    peer.notify(b"done")?;
    agent.shutdown(WAIT)?;
    println!("OK writer: {LEN} bytes read back as expected");
    Ok(())
}

fn expect<T>(arrived: Option<T>) -> Result<T> {
    arrived.ok_or_else(|| Error::TimedOut { operation: "a notification".into(), after: WAIT })
}

fn gone() -> Error {
    Error::failed(ErrorCode::PeerGone, "the peer has disconnected")
}

/// Plays the writer against a target in a second process.
fn both() -> Result<()> {
    let system = |e| Error::system("starting the target", e, "run the example from a folder that allows it");
    let exe = std::env::current_exe().map_err(system)?;
    let mut child = Command::new(exe).arg("target").stdout(Stdio::piped()).spawn().map_err(system)?;
    let mut lines = BufReader::new(child.stdout.take().ok_or_else(gone)?).lines();
    let address = lines
        .by_ref()
        .map_while(std::result::Result::ok)
        .find_map(|l| l.strip_prefix("ADDRESS ").map(str::to_owned));
    let result = address.ok_or_else(gone).and_then(|a| writer(&a));
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
        ["target"] => target(),
        ["writer", address] => writer(address),
        _ => {
            eprintln!("usage: one_sided [target | writer ADDRESS]");
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
