//! A notification to the proxy from random bytes: no panic, and what is accepted can be sent on and reads the same.
#![no_main]

use kvxfer_proto::notify::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode(bytes) {
        let again = encode(&message).expect("an accepted notification is within every limit");
        assert_eq!(decode(&again).as_ref(), Ok(&message));
    }
});
