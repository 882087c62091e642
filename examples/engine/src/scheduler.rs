//! Serving many requests at once: one thread that owns every sequence and runs the model.
//!
//! Each step computes one token of every text that is being written and, in the room that is left, the next piece of the
//! prompts that came first. A request is admitted when all it can ever need of the cache is free, so nothing admitted is ever
//! thrown out. A client that has gone is noticed before the next step. On a prefiller, chunks leave as soon as a step has
//! filled them, while the next ones are computed; on a decoder, a prompt starts with what has arrived of its cache.

use crate::kv::receive::{Found, Inbox};
use crate::kv::send::{Outbox, Outgoing, Target};
use crate::model::{Cache, Model, Piece};
use crate::sample::{Choice, Sampling, Scored, logprobs, sample};
use crate::text::{Growing, Stopping, Text};
use crossbeam::channel::{self, RecvTimeoutError};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// How often a prompt asks again for a chunk that is on its way.
const ASK_AGAIN: Duration = Duration::from_millis(2);
/// Nothing happens for longer than this only when there is nothing to do.
const IDLE: Duration = Duration::from_secs(3600);

/// Limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest sequence.
    pub(crate) positions: usize,
    /// Tokens of cache of all sequences together.
    pub(crate) cache_tokens: usize,
    /// Sequences at once.
    pub(crate) sequences: usize,
    /// Tokens of one step.
    pub(crate) batch: usize,
    /// Requests that wait.
    pub(crate) queue: usize,
    /// How long a decoder's prompt waits for a chunk that is on its way.
    pub(crate) kv_wait: Duration,
}

/// One prompt.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) params: Params,
    /// Texts to write.
    pub(crate) choices: usize,
    /// Where the prompt's cache is wanted.
    pub(crate) target: Option<Target>,
    pub(crate) events: UnboundedSender<Event>,
}

/// How a prompt's texts are written.
#[derive(Clone, Debug)]
pub(crate) struct Params {
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) include_stop: bool,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special: bool,
    /// List the prompt's own log probabilities.
    pub(crate) prompt_logprobs: Option<usize>,
}

/// What happens to a prompt.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// It was admitted; so many of its tokens need not be computed.
    Admitted(usize),
    /// Log probabilities of its tokens, the first of which has none.
    Prompt(Vec<Vec<Scored>>),
    /// A token of one of its texts.
    Token(Step),
    /// Nothing more comes.
    Failed(String),
}

/// A token and the text it completes.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) choice: usize,
    pub(crate) token: u32,
    pub(crate) text: String,
    pub(crate) logprobs: Option<Vec<Scored>>,
    pub(crate) finish: Option<Finish>,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    /// The stop string or token, when it was one of the request's own.
    pub(crate) stop: Value,
}

/// Counts, for metrics.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) waiting: AtomicUsize,
    pub(crate) running: AtomicUsize,
    /// Tokens of cache that are promised.
    pub(crate) reserved: AtomicUsize,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) gone: AtomicU64,
    /// The thread has ended, which it should not.
    pub(crate) ended: AtomicBool,
}

/// The way in. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Scheduler {
    jobs: channel::Sender<(Job, Instant)>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) limits: Limits,
}

impl Scheduler {
    /// Starts the thread. It ends after the last clone has gone and the last text is written.
    pub(crate) fn start(
        model: Arc<Model>,
        text: Arc<Text>,
        limits: Limits,
        outbox: Option<Outbox>,
        inbox: Option<Arc<Inbox>>,
    ) -> std::io::Result<Self> {
        let (jobs, arrivals) = channel::unbounded();
        let stats = Arc::<Stats>::default();
        let worker = Worker {
            model,
            text,
            limits,
            outbox,
            inbox,
            arrivals,
            stats: stats.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            reserved: 0,
        };
        let end = End(stats.clone());
        std::thread::Builder::new().name("scheduler".into()).spawn(move || {
            let _end = end;
            worker.run();
        })?;
        Ok(Self { jobs, stats, limits })
    }

