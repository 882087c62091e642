//! Thousands of interleavings, with the invariants checked after every step.

use super::*;
use crate::router::place::cost;
use proptest::prelude::*;
use std::time::Duration;

#[derive(Clone, Debug)]
enum Step {
    Enter,
    Route { leg: usize, prefill: bool },
    Prefilled(usize),
    PrefillFailed(usize, u8),
    Note { leg: usize, rank: u32, how: u8 },
    KvTimedOut(usize),
    Decode(usize),
    Decoded(usize),
    DecodeFailed(usize, u8, bool),
    Finish(usize),
    Probe { instance: usize, how: u8 },
    Admin { instance: usize, how: u8 },
    Add(bool),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let leg = 0..24_usize;
    prop_oneof![
        4 => Just(Step::Enter),
        4 => (leg.clone(), any::<bool>()).prop_map(|(leg, p)| Step::Route { leg, prefill: p }),
        3 => leg.clone().prop_map(Step::Prefilled),
        2 => (leg.clone(), 0..5_u8).prop_map(|(leg, how)| Step::PrefillFailed(leg, how)),
        4 => (leg.clone(), 0..3_u32, 0..4_u8).prop_map(|(leg, rank, how)| Step::Note { leg, rank, how }),
        1 => leg.clone().prop_map(Step::KvTimedOut),
        3 => leg.clone().prop_map(Step::Decode),
        2 => leg.clone().prop_map(Step::Decoded),
        2 => (leg.clone(), 0..5_u8, any::<bool>()).prop_map(|(leg, how, p)| Step::DecodeFailed(leg, how, p)),
        4 => leg.prop_map(Step::Finish),
        2 => (0..8_usize, 0..3_u8).prop_map(|(instance, how)| Step::Probe { instance, how }),
        1 => (0..8_usize, 0..3_u8).prop_map(|(instance, how)| Step::Admin { instance, how }),
        1 => any::<bool>().prop_map(Step::Add),
        2 => (1..20_000_u64).prop_map(Step::Wait),
    ]
}

fn failure(how: u8) -> Failure {
    [Failure::Unreachable, Failure::TimedOut, Failure::Broken, Failure::Busy, Failure::Request]
        [usize::from(how)]
}

