//! The rows: what is moved, beside what.

use super::near::{Far, Local, Near};
use super::rows::{Against, Bar, Row};
use crate::Failure;
use crate::content::Rng;
use indicatif::ProgressBar;
use kvxfer_core::{Op, Piece, TransportKind};
use std::time::Duration;

/// Layers, planes and bytes a token of Llama-3.1-8B's cache (32 layers, keys and values, 8 heads of 128 half-precision numbers).
const PLANES: u64 = 64;
const TOKEN: u64 = 2048;
/// Tokens of vLLM's blocks, and of `LMCache`'s chunks.
const BLOCK_TOKENS: u64 = 16;
const CHUNK_TOKENS: u64 = 256;

const DEVICES: (Local, Far) = (Local::Device, Far::Device);

/// One write and one read of scattered pieces, compared.
pub(super) fn one(near: &mut Near) -> Result<(), Failure> {
    let pieces = scattered_pieces(near.plan.blocks, near.plan.block);
    near.check(TransportKind::CudaIpc, Op::Write, DEVICES, &pieces)?;
    near.check(TransportKind::CudaIpc, Op::Read, DEVICES, &pieces)
}

pub(super) fn all(near: &mut Near, bar: &ProgressBar) -> Result<Vec<Row>, Failure> {
    type Case = fn(&mut Near) -> Result<Vec<Row>, Failure>;
    let cases: [(&str, Case); 7] = [
        ("bulk", bulk),
        ("scattered blocks", scattered),
        ("store of the guide", store),
        ("bursts", bursts),
        ("device and host", host),
        ("through sockets", sockets),
        ("small writes", small),
    ];
    bar.set_length(cases.len() as u64);
    let mut rows = Vec::new();
    for (name, case) in cases {
        bar.set_message(name);
        rows.extend(case(near).map_err(|e| e.within(name))?);
        bar.inc(1);
    }
    Ok(rows)
}

/// A baseline: its name and one pass of it; `None` where it is not there.
type Baseline<'a> = (&'static str, &'a mut dyn FnMut(&mut Near) -> Option<Result<Duration, Failure>>);
/// Each pass of a subject: its time, and that of the submitting call.
type Times = Vec<(Duration, Duration)>;

