//! Lines 3, 5 and 10: everything ends, gives back what it held, and tells who can act.

use crate::actors::{eventually, receiver, sender, unique};
use rustix::process::Signal;
use serde_json::json;

const PAGE: u64 = 64 << 10;

pub(crate) fn everything_ends(transport: &str) {
    let mut decoder = receiver(transport, &json!({}));

    // A transfer that never completes by itself.
    let mut stalled = sender(transport, &decoder, &json!({"faults": {"stall_after": 0}}));
    stalled.call(&json!({"do": "send", "request": "stalled", "chunks": [["s", PAGE]], "timeout_ms": 500}));
    let failure = stalled.try_call(&json!({"do": "wait", "request": "stalled"})).unwrap_err();
    assert_eq!((failure.code.as_str(), failure.retryable), ("timed_out", true), "{failure:?}");

    // A transfer that fails at once.
    let mut failing = sender(transport, &decoder, &json!({"faults": {"fail_after": 0}}));
    failing.call(&json!({"do": "send", "request": "failing", "chunks": [["f", PAGE]], "timeout_ms": 5000}));
    let failure = failing.try_call(&json!({"do": "wait", "request": "failing"})).unwrap_err();
    assert!(failure.retryable, "{failure:?}");
    eventually("nothing is left of both", || {
        (decoder.call(&json!({"do": "stats"}))["free"] == 8).then_some(())
    });
    if transport == "inproc" {
        return; // a thread cannot be stopped or killed
    }

    // The receiver is stopped: the request ends by its deadline, and works again when it goes on.
    let mut prefiller = sender(transport, &decoder, &json!({}));
    prefiller.call(&json!({"do": "send", "request": "before", "chunks": [["a", PAGE]]}));
    prefiller.call(&json!({"do": "wait", "request": "before"}));
    decoder.stop();
    prefiller.call(&json!({"do": "send", "request": "stopped", "chunks": [["b", PAGE]], "timeout_ms": 700}));
    let failure = prefiller.try_call(&json!({"do": "wait", "request": "stopped"})).unwrap_err();
    assert!(failure.retryable, "{failure:?}");
    decoder.signal(Signal::CONT);
    eventually("a request succeeds again", || {
        let request = unique("again");
        let sent = prefiller.try_call(
            &json!({"do": "send", "request": request, "chunks": [["c", PAGE]], "timeout_ms": 2000}),
        );
        sent.and_then(|_| prefiller.try_call(&json!({"do": "wait", "request": request}))).ok()
    });

    // The receiver is killed while a request waits to be written.
    prefiller.call(&json!({"do": "reserve", "request": "killed", "chunks": [["d", PAGE]]}));
    prefiller.call(&json!({"do": "admitted", "request": "killed"}));
    decoder.kill();
    let failure = eventually("the reservation has ended", || {
        prefiller.try_call(&json!({"do": "write", "request": "killed", "chunk": 0})).err().or_else(|| {
            prefiller.call(&json!({"do": "finish", "request": "killed"}));
            prefiller.try_call(&json!({"do": "wait", "request": "killed"})).err()
        })
    });
    assert!(failure.retryable, "{failure:?}");
    let sent = prefiller
        .try_call(&json!({"do": "send", "request": "after", "chunks": [["e", PAGE]], "timeout_ms": 1000}));
    let failure =
        sent.and_then(|_| prefiller.try_call(&json!({"do": "wait", "request": "after"}))).unwrap_err();
    assert!(failure.retryable, "{failure:?}");
}

