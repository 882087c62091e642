//! How two agents get to know and to trust each other, as a pure machine.
//!
//! ```text
//! initiator                         acceptor
//!    Hello  ─────────────────────────►          protocol range, name, epoch, host, challenge
//!           ◄─────────────────────────  Hello
//!    Auth   ─────────────────────────►          HMAC-SHA256(key, transcript, "initiator")
//!           ◄─────────────────────────  Auth    HMAC-SHA256(key, transcript, "acceptor")
//!           ◄─────────────────────────  Offers  session token, what the transports need
//!    Offers ─────────────────────────►
//!    Welcome ◄───────────────────────► Welcome  each when its data paths stand
//! ```
//!
//! The key never travels. The role is part of what is authenticated, so a reflected answer proves nothing, and both
//! challenges are, so a recorded one proves nothing either. The initiator proves itself first: a stranger gets no MAC
//! to work on. The caller moves messages and decides about names and epochs it already knows.

use crate::ErrorCode;
use crate::wire::{Hello, HostIdentity, Message, Offer};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a challenge.
pub const CHALLENGE_LEN: usize = 32;
/// Bytes of a session token.
pub const SESSION_LEN: usize = 16;
/// Most offers in one message.
pub const MAX_OFFERS: usize = 32;

/// Who opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// This side connected.
    Initiator,
    /// The other side connected.
    Acceptor,
}

/// What a message of the peer has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer has said who it is (and has not proved it yet). Send these.
    Introduced(Vec<Message>),
    /// The peer has proved itself (or no key is configured on either side). Send these.
    Authenticated(Vec<Message>),
    /// The peer's offers; the session token comes from the acceptor.
    Offers {
        /// The token; `None` from the initiator.
        session: Option<[u8; SESSION_LEN]>,
        /// What its transports need.
        offers: Vec<Offer>,
    },
    /// The peer's data paths stand.
    Welcomed,
}

/// The handshake has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// This side refuses; tell the peer with [`Failure::to_message`].
    #[error("{text}")]
    Refuse {
        /// Why.
        code: ErrorCode,
        /// Names both values.
        text: String,
    },
    /// The peer has refused.
    #[error("refused by the peer: {text}")]
    Refused {
        /// Why.
        code: ErrorCode,
        /// In the peer's words.
        text: String,
    },
}

impl Failure {
    fn refuse(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Refuse { code, text: text.into() }
    }

