//! A peer's end, pause or restart between handshake and publication.

use crate::actors::{Actor, eventually, receiver, receiver_config, sender, unique};
use rustix::process::Signal;
use serde_json::json;

const PAGE: u64 = 64 << 10;
const PAGES: u64 = 4;

/// How far a request of two chunks has come when something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Connected, geometry compared, nothing asked for.
    Attached,
    /// Pages are granted, nothing is written.
    Reserved,
    /// The transfer is under way (and goes no further).
    Writing,
    /// One chunk is published, the other is granted.
    BetweenCommits,
    /// Everything is published.
    Ready,
}

const PHASES: [Phase; 5] =
    [Phase::Attached, Phase::Reserved, Phase::Writing, Phase::BetweenCommits, Phase::Ready];

/// A receiver that knows the bystander, and a sender whose request has come to `phase`.
struct Scene {
    decoder: Actor,
    prefiller: Actor,
    bystander: Actor,
    phase: Phase,
}

impl Scene {
    fn set(transport: &str, phase: Phase) -> Self {
        let mut decoder =
            receiver(transport, &json!({"pages": PAGES, "peer_timeout_ms": 1500, "lease_ms": 1000}));
        let faults = if phase == Phase::Writing { json!({"stall_after": 0}) } else { json!(null) };
        let overlay = json!({"faults": faults, "request_ms": 3000, "peer_timeout_ms": 1500});
        let bystander = sender(transport, &decoder, &json!({"peer_timeout_ms": 1500}));
        let mut prefiller = sender(transport, &decoder, &overlay);
        let chunks = json!([["a", PAGE], ["b", PAGE]]);
        match phase {
            Phase::Attached => {}
            Phase::Reserved | Phase::BetweenCommits => {
                prefiller.call(&json!({"do": "reserve", "request": "r", "chunks": chunks}));
                prefiller.call(&json!({"do": "admitted", "request": "r"}));
                if phase == Phase::BetweenCommits {
                    prefiller.call(&json!({"do": "write", "request": "r", "chunk": 0}));
                    eventually("the first chunk is published", || {
                        (decoder.call(&json!({"do": "lookup", "key": "a"}))["state"] == "present")
                            .then_some(())
                    });
                }
            }
            Phase::Writing => {
                prefiller.call(&json!({"do": "reserve", "request": "r", "chunks": chunks}));
                prefiller.call(&json!({"do": "admitted", "request": "r"}));
                prefiller.call(&json!({"do": "write", "request": "r", "chunk": 0}));
            }
            Phase::Ready => {
                prefiller.call(&json!({"do": "send", "request": "r", "chunks": chunks}));
                prefiller.call(&json!({"do": "wait", "request": "r"}));
            }
        }
        Self { decoder, prefiller, bystander, phase }
    }

    /// The bystander still gets the whole pool: no page is lost and nobody is blocked.
    fn whole_pool_serves(&mut self) {
        for key in ["a", "b"] {
            self.decoder.call(&json!({"do": "remove", "key": key}));
        }
        let phase = self.phase;
        let report = eventually(&format!("{phase:?}: the whole pool serves another sender"), || {
            let request = unique("all");
            let chunks: Vec<_> = (0..PAGES).map(|i| json!([format!("{request}-{i}"), PAGE])).collect();
            self.bystander.call(
                &json!({"do": "send", "request": request, "chunks": chunks, "seed": 50, "timeout_ms": 2000}),
            );
            let report = self.bystander.try_call(&json!({"do": "wait", "request": request})).ok()?;
            let first = json!({"do": "check", "key": format!("{request}-0"), "seed": 50});
            assert_eq!(self.decoder.call(&first)["equal"], true);
            Some((report, request))
        });
        let (report, request) = report;
        assert_eq!(report["bytes"], PAGES * PAGE);
        let stats = self.decoder.call(&json!({"do": "stats"}));
        assert_eq!(stats["published"], PAGES, "{phase:?}: {stats}");
        for i in 0..PAGES {
            self.decoder.call(&json!({"do": "remove", "key": format!("{request}-{i}")}));
        }
        assert_eq!((&stats["quarantined"], &stats["writing"]), (&json!(0), &json!(0)), "{phase:?}");
    }
}

/// Nothing is lost when the sender dies.
pub(crate) fn sender_killed(transport: &str) {
    for phase in PHASES {
        let mut scene = Scene::set(transport, phase);
        scene.prefiller.kill();
        scene.whole_pool_serves();
    }
}

