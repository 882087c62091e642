//! The wire format: golden payloads, limits, and decoders under random and damaged bytes.
//!
//! `KVXFER_BLESS=1 cargo test -p kvxfer-proto --test wire` rewrites the golden files after a deliberate change.

use kvxfer_proto::wire::{
    Check, ChunkSpec, FoundChunk, Hello, HostIdentity, MAX_CHUNKS, MAX_FRAME, MAX_NOTIFICATION, MAX_QUERY,
    MAX_TEXT, Message, Offer, RegionAdvert, Slot, Ticket, WireError, decode, encode,
};
use kvxfer_proto::{
    AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, Hold, Integrity, PageIndex, RegionId,
    RequestId,
};
use proptest::prelude::*;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn region() -> RegionAdvert {
    RegionAdvert {
        id: RegionId(7),
        name: "kv".into(),
        len: 1 << 30,
        readable: false,
        writable: true,
        tickets: vec![Ticket { transport: "shm".into(), payload: vec![1, 2, 3], fd_label: 42 }],
    }
}

fn key(n: u32) -> ChunkKey {
    ChunkKey::new(format!("llama@8@0@{n:016x}@bfloat16")).expect("a valid key")
}

fn found(index: u32, request: &str, check: Check) -> FoundChunk {
    let request = RequestId::new(request).expect("a valid id");
    FoundChunk { index, page: PageIndex(3), generation: Generation(9), len: 1 << 17, request, check }
}