pub(crate) fn no_leak(transport: &str) {
    let mut decoder = receiver(transport, &json!({"pages": 4, "retention_ms": 400}));
    let mut prefiller = sender(transport, &decoder, &json!({}));

    // Aborted in every phase.
    for (n, writes) in [0, 1, 2].into_iter().enumerate() {
        let request = format!("abort{n}");
        prefiller.call(&json!({"do": "reserve", "request": request, "chunks": [[format!("x{n}"), PAGE], [format!("y{n}"), PAGE], [format!("z{n}"), PAGE]]}));
        prefiller.call(&json!({"do": "admitted", "request": request}));
        for chunk in 0..writes {
            prefiller.call(&json!({"do": "write", "request": request, "chunk": chunk}));
        }
        prefiller.call(&json!({"do": "abort", "request": request}));
    }
    // A consumer that never comes: retention bounds what stays.
    eventually("every page is free", || (decoder.call(&json!({"do": "stats"}))["free"] == 4).then_some(()));
    prefiller.call(&json!({"do": "send", "request": "unread", "chunks": [["u", PAGE]]}));
    prefiller.call(&json!({"do": "wait", "request": "unread"}));
    eventually("retention has dropped it", || {
        (decoder.call(&json!({"do": "stats"}))["free"] == 4).then_some(())
    });

    // A pinned chunk stays, whatever is retained or removed, until it is released.
    prefiller.call(&json!({"do": "send", "request": "pinned", "chunks": [["pin", PAGE]], "seed": 9}));
    prefiller.call(&json!({"do": "wait", "request": "pinned"}));
    decoder.call(&json!({"do": "hold", "key": "pin"}));
    decoder.call(&json!({"do": "remove", "key": "pin"}));
    assert_eq!(decoder.call(&json!({"do": "stats"}))["free"], 3, "a pinned page was freed");
    decoder.call(&json!({"do": "release", "key": "pin"}));
    eventually("released", || (decoder.call(&json!({"do": "stats"}))["free"] == 4).then_some(()));
    if transport == "inproc" {
        return;
    }

    // Senders killed while they queue, hold and write: pages, descriptors and threads all come back.
    drop(prefiller);
    let gone = |decoder: &mut crate::actors::Actor| {
        eventually("the sender is gone", || {
            let s = decoder.call(&json!({"do": "stats"}));
            let peers = decoder.call(&json!({"do": "peers"}));
            (s["free"] == 4 && s["queued"] == 0 && peers.as_array().unwrap().is_empty()).then_some(())
        });
    };
    let round = |decoder: &mut crate::actors::Actor| {
        let mut holder = sender(transport, decoder, &json!({"faults": {"stall_after": 0}}));
        let chunks = json!([["h", PAGE], ["i", PAGE], ["j", PAGE]]);
        holder.call(&json!({"do": "reserve", "request": "holds", "chunks": chunks}));
        holder.call(&json!({"do": "admitted", "request": "holds"}));
        holder.call(&json!({"do": "write", "request": "holds", "chunk": 0}));
        let mut waiter = sender(transport, decoder, &json!({}));
        waiter.call(&json!({"do": "send", "request": "queues", "chunks": [["k", PAGE], ["l", PAGE]]}));
        eventually("one holds, one queues", || {
            let s = decoder.call(&json!({"do": "stats"}));
            (s["writing"] == 3 && s["queued"] == 1).then_some(())
        });
        waiter.kill();
        holder.kill();
        gone(decoder);
    };
    gone(&mut decoder);
    round(&mut decoder); // what is started once has been started now
    let before = decoder.call(&json!({"do": "resources"}));
    for _ in 0..3 {
        round(&mut decoder);
    }
    eventually("descriptors and threads are back", || {
        let now = decoder.call(&json!({"do": "resources"}));
        let not_more = |what: &str| now[what].as_u64() <= before[what].as_u64();
        (not_more("fds") && not_more("threads")).then_some(())
    });
}

pub(crate) fn errors_reach_who_can_act(transport: &str) {
    let mut decoder = receiver(transport, &json!({}));
    let mut failing = sender(transport, &decoder, &json!({"faults": {"fail_after": 0}}));

    // The same failure at the sender's caller, at the receiver's waiter and in the receiver's events.
    decoder.tell(&json!({"do": "wait", "request": "bad", "ms": 30_000}));
    failing.call(&json!({"do": "send", "request": "bad", "chunks": [["a", PAGE]], "timeout_ms": 5000}));
    let at_sender = failing.try_call(&json!({"do": "wait", "request": "bad"})).unwrap_err();
    let at_waiter = decoder.answer().unwrap_err();
    let event = decoder.call(&json!({"do": "event"}));
    assert_eq!(event["failed"], "bad");
    assert_eq!(at_sender.code, at_waiter.code);
    assert_eq!(event["code"], at_waiter.code.as_str());
    assert!(at_sender.retryable && at_waiter.retryable, "{at_sender:?} {at_waiter:?}");
    assert!(!at_sender.text.is_empty() && !at_waiter.text.is_empty());

    // Success is told as well, and a stranger's request is not confused with it.
    let mut good = sender(transport, &decoder, &json!({}));
    good.call(&json!({"do": "send", "request": "good", "chunks": [["a", PAGE]]}));
    good.call(&json!({"do": "wait", "request": "good"}));
    assert_eq!(decoder.call(&json!({"do": "event"}))["ready"], "good");
    if transport == "inproc" {
        return;
    }

    // A sender that dies tells nobody; the receiver's waiter and events hear of it all the same.
    let mut dying = sender(transport, &decoder, &json!({}));
    dying.call(&json!({"do": "reserve", "request": "orphan", "chunks": [["o", PAGE]]}));
    dying.call(&json!({"do": "admitted", "request": "orphan"}));
    decoder.tell(&json!({"do": "wait", "request": "orphan", "ms": 30_000}));
    dying.kill();
    let failure = decoder.answer().unwrap_err();
    assert_eq!((failure.code.as_str(), failure.retryable), ("peer_gone", true), "{failure:?}");
    let event = decoder.call(&json!({"do": "event"}));
    assert_eq!((&event["failed"], &event["code"]), (&json!("orphan"), &json!("peer_gone")));
}
