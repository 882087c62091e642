//! The demo's sender process: an engine with a paged cache that stores prompts.

use super::prompt::{Engine, Prompt};
use super::protocol::{Connected, Half, Stored, ToSender};
use super::receiver::ReceiverSide;
use crate::units::millis;
use crate::{Failure, agents, child};
use kvxfer_core::channel::{ChunkSource, Reservation};
use kvxfer_core::{Agent, Region, RequestId, Sender, SenderConfig, TransportKind};
use std::time::{Duration, Instant};

/// Upper bound of anything here.
const DEADLINE: Duration = Duration::from_secs(60);

struct SenderSide {
    agent: Agent,
    sender: Sender,
    buffer: Region,
    engine: Engine,
    /// What the engine's cache holds now.
    holds: Option<u64>,
}

impl SenderSide {
    fn connect(
        prompt: Prompt,
        address: &str,
        key: &str,
        transport: Option<TransportKind>,
    ) -> Result<Self, Failure> {
        let mut builder = Agent::builder().config(agents::settings_with_key(key)?).name("demo-sender");
        if let Some(only) = transport {
            builder = builder.allow([only]);
        }
        let agent = builder.build()?;
        let status = agent.transports().into_iter().find(|s| Some(s.kind) == transport);
        if let Some(reason) = status.and_then(|s| s.reason) {
            return Err(Failure::new(reason));
        }
        let config = SenderConfig { geometry: prompt.geometry(), ..SenderConfig::default() };
        let sender = Sender::connect(&agent, address, config, DEADLINE)?;
        let buffer = agent.allocate(prompt.bytes() as usize)?;
        Ok(Self { agent, sender, buffer, engine: Engine::new(prompt), holds: None })
    }

    /// The prefill itself, outside all measured time.
    fn prefill(&mut self, prompt: Prompt) {
        if self.holds != Some(prompt.seed) {
            self.engine.prefill(prompt);
            self.holds = Some(prompt.seed);
        }
    }

    fn reserve(&self, prompt: Prompt, request: &str) -> Result<Reservation, Failure> {
        let reservation = self.sender.reserve(RequestId::new(request)?, prompt.specs()?, Some(DEADLINE))?;
        reservation.wait_admitted(DEADLINE)?;
        Ok(reservation)
    }

    /// Gathers chunk `i` into the send buffer and says where it is.
    fn offload(&self, prompt: Prompt, i: usize) -> Result<ChunkSource, Failure> {
        let at = i as u64 * prompt.page_bytes();
        self.engine.gather(prompt, i, |offset, bytes| self.buffer.memory().write_at(at + offset, bytes))?;
        Ok(ChunkSource::new(self.buffer.clone(), vec![(at, prompt.chunk_bytes(i))]))
    }

    /// The store an engine does after a prefill: each chunk is handed over as soon as it is gathered.
    fn store(&mut self, prompt: Prompt, request: &str) -> Result<Stored, Failure> {
        self.prefill(prompt);
        let start = Instant::now();
        let reservation = self.reserve(prompt, request)?;
        let mut offload = Duration::ZERO;
        let mut put_from = None;
        for i in 0..prompt.chunks() {
            let gather = Instant::now();
            let source = self.offload(prompt, i)?;
            let now = Instant::now();
            offload += now - gather;
            put_from.get_or_insert(now);
            reservation.write(i, source)?;
        }
        let report = reservation.finish().wait(DEADLINE)?;
        let end = Instant::now();
        Ok(Stored {
            transport: report.transport,
            bytes: report.bytes,
            written: report.written,
            present: report.present,
            takes_ms: millis(end - start),
            offload_ms: millis(offload),
            put_ms: millis(end - put_from.unwrap_or(start)),
            queued_ms: millis(report.queued),
        })
    }

    /// Goes on writing after its word at half time, but keeps the last chunk, so that the request cannot end by itself.
    fn store_half(&mut self, prompt: Prompt, request: &str) -> Result<Reservation, Failure> {
        self.prefill(prompt);
        let reservation = self.reserve(prompt, request)?;
        let last = prompt.chunks() - 1;
        for i in 0..last {
            let source = self.offload(prompt, i)?;
            reservation.write(i, source)?;
            if i == last / 2 {
                child::say(&Half { chunks: i + 1 })?;
            }
        }
        Ok(reservation)
    }
}

/// The child process.
pub(crate) fn run() -> Result<(), Failure> {
    let Some(ToSender::Connect { prompt, address, key, transport }) = child::listen()? else {
        return Err(Failure::new("the sender was not told where to connect"));
    };
    let (local, address) = if let Some(address) = address {
        (None, address)
    } else {
        let side = ReceiverSide::open(prompt, prompt.chunks() as u32, &key, false)?;
        let address = side.address()?;
        (Some(side), address)
    };
    let mut side = SenderSide::connect(prompt, &address, &key, transport)?;
    child::say(&Connected { paths: side.sender.peer().paths(), epoch: side.agent.epoch().0 })?;
    let mut held = Vec::new();
    while let Some(message) = child::listen()? {
        match message {
            ToSender::Connect { .. } => return Err(Failure::new("the sender is connected already")),
            ToSender::Store { prompt, request } => child::say(&side.store(prompt, &request)?)?,
            ToSender::StoreHalf { prompt, request } => held.push(side.store_half(prompt, &request)?),
            ToSender::Check { prompt } => {
                let receiver =
                    local.as_ref().ok_or_else(|| Failure::new("the pool is in another process"))?;
                let checked = receiver.check(prompt)?;
                receiver.forget(prompt)?;
                child::say(&checked)?;
            }
        }
    }
    drop(side.sender);
    Ok(side.agent.shutdown(Duration::from_secs(2))?)
}