    /// Queues a prompt. False when the queue is full or the thread has ended.
    pub(crate) fn submit(&self, job: Job) -> bool {
        let room = |n| (n < self.limits.queue).then_some(n + 1);
        self.stats.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok()
            && self.jobs.send((job, Instant::now())).is_ok()
    }

    /// Tokens of cache a prompt would hold.
    pub(crate) fn demand(chunk: usize, prompt: usize, max_tokens: usize, choices: usize) -> usize {
        (prompt + max_tokens).next_multiple_of(chunk) * choices
    }
}

/// Notes the end of the thread, a panic's included.
struct End(Arc<Stats>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
    }
}

/// What the sequences of one prompt share.
struct Shared {
    id: String,
    params: Params,
    prompt_len: usize,
    events: UnboundedSender<Event>,
    eos: Vec<u32>,
}

/// One text.
struct Sequence {
    shared: Arc<Shared>,
    choice: usize,
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    cache: Cache,
    growing: Growing,
    stopping: Stopping,
    outgoing: Option<Outgoing>,
    /// Chunks given to `outgoing`.
    sent: usize,
    /// Other texts that start once the prompt is computed.
    siblings: usize,
    prompt_scores: Vec<Vec<Scored>>,
    reserved: usize,
    over: bool,
}

struct Worker {
    model: Arc<Model>,
    text: Arc<Text>,
    limits: Limits,
    outbox: Option<Outbox>,
    inbox: Option<Arc<Inbox>>,
    arrivals: channel::Receiver<(Job, Instant)>,
    stats: Arc<Stats>,
    waiting: VecDeque<(Job, Instant)>,
    running: Vec<Sequence>,
    reserved: usize,
}

