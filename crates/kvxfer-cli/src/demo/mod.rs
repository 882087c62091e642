//! `kvxfer demo`: the library's main job in front of one's eyes.
//!
//! A receiver and a sender run as processes of their own. The cache of one prompt goes over the best transport and every
//! byte is checked at the receiver; then over each transport there is; then a sender is killed with SIGKILL in the
//! middle of a transfer, the receiver's pool shows that nothing is lost, and the next sender succeeds.

mod prompt;
mod protocol;
pub(crate) mod receiver;
mod report;
pub(crate) mod sender;

use crate::args::DemoArgs;
use crate::child::Child;
use crate::content::mix;
use crate::machine::Machine;
use crate::{Failure, Verdict, units};
use kvxfer_core::TransportKind;
use prompt::{Prompt, TOKEN_BYTES};
use protocol::{Checked, Connected, Half, Opened, Pool, Stored, ToReceiver, ToSender};
use report::{Demo, Kill, Row};
use std::time::{Duration, Instant};

/// No step of the demo takes longer; a broken one ends here instead of hanging.
const DEADLINE: Duration = Duration::from_secs(60);
/// A killed sender is noticed at once (its connections close); this bounds the wait all the same.
const FENCE: Duration = Duration::from_secs(20);

pub(crate) fn run(args: &DemoArgs) -> Result<Verdict, Failure> {
    let machine = Machine::detect();
    let (prompt, shortened) = fit(args, &machine)?;
    let quiet = args.json;
    let say = |text: &str| {
        if !quiet {
            println!("{text}");
        }
    };
    say(&format!(
        "kvxfer {}: the KV cache of a Llama-3.1-8B-shaped prompt, {} tokens = {}",
        env!("CARGO_PKG_VERSION"),
        units::thousands(u64::from(prompt.tokens)),
        prompt.describe()
    ));
    if let Some(why) = &shortened {
        say(why);
    }

    let mut stage = Stage::open(prompt, args.transport)?;
    say(&format!(
        "receiver: process {}, {} pages of {}, {}",
        stage.receiver.pid(),
        stage.pages,
        units::size(prompt.page_bytes()),
        stage.address
    ));
    let mut demo = Demo::new(prompt, shortened, args.transport);

    // Once over the best path, which is the line everybody looks at.
    let best = stage.transfer(args.transport, mix(args.seed));
    if let Ok((row, pid)) = &best {
        say(&format!("sender:   process {pid}\n"));
        say(&demo.store_line(row));
    }
    let best = best.map(|(row, _)| row).map_err(|e| match args.transport {
        Some(kind) => e.within(format!("over {kind}")),
        None => e,
    })?;
    let chosen = best.kind;
    demo.rows.push(best);

    if args.transport.is_none() {
        for kind in [
            TransportKind::CudaIpc,
            TransportKind::Shm,
            TransportKind::Cma,
            TransportKind::Nixl,
            TransportKind::Tcp,
            TransportKind::Inproc,
        ] {
            if Some(kind) != chosen {
                let seed = mix(args.seed.wrapping_add(kind as u64));
                let row = match kind {
                    TransportKind::Nixl => {
                        Stage::open(prompt, Some(kind)).and_then(|mut own| own.transfer(Some(kind), seed))
                    }
                    _ => stage.transfer(Some(kind), seed),
                };
                demo.rows.push(match row {
                    Ok((row, _)) => row,
                    Err(why) => Row::unavailable(kind, &why.to_string()),
                });
            }
        }
    }
    say("");
    say(demo.transport_table(crate::table::Paint::stdout()).trim_end());

    if !args.no_kill && prompt.chunks() > 1 {
        let kill = stage.kill_and_recover(args.transport, mix(args.seed ^ 0xDEAD))?;
        say("");
        say(kill.text(crate::table::Paint::stdout()).trim_end());
        demo.kill = Some(kill);
    } else if !args.no_kill {
        say("\nA prompt of one chunk has no middle to be killed in; that part is left out.");
    }
    stage.receiver.finish(Duration::from_secs(3));

    let held = demo.held();
    if args.json {
        println!("{}", demo.json(&machine));
    } else {
        say("");
        say(&demo.conclusion());
    }
    Ok(if held { Verdict::Held } else { Verdict::Broken })
}

/// The prompt as asked for, or as much of it as memory allows, with a sentence.
fn fit(args: &DemoArgs, machine: &Machine) -> Result<(Prompt, Option<String>), Failure> {
    let prompt = Prompt { tokens: args.tokens, chunk_tokens: args.chunk, seed: args.seed };
    // The engine's cache, the send buffer and the pool; twice for one transport that keeps all in one process.
    let need = |p: Prompt| 3 * p.bytes() + 4 * p.page_bytes() + (256 << 20);
    let budget = machine.available_bytes / 10 * 8;
    if need(prompt) <= budget {
        return Ok((prompt, None));
    }
    let fixed = need(Prompt { tokens: 0, ..prompt });
    let tokens = budget.saturating_sub(fixed) / (3 * TOKEN_BYTES);
    if tokens == 0 {
        return Err(Failure::new(format!(
            "{} of memory are available and even a short prompt needs {}; free some, or lower --chunk",
            units::size(machine.available_bytes),
            units::size(fixed + 3 * TOKEN_BYTES)
        )));
    }
    let tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(args.tokens);
    let why = format!(
        "{} tokens instead of {}: the prompt needs {} and {} are available",
        tokens,
        args.tokens,
        units::size(need(prompt)),
        units::size(machine.available_bytes)
    );
    Ok((Prompt { tokens, ..prompt }, Some(why)))
}

