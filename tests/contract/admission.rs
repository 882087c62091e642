//! Lines 4 and 6: who gets pages, and what happens to chunks two requests share.

use crate::actors::{eventually, receiver, sender};
use serde_json::{Value, json};

const PAGE: u64 = 16 << 10;

fn chunks(prefix: &str, count: usize) -> Value {
    (0..count).map(|i| json!([format!("{prefix}{i}"), PAGE])).collect()
}

pub(crate) fn no_deadlock_by_admission(transport: &str) {
    let mut decoder = receiver(transport, &json!({"pages": 32, "page_bytes": PAGE}));
    let mut a = sender(transport, &decoder, &json!({"page_bytes": PAGE}));
    let mut b = sender(transport, &decoder, &json!({"page_bytes": PAGE}));

    // 20 + 20 chunks over 32 pages: one is admitted whole, the other waits whole; writing them in turns ends.
    a.call(&json!({"do": "reserve", "request": "A", "chunks": chunks("a", 20)}));
    a.call(&json!({"do": "admitted", "request": "A"}));
    b.call(&json!({"do": "send", "request": "B", "chunks": chunks("b", 20), "seed": 100}));
    eventually("B waits", || (decoder.call(&json!({"do": "stats"}))["queued"] == 1).then_some(()));
    let stats = decoder.call(&json!({"do": "stats"}));
    assert_eq!(
        (&stats["writing"], &stats["free"]),
        (&json!(20), &json!(12)),
        "B holds nothing while it waits"
    );
    for i in 0..20 {
        a.call(&json!({"do": "write", "request": "A", "chunk": i, "seed": 1}));
    }
    a.call(&json!({"do": "finish", "request": "A"}));
    a.call(&json!({"do": "wait", "request": "A"}));
    for i in 0..20 {
        let key = format!("a{i}");
        assert_eq!(decoder.call(&json!({"do": "check", "key": key, "seed": 1 + i}))["equal"], true);
        decoder.call(&json!({"do": "remove", "key": key}));
    }
    b.call(&json!({"do": "wait", "request": "B"}));
    for i in 0..20 {
        assert_eq!(
            decoder.call(&json!({"do": "check", "key": format!("b{i}"), "seed": 100 + i}))["equal"],
            true
        );
        decoder.call(&json!({"do": "remove", "key": format!("b{i}")}));
    }

    // Larger than the pool: refused at once, and not retryable.
    let reserved = a.try_call(&json!({"do": "reserve", "request": "huge", "chunks": chunks("h", 33)}));
    let failure =
        reserved.and_then(|_| a.try_call(&json!({"do": "admitted", "request": "huge"}))).unwrap_err();
    assert_eq!((failure.code.as_str(), failure.retryable), ("too_large", false), "{failure:?}");
    assert!(failure.text.contains("33") && failure.text.contains("32"), "both numbers: {failure:?}");

    // Full for longer than the deadline: ends, retryable, and the holder is not disturbed.
    a.call(&json!({"do": "reserve", "request": "holder", "chunks": chunks("x", 32)}));
    a.call(&json!({"do": "admitted", "request": "holder"}));
    b.call(&json!({"do": "send", "request": "waiter", "chunks": chunks("y", 1), "timeout_ms": 300}));
    let failure = b.try_call(&json!({"do": "wait", "request": "waiter"})).unwrap_err();
    assert!(
        ["timed_out", "no_capacity"].contains(&failure.code.as_str()) && failure.retryable,
        "{failure:?}"
    );
    a.call(&json!({"do": "abort", "request": "holder"}));
    eventually("all pages are free", || (decoder.call(&json!({"do": "stats"}))["free"] == 32).then_some(()));

    // One slow request does not keep another sender from pages that are there.
    a.call(&json!({"do": "reserve", "request": "slow", "chunks": chunks("s", 20)}));
    a.call(&json!({"do": "admitted", "request": "slow"}));
    b.call(&json!({"do": "send", "request": "quick", "chunks": chunks("q", 12)}));
    b.call(&json!({"do": "wait", "request": "quick"}));
}

pub(crate) fn shared_prefixes_are_right(transport: &str) {
    let config = json!({"page_bytes": PAGE});
    let mut decoder = receiver(transport, &json!({"page_bytes": PAGE, "pages": 8}));
    let mut first = sender(transport, &decoder, &config);
    let mut second = sender(transport, &decoder, &config);
    let mut third = sender(transport, &decoder, &config);

    // Present: nothing is written a second time.
    first.call(&json!({"do": "send", "request": "one", "chunks": [["p", PAGE]], "seed": 5}));
    first.call(&json!({"do": "wait", "request": "one"}));
    second.call(&json!({"do": "send", "request": "two", "chunks": [["p", PAGE], ["q", PAGE]], "seed": 5}));
    let report = second.call(&json!({"do": "wait", "request": "two"}));
    assert_eq!(
        (&report["present"], &report["written"], &report["bytes"]),
        (&json!(1), &json!(1), &json!(PAGE))
    );

    // Pending: the second request is not ready before the first one's write is.
    first.call(&json!({"do": "reserve", "request": "three", "chunks": [["shared", PAGE]]}));
    first.call(&json!({"do": "admitted", "request": "three"}));
    second.call(
        &json!({"do": "send", "request": "four", "chunks": [["shared", PAGE], ["own", PAGE]], "seed": 40}),
    );
    eventually("its own chunk is there", || {
        (decoder.call(&json!({"do": "lookup", "key": "own"}))["state"] == "present").then_some(())
    });
    let early = decoder.try_call(&json!({"do": "wait", "request": "four", "ms": 200})).unwrap_err();
    assert_eq!(early.code, "timed_out", "ready before the shared chunk was written: {early:?}");
    first.call(&json!({"do": "write", "request": "three", "chunk": 0, "seed": 30}));
    let report = second.call(&json!({"do": "wait", "request": "four"}));
    assert_eq!((&report["present"], &report["written"]), (&json!(1), &json!(1)));
    assert_eq!(decoder.call(&json!({"do": "check", "key": "shared", "seed": 30}))["equal"], true);

    // The writer fails: a waiter is granted pages of its own, exactly one of the waiters writes, and both are ready.
    first.call(&json!({"do": "reserve", "request": "five", "chunks": [["lost", PAGE]]}));
    first.call(&json!({"do": "admitted", "request": "five"}));
    second.call(&json!({"do": "send", "request": "six", "chunks": [["lost", PAGE]], "seed": 60}));
    third.call(&json!({"do": "send", "request": "seven", "chunks": [["lost", PAGE]], "seed": 60}));
    eventually("both wait", || (decoder.call(&json!({"do": "stats"}))["active"] == 3).then_some(()));
    if transport == "inproc" {
        first.call(&json!({"do": "abort", "request": "five"}));
    } else {
        first.kill();
    }
    let six = second.call(&json!({"do": "wait", "request": "six"}));
    let seven = third.call(&json!({"do": "wait", "request": "seven"}));
    let written = six["written"].as_u64().unwrap() + seven["written"].as_u64().unwrap();
    assert_eq!(written, 1, "six {six}, seven {seven}");
    assert_eq!(decoder.call(&json!({"do": "check", "key": "lost", "seed": 60}))["equal"], true);
}
