//! The proxies under test as processes: started, pinned, watched, stopped.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::CpuSet;
use tokio::net::TcpStream;

use crate::http::Connection;
use crate::load::Pace;
use crate::upstream::Upstream;
use crate::{Options, Result};

/// No proxy takes this long to come up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a proxy listens and whom it serves.
#[derive(Args, Clone)]
pub(crate) struct Ports {
    #[arg(long)]
    port: u16,
    #[arg(long)]
    proxy_port: u16,
    #[arg(long)]
    upstream_port: u16,
    #[arg(long)]
    core: usize,
}

/// A running proxy. It is killed when it is dropped.
pub(crate) struct Proxy {
    child: Child,
    address: SocketAddr,
    /// The engines behind it, which are its own so that notifications find their way.
    upstream: Arc<Upstream>,
    /// Its log, kept for the case that it does not come up.
    log: tempfile::NamedTempFile,
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    at: Instant,
    cpu: Duration,
    /// Resident bytes now, and at most.
    pub(crate) memory: u64,
    pub(crate) most_memory: u64,
}

impl Usage {
    /// Processor time used between two moments.
    pub(crate) fn cpu(before: Self, after: Self) -> Duration {
        after.cpu.saturating_sub(before.cpu)
    }

    /// Cores used between two moments.
    pub(crate) fn share(before: Self, after: Self) -> f64 {
        Self::cpu(before, after).as_secs_f64() / after.at.duration_since(before.at).as_secs_f64()
    }
}

impl Proxy {
    /// Ours, in front of the upstream.
    pub(crate) async fn ours(options: &Options) -> Result<Self> {
        let upstream = Upstream::start(options.prompt_tokens).await?;
        let (port, proxy_port) = free_ports()?;
        let core = options.proxy_core.to_string();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", "--core", &core]).args(flags(port, proxy_port, &upstream));
        Self::start(command, port, proxy_port, options, upstream).await
    }

    /// The one in Python; `None` after saying why where it cannot run.
    pub(crate) async fn python(options: &Options) -> Result<Option<Self>> {
        if options.python.as_os_str() == "none" {
            return Ok(None);
        }
        let needs = "import fastapi, uvicorn, httpx, msgspec, zmq";
        let probe = Command::new(&options.python).args(["-c", needs]).stdin(Stdio::null()).output();
        match probe {
            Ok(output) if output.status.success() => {}
            other => {
                let why = other
                    .map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).trim().to_owned());
                let why = why.lines().last().unwrap_or("").to_owned();
                eprintln!(
                    "SKIPPED the proxy in Python: {} cannot run it ({why}); name another with --python",
                    options.python.display()
                );
                return Ok(None);
            }
        }
        let upstream = Upstream::start(options.prompt_tokens).await?;
        let (port, proxy_port) = free_ports()?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/proxy_bench/reference_proxy.py");
        let mut command = Command::new(&options.python);
        command.arg(script).args(flags(port, proxy_port, &upstream));
        Self::start(command, port, proxy_port, options, upstream).await.map(Some)
    }

    async fn start(
        mut command: Command,
        port: u16,
        proxy_port: u16,
        options: &Options,
        upstream: Arc<Upstream>,
    ) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let child =
            command.stdin(Stdio::null()).stdout(File::create(log.path())?).stderr(log.reopen()?).spawn()?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut proxy = Self { child, address, upstream, log };
        pin_process(Pid::from_child(&proxy.child), options.proxy_core)?;
        let until = Instant::now() + PATIENCE;
        while !healthy(address).await {
            if let Some(status) = proxy.child.try_wait()? {
                return Err(format!("the proxy ended with {status}:\n{}", proxy.tail()).into());
            }
            if Instant::now() > until {
                return Err(format!("the proxy did not come up:\n{}", proxy.tail()).into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        proxy.upstream.notify(SocketAddr::from(([127, 0, 0, 1], proxy_port))).await?;
        Ok(proxy)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The engines behind it.
    pub(crate) fn upstream(&self) -> SocketAddr {
        self.upstream.address()
    }

    /// How fast those engines are.
    pub(crate) fn set_pace(&self, pace: Pace) {
        self.upstream.set_pace(pace);
    }

    /// What it has used so far.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let pid = self.child.id();
        let mut nanoseconds = 0;
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end between the two looks.
            let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            nanoseconds += text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        Ok(Usage {
            at: Instant::now(),
            cpu: Duration::from_nanos(nanoseconds),
            memory: kib("VmRSS:") * 1024,
            most_memory: kib("VmHWM:") * 1024,
        })
    }

    /// Ends it.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.upstream.forget().await;
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let until = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait()?.is_none() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let text = std::fs::read_to_string(self.log.path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It has ended already, as a rule.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This process as the proxy under test, with the settings and the log it has as a command.
pub(crate) fn serve(ports: &Ports) -> Result<()> {
    pin(ports.core)?;
    tracing_subscriber::fmt().with_env_filter("info").with_writer(std::io::stderr).with_ansi(false).init();
    let flags = kvxfer_proxy::Flags {
        host: Some("127.0.0.1".into()),
        port: Some(ports.port),
        prefiller_hosts: vec!["127.0.0.1".into()],
        prefiller_ports: vec![ports.upstream_port],
        decoder_hosts: vec!["127.0.0.1".into()],
        decoder_ports: vec![ports.upstream_port],
        proxy_host: Some("127.0.0.1".into()),
        proxy_port: Some(ports.proxy_port),
        ..kvxfer_proxy::Flags::default()
    };
    let config = kvxfer_proxy::Config::load(&flags)?;
    // As many threads as cores, of which there is one.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(kvxfer_proxy::serve(config, move || kvxfer_proxy::Config::load(&flags)))?;
    runtime.shutdown_background();
    Ok(())
}

fn flags(port: u16, proxy_port: u16, upstream: &Upstream) -> Vec<String> {
    let upstream_port = upstream.address().port();
    [("--port", port), ("--proxy-port", proxy_port), ("--upstream-port", upstream_port)]
        .into_iter()
        .flat_map(|(name, port)| [name.to_owned(), port.to_string()])
        .collect()
}

async fn healthy(address: SocketAddr) -> bool {
    let asked = async {
        let mut connection = Connection::new(TcpStream::connect(address).await?)?;
        connection.write(b"GET /health HTTP/1.1\r\nhost: bench\r\n\r\n").await?;
        let head = connection.head().await?;
        std::io::Result::Ok(head.is_some_and(|head| head.second() == "200"))
    };
    tokio::time::timeout(Duration::from_secs(2), asked).await.is_ok_and(|done| done.unwrap_or(false))
}

/// Two ports that were free a moment ago.
fn free_ports() -> Result<(u16, u16)> {
    let (a, b) = (TcpListener::bind(crate::any_port())?, TcpListener::bind(crate::any_port())?);
    Ok((a.local_addr()?.port(), b.local_addr()?.port()))
}

/// Runs this process on one core.
pub(crate) fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|e| format!("core {core} cannot be had: {e}").into())
}

fn pin_process(pid: Pid, core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(Some(pid), &set)
        .map_err(|e| format!("core {core} cannot be had: {e}").into())
}

/// Room for the sockets of all streams.
pub(crate) fn raise_file_limit() -> Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    Ok(rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit { current: limit.maximum, maximum: limit.maximum },
    )?)
}
