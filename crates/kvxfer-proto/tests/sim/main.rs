//! Two and more simulated peers on virtual links with virtual time: first the rules one by one, then random interleavings.

mod world;

use kvxfer_proto::ErrorCode;
use kvxfer_proto::pool::Known;
use kvxfer_proto::receiver::{Event, Settings};
use proptest::prelude::*;
use world::{Action, Faults, World, key, settings};

fn request(sender: usize, first: u32, count: u32) -> Action {
    Action::Request { sender, first, count, deadline_ms: 1000, supply_after_ms: 1 }
}

fn world(pages: u32, senders: usize) -> World {
    World::new(settings(pages), senders, Faults::default())
}

fn ok(w: &World, i: usize) -> kvxfer_proto::sender::Summary {
    *w.result(i).expect("ended").as_ref().unwrap_or_else(|f| panic!("request {i}: {f:?}"))
}

fn code(w: &World, i: usize) -> ErrorCode {
    w.result(i).expect("ended").as_ref().expect_err("failed").code
}

#[test]
fn a_request_is_moved() {
    let mut w = world(8, 1);
    w.schedule(0, request(0, 0, 5));
    w.run_until(100);
    let summary = ok(&w, 0);
    assert_eq!((summary.written, summary.present, summary.bytes), (5, 0, 500));
    assert!((0..5).all(|n| w.receiver.known(&key(n)) == Known::Published(100)));
    assert!(matches!(w.events.as_slice(), [Event::Started { .. }, Event::Ready { bytes: 500, .. }]));
    w.run();
}

#[test]
fn two_requests_of_20_chunks_share_32_pages_without_deadlock() {
    let mut w = world(32, 2);
    for sender in 0..2 {
        let first = sender as u32 * 20;
        w.schedule(0, Action::Request { sender, first, count: 20, deadline_ms: 1900, supply_after_ms: 100 });
    }
    // The first one's consumer reads and lets go.
    for n in 0..20 {
        w.schedule(300, Action::Consume { key: n, hold_ms: 50, remove: true });
    }
    w.run_until(1000);
    assert_eq!((ok(&w, 0).written, ok(&w, 1).written), (20, 20));
    assert!(ok(&w, 1).queued.as_millis() >= 300, "the second one waited for pages");
    w.run();
}

#[test]
fn a_request_larger_than_the_pool_is_refused_at_once() {
    let mut w = world(4, 1);
    w.schedule(0, request(0, 0, 5));
    w.run_until(5);
    assert!(w.requests.is_empty(), "the sender knows the pool's size and refuses it itself");
    w.run();
}

#[test]
fn a_full_pool_refuses_when_the_deadline_has_passed() {
    let mut w = world(4, 2);
    w.schedule(0, request(0, 0, 4));
    w.schedule(10, request(1, 10, 1));
    w.run_until(1500);
    ok(&w, 0);
    assert!(matches!(code(&w, 1), ErrorCode::TimedOut | ErrorCode::NoCapacity));
    w.run();
}

#[test]
fn a_pending_chunk_waits_for_that_write() {
    let mut w = world(8, 2);
    w.schedule(0, Action::Request { sender: 0, first: 0, count: 2, deadline_ms: 1000, supply_after_ms: 200 });
    w.schedule(10, request(1, 0, 3));
    w.run_until(90);
    assert!(w.result(1).is_none(), "its first chunks have not arrived");
    w.run_until(400);
    assert_eq!((ok(&w, 0).written, ok(&w, 1).written, ok(&w, 1).present), (2, 1, 2));
    w.run();
}

#[test]
fn a_pending_chunk_is_granted_when_its_writer_gives_up() {
    let mut w = world(8, 2);
    w.schedule(0, Action::Request { sender: 0, first: 0, count: 2, deadline_ms: 1000, supply_after_ms: 500 });
    w.schedule(10, request(1, 0, 3));
    w.schedule(50, Action::Abort { sender: 0 });
    w.run_until(150);
    assert_eq!(code(&w, 0), ErrorCode::Cancelled);
    assert_eq!((ok(&w, 1).written, ok(&w, 1).present), (3, 0));
    w.run();
}

