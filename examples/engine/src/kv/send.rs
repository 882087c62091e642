//! The prefiller's half: hand a prompt's cache over while it is being computed.
//!
//! One thread per request, so that one which waits (for pages, for a receiver that is just restarting) never holds up another or
//! the model. The whole of it is [`Job::deliver`]: connect, reserve all chunks at once, write each as soon as the model has
//! filled it, wait for the receiver's word. The proxy hears how it ended, either way.

use super::Terms;
use crate::model::pack;
use crate::notify::Notifier;
use candle_core::Tensor;
use crossbeam::channel;
use kvxfer::channel::{ChunkSource, DeliveryReport, Reservation};
use kvxfer::proto::wire::ChunkSpec;
use kvxfer::{Agent, Error, ErrorCode, Region, RequestId, Result, Sender, SenderConfig};
use kvxfer_proto::notify::Notification;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Regions kept for later requests.
const SPARE: usize = 4;
/// How long a request that was given up may take to let go of its memory.
const LET_GO: Duration = Duration::from_secs(5);

/// Where a request's cache goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) request: String,
    /// The decoder's `--kv-host` and `--kv-port`.
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// Sends caches to decoders. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Outbox {
    shared: Arc<Shared>,
}

/// Takes the chunks of one request, in order. Dropping it before the last gives the request up.
pub(crate) struct Outgoing {
    chunks: Option<channel::Sender<Tensor>>,
    left: usize,
}

/// What happened so far, for metrics.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

struct Shared {
    agent: Agent,
    terms: Terms,
    notifier: Notifier,
    timeout: Duration,
    /// One per decoder; a [`Sender`] reconnects by itself when its decoder was restarted.
    senders: Mutex<HashMap<String, Arc<Mutex<Option<Sender>>>>>,
    spare: Mutex<Vec<Region>>,
    counters: Counters,
}

/// One request under way.
struct Job {
    shared: Arc<Shared>,
    target: Target,
    tokens: Vec<u32>,
    chunks: channel::Receiver<Tensor>,
}

/// How long the parts took.
struct Times {
    /// From the first chunk the model had ready.
    first: Instant,
    /// Since then: waiting for the model to fill the next one, and copying out of its cache.
    prefill: Duration,
    offload: Duration,
    /// When the last one was on its way.
    last: Instant,
}

