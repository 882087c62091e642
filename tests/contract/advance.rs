//! Lines 2, 4 and 5 for pages that a sender has in advance: nobody else gets them while it may write there, and they come back.

use crate::actors::{Actor, eventually, receiver, sender};
use serde_json::{Value, json};

const PAGE: u64 = 64 << 10;
/// One of eight may be out in advance for each of the pool's senders.
const PAGES: u64 = 16;

/// A request of one chunk, at once; its pages are asked for in advance of the next one.
fn reserve(sender: &mut Actor, name: &str, chunk: &str) {
    sender.call(&json!({"do": "reserve", "request": name, "chunks": [[chunk, PAGE]], "at_once": true}));
    sender.call(&json!({"do": "admitted", "request": name}));
}

fn deliver(sender: &mut Actor, name: &str, seed: u64) -> Value {
    sender.call(&json!({"do": "write", "request": name, "chunk": 0, "seed": seed}));
    sender.call(&json!({"do": "finish", "request": name}));
    sender.call(&json!({"do": "wait", "request": name}))
}

fn until(decoder: &mut Actor, what: &str, holds: impl Fn(&Value) -> bool) {
    eventually(what, || holds(&decoder.call(&json!({"do": "stats"}))).then_some(()));
}

pub(crate) fn pages_in_advance_are_nobody_elses(transport: &str) {
    let mut decoder = receiver(transport, &json!({"pages": PAGES, "lease_ms": 300}));
    let mut first = sender(transport, &decoder, &json!({}));
    for (n, chunk) in ["a", "b", "c"].iter().enumerate() {
        let (name, seed) = (format!("request-{n}"), 10 + n as u64);
        reserve(&mut first, &name, chunk);
        assert_eq!(deliver(&mut first, &name, seed)["written"], 1);
        let checked = decoder.call(&json!({"do": "check", "key": chunk, "seed": seed}));
        assert_eq!(checked["equal"], true, "{chunk}");
        until(&mut decoder, "a page for the next one", |s| s["advanced"] == 1);
    }
    // Who needs the whole pool gets it: chunks that have been used give way, and that page comes back.
    let rest: Vec<_> = (0..PAGES).map(|n| json!([format!("rest-{n}"), PAGE])).collect();
    let mut other = sender(transport, &decoder, &json!({}));
    other.call(&json!({"do": "reserve", "request": "rest", "chunks": rest}));
    other.call(&json!({"do": "admitted", "request": "rest"}));
    other.call(&json!({"do": "abort", "request": "rest"}));
    until(&mut decoder, "free again", |s| s["free"] == PAGES);
    if transport == "inproc" {
        return; // the rest needs a sender that can be stopped and killed
    }
    // One that is stopped while it writes to a page of its advance: it is nobody's until it has said that it does so no more.
    let mut slow = sender(transport, &decoder, &json!({"faults": {"delay": "20ms", "stall_after": 1}}));
    reserve(&mut slow, "ahead", "d");
    deliver(&mut slow, "ahead", 20);
    until(&mut decoder, "a page for the next one", |s| s["advanced"] == 1);
    reserve(&mut slow, "late", "e");
    slow.call(&json!({"do": "write", "request": "late", "chunk": 0}));
    slow.stop();
    until(&mut decoder, "its lease has ended", |s| s["quarantined"] == 1 && s["active"] == 0);
    slow.signal(rustix::process::Signal::CONT);
    until(&mut decoder, "it has said so", |s| s["quarantined"] == 0);
    assert_eq!(decoder.call(&json!({"do": "lookup", "key": "e"}))["state"], "absent");
    // One that is killed with some.
    reserve(&mut slow, "again", "f");
    deliver(&mut slow, "again", 30);
    until(&mut decoder, "a page for the next one", |s| s["advanced"] == 1);
    slow.kill();
    until(&mut decoder, "all that it had", |s| s["advanced"] == 0 && s["free"] == PAGES - 2);
}