#[test]
fn a_killed_sender_leaves_nothing() {
    let mut w = world(8, 2);
    w.schedule(0, Action::Request { sender: 0, first: 0, count: 8, deadline_ms: 1000, supply_after_ms: 100 });
    w.schedule(50, Action::Kill { sender: 0, silent_ms: 100 });
    w.schedule(60, request(1, 20, 8));
    w.run_until(80);
    assert!((0..8).all(|n| w.receiver.known(&key(n)) == Known::Absent));
    let stats = w.receiver.stats();
    assert!(stats.pages.quarantined > 0, "its writes may still land: {stats:?}");
    assert!(w.result(1).is_none());
    w.run_until(300);
    assert_eq!(ok(&w, 1).written, 8, "once it is known to be gone its pages are used again");
    w.run();
}

#[test]
fn a_stopped_sender_loses_its_lease_and_its_pages_wait_for_its_word() {
    let mut w = world(4, 2);
    w.schedule(
        0,
        Action::Request { sender: 0, first: 0, count: 4, deadline_ms: 5000, supply_after_ms: 4000 },
    );
    w.schedule(100, Action::Stop { sender: 0, ms: 1000 });
    w.schedule(
        110,
        Action::Request { sender: 1, first: 10, count: 4, deadline_ms: 1900, supply_after_ms: 1 },
    );
    w.run_until(900);
    assert_eq!(w.receiver.stats().pages.quarantined, 4);
    assert!(w.result(1).is_none());
    w.run_until(1500);
    assert_eq!(code(&w, 0), ErrorCode::TimedOut);
    assert_eq!(ok(&w, 1).written, 4);
    w.run();
}

#[test]
fn a_renewed_lease_outlives_a_slow_prefill() {
    let mut w = world(4, 1);
    w.schedule(
        0,
        Action::Request { sender: 0, first: 0, count: 2, deadline_ms: 5000, supply_after_ms: 2000 },
    );
    w.run_until(3000);
    assert_eq!(ok(&w, 0).written, 2);
    w.run();
}

#[test]
fn a_restarted_receiver_serves_new_requests() {
    let mut w = world(4, 1);
    w.schedule(0, Action::Request { sender: 0, first: 0, count: 4, deadline_ms: 1000, supply_after_ms: 500 });
    w.schedule(100, Action::RestartReceiver);
    w.schedule(200, request(0, 0, 4));
    w.run_until(400);
    assert_eq!(code(&w, 0), ErrorCode::PeerGone);
    assert_eq!(ok(&w, 1).written, 4);
    w.run();
}

#[test]
fn a_damaged_chunk_is_written_again_a_bounded_number_of_times() {
    let faults = Faults { choices: vec![255], corrupt: true, ..Faults::default() };
    let mut w = World::new(settings(4), 1, faults);
    w.schedule(0, request(0, 0, 1));
    w.run_until(900);
    assert_eq!(code(&w, 0), ErrorCode::Corrupt);
    assert_eq!(w.receiver.known(&key(0)), Known::Absent);
    w.run();
}

#[test]
fn the_same_request_id_of_two_senders_is_two_requests() {
    let mut w = world(8, 2);
    // The world gives both the same id.
    w.schedule(0, request(0, 0, 2));
    w.schedule(0, request(1, 10, 2));
    w.run_until(100);
    assert_eq!(w.requests[0].name, w.requests[1].name);
    assert_eq!((ok(&w, 0).written, ok(&w, 1).written), (2, 2));
    w.run();
}

#[test]
fn a_slow_request_does_not_block_another_sender() {
    let mut w = world(8, 3);
    w.schedule(
        0,
        Action::Request { sender: 0, first: 0, count: 6, deadline_ms: 1900, supply_after_ms: 1500 },
    );
    w.schedule(10, Action::Request { sender: 1, first: 10, count: 6, deadline_ms: 1900, supply_after_ms: 1 });
    w.schedule(20, request(2, 20, 2));
    w.run_until(200);
    assert!(w.result(0).is_none() && w.result(1).is_none());
    assert_eq!(ok(&w, 2).written, 2, "it fits beside the slow one, and passes the large one that waits");
    w.run();
}

#[test]
fn a_request_named_step_by_step_holds_its_pages_from_the_start() {
    let mut w = world(32, 2);
    for sender in 0..2 {
        w.schedule(0, stepwise(sender, sender as u32 * 20, 20, 4, 0));
    }
    for n in 0..20 {
        w.schedule(300, Action::Consume { key: n, hold_ms: 50, remove: true });
    }
    w.run_until(50);
    assert_eq!(w.receiver.stats().pages.free, 12, "all pages of the first one, none of the second");
    w.run_until(1000);
    assert_eq!((ok(&w, 0).written, ok(&w, 1).written), (20, 20));
    assert!(ok(&w, 1).queued.as_millis() >= 300, "the second one waited for pages, holding none");
    w.run();
}

