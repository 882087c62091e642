//! A stream of frames that arrives in parts: cut anywhere, it gives the same messages as in one piece.
#![no_main]

use kvxfer_proto::frame::Decoder;
use kvxfer_proto::wire::{MAX_FRAME, Message};
use libfuzzer_sys::fuzz_target;

/// All messages up to the first error, and whether there was one.
fn read<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Message>, bool) {
    let mut decoder = Decoder::new(MAX_FRAME);
    let mut messages = Vec::new();
    for part in parts {
        decoder.push(part);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return (messages, true),
            }
        }
    }
    (messages, false)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = read(std::iter::once(bytes));
    let parts = read(bytes.chunks(usize::from(step).max(1)));
    assert_eq!(whole, parts);
});
