//! Peers that say anything at any time: the machines answer, ignore or end the request, and their bookkeeping holds.

use kvxfer_proto::layout::Layout;
use kvxfer_proto::pool::Known;
use kvxfer_proto::query::Asker;
use kvxfer_proto::receiver::{self, PeerId, Receiver, Settings};
use kvxfer_proto::sender::{self, Declaration, Sender, Write};
use kvxfer_proto::wire::{Check, ChunkSpec, FoundChunk, Message, Slot};
use kvxfer_proto::{
    AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, Hold, Integrity, PageIndex, RequestId, Time,
};
use proptest::prelude::*;
use std::collections::HashSet;
use std::time::Duration;

const PAGES: u32 = 6;
const LEN: u64 = 100;

fn key(n: u8) -> ChunkKey {
    ChunkKey::new(format!("k{n}")).expect("valid")
}

fn found() -> impl Strategy<Value = FoundChunk> {
    (0..4u32, 0..PAGES + 1, 0..LEN + 2).prop_map(|(index, page, len)| FoundChunk {
        index,
        page: PageIndex(page),
        generation: Generation(1),
        len,
        request: RequestId::new("r").expect("valid"),
        check: Check::None,
    })
}

/// Any channel message, with numbers small enough to hit something.
fn message() -> impl Strategy<Value = Message> {
    let channel = 1..3u64;
    let serial = 0..5u64;
    let chunk = 0..5u32;
    let generation = (0..5u64).prop_map(Generation);
    let code = prop_oneof![Just(ErrorCode::Ok), Just(ErrorCode::Corrupt), Just(ErrorCode::Cancelled)];
    let check = prop_oneof![
        Just(Check::None),
        any::<u64>().prop_map(Check::Bound),
        any::<u64>().prop_map(Check::Full)
    ];
    let slot = prop_oneof![
        (0..PAGES + 2, generation.clone())
            .prop_map(|(page, generation)| Slot::Page { page: PageIndex(page), generation }),
        Just(Slot::Present),
        Just(Slot::Pending),
    ];
    let spec = (0..8u8, prop_oneof![9 => Just(LEN), 1 => 0..2 * LEN])
        .prop_map(|(n, len)| ChunkSpec { key: key(n), len });
    let integrity = prop_oneof![Just(Integrity::Bound), Just(Integrity::Full)];
    let hold = (0..PAGES + 1, generation.clone())
        .prop_map(|(page, generation)| Hold { page: PageIndex(page), generation });
    let holds = proptest::collection::vec(hold, 1..3);
    let cs = (channel, serial);
    prop_oneof![
        1 => cs.clone().prop_map(|(channel, _)| Message::Attach {
            channel,
            pool: "kv".into(),
            geometry: Geometry::default()
        }),
        1 => cs.clone().prop_map(|(channel, _)| Message::Detach {
            channel,
            code: ErrorCode::Closed,
            text: String::new()
        }),
        6 => (
            cs.clone(), proptest::collection::vec(spec.clone(), 0..5), 0..400u64, integrity, 0..12u8,
            prop_oneof![2 => Just(Vec::new()), 1 => holds.clone()], 0..4u32,
        ).prop_map(
            |((channel, serial), chunks, deadline_ms, integrity, name, places, advance)| Message::Reserve {
                channel, serial, chunks, deadline_ms, integrity, places, advance,
                request: RequestId::new(format!("r{}", name % 3)).expect("valid"),
                more: u32::from(name / 3),
            }
        ),
        3 => (cs.clone(), holds.clone()).prop_map(|((channel, number), pages)| Message::Advance { channel, number, pages }),
        1 => cs.clone().prop_map(|(channel, _)| Message::Recall { channel }),
        2 => (cs.clone(), holds).prop_map(|((channel, _), pages)| Message::Return { channel, pages }),
        4 => (cs.clone(), proptest::collection::vec(spec, 0..3), 0..6u32, any::<bool>()).prop_map(
            |((channel, serial), chunks, first, last)| Message::Extend { channel, serial, first, chunks, last }
        ),
        4 => (cs.clone(), proptest::collection::vec(slot.clone(), 0..5), 0..6u32).prop_map(
            |((channel, serial), slots, first)| Message::Extended { channel, serial, first, slots }
        ),
        6 => (cs.clone(), chunk.clone(), generation.clone(), check).prop_map(
            |((channel, serial), chunk, generation, check)| Message::Commit { channel, serial, chunk, generation, check }
        ),
        2 => (cs.clone(), any::<bool>(), code.clone())
            .prop_map(|((channel, serial), quiet, code)| Message::Abort { channel, serial, quiet, code }),
        1 => cs.clone().prop_map(|(channel, serial)| Message::Renew { channel, serial }),
        4 => (cs.clone(), proptest::collection::vec(slot.clone(), 0..5), 0..100u64).prop_map(
            |((channel, serial), slots, lease_ms)| Message::Grant { channel, serial, slots, lease_ms }
        ),
        4 => (cs.clone(), chunk.clone(), slot)
            .prop_map(|((channel, serial), chunk, slot)| Message::Resolved { channel, serial, chunk, slot }),
        4 => (cs.clone(), chunk, generation, code.clone()).prop_map(
            |((channel, serial), chunk, generation, code)| Message::Committed { channel, serial, chunk, generation, code }
        ),
        2 => cs.clone().prop_map(|(channel, serial)| Message::Ready { channel, serial }),
        1 => (cs.clone(), code.clone()).prop_map(|((channel, serial), code)| Message::Refused {
            channel, serial, code, text: String::new()
        }),
        1 => (cs.clone(), code.clone()).prop_map(|((channel, serial), code)| Message::Revoke {
            channel, serial, code, text: String::new()
        }),
        4 => (cs.clone(), proptest::collection::vec((0..8u8).prop_map(key), 0..4), prop_oneof![Just(0), 1..200u64])
            .prop_map(|((channel, query), keys, lease_ms)| Message::Query { channel, query, keys, lease_ms }),
        2 => cs.clone().prop_map(|(channel, query)| Message::Release { channel, query }),
        4 => (cs.clone(), proptest::collection::vec(found(), 0..4), 0..2u64, code.clone()).prop_map(
            |((channel, query), chunks, lease_ms, code)| Message::Found {
                channel, query, chunks, lease_ms, code, text: String::new()
            }
        ),
        4 => (cs, code).prop_map(|((channel, query), code)| Message::Released { channel, query, code }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_receiver_survives_any_sender(
        script in proptest::collection::vec((message(), 0..2u64, 0..40u64, any::<bool>()), 1..80),
    ) {
        let mut r = Receiver::new(Settings {
            pool: "kv".into(),
            layout: Layout::new(LEN, PAGES).expect("valid"),
            geometry: Geometry::default(),
            lease: Duration::from_millis(100),
            admission_timeout: Duration::from_millis(200),
            max_queue: 3,
            retention: Duration::from_millis(300),
            advance: 3,
        });
        let peer = |n| PeerId { name: AgentName::new("them").expect("valid"), epoch: Epoch(1), connection: n };
        let mut now = Time(0);
        let mut good = HashSet::new();
        for (message, from, wait, passes) in script {
            r.message(now, &peer(from), &message);
            while let Some(output) = r.poll() {
                if let receiver::Output::Verify(v) = output {
                    if passes {
                        good.insert(v.binding.key.clone());
                    }
                    r.verified(now, v.token, passes);
                }
            }
            r.check().map_err(TestCaseError::fail)?;
            for k in (0..8).map(key) {
                prop_assert!(!matches!(r.known(&k), Known::Published(_)) || good.contains(&k), "{k} unchecked");
            }
            now = now + Duration::from_millis(wait);
            r.tick(now);
            r.check().map_err(TestCaseError::fail)?;
        }
        r.peer_fenced(now, &peer(0));
        r.peer_fenced(now, &peer(1));
        r.tick(now + Duration::from_secs(1));
        r.check().map_err(TestCaseError::fail)?;
        prop_assert_eq!(r.stats().pages.free, PAGES);
    }

    #[test]
    fn a_sender_survives_any_receiver(
        script in proptest::collection::vec((message(), 0..40u64, any::<bool>()), 1..80),
    ) {
        let layout = Layout::new(LEN, PAGES).expect("valid");
        let mut s = Sender::new(1, layout);
        let deadline = Duration::from_millis(400);
        let mut open = HashSet::new();
        let mut started = Vec::new();
        let mut now = Time(0);
        let ahead: Vec<Hold> = (0..4).map(|n| Hold { page: PageIndex(n), generation: Generation(1) }).collect();
        s.message(now, &Message::Advance { channel: 1, number: 1, pages: ahead.clone() });
        for i in 0..3u8 {
            let specs = (0..3).map(|n| ChunkSpec { key: key(i * 3 + n), len: LEN }).collect();
            let id = RequestId::new(format!("r{i}")).expect("valid");
            let (more, at_once) = if i == 0 { (0, true) } else { (2, false) };
            let (request, deadline, integrity) = (id, now + deadline, Integrity::Bound);
            let declaration = Declaration { request, specs, more, deadline, integrity, at_once };
            let serial = s.reserve(now, declaration).expect("accepted");
            open.insert(serial);
            for chunk in 0..2 {
                s.supply(serial, chunk).expect("open");
            }
            if i > 0 {
                s.extend(serial, vec![ChunkSpec { key: key(20 + i), len: LEN }], i == 1).expect("announced");
                s.supply(serial, 3).expect("open");
            }
        }
        for (message, wait, succeeds) in script {
            s.message(now, &message);
            while let Some(output) = s.poll() {
                match output {
                    sender::Output::Write(w) => {
                        prop_assert!(w.page.0 < PAGES, "a page beyond the pool");
                        started.push(w);
                    }
                    sender::Output::Ended { serial, .. } => prop_assert!(open.remove(&serial), "ended twice"),
                    sender::Output::Send(Message::Abort { serial, quiet: true, .. }) => {
                        // A write to a page that the request did not get is told with that page.
                        let chosen = |w: &Write| ahead.contains(&Hold { page: w.page, generation: w.generation });
                        prop_assert!(!started.iter().any(|w| w.serial == serial && !chosen(w)), "not quiet");
                    }
                    _ => {}
                }
            }
            if succeeds && let Some(w) = started.pop() {
                s.written(w, Ok(Check::Bound(1)));
            }
            now = now + Duration::from_millis(wait);
            s.tick(now);
        }
        s.tick(now + deadline);
        for w in started.drain(..) {
            let text = String::new();
            s.written(w, Err(sender::Failure { code: ErrorCode::Cancelled, text }));
        }
        while let Some(output) = s.poll() {
            if let sender::Output::Ended { serial, .. } = output {
                prop_assert!(open.remove(&serial), "ended twice");
            }
        }
        prop_assert!(open.is_empty(), "{open:?} never ended");
        prop_assert!(s.is_idle());
    }

    #[test]
    fn an_asker_survives_any_receiver(
        script in proptest::collection::vec((message(), 0..6u64, 0..4u8), 1..60),
    ) {
        let mut a = Asker::new(1, Layout::new(LEN, PAGES).expect("valid"));
        let (mut open, mut reading, mut releasing) = (HashSet::new(), HashSet::new(), HashSet::new());
        for i in 0..4u64 {
            let lease = Duration::from_millis(i % 2 * 100);
            open.insert(a.ask((0..3).map(key).collect(), lease).expect("asked").0);
        }
        for (message, query, what) in script {
            a.message(&message);
            match what {
                0 => if let Some(found) = a.found(query) {
                    prop_assert!(open.remove(&query), "answered twice");
                    if let Ok(found) = found {
                        let inside = |c: &FoundChunk| c.page.0 < PAGES && c.index < 3 && (1..=LEN).contains(&c.len);
                        prop_assert!(found.chunks.iter().all(inside), "{found:?}");
                        prop_assert!(found.chunks.is_sorted_by(|a, b| a.index < b.index), "{found:?}");
                        if !found.lease.is_zero() {
                            reading.insert(query);
                        }
                    }
                },
                1 if a.release(query).is_some() => {
                    prop_assert!(reading.remove(&query));
                    releasing.insert(query);
                }
                2 if a.released(query).is_some() => {
                    prop_assert!(releasing.remove(&query), "an answer nobody asked for");
                }
                _ => {}
            }
        }
        a.close(&sender::Failure { code: ErrorCode::PeerGone, text: String::new() });
        for query in open {
            let found = a.found(query).expect("everything ends");
            if found.is_ok_and(|f| !f.lease.is_zero()) {
                reading.insert(query);
            }
        }
        for query in reading.into_iter().chain(releasing) {
            prop_assert!(a.release(query).is_none(), "there is nobody to tell");
            prop_assert!(a.released(query).is_some(), "everything ends");
        }
        prop_assert_eq!(a.open(), 0);
    }
}
