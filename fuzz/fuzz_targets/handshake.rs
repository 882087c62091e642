//! A handshake with a stranger who does not hold the key: whatever it says, it is never authenticated.
#![no_main]

use kvxfer_proto::frame::Decoder;
use kvxfer_proto::handshake::{Handshake, Role};
use kvxfer_proto::wire::{Hello, HostIdentity, MAX_FRAME};
use kvxfer_proto::{AgentName, Epoch};
use libfuzzer_sys::fuzz_target;

fn hello() -> Hello {
    Hello {
        protocol_min: 1,
        protocol_max: 1,
        library: "fuzz".into(),
        agent: AgentName::new("us").expect("valid"),
        epoch: Epoch(1),
        host: HostIdentity {
            boot_id: "boot".into(),
            pid_namespace: 1,
            net_namespace: 1,
            pid: 1,
            process: 1,
            side_socket: String::new(),
        },
        challenge: vec![7; 32],
        auth_required: true,
    }
}

fuzz_target!(|input: (bool, &[u8])| {
    let (acceptor, bytes) = input;
    let role = if acceptor { Role::Acceptor } else { Role::Initiator };
    let mut handshake = Handshake::new(role, hello(), Some(b"a key the stranger does not hold".to_vec()));
    let mut decoder = Decoder::new(MAX_FRAME);
    decoder.push(bytes);
    while let Ok(Some(message)) = decoder.next_message() {
        let result = handshake.receive(message);
        assert!(!handshake.is_authenticated(), "a stranger got in");
        if result.is_err() {
            break;
        }
    }
});
