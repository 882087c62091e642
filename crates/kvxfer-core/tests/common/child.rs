//! Peers in processes of their own: the test binary runs itself again with a role.

#![allow(dead_code, reason = "each test uses a part of it")]

use super::LONG;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

const ROLE: &str = "KVXFER_TEST_ROLE";

/// The role this process was started for.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Tells the parent something.
pub(crate) fn tell(line: &str) {
    println!("@@{line}");
    let _ = std::io::stdout().flush();
}

/// A line from the parent; the process ends when the parent is gone.
pub(crate) fn hear() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim_end().to_owned()
}

/// A peer in a process of its own; killed when dropped.
pub(crate) struct Process {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Process {
    /// Starts this binary's test `entry` in a role, with arguments in the environment.
    pub(crate) fn start(entry: &str, role: &str, env: &[(&str, &str)]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([entry, "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (tx, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The harness may have written on the same line before.
                if let Some((_, said)) = line.split_once("@@") {
                    let _ = tx.send(said.to_owned());
                }
            }
        });
        Self { child, lines }
    }

    /// What the child says next.
    pub(crate) fn hear(&self) -> String {
        self.lines.recv_timeout(LONG).expect("the child process said nothing")
    }

    /// Tells the child something.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: our own child, not yet reaped, so the id is its own.
        let rc = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(rc, 0);
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its own end; true when it succeeded.
    pub(crate) fn finish(&mut self) -> bool {
        drop(self.child.stdin.take());
        self.child.wait().is_ok_and(|s| s.success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
