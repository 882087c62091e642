//! A hostile sender against the receiver's machine: whatever it says, the bookkeeping holds and nothing unchecked is visible.
#![no_main]

use kvxfer_proto::frame::Decoder;
use kvxfer_proto::layout::Layout;
use kvxfer_proto::pool::Known;
use kvxfer_proto::receiver::{Output, PeerId, Receiver, Settings};
use kvxfer_proto::wire::{MAX_FRAME, Message};
use kvxfer_proto::{AgentName, Epoch, Geometry, Integrity, Time};
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

fuzz_target!(|bytes: &[u8]| {
    let mut receiver = Receiver::new(Settings {
        pool: "kv".into(),
        layout: Layout::new(4096, 8).expect("valid"),
        geometry: Geometry::default(),
        lease: Duration::from_millis(100),
        admission_timeout: Duration::from_millis(100),
        max_queue: 4,
        retention: Duration::from_millis(100),
        advance: 4,
    });
    let peer = PeerId { name: AgentName::new("them").expect("valid"), epoch: Epoch(1), connection: 1 };
    let attach = Message::Attach { channel: 1, pool: "kv".into(), geometry: Geometry::default() };
    receiver.message(Time(0), &peer, &attach);
    let mut decoder = Decoder::new(MAX_FRAME);
    decoder.push(bytes);
    let mut now = Time(0);
    let mut keys = Vec::new();
    let mut unchecked = true;
    while let Ok(Some(message)) = decoder.next_message() {
        if let Message::Reserve { chunks, integrity, .. } = &message {
            keys.extend(chunks.iter().map(|c| c.key.clone()));
            unchecked &= *integrity != Integrity::Off;
        }
        receiver.message(now, &peer, &message);
        while let Some(output) = receiver.poll() {
            if let Output::Verify(verify) = output {
                receiver.verified(now, verify.token, false);
            }
        }
        receiver.check().expect("the bookkeeping holds");
        if unchecked {
            assert!(keys.iter().all(|k| !matches!(receiver.known(k), Known::Published(_))));
        }
        now = now + Duration::from_millis(7);
        receiver.tick(now);
    }
    receiver.peer_fenced(now, &peer);
    receiver.check().expect("the bookkeeping holds");
    receiver.tick(now + Duration::from_secs(1));
    assert_eq!(receiver.stats().pages.free, 8, "no page is lost");
});