impl Outbox {
    pub(crate) fn new(agent: Agent, terms: Terms, notifier: Notifier, timeout: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                agent,
                terms,
                notifier,
                timeout,
                senders: Mutex::default(),
                spare: Mutex::default(),
                counters: Counters::default(),
            }),
        }
    }

    /// Announces the cache of `tokens` at the target and returns where its chunks are to be given.
    pub(crate) fn start(&self, target: Target, tokens: Vec<u32>) -> Outgoing {
        let left = self.shared.terms.shape.chunks(tokens.len());
        let (sender, chunks) = channel::bounded(left);
        let job = Job { shared: self.shared.clone(), target, tokens, chunks };
        let target = job.target.clone();
        if let Err(e) = std::thread::Builder::new().name("kv-send".into()).spawn(move || job.run()) {
            let e = Error::system("starting a thread", e, "lower --max-num-seqs");
            self.shared.ended(&target, &Err(e));
        }
        Outgoing { chunks: Some(sender), left }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

impl Outgoing {
    /// Hands over the next chunk; its valid rows are final.
    pub(crate) fn push(&mut self, chunk: Tensor) {
        self.left = self.left.saturating_sub(1);
        if let Some(chunks) = &self.chunks {
            // Nobody listens when the request has failed already.
            let _ = chunks.try_send(chunk);
        }
        if self.left == 0 {
            self.chunks = None;
        }
    }
}

impl Job {
    fn run(self) {
        let result = self.deliver();
        self.shared.ended(&self.target, &result);
    }

    /// Everything `kvxfer` does for a request.
    fn deliver(&self) -> Result<Notification> {
        let Terms { shape, .. } = self.shared.terms;
        let deadline = Instant::now() + self.shared.timeout;
        let left = || deadline.saturating_duration_since(Instant::now());

        let sender = self.shared.sender(&self.target, left())?;
        let keys = self.shared.terms.keys(&self.tokens)?.into_iter().enumerate();
        let valid = |i| shape.valid(i, self.tokens.len());
        let specs: Vec<_> =
            keys.map(|(i, key)| ChunkSpec { key, len: shape.bytes(valid(i)) as u64 }).collect();
        let count = specs.len();
        let reservation = sender.reserve(RequestId::new(&self.target.request)?, specs, Some(left()))?;
        reservation.wait_admitted(left())?;

        // The chunks' bytes must stay as they are until the request has ended, so they leave the model's cache for memory
        // of their own. An engine whose cache lies in registered memory names runs of that instead, and copies nothing.
        let region = self.shared.region(count * shape.bytes(shape.tokens))?;
        let written = self.write(&reservation, &region, left);
        let delivery = reservation.finish();
        let result = written.and_then(|times| Ok((times, delivery.wait(left())?)));
        if let Err(e) = &result {
            delivery.abort(e.code());
            if matches!(delivery.wait(LET_GO), Err(e) if e.code() == ErrorCode::TimedOut) {
                // Something may still read it: it goes with its last user.
                return Err(result.err().unwrap_or_else(gave_up));
            }
        }
        self.shared.give_back(region);
        result.map(|(times, report)| self.report(&times, &report))
    }

    /// Writes chunk after chunk, each as soon as it is there, while the prefill goes on.
    fn write(
        &self,
        reservation: &Reservation,
        region: &Region,
        left: impl Fn() -> Duration,
    ) -> Result<Times> {
        let shape = self.shared.terms.shape;
        let mut times = Times {
            first: Instant::now(),
            last: Instant::now(),
            prefill: Duration::ZERO,
            offload: Duration::ZERO,
        };
        for i in 0..shape.chunks(self.tokens.len()) {
            let waiting = Instant::now();
            let chunk = self.chunks.recv_timeout(left()).map_err(|e| match e {
                channel::RecvTimeoutError::Disconnected => gave_up(),
                channel::RecvTimeoutError::Timeout => Error::TimedOut {
                    operation: format!("chunk {i} of request {}", self.target.request),
                    after: self.shared.timeout,
                },
            })?;
            let started = Instant::now();
            if i == 0 {
                times.first = started;
            } else {
                times.prefill += started - waiting;
            }
            let (offset, tokens) =
                ((i * shape.bytes(shape.tokens)) as u64, shape.valid(i, self.tokens.len()));
            pack(&chunk, tokens, |at, bytes| region.memory().write_at(offset + at, bytes))
                .map_err(|e| Error::failed(ErrorCode::System, format!("copying chunk {i}: {e}")))?;
            times.offload += started.elapsed();
            let runs = vec![(offset, shape.bytes(tokens) as u64)];
            reservation.write(i, ChunkSource::new(region.clone(), runs))?;
            times.last = Instant::now();
        }
        Ok(times)
    }

    /// The guide's line, and the news for the proxy. What it takes is what it adds to the prefill: bytes that move while the
    /// next chunk is computed cost nothing. It ends when the receiver has checked and published the last byte.
    fn report(&self, times: &Times, report: &DeliveryReport) -> Notification {
        let whole = times.first.elapsed();
        let took = whole.saturating_sub(times.prefill);
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        tracing::info!(
            "Store {} tokens takes: {:.4} ms, throughput: {:.4} GB/s; offload_time: {:.4} ms, put_time: {:.4} ms \
             (request {}: {} bytes over {}; {} chunks written, {} there before; ready {:.4} ms after the last was computed)",
            self.tokens.len(),
            ms(took),
            report.bytes as f64 / took.as_secs_f64() / 1e9,
            ms(times.offload),
            ms(took.saturating_sub(times.offload)),
            self.target.request,
            report.bytes,
            report.transport,
            report.written,
            report.present,
            ms(times.last.elapsed()),
        );
        Notification::KvReady {
            req_id: self.target.request.clone(),
            tp_rank: 0,
            bytes: report.bytes,
            took_us: whole.as_micros() as u64,
        }
    }
}

impl Shared {
    /// The channel to a decoder's pool; the first request opens it.
    fn sender(&self, target: &Target, timeout: Duration) -> Result<Sender> {
        let address = format!("tcp://{}:{}", target.host, target.port);
        let slot = self.senders.lock().entry(address.clone()).or_default().clone();
        // Only requests for the same decoder wait for its connection.
        let mut slot = slot.try_lock_for(timeout).ok_or_else(|| Error::TimedOut {
            operation: format!("waiting for another request's connection to {address}"),
            after: timeout,
        })?;
        if let Some(sender) = &*slot {
            return Ok(sender.clone());
        }
        let config = SenderConfig { geometry: self.terms.geometry.clone(), ..SenderConfig::default() };
        let timeout = timeout.min(self.agent.config().connect_timeout);
        let sender = Sender::connect(&self.agent, &address, config, timeout)?;
        Ok(slot.insert(sender).clone())
    }

    fn region(&self, len: usize) -> Result<Region> {
        let mut spare = self.spare.lock();
        if let Some(i) = spare.iter().position(|r| r.len() >= len as u64) {
            return Ok(spare.swap_remove(i));
        }
        drop(spare);
        self.agent.allocate(len)
    }

    fn give_back(&self, region: Region) {
        let mut spare = self.spare.lock();
        spare.push(region);
        if spare.len() > SPARE {
            spare.sort_by_key(|r| std::cmp::Reverse(r.len()));
            spare.truncate(SPARE);
        }
    }

    fn ended(&self, target: &Target, result: &Result<Notification>) {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let notification = match result {
            Ok(notification) => {
                if let Notification::KvReady { bytes, .. } = notification {
                    self.counters.bytes.fetch_add(*bytes, Ordering::Relaxed);
                }
                notification.clone()
            }
            Err(e) => {
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(request = target.request, code = e.code().as_str(), error = %e, "the cache did not arrive");
                Notification::KvFailed {
                    req_id: target.request.clone(),
                    tp_rank: 0,
                    code: e.code().as_str().into(),
                    message: e.to_string(),
                    retryable: e.is_retryable(),
                }
            }
        };
        self.notifier.send(notification);
    }
}

fn gave_up() -> Error {
    Error::failed(ErrorCode::Cancelled, "the prompt was given up before its prefill had ended")
}
