//! An outbox towards real receivers in the same process, some of which are not there.

mod advance;

use super::*;
use crate::channel::{Lookup, Placed, Receiver, ReceiverConfig};
use crate::{Memory, TransportKind};
use kvxfer_proto::{ChunkKey, Geometry};

const PAGE: u64 = 64 << 10;
const SOON: Duration = Duration::from_secs(20);

fn geometry() -> Geometry {
    Geometry { model: "test".into(), page_bytes: PAGE, ..Geometry::default() }
}

fn agent(name: &str, listen: &str) -> Agent {
    let config = crate::AgentConfig { listen: vec![listen.into()], ..crate::AgentConfig::default() };
    Agent::builder().config(config).name(name).allow([TransportKind::Inproc]).build().expect("an agent")
}

fn pool(agent: &Agent, pages: u32) -> Receiver {
    let config = ReceiverConfig { pages, geometry: geometry(), ..ReceiverConfig::default() };
    Receiver::new(agent, config).expect("a pool")
}

fn outbox(agent: &Agent, patience: Duration) -> Outbox {
    let sender = SenderConfig { geometry: geometry(), ..SenderConfig::default() };
    Outbox::new(agent, OutboxConfig { sender, patience, proxy: None }).expect("an outbox")
}

fn id(name: &str) -> RequestId {
    RequestId::new(name).expect("valid")
}

fn key(n: u32) -> ChunkKey {
    ChunkKey::new(format!("k{n}")).expect("valid")
}

fn chunks(agent: &Agent, numbers: std::ops::Range<u32>) -> Vec<(ChunkSpec, Option<ChunkSource>)> {
    numbers
        .map(|n| {
            let memory = Memory::anonymous(PAGE as usize).expect("memory");
            memory.write_at(0, &vec![n as u8 + 1; PAGE as usize]).expect("inside");
            let source = ChunkSource::new(agent.register(memory).expect("registered"), vec![(0, PAGE)]);
            (ChunkSpec { key: key(n), len: PAGE }, Some(source))
        })
        .collect()
}

fn batch(
    agent: &Agent,
    request: &str,
    to: &str,
    numbers: std::ops::Range<u32>,
    rest: (u32, bool, bool),
) -> Batch {
    let (total, first, last) = rest;
    let chunks = chunks(agent, numbers);
    Batch { request: id(request), receiver: to.into(), first, total, last, chunks, after: None }
}

/// What came until `ends` requests had ended and `batches` were released.
fn collect(
    outbox: &Outbox,
    ends: usize,
    batches: usize,
) -> (Vec<(String, Result<DeliveryReport>)>, Vec<u64>) {
    let (mut ended, mut released) = (Vec::new(), Vec::new());
    while ended.len() < ends || released.len() < batches {
        match outbox.next_event(SOON).expect("an event") {
            OutboxEvent::Released { batch } => released.push(batch),
            OutboxEvent::Ended { request, result, .. } => ended.push((request.to_string(), result)),
        }
    }
    released.sort_unstable();
    (ended, released)
}

#[test]
fn a_request_in_three_steps_is_delivered_and_every_batch_released() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let receiver = pool(&to, 8);
    let outbox = outbox(&from, SOON);
    let address = &to.addresses()[0];
    let a = outbox.put(batch(&from, "r", address, 0..2, (6, true, false))).expect("taken");
    let b = outbox.put(batch(&from, "r", address, 2..4, (0, false, false))).expect("taken");
    let c = outbox.put(batch(&from, "r", address, 4..5, (0, false, true))).expect("taken");
    let (ended, released) = collect(&outbox, 1, 3);
    let report = ended[0].1.as_ref().expect("delivered");
    assert_eq!((ended[0].0.as_str(), report.written, report.bytes), ("r", 5, 5 * PAGE));
    assert_eq!(released, [a, b, c].map(|n| n.expect("a number")));
    assert_eq!(receiver.lookup(&key(4)), Lookup::Present(PAGE));
    assert_eq!(receiver.stats().free, 3, "the page announced and not used is free");
    assert_eq!(outbox.active(), 0);
    // The next one finds the receiver connected, and its chunks there.
    outbox.put(batch(&from, "s", address, 0..5, (5, true, true))).expect("taken");
    assert_eq!(collect(&outbox, 1, 1).0[0].1.as_ref().expect("delivered").present, 5);
}

