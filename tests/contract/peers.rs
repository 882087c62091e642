//! Lines 7, 8, 11 and 12: who the peer is, whether it fits, whether it may, and which way the bytes went.

use crate::actors::{Actor, eventually, metric, receiver, sender, unique};
use serde_json::json;
use std::io::Write;
use std::net::TcpStream;

const PAGE: u64 = 64 << 10;

pub(crate) fn restart_is_normal(transport: &str) {
    let name = unique("decoder");
    let mut decoder = receiver(transport, &json!({"name": name}));
    let address = decoder.address().to_owned();
    let sender_name = unique("prefiller");
    let mut prefiller = sender(transport, &decoder, &json!({"name": sender_name}));
    prefiller.call(&json!({"do": "send", "request": "one", "chunks": [["a", PAGE]], "seed": 1}));
    prefiller.call(&json!({"do": "wait", "request": "one"}));

    // The receiver is restarted under its name and address; the sender goes on without being touched.
    if transport == "inproc" {
        drop(decoder);
    } else {
        decoder.kill();
    }
    decoder = eventually("the port is free again", || {
        Actor::try_start(&crate::actors::receiver_config(
            transport,
            &json!({"name": name, "listen": address}),
        ))
        .ok()
    });
    let report = eventually("a request reaches the new process", || {
        let request = unique("two");
        let sent = prefiller.try_call(&json!({"do": "send", "request": request, "chunks": [["a", PAGE]], "seed": 2, "timeout_ms": 5000}));
        sent.and_then(|_| prefiller.try_call(&json!({"do": "wait", "request": request}))).ok()
    });
    assert_eq!(report["written"], 1, "the new process knows nothing of the old one's chunks");
    assert_eq!(decoder.call(&json!({"do": "check", "key": "a", "seed": 2}))["equal"], true);

    // The sender is restarted under its name, in the middle of a request; the receiver drops the old one's state.
    prefiller.call(&json!({"do": "reserve", "request": "half", "chunks": [["h", PAGE]]}));
    prefiller.call(&json!({"do": "admitted", "request": "half"}));
    if transport == "inproc" {
        drop(prefiller);
    } else {
        prefiller.kill();
    }
    let mut again = sender(transport, &decoder, &json!({"name": sender_name}));
    again.call(&json!({"do": "send", "request": "half", "chunks": [["h", PAGE]], "seed": 4}));
    again.call(&json!({"do": "wait", "request": "half"}));
    assert_eq!(decoder.call(&json!({"do": "check", "key": "h", "seed": 4}))["equal"], true);
    eventually("only live state is left", || {
        let s = decoder.call(&json!({"do": "stats"}));
        (s["active"] == 0 && s["writing"] == 0 && s["quarantined"] == 0).then_some(())
    });
}

pub(crate) fn mismatch_is_an_error_not_garbage(transport: &str) {
    let decoder =
        receiver(transport, &json!({"geometry": {"model": "llama-8b", "dtype": "bfloat16", "layers": 32}}));
    let refused = |geometry, page_bytes: u64| {
        let config = json!({"geometry": geometry, "page_bytes": page_bytes});
        Actor::try_start(&crate::actors::sender_config(transport, &decoder, &config))
            .map(|_| ())
            .expect_err("a sender of another geometry was accepted")
    };
    for (geometry, page, ours, theirs) in [
        (json!({"model": "llama-70b", "dtype": "bfloat16", "layers": 32}), PAGE, "llama-70b", "llama-8b"),
        (json!({"model": "llama-8b", "dtype": "float16", "layers": 32}), PAGE, "float16", "bfloat16"),
        (json!({"model": "llama-8b", "dtype": "bfloat16", "layers": 31}), PAGE, "31", "32"),
        (json!({"model": "llama-8b", "dtype": "bfloat16", "layers": 32}), 2 * PAGE, "131072", "65536"),
    ] {
        let failure = refused(geometry, page);
        assert_eq!((failure.code.as_str(), failure.retryable), ("mismatch", false), "{failure:?}");
        assert!(failure.text.contains(ours) && failure.text.contains(theirs), "both values: {failure:?}");
    }
    // A fitting one is still served.
    let mut fits = sender(
        transport,
        &decoder,
        &json!({"geometry": {"model": "llama-8b", "dtype": "bfloat16", "layers": 32}}),
    );
    fits.call(&json!({"do": "send", "request": "r", "chunks": [["a", PAGE]]}));
    fits.call(&json!({"do": "wait", "request": "r"}));
}

