//! Lines 1, 2 and 9: what is written, when it is seen, and what never lands.

use crate::actors::{eventually, flipping_proxy, pattern, receiver, sender, unique};
use kvxfer::agent::Access;
use kvxfer::{Agent, Piece, TransferOptions};
use serde_json::json;
use std::time::Duration;

const PAGE: u64 = 64 << 10;

pub(crate) fn visible_only_when_written(transport: &str) {
    let mut decoder = receiver(transport, &json!({}));
    let mut prefiller = sender(transport, &decoder, &json!({}));
    prefiller.call(&json!({"do": "reserve", "request": "r", "chunks": [["a", PAGE], ["b", 1000]]}));
    prefiller.call(&json!({"do": "admitted", "request": "r"}));
    assert_eq!(decoder.call(&json!({"do": "lookup", "key": "a"}))["state"], "pending");
    assert_eq!(
        decoder.try_call(&json!({"do": "check", "key": "a", "seed": 7})).unwrap_err().code,
        "in_progress"
    );

    prefiller.call(&json!({"do": "write", "request": "r", "chunk": 0, "seed": 7}));
    eventually("chunk a is published", || {
        (decoder.call(&json!({"do": "lookup", "key": "a"}))["state"] == "present").then_some(())
    });
    assert_eq!(
        decoder.call(&json!({"do": "check", "key": "a", "seed": 7})),
        json!({"equal": true, "len": PAGE})
    );
    assert_eq!(
        decoder.call(&json!({"do": "lookup", "key": "b"}))["state"],
        "pending",
        "b is not written yet"
    );

    prefiller.call(&json!({"do": "write", "request": "r", "chunk": 1, "seed": 7}));
    prefiller.call(&json!({"do": "finish", "request": "r"}));
    prefiller.call(&json!({"do": "wait", "request": "r"}));
    decoder.call(&json!({"do": "wait", "request": "r"}));
    assert_eq!(
        decoder.call(&json!({"do": "check", "key": "b", "seed": 8})),
        json!({"equal": true, "len": 1000})
    );

    // A byte that arrives flipped (`full`), and a write that claims success without moving a byte (`bound`): found, never
    // published. On sockets the byte is flipped on the wire, where their own check has to find it.
    let wire = (transport == "tcp").then(|| flipping_proxy(decoder.address()));
    let flipped = match &wire {
        Some(address) => json!({"integrity": "full", "connect": address}),
        None => json!({"integrity": "full", "faults": {"corrupt_every": 1}}),
    };
    let dropped = json!({"integrity": "bound", "faults": {"drop_every": 1}});
    for (n, overlay) in [flipped, dropped].into_iter().enumerate() {
        let (request, key) = (format!("damaged{n}"), format!("k{n}"));
        let mut faulty = sender(transport, &decoder, &overlay);
        faulty.call(&json!({"do": "send", "request": request, "chunks": [[key, PAGE]], "seed": 30 + n}));
        let failure = faulty
            .try_call(&json!({"do": "wait", "request": request}))
            .expect_err(&format!("{overlay}: damaged bytes were published"));
        assert_eq!(failure.code, "corrupt", "{overlay}: {failure:?}");
        // The sender may know first; until the receiver does, the chunk stays pending.
        eventually("the damaged chunk is withdrawn", || {
            let state = decoder.call(&json!({"do": "lookup", "key": key}))["state"].clone();
            assert_ne!(state, "present", "{overlay}: damaged bytes were published");
            (state == "absent").then_some(())
        });
    }
    eventually("the damaged pages are free again", || {
        let s = decoder.call(&json!({"do": "stats"}));
        (s["free"] == 6 && s["published"] == 2).then_some(())
    });
}

pub(crate) fn no_late_write(transport: &str) {
    after_cancel_nothing_changes(transport);
    if transport == "inproc" {
        return; // the rest needs a sender that can be stopped and killed
    }
    // A sender that is stopped while it writes loses its lease; its pages are not reused while it could go on.
    let mut decoder = receiver(transport, &json!({"pages": 2, "lease_ms": 300}));
    let mut stopped = sender(transport, &decoder, &json!({"faults": {"delay": "400ms"}}));
    stopped.call(&json!({"do": "reserve", "request": "late", "chunks": [["a", PAGE], ["b", PAGE]]}));
    stopped.call(&json!({"do": "admitted", "request": "late"}));
    stopped.call(&json!({"do": "write", "request": "late", "chunk": 0}));
    stopped.stop();
    eventually("the lease has ended and both pages are quarantined", || {
        let s = decoder.call(&json!({"do": "stats"}));
        (s["quarantined"] == 2 && s["free"] == 0).then_some(())
    });
    // Awake again it must not publish anything; it confirms that its writes have ended, and only then the pages are free.
    stopped.signal(rustix::process::Signal::CONT);
    eventually("the pages are free", || (decoder.call(&json!({"do": "stats"}))["free"] == 2).then_some(()));
    let before = decoder.call(&json!({"do": "pool_digest"}));
    std::thread::sleep(Duration::from_millis(600)); // longer than the injected delay
    assert_eq!(decoder.call(&json!({"do": "pool_digest"})), before, "a write landed in a page that was free");
    assert_eq!(decoder.call(&json!({"do": "lookup", "key": "a"}))["state"], "absent");

    // The same with a sender that never comes back: its end is what frees the pages.
    let mut killed = sender(transport, &decoder, &json!({"faults": {"stall_after": 0}}));
    killed.call(&json!({"do": "reserve", "request": "never", "chunks": [["c", PAGE], ["d", PAGE]]}));
    killed.call(&json!({"do": "admitted", "request": "never"}));
    killed.call(&json!({"do": "write", "request": "never", "chunk": 0}));
    assert_eq!(decoder.call(&json!({"do": "stats"}))["writing"], 2);
    killed.kill();
    eventually("the pages are free", || (decoder.call(&json!({"do": "stats"}))["free"] == 2).then_some(()));
}

