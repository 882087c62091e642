//! Incoming connections: from the first byte to a peer, without ever making the progress thread wait.
//!
//! A stranger may send eight bytes of preamble, a data connection's session, or a handshake of small frames, all within
//! one deadline; more than [`MAX_STRANGERS`] at a time push out the oldest. Only after authentication are data
//! paths connected, on a short-lived thread, because a transport may need time for that.

use super::conn::Conn;
use super::identity;
use super::links::{self, Assembled, Invited};
use super::reactor::{Command, Reactor};
use super::side::SideChannel;
use super::state::{Conflict, Inner, SessionState, SideOf};
use crate::transport::{self, PeerInfo};
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use kvxfer_proto::frame::{
    Decoder, MAX_FRAME_BEFORE_AUTH, PREAMBLE_CONTROL, PREAMBLE_DATA, PREAMBLE_DATA_LEN,
};
use kvxfer_proto::handshake::{Event, Failure, Handshake, Role, printable};
use kvxfer_proto::wire::{MAX_FRAME, Message};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most connections that have not yet authenticated.
pub(crate) const MAX_STRANGERS: usize = 64;
/// Most connections that are not peers yet, authenticated ones included.
pub(crate) const MAX_INCOMING: usize = 256;
/// Most threads that connect data paths at a time.
pub(crate) const MAX_CONNECTORS: usize = 32;

/// A connection that is not a peer yet.
pub(crate) struct Incoming {
    stage: Stage,
    pub(crate) deadline: Instant,
    far: Option<SocketAddr>,
}

enum Stage {
    /// Collecting the preamble.
    Preamble { fd: Option<OwnedFd>, bytes: Vec<u8> },
    /// A control connection's handshake; after the peer's offers, data paths are being connected on another thread.
    Handshake(Box<Talk>),
}

/// A handshake with its socket.
pub(crate) struct Talk {
    pub(crate) conn: Arc<Conn>,
    pub(crate) decoder: Decoder,
    machine: Handshake,
    pub(crate) info: Option<PeerInfo>,
    /// Our paths stand.
    pub(crate) assembled: Option<Box<Assembled>>,
}

/// What an event on an incoming connection has led to.
pub(crate) enum Step {
    /// Go on waiting.
    Wait,
    /// Close it: over, refused, or handed to a transport.
    Close,
    /// A control connection: from now on it is watched under its own token.
    Adopted(u64),
    /// The handshake is complete and both sides' paths stand.
    Ready,
}

impl Incoming {
    pub(crate) fn new(fd: OwnedFd, far: Option<SocketAddr>, deadline: Instant) -> Self {
        Self { stage: Stage::Preamble { fd: Some(fd), bytes: Vec::new() }, deadline, far }
    }

    /// The peer has not proved itself.
    pub(crate) fn is_stranger(&self) -> bool {
        match &self.stage {
            Stage::Preamble { .. } => true,
            Stage::Handshake(t) => !t.machine.is_authenticated(),
        }
    }

    pub(crate) fn info(&self) -> Option<&PeerInfo> {
        match &self.stage {
            Stage::Preamble { .. } => None,
            Stage::Handshake(t) => t.info.as_ref(),
        }
    }

    pub(crate) fn into_talk(self) -> Option<Talk> {
        match self.stage {
            Stage::Preamble { .. } => None,
            Stage::Handshake(t) => Some(*t),
        }
    }

    /// The socket can be read (or written).
    pub(crate) fn advance(&mut self, inner: &Arc<Inner>, connectors: &mut usize) -> Step {
        if let Stage::Preamble { .. } = &self.stage {
            match self.preamble(inner) {
                Ok(step) => return step,
                Err(Closed) => return Step::Close,
            }
        }
        self.converse(inner, connectors)
    }

    /// Ends it: whatever it held is closed and its session forgotten.
    pub(crate) fn close(self, inner: &Inner) {
        match self.stage {
            Stage::Preamble { fd, .. } => {
                if let Some(fd) = fd {
                    inner.reactor.unwatch(fd);
                }
            }
            Stage::Handshake(t) => {
                if let Some(info) = &t.info {
                    inner.sessions.lock().remove(&info.session);
                }
                if let Some(a) = &t.assembled {
                    links::close_paths(&a.paths);
                }
                t.conn.close();
            }
        }
    }