/// One message of every type, each with a name for its file.
#[expect(clippy::too_many_lines, reason = "a list of values")]
fn samples() -> Vec<(&'static str, Message)> {
    let geometry = Geometry {
        model: "meta-llama/Llama-3.1-8B-Instruct".into(),
        dtype: "bfloat16".into(),
        layout: "KV_2LTD".into(),
        page_bytes: 32 << 20,
        chunk_tokens: 256,
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        tp_rank: 0,
        tp_size: 1,
        hash_seed: "0".into(),
    };
    let host = HostIdentity {
        boot_id: "3f0c".into(),
        pid_namespace: 4_026_531_836,
        net_namespace: 4_026_531_840,
        pid: 4711,
        process: 0x1234_5678_9abc_def0,
        side_socket: "@kvxfer-4711".into(),
    };
    let hello = Hello {
        protocol_min: 1,
        protocol_max: 1,
        library: "kvxfer 0.1.0".into(),
        agent: AgentName::new("prefill-0").expect("a valid name"),
        epoch: Epoch(1_700_000_000_000_000_000),
        host,
        challenge: (0..32).collect(),
        auth_required: true,
    };
    let hold = Hold { page: PageIndex(3), generation: Generation(9) };
    let page = Slot::Page { page: hold.page, generation: hold.generation };
    let (channel, serial, chunk, generation) = (5, 11, 2, Generation(9));
    let text = String::from("page_bytes differs: here \"1\", at the peer \"2\"");
    vec![
        ("hello", Message::Hello(hello)),
        ("auth", Message::Auth { mac: vec![0xab; 32] }),
        (
            "offers",
            Message::Offers {
                session: vec![5; 16],
                offers: vec![Offer { transport: "tcp".into(), payload: vec![9; 4] }],
            },
        ),
        ("welcome", Message::Welcome),
        ("refuse", Message::Refuse { code: ErrorCode::Unauthenticated, text: text.clone() }),
        ("region_query", Message::RegionQuery { query: 1, name: "kv".into() }),
        ("region_info", Message::RegionInfo { query: 1, region: Some(region()) }),
        ("region_info_none", Message::RegionInfo { query: 1, region: None }),
        ("unexported", Message::Unexported { region: RegionId(7) }),
        ("notify", Message::Notify { payload: b"done".to_vec() }),
        ("attach", Message::Attach { channel, pool: "kv".into(), geometry }),
        (
            "attached",
            Message::Attached {
                channel,
                region: Some(region()),
                pages: 32,
                code: ErrorCode::Ok,
                text: String::new(),
            },
        ),
        ("detach", Message::Detach { channel, code: ErrorCode::Closed, text: "closed".into() }),
        (
            "reserve",
            Message::Reserve {
                channel,
                serial,
                request: RequestId::new("cmpl-1").expect("a valid id"),
                chunks: vec![
                    ChunkSpec { key: key(1), len: 32 << 20 },
                    ChunkSpec { key: key(2), len: 1 << 17 },
                ],
                deadline_ms: 60_000,
                integrity: Integrity::Bound,
                more: 0,
                places: Vec::new(),
                advance: 0,
            },
        ),
        (
            "reserve_more",
            Message::Reserve {
                channel,
                serial,
                request: RequestId::new("cmpl-2").expect("a valid id"),
                chunks: vec![ChunkSpec { key: key(1), len: 32 << 20 }],
                deadline_ms: 60_000,
                integrity: Integrity::Full,
                more: 19,
                places: Vec::new(),
                advance: 0,
            },
        ),
        (
            "reserve_places",
            Message::Reserve {
                channel,
                serial,
                request: RequestId::new("cmpl-3").expect("a valid id"),
                chunks: vec![ChunkSpec { key: key(1), len: 1 << 20 }],
                deadline_ms: 60_000,
                integrity: Integrity::Bound,
                more: 0,
                places: vec![hold],
                advance: 2,
            },
        ),
        ("advance", Message::Advance { channel, number: 1, pages: vec![hold, hold] }),
        ("recall", Message::Recall { channel }),
        ("return", Message::Return { channel, pages: vec![hold] }),
        (
            "extend",
            Message::Extend {
                channel,
                serial,
                first: 1,
                chunks: vec![ChunkSpec { key: key(2), len: 1 << 17 }],
                last: true,
            },
        ),
        ("extended", Message::Extended { channel, serial, first: 1, slots: vec![page] }),
        (
            "grant",
            Message::Grant {
                channel,
                serial,
                slots: vec![page, Slot::Present, Slot::Pending],
                lease_ms: 30_000,
            },
        ),
        ("resolved", Message::Resolved { channel, serial, chunk, slot: page }),
        ("refused", Message::Refused { channel, serial, code: ErrorCode::TooLarge, text: text.clone() }),
        ("commit", Message::Commit { channel, serial, chunk, generation, check: Check::Bound(0xfeed_beef) }),
        ("commit_full", Message::Commit { channel, serial, chunk, generation, check: Check::Full(u64::MAX) }),
        ("commit_off", Message::Commit { channel, serial, chunk, generation, check: Check::None }),
        ("committed", Message::Committed { channel, serial, chunk, generation, code: ErrorCode::Corrupt }),
        ("ready", Message::Ready { channel, serial }),
        ("abort", Message::Abort { channel, serial, quiet: true, code: ErrorCode::Cancelled }),
        ("revoke", Message::Revoke { channel, serial, code: ErrorCode::TimedOut, text }),
        ("renew", Message::Renew { channel, serial }),
        ("query", Message::Query { channel, query: 3, keys: vec![key(1), key(2)], lease_ms: 10_000 }),
        (
            "found",
            Message::Found {
                channel,
                query: 3,
                chunks: vec![found(1, "cmpl-1", Check::Bound(0xfeed_beef))],
                lease_ms: 10_000,
                code: ErrorCode::Ok,
                text: String::new(),
            },
        ),
        (
            "found_refused",
            Message::Found {
                channel,
                query: 3,
                chunks: Vec::new(),
                lease_ms: 0,
                code: ErrorCode::NoCapacity,
                text: "64 queries".into(),
            },
        ),
        ("release", Message::Release { channel, query: 3 }),
        ("released", Message::Released { channel, query: 3, code: ErrorCode::Stale }),
        ("ping", Message::Ping { nonce: 1 }),
        ("pong", Message::Pong { nonce: 1 }),
        ("bye", Message::Bye { reason: "shutdown".into() }),
    ]
}

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/wire/golden")
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    for row in bytes.chunks(32) {
        for b in row {
            let _ = write!(out, "{b:02x}");
        }
        out.push('\n');
    }
    out
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks_exact(2).map(|d| ((d[0] << 4) | d[1]) as u8).collect()
}