pub(crate) fn no_stranger_writes(transport: &str) {
    let mut decoder = receiver(transport, &json!({"key": "correct horse"}));
    let empty = decoder.call(&json!({"do": "pool_digest"}));
    for key in [json!("battery staple"), json!(null)] {
        let config = crate::actors::sender_config(transport, &decoder, &json!({"key": key}));
        let failure = Actor::try_start(&config).map(|_| ()).expect_err("a stranger was let in");
        assert_eq!((failure.code.as_str(), failure.retryable), ("unauthenticated", false), "{failure:?}");
        assert!(
            !failure.text.contains("horse") && !failure.text.contains("staple"),
            "a key in a text: {failure:?}"
        );
    }
    // A sender that demands proof does not talk to a receiver without a key either.
    let open = receiver(transport, &json!({}));
    let config = crate::actors::sender_config(transport, &open, &json!({"key": "correct horse"}));
    assert_eq!(Actor::try_start(&config).map(|_| ()).unwrap_err().code, "unauthenticated");

    // Only the address it was given: its port answers on no other one.
    let port: u16 = decoder.address().rsplit(':').next().unwrap().parse().unwrap();
    assert!(TcpStream::connect(("127.0.0.2", port)).is_err(), "the listener is bound to more than 127.0.0.1");

    // Garbage on the port, whole and in part, and the receiver still serves.
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        b"KVXFER\0C\xff\xff\xff\xff",
        b"KVXFER\0D0123456789abcdef\0\0",
        b"",
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(garbage).unwrap();
    }
    assert_eq!(decoder.call(&json!({"do": "pool_digest"})), empty, "a stranger wrote");
    let mut friend = sender(transport, &decoder, &json!({"key": "correct horse"}));
    friend.call(&json!({"do": "send", "request": "r", "chunks": [["a", PAGE]], "seed": 6}));
    friend.call(&json!({"do": "wait", "request": "r"}));
    assert_eq!(decoder.call(&json!({"do": "check", "key": "a", "seed": 6}))["equal"], true);
}

pub(crate) fn you_can_see_the_path(transport: &str) {
    let mut decoder = receiver(transport, &json!({}));
    let mut prefiller = sender(transport, &decoder, &json!({}));
    prefiller.call(&json!({"do": "send", "request": "r", "chunks": [["a", PAGE], ["b", PAGE]]}));
    let report = prefiller.call(&json!({"do": "wait", "request": "r"}));
    assert_eq!(report["transport"], transport);
    assert_eq!(report["bytes"], 2 * PAGE);
    let paths = prefiller.call(&json!({"do": "paths"}));
    assert_eq!(paths[0][0], transport);
    assert!(!paths[0][1].as_str().unwrap().is_empty(), "a path without a description");
    let metrics = prefiller.call(&json!({"do": "metrics"}));
    assert_eq!(metric(&metrics, "bytes", transport), 2 * PAGE);
    assert!(metric(&metrics, "transfers", transport) >= 1);
    let _ = decoder.call(&json!({"do": "metrics"}));

    // A requirement that is not met is an error at connect, naming what was found instead.
    let missing = if transport == "cuda_ipc" { "rdma" } else { "nvlink" };
    let config = crate::actors::sender_config(transport, &decoder, &json!({"require": [missing]}));
    let failure = Actor::try_start(&config).map(|_| ()).expect_err("a silent fallback");
    assert_eq!((failure.code.as_str(), failure.retryable), ("requirement", false), "{failure:?}");
    assert!(failure.text.contains(missing) && failure.text.contains(transport), "{failure:?}");
    // One that is met is not.
    let mut strict = sender(transport, &decoder, &json!({"require": [transport]}));
    strict.call(&json!({"do": "send", "request": "s", "chunks": [["c", PAGE]]}));
    strict.call(&json!({"do": "wait", "request": "s"}));
}
