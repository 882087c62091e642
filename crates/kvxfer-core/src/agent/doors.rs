//! The doors: listeners, strangers, handshakes under way, side sockets, up to the moment a connection becomes a peer.

use super::accept::{self, Incoming, MAX_INCOMING, MAX_STRANGERS, Step};
use super::links::{self, Assembled};
use super::peer::PeerInner;
use super::progress::{Progress, Source};
use super::side;
use crate::Result;
use kvxfer_proto::ErrorCode;
use kvxfer_proto::wire::Message;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::time::{Duration, Instant};

/// How long listening rests when descriptors have run out.
const ACCEPT_REST: Duration = Duration::from_millis(100);

impl Progress {
    pub(super) fn watch_listeners(&mut self) {
        if self.shutdown.is_some() {
            return;
        }
        let inner = self.inner.clone();
        for (i, listener) in inner.listeners.iter().enumerate() {
            let token = inner.reactor.token();
            if inner.reactor.watch(&listener.fd, token, EventFlags::IN).is_ok() {
                self.sources.insert(token, Source::Listener(i));
            }
        }
        if let Some(side) = &inner.side {
            let token = inner.reactor.token();
            if inner.reactor.watch(&side.fd, token, EventFlags::IN).is_ok() {
                self.sources.insert(token, Source::SideListener);
            }
        }
    }

    pub(super) fn unwatch_listeners(&mut self) {
        for listener in &self.inner.listeners {
            self.inner.reactor.unwatch(&listener.fd);
        }
        if let Some(side) = &self.inner.side {
            self.inner.reactor.unwatch(&side.fd);
        }
        self.sources.retain(|_, s| !matches!(s, Source::Listener(_) | Source::SideListener));
    }

    /// Without descriptors a listener stays readable: leave it alone for a while instead of spinning on it.
    fn rest(&mut self, e: Errno) {
        tracing::warn!(error = %e, "cannot accept connections for the moment; raise the limit on open files (ulimit -n)");
        self.unwatch_listeners();
        self.resting = Some(Instant::now() + ACCEPT_REST);
    }