/// The receiver, which stays, and the senders, which come and go.
struct Stage {
    prompt: Prompt,
    receiver: Child,
    address: String,
    pages: u32,
    key: String,
}

impl Stage {
    /// NIXL, which takes time to start and is not needed within a host, is there for a sender that insists on it.
    fn open(prompt: Prompt, transport: Option<TransportKind>) -> Result<Self, Failure> {
        let mut receiver = Child::start("receiver", &["internal-child", "demo-receiver"])?;
        let key = crate::secret()?;
        // As many as the prompt needs: then the transfer before the measured one has touched every page of it.
        let pages = prompt.chunks() as u32;
        let nixl = transport == Some(TransportKind::Nixl);
        let open = ToReceiver::Open { prompt, pages, key: key.clone(), nixl };
        let opened: Opened = receiver.ask(&open, DEADLINE)?;
        Ok(Self { prompt, receiver, address: opened.address, pages: opened.pages, key })
    }

    fn sender(&self, transport: Option<TransportKind>) -> Result<(Child, Connected), Failure> {
        let mut child = Child::start("sender", &["internal-child", "demo-sender"])?;
        let inproc = transport == Some(TransportKind::Inproc);
        let address = (!inproc).then(|| self.address.clone());
        let connect = ToSender::Connect { prompt: self.prompt, address, key: self.key.clone(), transport };
        let connected = child.ask(&connect, DEADLINE)?;
        Ok((child, connected))
    }

    /// One prompt over one transport, after one of other content has touched all memory. Every byte is checked.
    fn transfer(&mut self, transport: Option<TransportKind>, seed: u64) -> Result<(Row, u32), Failure> {
        let (mut sender, connected) = self.sender(transport)?;
        let (warm, prompt) = (self.prompt.with_seed(!seed), self.prompt.with_seed(seed));
        let store = |p: Prompt, name| ToSender::Store { prompt: p, request: format!("{name}-{seed:016x}") };
        let _: Stored = sender.ask(&store(warm, "warm"), DEADLINE)?;
        self.check_and_drop(&mut sender, transport, warm)?;
        let stored: Stored = sender.ask(&store(prompt, "cmpl"), DEADLINE)?;
        let checked = self.check_and_drop(&mut sender, transport, prompt)?;
        let pid = sender.pid();
        sender.finish(Duration::from_secs(3));
        Ok((Row::measured(prompt, &connected, &stored, &checked), pid))
    }

    fn check_and_drop(
        &mut self,
        sender: &mut Child,
        transport: Option<TransportKind>,
        prompt: Prompt,
    ) -> Result<Checked, Failure> {
        if transport == Some(TransportKind::Inproc) {
            return sender.ask(&ToSender::Check { prompt }, DEADLINE);
        }
        let checked = self.receiver.ask(&ToReceiver::Check { prompt }, DEADLINE)?;
        let _: Pool = self.receiver.ask(&ToReceiver::Drop { prompt }, DEADLINE)?;
        Ok(checked)
    }

    fn pool(&mut self) -> Result<Pool, Failure> {
        self.receiver.ask(&ToReceiver::Stats, DEADLINE)
    }

    /// The pool once `settled` is true of it, or as it is when the time is over.
    fn pool_when(&mut self, settled: impl Fn(&Pool) -> bool) -> Result<(Pool, Duration), Failure> {
        let start = Instant::now();
        loop {
            let pool = self.pool()?;
            if settled(&pool) || start.elapsed() > FENCE {
                return Ok((pool, start.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn kill_and_recover(&mut self, transport: Option<TransportKind>, seed: u64) -> Result<Kill, Failure> {
        // An in-process peer cannot be killed alone; the default path stands in.
        let transport = transport.filter(|t| *t != TransportKind::Inproc);
        let prompt = self.prompt.with_seed(seed);
        let request = format!("cmpl-{seed:016x}");
        let (before, _) = self.pool_when(Pool::is_quiet)?;

        let (mut sender, first) = self.sender(transport)?;
        sender.tell(&ToSender::StoreHalf { prompt, request: request.clone() })?;
        let half: Half = sender.hear(DEADLINE)?;
        let during = self.pool()?;
        let pid = sender.pid();
        sender.kill()?;
        let (after, fenced) = self.pool_when(Pool::is_quiet)?;
        // What the dead sender completed may stay published, but only if it is right.
        let survivors: Checked = self.receiver.ask(&ToReceiver::Check { prompt }, DEADLINE)?;

        let (mut next, second) = self.sender(transport)?;
        let stored: Stored = next.ask(&ToSender::Store { prompt, request }, DEADLINE)?;
        let checked: Checked = self.receiver.ask(&ToReceiver::Check { prompt }, DEADLINE)?;
        let _: Pool = self.receiver.ask(&ToReceiver::Drop { prompt }, DEADLINE)?;
        next.finish(Duration::from_secs(3));
        // UCX lets go of a dead peer's socket at some later turn.
        let spare = if transport == Some(TransportKind::Nixl) { 2 } else { 0 };
        let (end, _) = self.pool_when(|p| p.is_quiet() && p.descriptors <= before.descriptors + spare)?;
        Ok(Kill {
            pid,
            chunks_handed_over: half.chunks,
            fenced_ms: units::millis(fenced),
            spare,
            before,
            during,
            after,
            end,
            survivors,
            epochs: (first.epoch, second.epoch),
            stored,
            checked,
            bytes: prompt.bytes(),
        })
    }
}
