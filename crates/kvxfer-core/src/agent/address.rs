//! Addresses: `tcp://host:port`, `unix:///path`, `unix://@abstract`; parsing, name resolution, binding, connecting.

use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Where an agent listens or is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// Host name or literal, and port.
    Tcp(String, u16),
    /// A socket file.
    Unix(PathBuf),
    /// A name in Linux's abstract namespace.
    Abstract(String),
}

impl Address {
    /// Reads one; the error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> std::result::Result<Self, String> {
        if let Some(rest) = text.strip_prefix("tcp://") {
            let (host, port) =
                rest.rsplit_once(':').ok_or("a port is missing; write tcp://host:port (port 0 picks one)")?;
            let port = port.parse().map_err(|_| format!("{port:?} is not a port (0 to 65535)"))?;
            let host = match host.strip_prefix('[') {
                Some(v6) => v6.strip_suffix(']').ok_or("the closing ] is missing")?,
                None if host.contains(':') => return Err("an IPv6 address is written in [ ]".into()),
                None => host,
            };
            if host.is_empty()
                || host.len() > 255
                || host.chars().any(|c| c.is_control() || c.is_whitespace())
            {
                return Err("the host is missing; write tcp://host:port".into());
            }
            Ok(Self::Tcp(host.to_owned(), port))
        } else if let Some(rest) = text.strip_prefix("unix://") {
            if rest.len() > 107 || rest.contains('\0') {
                return Err("a socket's path has at most 107 bytes".into());
            }
            match rest.strip_prefix('@') {
                Some("") => Err("the name after @ is missing".into()),
                Some(name) => Ok(Self::Abstract(name.to_owned())),
                None if rest.starts_with('/') => Ok(Self::Unix(rest.into())),
                None => Err("write unix:///absolute/path or unix://@name".into()),
            }
        } else {
            Err("write tcp://host:port, unix:///path or unix://@name".into())
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Abstract(name) => write!(f, "unix://@{name}"),
        }
    }
}

/// A bound listener; its socket file goes with it.
pub(crate) struct Listener {
    pub(crate) fd: OwnedFd,
    /// With the real port.
    pub(crate) address: String,
    /// For TCP.
    pub(crate) socket: Option<SocketAddr>,
    file: Option<PathBuf>,
}

