//! Child processes: this very program again, under a hidden subcommand.
//!
//! A child speaks JSON lines on its standard input and output; its standard error is ours. It ends when told, when its
//! input closes, when the handle is dropped, and by the kernel's hand when this process ends in any way (interrupt and
//! SIGKILL included), so nothing is left behind.

use crate::Failure;
use serde::{Serialize, de::DeserializeOwned};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child as Process, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A running child. Start it from a thread that outlives it: the kernel ends the child with that thread.
pub(crate) struct Child {
    what: &'static str,
    process: Process,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Child {
    /// Starts this program with `args`; `what` names the child in messages.
    pub(crate) fn start(what: &'static str, args: &[&str]) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|e| Failure::new(format!("the path of this program cannot be found: {e}")))?;
        let mut process = Command::new(program)
            .args(args)
            .env("KVXFER_PARENT", std::process::id().to_string())
            .env("KVXFER_LOG", LOG_FILTER.get().map_or("error", String::as_str))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Failure::new(format!("the {what} process cannot be started: {e}")))?;
        let input = process.stdin.take();
        let (to, lines) = channel();
        if let Some(output) = process.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    match line.strip_prefix(MARK) {
                        Some(message) if to.send(message.to_owned()).is_err() => break,
                        Some(_) => {}
                        // Libraries underneath (UCX) log to standard output.
                        None => eprintln!("{line}"),
                    }
                }
            });
        }
        Ok(Self { what, process, input, lines })
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends one message.
    pub(crate) fn tell(&mut self, message: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_string(message).map_err(|e| Failure::new(e.to_string()))?;
        line.push('\n');
        let sent = match &mut self.input {
            Some(input) => input.write_all(line.as_bytes()).and_then(|()| input.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        sent.map_err(|e| Failure::new(format!("the {} process does not listen: {e}", self.what)))
    }

    /// The next message. A child that ends or stays silent is an error; a child's own error is passed on.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self, timeout: Duration) -> Result<T, Failure> {
        let line = self.lines.recv_timeout(timeout).map_err(|e| match e {
            RecvTimeoutError::Timeout => {
                Failure::new(format!("the {} process did not answer within {timeout:?}", self.what))
            }
            RecvTimeoutError::Disconnected => match self.process.wait() {
                Ok(status) => Failure::new(format!("the {} process ended early: {status}", self.what)),
                Err(e) => Failure::new(format!("the {} process ended early: {e}", self.what)),
            },
        })?;
        if let Some(text) = line.strip_prefix(ERROR) {
            return Err(Failure::new(text.to_owned()));
        }
        serde_json::from_str(&line)
            .map_err(|e| Failure::new(format!("the {} process said {line:?}: {e}", self.what)))
    }

    /// One message there, one back.
    pub(crate) fn ask<T: DeserializeOwned>(
        &mut self,
        message: &impl Serialize,
        timeout: Duration,
    ) -> Result<T, Failure> {
        self.tell(message)?;
        self.hear(timeout)
    }

    /// SIGKILL, at once.
    pub(crate) fn kill(&mut self) -> Result<ExitStatus, Failure> {
        self.process
            .kill()
            .and_then(|()| self.process.wait())
            .map_err(|e| Failure::new(format!("the {} process cannot be killed: {e}", self.what)))
    }

    /// Closes its input and waits for its end; kills it when it takes longer than `timeout`.
    pub(crate) fn finish(mut self, timeout: Duration) {
        self.input = None;
        let deadline = Instant::now() + timeout;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What children log, as a filter. By default errors only: a peer that ends is what several of them are there for.
pub(crate) static LOG_FILTER: OnceLock<String> = OnceLock::new();

/// Marks a line as a message.
const MARK: &str = "@kvxfer ";
/// Marks a message as an error.
const ERROR: &str = "error: ";

/// Called first in every child: end with the parent, whatever ends it.
pub(crate) fn end_with_parent() -> Result<(), Failure> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| Failure::new(format!("the kernel refuses a parent-death signal: {e}")))?;
    // The parent may have ended before the line above.
    let parent = std::env::var("KVXFER_PARENT").ok().and_then(|p| p.parse::<i32>().ok());
    match (parent, getppid()) {
        (Some(want), Some(have)) if have.as_raw_nonzero().get() == want => Ok(()),
        // In a PID namespace of its own the parent's number may be unknown (reads as none): then the signal must do.
        (Some(_), None) => Ok(()),
        _ => Err(Failure::new("this is an internal command: it is started by kvxfer itself")),
    }
}

/// Child's side: says one message.
pub(crate) fn say(message: &impl Serialize) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    serde_json::to_string(message)
        .map_err(std::io::Error::from)
        .and_then(|line| writeln!(out, "{MARK}{line}"))
        .and_then(|()| out.flush())
        .map_err(|e| Failure::new(format!("the parent does not listen: {e}")))
}

/// Child's side: passes an error on to the parent.
pub(crate) fn say_error(error: &Failure) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to be told when this fails.
    let _ = writeln!(out, "{MARK}{ERROR}{}", error.text.replace('\n', " ")).and_then(|()| out.flush());
}

/// Child's side: the next message; `None` when the parent has closed the line.
pub(crate) fn listen<T: DeserializeOwned>() -> Result<Option<T>, Failure> {
    let mut line = String::new();
    match std::io::stdin().lock().read_line(&mut line) {
        Ok(0) => Ok(None),
        Ok(_) => serde_json::from_str(&line)
            .map(Some)
            .map_err(|e| Failure::new(format!("internal message {:?}: {e}", line.trim()))),
        Err(e) => Err(Failure::new(format!("standard input: {e}"))),
    }
}