#[test]
fn announced_chunks_that_never_come_give_their_pages_back() {
    let mut w = world(8, 2);
    w.schedule(0, stepwise(0, 0, 4, 1, 4));
    w.run_until(500);
    assert_eq!(ok(&w, 0).written, 4);
    assert_eq!(w.receiver.stats().pages.free, 4);
    w.run();
}

#[test]
fn a_chunk_named_later_may_be_there_already_or_on_its_way() {
    let mut w = world(16, 3);
    w.schedule(0, request(0, 0, 2));
    w.schedule(5, Action::Request { sender: 1, first: 2, count: 2, deadline_ms: 1900, supply_after_ms: 300 });
    w.schedule(50, stepwise(2, 0, 6, 1, 0));
    w.run_until(1500);
    assert_eq!((ok(&w, 2).present, ok(&w, 2).written), (4, 2));
    w.run();
}

#[test]
fn more_pages_than_the_pool_has_are_refused_at_once() {
    let mut w = world(4, 1);
    w.schedule(0, stepwise(0, 0, 4, 1, 1));
    w.run_until(5);
    assert!(w.requests.is_empty(), "the sender knows the pool's size and refuses it itself");
    w.run();
}

fn read_back(sender: usize, first: u32, count: u32, lease_ms: u64, read_ms: u64) -> Action {
    Action::ReadBack { sender, first, count, lease_ms, read_ms }
}

#[test]
fn what_is_there_is_read_back_and_given_back() {
    let mut w = world(8, 2);
    w.schedule(0, request(0, 0, 3));
    w.schedule(100, read_back(1, 1, 4, 200, 50));
    w.schedule(100, read_back(1, 10, 2, 200, 50));
    w.schedule(100, read_back(1, 0, 3, 0, 50));
    w.run_until(130);
    assert_eq!(w.receiver.stats().pages.pinned, 2, "chunks 1 and 2, and none for the one that only asked");
    w.run_until(200);
    assert_eq!(w.read_backs[0].result, Some(Ok(2)), "two of four are there");
    assert_eq!((&w.read_backs[1].result, &w.read_backs[2].result), (&Some(Ok(0)), &Some(Ok(0))));
    assert_eq!(w.receiver.stats().pages.pinned, 0);
    w.run();
}

#[test]
fn a_page_that_is_read_is_not_reused() {
    let mut w = world(4, 2);
    w.schedule(0, request(0, 0, 4));
    w.schedule(50, read_back(1, 0, 4, 250, 200));
    for n in 0..4 {
        w.schedule(60, Action::Consume { key: n, hold_ms: 0, remove: true });
    }
    w.schedule(70, request(0, 10, 4));
    w.run_until(200);
    assert!(w.result(1).is_none(), "the pages it needs are being read");
    w.run_until(400);
    assert_eq!((ok(&w, 1).written, &w.read_backs[0].result), (4, &Some(Ok(4))));
    w.run();
}

#[test]
fn who_reads_for_longer_than_the_lease_learns_that_it_does_not_count() {
    let mut w = world(4, 2);
    w.schedule(0, request(0, 0, 4));
    w.schedule(50, read_back(1, 0, 4, 100_000, 20));
    w.schedule(52, Action::Stop { sender: 1, ms: 600 });
    for n in 0..4 {
        w.schedule(60, Action::Consume { key: n, hold_ms: 0, remove: true });
    }
    w.schedule(70, request(0, 10, 4));
    w.run_until(500);
    assert_eq!(ok(&w, 1).written, 4, "nobody keeps pages for longer than the receiver's own lease");
    w.run_until(900);
    assert_eq!(w.read_backs[0].result, Some(Err(ErrorCode::Stale)));
    w.run();
}

