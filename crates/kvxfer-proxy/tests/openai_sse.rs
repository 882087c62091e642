//! The reader of server-sent events: any chunking gives the same events, and what it holds back is bounded.

use kvxfer_proxy::openai::{Event, SseError, SseReader, write_event};
use proptest::prelude::*;

/// Reads a stream that arrives in pieces of the given sizes, the last size repeating.
fn read(stream: &[u8], sizes: &[usize]) -> (Vec<Event>, Result<(), SseError>) {
    let mut reader = SseReader::new(1 << 20);
    let mut events = Vec::new();
    let mut rest = stream;
    let mut turn = 0;
    while !rest.is_empty() {
        let size = sizes[turn.min(sizes.len() - 1)].clamp(1, rest.len());
        turn += 1;
        reader.push(&rest[..size]);
        rest = &rest[size..];
        while let Some(event) = reader.next().expect("within the limit") {
            events.push(event);
        }
    }
    (events, reader.finish())
}

fn data(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| std::str::from_utf8(&event.data).expect("text")).collect()
}

#[test]
fn line_ends_comments_names_and_many_lines() {
    let stream = b"\xef\xbb\xbf: hello\r\nevent: x\r\ndata: a\r\n\r\ndata:b\ndata:  c\n\nid: 7\rdata: d\r\rdata\n\n: keep-alive\n\ndata: e\n\n";
    let (events, end) = read(stream, &[stream.len()]);
    assert_eq!(data(&events), ["a", "b\n c", "d", "e"]);
    assert_eq!(&events[0].name[..], b"x");
    assert!(events[1].name.is_empty());
    assert_eq!(end, Ok(()));
}

#[test]
fn an_event_is_there_as_soon_as_its_last_byte_is() {
    let mut reader = SseReader::new(100);
    reader.push(b"data: a\r\n\r");
    let event = reader.next().expect("fine").expect("the CR ends the event");
    assert_eq!(&event.data[..], b"a");
    reader.push(b"\ndata: b\n\n");
    assert_eq!(&reader.next().expect("fine").expect("b").data[..], b"b");
}

#[test]
fn an_end_inside_an_event_is_seen() {
    for stream in [&b"data: a\n\ndata: b\n"[..], b"data: a\n\ndata: b", b"data: a\n\nda"] {
        let (events, end) = read(stream, &[3]);
        assert_eq!(data(&events), ["a"]);
        assert_eq!(end, Err(SseError::CutOff), "{}", String::from_utf8_lossy(stream));
    }
}

#[test]
fn an_event_without_end_is_refused() {
    let mut reader = SseReader::new(64);
    reader.push(&[b'x'; 65]);
    assert_eq!(reader.next(), Err(SseError::TooLarge { limit: 64 }));

    let mut reader = SseReader::new(64);
    for _ in 0..40 {
        reader.push(b"data: abc\n");
        match reader.next() {
            Ok(None) => {}
            Ok(Some(event)) => panic!("no event ends here: {event:?}"),
            Err(error) => {
                assert_eq!(error, SseError::TooLarge { limit: 64 });
                return;
            }
        }
    }
    panic!("an endless event was never refused");
}

#[test]
fn many_small_events_are_no_large_one() {
    let mut reader = SseReader::new(16);
    for _ in 0..10 {
        reader.push(&b"data: abc\n\n".repeat(10));
        for _ in 0..10 {
            assert!(reader.next().expect("small").is_some());
        }
        assert!(reader.next().expect("small").is_none());
    }
}

/// A stream's bytes, with the events in it.
fn stream() -> impl Strategy<Value = (Vec<u8>, Vec<String>)> {
    let end = prop_oneof![Just("\n"), Just("\r"), Just("\r\n")];
    let line = "[ -~äß😀]{1,20}";
    let event = (proptest::collection::vec(line, 1..4), any::<bool>(), end);
    proptest::collection::vec(event, 0..8).prop_map(|events| {
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for (lines, comment, end) in events {
            if comment {
                bytes.extend_from_slice(format!(": note{end}").as_bytes());
            }
            for line in &lines {
                bytes.extend_from_slice(format!("data: {line}{end}").as_bytes());
            }
            bytes.extend_from_slice(end.as_bytes());
            expected.push(lines.join("\n"));
        }
        (bytes, expected)
    })
}

proptest! {
    #[test]
    fn any_chunking_gives_the_same_events(
        (bytes, expected) in stream(), sizes in proptest::collection::vec(1usize..9, 1..40),
    ) {
        let (events, end) = read(&bytes, &sizes);
        prop_assert_eq!(data(&events), expected);
        prop_assert_eq!(end, Ok(()));
    }

    #[test]
    fn any_bytes_are_read_alike_whole_and_in_pieces(
        bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b' '), Just(b'd'), Just(b'a'), Just(b't'), any::<u8>()], 0..200),
        sizes in proptest::collection::vec(1usize..9, 1..40),
    ) {
        let whole = read(&bytes, &[bytes.len().max(1)]);
        prop_assert_eq!(read(&bytes, &sizes), whole);
    }

    #[test]
    fn what_is_written_is_read(texts in proptest::collection::vec("[^\r\n]{1,30}", 0..6)) {
        let mut bytes = Vec::new();
        for text in &texts {
            write_event(&mut bytes, text.as_bytes());
        }
        let (events, end) = read(&bytes, &[bytes.len().max(1)]);
        prop_assert_eq!(data(&events), texts);
        prop_assert_eq!(end, Ok(()));
    }
}