impl Worker {
    fn run(mut self) {
        loop {
            if self.running.is_empty() {
                let patience = if self.waiting.is_empty() { IDLE } else { ASK_AGAIN };
                match self.arrivals.recv_timeout(patience) {
                    Ok(job) => self.waiting.push_back(job),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) if self.waiting.is_empty() => return,
                    Err(RecvTimeoutError::Disconnected) => std::thread::sleep(ASK_AGAIN),
                }
            }
            self.waiting.extend(self.arrivals.try_iter());
            self.admit();
            self.step();
            self.sweep();
        }
    }

    /// Starts those who wait, in order, as far as there is room.
    fn admit(&mut self) {
        let mut asking = VecDeque::new();
        while let Some((job, since)) = self.waiting.pop_front() {
            if job.events.is_closed() {
                self.leave_queue();
                self.stats.gone.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let chunk = self.model.shape().tokens;
            let demand = Scheduler::demand(chunk, job.prompt.len(), job.params.max_tokens, job.choices);
            if self.running.len() + job.choices > self.limits.sequences.max(job.choices)
                || self.reserved + demand > self.limits.cache_tokens
            {
                self.waiting.push_front((job, since));
                break;
            }
            let found = match &self.inbox {
                None => Ok(Found::Cache(Cache::new(self.model.shape()), 0)),
                Some(inbox) => inbox.take(&job.prompt, since.elapsed() < self.limits.kv_wait),
            };
            match found {
                Ok(Found::Pending) => asking.push_back((job, since)),
                Ok(Found::Cache(cache, found)) => {
                    self.leave_queue();
                    self.start(job, cache, found, demand);
                }
                Err(e) => {
                    tracing::warn!(id = job.id, error = %e, "nothing taken from the pool; the prompt is computed here");
                    self.leave_queue();
                    self.start(job, Cache::new(self.model.shape()), 0, demand);
                }
            }
        }
        while let Some(job) = asking.pop_back() {
            self.waiting.push_front(job);
        }
    }

    fn leave_queue(&self) {
        self.stats.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    fn start(&mut self, job: Job, cache: Cache, found: usize, reserved: usize) {
        let Job { id, prompt, params, choices, target, events } = job;
        if self.inbox.is_some() {
            tracing::info!(
                "Reqid: {id}, Total tokens {}, kvxfer hit tokens: {found}: Retrieved {found} of {} tokens",
                prompt.len(),
                prompt.len()
            );
        }
        // The last token is computed in any case: the next one follows from it. All of them, where each is to be scored.
        let computed = if params.prompt_logprobs.is_some() { 0 } else { found.min(prompt.len() - 1) };
        let _ = events.send(Event::Admitted(computed));
        self.stats.prompt_tokens.fetch_add(prompt.len() as u64, Ordering::Relaxed);
        let outgoing = match (&self.outbox, target) {
            (Some(outbox), Some(target)) => Some(outbox.start(target, prompt.clone())),
            _ => None,
        };
        self.reserved += reserved;
        self.running.push(Sequence {
            choice: 0,
            growing: Growing::new(&prompt, params.skip_special),
            stopping: Stopping::new(params.stops.clone(), params.include_stop),
            shared: Arc::new(Shared {
                id,
                prompt_len: prompt.len(),
                events,
                eos: self.model.config.eos.clone(),
                params,
            }),
            tokens: prompt,
            computed,
            cache,
            outgoing,
            sent: 0,
            siblings: choices - 1,
            prompt_scores: Vec::new(),
            reserved,
            over: false,
        });
    }

    /// Runs the model once over what every sequence needs next.
    fn step(&mut self) {
        for sequence in &mut self.running {
            if sequence.shared.events.is_closed() && !sequence.over {
                tracing::info!(id = sequence.shared.id, "the client has gone");
                self.stats.gone.fetch_add(1, Ordering::Relaxed);
                sequence.over = true;
            }
        }
        let plan = self.plan();
        let mut pieces = Vec::new();
        for (sequence, &n) in self.running.iter_mut().zip(&plan) {
            if n > 0 {
                let Sequence { tokens, computed, cache, shared, .. } = sequence;
                let end = *computed + n;
                let logits_from = match shared.params.prompt_logprobs {
                    Some(_) if *computed < shared.prompt_len => 0,
                    _ if end == tokens.len() => n - 1,
                    _ => n,
                };
                pieces.push(Piece { tokens: &tokens[*computed..end], start: *computed, cache, logits_from });
            }
        }
        if pieces.is_empty() {
            return;
        }
        let mut logits = match self.model.forward(&mut pieces) {
            Ok(logits) => logits.into_iter(),
            Err(e) => {
                drop(pieces);
                tracing::error!(error = %e, "the model failed");
                for (sequence, &n) in self.running.iter_mut().zip(&plan) {
                    if n > 0 {
                        let _ = sequence.shared.events.send(Event::Failed(format!("the model failed: {e}")));
                        sequence.over = true;
                    }
                }
                return;
            }
        };
        drop(pieces);
        let mut forked = Vec::new();
        for (sequence, n) in self.running.iter_mut().zip(plan).filter(|(_, n)| *n > 0) {
            let rows = logits.next().unwrap_or_default();
            sequence.score_prompt(&rows);
            sequence.computed += n;
            sequence.hand_over(self.model.shape().tokens);
            let Some(row) = rows.last().filter(|_| sequence.computed == sequence.tokens.len()) else {
                continue;
            };
            let siblings = std::mem::take(&mut sequence.siblings);
            let share = sequence.reserved / (siblings + 1);
            for i in 0..siblings {
                match sequence.fork(i + 1, share) {
                    Ok(mut sibling) => {
                        sequence.reserved -= share;
                        sibling.advance(&self.text, row, &self.stats);
                        forked.push(sibling);
                    }
                    Err(e) => {
                        let _ = sequence.shared.events.send(Event::Failed(format!("copying a cache: {e}")));
                    }
                }
            }
            sequence.advance(&self.text, row, &self.stats);
        }
        self.running.extend(forked);
    }

    /// Tokens each sequence computes in this step: texts first, then prompts in order.
    fn plan(&self) -> Vec<usize> {
        let mut room = self.limits.batch;
        let mut plan = vec![0; self.running.len()];
        for prompts in [false, true] {
            for (n, sequence) in plan.iter_mut().zip(&self.running) {
                let left = sequence.tokens.len() - sequence.computed;
                if !sequence.over && (left > 1) == prompts {
                    *n = left.min(room);
                    room -= *n;
                }
            }
        }
        plan
    }

    fn sweep(&mut self) {
        self.running.retain(|sequence| {
            if sequence.over {
                self.reserved -= sequence.reserved;
            }
            !sequence.over
        });
        self.stats.running.store(self.running.len(), Ordering::Relaxed);
        self.stats.reserved.store(self.reserved, Ordering::Relaxed);
    }
}

impl Sequence {
    /// Gives chunks that are full, and at the prompt's end the last one, to whoever sends them.
    fn hand_over(&mut self, size: usize) {
        let Some(outgoing) = &mut self.outgoing else { return };
        let prompt = self.shared.prompt_len;
        let ready = if self.computed >= prompt { prompt.div_ceil(size) } else { self.computed / size };
        for i in self.sent..ready {
            // The prompt's chunks are there: they have just been computed.
            if let Ok(chunk) = self.cache.chunk(i) {
                outgoing.push(chunk);
            }
        }
        self.sent = ready;
        if self.computed >= prompt {
            self.outgoing = None;
        }
    }

    /// Another text behind the same prompt.
    fn fork(&self, choice: usize, reserved: usize) -> candle_core::Result<Self> {
        Ok(Self {
            shared: self.shared.clone(),
            choice,
            tokens: self.tokens.clone(),
            computed: self.computed,
            cache: self.cache.fork(self.computed)?,
            growing: self.growing.clone(),
            stopping: self.stopping.clone(),
            outgoing: None,
            sent: 0,
            siblings: 0,
            prompt_scores: Vec::new(),
            reserved,
            over: false,
        })
    }

    /// Keeps the log probabilities of the prompt's tokens that follow from these rows.
    fn score_prompt(&mut self, rows: &[Vec<f32>]) {
        let (Some(n), prompt) = (self.shared.params.prompt_logprobs, self.shared.prompt_len) else { return };
        if self.computed >= prompt {
            return;
        }
        for (i, row) in rows.iter().enumerate() {
            if let Some(&next) = self.tokens[..prompt].get(self.computed + i + 1) {
                self.prompt_scores.push(logprobs(row, next, n));
            }
        }
        if self.prompt_scores.len() + 1 == prompt {
            let scores = std::mem::take(&mut self.prompt_scores);
            let _ = self.shared.events.send(Event::Prompt(scores));
        }
    }

    /// The next token.
    fn advance(&mut self, text: &Text, logits: &[f32], stats: &Stats) {
        let shared = self.shared.clone();
        let Shared { params, prompt_len, eos, .. } = &*shared;
        let (prompt, output) = self.tokens.split_at(*prompt_len);
        let banned = if output.len() < params.min_tokens {
            [&eos[..], &params.stop_tokens].concat()
        } else {
            Vec::new()
        };
        let (choice, position) = (self.choice as u64, self.tokens.len() as u64);
        let Choice { token, logprobs } =
            sample(&params.sampling, logits, prompt, output, &banned, choice, position);
        self.tokens.push(token);
        stats.generated_tokens.fetch_add(1, Ordering::Relaxed);

        let stop = if eos.contains(&token) && !params.ignore_eos {
            Some(Value::Null)
        } else {
            params.stop_tokens.contains(&token).then(|| token.into())
        };
        let mut out = String::new();
        let mut finish = stop.map(|stop| Finish { reason: "stop", stop });
        if finish.is_none() || params.include_stop {
            let fresh = self.growing.push(text, token);
            let (ready, stop) = self.stopping.push(&fresh);
            out = ready;
            if let Some(stop) = stop
                && finish.is_none()
            {
                finish = Some(Finish { reason: "stop", stop: stop.into() });
            }
        }
        let written = self.tokens.len() - prompt_len;
        if finish.is_none() && written >= params.max_tokens {
            finish = Some(Finish { reason: "length", stop: Value::Null });
        }
        if let Some(finish) = &finish {
            if !finish.stop.is_string() {
                out.push_str(&self.stopping.rest());
            }
            self.over = true;
            stats.finished.fetch_add(1, Ordering::Relaxed);
        }
        let event = Event::Token(Step { choice: self.choice, token, text: out, logprobs, finish });
        let _ = shared.events.send(event);
    }
}