#[test]
fn every_message_matches_its_golden_payload() {
    let bless = std::env::var_os("KVXFER_BLESS").is_some();
    let mut files = std::collections::BTreeSet::new();
    for (name, message) in samples() {
        let file = golden_dir().join(format!("{name}.hex"));
        let bytes = encode(&message).expect("samples are within the limits");
        if bless {
            std::fs::create_dir_all(golden_dir()).expect("the folder can be made");
            std::fs::write(&file, hex(&bytes)).expect("the file can be written");
        }
        let golden = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert_eq!(hex(&bytes), golden, "{name}: the encoding changed; old peers cannot read it");
        assert_eq!(
            decode(&unhex(&golden)).as_ref(),
            Ok(&message),
            "{name}: an old payload reads differently"
        );
        files.insert(format!("{name}.hex"));
    }
    let present: std::collections::BTreeSet<String> = std::fs::read_dir(golden_dir())
        .expect("the folder exists")
        .map(|e| e.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(files, present, "golden files and samples differ");
}

#[test]
fn unknown_fields_are_skipped() {
    // {"ping": {"nonce": 1, "later": [1, {"x": nil}]}}
    let bytes = b"\x81\xa4ping\x82\xa5nonce\x01\xa5later\x92\x01\x81\xa1x\xc0";
    assert_eq!(decode(bytes), Ok(Message::Ping { nonce: 1 }));
}

#[test]
fn an_unknown_message_type_is_named() {
    let map = b"\x81\xa8teleport\x81\xa1x\x01";
    let plain = b"\xa8teleport";
    for bytes in [map.as_slice(), plain] {
        let error = decode(bytes).expect_err("not a message of this version");
        assert_eq!(error, WireError::UnknownType { name: "teleport".into() });
        assert!(error.to_string().contains("teleport"), "{error}");
        assert_eq!(error.code(), ErrorCode::Protocol);
    }
}

#[test]
fn an_unknown_error_code_is_kept_as_unknown() {
    let bytes = encode(&Message::Refuse { code: ErrorCode::Stale, text: String::new() }).expect("small");
    // code 22 -> 999: replace the fixint by a u16.
    let at = bytes.iter().position(|&b| b == 22).expect("the code is there");
    let mut changed = bytes[..at].to_vec();
    changed.extend_from_slice(&[0xcd, 0x03, 0xe7]);
    changed.extend_from_slice(&bytes[at + 1..]);
    assert_eq!(decode(&changed), Ok(Message::Refuse { code: ErrorCode::Unknown, text: String::new() }));
}

#[test]
fn limits_are_checked_on_both_sides() {
    let long = "x".repeat(MAX_TEXT + 1);
    let hold = Hold { page: PageIndex(3), generation: Generation(9) };
    let too_much = [
        Message::Notify { payload: vec![0; MAX_NOTIFICATION + 1] },
        Message::Bye { reason: long.clone() },
        Message::Attach { channel: 1, pool: long.clone(), geometry: Geometry::default() },
        Message::Attach {
            channel: 1,
            pool: "kv".into(),
            geometry: Geometry { model: long.clone(), ..Geometry::default() },
        },
        Message::Grant { channel: 1, serial: 1, slots: vec![Slot::Present; MAX_CHUNKS + 1], lease_ms: 1 },
        Message::Return { channel: 1, pages: vec![hold; MAX_CHUNKS + 1] },
        Message::Auth { mac: vec![0; 65] },
        Message::Query { channel: 1, query: 1, keys: vec![key(1); MAX_QUERY + 1], lease_ms: 1 },
        Message::Found {
            channel: 1,
            query: 1,
            chunks: vec![found(0, "r", Check::None); MAX_QUERY + 1],
            lease_ms: 1,
            code: ErrorCode::Ok,
            text: String::new(),
        },
        Message::RegionQuery { query: 1, name: long },
    ];
    for message in too_much {
        assert!(matches!(encode(&message), Err(WireError::Limit { .. })), "{message:?} was encoded");
        let raw = rmp_serde::to_vec_named(&message).expect("encodable as such");
        assert!(matches!(decode(&raw), Err(WireError::Limit { .. })), "{message:?} was decoded");
    }
    assert_eq!(decode(&vec![0xc0; MAX_FRAME + 1]), Err(WireError::FrameTooLarge { len: MAX_FRAME + 1 }));
    let chunks = (0..40_000)
        .map(|n| ChunkSpec { key: ChunkKey::new("k".repeat(200) + &n.to_string()).expect("valid"), len: 1 });
    let reserve = Message::Reserve {
        channel: 1,
        serial: 1,
        request: RequestId::new("r").expect("valid"),
        chunks: chunks.collect(),
        deadline_ms: 1,
        integrity: Integrity::Off,
        more: 0,
        places: Vec::new(),
        advance: 0,
    };
    assert!(matches!(encode(&reserve), Err(WireError::FrameTooLarge { .. })));
}

#[test]
fn the_largest_query_and_its_answer_fit_a_frame() {
    let keys = vec![ChunkKey::new("k".repeat(512)).expect("valid"); MAX_QUERY];
    encode(&Message::Query { channel: u64::MAX, query: u64::MAX, keys, lease_ms: u64::MAX }).expect("fits");
    let chunk = FoundChunk {
        page: PageIndex(u32::MAX),
        generation: Generation(u64::MAX),
        len: u64::MAX,
        ..found(u32::MAX, &"r".repeat(256), Check::Bound(u64::MAX))
    };
    let answer = Message::Found {
        channel: u64::MAX,
        query: u64::MAX,
        chunks: vec![chunk; MAX_QUERY],
        lease_ms: u64::MAX,
        code: ErrorCode::Ok,
        text: "x".repeat(MAX_TEXT),
    };
    encode(&answer).expect("fits");
}

#[test]
fn bad_strings_are_refused() {
    let good =
        encode(&samples().into_iter().find(|(n, _)| *n == "reserve").expect("is there").1).expect("good");
    let at = good.windows(6).position(|w| w == b"cmpl-1").expect("the id is there");
    let mut control = good.clone();
    control[at] = 0x07;
    assert!(matches!(decode(&control), Err(WireError::Malformed { .. })));
    let mut not_utf8 = good.clone();
    not_utf8[at] = 0xff;
    assert!(matches!(decode(&not_utf8), Err(WireError::Malformed { .. })));
    let mut trailing = good;
    trailing.push(0);
    assert!(matches!(decode(&trailing), Err(WireError::Malformed { .. })));
}

#[test]
fn a_length_that_lies_allocates_nothing() {
    // {"notify": {"payload": bin32 of 4 GiB - 1}} and a reserve with an array of 2^32 - 1 chunks.
    assert!(decode(b"\x81\xa6notify\x81\xa7payload\xc6\xff\xff\xff\xff").is_err());
    assert!(decode(b"\x81\xa7reserve\x81\xa6chunks\xdd\xff\xff\xff\xff").is_err());
}

#[test]
fn every_truncation_is_an_error() {
    for (name, message) in samples() {
        let bytes = encode(&message).expect("samples are within the limits");
        for n in 0..bytes.len() {
            assert!(decode(&bytes[..n]).is_err(), "{name} cut to {n} bytes was accepted");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn damaged_messages_are_refused_or_read_within_limits(
        which in 0..36usize,
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (_, message) = samples().swap_remove(which);
        let mut bytes = encode(&message).expect("samples are within the limits");
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(read) = decode(&bytes) {
            // What is accepted can be sent on: it is within every limit.
            let again = encode(&read).expect("accepted messages are within the limits");
            prop_assert_eq!(decode(&again), Ok(read));
        }
    }
}