/// What must hold after every step.
fn check(r: &TestRouter) {
    let queued = r.legs.values().filter(|leg| leg.phase == Phase::Queued).count();
    assert_eq!(r.queued, queued);
    assert_eq!(r.running, r.legs.len() - queued);
    assert!(r.running <= r.rules.limits.requests);
    assert!(r.queued <= r.rules.limits.queue);
    assert!(queued == 0 || r.running == r.rules.limits.requests, "nobody waits beside a free place");
    for (id, node) in &r.nodes {
        let holders = |leg: &&Leg<u64>| match node.config.role {
            Role::Prefiller => leg.prefiller == Some(*id),
            Role::Decoder => leg.decoder == Some(*id),
        };
        let requests = r.legs.values().filter(holders).count();
        let tokens: u64 = r.legs.values().filter(holders).map(|leg| cost(node.config.role, leg.demand)).sum();
        assert_eq!((node.requests as usize, node.tokens), (requests, tokens), "{}", node.config.name);
        assert!(node.admin != Admin::Removing || node.requests > 0, "an idle one is gone");
    }
    for (number, leg) in &r.transfers {
        let transfer = r.legs[leg].transfer.as_ref().expect("listed transfers exist");
        assert_eq!(transfer.number, *number);
    }
    for (id, leg) in &r.legs {
        if leg.phase == Phase::Waiting {
            assert!(r.for_room.contains(id), "whoever waits is in the queue");
        }
        if leg.phase == Phase::Queued {
            assert!(r.for_turn.contains(id), "whoever waits is in the queue");
        }
    }
    assert!(r.for_turn.len() <= 2 * r.queued + 65);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_interleaving_keeps_the_books(
        steps in prop::collection::vec(step(), 1..160),
        policy in prop_oneof![Just(Policy::RoundRobin), Just(Policy::LeastTokens), Just(Policy::PrefixAffinity)],
        limit in prop::option::of(1..3_u32),
    ) {
        let mut settings = Settings::default();
        settings.limits.requests = 6;
        settings.limits.queue = 5;
        settings.policy.prefill = policy;
        settings.policy.decode = policy;
        let mut r = router(&settings, 0, 0, 0);
        for i in 1..=3 {
            let mut p = instance(Role::Prefiller, i, 0);
            p.max_requests = limit;
            r.add(at(0), p);
        }
        for i in 1..=2 {
            r.add(at(0), instance(Role::Decoder, i, 2));
        }
        let mut now = at(0);
        let mut legs: Vec<LegId> = Vec::new();
        let mut transfers: Vec<(LegId, String)> = Vec::new();
        let mut seen = HashSet::new();
        let mut added = 10;
        let took = |r: &TestRouter, a: &Assignment, seen: &mut HashSet<String>| {
            for (id, _) in a.prefiller.iter().chain([&a.decoder]) {
                assert!(r.nodes.contains_key(id));
            }
            if a.prefiller.is_some() {
                assert!(seen.insert(a.transfer.clone()), "a transfer's id is new");
            }
        };
        for step in steps {
            let pick = |i: usize| legs.get(i).copied();
            match step {
                Step::Enter => match r.enter(now, 1) {
                    Entry::Admitted(leg) | Entry::Queued(leg, _) => legs.push(leg),
                    Entry::Full(seconds) => prop_assert!((1..=60).contains(&seconds)),
                    Entry::Ending => prop_assert!(false, "nobody ended it"),
                },
                Step::Route { leg, prefill } => if let Some(leg) = pick(leg)
                    && r.legs[&leg].phase == Phase::Admitted
                {
                    let usable: HashSet<_> =
                        r.nodes.iter().filter(|(_, n)| n.usable(now)).map(|(id, _)| *id).collect();
                    if let Routed::Go(a) = r.route(now, leg, Demand { prompt: 10, answer: 5, prefix: leg.0 % 3 }, prefill) {
                        took(&r, &a, &mut seen);
                        for (id, _) in a.prefiller.iter().chain([&a.decoder]) {
                            prop_assert!(usable.contains(id), "only usable ones are chosen");
                        }
                        transfers.push((leg, a.transfer));
                    }
                },
                Step::Prefilled(leg) => if let Some(leg) = pick(leg) && r.legs[&leg].phase == Phase::Prefill {
                    r.prefilled(now, leg);
                },
                Step::PrefillFailed(leg, how) => if let Some(leg) = pick(leg)
                    && r.legs[&leg].phase == Phase::Prefill
                {
                    match r.prefill_failed(now, leg, failure(how), "why") {
                        AfterPrefill::Retry(a) => {
                            took(&r, &a, &mut seen);
                            transfers.push((leg, a.transfer));
                        }
                        AfterPrefill::Alone => { r.decoding(now, leg); }
                        AfterPrefill::GiveUp => r.finish(now, leg),
                    }
                },
                Step::Note { leg, rank, how } => if let Some((_, transfer)) = transfers.get(leg) {
                    match how {
                        0 => r.note(&plain(transfer)),
                        1 => r.note(&ready(transfer, rank)),
                        2 => r.note_stored(&format!("cmpl-{transfer}-0"), rank, 2),
                        _ => r.note(&Notification::KvFailed {
                            req_id: transfer.clone(), tp_rank: rank, code: "x".into(), message: "y".into(), retryable: false,
                        }),
                    };
                },
                Step::KvTimedOut(leg) => if let Some(leg) = pick(leg) && r.legs[&leg].phase == Phase::Kv {
                    r.kv_timed_out(now, leg);
                    prop_assert!(!matches!(r.kv(leg), Kv::Waiting(_)));
                },
                Step::Decode(leg) => if let Some(leg) = pick(leg)
                    && matches!(r.legs[&leg].phase, Phase::Kv | Phase::Decode)
                {
                    r.decoding(now, leg);
                },
                Step::Decoded(leg) => if let Some(leg) = pick(leg) && r.legs[&leg].phase == Phase::Decode {
                    r.decoded(leg);
                },
                Step::DecodeFailed(leg, how, passed) => if let Some(leg) = pick(leg)
                    && r.legs[&leg].phase == Phase::Decode
                    && let AfterDecode::GiveUp = r.decode_failed(now, leg, failure(how), "why", passed)
                {
                    r.finish(now, leg);
                },
                Step::Finish(leg) => if let Some(leg) = pick(leg) {
                    r.finish(now, leg);
                },
                Step::Probe { instance, how } => if let Some((id, _)) = r.instances().get(instance) {
                    match how {
                        0 => r.probe_ok(now, *id),
                        1 => r.probe_failed(now, *id, false, "slow"),
                        _ => r.probe_failed(now, *id, true, "refused"),
                    };
                },
                Step::Admin { instance, how } => if let Some((id, _)) = r.instances().get(instance) {
                    r.set_admin(now, *id, [Admin::Active, Admin::Draining, Admin::Removing][usize::from(how)]);
                },
                Step::Add(prefiller) => {
                    added += 1;
                    let role = if prefiller { Role::Prefiller } else { Role::Decoder };
                    r.add(now, instance(role, added, 2));
                }
                Step::Wait(ms) => now = now + Duration::from_millis(ms),
            }
            legs.retain(|leg| r.legs.contains_key(leg));
            // A leg that waited for an instance hears what became of it.
            for leg in &legs {
                if r.take_routed(*leg).is_some_and(|routed| !matches!(routed, Routed::Go(_) | Routed::NoDecoder(..))) {
                    prop_assert!(false, "who is woken need not wait again");
                }
            }
            r.take_wakes();
            check(&r);
        }
        for leg in legs {
            r.finish(now, leg);
        }
        r.pump(now);
        prop_assert!(r.legs.is_empty() && r.transfers.is_empty());
        prop_assert_eq!((r.queued, r.running), (0, 0));
        for node in r.nodes.values() {
            prop_assert_eq!((node.requests, node.tokens), (0, 0));
            prop_assert!(node.breaker != Breaker::Trial, "no trial outlives its request");
        }
    }

    #[test]
    fn whoever_waits_gets_the_turn_in_order(finishes in prop::collection::vec(any::<prop::sample::Index>(), 1..40)) {
        let mut settings = Settings::default();
        settings.limits.requests = 3;
        settings.limits.queue = 50;
        let mut r = router(&settings, 1, 1, 1);
        let mut running: Vec<LegId> = (0..3).map(|_| enter(&mut r, at(0))).collect();
        let waiting: Vec<LegId> = (0..50).map(|_| enter(&mut r, at(0))).collect();
        for (next, finish) in finishes.iter().enumerate() {
            let leg = running.swap_remove(finish.index(running.len()));
            r.finish(at(next as u64), leg);
            prop_assert!(r.admitted(waiting[next]));
            prop_assert!(waiting.get(next + 1).is_none_or(|leg| !r.admitted(*leg)));
            running.push(waiting[next]);
        }
    }
}
