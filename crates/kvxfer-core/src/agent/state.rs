//! What all parts of one agent share.

use super::address::Listener;
use super::held::Held;
use super::host::Host;
use super::identity;
use super::inbox::Inbox;
use super::links::Invited;
use super::peer::PeerInner;
use super::reactor::{Command, Reactor};
use super::region::RegionInner;
use super::side::{SideChannel, SideListener};
use super::transfer::EndEvent;
use super::{Access, TransportStatus};
use crate::config::AgentConfig;
use crate::metrics::SharedMetrics;
use crate::transport::{Capabilities, Transport, TransportKind};
use crate::{Error, Result};
use kvxfer_proto::handshake::{CHALLENGE_LEN, SESSION_LEN};
use kvxfer_proto::wire::{Hello, HostIdentity, PROTOCOL};
use kvxfer_proto::{AgentName, Epoch, ErrorCode};
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Instant;

pub(crate) type Session = [u8; SESSION_LEN];

/// A transport this agent may use.
pub(crate) struct Slot {
    pub(crate) kind: TransportKind,
    pub(crate) caps: Capabilities,
    pub(crate) transport: Arc<dyn Transport>,
}

/// A region and what peers may do with it.
pub(crate) struct Export {
    pub(crate) region: Arc<RegionInner>,
    pub(crate) access: Access,
}

/// Which process a side socket has to come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SideOf {
    /// The peer is on another host.
    Nobody,
    /// The one that the peer says it is.
    Process(u32),
    /// The peer sees other process ids than we do: the session's token alone vouches for it.
    SomeProcess,
}

/// A connection that we have accepted and authenticated: what else may refer to it.
pub(crate) struct SessionState {
    pub(crate) peer: AgentName,
    /// Whose side socket may come for it.
    pub(crate) side_of: SideOf,
    /// Its side socket, once that has come.
    pub(crate) side: Option<Arc<SideChannel>>,
    /// Its rings here, made when the side socket came.
    pub(crate) invited: Invited,
}

#[derive(Default)]
pub(crate) struct PeerTable {
    pub(crate) by_name: HashMap<AgentName, Arc<PeerInner>>,
    pub(crate) by_address: HashMap<String, AgentName>,
}

/// One agent.
pub(crate) struct Inner {
    pub(crate) config: AgentConfig,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) name: AgentName,
    pub(crate) epoch: Epoch,
    pub(crate) host: HostIdentity,
    pub(crate) made_in: u32,
    pub(crate) slots: Vec<Slot>,
    pub(crate) status: Vec<TransportStatus>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) side: Option<SideListener>,
    pub(crate) reactor: Arc<Reactor>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) metrics: SharedMetrics,
    pub(crate) exports: RwLock<HashMap<String, Export>>,
    pub(crate) peers: RwLock<PeerTable>,
    pub(crate) sessions: Mutex<HashMap<Session, SessionState>>,
    /// Handshakes under way that we started, with the peer's name once it is known.
    pub(crate) outgoing: Mutex<HashMap<u64, Option<AgentName>>>,
    pub(crate) hosts: RwLock<Vec<Weak<dyn Host>>>,
    /// Jobs that wait for their producer's stream.
    pub(crate) held: Held,
    pub(crate) closed: AtomicBool,
    pub(crate) ended: Mutex<Option<Result<()>>>,
    pub(crate) end: Condvar,
    /// Wakes the event descriptor at a transfer's end.
    pub(crate) end_event: Waker,
    next_id: AtomicU64,
}

/// What [`Inner::new`] is made from.
pub(crate) struct Parts {
    pub(crate) config: AgentConfig,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) name: AgentName,
    pub(crate) epoch: Epoch,
    pub(crate) host: HostIdentity,
    pub(crate) slots: Vec<Slot>,
    pub(crate) status: Vec<TransportStatus>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) side: Option<SideListener>,
    pub(crate) reactor: Arc<Reactor>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) metrics: SharedMetrics,
}

