//! Against a PULL socket written out by hand, so that what it says of itself can be chosen.

use super::*;
use kvxfer_proto::notify::decode;
use std::net::{SocketAddr, TcpListener};

const SOON: Duration = Duration::from_secs(20);

fn listener(at: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(at).expect("bound");
    let at = listener.local_addr().expect("bound");
    (listener, at)
}

/// The proxy's side of one connection.
struct Pull(TcpStream);

impl Pull {
    fn accept(listener: &TcpListener, kvxfer: bool) -> Self {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(SOON)).expect("set");
        stream.write_all(&greeting()).expect("sent");
        let mut theirs = [0; GREETING];
        stream.read_exact(&mut theirs).expect("greeted");
        check_greeting(&theirs).expect("a peer");
        stream.write_all(&ready("PULL", kvxfer)).expect("sent");
        let mut head = [0; 2];
        stream.read_exact(&mut head).expect("ready");
        let mut body = vec![0; usize::from(head[1])];
        stream.read_exact(&mut body).expect("ready");
        assert_eq!(parse_ready(&body).expect("valid").socket_type, "PUSH");
        Self(stream)
    }

    fn next(&mut self) -> Notification {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).expect("a frame");
        assert_eq!(head[0], 0, "a short message");
        let mut body = vec![0; usize::from(head[1])];
        self.0.read_exact(&mut body).expect("its content");
        decode(&body).expect("a notification")
    }
}

fn done(request: &str) -> Notification {
    Notification::KvReady { req_id: request.into(), tp_rank: 1, bytes: 7, took_us: 9 }
}

fn failed(request: &str) -> Notification {
    let (code, message) = ("timed_out".into(), "late".into());
    Notification::KvFailed { req_id: request.into(), tp_rank: 1, code, message, retryable: true }
}

#[test]
fn a_proxy_of_ours_hears_everything_another_lmcaches_word_only() {
    let (listener, at) = listener("127.0.0.1:0");
    let notifier = Notifier::new(&format!("tcp://{at}")).expect("started");
    notifier.send(done("a"));
    let mut pull = Pull::accept(&listener, true);
    notifier.send(failed("b"));
    assert_eq!((pull.next(), pull.next()), (done("a"), failed("b")));
    drop(pull);

    let notifier = Notifier::new(&format!("tcp://{at}")).expect("started");
    notifier.send(failed("c"));
    notifier.send(done("d"));
    let mut pull = Pull::accept(&listener, false);
    assert_eq!(pull.next(), Notification::ProxyNotif { req_id: "d".into() });
}

#[test]
fn a_proxy_that_comes_later_or_again_is_told() {
    let (gone, at) = listener("127.0.0.1:0");
    drop(gone);
    let notifier = Notifier::new(&format!("tcp://{at}")).expect("started");
    notifier.send(done("early"));
    std::thread::sleep(Duration::from_millis(100));
    let (listener, _) = listener(&at.to_string());
    let mut first = Pull::accept(&listener, true);
    assert_eq!(first.next(), done("early"));
    // The proxy is restarted: the first message afterwards goes to the new one.
    drop(first);
    notifier.send(done("later"));
    let mut second = Pull::accept(&listener, true);
    assert_eq!(second.next(), done("later"));
    assert!(notifier.flush(SOON));
}

#[test]
fn nobody_there_holds_nobody_up() {
    let (gone, at) = listener("127.0.0.1:0");
    drop(gone);
    let notifier = Notifier::new(&format!("tcp://{at}")).expect("started");
    notifier.send(done("a"));
    assert!(!notifier.flush(Duration::from_millis(50)), "it is still being tried");
    drop(notifier);
    for wrong in ["tcp://x", "unix:///tmp/x", "tcp://127.0.0.1:0", "http://x:1"] {
        assert!(Notifier::new(wrong).is_err(), "{wrong}");
    }
}