    /// The code, whoever refused.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refuse { code, .. } | Self::Refused { code, .. } => *code,
        }
    }

    /// What to tell the peer; nothing when it was the peer who refused.
    pub fn to_message(&self) -> Option<Message> {
        match self {
            Self::Refuse { code, text } => Some(Message::Refuse { code: *code, text: text.clone() }),
            Self::Refused { .. } => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Hello,
    Auth,
    Offers,
    Welcome,
    Done,
}

/// One side of a handshake.
pub struct Handshake {
    role: Role,
    ours: Hello,
    key: Option<Vec<u8>>,
    theirs: Option<Hello>,
    version: u16,
    stage: Stage,
}

impl Handshake {
    /// `ours.auth_required` is set from `key`; `ours.challenge` must be fresh random bytes.
    pub fn new(role: Role, mut ours: Hello, key: Option<Vec<u8>>) -> Self {
        debug_assert_eq!(ours.challenge.len(), CHALLENGE_LEN);
        ours.auth_required = key.is_some();
        Self { role, ours, key, theirs: None, version: 0, stage: Stage::Hello }
    }

    /// What the initiator sends first; the acceptor waits.
    pub fn start(&self) -> Option<Message> {
        (self.role == Role::Initiator).then(|| Message::Hello(self.ours.clone()))
    }

    /// What the peer said of itself.
    pub fn peer(&self) -> Option<&Hello> {
        self.theirs.as_ref()
    }

    /// The version both speak, once introduced.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// True once the peer has proved itself.
    pub fn is_authenticated(&self) -> bool {
        matches!(self.stage, Stage::Offers | Stage::Welcome | Stage::Done)
    }

    /// True once the peer's `Welcome` has come.
    pub fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Takes the peer's next message.
    pub fn receive(&mut self, message: Message) -> Result<Event, Failure> {
        match (self.stage, message) {
            (_, Message::Refuse { code, text }) => Err(Failure::Refused { code, text: printable(&text) }),
            (Stage::Hello, Message::Hello(hello)) => {
                self.version = self.check(&hello)?;
                self.theirs = Some(hello);
                self.stage = Stage::Auth;
                Ok(Event::Introduced(vec![match self.role {
                    Role::Initiator => self.auth(),
                    Role::Acceptor => Message::Hello(self.ours.clone()),
                }]))
            }
            (Stage::Auth, Message::Auth { mac }) => {
                self.verify(&mac)?;
                self.stage = Stage::Offers;
                Ok(Event::Authenticated(match self.role {
                    Role::Initiator => vec![],
                    Role::Acceptor => vec![self.auth()],
                }))
            }
            (Stage::Offers, Message::Offers { session, offers }) => {
                if offers.len() > MAX_OFFERS {
                    return Err(Failure::refuse(
                        ErrorCode::Protocol,
                        format!("{} transport offers; at most {MAX_OFFERS} are allowed", offers.len()),
                    ));
                }
                let session = match (self.role, <[u8; SESSION_LEN]>::try_from(session.as_slice())) {
                    (Role::Initiator, Ok(token)) => Some(token),
                    (Role::Acceptor, _) if session.is_empty() => None,
                    _ => {
                        return Err(Failure::refuse(
                            ErrorCode::Protocol,
                            format!(
                                "session token of {} bytes from the {:?}",
                                session.len(),
                                self.role.other()
                            ),
                        ));
                    }
                };
                self.stage = Stage::Welcome;
                Ok(Event::Offers { session, offers })
            }
            (Stage::Welcome, Message::Welcome) => {
                self.stage = Stage::Done;
                Ok(Event::Welcomed)
            }
            (stage, other) => Err(Failure::refuse(
                ErrorCode::Protocol,
                format!("unexpected message {} while waiting for {stage:?}", kind(&other)),
            )),
        }
    }

    fn check(&self, theirs: &Hello) -> Result<u16, Failure> {
        let ours = &self.ours;
        if theirs.protocol_min > theirs.protocol_max
            || theirs.protocol_max < ours.protocol_min
            || theirs.protocol_min > ours.protocol_max
        {
            return Err(Failure::refuse(
                ErrorCode::Mismatch,
                format!(
                    "protocol versions differ: agent {:?} (kvxfer {}) speaks {} to {}, agent {:?} (kvxfer {}) speaks {} \
                     to {}; install versions that overlap",
                    ours.agent.as_str(),
                    ours.library,
                    ours.protocol_min,
                    ours.protocol_max,
                    theirs.agent.as_str(),
                    printable(&theirs.library),
                    theirs.protocol_min,
                    theirs.protocol_max
                ),
            ));
        }
        if theirs.challenge.len() != CHALLENGE_LEN {
            return Err(Failure::refuse(
                ErrorCode::Protocol,
                format!("challenge of {} bytes; {CHALLENGE_LEN} are required", theirs.challenge.len()),
            ));
        }
        for (what, text, max) in [
            ("library version", &theirs.library, 64),
            ("boot id", &theirs.host.boot_id, 64),
            ("side socket", &theirs.host.side_socket, 108),
        ] {
            if text.len() > max || text.chars().any(char::is_control) {
                return Err(Failure::refuse(
                    ErrorCode::Protocol,
                    format!(
                        "{what} of {} bytes; at most {max} without control characters are allowed",
                        text.len()
                    ),
                ));
            }
        }
        if ours.auth_required != theirs.auth_required {
            let (with, without) = if ours.auth_required { (ours, theirs) } else { (theirs, ours) };
            return Err(Failure::refuse(
                ErrorCode::Unauthenticated,
                format!(
                    "agent {:?} requires a pre-shared key and agent {:?} has none; configure the same auth_key on both",
                    with.agent.as_str(),
                    without.agent.as_str()
                ),
            ));
        }
        if theirs.agent == ours.agent {
            let text = if theirs.epoch == ours.epoch {
                format!("agent {:?} cannot connect to itself", ours.agent.as_str())
            } else {
                format!(
                    "both agents are named {:?} (epochs {} and {}); names must differ",
                    ours.agent.as_str(),
                    ours.epoch,
                    theirs.epoch
                )
            };
            return Err(Failure::refuse(ErrorCode::Mismatch, text));
        }
        Ok(ours.protocol_max.min(theirs.protocol_max))
    }

    fn auth(&self) -> Message {
        let mac = match (&self.key, &self.theirs) {
            (Some(key), Some(_)) => self.mac(key, self.role).finalize().into_bytes().to_vec(),
            _ => Vec::new(),
        };
        Message::Auth { mac }
    }

    fn verify(&self, theirs: &[u8]) -> Result<(), Failure> {
        let good = match &self.key {
            // `verify_slice` compares in constant time and refuses any other length.
            Some(key) => self.mac(key, self.role.other()).verify_slice(theirs).is_ok(),
            None => theirs.is_empty(),
        };
        if good {
            return Ok(());
        }
        let name = |h: Option<&Hello>| h.map_or_else(String::new, |h| h.agent.to_string());
        Err(Failure::refuse(
            ErrorCode::Unauthenticated,
            format!(
                "agents {:?} and {:?} hold different pre-shared keys; configure the same auth_key on both",
                self.ours.agent.as_str(),
                name(self.theirs.as_ref())
            ),
        ))
    }

    /// The MAC that the side of `role` sends, over both sides' statements.
    fn mac(&self, key: &[u8], role: Role) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
        mac.update(b"kvxfer control handshake 1\0");
        mac.update(match role {
            Role::Initiator => b"initiator\0",
            Role::Acceptor => b"acceptor\0\0",
        });
        let theirs = self.theirs.as_ref().unwrap_or(&self.ours);
        let (initiator, acceptor) = match self.role {
            Role::Initiator => (&self.ours, theirs),
            Role::Acceptor => (theirs, &self.ours),
        };
        for hello in [initiator, acceptor] {
            feed(&mut mac, hello);
        }
        mac
    }
}