impl Listener {
    /// Removes the socket file. Not done on drop: a forked child drops its copy too.
    pub(crate) fn remove_file(&self) {
        if let Some(path) = &self.file {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Binds one address; one listener for each of a host name's addresses would bind more than was asked for, so the first counts.
pub(crate) fn bind(address: &Address) -> Result<Listener> {
    let refuse = |e: std::io::Error| {
        let advice = match e.raw_os_error() {
            Some(libc::EADDRINUSE) => "another process listens there: choose another address, or port 0",
            Some(libc::EACCES | libc::EPERM) => "this user may not listen there",
            Some(libc::EADDRNOTAVAIL) => "no interface of this host has that address",
            Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n)",
            _ => "check the address",
        };
        Error::system(format!("listening on {address}"), e, advice)
    };
    match address {
        Address::Tcp(host, port) => {
            let at = resolve(host, *port, Instant::now() + Duration::from_secs(10))?[0];
            let socket = Socket::new(Domain::for_address(at), Type::STREAM.cloexec(), Some(Protocol::TCP))
                .map_err(refuse)?;
            if at.is_ipv6() {
                socket.set_only_v6(true).map_err(refuse)?;
            }
            socket.set_reuse_address(true).map_err(refuse)?;
            socket.bind(&at.into()).map_err(refuse)?;
            socket.listen(512).map_err(refuse)?;
            socket.set_nonblocking(true).map_err(refuse)?;
            let real = socket.local_addr().map_err(refuse)?.as_socket().unwrap_or(at);
            Ok(Listener {
                fd: socket.into(),
                address: format!("tcp://{real}"),
                socket: Some(real),
                file: None,
            })
        }
        Address::Unix(path) => {
            let socket = bind_unix(path, || refuse(std::io::Error::from_raw_os_error(libc::EADDRINUSE)))
                .map_err(|e| e.unwrap_or_else(refuse))?;
            Ok(Listener {
                fd: socket.into(),
                address: address.to_string(),
                socket: None,
                file: Some(path.clone()),
            })
        }
        Address::Abstract(name) => {
            let socket = unix_socket().map_err(refuse)?;
            socket.bind(&abstract_name(name).map_err(refuse)?).map_err(refuse)?;
            socket.listen(512).map_err(refuse)?;
            Ok(Listener { fd: socket.into(), address: address.to_string(), socket: None, file: None })
        }
    }
}

/// Either a ready error or one of the system's.
enum BindError {
    Ready(Error),
    System(std::io::Error),
}

impl BindError {
    fn unwrap_or_else(self, f: impl FnOnce(std::io::Error) -> Error) -> Error {
        match self {
            Self::Ready(e) => e,
            Self::System(e) => f(e),
        }
    }
}

fn unix_socket() -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec(), None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn abstract_name(name: &str) -> std::io::Result<SockAddr> {
    let mut bytes = vec![0u8];
    bytes.extend_from_slice(name.as_bytes());
    SockAddr::unix(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&bytes))
}

/// Binds a socket file; one left behind by a dead process (nobody answers) is replaced.
fn bind_unix(path: &Path, in_use: impl Fn() -> Error) -> std::result::Result<Socket, BindError> {
    let at = SockAddr::unix(path).map_err(BindError::System)?;
    for attempt in 0..2 {
        let socket = unix_socket().map_err(BindError::System)?;
        match socket.bind(&at) {
            Ok(()) => {
                socket.listen(512).map_err(BindError::System)?;
                return Ok(socket);
            }
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) && attempt == 0 => {
                use std::os::unix::fs::FileTypeExt;
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                let probe = unix_socket().map_err(BindError::System)?;
                let nobody =
                    matches!(probe.connect(&at), Err(e) if e.raw_os_error() == Some(libc::ECONNREFUSED));
                if !(is_socket && nobody) {
                    return Err(BindError::Ready(in_use()));
                }
                tracing::debug!(path = %path.display(), "replacing a socket file nobody answers on");
                std::fs::remove_file(path).map_err(BindError::System)?;
            }
            Err(e) => return Err(BindError::System(e)),
        }
    }
    Err(BindError::Ready(in_use()))
}

/// Resolves a host, never later than `deadline`: the system's resolver knows no deadline, so it runs on a thread of its own.
fn resolve(host: &str, port: u16, deadline: Instant) -> Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (tx, rx) = mpsc::channel();
    let name = host.to_owned();
    crate::threads::spawn("kvx-resolve", move || {
        let _ = tx.send((name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>));
    })
    .map_err(|e| Error::system("starting a thread to resolve a name", e, "raise the limit on threads"))?;
    let wait = deadline.saturating_duration_since(Instant::now());
    match rx.recv_timeout(wait) {
        Ok(Ok(found)) if !found.is_empty() => Ok(found),
        Ok(Ok(_)) => Err(Error::failed(ErrorCode::Unreachable, format!("host {host:?} has no address"))),
        Ok(Err(e)) => Err(Error::failed(
            ErrorCode::Unreachable,
            format!("host {host:?} cannot be resolved: {e}; check the name and the name service"),
        )),
        Err(_) => Err(Error::TimedOut { operation: format!("resolving host {host:?}"), after: wait }),
    }
}