    pub(super) fn accept(&mut self, listener: usize) {
        let inner = self.inner.clone();
        for _ in 0..64 {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::acceptfrom_with(&inner.listeners[listener].fd, flags) {
                Ok((fd, far)) => {
                    let far = far.and_then(|a| std::net::SocketAddr::try_from(a).ok());
                    let far = far.filter(|_| inner.listeners[listener].socket.is_some());
                    let token = inner.reactor.token();
                    if inner.reactor.watch(&fd, token, EventFlags::IN | EventFlags::RDHUP).is_err() {
                        continue;
                    }
                    self.make_room();
                    self.sources.insert(token, Source::Incoming);
                    self.incoming.insert(token, Incoming::new(fd, far, accept::handshake_deadline(&inner)));
                }
                Err(Errno::AGAIN) => return,
                Err(e @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => return self.rest(e),
                // The connection was gone before we looked.
                Err(_) => {}
            }
        }
    }

    /// More strangers than allowed: the oldest goes.
    fn make_room(&mut self) {
        let strangers = self.incoming.iter().filter(|(_, i)| i.is_stranger());
        let (count, oldest) = strangers.fold((0, None::<(u64, Instant)>), |(n, oldest), (token, i)| {
            let older = oldest.is_none_or(|(_, d)| i.deadline < d);
            (n + 1, if older { Some((*token, i.deadline)) } else { oldest })
        });
        if let (true, Some((token, _))) = (count >= MAX_STRANGERS, oldest) {
            self.drop_incoming(token);
        } else if self.incoming.len() >= MAX_INCOMING
            && let Some(token) = self.incoming.iter().min_by_key(|(_, i)| i.deadline).map(|(t, _)| *t)
        {
            self.drop_incoming(token);
        }
    }

    pub(super) fn drop_incoming(&mut self, token: u64) {
        self.sources.remove(&token);
        if let Some(i) = self.incoming.remove(&token) {
            i.close(&self.inner);
        }
    }

    pub(super) fn incoming(&mut self, token: u64) {
        let Some(i) = self.incoming.get_mut(&token) else { return };
        match i.advance(&self.inner, &mut self.connectors) {
            Step::Wait => {}
            Step::Close => self.drop_incoming(token),
            Step::Ready => self.complete(token),
            Step::Adopted(new) => {
                self.sources.remove(&token);
                self.sources.insert(new, Source::Incoming);
                if let Some(i) = self.incoming.remove(&token) {
                    self.incoming.insert(new, i);
                }
            }
        }
    }

    pub(super) fn check_incoming(&mut self, now: Instant) -> Option<Instant> {
        let late: Vec<u64> =
            self.incoming.iter().filter(|(_, i)| i.deadline <= now).map(|(t, _)| *t).collect();
        for token in late {
            if let Some(i) = self.incoming.get(&token) {
                i.refuse(&self.inner, ErrorCode::TimedOut, "the handshake was not complete in time");
            }
            self.drop_incoming(token);
        }
        let late: Vec<u64> = self
            .sources
            .iter()
            .filter(|(_, s)| matches!(s, Source::SideStranger(_, d) if *d <= now))
            .map(|(t, _)| *t)
            .collect();
        for token in late {
            self.sources.remove(&token);
        }
        let sides = self.sources.values().filter_map(|s| match s {
            Source::SideStranger(_, d) => Some(*d),
            _ => None,
        });
        self.incoming.values().map(|i| i.deadline).chain(sides).min()
    }

    /// Data paths of an incoming connection stand, or not.
    pub(super) fn linked(&mut self, token: u64, result: Result<Assembled>) {
        self.connectors = self.connectors.saturating_sub(1);
        let Some(i) = self.incoming.get_mut(&token) else {
            // It was given up meanwhile.
            if let Ok(a) = result {
                links::close_paths(&a.paths);
            }
            return;
        };
        match result.and_then(|a| i.linked(a)) {
            Ok(Step::Ready) => self.complete(token),
            Ok(_) => {}
            Err(e) => {
                i.refuse(&self.inner, e.code(), &e.to_string());
                self.drop_incoming(token);
            }
        }
    }

    /// Both sides' paths stand: the connection becomes a peer.
    fn complete(&mut self, token: u64) {
        let Some(i) = self.incoming.get(&token) else { return };
        let refused = i.info().and_then(|info| accept::last_check(&self.inner, info));
        if let Some(e) = refused {
            i.refuse(&self.inner, e.code(), &e.to_string());
            self.drop_incoming(token);
            return;
        }
        self.sources.remove(&token);
        let Some(talk) = self.incoming.remove(&token).and_then(Incoming::into_talk) else { return };
        let Some(assembled) = talk.assembled else { return };
        // In the queue before anybody can send to the new peer, on its way once the peer is entered: who has been
        // welcomed is known here.
        let welcomed = talk.conn.hold(&Message::Welcome);
        let peer = PeerInner::new(&self.inner, *assembled, None, talk.conn);
        if welcomed.is_ok() && self.inner.enter(&peer).is_ok() {
            peer.conn.flush();
            self.peer_up(&peer, talk.decoder);
        } else {
            links::close_paths(&peer.paths);
            self.inner.sessions.lock().remove(&peer.info.session);
            peer.conn.close();
        }
    }

    pub(super) fn accept_side(&mut self) {
        let inner = self.inner.clone();
        let Some(listener) = &inner.side else { return };
        for _ in 0..64 {
            match listener.accept() {
                Ok(fd) => {
                    let token = inner.reactor.token();
                    let strangers =
                        self.sources.values().filter(|s| matches!(s, Source::SideStranger(..))).count();
                    if strangers < MAX_STRANGERS && inner.reactor.watch(&fd, token, EventFlags::IN).is_ok() {
                        let deadline = Instant::now() + Duration::from_secs(5);
                        self.sources.insert(token, Source::SideStranger(fd, deadline));
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(e @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => return self.rest(e),
                Err(_) => {}
            }
        }
    }

    pub(super) fn side_stranger(&mut self, token: u64) {
        let Some(Source::SideStranger(fd, _)) = self.sources.remove(&token) else { return };
        self.inner.reactor.unwatch(&fd);
        let bound = match side::receive(&fd) {
            Ok(Some((session, None))) => accept::bind_side(&self.inner, fd, &session),
            _ => Err("a side socket that does not show its session".into()),
        };
        if let Err(reason) = bound {
            tracing::debug!(reason, "side socket refused");
        }
    }
}
