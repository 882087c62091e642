//! Outgoing connections: the handshake on the caller's thread, with a deadline on every step.

use super::accept::peer_info;
use super::address::{Address, connect as dial, wait_for};
use super::conn::{Conn, encode};
use super::links::{self, Invited};
use super::peer::PeerInner;
use super::reactor::Command;
use super::side::SideChannel;
use super::state::{Conflict, Inner};
use crate::transport::Role;
use crate::{Error, Result};
use kvxfer_proto::frame::{Decoder, MAX_FRAME_BEFORE_AUTH, PREAMBLE_CONTROL};
use kvxfer_proto::handshake::{self, Event, Failure, Handshake};
use kvxfer_proto::wire::{MAX_FRAME, Message};
use kvxfer_proto::{AgentName, ErrorCode};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connects to `address`, or returns the peer that is connected under it already.
pub(crate) fn connect(inner: &Arc<Inner>, address: &str, timeout: Duration) -> Result<Arc<PeerInner>> {
    inner.check()?;
    inner.check_may_wait("Agent::connect")?;
    let parsed = Address::parse(address)
        .map_err(|e| Error::InvalidArgument { argument: "address", problem: format!("{address:?}: {e}") })?;
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(peer) = known(inner, address) {
            return Ok(peer);
        }
        inner.check()?;
        match attempt(inner, address, &parsed, deadline) {
            // The other side has not noticed the end of an earlier connection, or calls us at this moment.
            Err(e) if e.code() == ErrorCode::Busy && Instant::now() + pause < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Err(e) if Instant::now() >= deadline && e.code() != ErrorCode::TimedOut => {
                tracing::debug!(address, error = %e, "connecting");
                return Err(e);
            }
            done => return done,
        }
    }
}

fn known(inner: &Inner, address: &str) -> Option<Arc<PeerInner>> {
    let table = inner.peers.read();
    let name = table.by_address.get(address)?;
    table.by_name.get(name).filter(|p| p.is_up()).cloned()
}

/// Takes the handshake off the list of those under way, however it ends.
struct Outgoing<'a> {
    inner: &'a Inner,
    id: u64,
}

impl<'a> Outgoing<'a> {
    fn new(inner: &'a Inner) -> Self {
        let id = inner.id();
        inner.outgoing.lock().insert(id, None);
        Self { inner, id }
    }
    fn known_as(&self, name: &AgentName) {
        self.inner.outgoing.lock().insert(self.id, Some(name.clone()));
    }
}

impl Drop for Outgoing<'_> {
    fn drop(&mut self) {
        self.inner.outgoing.lock().remove(&self.id);
    }
}

