use super::*;
use crate::wire::PROTOCOL;
use crate::{AgentName, Epoch};
use proptest::prelude::*;

fn hello(name: &str, epoch: u64, challenge: u8) -> Hello {
    Hello {
        protocol_min: *PROTOCOL.start(),
        protocol_max: *PROTOCOL.end(),
        library: "0.1.0".into(),
        agent: AgentName::new(name).unwrap(),
        epoch: Epoch(epoch),
        host: HostIdentity {
            boot_id: "b".into(),
            pid_namespace: 1,
            net_namespace: 2,
            pid: 3,
            process: epoch,
            side_socket: "@s".into(),
        },
        challenge: vec![challenge; CHALLENGE_LEN],
        auth_required: false,
    }
}

fn pair(a: Option<&[u8]>, b: Option<&[u8]>) -> (Handshake, Handshake) {
    (
        Handshake::new(Role::Initiator, hello("a", 10, 1), a.map(<[u8]>::to_vec)),
        Handshake::new(Role::Acceptor, hello("b", 20, 2), b.map(<[u8]>::to_vec)),
    )
}

/// Carries messages between the two until nothing is left to say; the first failure ends it.
fn introduce(i: &mut Handshake, a: &mut Handshake) -> Result<(), (Role, Failure)> {
    let mut to_acceptor = vec![i.start().unwrap()];
    while !to_acceptor.is_empty() {
        let mut to_initiator = Vec::new();
        for m in to_acceptor.drain(..) {
            match a.receive(m).map_err(|f| (Role::Acceptor, f))? {
                Event::Introduced(v) | Event::Authenticated(v) => to_initiator.extend(v),
                other => panic!("{other:?}"),
            }
        }
        for m in to_initiator {
            match i.receive(m).map_err(|f| (Role::Initiator, f))? {
                Event::Introduced(v) | Event::Authenticated(v) => to_acceptor.extend(v),
                other => panic!("{other:?}"),
            }
        }
    }
    Ok(())
}

#[test]
fn same_key_and_no_key_on_both_sides_pass() {
    for key in [Some(&b"secret"[..]), None] {
        let (mut i, mut a) = pair(key, key);
        introduce(&mut i, &mut a).unwrap();
        assert!(i.is_authenticated() && a.is_authenticated());
        assert_eq!(i.peer().unwrap().agent.as_str(), "b");
        assert_eq!(a.peer().unwrap().agent.as_str(), "a");
        assert_eq!(i.version(), *PROTOCOL.end());
        let offers = vec![Offer { transport: "shm".into(), payload: vec![1] }];
        assert_eq!(
            i.receive(Message::Offers { session: vec![9; 16], offers: offers.clone() }),
            Ok(Event::Offers { session: Some([9; 16]), offers: offers.clone() })
        );
        assert_eq!(
            a.receive(Message::Offers { session: vec![], offers: offers.clone() }),
            Ok(Event::Offers { session: None, offers })
        );
        assert_eq!(a.receive(Message::Welcome), Ok(Event::Welcomed));
        assert_eq!(i.receive(Message::Welcome), Ok(Event::Welcomed));
        assert!(i.is_done() && a.is_done());
    }
}

#[test]
fn wrong_and_one_sided_keys_are_refused_naming_both_agents() {
    for (a, b) in [(Some(&b"x"[..]), Some(&b"y"[..])), (Some(b"x"), None), (None, Some(b"y"))] {
        let (mut i, mut acc) = pair(a, b);
        let (role, failure) = introduce(&mut i, &mut acc).unwrap_err();
        assert_eq!(role, Role::Acceptor, "the stranger is found out before it gets a MAC");
        assert_eq!(failure.code(), ErrorCode::Unauthenticated);
        let text = failure.to_string();
        assert!(text.contains("\"a\"") && text.contains("\"b\""), "{text}");
        assert!(!text.contains('x') || !text.contains('y') || !text.contains("secret"));
        let refused = i.receive(failure.to_message().unwrap()).unwrap_err();
        assert!(matches!(refused, Failure::Refused { code: ErrorCode::Unauthenticated, .. }));
        assert!(refused.to_message().is_none());
    }
}

#[test]
fn an_acceptor_without_the_key_is_found_out_too() {
    let (mut i, _) = pair(Some(b"k"), None);
    let mut liar = hello("b", 20, 2);
    liar.auth_required = true;
    assert!(matches!(i.receive(Message::Hello(liar)), Ok(Event::Introduced(_))));
    for mac in [vec![], vec![0; 32], vec![0; 31], vec![7; 4096]] {
        let (mut fresh, _) = pair(Some(b"k"), None);
        let mut liar = hello("b", 20, 2);
        liar.auth_required = true;
        fresh.receive(Message::Hello(liar)).unwrap();
        assert_eq!(fresh.receive(Message::Auth { mac }).unwrap_err().code(), ErrorCode::Unauthenticated);
    }
}

