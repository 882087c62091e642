//! A relay between two nodes that can stop, damage or cut what flows through it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// From the side that connected to the other one, and back.
#[derive(Clone, Copy)]
pub enum Way {
    There = 0,
    Back = 1,
}

/// Counts are bytes per connection and direction.
pub struct Control {
    limit: [AtomicU64; 2],
    flip: [AtomicU64; 2],
    /// Connections that have reached the limit and have more to forward.
    held: [AtomicUsize; 2],
    cut: AtomicBool,
}

impl Control {
    /// Forwards this many bytes and then nothing more.
    pub fn hold(&self, way: Way, after: u64) {
        self.limit[way as usize].store(after, Ordering::Release);
    }
    pub fn release(&self, way: Way) {
        self.hold(way, u64::MAX);
    }
    /// Flips a bit of the byte at that position.
    pub fn flip(&self, way: Way, at: u64) {
        self.flip[way as usize].store(at, Ordering::Release);
    }
    pub fn held(&self, way: Way) -> usize {
        self.held[way as usize].load(Ordering::Acquire)
    }
    /// Ends every connection.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }
}

pub struct Proxy {
    pub address: SocketAddr,
    pub control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn new(target: SocketAddr) -> Self {
        let control = Arc::new(Control {
            limit: [const { AtomicU64::new(u64::MAX) }; 2],
            flip: [const { AtomicU64::new(u64::MAX) }; 2],
            held: [const { AtomicUsize::new(0) }; 2],
            cut: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = control.clone();
        let thread = std::thread::spawn(move || {
            let mut pumps = Vec::new();
            for near in listener.incoming() {
                if shared.cut.load(Ordering::Acquire) {
                    break;
                }
                let (near, far) = (near.unwrap(), TcpStream::connect(target).unwrap());
                for (way, from, to) in [
                    (Way::There, near.try_clone().unwrap(), far.try_clone().unwrap()),
                    (Way::Back, far, near),
                ] {
                    let control = shared.clone();
                    pumps.push(std::thread::spawn(move || pump(&control, way, from, to)));
                }
            }
            for pump in pumps {
                pump.join().unwrap();
            }
        });
        Self { address, control, thread: Some(thread) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.cut();
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pump(control: &Control, way: Way, mut from: TcpStream, mut to: TcpStream) {
    let tick = Duration::from_millis(5);
    from.set_read_timeout(Some(tick)).unwrap();
    to.set_write_timeout(Some(tick)).unwrap();
    let (mut buffer, mut passed, mut counted) = (vec![0; 64 << 10], 0u64, false);
    while !control.cut.load(Ordering::Acquire) {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if would_block(&e) => continue,
            Err(_) => break,
        };
        let at = control.flip[way as usize].load(Ordering::Acquire);
        if (passed..passed + n as u64).contains(&at) {
            buffer[(at - passed) as usize] ^= 0x10;
        }
        // What was read goes out, as far as the limit allows.
        let mut sent = 0;
        while sent < n && !control.cut.load(Ordering::Acquire) {
            let limit = control.limit[way as usize].load(Ordering::Acquire);
            let allowed = (n - sent).min(limit.saturating_sub(passed) as usize);
            if allowed == 0 {
                if !std::mem::replace(&mut counted, true) {
                    control.held[way as usize].fetch_add(1, Ordering::AcqRel);
                }
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            match to.write(&buffer[sent..sent + allowed]) {
                Ok(written) => {
                    sent += written;
                    passed += written as u64;
                }
                Err(e) if would_block(&e) => {}
                Err(_) => {
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn would_block(e: &std::io::Error) -> bool {
    matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}