#[test]
fn a_receiver_that_comes_later_gets_what_waited() {
    let from = agent("p", "tcp://127.0.0.1:0");
    let place = agent("d0", "tcp://127.0.0.1:0");
    let address = place.addresses()[0].clone();
    drop(place);
    let outbox = outbox(&from, SOON);
    outbox.put(batch(&from, "r", &address, 0..2, (3, true, false))).expect("taken");
    outbox.put(batch(&from, "r", &address, 2..3, (0, false, true))).expect("taken");
    assert!(outbox.next_event(Duration::from_millis(150)).is_none(), "nobody is there");
    let to = agent("d", &address);
    let _pool = pool(&to, 8);
    assert_eq!(collect(&outbox, 1, 2).0[0].1.as_ref().expect("delivered").written, 3);
}

#[test]
fn a_receiver_that_is_not_there_fails_its_requests_and_no_others() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let _pool = pool(&to, 8);
    let outbox = outbox(&from, Duration::from_millis(300));
    let nobody = "tcp://127.0.0.1:1";
    for request in ["a", "b"] {
        outbox.put(batch(&from, request, nobody, 0..1, (2, true, false))).expect("taken");
    }
    outbox.put(batch(&from, "c", &to.addresses()[0], 0..1, (1, true, true))).expect("taken");
    let (mut ended, released) = collect(&outbox, 3, 3);
    ended.sort_by(|x, y| x.0.cmp(&y.0));
    assert_eq!(released.len(), 3);
    assert!(ended[2].1.is_ok());
    for (_, result) in &ended[..2] {
        assert_eq!(result.as_ref().expect_err("nobody is there").code(), ErrorCode::Unreachable);
    }
    // Its later steps are let go of at once; a new request of that name is tried.
    outbox.put(batch(&from, "a", nobody, 1..2, (0, false, true))).expect("taken");
    assert_eq!(collect(&outbox, 0, 1).0.len(), 0);
    outbox.put(batch(&from, "b", nobody, 0..1, (1, true, true))).expect("taken");
    assert!(collect(&outbox, 1, 1).0[0].1.is_err());
}