/// One-sided: cancel in the middle of a large write; once it has ended no byte changes.
fn after_cancel_nothing_changes(transport: &str) {
    const LEN: usize = 64 << 20;
    let kind = transport.parse().unwrap();
    let build = |name: &str| Agent::builder().name(unique(name)).allow([kind]);
    let passive = build("passive").listen("tcp://127.0.0.1:0").build().unwrap();
    let active = build("active").build().unwrap();
    let memory = |side| crate::actors::memory(side, LEN).unwrap();
    let target = passive.register(memory("receiver")).unwrap();
    let source = active.register(memory("sender")).unwrap();
    passive.export(&target, "target", Access::ReadWrite).unwrap();
    let peer = active.connect(&passive.addresses()[0], Duration::from_secs(10)).unwrap();
    let remote = peer.region("target", Duration::from_secs(10)).unwrap();
    let pieces: Vec<_> = (0..LEN as u64 / 4096)
        .map(|i| Piece { local_offset: i * 4096, remote_offset: i * 4096, len: 4096 })
        .collect();
    let digest = || {
        let mut bytes = vec![0; LEN];
        target.memory().read_at(0, &mut bytes).unwrap();
        xxhash_rust::xxh3::xxh3_64(&bytes)
    };
    for round in 0..20_u64 {
        source.memory().write_at(0, &pattern(round, LEN)).unwrap();
        let transfer = peer.write(&source, &remote, &pieces, TransferOptions::default()).unwrap();
        std::thread::sleep(Duration::from_micros(round * 300));
        if !transfer.cancel() {
            // Not yet: the end is what counts, and it has to come.
            let _ = transfer.wait(Duration::from_secs(20)).expect("a cancelled transfer ends");
        }
        let at_end = digest();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(digest(), at_end, "round {round}: a byte changed after the cancelled transfer had ended");
    }
}

pub(crate) fn only_the_bytes_that_matter(transport: &str) {
    let mut decoder = receiver(transport, &json!({"pages": 1}));
    let mut prefiller = sender(transport, &decoder, &json!({}));
    // A full page of one request first, so that stale bytes are there to travel or to be seen.
    prefiller.call(&json!({"do": "send", "request": "full", "chunks": [["full", PAGE]], "seed": 1}));
    prefiller.call(&json!({"do": "wait", "request": "full"}));
    assert_eq!(decoder.call(&json!({"do": "remove", "key": "full"})), true);
    // A one-token tail of the next: exactly its bytes cross and are readable.
    prefiller.call(&json!({"do": "send", "request": "tail", "chunks": [["tail", 100]], "seed": 2}));
    let report = prefiller.call(&json!({"do": "wait", "request": "tail"}));
    assert_eq!(report["bytes"], 100);
    assert_eq!(
        decoder.call(&json!({"do": "lookup", "key": "tail"})),
        json!({"state": "present", "len": 100})
    );
    assert_eq!(
        decoder.call(&json!({"do": "check", "key": "tail", "seed": 2})),
        json!({"equal": true, "len": 100})
    );
    let total: u64 = crate::actors::metric(&prefiller.call(&json!({"do": "metrics"})), "bytes", transport);
    assert_eq!(total, PAGE + 100, "the transport's own count");

    // A chunk longer than a page is refused before anything moves.
    let too_long = json!({"do": "send", "request": "long", "chunks": [["long", PAGE + 1]], "seed": 2});
    let failure = match prefiller.try_call(&too_long) {
        Err(failure) => failure,
        Ok(_) => prefiller.try_call(&json!({"do": "wait", "request": "long"})).unwrap_err(),
    };
    assert!(!failure.retryable && failure.text.contains(&(PAGE + 1).to_string()), "{failure:?}");
}