    /// Tells the peer why not, as far as that is possible.
    pub(crate) fn refuse(&self, inner: &Inner, code: ErrorCode, text: &str) {
        if let Stage::Handshake(t) = &self.stage {
            let _ = t.conn.send(&Message::Refuse { code, text: printable(text) });
        }
        inner.metrics.refused();
        if matches!(code, ErrorCode::Unauthenticated | ErrorCode::Mismatch | ErrorCode::Requirement) {
            tracing::warn!(from = ?self.far, %code, text, "incoming connection refused");
        } else {
            tracing::debug!(from = ?self.far, %code, text, "incoming connection refused");
        }
    }

    fn preamble(&mut self, inner: &Arc<Inner>) -> std::result::Result<Step, Closed> {
        let Stage::Preamble { fd: Some(fd), bytes } = &mut self.stage else { return Err(Closed) };
        loop {
            // Never read beyond what is known to be preamble: the rest belongs to somebody else.
            let want =
                if bytes.len() < PREAMBLE_CONTROL.len() { PREAMBLE_CONTROL.len() } else { PREAMBLE_DATA_LEN };
            let mut buffer = [0u8; PREAMBLE_DATA_LEN];
            match rustix::net::recv(&*fd, &mut buffer[..want - bytes.len()], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Closed),
                Ok((n, _)) => bytes.extend_from_slice(&buffer[..n]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Step::Wait),
                Err(_) => return Err(Closed),
            }
            let magic = &bytes[..bytes.len().min(8)];
            if *magic == PREAMBLE_CONTROL {
                break;
            } else if !PREAMBLE_CONTROL.starts_with(magic) && !PREAMBLE_DATA.starts_with(magic) {
                tracing::debug!(from = ?self.far, "not a kvxfer connection");
                return Err(Closed);
            } else if bytes.len() == PREAMBLE_DATA_LEN {
                return Ok(self.data_connection(inner));
            }
        }
        self.control_connection(inner)
    }

    /// A data connection: its session must be known, then the transport gets it.
    fn data_connection(&mut self, inner: &Arc<Inner>) -> Step {
        let Stage::Preamble { fd, bytes } = &mut self.stage else { return Step::Close };
        let session: [u8; 16] = bytes[8..24].try_into().unwrap_or_default();
        let lane = u16::from_le_bytes([bytes[24], bytes[25]]);
        let tcp = inner.slot(transport::TransportKind::Tcp);
        let known = inner.sessions.lock().contains_key(&session);
        let (Some(tcp), true, true, Some(fd)) = (tcp, known, self.far.is_some(), fd.take()) else {
            tracing::debug!(from = ?self.far, known, "data connection refused");
            return Step::Close;
        };
        inner.reactor.unwatch(&fd);
        let stream = std::net::TcpStream::from(fd);
        if stream.set_nonblocking(false).is_ok() {
            tcp.transport.adopt(session, lane, stream);
        }
        Step::Close
    }

    fn control_connection(&mut self, inner: &Arc<Inner>) -> std::result::Result<Step, Closed> {
        let Stage::Preamble { fd, .. } = &mut self.stage else { return Err(Closed) };
        let socket = fd.take().ok_or(Closed)?;
        inner.reactor.unwatch(&socket);
        if self.far.is_some() {
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        }
        let hello = inner.hello().map_err(|_| Closed)?;
        let conn = Conn::new(socket, inner.reactor.clone());
        conn.watch().map_err(|_| Closed)?;
        let token = conn.token;
        self.stage = Stage::Handshake(Box::new(Talk {
            conn,
            decoder: Decoder::new(MAX_FRAME_BEFORE_AUTH),
            machine: Handshake::new(Role::Acceptor, hello, inner.key.clone()),
            info: None,
            assembled: None,
        }));
        Ok(Step::Adopted(token))
    }

    /// Reads and answers what has come.
    fn converse(&mut self, inner: &Arc<Inner>, connectors: &mut usize) -> Step {
        let Stage::Handshake(talk) = &mut self.stage else { return Step::Close };
        talk.conn.flush();
        let mut buffer = [0u8; 16 << 10];
        loop {
            match talk.conn.read(&mut buffer) {
                Ok(0) => return Step::Close,
                Ok(n) => talk.decoder.push(&buffer[..n]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Step::Wait,
                Err(_) => return Step::Close,
            }
            loop {
                // After the peer's Welcome the rest of the stream belongs to the peer that it becomes.
                if talk.machine.is_done() {
                    break;
                }
                let message = match talk.decoder.next_message() {
                    Ok(Some(m)) => m,
                    Ok(None) => break,
                    Err(e) => {
                        let text = e.to_string();
                        self.refuse(inner, ErrorCode::Protocol, &text);
                        return Step::Close;
                    }
                };
                match talk.handle(inner, message, self.far, self.deadline, connectors) {
                    Ok(()) => {}
                    Err(failure) => {
                        let Err((code, text)) = refusal(&failure) else { return Step::Close };
                        self.refuse(inner, code, &text);
                        return Step::Close;
                    }
                }
            }
            if talk.machine.is_done() {
                // Its input waits until it is a peer.
                talk.conn.unwatch();
                return if talk.assembled.is_some() { Step::Ready } else { Step::Wait };
            }
        }
    }

    /// The thread that connects the data paths is done. True when the peer is ready too.
    pub(crate) fn linked(&mut self, assembled: Assembled) -> Result<Step> {
        let Stage::Handshake(talk) = &mut self.stage else {
            return Err(Error::failed(ErrorCode::Protocol, "no handshake is under way"));
        };
        talk.assembled = Some(Box::new(assembled));
        Ok(if talk.machine.is_done() { Step::Ready } else { Step::Wait })
    }
}