/// Connects; the socket is non-blocking. Also returns the far end when it is TCP.
pub(crate) fn connect(address: &Address, deadline: Instant) -> Result<(OwnedFd, Option<SocketAddr>)> {
    let unreachable = |e: std::io::Error| {
        Error::failed(
            ErrorCode::Unreachable,
            format!(
                "{address} cannot be reached: {e}; check that an agent listens there and nothing filters it"
            ),
        )
    };
    match address {
        Address::Tcp(host, port) => {
            let targets = resolve(host, *port, deadline)?;
            let mut last = None;
            for (i, at) in targets.iter().enumerate() {
                // What is left is shared among the addresses still to be tried.
                let left = deadline.saturating_duration_since(Instant::now()) / (targets.len() - i) as u32;
                match connect_tcp(*at, Instant::now() + left) {
                    Ok(fd) => return Ok((fd, Some(*at))),
                    Err(e) => last = Some(e),
                }
            }
            Err(unreachable(last.unwrap_or_else(|| std::io::ErrorKind::TimedOut.into())))
        }
        Address::Unix(path) => {
            let socket = unix_socket().map_err(unreachable)?;
            let at = SockAddr::unix(path).map_err(unreachable)?;
            connect_unix(&socket, &at, deadline).map_err(unreachable)?;
            Ok((socket.into(), None))
        }
        Address::Abstract(name) => {
            let socket = unix_socket().map_err(unreachable)?;
            let at = abstract_name(name).map_err(unreachable)?;
            connect_unix(&socket, &at, deadline).map_err(unreachable)?;
            Ok((socket.into(), None))
        }
    }
}

/// A Unix socket whose listener's queue is full answers `EAGAIN` at once instead of going on in the background.
fn connect_unix(socket: &Socket, at: &SockAddr, deadline: Instant) -> std::io::Result<()> {
    loop {
        match socket.connect(at) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            done => return done,
        }
    }
}

fn connect_tcp(at: SocketAddr, deadline: Instant) -> std::io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    let _ = socket.set_tcp_nodelay(true);
    match socket.connect(&at.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {
            if !wait_for(&socket, PollFlags::OUT, deadline)? {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            if let Some(e) = socket.take_error()? {
                return Err(e);
            }
        }
        Err(e) => return Err(e),
    }
    Ok(socket.into())
}

/// Waits until the descriptor is ready for `what`; false at the deadline.
pub(crate) fn wait_for(fd: impl AsFd, what: PollFlags, deadline: Instant) -> std::io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&fd, what)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in
            ["tcp://127.0.0.1:0", "tcp://[::1]:7300", "tcp://host.example:1", "unix:///run/x", "unix://@n"]
        {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "tcp://",
            "tcp://h",
            "tcp://:1",
            "tcp://h:99999",
            "tcp://::1:5",
            "tcp://[::1:5",
            "unix://x",
            "unix://@",
            "h:1",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_in_use_is_named() {
        let first = bind(&Address::parse("tcp://127.0.0.1:0").unwrap()).unwrap();
        let e = bind(&Address::parse(&first.address).unwrap()).err().unwrap();
        assert_eq!(e.code(), ErrorCode::AddressInUse);
        assert!(e.to_string().contains(&first.address), "{e}");
    }

    #[test]
    fn only_a_dead_socket_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        let first = bind(&address).unwrap();
        let e = bind(&address).err().unwrap();
        assert_eq!(e.code(), ErrorCode::AddressInUse);
        drop(first); // The file stays, nobody answers.
        bind(&address).unwrap().remove_file();
        std::fs::write(dir.path().join("s"), "a file of somebody's").unwrap();
        assert_eq!(bind(&address).err().unwrap().code(), ErrorCode::AddressInUse);
        assert!(dir.path().join("s").exists());
    }

    #[test]
    fn nobody_there_and_no_such_name_are_unreachable() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let free = bind(&Address::parse("tcp://127.0.0.1:0").unwrap()).unwrap().address.clone();
        let e = connect(&Address::parse(&free).unwrap(), deadline).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Unreachable);
        assert!(e.to_string().contains(&free), "{e}");
        let e = connect(&Address::parse("tcp://no-such-host.invalid:1").unwrap(), deadline).unwrap_err();
        assert!(matches!(e.code(), ErrorCode::Unreachable | ErrorCode::TimedOut), "{e}");
        assert!(e.to_string().contains("no-such-host.invalid"), "{e}");
        let e = connect(&Address::Unix("/nonexistent/socket".into()), deadline).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Unreachable);
    }
}