#[test]
fn a_request_given_up_between_two_steps_leaves_nothing() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let receiver = pool(&to, 8);
    let outbox = outbox(&from, SOON);
    let address = &to.addresses()[0];
    outbox.put(batch(&from, "r", address, 0..2, (4, true, false))).expect("taken");
    let deadline = Instant::now() + SOON;
    while receiver.lookup(&key(1)) != Lookup::Present(PAGE) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(outbox.abort(&id("r"), ErrorCode::Cancelled));
    assert!(!outbox.abort(&id("unknown"), ErrorCode::Cancelled));
    let (ended, _) = collect(&outbox, 1, 1);
    assert_eq!(ended[0].1.as_ref().expect_err("given up").code(), ErrorCode::Cancelled);
    outbox.put(batch(&from, "r", address, 2..4, (0, false, true))).expect("taken");
    collect(&outbox, 0, 1);
    while receiver.stats().free < 8 {
        assert!(Instant::now() < deadline, "{:?}", receiver.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_new_request_of_the_same_name_replaces_one_that_was_left() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let _pool = pool(&to, 8);
    let outbox = outbox(&from, SOON);
    let address = &to.addresses()[0];
    outbox.put(batch(&from, "7", address, 0..2, (6, true, false))).expect("taken");
    outbox.put(batch(&from, "7", address, 10..12, (2, true, true))).expect("taken");
    let (ended, _) = collect(&outbox, 2, 2);
    assert_eq!(ended[0].1.as_ref().expect_err("over").code(), ErrorCode::Cancelled);
    assert_eq!(ended[1].1.as_ref().expect("delivered").written, 2);
}

#[test]
fn memory_comes_back_from_the_youngest_that_waits() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let _pool = pool(&to, 4);
    let outbox = outbox(&from, SOON);
    let address = &to.addresses()[0];
    // The first is admitted and in the middle of its prefill; two others wait for its pages.
    outbox.put(batch(&from, "a", address, 0..1, (4, true, false))).expect("taken");
    assert!(matches!(outbox.next_event(SOON), Some(OutboxEvent::Released { .. })), "written");
    let b = outbox.put(batch(&from, "b", address, 10..12, (4, true, false))).expect("taken");
    std::thread::sleep(Duration::from_millis(2));
    let c = outbox.put(batch(&from, "c", address, 20..22, (2, true, true))).expect("taken");
    assert_eq!(outbox.shed(), Some(id("c")), "the youngest");
    assert_eq!(outbox.shed(), Some(id("b")));
    assert_eq!(outbox.shed(), None, "a is admitted");
    let (ended, released) = collect(&outbox, 2, 2);
    assert!(ended.iter().all(|(_, r)| r.as_ref().expect_err("gave way").code() == ErrorCode::NoCapacity));
    assert_eq!(released, [b, c].map(|n| n.expect("a number")));
    outbox.put(batch(&from, "a", address, 1..4, (0, false, true))).expect("taken");
    assert_eq!(collect(&outbox, 1, 1).0[0].1.as_ref().expect("delivered").written, 4);
}

#[test]
fn closing_ends_everything_and_releases_it() {
    let from = agent("p", "tcp://127.0.0.1:0");
    let outbox = outbox(&from, SOON);
    outbox.put(batch(&from, "r", "tcp://127.0.0.1:1", 0..2, (4, true, false))).expect("taken");
    outbox.close(SOON).expect("closed");
    let (ended, released) = collect(&outbox, 1, 1);
    assert_eq!((ended[0].1.as_ref().expect_err("over").code(), released.len()), (ErrorCode::Closed, 1));
    assert!(outbox.next_event(SOON).is_none(), "closed and empty: no waiting");
    assert!(outbox.put(batch(&from, "s", "tcp://127.0.0.1:1", 0..1, (1, true, true))).is_err());
}

#[test]
fn what_is_wrong_with_a_batch_is_said_at_once() {
    let from = agent("p", "tcp://127.0.0.1:0");
    let outbox = outbox(&from, SOON);
    let nowhere = batch(&from, "r", "nowhere", 0..1, (1, true, true));
    assert_eq!(outbox.put(nowhere).expect_err("refused").code(), ErrorCode::InvalidArgument);
    let empty = batch(&from, "r", "tcp://127.0.0.1:1", 0..0, (1, true, false));
    assert_eq!(outbox.put(empty).expect_err("refused").code(), ErrorCode::InvalidArgument);
    outbox.put(batch(&from, "r", "tcp://127.0.0.1:1", 0..1, (2, true, false))).expect("taken");
    let elsewhere = batch(&from, "r", "tcp://127.0.0.1:2", 1..2, (0, false, true));
    assert_eq!(outbox.put(elsewhere).expect_err("refused").code(), ErrorCode::InvalidArgument);
}

// ---- places ----

/// A batch like those of `batch`, whose chunks are to be produced in their places.
fn in_place(request: &str, to: &str, numbers: std::ops::Range<u32>, rest: (u32, bool, bool)) -> Batch {
    let (total, first, last) = rest;
    let chunks = numbers.map(|n| (ChunkSpec { key: key(n), len: PAGE }, None)).collect();
    Batch { request: id(request), receiver: to.into(), first, total, last, chunks, after: None }
}