#[test]
fn a_reflected_answer_proves_nothing() {
    // The attacker mirrors the initiator's own hello (under another name) and its MAC.
    let (mut i, _) = pair(Some(b"k"), None);
    let mut mirror = hello("mirror", 10, 1);
    mirror.auth_required = true;
    let Event::Introduced(sent) = i.receive(Message::Hello(mirror)).unwrap() else { panic!() };
    let failure = i.receive(sent[0].clone()).unwrap_err();
    assert_eq!(failure.code(), ErrorCode::Unauthenticated);
}

#[test]
fn a_recorded_answer_proves_nothing() {
    let (mut i, mut a) = pair(Some(b"k"), Some(b"k"));
    let Event::Introduced(hello_a) = a.receive(i.start().unwrap()).unwrap() else { panic!() };
    let Event::Introduced(auth) = i.receive(hello_a[0].clone()).unwrap() else { panic!() };
    // The same acceptor with a fresh challenge does not take it.
    let mut again = Handshake::new(Role::Acceptor, hello("b", 20, 99), Some(b"k".to_vec()));
    again.receive(i.start().unwrap()).unwrap();
    assert_eq!(again.receive(auth[0].clone()).unwrap_err().code(), ErrorCode::Unauthenticated);
}

#[test]
fn versions_that_do_not_overlap_are_named() {
    let (_, mut a) = pair(None, None);
    let mut old = hello("a", 1, 1);
    (old.protocol_min, old.protocol_max) = (900, 901);
    let failure = a.receive(Message::Hello(old)).unwrap_err();
    assert_eq!(failure.code(), ErrorCode::Mismatch);
    assert!(failure.to_string().contains("900 to 901"), "{failure}");
}

#[test]
fn the_same_name_is_refused() {
    let (_, mut a) = pair(None, None);
    let failure = a.receive(Message::Hello(hello("b", 1, 1))).unwrap_err();
    assert!(failure.to_string().contains('1') && failure.to_string().contains("20"), "{failure}");
    let failure = a.receive(Message::Hello(hello("b", 20, 1))).unwrap_err();
    assert!(failure.to_string().contains("itself"), "{failure}");
}

#[test]
fn messages_out_of_order_are_refused() {
    let (_, mut a) = pair(None, None);
    for m in [
        Message::Welcome,
        Message::Auth { mac: vec![] },
        Message::Ping { nonce: 1 },
        Message::Offers { session: vec![], offers: vec![] },
        Message::Notify { payload: vec![] },
    ] {
        assert_eq!(a.receive(m).unwrap_err().code(), ErrorCode::Protocol);
    }
    a.receive(Message::Hello(hello("a", 1, 1))).unwrap();
    assert_eq!(a.receive(Message::Hello(hello("a", 1, 1))).unwrap_err().code(), ErrorCode::Protocol);
}

#[test]
fn odd_hellos_are_refused() {
    for spoil in [
        |h: &mut Hello| h.challenge.truncate(31),
        |h: &mut Hello| h.library = "x".repeat(65),
        |h: &mut Hello| h.host.boot_id = "x\n".into(),
        |h: &mut Hello| h.host.side_socket = "x".repeat(200),
        |h: &mut Hello| (h.protocol_min, h.protocol_max) = (2, 1),
    ] {
        let (_, mut a) = pair(None, None);
        let mut h = hello("a", 1, 1);
        spoil(&mut h);
        assert!(a.receive(Message::Hello(h)).is_err());
    }
}

proptest! {
    /// Changing any authenticated field on the way breaks the handshake.
    #[test]
    fn what_was_said_is_what_was_authenticated(field in 0usize..7) {
        let (mut i, mut a) = pair(Some(b"k"), Some(b"k"));
        let Event::Introduced(hello_a) = a.receive(i.start().unwrap()).unwrap() else { panic!() };
        let Message::Hello(mut h) = hello_a[0].clone() else { panic!() };
        match field {
            0 => h.challenge[0] ^= 1,
            1 => h.agent = AgentName::new("other").unwrap(),
            2 => h.epoch.0 += 1,
            3 => h.host.pid += 1,
            4 => h.host.side_socket.push('x'),
            5 => h.host.boot_id.push('x'),
            _ => h.host.process += 1,
        }
        let Event::Introduced(auth) = i.receive(Message::Hello(h)).unwrap() else { panic!() };
        prop_assert_eq!(a.receive(auth[0].clone()).unwrap_err().code(), ErrorCode::Unauthenticated);
    }
}