/// Times of a subject and its baselines, taken in turns after one round to warm up.
fn turns(
    near: &mut Near,
    mut subject: impl FnMut(&mut Near) -> Result<(Duration, Duration), Failure>,
    baselines: &mut [Baseline<'_>],
) -> Result<(Times, Vec<Against>), Failure> {
    let mut own = Vec::new();
    let mut others: Vec<Vec<Duration>> = vec![Vec::new(); baselines.len()];
    for rep in 0..=near.plan.reps {
        let time = subject(near)?;
        if rep > 0 {
            own.push(time);
        }
        for ((name, baseline), times) in baselines.iter_mut().zip(&mut others) {
            match baseline(near) {
                Some(Ok(time)) if rep > 0 => times.push(time),
                Some(Err(e)) if *name == "NIXL" => near.give_up_nixl(&e),
                Some(Err(e)) => return Err(e.within(name)),
                _ => {}
            }
        }
    }
    let against = baselines
        .iter()
        .zip(others)
        .filter(|(_, times)| times.len() == own.len())
        .map(|((name, _), times)| Against::new(name, &own, &times))
        .collect();
    Ok((own, against))
}

fn chunks(bytes: u64, chunk: u64) -> Vec<Piece> {
    (0..bytes / chunk)
        .map(|i| Piece { local_offset: i * chunk, remote_offset: i * chunk, len: chunk })
        .collect()
}

fn bulk(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let (bytes, pieces) = (near.plan.bulk, chunks(near.plan.bulk, near.plan.chunk));
    let mut rows = Vec::new();
    for op in [Op::Write, Op::Read] {
        near.check(TransportKind::CudaIpc, op, DEVICES, &pieces)?;
        let nixl_pieces = pieces.clone();
        let (own, against) = turns(
            near,
            |n| n.pass(TransportKind::CudaIpc, op, DEVICES, &pieces),
            &mut [
                ("cuMemcpy, one piece", &mut |n| Some(n.copy(Local::Device, Far::Device, op, bytes))),
                ("NIXL", &mut |n| (op == Op::Write).then(|| n.nixl(&nixl_pieces)).flatten()),
            ],
        )?;
        let what = format!("bulk {op:?}, {} MiB chunks", near.plan.chunk >> 20);
        rows.push(
            Row::new(what, bytes, pieces.len(), &own)
                .against(against)
                .bar(&Bar::ratio("cuMemcpy, one piece", 0.95)),
        );
    }
    Ok(rows)
}

/// Blocks of a random table, layer by layer, into the peer's contiguous memory.
fn scattered_pieces(blocks: u64, block: u64) -> Vec<Piece> {
    let per_plane = (blocks / PLANES).max(1);
    let table = shuffled(per_plane);
    (0..blocks)
        .map(|i| {
            let (plane, at) = (i / per_plane, i % per_plane);
            let from = plane * per_plane + u64::from(table[at as usize]);
            Piece { local_offset: from * block, remote_offset: i * block, len: block }
        })
        .collect()
}

fn shuffled(n: u64) -> Vec<u32> {
    Rng::new(1).permutation(n as usize)
}

fn scattered(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let pieces = scattered_pieces(near.plan.blocks, near.plan.block);
    let bytes: u64 = pieces.iter().map(|p| p.len).sum();
    near.check(TransportKind::CudaIpc, Op::Write, DEVICES, &pieces)?;
    let in_chunks = chunks(bytes, near.plan.chunk.min(bytes));
    let (each, same) = (pieces.clone(), pieces.clone());
    let (own, against) = turns(
        near,
        |n| n.pass(TransportKind::CudaIpc, Op::Write, DEVICES, &pieces),
        &mut [
            ("bulk", &mut |n| {
                Some(n.pass(TransportKind::CudaIpc, Op::Write, DEVICES, &in_chunks).map(|t| t.0))
            }),
            ("cuMemcpy, each piece", &mut |n| Some(n.copy_each(&each))),
            ("NIXL", &mut |n| n.nixl(&same)),
        ],
    )?;
    let what = format!("scattered blocks of {} KiB", near.plan.block >> 10);
    Ok(vec![
        Row::new(what, bytes, pieces.len(), &own)
            .against(against)
            .bar(&Bar::ratio("bulk", 0.85))
            .bar(&Bar::ratio("NIXL", 5.0))
            .bar(&Bar::submit(200.0)),
    ])
}

/// A prompt's cache in scattered blocks, into chunks of `KV_2LTD` order.
pub(super) fn store_pieces(tokens: u64) -> Vec<Piece> {
    let blocks = tokens.div_ceil(BLOCK_TOKENS);
    let table = shuffled(blocks);
    let mut pieces = Vec::new();
    for chunk in 0..tokens.div_ceil(CHUNK_TOKENS) {
        let first = chunk * CHUNK_TOKENS;
        let here = CHUNK_TOKENS.min(tokens - first);
        let chunk_at = first * TOKEN * PLANES;
        for plane in 0..PLANES {
            for at in (0..here).step_by(BLOCK_TOKENS as usize) {
                let n = BLOCK_TOKENS.min(here - at);
                let block = u64::from(table[((first + at) / BLOCK_TOKENS) as usize]);
                pieces.push(Piece {
                    local_offset: (plane * blocks + block) * BLOCK_TOKENS * TOKEN,
                    remote_offset: chunk_at + (plane * here + at) * TOKEN,
                    len: n * TOKEN,
                });
            }
        }
    }
    pieces
}

fn store(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let pieces = store_pieces(near.plan.tokens);
    let bytes: u64 = pieces.iter().map(|p| p.len).sum();
    near.check(TransportKind::CudaIpc, Op::Write, DEVICES, &pieces)?;
    let (own, against) = turns(
        near,
        |n| n.pass(TransportKind::CudaIpc, Op::Write, DEVICES, &pieces),
        &mut [("cuMemcpy, one piece", &mut |n| Some(n.copy(Local::Device, Far::Device, Op::Write, bytes)))],
    )?;
    let what = format!("store of {} tokens (128 KiB each)", near.plan.tokens);
    Ok(vec![Row::new(what, bytes, pieces.len(), &own).against(against).bar(&Bar::millis(1.0))])
}

fn bursts(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    let all = scattered_pieces(near.plan.blocks, near.plan.block);
    let each = 32;
    for n in [1usize, 4, 16, 64] {
        let Some(part) = all.get(..n * each) else { break };
        let requests: Vec<Vec<Piece>> = part.chunks(each).map(<[Piece]>::to_vec).collect();
        let bytes: u64 = part.iter().map(|p| p.len).sum();
        let (own, against) = turns(
            near,
            |near| Ok((near.burst(&requests)?, Duration::ZERO)),
            &mut [("cuMemcpy, one piece", &mut |near| {
                Some(near.copy(Local::Device, Far::Device, Op::Write, bytes))
            })],
        )?;
        rows.push(
            Row::new(format!("burst of {n} requests of 1 MiB"), bytes, part.len(), &own).against(against),
        );
    }
    Ok(rows)
}

fn host(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let (bytes, pieces) = (near.plan.host, chunks(near.plan.host, near.plan.chunk.min(near.plan.host)));
    let mut rows = Vec::new();
    for (what, sides, op) in [
        ("device to the peer's host pool", (Local::Device, Far::Pool), Op::Write),
        ("host to the peer's device", (Local::Host, Far::Device), Op::Write),
        ("peer's host pool to the device", (Local::Device, Far::Pool), Op::Read),
    ] {
        near.check(TransportKind::CudaIpc, op, sides, &pieces)?;
        let (own, against) = turns(
            near,
            |n| n.pass(TransportKind::CudaIpc, op, sides, &pieces),
            &mut [("pinned cuMemcpy", &mut |n| Some(n.copy(sides.0, sides.1, op, bytes)))],
        )?;
        rows.push(
            Row::new(what.into(), bytes, pieces.len(), &own)
                .against(against)
                .bar(&Bar::ratio("pinned cuMemcpy", 0.9)),
        );
    }
    Ok(rows)
}

fn sockets(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let bytes = near.plan.host.min(256 << 20);
    let pieces = chunks(bytes, near.plan.chunk.min(bytes));
    near.check(TransportKind::Tcp, Op::Write, DEVICES, &pieces)?;
    let (own, against) = turns(
        near,
        |n| n.pass(TransportKind::Tcp, Op::Write, DEVICES, &pieces),
        &mut [
            ("tcp, host memory", &mut |n| {
                Some(n.pass(TransportKind::Tcp, Op::Write, (Local::Host, Far::Pool), &pieces).map(|t| t.0))
            }),
            ("pinned cuMemcpy", &mut |n| Some(n.copy(Local::Device, Far::Pool, Op::Write, bytes))),
        ],
    )?;
    Ok(vec![
        Row::new("tcp, device to device".into(), bytes, pieces.len(), &own)
            .against(against)
            .bar(&Bar::ratio("tcp, host memory", 0.9)),
    ])
}

fn small(near: &mut Near) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for bytes in [64, 4096] {
        near.pings(bytes, near.plan.pings / 10 + 1)?;
        let halves: Vec<_> =
            near.pings(bytes, near.plan.pings)?.into_iter().map(|d| (d, Duration::ZERO)).collect();
        let row = Row::new(format!("write of {bytes} bytes and notification"), bytes, 1, &halves);
        rows.push(if bytes == 4096 { row.bar(&Bar::micros(25.0)) } else { row });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of the target comes from one place, and no source byte is used twice.
    fn covers(pieces: &[Piece], bytes: u64) {
        let spans = |f: fn(&Piece) -> u64| {
            let mut v: Vec<_> = pieces.iter().map(|p| (f(p), p.len)).collect();
            v.sort_unstable();
            v
        };
        let far = spans(|p| p.remote_offset);
        assert_eq!(far.iter().map(|s| s.1).sum::<u64>(), bytes);
        assert!(far.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0), "a hole or an overlap at the target");
        assert!(
            spans(|p| p.local_offset).windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0),
            "a source read twice"
        );
    }

    #[test]
    fn the_lists_are_what_they_say() {
        let scattered = scattered_pieces(20_032, 32 << 10);
        covers(&scattered, 20_032 * (32 << 10));
        assert!(
            scattered.iter().filter(|p| p.local_offset == p.remote_offset).count() < 1000,
            "not scattered"
        );
        let store = store_pieces(5271);
        covers(&store, 5271 * (128 << 10));
        assert_eq!(store.len(), 330 * 64);
        covers(&store_pieces(16), 16 * (128 << 10));
    }
}
