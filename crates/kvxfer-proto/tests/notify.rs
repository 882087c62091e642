//! Notifications to the proxy: `LMCache`'s bytes exactly, kvxfer's own bytes pinned, and nothing accepted that is neither.

use kvxfer_proto::ids::MAX_REQUEST_ID;
use kvxfer_proto::notify::{
    MAX_CODE, MAX_MESSAGE, MAX_TEXT, MAX_TP_RANKS, Notification, NotifyError, decode, encode,
};
use proptest::prelude::*;

/// What msgspec writes for `LMCache`'s `ProxyNotif(req_id="7")`.
const PROXY_NOTIF: &[u8] = b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa17";

fn ready() -> Notification {
    Notification::KvReady { req_id: "r-1".to_owned(), tp_rank: 3, bytes: 671_088_640, took_us: 1234 }
}

fn failed() -> Notification {
    Notification::KvFailed {
        req_id: "r-1".to_owned(),
        tp_rank: 0,
        code: "no_capacity".to_owned(),
        message: "the pool is full".to_owned(),
        retryable: true,
    }
}

#[test]
fn the_bytes_of_lmcache_are_read_and_written() {
    let message = Notification::ProxyNotif { req_id: "7".to_owned() };
    assert_eq!(decode(PROXY_NOTIF).as_ref(), Ok(&message));
    assert_eq!(encode(&message).as_deref(), Ok(PROXY_NOTIF));
}

#[test]
fn the_bytes_of_kvxfer_stay_as_they_are() {
    let golden: [(Notification, &[u8]); 2] = [
        (
            ready(),
            b"\x85\xa4type\xa7KvReady\xa6req_id\xa3r-1\xa7tp_rank\x03\xa5bytes\xce\x28\x00\x00\x00\xa7took_us\xcd\x04\xd2",
        ),
        (
            failed(),
            b"\x86\xa4type\xa8KvFailed\xa6req_id\xa3r-1\xa7tp_rank\x00\xa4code\xabno_capacity\xa7message\xb0the pool is full\xa9retryable\xc3",
        ),
    ];
    for (message, bytes) in golden {
        assert_eq!(encode(&message).as_deref(), Ok(bytes));
        assert_eq!(decode(bytes).as_ref(), Ok(&message));
    }
}

#[test]
fn unknown_keys_and_any_order_are_fine() {
    let bytes = b"\x84\xa6req_id\xa17\xa5later\x81\xa1x\x92\x01\xc0\xa4type\xaaProxyNotif\xa4more\xc4\x02ab";
    assert_eq!(decode(bytes), Ok(Notification::ProxyNotif { req_id: "7".to_owned() }));
}

#[test]
fn what_is_wrong_is_named() {
    let cases: [(&[u8], &str); 9] = [
        (b"", "not a MessagePack map"),
        (b"hello", "not a MessagePack map"),
        (b"\x92\xaaProxyNotif\xa17", "not a MessagePack map"),
        (b"\x81\xa6req_id\xa17", "without \"type\""),
        (b"\x81\xa4type\xaaProxyNotif", "ProxyNotif without \"req_id\""),
        (b"\x82\xa4type\xa5Hello\xa6req_id\xa17", "\"Hello\""),
        (b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa0", "req_id is empty"),
        (b"\x82\xa4type\xaaProxyNotif\xa6req_id\x07", "not a notification"),
        (b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa17\x00", "1 bytes after"),
    ];
    for (bytes, says) in cases {
        let problem = decode(bytes).expect_err("not a notification").to_string();
        assert!(problem.contains(says), "{problem:?} should say {says:?}");
    }
    // Every cut of a good message is bad.
    for end in 0..PROXY_NOTIF.len() {
        decode(&PROXY_NOTIF[..end]).expect_err("cut off");
    }
}

#[test]
fn limits_hold_in_both_directions() {
    let long = |n| "x".repeat(n);
    let id = Notification::ProxyNotif { req_id: long(MAX_REQUEST_ID) };
    assert_eq!(decode(&encode(&id).expect("at the limit")), Ok(id));
    assert!(matches!(
        encode(&Notification::ProxyNotif { req_id: long(MAX_REQUEST_ID + 1) }),
        Err(NotifyError::Limit { what: "req_id", .. })
    ));
    let rank = Notification::KvReady { req_id: long(1), tp_rank: MAX_TP_RANKS, bytes: 0, took_us: 0 };
    assert!(matches!(encode(&rank), Err(NotifyError::Limit { what: "tp_rank", .. })));
    let failed = |code: String, message: String| Notification::KvFailed {
        req_id: long(1),
        tp_rank: 0,
        code,
        message,
        retryable: false,
    };
    assert!(matches!(
        encode(&failed(long(MAX_CODE + 1), String::new())),
        Err(NotifyError::Limit { what: "code", .. })
    ));
    // A long text is cut at a character, not refused: the failure itself must arrive.
    let cut = decode(&encode(&failed(long(1), "é".repeat(MAX_TEXT))).expect("cut")).expect("readable");
    let Notification::KvFailed { message, .. } = cut else { panic!("another kind") };
    assert_eq!(message, "é".repeat(MAX_TEXT / 2));
    assert!(matches!(decode(&vec![0x80; MAX_MESSAGE + 1]), Err(NotifyError::TooLarge { .. })));
    // A length that promises far more than there is.
    decode(b"\xdf\xff\xff\xff\xff\xa4type").expect_err("cut off");
    // Nesting that would exhaust a stack.
    let mut deep = b"\x81\xa1x".to_vec();
    deep.resize(MAX_MESSAGE, 0x91);
    decode(&deep).expect_err("too deep");
}

fn any_notification() -> impl Strategy<Value = Notification> {
    let id = "[a-zA-Z0-9_.-]{1,64}";
    prop_oneof![
        id.prop_map(|req_id| Notification::ProxyNotif { req_id }),
        (id, 0..MAX_TP_RANKS, any::<u64>(), any::<u64>()).prop_map(|(req_id, tp_rank, bytes, took_us)| {
            Notification::KvReady { req_id, tp_rank, bytes, took_us }
        }),
        (id, 0..MAX_TP_RANKS, "[a-z_]{1,32}", ".{0,200}", any::<bool>()).prop_map(
            |(req_id, tp_rank, code, message, retryable)| Notification::KvFailed {
                req_id,
                tp_rank,
                code,
                message,
                retryable
            }
        ),
    ]
}

proptest! {
    #[test]
    fn every_notification_comes_back(message in any_notification()) {
        prop_assert_eq!(decode(&encode(&message).expect("within the limits")), Ok(message));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(message) = decode(&bytes) {
            prop_assert_eq!(decode(&encode(&message).expect("an accepted one is within the limits")), Ok(message));
        }
    }

    #[test]
    fn damaged_messages_never_panic(message in any_notification(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode(&message).expect("within the limits");
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(read) = decode(&bytes) {
            prop_assert_eq!(decode(&encode(&read).expect("an accepted one is within the limits")), Ok(read));
        }
    }
}