fn attempt(inner: &Arc<Inner>, address: &str, parsed: &Address, deadline: Instant) -> Result<Arc<PeerInner>> {
    let outgoing = Outgoing::new(inner);
    let (fd, far) = dial(parsed, deadline)?;
    let mut talk =
        Talk { fd, decoder: Decoder::new(MAX_FRAME_BEFORE_AUTH), address, deadline, started: Instant::now() };
    talk.write(&PREAMBLE_CONTROL)?;
    let mut machine = Handshake::new(handshake::Role::Initiator, inner.hello()?, inner.key.clone());
    if let Some(hello) = machine.start() {
        talk.send(&hello)?;
    }

    // Hello and Auth.
    while !machine.is_authenticated() {
        let (Event::Introduced(answers) | Event::Authenticated(answers)) = talk.step(&mut machine)? else {
            continue;
        };
        if let (Some(hello), false) = (machine.peer(), answers.is_empty()) {
            outgoing.known_as(&hello.agent);
            match inner.conflict(&hello.agent, hello.epoch) {
                Conflict::Connected(peer) => {
                    // Found again at once the next time.
                    inner.peers.write().by_address.insert(address.to_owned(), hello.agent.clone());
                    return Ok(peer);
                }
                other => other.error(&hello.agent, hello.epoch).map_or(Ok(()), Err)?,
            }
        }
        for m in answers {
            talk.send(&m)?;
        }
    }
    talk.decoder.set_limit(MAX_FRAME);

    // Offers: theirs brings the session that the side socket and the data connections name.
    let Event::Offers { session: Some(session), offers } = talk.step(&mut machine)? else {
        return Err(talk.broken("offers without a session"));
    };
    let Some(hello) = machine.peer() else { return Err(talk.broken("no hello")) };
    let info = peer_info(inner, hello, Role::Initiator, far, session);
    let mut invited = Invited::default();
    let side = if info.same_kernel {
        let soon = deadline.min(Instant::now() + Duration::from_secs(5));
        SideChannel::connect(&info.host.side_socket, info.same_host.then_some(info.host.pid), &session, soon)
            .map(Arc::new)
    } else {
        Err("the peer is on another host".to_owned())
    };
    match &side {
        Ok(side) => invited = links::invite(inner, side, &info.name)?,
        Err(reason) => tracing::debug!(peer = %info.name, reason, "no side socket"),
    }
    let reachable = side.as_ref().map(|_| ()).map_err(Clone::clone);
    talk.send(&Message::Offers { session: Vec::new(), offers: links::offers(inner, &info, &reachable) })?;
    let assembled = match links::assemble(inner, info, &offers, side, invited, deadline) {
        Ok(a) => a,
        Err(e) => {
            let _ =
                talk.send(&Message::Refuse { code: e.code(), text: handshake::printable(&e.to_string()) });
            // The peer may have refused at the same time, and closed what we were using: its reason is the cause then.
            // Ours comes first where it is about our own configuration.
            if !matches!(e.code(), ErrorCode::Requirement | ErrorCode::NotAvailable) {
                talk.deadline = deadline.min(Instant::now() + Duration::from_millis(100));
                if let Err(refusal) = talk.step(&mut machine)
                    && matches!(refusal, Error::Failed { code, .. } if code != ErrorCode::Unreachable)
                {
                    return Err(refusal);
                }
            }
            return Err(e);
        }
    };

    let welcomed = talk.send(&Message::Welcome).and_then(|()| talk.step(&mut machine));
    if let Err(e) = welcomed {
        links::close_paths(&assembled.paths);
        return Err(e);
    }
    let Talk { fd, decoder, .. } = talk;
    let conn = Conn::new(fd, inner.reactor.clone());
    let peer = PeerInner::new(inner, assembled, Some(address.to_owned()), conn);
    match inner.enter(&peer) {
        Ok(()) => {
            inner.reactor.command(Command::PeerUp(peer.clone(), decoder));
            Ok(peer)
        }
        Err(conflict) => {
            links::close_paths(&peer.paths);
            peer.conn.close();
            match conflict {
                Conflict::Connected(known) => Ok(known),
                other => Err(other
                    .error(&peer.info.name, peer.info.epoch)
                    .unwrap_or_else(|| Error::failed(ErrorCode::Busy, "the connection was replaced"))),
            }
        }
    }
}

/// The socket during the handshake, with its deadline.
struct Talk<'a> {
    fd: OwnedFd,
    decoder: Decoder,
    address: &'a str,
    deadline: Instant,
    started: Instant,
}

impl Talk<'_> {
    fn broken(&self, what: &str) -> Error {
        Error::failed(ErrorCode::Protocol, format!("{}: {what} during the handshake", self.address))
    }

    fn late(&self) -> Error {
        Error::TimedOut {
            operation: format!("the handshake with {}", self.address),
            after: self.deadline.saturating_duration_since(self.started),
        }
    }

    fn write(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait_for(&self.fd, PollFlags::OUT, self.deadline)
                        .map_err(|e| self.broken(&e.to_string()))?
                    {
                        return Err(self.late());
                    }
                }
                // The peer may have said why before it closed: let the next read find out.
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(e) => return Err(self.broken(&e.to_string())),
            }
        }
        Ok(())
    }

    fn send(&self, message: &Message) -> Result<()> {
        self.write(&encode(message)?)
    }

    /// The peer's next message, taken by the machine; refusals of either side become errors.
    fn step(&mut self, machine: &mut Handshake) -> Result<Event> {
        let message = self.receive()?;
        machine.receive(message).map_err(|failure| {
            if let Some(m) = failure.to_message() {
                let _ = self.send(&m);
            }
            let code = failure.code();
            let text = match failure {
                Failure::Refuse { text, .. } => format!("{}: {text}", self.address),
                Failure::Refused { text, .. } => format!("{} refused the connection: {text}", self.address),
            };
            Error::failed(code, text)
        })
    }

    fn receive(&mut self) -> Result<Message> {
        let mut buffer = [0u8; 16 << 10];
        loop {
            if let Some(m) = self.decoder.next_message().map_err(|e| self.broken(&e.to_string()))? {
                return Ok(m);
            }
            match rustix::net::recv(&self.fd, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Err(Error::failed(
                        ErrorCode::Unreachable,
                        format!(
                            "{} closed the connection during the handshake; is a kvxfer agent listening there?",
                            self.address
                        ),
                    ));
                }
                Ok((n, _)) => self.decoder.push(&buffer[..n]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait_for(&self.fd, PollFlags::IN, self.deadline)
                        .map_err(|e| self.broken(&e.to_string()))?
                    {
                        return Err(self.late());
                    }
                }
                Err(e) => {
                    return Err(Error::failed(
                        ErrorCode::Unreachable,
                        format!("{} broke the connection during the handshake: {e}", self.address),
                    ));
                }
            }
        }
    }
}