#[test]
fn pins_of_a_reader_that_was_killed_are_given_back_at_once() {
    let mut w = world(4, 2);
    w.schedule(0, request(0, 0, 4));
    w.schedule(50, read_back(1, 0, 4, 250, 200));
    w.schedule(100, Action::Kill { sender: 1, silent_ms: 100 });
    w.run_until(90);
    assert_eq!(w.receiver.stats().pages.pinned, 4);
    w.run_until(110);
    assert_eq!(w.receiver.stats().pages.pinned, 0);
    w.run();
}

/// A world whose first sender has two pages in advance, as it asked for with the request before.
fn ahead(pages: u32, senders: usize) -> World {
    let settings = Settings { advance: 2 * senders as u32, ..settings(pages) };
    let mut w = World::new(settings, senders, Faults::default());
    w.schedule(0, Action::AtOnce { sender: 0 });
    w.schedule(0, request(0, 50, 2));
    w.run_until(50);
    assert_eq!((ok(&w, 0).written, w.receiver.stats().pages.advanced), (2, 2));
    w
}

#[test]
fn pages_in_advance_are_written_before_the_receiver_has_answered() {
    let mut w = ahead(8, 1);
    w.delay = Some(20);
    w.schedule(60, request(0, 0, 2));
    w.run_until(75);
    assert_eq!(w.landed(0..2), 2, "the declaration has not arrived yet");
    w.run_until(150);
    assert_eq!((ok(&w, 1).written, ok(&w, 1).bytes), (2, 200));
    assert!((0..2).all(|n| w.receiver.known(&key(n)) == Known::Published(100)));
    assert_eq!(w.receiver.stats().pages.advanced, 2, "for the next one");
    w.run();
}

#[test]
fn a_page_in_advance_comes_back_when_its_chunk_is_there_already() {
    let mut w = ahead(8, 2);
    w.schedule(60, request(1, 0, 1));
    w.schedule(100, request(0, 0, 2));
    w.run_until(200);
    assert_eq!((ok(&w, 2).written, ok(&w, 2).present), (1, 1));
    let pages = w.receiver.stats().pages;
    assert_eq!((pages.published, pages.free + pages.advanced), (4, 4), "{pages:?}");
    w.run();
}

#[test]
fn a_page_in_advance_waits_for_the_write_of_another_request() {
    for gives_up in [false, true] {
        let mut w = ahead(8, 2);
        let slow = Action::Request { sender: 1, first: 0, count: 1, deadline_ms: 900, supply_after_ms: 200 };
        w.schedule(60, slow);
        w.schedule(70, request(0, 0, 2));
        if gives_up {
            w.schedule(150, Action::Abort { sender: 1 });
        }
        w.run_until(140);
        assert!(w.result(2).is_none(), "its first chunk is another's to write");
        w.run_until(400);
        let summary = ok(&w, 2);
        assert_eq!((summary.written, summary.present), if gives_up { (2, 0) } else { (1, 1) });
        w.run();
    }
}

#[test]
fn a_page_in_advance_comes_back_with_a_request_that_ends() {
    let mut w = ahead(8, 2);
    w.schedule(60, Action::Request { sender: 1, first: 0, count: 1, deadline_ms: 900, supply_after_ms: 500 });
    w.schedule(70, request(0, 0, 2));
    w.schedule(150, Action::Abort { sender: 0 });
    w.run_until(200);
    assert_eq!(code(&w, 2), ErrorCode::Cancelled);
    let pages = w.receiver.stats().pages;
    assert_eq!((pages.writing, pages.advanced, pages.quarantined), (1, 2, 0), "{pages:?}");
    w.run();
}

#[test]
fn pages_in_advance_are_recalled_for_who_waits() {
    let mut w = ahead(6, 2);
    w.schedule(60, request(1, 0, 6));
    for n in 50..52 {
        w.schedule(55, Action::Consume { key: n, hold_ms: 1, remove: true });
    }
    w.run_until(200);
    assert_eq!(ok(&w, 1).written, 6, "with all pages of the pool");
    w.run();
}

#[test]
fn a_killed_sender_s_pages_in_advance_wait_until_it_cannot_write() {
    let mut w = ahead(8, 2);
    w.schedule(60, Action::Kill { sender: 0, silent_ms: 100 });
    w.run_until(100);
    let pages = w.receiver.stats().pages;
    assert_eq!((pages.advanced, pages.quarantined), (0, 2));
    w.run_until(200);
    assert_eq!(w.receiver.stats().pages.free, 6);
    w.run();
}