fn fill(place: &Placed, byte: u8) {
    place.memory.write_at(place.offset, &vec![byte; place.len as usize]).expect("inside");
}

fn bytes_of(receiver: &Receiver, n: u32) -> Vec<u8> {
    let chunk = receiver.acquire(&key(n)).expect("published");
    let mut bytes = vec![0; PAGE as usize];
    receiver.memory().read_at(chunk.offset(), &mut bytes).expect("inside");
    bytes
}

/// Two agents, a pool, and an outbox that has sent one chunk (number 99) to it and so is connected.
fn connected(pages: u32, timeout: Duration) -> (Agent, Agent, Receiver, Outbox, String) {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let receiver = pool(&to, pages);
    let sender = SenderConfig { geometry: geometry(), request_timeout: timeout, ..SenderConfig::default() };
    let outbox = Outbox::new(&from, OutboxConfig { sender, patience: SOON, proxy: None }).expect("an outbox");
    let address = to.addresses()[0].clone();
    outbox.put(batch(&from, "warm", &address, 99..100, (1, true, true))).expect("taken");
    collect(&outbox, 1, 1).0[0].1.as_ref().expect("delivered");
    (to, from, receiver, outbox, address)
}

fn until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !what() {
        assert!(Instant::now() < deadline, "it never came true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn bytes_produced_in_their_places_need_no_transfer() {
    let (_to, from, receiver, outbox, address) = connected(8, SOON);
    let steps =
        [in_place("r", &address, 0..2, (5, true, false)), in_place("r", &address, 2..5, (0, false, true))];
    for step in steps {
        let places = outbox.place(&step, None, SOON).expect("asked");
        let first = step.chunks[0].0.key.clone();
        for (i, place) in places.iter().enumerate() {
            let n = if first == key(0) { i } else { i + 2 };
            fill(place.as_ref().expect("a place"), n as u8 + 1);
        }
        assert_eq!(receiver.lookup(&first), Lookup::Pending, "not published before it is put");
        assert_eq!(outbox.put(step).expect("taken"), None, "nothing is read");
    }
    let (ended, released) = collect(&outbox, 1, 0);
    let report = ended[0].1.as_ref().expect("delivered");
    assert_eq!((report.written, report.bytes, report.transport), (5, 5 * PAGE, TransportKind::Inproc));
    assert!(released.is_empty());
    for n in 0..5 {
        assert_eq!(bytes_of(&receiver, n), vec![n as u8 + 1; PAGE as usize], "chunk {n}");
    }
    drop(from);
}

#[test]
fn a_batch_is_put_as_it_was_placed() {
    let (_to, from, receiver, outbox, address) = connected(8, SOON);
    let step = in_place("r", &address, 0..3, (3, true, true));
    for (n, place) in outbox.place(&step, None, SOON).expect("asked").iter().enumerate() {
        fill(place.as_ref().expect("a place"), n as u8 + 1);
    }
    outbox.put_placed(&step.request, None).expect("taken");
    assert_eq!(collect(&outbox, 1, 0).0[0].1.as_ref().expect("delivered").written, 3);
    assert_eq!(bytes_of(&receiver, 2), vec![3; PAGE as usize]);
    // One of them is there already and has no place: its bytes are nowhere.
    let step = in_place("s", &address, 2..4, (2, true, true));
    let places = outbox.place(&step, None, SOON).expect("asked");
    assert!(places[0].is_none() && places[1].is_some());
    let refused = |r: &RequestId| outbox.put_placed(r, None).expect_err("refused").code();
    assert_eq!(refused(&step.request), ErrorCode::InvalidArgument);
    assert_eq!(refused(&step.request), ErrorCode::NotFound, "it was given up");
    until(|| receiver.stats().writing == 0);
    drop(from);
}

#[test]
fn an_answer_is_found_by_the_thread_that_looks_for_it() {
    let (_to, from, _receiver, outbox, address) = connected(8, SOON);
    let mut seen = Vec::new();
    for n in 0..50 {
        outbox.put(batch(&from, &n.to_string(), &address, 0..1, (1, true, true))).expect("taken");
        until(|| {
            seen.extend(outbox.attend(Duration::from_micros(100)));
            outbox.active() == 0
        });
    }
    seen.extend(std::iter::from_fn(|| outbox.next_event(Duration::from_millis(20))));
    let ended = seen.iter().filter(|e| matches!(e, OutboxEvent::Ended { result: Ok(_), .. })).count();
    assert_eq!((ended, seen.len()), (50, 100), "an end and a release each");
}

#[test]
fn what_is_there_already_has_no_place_and_is_put_from_memory() {
    let (_to, from, receiver, outbox, address) = connected(8, SOON);
    outbox.put(batch(&from, "a", &address, 0..1, (1, true, true))).expect("taken");
    collect(&outbox, 1, 1);
    let mut b = in_place("b", &address, 0..2, (2, true, true));
    let places = outbox.place(&b, None, SOON).expect("asked");
    assert!(places[0].is_none());
    fill(places[1].as_ref().expect("a place"), 7);
    b.chunks[0].1 = chunks(&from, 0..1).remove(0).1;
    outbox.put(b).expect("taken");
    let report = collect(&outbox, 1, 1).0.remove(0).1.expect("delivered");
    assert_eq!((report.written, report.present), (1, 1));
    assert_eq!(bytes_of(&receiver, 1), vec![7; PAGE as usize]);
}

#[test]
fn without_a_connection_or_a_page_there_are_no_places_and_nothing_is_lost() {
    let (to, from) = (agent("d", "tcp://127.0.0.1:0"), agent("p", "tcp://127.0.0.1:0"));
    let receiver = pool(&to, 2);
    let outbox = outbox(&from, SOON);
    let address = to.addresses()[0].clone();
    let moment = Duration::from_millis(20);
    // Not connected yet.
    let a = in_place("a", &address, 0..1, (2, true, false));
    assert!(outbox.place(&a, None, moment).expect("asked")[0].is_none());
    outbox.put(batch(&from, "a", &address, 0..1, (2, true, false))).expect("taken");
    assert!(matches!(outbox.next_event(SOON), Some(OutboxEvent::Released { .. })), "written");
    // Another device's memory is not what this pool is.
    let b = in_place("b", &address, 10..11, (1, true, true));
    assert!(outbox.place(&b, Some(0), moment).expect("asked")[0].is_none());
    // Both pages are the first request's.
    assert!(outbox.place(&b, None, moment).expect("asked")[0].is_none());
    outbox.put(batch(&from, "b", &address, 10..11, (1, true, true))).expect("taken");
    outbox.put(batch(&from, "a", &address, 1..2, (0, false, true))).expect("taken");
    let until_admitted = collect(&outbox, 1, 1).0;
    assert_eq!(until_admitted[0].0, "a");
    for n in 0..2 {
        assert!(receiver.remove(&key(n)));
    }
    let (ended, _) = collect(&outbox, 1, 1);
    assert_eq!((ended[0].0.as_str(), ended[0].1.as_ref().expect("delivered").written), ("b", 1));
}

#[test]
fn a_page_belongs_to_whoever_fills_it_also_when_its_request_has_failed() {
    let (_to, from, receiver, outbox, address) = connected(2, Duration::from_millis(400));
    assert!(receiver.remove(&key(99)));
    let a = in_place("a", &address, 0..2, (2, true, true));
    let places = outbox.place(&a, None, SOON).expect("asked");
    assert!(places.iter().all(Option::is_some));
    let (ended, _) = collect(&outbox, 1, 0);
    assert_eq!(ended[0].1.as_ref().expect_err("not put in time").code(), ErrorCode::TimedOut);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(receiver.stats().free, 0, "somebody may be writing there: {:?}", receiver.stats());
    for place in places.iter().flatten() {
        fill(place, 1);
    }
    outbox.put(a).expect("taken, and let go of");
    until(|| receiver.stats().free == 2);
    assert_eq!(receiver.lookup(&key(0)), Lookup::Absent);
    drop(from);
}

#[test]
fn places_given_up_end_their_request_and_give_the_pages_back() {
    let (_to, _from, receiver, outbox, address) = connected(4, SOON);
    let a = in_place("a", &address, 0..2, (3, true, false));
    assert!(outbox.place(&a, None, SOON).expect("asked").iter().all(Option::is_some));
    let twice = outbox.place(&a, None, SOON).expect_err("they have places");
    assert_eq!(twice.code(), ErrorCode::Busy);
    assert!(outbox.give_up(&id("a"), None));
    assert!(!outbox.give_up(&id("a"), None), "once");
    let (ended, _) = collect(&outbox, 1, 0);
    assert_eq!(ended[0].1.as_ref().expect_err("given up").code(), ErrorCode::Cancelled);
    until(|| receiver.stats().free == 3);
}

#[test]
fn a_batch_that_is_not_what_was_announced_fails_its_request() {
    let (_to, _from, receiver, outbox, address) = connected(4, SOON);
    for wrong in ["fewer", "neither"] {
        let mut a = in_place("a", &address, 0..2, (2, true, true));
        outbox.place(&a, None, SOON).expect("asked");
        match wrong {
            "fewer" => drop(a.chunks.pop()),
            _ => {
                // No place was ever asked for.
                outbox.give_up(&id("a"), None);
            }
        }
        assert_eq!(outbox.put(a).expect_err(wrong).code(), ErrorCode::InvalidArgument, "{wrong}");
        assert!(collect(&outbox, 1, 0).0[0].1.is_err(), "{wrong}");
        assert_eq!(outbox.active(), 0, "{wrong}");
        until(|| receiver.stats().free == 3);
    }
}

#[test]
fn a_place_that_was_not_used_is_written_from_memory() {
    let (_to, from, receiver, outbox, address) = connected(4, SOON);
    let mut a = in_place("a", &address, 0..2, (2, true, true));
    let places = outbox.place(&a, None, SOON).expect("asked");
    fill(places[0].as_ref().expect("a place"), 9);
    a.chunks[1].1 = chunks(&from, 1..2).remove(0).1;
    let batch = outbox.put(a).expect("taken");
    let (ended, released) = collect(&outbox, 1, 1);
    assert_eq!((ended[0].1.as_ref().expect("delivered").written, released), (2, Vec::from_iter(batch)));
    assert_eq!(bytes_of(&receiver, 0), vec![9; PAGE as usize]);
    assert_eq!(bytes_of(&receiver, 1), vec![2; PAGE as usize], "what the source has");
}

#[test]
fn an_outbox_that_closes_leaves_places_to_their_owner() {
    let (_to, _from, receiver, outbox, address) = connected(2, SOON);
    let a = in_place("a", &address, 0..1, (1, true, true));
    let places = outbox.place(&a, None, SOON).expect("asked");
    outbox.close(SOON).expect("closed");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(receiver.stats().free, 0, "{:?}", receiver.stats());
    fill(places[0].as_ref().expect("a place"), 1);
    assert!(outbox.give_up(&id("a"), None));
    until(|| receiver.stats().free == 1);
}

#[test]
fn places_that_nobody_puts_end_with_the_outbox() {
    let (_to, _from, receiver, outbox, address) = connected(2, SOON);
    let a = in_place("a", &address, 0..1, (1, true, true));
    let places = outbox.place(&a, None, SOON).expect("asked");
    assert!(places[0].is_some());
    drop((outbox, places));
    until(|| receiver.stats().free == 1);
}