struct Closed;

/// `Err` holds what to tell the peer; `Ok` when there is nobody to tell.
fn refusal(failure: &Failure) -> std::result::Result<(), (ErrorCode, String)> {
    match failure {
        Failure::Refuse { code, text } => Err((*code, text.clone())),
        Failure::Refused { .. } => Ok(()),
    }
}

impl Talk {
    fn handle(
        &mut self,
        inner: &Arc<Inner>,
        message: Message,
        far: Option<SocketAddr>,
        deadline: Instant,
        connectors: &mut usize,
    ) -> std::result::Result<(), Failure> {
        let refuse = |e: &Error| Failure::Refuse { code: e.code(), text: e.to_string() };
        match self.machine.receive(message)? {
            Event::Introduced(answers) => {
                for m in answers {
                    self.conn.send(&m).map_err(|e| refuse(&e))?;
                }
            }
            Event::Authenticated(answers) => {
                self.decoder.set_limit(MAX_FRAME);
                let info = self.introduce(inner, far).map_err(|e| refuse(&e))?;
                for m in answers {
                    self.conn.send(&m).map_err(|e| refuse(&e))?;
                }
                let side = inner.side.as_ref().map(|_| ()).ok_or_else(|| "no side socket here".to_owned());
                let offers = Message::Offers {
                    session: info.session.to_vec(),
                    offers: links::offers(inner, &info, &side),
                };
                self.conn.send(&offers).map_err(|e| refuse(&e))?;
                self.info = Some(info);
            }
            Event::Offers { offers, .. } => {
                let Some(info) = self.info.clone() else { return Ok(()) };
                if *connectors >= MAX_CONNECTORS {
                    let text = format!("{MAX_CONNECTORS} connections are being set up already; try again");
                    return Err(Failure::Refuse { code: ErrorCode::NoCapacity, text });
                }
                let (side, invited) = match inner.sessions.lock().get(&info.session) {
                    Some(s) => (s.side.clone(), s.invited.clone()),
                    None => (None, Invited::default()),
                };
                let side: Result<Arc<SideChannel>, String> =
                    side.ok_or_else(|| "the peer did not reach our side socket".to_owned());
                let (inner, token) = (inner.clone(), self.conn.token);
                let spawned = crate::threads::spawn("kvx-connect", move || {
                    let reactor: Arc<Reactor> = inner.reactor.clone();
                    let result = links::assemble(&inner, info, &offers, side, invited, deadline);
                    reactor.command(Command::Linked(token, Box::new(result)));
                });
                match spawned {
                    Ok(_) => *connectors += 1,
                    Err(e) => {
                        let text = format!("no thread to connect data paths: {e}");
                        return Err(Failure::Refuse { code: ErrorCode::System, text });
                    }
                }
            }
            Event::Welcomed => {}
        }
        Ok(())
    }

