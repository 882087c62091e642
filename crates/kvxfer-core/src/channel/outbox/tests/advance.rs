//! Requests that find their pages in advance.

use super::*;

/// A receiver with so many pages, one of which an outbox has in advance, after a request of one chunk, number 99.
fn one_ahead(pages: u32) -> (Agent, Agent, Receiver, Outbox, String) {
    let (to, from, receiver, outbox, address) = connected(pages, SOON);
    until(|| receiver.stats().advanced == 1);
    (to, from, receiver, outbox, address)
}

#[test]
fn requests_one_after_another_find_their_pages_in_advance() {
    let (_to, from, receiver, outbox, address) = one_ahead(32);
    for n in 0..8 {
        let (copied, made) = (2 * n, 2 * n + 1);
        outbox
            .put(batch(&from, &format!("c{n}"), &address, copied..copied + 1, (1, true, true)))
            .expect("taken");
        let (ended, _) = collect(&outbox, 1, 1);
        assert_eq!(ended[0].1.as_ref().expect("delivered").written, 1);
        until(|| receiver.stats().advanced == 1);
        let step = in_place(&format!("p{n}"), &address, made..made + 1, (1, true, true));
        // Nobody is waited for.
        let places = outbox.place(&step, None, Duration::ZERO).expect("asked");
        fill(places[0].as_ref().expect("a place"), made as u8 + 1);
        outbox.put_placed(&step.request, None).expect("taken");
        assert_eq!(collect(&outbox, 1, 0).0[0].1.as_ref().expect("delivered").written, 1);
        until(|| receiver.stats().advanced == 1);
        for n in [copied, made] {
            assert_eq!(bytes_of(&receiver, n), vec![n as u8 + 1; PAGE as usize], "chunk {n}");
        }
    }
    drop(outbox);
    until(|| receiver.stats().advanced == 0);
    let stats = receiver.stats();
    assert_eq!((stats.free + stats.published, stats.quarantined), (32, 0), "{stats:?}");
}

#[test]
fn who_needs_the_whole_pool_gets_what_others_have_in_advance() {
    let (_to, _from, receiver, _outbox, address) = one_ahead(8);
    let other = agent("q", "tcp://127.0.0.1:0");
    let theirs = super::outbox(&other, SOON);
    theirs.put(batch(&other, "r", &address, 0..7, (7, true, true))).expect("taken");
    assert_eq!(collect(&theirs, 1, 1).0[0].1.as_ref().expect("delivered").written, 7);
    let stats = receiver.stats();
    assert_eq!((stats.free, stats.advanced, stats.published), (0, 0, 8));
}

#[test]
fn a_page_in_advance_for_a_chunk_that_is_there_comes_back() {
    let (_to, _from, receiver, outbox, address) = one_ahead(32);
    let step = in_place("again", &address, 99..100, (1, true, true));
    let places = outbox.place(&step, None, Duration::ZERO).expect("asked");
    fill(places[0].as_ref().expect("a place"), 7);
    outbox.put_placed(&step.request, None).expect("taken");
    let report = collect(&outbox, 1, 0).0[0].1.clone().expect("delivered");
    assert_eq!((report.written, report.present, report.bytes), (0, 1, 0));
    assert_eq!(bytes_of(&receiver, 99), vec![100; PAGE as usize], "as the first request left it");
    until(|| receiver.stats().free + receiver.stats().advanced == 31);
}

#[test]
fn a_place_in_advance_that_is_given_up_is_nobodys() {
    let (_to, _from, receiver, outbox, address) = one_ahead(32);
    let step = in_place("r", &address, 0..1, (1, true, true));
    assert!(outbox.place(&step, None, Duration::ZERO).expect("asked")[0].is_some());
    assert_eq!(outbox.shed(), None, "it waits for nothing");
    assert!(outbox.give_up(&step.request, None));
    let stats = || receiver.stats();
    until(|| (stats().writing, stats().quarantined, stats().free + stats().advanced) == (0, 0, 31));
    assert_eq!(receiver.lookup(&key(0)), Lookup::Absent);
}

#[test]
fn a_pool_closes_when_its_pages_in_advance_are_back() {
    let (_to, _from, receiver, outbox, address) = one_ahead(32);
    let step = in_place("r", &address, 0..1, (1, true, true));
    assert!(outbox.place(&step, None, Duration::ZERO).expect("asked")[0].is_some());
    let e = receiver.close(Duration::from_millis(100)).expect_err("somebody may be writing there");
    assert_eq!(e.code(), ErrorCode::TimedOut);
    assert!(outbox.give_up(&step.request, None));
    receiver.close(SOON).expect("nobody writes there any more");
}
