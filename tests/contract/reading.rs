//! Lines 1, 2, 3, 5 and 10 for chunks that are read back: what is read is right or refused, and pages that are read come back.

use crate::actors::{Actor, eventually, receiver, sender};
use serde_json::{Value, json};

const PAGE: u64 = 64 << 10;

/// Three chunks of seeds 7 to 9, the last one partial.
fn send(prefiller: &mut Actor, request: &str) {
    let chunks = json!([["a", PAGE], ["b", PAGE], ["c", 1000]]);
    prefiller.call(&json!({"do": "send", "request": request, "chunks": chunks, "seed": 7}));
    prefiller.call(&json!({"do": "wait", "request": request}));
}

fn pinned(decoder: &mut Actor) -> Value {
    decoder.call(&json!({"do": "stats"}))["pinned"].clone()
}

fn comes_back(decoder: &mut Actor, why: &str) {
    eventually(why, || (pinned(decoder) == 0).then_some(()));
}

pub(crate) fn what_is_read_back_is_right(transport: &str) {
    let mut decoder = receiver(transport, &json!({"lease_ms": 1000}));
    let mut prefiller = sender(transport, &decoder, &json!({}));
    send(&mut prefiller, "r");

    // By another prefiller than the one that wrote it; "z" is not there.
    let mut reader = sender(transport, &decoder, &json!({}));
    assert_eq!(
        reader.call(&json!({"do": "query", "keys": ["a", "b", "c", "z"], "lease_ms": 900})),
        json!([0, 1, 2])
    );
    assert_eq!(pinned(&mut decoder), 3);
    assert_eq!(
        reader.call(&json!({"do": "read", "seed": 7})),
        json!({"equal": true, "bytes": 2 * PAGE + 1000, "transport": transport})
    );
    assert_eq!(pinned(&mut decoder), 0, "confirmed, so given back");

    // A read that claims success without moving a byte.
    let dropped = json!({"integrity": "bound", "faults": {"drop_every": 1}});
    let mut faulty = sender(transport, &decoder, &dropped);
    faulty.call(&json!({"do": "query", "keys": ["a"]}));
    let failure = faulty.try_call(&json!({"do": "read", "seed": 7})).expect_err("nothing was moved");
    assert_eq!(failure.code, "corrupt", "{failure:?}");
    comes_back(&mut decoder, "the page of a read that failed is given back");

    // The lease ends, and the pages are used for other chunks, before the reader gets to it.
    reader.call(&json!({"do": "query", "keys": ["a", "b"]}));
    assert_eq!(pinned(&mut decoder), 2);
    for key in ["a", "b", "c"] {
        decoder.call(&json!({"do": "remove", "key": key}));
    }
    comes_back(&mut decoder, "the lease ends");
    let all: Vec<_> = (0..8).map(|n| json!([format!("other{n}"), PAGE])).collect();
    prefiller.call(&json!({"do": "send", "request": "next", "chunks": all, "seed": 50}));
    prefiller.call(&json!({"do": "wait", "request": "next"}));
    let failure = reader.try_call(&json!({"do": "read", "seed": 7})).expect_err("other chunks were read");
    assert_eq!((failure.code.as_str(), failure.retryable), ("stale", true), "{failure:?}");
}

pub(crate) fn nobody_holds_pages_by_reading(transport: &str) {
    let mut decoder = receiver(transport, &json!({}));
    let mut prefiller = sender(transport, &decoder, &json!({}));
    send(&mut prefiller, "r");
    let keys = json!({"do": "query", "keys": ["a", "b", "c"]});

    // A reader that never gets to it and leaves.
    let mut reader = sender(transport, &decoder, &json!({}));
    reader.call(&keys);
    assert_eq!(pinned(&mut decoder), 3);
    drop(reader);
    comes_back(&mut decoder, "what a reader held that has left");

    // A read that never ends by itself ends by its own time-out.
    let mut stalled = sender(transport, &decoder, &json!({"faults": {"stall_after": 0}}));
    stalled.call(&keys);
    let failure = stalled.try_call(&json!({"do": "read", "ms": 300})).expect_err("stalled");
    assert!(["timed_out", "cancelled"].contains(&failure.code.as_str()), "{failure:?}");
    comes_back(&mut decoder, "what a stalled reader held");

    if transport == "inproc" {
        return;
    }
    // A decoder that is stopped confirms nothing; what it held is free once it goes on.
    let mut patient = sender(transport, &decoder, &json!({}));
    patient.call(&keys);
    decoder.stop();
    let failure = patient.try_call(&json!({"do": "read", "seed": 7, "ms": 500})).expect_err("unconfirmed");
    assert!(failure.retryable, "{failure:?}");
    decoder.signal(rustix::process::Signal::CONT);
    comes_back(&mut decoder, "what a reader held that gave up");

    // A reader that is killed, and a decoder that is killed between the answer and the bytes.
    let mut killed = sender(transport, &decoder, &json!({}));
    killed.call(&keys);
    killed.kill();
    comes_back(&mut decoder, "what a killed reader held");
    prefiller.call(&keys);
    decoder.kill();
    let failure = prefiller.try_call(&json!({"do": "read", "seed": 7, "ms": 5000})).expect_err("it is gone");
    assert!(failure.retryable, "{failure:?}");
    let late = json!({"do": "query", "keys": ["a"], "ms": 500});
    assert!(prefiller.try_call(&late).expect_err("nobody is there").retryable);
}