    /// Decides whether this proven peer may connect, and gives the connection its session.
    fn introduce(&self, inner: &Inner, far: Option<SocketAddr>) -> Result<PeerInfo> {
        let Some(hello) = self.machine.peer() else {
            return Err(Error::failed(ErrorCode::Protocol, "no hello"));
        };
        if let Some(e) = inner.conflict(&hello.agent, hello.epoch).error(&hello.agent, hello.epoch) {
            return Err(e);
        }
        if inner.crossing(&hello.agent) {
            let text = format!(
                "agents {:?} and {:?} call each other; the other call goes on",
                inner.name.as_str(),
                hello.agent.as_str()
            );
            return Err(Error::failed(ErrorCode::Busy, text));
        }
        let info = peer_info(inner, hello, transport::Role::Acceptor, far, identity::random()?);
        let side_of = match (info.same_host, info.same_kernel) {
            (true, _) => SideOf::Process(info.host.pid),
            (false, true) => SideOf::SomeProcess,
            (false, false) => SideOf::Nobody,
        };
        inner.sessions.lock().insert(
            info.session,
            SessionState { peer: info.name.clone(), side_of, side: None, invited: Invited::default() },
        );
        Ok(info)
    }
}

/// What the transports are told of a peer.
pub(crate) fn peer_info(
    inner: &Inner,
    hello: &kvxfer_proto::wire::Hello,
    role: transport::Role,
    address: Option<SocketAddr>,
    session: [u8; 16],
) -> PeerInfo {
    PeerInfo {
        name: hello.agent.clone(),
        epoch: hello.epoch,
        host: hello.host.clone(),
        same_host: identity::same_host(&inner.host, &hello.host),
        same_kernel: identity::same_kernel(&inner.host, &hello.host),
        same_process: identity::same_process(&inner.host, &hello.host),
        role,
        address,
        session,
    }
}

/// A side socket that has shown its session: checks it and binds it to the session. The text says why not.
pub(crate) fn bind_side(inner: &Inner, fd: OwnedFd, session: &[u8]) -> Result<(), String> {
    let session: [u8; 16] = session.try_into().map_err(|_| "a side socket without a session".to_owned())?;
    let (peer, pid) = match inner.sessions.lock().get(&session) {
        None => return Err("a side socket for an unknown session".into()),
        Some(SessionState { side_of: SideOf::Nobody, .. }) => {
            return Err("a side socket for a peer on another host".into());
        }
        Some(SessionState { side: Some(_), .. }) => return Err("a second side socket for one session".into()),
        Some(SessionState { peer, side_of: SideOf::Process(pid), .. }) => (peer.clone(), Some(*pid)),
        Some(SessionState { peer, side_of: SideOf::SomeProcess, .. }) => (peer.clone(), None),
    };
    let side = Arc::new(SideChannel::accept(fd, pid)?);
    let invited = links::invite(inner, &side, &peer).map_err(|e| e.to_string())?;
    if let Some(state) = inner.sessions.lock().get_mut(&session) {
        (state.side, state.invited) = (Some(side), invited);
    }
    Ok(())
}

/// How the peer stands at the moment its handshake is complete.
pub(crate) fn last_check(inner: &Inner, info: &PeerInfo) -> Option<Error> {
    match inner.conflict(&info.name, info.epoch) {
        Conflict::None => inner
            .crossing(&info.name)
            .then(|| Error::failed(ErrorCode::Busy, "the other of two crossing calls goes on")),
        other => other.error(&info.name, info.epoch),
    }
}

/// How long an accepted connection may take for its handshake.
pub(crate) fn handshake_deadline(inner: &Inner) -> Instant {
    Instant::now() + inner.config.connect_timeout.min(Duration::from_secs(60))
}
