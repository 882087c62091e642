//! A stream of server-sent events that arrives in parts: cut anywhere, it gives the same events, and what a join makes
//! of them is events of JSON again.
#![no_main]

use kvxfer_proxy::openai::{Endpoint, Event, Identity, Limits, Request, SseError, SseReader, StreamJoin};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 512;

/// All events up to the first error, and how the stream ended.
fn read<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Event>, Result<(), SseError>) {
    let mut reader = SseReader::new(LIMIT);
    let mut events = Vec::new();
    for part in parts {
        reader.push(part);
        loop {
            match reader.next() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, Err(error)),
            }
        }
    }
    let end = reader.finish();
    (events, end)
}

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (step, chat, bytes) = input;
    let whole = read(std::iter::once(bytes));
    let parts = read(bytes.chunks(usize::from(step).max(1)));
    assert_eq!(whole, parts);

    let endpoint = if chat { Endpoint::Chat } else { Endpoint::Completions };
    let body = r#"{"prompt":"a","messages":[{"role":"user","content":"a"}],"stream":true,"stream_options":{"include_usage":true}}"#;
    let request = Request::parse(endpoint, body.into(), &Limits::default()).expect("a good request");
    let leg = request.leg(0, vec![1, 2], Some(64)).expect("a leg");
    let mut join = StreamJoin::new(&request, &Identity { id: endpoint.id("r"), created: 5 });
    let mut out = Vec::new();
    for event in &whole.0 {
        if let Err(error) = join.event(&leg, event, &mut out) {
            join.fail(&error, &mut out);
            break;
        }
    }
    let mut reader = SseReader::new(1 << 20);
    reader.push(&out);
    while let Ok(Some(event)) = reader.next() {
        assert!(event.data == "[DONE]" || serde_json::from_slice::<serde_json::Value>(&event.data).is_ok());
    }
});
