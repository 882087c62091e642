//! How the library starts threads: with every signal blocked that is meant for the program.
//!
//! The library lives in programs that are not ours: a signal handler of theirs must run on a thread of theirs, whose
//! system calls it is to interrupt. Signals that a thread's own fault raises stay open, for debuggers and sanitizers.

use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// Raised by what the thread itself does, or by tools that look at threads.
const OPEN: [libc::c_int; 8] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGPROF,
];

/// Starts a named thread; it has the signals of the program blocked from its first instruction on.
pub(crate) fn spawn(
    name: impl Into<String>,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    // A new thread inherits the mask of the one that makes it, which gets its own back at once.
    let _masked = Masked::new();
    Builder::new().name(name.into()).spawn(body)
}

/// Runs `body` on this thread and on up to `helpers` further ones, until all have returned. Where the system gives no more
/// threads, fewer run it.
pub(crate) fn helped(name: &str, helpers: usize, body: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            let _masked = Masked::new();
            if Builder::new().name(name.into()).spawn_scoped(scope, &body).is_err() {
                break;
            }
        }
        body();
    });
}

/// While it lives, the calling thread has the program's signals blocked.
struct Masked {
    before: libc::sigset_t,
}

impl Masked {
    fn new() -> Self {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both sets are written by the calls that are given them before anybody reads them; none of the calls can
        // fail with valid pointers and signal numbers.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            for signal in OPEN {
                libc::sigdelset(all.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            Self { before: before.assume_init() }
        }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        // SAFETY: the set came from `pthread_sigmask`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(signal: libc::c_int) -> bool {
        let mut now = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the set is written by the first call and read by the second.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr());
            libc::sigismember(now.as_ptr(), signal) == 1
        }
    }

    #[test]
    fn helpers_run_the_same_and_are_gone_afterwards() {
        let was = blocked(libc::SIGUSR1);
        let threads = std::sync::Mutex::new(std::collections::BTreeMap::new());
        let all = std::sync::Barrier::new(3);
        helped("kvxfer-test", 2, || {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            *threads.lock().unwrap().entry((name, blocked(libc::SIGUSR1))).or_insert(0) += 1;
            all.wait();
        });
        let mut threads = threads.into_inner().unwrap();
        assert_eq!(threads.remove(&("kvxfer-test".into(), true)), Some(2));
        assert_eq!(
            threads.into_iter().map(|((_, blocked), count)| (blocked, count)).collect::<Vec<_>>(),
            [(was, 1)]
        );
        assert_eq!(blocked(libc::SIGUSR1), was);
    }

    #[test]
    fn only_the_new_thread_has_the_programs_signals_blocked() {
        let was = blocked(libc::SIGUSR1);
        let (tx, rx) = std::sync::mpsc::channel();
        let thread = spawn("kvxfer-test", move || {
            tx.send([libc::SIGINT, libc::SIGUSR1, libc::SIGALRM, libc::SIGSEGV].map(blocked)).unwrap();
        })
        .unwrap();
        thread.join().unwrap();
        assert_eq!(rx.recv().unwrap(), [true, true, true, false]);
        assert_eq!(blocked(libc::SIGUSR1), was);
    }
}
