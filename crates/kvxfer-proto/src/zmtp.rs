//! As much of ZMTP 3 (rfc.zeromq.org/spec/23 and 37), the protocol of `ZeroMQ`, as a PUSH and a PULL socket with the NULL
//! mechanism need.
//!
//! Both sides send a greeting of 64 bytes, then a READY command, then frames: a flag byte, a length of one or eight bytes, the
//! content. READY carries properties; one of our own, [`KVXFER`], tells an engine that this proxy understands kvxfer's notifications
//! and not only `LMCache`'s. Implementations skip properties they do not know.

/// More frames of the message follow.
pub const MORE: u8 = 1;
/// The length has eight bytes.
pub const LONG: u8 = 2;
/// A command, not a message.
pub const COMMAND: u8 = 4;
/// Bytes of a greeting.
pub const GREETING: usize = 64;
/// Largest command anybody needs to read; READY holds a few short properties.
pub const MAX_COMMAND: u64 = 4096;
/// Property of READY: the socket's owner speaks kvxfer's notifications ([`crate::notify`]).
pub const KVXFER: &str = "X-Kvxfer";

/// The greeting of a peer that speaks ZMTP 3.1 with the NULL mechanism.
pub fn greeting() -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[11] = 1;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// What is wrong with a peer's greeting.
pub fn check_greeting(bytes: &[u8; GREETING]) -> Result<(), String> {
    if bytes[0] != 0xff || bytes[9] & 1 != 1 {
        return Err("not a ZeroMQ peer".into());
    }
    if bytes[10] < 3 {
        return Err("a ZeroMQ peer older than version 4 (ZMTP 3.0)".into());
    }
    if &bytes[12..32] != b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        let name: String =
            bytes[12..32].iter().take_while(|b| **b != 0).map(|b| b.escape_ascii().to_string()).collect();
        return Err(format!("security mechanism {name}; only NULL is spoken here"));
    }
    Ok(())
}

/// A READY command of a socket of type `kind`, as a whole frame; `kvxfer` sets [`KVXFER`].
pub fn ready(kind: &str, kvxfer: bool) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    let mut property = |name: &str, value: &[u8]| {
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value);
    };
    property("Socket-Type", kind.as_bytes());
    if kvxfer {
        property(KVXFER, b"1");
    }
    let mut frame = vec![COMMAND, body.len() as u8];
    frame.append(&mut body);
    frame
}

/// What a peer's READY says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Type of its socket.
    pub socket_type: String,
    /// It has set [`KVXFER`].
    pub kvxfer: bool,
}

/// Reads the body of a READY command.
pub fn parse_ready(command: &[u8]) -> Result<Ready, String> {
    let Some(mut rest) = command.strip_prefix(b"\x05READY") else { return Err("no READY command".into()) };
    let damaged = || String::from("a damaged READY");
    let mut socket_type = None;
    let mut kvxfer = false;
    while let [name_len, tail @ ..] = rest {
        let (name, tail) = tail.split_at_checked(usize::from(*name_len)).ok_or_else(damaged)?;
        let (len, tail) = tail.split_at_checked(4).ok_or_else(damaged)?;
        let len = u32::from_be_bytes([len[0], len[1], len[2], len[3]]) as usize;
        let (value, tail) = tail.split_at_checked(len).ok_or_else(damaged)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            socket_type = Some(value.escape_ascii().to_string());
        } else if name.eq_ignore_ascii_case(KVXFER.as_bytes()) {
            kvxfer = true;
        }
        rest = tail;
    }
    let socket_type = socket_type.ok_or("a READY without a socket type")?;
    Ok(Ready { socket_type, kvxfer })
}

/// A message of one frame.
pub fn message(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 9);
    if let Ok(len) = u8::try_from(payload.len()) {
        frame.extend_from_slice(&[0, len]);
    } else {
        frame.push(LONG);
        frame.extend_from_slice(&(payload.len() as u64).to_be_bytes());
    }
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_says_who_speaks() {
        for kvxfer in [false, true] {
            let frame = ready("PULL", kvxfer);
            assert_eq!((frame[0], frame[1] as usize), (COMMAND, frame.len() - 2));
            assert_eq!(parse_ready(&frame[2..]), Ok(Ready { socket_type: "PULL".into(), kvxfer }));
        }
        assert!(parse_ready(b"\x05READY").is_err() && parse_ready(b"\x05ERROR").is_err());
        assert!(parse_ready(b"\x05READY\xffabcd").is_err());
    }

    #[test]
    fn greetings_are_checked() {
        assert_eq!(check_greeting(&greeting()), Ok(()));
        let mut old = greeting();
        old[10] = 1;
        let mut curve = greeting();
        curve[12..17].copy_from_slice(b"CURVE");
        for (bytes, says) in [([0; GREETING], "not a ZeroMQ peer"), (old, "older"), (curve, "CURVE")] {
            assert!(check_greeting(&bytes).expect_err("refused").contains(says));
        }
    }

    #[test]
    fn messages_have_short_and_long_frames() {
        assert_eq!(message(b"abc"), b"\0\x03abc");
        let long = message(&[7; 300]);
        assert_eq!(long[..9], [LONG, 0, 0, 0, 0, 0, 0, 1, 44]);
        assert_eq!(long.len(), 309);
    }
}