impl Inner {
    pub(crate) fn new(p: Parts) -> Arc<Self> {
        Arc::new(Self {
            config: p.config,
            key: p.key,
            name: p.name,
            epoch: p.epoch,
            host: p.host,
            made_in: identity::generation(),
            slots: p.slots,
            status: p.status,
            listeners: p.listeners,
            side: p.side,
            reactor: p.reactor,
            end_event: Arc::new(EndEvent(p.inbox.clone())).into(),
            inbox: p.inbox,
            metrics: p.metrics,
            exports: RwLock::default(),
            peers: RwLock::default(),
            sessions: Mutex::default(),
            outgoing: Mutex::default(),
            hosts: RwLock::default(),
            held: Held::default(),
            closed: AtomicBool::new(false),
            ended: Mutex::new(None),
            end: Condvar::new(),
            next_id: AtomicU64::new(1),
        })
    }

    /// A number this agent has not used before.
    pub(crate) fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Refuses calls on a closed agent and in a forked child. First line of every public call: takes no lock.
    pub(crate) fn check(&self) -> Result<()> {
        if identity::forked_since(self.made_in) {
            return Err(identity::forked_error());
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::failed(
                ErrorCode::Closed,
                format!("agent {:?} is closed", self.name.as_str()),
            ));
        }
        Ok(())
    }

    /// Refuses calls that wait, on the thread that would have to do the work.
    pub(crate) fn check_may_wait(&self, call: &str) -> Result<()> {
        if self.reactor.is_progress_thread() {
            return Err(Error::failed(
                ErrorCode::Busy,
                format!("{call} waits and cannot be called from the agent's progress thread"),
            ));
        }
        Ok(())
    }

    /// What we say of ourselves at the start of a handshake.
    pub(crate) fn hello(&self) -> Result<Hello> {
        Ok(Hello {
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
            library: env!("CARGO_PKG_VERSION").into(),
            agent: self.name.clone(),
            epoch: self.epoch,
            host: self.host.clone(),
            challenge: identity::random::<CHALLENGE_LEN>()?.to_vec(),
            auth_required: self.key.is_some(),
        })
    }

    /// The up peer of that name.
    pub(crate) fn peer(&self, name: &AgentName) -> Option<Arc<PeerInner>> {
        self.peers.read().by_name.get(name).filter(|p| p.is_up()).cloned()
    }

    /// What stands against a connection with that peer, decided alike on both sides.
    ///
    /// A newer epoch replaces the peer we know; the same one is a second connection; an older one is a mistake.
    pub(crate) fn conflict(&self, name: &AgentName, epoch: Epoch) -> Conflict {
        match self.peer(name) {
            Some(known) if known.info.epoch == epoch => Conflict::Connected(known),
            Some(known) if known.info.epoch > epoch => Conflict::Older(known.info.epoch),
            _ => Conflict::None,
        }
    }

    /// Enters a peer whose handshake is complete; an older one of that name is ended.
    pub(crate) fn enter(&self, peer: &Arc<PeerInner>) -> Result<(), Conflict> {
        let mut table = self.peers.write();
        if self.closed.load(Ordering::Acquire) {
            return Err(Conflict::Closed);
        }
        let replaced = match table.by_name.get(&peer.info.name) {
            Some(known) if known.is_up() && known.info.epoch == peer.info.epoch => {
                return Err(Conflict::Connected(known.clone()));
            }
            Some(known) if known.is_up() && known.info.epoch > peer.info.epoch => {
                return Err(Conflict::Older(known.info.epoch));
            }
            Some(known) if known.is_up() => Some(known.clone()),
            _ => None,
        };
        if let Some(address) = &peer.dialled {
            table.by_address.insert(address.clone(), peer.info.name.clone());
        }
        table.by_name.insert(peer.info.name.clone(), peer.clone());
        drop(table);
        if let Some(old) = replaced {
            let text = format!("replaced by epoch {} of the same name", peer.info.epoch);
            old.mark_gone(ErrorCode::PeerGone, &text);
            self.reactor.command(Command::Gone(old, ErrorCode::PeerGone, text, true));
        }
        Ok(())
    }

    /// Forgets a peer that is gone, unless a new one of the name has come.
    pub(crate) fn forget(&self, peer: &Arc<PeerInner>) {
        let mut table = self.peers.write();
        if table.by_name.get(&peer.info.name).is_some_and(|p| Arc::ptr_eq(p, peer)) {
            table.by_name.remove(&peer.info.name);
            table.by_address.retain(|_, name| *name != peer.info.name);
        }
        drop(table);
        self.sessions.lock().remove(&peer.info.session);
    }

    /// True when we are connecting to that agent ourselves and ours is the connection to keep: of two that cross, the
    /// one opened by the smaller name stays.
    pub(crate) fn crossing(&self, name: &AgentName) -> bool {
        self.name < *name && self.outgoing.lock().values().any(|n| n.as_ref() == Some(name))
    }

    /// Tells the waiters of a shutdown how it went.
    pub(crate) fn set_ended(&self, result: Result<()>) {
        self.ended.lock().get_or_insert(result);
        self.end.notify_all();
    }

    /// Waits for the progress thread's last word.
    pub(crate) fn wait_ended(&self, deadline: Instant) -> Option<Result<()>> {
        let mut ended = self.ended.lock();
        while ended.is_none() {
            if self.end.wait_until(&mut ended, deadline).timed_out() {
                break;
            }
        }
        ended.clone()
    }

    /// Tells the transports what all exports of a region together allow; false when there is none.
    pub(crate) fn allow(&self, region: &Arc<RegionInner>) -> bool {
        let exports = self.exports.read();
        let access = exports
            .values()
            .filter(|e| Arc::ptr_eq(&e.region, region))
            .map(|e| e.access)
            .reduce(|a, b| if a == b { a } else { Access::ReadWrite });
        // Under the lock, so that two callers cannot leave the older answer behind.
        for slot in self.slots.iter().filter(|s| region.usable.contains(&s.kind)) {
            slot.transport.allow(region.id, access);
        }
        access.is_some()
    }

    /// The channels, taken out from under the lock.
    pub(crate) fn hosts(&self) -> Vec<Arc<dyn Host>> {
        let (hosts, all) = {
            let hosts = self.hosts.read();
            (hosts.iter().filter_map(Weak::upgrade).collect::<Vec<_>>(), hosts.len())
        };
        if hosts.len() < all {
            self.hosts.write().retain(|h| h.strong_count() > 0);
        }
        hosts
    }

    pub(crate) fn slot(&self, kind: TransportKind) -> Option<&Slot> {
        self.slots.iter().find(|s| s.kind == kind)
    }
}

/// Why a connection cannot become a peer.
pub(crate) enum Conflict {
    None,
    /// The same agent is connected already.
    Connected(Arc<PeerInner>),
    /// A newer epoch of that name is connected.
    Older(Epoch),
    /// This agent is closed.
    Closed,
}

impl Conflict {
    /// As an error with both values; `None` when nothing stands against it.
    pub(crate) fn error(&self, name: &AgentName, epoch: Epoch) -> Option<Error> {
        Some(match self {
            Self::None => return None,
            Self::Connected(_) => Error::failed(
                ErrorCode::Busy,
                format!("agent {:?} of epoch {epoch} is connected already", name.as_str()),
            ),
            Self::Older(known) => Error::failed(
                ErrorCode::Mismatch,
                format!(
                    "agent {:?} is known with epoch {known}, this one has epoch {epoch}: two processes use one name",
                    name.as_str()
                ),
            ),
            Self::Closed => Error::failed(ErrorCode::Closed, "the agent is closed"),
        })
    }
}