fn stepwise(sender: usize, first: u32, count: u32, named: u32, extra: u32) -> Action {
    Action::Stepwise { sender, first, count, named, extra, deadline_ms: 1900, supply_after_ms: 100 }
}

fn actions(senders: usize, restarts: bool) -> impl Strategy<Value = Vec<(u64, Action)>> {
    let sender = 0..senders;
    let one = prop_oneof![
        8 => (sender.clone(), 0..24u32, 1..9u32, 20..1500u64, 0..300u64).prop_map(
            |(sender, first, count, deadline_ms, supply_after_ms)| Action::Request {
                sender, first, count, deadline_ms, supply_after_ms
            }
        ),
        4 => (sender.clone(), 0..24u32, 1..9u32, 1..4u32, 0..3u32, 20..1500u64, 0..300u64).prop_map(
            |(sender, first, count, named, extra, deadline_ms, supply_after_ms)| Action::Stepwise {
                sender, first, count, named, extra, deadline_ms, supply_after_ms
            }
        ),
        1 => sender.clone().prop_map(|sender| Action::Abort { sender }),
        3 => sender.clone().prop_map(|sender| Action::AtOnce { sender }),
        1 => (sender.clone(), 0..400u64).prop_map(|(sender, silent_ms)| Action::Kill { sender, silent_ms }),
        1 => (sender.clone(), 0..900u64).prop_map(|(sender, ms)| Action::Stop { sender, ms }),
        1 => sender.clone().prop_map(|sender| Action::Disconnect { sender }),
        4 => (sender, 0..24u32, 1..9u32, 0..500u64, 0..400u64).prop_map(
            |(sender, first, count, lease_ms, read_ms)| Action::ReadBack { sender, first, count, lease_ms, read_ms }
        ),
        5 => (0..32u32, 0..200u64, any::<bool>())
            .prop_map(|(key, hold_ms, remove)| Action::Consume { key, hold_ms, remove }),
        u32::from(restarts) => Just(Action::RestartReceiver),
    ];
    proptest::collection::vec((0..1000u64, one), 1..24)
}

/// `KVXFER_SIM_CASES` asks for a longer search.
fn cases() -> u32 {
    std::env::var("KVXFER_SIM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400)
}

fn play(pages: u32, faults: Faults, script: Vec<(u64, Action)>) -> World {
    let mut w = World::new(settings(pages), 3, faults);
    for (at, action) in script {
        w.schedule(at, action);
    }
    w.run();
    w
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 2000, ..ProptestConfig::default() })]

    /// The link as it is: in order, nothing lost while it is up. Transfers are slow, fail and arrive damaged; peers come and go.
    #[test]
    fn any_interleaving_keeps_the_promises(
        pages in 8..20u32,
        script in actions(3, true),
        choices in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let faults = Faults { choices, corrupt: true, fail: true, slow: true, ..Faults::default() };
        play(pages, faults, script);
    }

    /// A link that loses, repeats and reorders messages: it never does, but the promises do not depend on it.
    #[test]
    fn a_hostile_link_breaks_no_promise(
        pages in 8..20u32,
        script in actions(3, false),
        choices in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let faults = Faults {
            choices, drop: true, duplicate: true, reorder: true, corrupt: true, fail: true, slow: true,
        };
        play(pages, faults, script);
    }

    /// Without faults and with enough time every request succeeds, however requests share chunks and pages.
    #[test]
    fn without_faults_every_request_succeeds(
        pages in 12..20u32,
        requests in proptest::collection::vec((0..3usize, 0..24u32, 1..13u32, 0..100u64, 0..50u64), 1..6),
        at_once in proptest::collection::vec(any::<bool>(), 3),
    ) {
        let mut settings = settings(pages);
        settings.admission_timeout = std::time::Duration::from_secs(60);
        settings.retention = std::time::Duration::from_millis(500);
        let mut w = World::new(settings, 3, Faults::default());
        let n = requests.len();
        for sender in (0..3).filter(|s| at_once[*s]) {
            w.schedule(0, Action::AtOnce { sender });
        }
        for (sender, first, count, at, supply_after_ms) in requests {
            w.schedule(at, Action::Request { sender, first, count, deadline_ms: 60_000, supply_after_ms });
        }
        w.run_until(30_000);
        prop_assert_eq!(w.requests.len(), n);
        for i in 0..n {
            ok(&w, i);
        }
        w.run();
    }
}
