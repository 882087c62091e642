//! The socket on which engines say that a cache has arrived: a `ZeroMQ` PULL socket, as `LMCache` connects to it.
//!
//! The proxy speaks the part of ZMTP 3 that a PULL socket needs ([`zmtp`]) with limits of its own: every engine can reach
//! this port, so a peer that sends garbage, or claims a message of a terabyte, loses its connection and nothing else
//! happens. One task reads each connection; nothing polls.

mod zmtp;

use crate::config::Endpoint;
use kvxfer_proto::notify::{Notification, decode};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// Engines connected at the same time at most.
const MOST_PEERS: usize = 8192;
/// How long a peer may take to say hello.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What arrived, for the one who counts and acts.
#[derive(Clone, Debug)]
pub(crate) enum Heard {
    /// A notification.
    Notification(Notification),
    /// Something else, which was skipped. For counting.
    Garbage,
}

/// Reads notifications from every engine that connects, for as long as the listener lives.
pub(crate) async fn serve(listener: TcpListener, hear: Arc<dyn Fn(Heard) + Send + Sync>) {
    let peers = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of descriptors, or the peer is gone already: others are waiting.
                tracing::warn!(error = %e, "cannot accept an engine's connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if peers.fetch_add(1, Ordering::Relaxed) >= MOST_PEERS {
            peers.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%from, "more than {MOST_PEERS} engines are connected; this one is refused");
            continue;
        }
        let (hear, peers) = (Arc::clone(&hear), Arc::clone(&peers));
        tokio::spawn(async move {
            if let Err(e) = peer(stream, from, &*hear).await {
                tracing::warn!(%from, error = %e, "an engine's notification connection ended");
                hear(Heard::Garbage);
            }
            peers.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn peer(stream: TcpStream, from: SocketAddr, hear: &(dyn Fn(Heard) + Send + Sync)) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A peer that vanished without a word must not keep its place for ever.
    let alive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(60));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&alive)?;
    let mut pull = tokio::time::timeout(HANDSHAKE, zmtp::Pull::accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no ZeroMQ greeting in time"))??;
    tracing::debug!(%from, "an engine has connected to the notification socket");
    while let Some(message) = pull.next().await? {
        let heard = match message {
            zmtp::Message::Single(bytes) => decode(&bytes).map_err(|e| e.to_string()),
            zmtp::Message::Parts(parts) => Err(format!("a message of {parts} parts; notifications have one")),
            zmtp::Message::TooLarge(len) => Err(format!("a message of {len} bytes")),
        };
        match heard {
            Ok(notification) => hear(Heard::Notification(notification)),
            Err(problem) => {
                tracing::warn!(%from, problem, "skipped a notification");
                hear(Heard::Garbage);
            }
        }
    }
    Ok(())
}

/// Listens on every address that `at` names, all on one port. An address in use is an error that says so.
pub(crate) async fn listen(what: &str, at: &Endpoint) -> io::Result<Vec<TcpListener>> {
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((at.host.trim_matches(['[', ']']), at.port))
        .await
        .map_err(|e| named(what, at, &e))?
        .collect();
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut last = None;
    for mut address in addresses {
        if let Some(first) = listeners.first() {
            address.set_port(first.local_addr()?.port());
        }
        if listeners.iter().any(|l| l.local_addr().is_ok_and(|bound| bound == address)) {
            continue;
        }
        match bind(address) {
            Ok(listener) => listeners.push(listener),
            // A name may stand for an address family that this machine does not have.
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable || e.raw_os_error() == Some(97) => {
                last = Some(e);
            }
            Err(e) => return Err(named(what, at, &e)),
        }
    }
    if listeners.is_empty() {
        let e = last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        return Err(named(what, at, &e));
    }
    Ok(listeners)
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

fn named(what: &str, at: &Endpoint, e: &io::Error) -> io::Error {
    let remedy = match e.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there: end it or choose another port",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need a privilege: choose another port",
        _ => "",
    };
    io::Error::new(e.kind(), format!("{what} {at}: {e}{remedy}"))
}
