//! The router's rules, one by one.

use super::*;
use crate::config::{Instance, Policy, Receiver};
use std::collections::HashSet;

mod books;

type TestRouter = Router<u64>;

fn instance(role: Role, number: usize, ranks: usize) -> Instance {
    let ports = |from: u16| (0..ranks as u16).map(|i| from + i).collect();
    Instance {
        name: format!("{role}{number}"),
        role,
        host: "localhost".into(),
        port: 8000 + number as u16,
        weight: 1,
        max_requests: None,
        receiver: Receiver { host: "localhost".into(), init_ports: ports(100), alloc_ports: ports(200) },
    }
}

fn router(settings: &Settings, prefillers: usize, decoders: usize, ranks: usize) -> TestRouter {
    let all = (1..=prefillers)
        .map(|i| instance(Role::Prefiller, i, 0))
        .chain((1..=decoders).map(|i| instance(Role::Decoder, i, ranks)));
    Router::new(settings, all, Ids::new(1, 2))
}

fn at(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

fn enter(r: &mut TestRouter, now: Time) -> LegId {
    match r.enter(now, 0) {
        Entry::Admitted(leg) | Entry::Queued(leg, _) => leg,
        other => panic!("{other:?}"),
    }
}

fn demand(prompt: u64) -> Demand {
    Demand { prompt, answer: 16, prefix: 0 }
}

fn go(r: &mut TestRouter, now: Time, leg: LegId, prompt: u64) -> Assignment {
    match r.route(now, leg, demand(prompt), true) {
        Routed::Go(assignment) => assignment,
        other => panic!("{other:?}"),
    }
}

fn names(assignment: &Assignment) -> (Option<String>, String) {
    (assignment.prefiller.as_ref().map(|(_, i)| i.name.clone()), assignment.decoder.1.name.clone())
}

fn ready(transfer: &str, rank: u32) -> Notification {
    Notification::KvReady { req_id: transfer.into(), tp_rank: rank, bytes: 10, took_us: 5 + u64::from(rank) }
}

fn plain(transfer: &str) -> Notification {
    Notification::ProxyNotif { req_id: transfer.into() }
}

#[test]
fn prefillers_and_decoders_take_turns_each_for_itself() {
    let mut r = router(&Settings::default(), 2, 3, 1);
    let seen: Vec<_> = (0..6)
        .map(|_| {
            let leg = enter(&mut r, at(0));
            names(&go(&mut r, at(0), leg, 10))
        })
        .collect();
    let prefillers: Vec<_> = seen.iter().map(|(p, _)| p.clone().expect("a prefiller")).collect();
    let decoders: Vec<_> = seen.iter().map(|(_, d)| d.clone()).collect();
    assert_eq!(prefillers, ["prefiller1", "prefiller2"].repeat(3));
    assert_eq!(decoders, ["decoder1", "decoder2", "decoder3"].repeat(2));
}

#[test]
fn weights_are_shares() {
    let mut heavy = instance(Role::Prefiller, 1, 0);
    heavy.weight = 3;
    let mut r: TestRouter = Router::new(
        &Settings::default(),
        [heavy, instance(Role::Prefiller, 2, 0), instance(Role::Decoder, 1, 1)],
        Ids::new(1, 2),
    );
    let mut first = 0;
    for _ in 0..40 {
        let leg = enter(&mut r, at(0));
        first += u32::from(names(&go(&mut r, at(0), leg, 10)).0.as_deref() == Some("prefiller1"));
    }
    assert_eq!(first, 30);
}

#[test]
fn least_tokens_follows_the_load() {
    let settings = Settings {
        policy: Policies { prefill: Policy::LeastTokens, ..Policies::default() },
        ..Settings::default()
    };
    let mut r = router(&settings, 2, 1, 1);
    let big = enter(&mut r, at(0));
    let first = names(&go(&mut r, at(0), big, 10_000)).0;
    for _ in 0..5 {
        let leg = enter(&mut r, at(0));
        assert_ne!(names(&go(&mut r, at(0), leg, 100)).0, first);
    }
    r.finish(at(1), big);
    let leg = enter(&mut r, at(1));
    assert_eq!(names(&go(&mut r, at(1), leg, 100)).0, first);
}

#[test]
fn alike_prompts_go_together_until_it_is_too_much() {
    let policy = Policies { prefill: Policy::PrefixAffinity, ..Policies::default() };
    let settings = Settings { policy: policy.clone(), ..Settings::default() };
    let mut r = router(&settings, 4, 1, 1);
    let system: Vec<u32> = (0..256).collect();
    let prompt = |extra: u32| [system.clone(), vec![extra; 50]].concat();
    let mut places = HashSet::new();
    for i in 0..20 {
        let prefix = prefix_digest(&prompt(i), &policy);
        let leg = enter(&mut r, at(0));
        let Routed::Go(a) = r.route(at(0), leg, Demand { prompt: 300, answer: 16, prefix }, true) else {
            panic!("there is room")
        };
        places.insert(names(&a).0);
        r.finish(at(0), leg);
    }
    assert_eq!(places.len(), 1, "the same first chunk, the same prefiller");
    // Held at once, they overflow to others, but everybody gets some.
    let counts: Vec<_> = (0..40)
        .map(|i| {
            let leg = enter(&mut r, at(0));
            let prefix = prefix_digest(&prompt(i), &policy);
            match r.route(at(0), leg, Demand { prompt: 300, answer: 16, prefix }, true) {
                Routed::Go(a) => names(&a).0,
                other => panic!("{other:?}"),
            }
        })
        .collect();
    let most = counts.iter().filter(|c| places.contains(*c)).count();
    assert!((11..=20).contains(&most), "{most} of 40 at the preferred one");
    // Many different prefixes spread.
    let mut r = router(&settings, 4, 1, 1);
    let mut spread = HashSet::new();
    for i in 0..64 {
        let leg = enter(&mut r, at(0));
        let prefix = prefix_digest(&[i, i + 1], &policy);
        if let Routed::Go(a) = r.route(at(0), leg, Demand { prompt: 2, answer: 1, prefix }, true) {
            spread.insert(names(&a).0);
        }
        r.finish(at(0), leg);
    }
    assert_eq!(spread.len(), 4);
}

#[test]
fn the_cache_is_there_when_every_rank_has_said_so() {
    let mut r = router(&Settings::default(), 1, 1, 2);
    let leg = enter(&mut r, at(0));
    let transfer = go(&mut r, at(0), leg, 10).transfer;
    assert_eq!(r.note(&plain(&transfer)), Noted::Progress);
    assert!(matches!(r.prefilled(at(1), leg), Kv::Waiting(until) if until == at(10_001)));
    assert_eq!(r.note(&plain(&transfer)), Noted::Ready);
    assert_eq!(r.take_wakes().len(), 1);
    assert_eq!(r.note(&plain(&transfer)), Noted::Duplicate);
    assert!(matches!(r.kv(leg), Kv::Ready { .. }));

    let leg = enter(&mut r, at(0));
    let transfer = go(&mut r, at(0), leg, 10).transfer;
    assert_eq!(r.note(&ready(&transfer, 1)), Noted::Progress);
    assert_eq!(r.note(&ready(&transfer, 1)), Noted::Duplicate);
    assert_eq!(r.note(&ready(&transfer, 0)), Noted::Ready);
    assert_eq!(r.prefilled(at(1), leg), Kv::Ready { bytes: 20, took_us: 6 });
    r.finish(at(2), leg);
    assert_eq!(r.note(&ready(&transfer, 0)), Noted::Late);
    assert_eq!(r.note(&plain("kvx1-1")), Noted::Unknown);
    assert_eq!(r.note(&plain("7")), Noted::Unknown);
    assert_eq!(r.note(&plain(&format!("{transfer}000"))), Noted::Unknown);
}

#[test]
fn stored_requests_of_mp_mode_are_found_by_the_engines_id() {
    let settings = Settings { kv: KvPath::Mp, ..Settings::default() };
    let mut r = router(&settings, 1, 1, 0);
    let leg = enter(&mut r, at(0));
    let transfer = go(&mut r, at(0), leg, 10).transfer;
    let engine = format!("cmpl-{transfer}-0-1f2e3d4c");
    assert_eq!(r.note_stored(&engine, 0, 2), Noted::Progress);
    assert_eq!(r.note_stored(&engine, 1, 2), Noted::Ready);
    assert!(matches!(r.prefilled(at(1), leg), Kv::Ready { .. }));
    assert_eq!(r.note_stored("cmpl-somebody-elses-0", 0, 1), Noted::Unknown);
}

#[test]
fn a_failed_transfer_is_said_with_its_reason() {
    let mut r = router(&Settings::default(), 1, 1, 2);
    let leg = enter(&mut r, at(0));
    let transfer = go(&mut r, at(0), leg, 10).transfer;
    let failed = Notification::KvFailed {
        req_id: transfer.clone(),
        tp_rank: 1,
        code: "no_capacity".into(),
        message: "the pool is full".into(),
        retryable: true,
    };
    assert_eq!(r.note(&failed), Noted::Failed);
    assert_eq!(r.note(&ready(&transfer, 0)), Noted::Duplicate);
    let Kv::Failed { code, message } = r.prefilled(at(1), leg) else { panic!("it failed") };
    assert_eq!((code.as_str(), message.as_str()), ("no_capacity", "rank 1: the pool is full"));
}

#[test]
fn a_failed_prefill_goes_to_another_prefiller_with_a_new_transfer() {
    let mut r = router(&Settings::default(), 2, 1, 1);
    let leg = enter(&mut r, at(0));
    let first = go(&mut r, at(0), leg, 10);
    let AfterPrefill::Retry(second) = r.prefill_failed(at(1), leg, Failure::Broken, "500") else {
        panic!("there is another")
    };
    assert_ne!(names(&first).0, names(&second).0);
    assert_ne!(first.transfer, second.transfer);
    // What the first one says about its attempt does not count.
    assert_eq!(r.note(&ready(&first.transfer, 0)), Noted::Late);
    assert!(matches!(r.prefilled(at(2), leg), Kv::Waiting(_)));
    // When nobody is left, the decoder is on its own.
    let leg = enter(&mut r, at(3));
    go(&mut r, at(3), leg, 10);
    assert!(matches!(r.prefill_failed(at(3), leg, Failure::TimedOut, "slow"), AfterPrefill::Retry(_)));
    assert!(matches!(r.prefill_failed(at(3), leg, Failure::TimedOut, "slow"), AfterPrefill::Alone));
    // The request's own fault is nobody else's.
    let leg = enter(&mut r, at(4));
    go(&mut r, at(4), leg, 10);
    assert!(matches!(r.prefill_failed(at(4), leg, Failure::Request, "400"), AfterPrefill::GiveUp));
}

#[test]
fn the_breaker_opens_lets_one_try_and_closes() {
    let settings = Settings::default();
    let mut r = router(&settings, 1, 1, 1);
    for _ in 0..settings.health.breaker_failures {
        let leg = enter(&mut r, at(0));
        go(&mut r, at(0), leg, 10);
        r.prefill_failed(at(0), leg, Failure::Broken, "500");
        r.finish(at(0), leg);
    }
    let alone = |r: &mut TestRouter, now| {
        let leg = enter(r, now);
        let Routed::Go(a) = r.route(now, leg, demand(10), true) else { panic!("the decoder is well") };
        (leg, a.prefiller.is_none())
    };
    let (leg, is_alone) = alone(&mut r, at(4_999));
    assert!(is_alone, "open");
    r.finish(at(4_999), leg);
    let (trial, is_alone) = alone(&mut r, at(5_000));
    assert!(!is_alone, "one may try");
    let (other, is_alone) = alone(&mut r, at(5_000));
    assert!(is_alone, "only one");
    // The trial ends without an answer: the next one tries.
    r.finish(at(5_001), trial);
    r.finish(at(5_001), other);
    let (trial, is_alone) = alone(&mut r, at(5_001));
    assert!(!is_alone);
    r.prefill_failed(at(5_002), trial, Failure::Broken, "500");
    r.finish(at(5_002), trial);
    // The pause has doubled.
    let (leg, is_alone) = alone(&mut r, at(15_001));
    assert!(is_alone);
    r.finish(at(15_001), leg);
    let (trial, is_alone) = alone(&mut r, at(15_002));
    assert!(!is_alone);
    r.prefilled(at(15_003), trial);
    let (_, is_alone) = alone(&mut r, at(15_003));
    assert!(!is_alone, "closed");
}

#[test]
fn caches_that_never_arrive_open_the_breaker_although_prefills_succeed() {
    let settings = Settings::default();
    let mut r = router(&settings, 1, 1, 1);
    for _ in 0..settings.health.breaker_failures {
        let leg = enter(&mut r, at(0));
        assert!(go(&mut r, at(0), leg, 10).prefiller.is_some());
        r.prefilled(at(0), leg);
        r.kv_timed_out(at(0), leg);
        assert!(matches!(r.kv(leg), Kv::Failed { code, .. } if code == "timed_out"));
        r.finish(at(0), leg);
    }
    let leg = enter(&mut r, at(1));
    assert!(go(&mut r, at(1), leg, 10).prefiller.is_none());
}

#[test]
fn whoever_is_at_an_instance_that_goes_down_hears_of_it() {
    let mut r = router(&Settings::default(), 2, 2, 1);
    let mut at_first = Vec::new();
    for waker in 0..4 {
        let Entry::Admitted(leg) = r.enter(at(0), waker) else { panic!("there is room") };
        let a = go(&mut r, at(0), leg, 10);
        if names(&a).0.as_deref() == Some("prefiller1") {
            at_first.push(waker);
        }
    }
    let first = r.find("prefiller1").expect("there");
    assert!(!r.probe_failed(at(1), first, false, "slow"), "once is not down");
    assert!(r.take_wakes().is_empty());
    assert!(r.probe_failed(at(1), first, true, "refused"));
    let mut woken = r.take_wakes();
    woken.sort_unstable();
    assert_eq!(woken, at_first);
    assert!(!r.probe_failed(at(2), first, true, "refused"), "it is down already");
    // Nobody is sent there until it is back, and then at once.
    for _ in 0..4 {
        let leg = enter(&mut r, at(2));
        assert_eq!(names(&go(&mut r, at(2), leg, 10)).0.as_deref(), Some("prefiller2"));
    }
    assert!(r.probe_ok(at(3), first));
    let mut back = false;
    for _ in 0..2 {
        let leg = enter(&mut r, at(3));
        back |= names(&go(&mut r, at(3), leg, 10)).0.as_deref() == Some("prefiller1");
    }
    assert!(back);
}

#[test]
fn a_cache_on_its_way_ends_with_either_side() {
    for gone in ["prefiller1", "decoder1"] {
        let mut r = router(&Settings::default(), 1, 1, 1);
        let leg = enter(&mut r, at(0));
        go(&mut r, at(0), leg, 10);
        r.prefilled(at(1), leg);
        let id = r.find(gone).expect("there");
        r.probe_failed(at(2), id, true, "refused");
        assert_eq!(r.take_wakes().len(), 1);
        assert!(matches!(r.kv(leg), Kv::Failed { code, .. } if code == "peer_gone"));
    }
}

#[test]
fn a_decode_of_which_nothing_was_passed_on_goes_to_another_decoder() {
    let mut r = router(&Settings::default(), 1, 2, 1);
    let leg = enter(&mut r, at(0));
    let a = go(&mut r, at(0), leg, 10);
    r.prefilled(at(1), leg);
    let (first, _, same) = r.decoding(at(2), leg).expect("a decoder");
    assert_eq!((first, same), (a.decoder.0, true));
    assert!(matches!(
        r.decode_failed(at(3), leg, Failure::Unreachable, "reset", false),
        AfterDecode::Retry(_)
    ));
    let (second, ..) = r.decoding(at(3), leg).expect("the other one");
    assert_ne!(first, second);
    assert!(matches!(r.decode_failed(at(4), leg, Failure::Broken, "500", false), AfterDecode::GiveUp));
    r.finish(at(5), leg);
    // Nothing is repeated behind the client's back.
    let leg = enter(&mut r, at(6));
    let id = r.find("decoder1").expect("there");
    r.probe_ok(at(6), id);
    go(&mut r, at(6), leg, 10);
    r.decoding(at(6), leg);
    assert!(matches!(r.decode_failed(at(7), leg, Failure::Unreachable, "reset", true), AfterDecode::GiveUp));
}

#[test]
fn a_decoder_that_went_down_before_its_turn_is_replaced() {
    let mut r = router(&Settings::default(), 1, 2, 1);
    let leg = enter(&mut r, at(0));
    let a = go(&mut r, at(0), leg, 10);
    r.prefilled(at(1), leg);
    r.probe_failed(at(1), a.decoder.0, true, "refused");
    let (id, _, holds_cache) = r.decoding(at(2), leg).expect("the other one");
    assert_ne!(id, a.decoder.0);
    assert!(!holds_cache);
}

#[test]
fn without_a_decoder_the_reason_is_said() {
    let mut r = router(&Settings::default(), 1, 1, 1);
    let id = r.find("decoder1").expect("there");
    r.probe_failed(at(0), id, true, "connection refused");
    let leg = enter(&mut r, at(0));
    let Routed::NoDecoder(why, retry) = r.route(at(0), leg, demand(1), true) else { panic!("there is none") };
    assert!(why.contains("decoder1 is down (connection refused)"), "{why}");
    assert!(retry >= 1);
    assert!(!r.can_serve(at(0)));
}

#[test]
fn the_queue_is_first_come_first_served_and_bounded() {
    let mut settings = Settings::default();
    settings.limits.requests = 2;
    settings.limits.queue = 3;
    let mut r = router(&settings, 1, 1, 1);
    let running: Vec<_> = (0..2).map(|_| enter(&mut r, at(0))).collect();
    let waiting: Vec<_> = (10..13)
        .map(|waker| match r.enter(at(0), waker) {
            Entry::Queued(leg, until) => {
                assert_eq!(until, at(30_000));
                leg
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(matches!(r.enter(at(0), 99), Entry::Full(1..=60)));
    r.finish(at(1), running[0]);
    assert_eq!(r.take_wakes(), [10]);
    assert!(r.admitted(waiting[0]) && !r.admitted(waiting[1]));
    // One gives up; its place in the queue is free and the next one's turn is not lost.
    r.finish(at(2), waiting[1]);
    r.finish(at(3), running[1]);
    assert_eq!(r.take_wakes(), [12]);
}

#[test]
fn an_instances_own_limit_makes_legs_wait_for_it() {
    let mut small = instance(Role::Prefiller, 1, 0);
    small.max_requests = Some(1);
    let mut r: TestRouter =
        Router::new(&Settings::default(), [small, instance(Role::Decoder, 1, 1)], Ids::new(1, 2));
    let first = enter(&mut r, at(0));
    go(&mut r, at(0), first, 10);
    let second = enter(&mut r, at(0));
    assert!(matches!(r.route(at(0), second, demand(10), true), Routed::Wait(_)));
    r.prefilled(at(1), first);
    assert_eq!(r.take_wakes().len(), 1);
    assert!(matches!(r.take_routed(second), Some(Routed::Go(_))));
}

#[test]
fn instances_come_rest_and_go() {
    let mut r = router(&Settings::default(), 1, 1, 1);
    let leg = enter(&mut r, at(0));
    let a = go(&mut r, at(0), leg, 10);
    let first = a.prefiller.expect("there").0;
    assert!(r.set_admin(at(1), first, Admin::Removing));
    let second = r.add(at(1), instance(Role::Prefiller, 2, 0));
    assert!(r.instance(first).is_some(), "it still has a request");
    let other = enter(&mut r, at(2));
    assert_eq!(go(&mut r, at(2), other, 10).prefiller.expect("the new one").0, second);
    r.prefilled(at(3), leg);
    assert!(r.instance(first).is_none(), "gone with its last request");
    r.set_admin(at(4), second, Admin::Draining);
    let leg = enter(&mut r, at(4));
    assert!(go(&mut r, at(4), leg, 10).prefiller.is_none());
    r.set_admin(at(5), second, Admin::Active);
    let leg = enter(&mut r, at(5));
    assert!(go(&mut r, at(5), leg, 10).prefiller.is_some());
}

#[test]
fn ids_do_not_collide_between_proxies_or_restarts() {
    let (mut a, mut b, mut again) = (Ids::new(1000, 7), Ids::new(1000, 8), Ids::new(2000, 7));
    let mut seen = HashSet::new();
    for _ in 0..100 {
        for ids in [&mut a, &mut b, &mut again] {
            let number = ids.fresh();
            assert!(seen.insert(ids.text(number)));
        }
    }
    let text = a.text(5);
    assert_eq!((a.parse(&text), b.parse(&text), again.parse(&text)), (Some(5), None, None));
    assert_eq!(a.find(&format!("chatcmpl-{text}-0-ab")), Some(5));
    assert_eq!(a.parse(&format!("{text}x")), None);
    assert_eq!(a.parse(&format!("{}+5", text.trim_end_matches('5'))), None);
}