/// A sender that pauses loses what it held and no more, and is welcome afterwards.
pub(crate) fn sender_stopped(transport: &str) {
    for phase in PHASES {
        let mut scene = Scene::set(transport, phase);
        scene.prefiller.stop();
        if matches!(phase, Phase::Attached | Phase::Ready) {
            scene.whole_pool_serves(); // it holds nothing
        } else {
            // What it holds is not given away while it could still write; the rest serves.
            eventually("the lease has ended", || {
                (scene.decoder.call(&json!({"do": "stats"}))["writing"] == 0).then_some(())
            });
            let stats = scene.decoder.call(&json!({"do": "stats"}));
            assert_ne!(stats["quarantined"], 0, "{phase:?}: {stats}");
        }
        scene.prefiller.signal(Signal::CONT);
        scene.whole_pool_serves();
    }
}

/// The sender learns of a receiver's death, in time, with a code that says retryable.
pub(crate) fn receiver_killed(transport: &str) {
    for phase in PHASES {
        let mut scene = Scene::set(transport, phase);
        scene.decoder.kill();
        expect_failure(&mut scene);
    }
}

/// The sender's calls end by their deadlines while the receiver pauses, and succeed when it goes on.
pub(crate) fn receiver_stopped(transport: &str) {
    for phase in PHASES {
        let mut scene = Scene::set(transport, phase);
        scene.decoder.stop();
        expect_failure(&mut scene);
        scene.decoder.signal(Signal::CONT);
        scene.whole_pool_serves();
    }
}

/// The sender reaches a restarted receiver without being touched.
pub(crate) fn receiver_restarted(transport: &str) {
    for phase in [Phase::Reserved, Phase::Writing, Phase::Ready] {
        let name = unique("restarted");
        let mut decoder = receiver(transport, &json!({"name": name, "pages": PAGES}));
        let address = decoder.address().to_owned();
        let mut prefiller = sender(transport, &decoder, &json!({"request_ms": 3000}));
        prefiller.call(&json!({"do": "reserve", "request": "r", "chunks": [["a", PAGE]]}));
        prefiller.call(&json!({"do": "admitted", "request": "r"}));
        if phase != Phase::Reserved {
            prefiller.call(&json!({"do": "write", "request": "r", "chunk": 0}));
        }
        if phase == Phase::Ready {
            prefiller.call(&json!({"do": "finish", "request": "r"}));
            prefiller.call(&json!({"do": "wait", "request": "r"}));
        }
        decoder.kill();
        let config = receiver_config(transport, &json!({"name": name, "pages": PAGES, "listen": address}));
        let mut decoder = eventually("the address is free again", || Actor::try_start(&config).ok());
        eventually("a request reaches the new process", || {
            let request = unique("again");
            let send = json!({"do": "send", "request": request, "chunks": [["z", PAGE]], "seed": 8, "timeout_ms": 2000});
            prefiller
                .try_call(&send)
                .and_then(|_| prefiller.try_call(&json!({"do": "wait", "request": request})))
                .ok()
        });
        assert_eq!(decoder.call(&json!({"do": "check", "key": "z", "seed": 8}))["equal"], true, "{phase:?}");
    }
}

/// A new request, and the one under way, end with an error that may be retried.
fn expect_failure(scene: &mut Scene) {
    let phase = scene.phase;
    if matches!(phase, Phase::Reserved | Phase::BetweenCommits) {
        // Writing may still be accepted; then the end of the delivery tells.
        let write = scene.prefiller.try_call(&json!({"do": "write", "request": "r", "chunk": 1}));
        scene.prefiller.call(&json!({"do": "finish", "request": "r"}));
        let end = scene.prefiller.try_call(&json!({"do": "wait", "request": "r"}));
        let failure = write.and(end).expect_err("a request ended well without its receiver");
        assert!(failure.retryable, "{phase:?}: {failure:?}");
    }
    if phase == Phase::Writing {
        scene.prefiller.call(&json!({"do": "finish", "request": "r"}));
        let failure = scene.prefiller.try_call(&json!({"do": "wait", "request": "r"})).unwrap_err();
        assert!(failure.retryable && !failure.text.is_empty(), "{phase:?}: {failure:?}");
    }
    let new = json!({"do": "send", "request": "new", "chunks": [["n", PAGE]], "timeout_ms": 1000});
    let sent = scene.prefiller.try_call(&new);
    let failure =
        sent.and_then(|_| scene.prefiller.try_call(&json!({"do": "wait", "request": "new"}))).unwrap_err();
    assert!(failure.retryable && !failure.text.is_empty(), "{phase:?}: {failure:?}");
}