impl Role {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Initiator => Self::Acceptor,
            Self::Acceptor => Self::Initiator,
        }
    }
}

/// Everything a side has stated, each field with its length, so that no two statements read the same.
fn feed(mac: &mut Hmac<Sha256>, hello: &Hello) {
    let HostIdentity { boot_id, pid_namespace, net_namespace, pid, process, side_socket } = &hello.host;
    let mut field = |bytes: &[u8]| {
        mac.update(&(bytes.len() as u64).to_le_bytes());
        mac.update(bytes);
    };
    field(&hello.challenge);
    field(hello.agent.as_str().as_bytes());
    field(&hello.epoch.0.to_le_bytes());
    field(&hello.protocol_min.to_le_bytes());
    field(&hello.protocol_max.to_le_bytes());
    field(boot_id.as_bytes());
    field(&pid_namespace.to_le_bytes());
    field(&net_namespace.to_le_bytes());
    field(&pid.to_le_bytes());
    field(&process.to_le_bytes());
    field(side_socket.as_bytes());
}

/// A text fit for a log line and for [`crate::wire::MAX_TEXT`]: without control characters, at most 1,000 characters.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(1000).collect()
}

/// The message's name, without its content.
fn kind(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split([' ', '(', '{']).next().unwrap_or("?").to_owned()
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
