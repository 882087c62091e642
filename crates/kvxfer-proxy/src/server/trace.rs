//! One request under observation, from its head to its last byte: its row on the board, its timeline, and what the
//! access log, the statistics and the metrics say about it in the end.

use super::App;
use crate::openai::{Endpoint, Leg};
use crate::stats::{Mark, Outcome, Row, Timeline};
use kvxfer_proto::Time;
use parking_lot::Mutex;
use std::sync::Arc;

/// A request under observation. When it is dropped, the request has ended.
#[derive(Debug)]
pub(crate) struct Trace {
    app: Arc<App>,
    id: String,
    endpoint: Endpoint,
    stream: bool,
    came: Time,
    row: Row,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    timeline: Timeline,
    prefiller: Option<String>,
    decoder: Option<String>,
    plan: &'static str,
    prompt_tokens: u64,
    output_tokens: u64,
    kv_bytes: u64,
    retries: u32,
    /// Why a decoder computed a prompt itself, if one did.
    alone: Option<String>,
    first_token: bool,
    /// Whoever is dropped before it has ended was dropped because nobody was left to answer.
    status: u16,
    error: Option<String>,
}

impl Trace {
    pub(crate) fn new(app: &Arc<App>, id: String, endpoint: Endpoint, stream: bool, came: Time) -> Arc<Self> {
        let row = app.stats.board().add(came, id.as_str(), endpoint.path(), stream);
        Arc::new(Self {
            app: Arc::clone(app),
            id,
            endpoint,
            stream,
            came,
            row,
            state: Mutex::new(State {
                timeline: Timeline::new(came),
                prefiller: None,
                decoder: None,
                plan: "",
                prompt_tokens: 0,
                output_tokens: 0,
                kv_bytes: 0,
                retries: 0,
                alone: None,
                first_token: false,
                status: 499,
                error: None,
            }),
        })
    }

    /// A phase has ended, and the next one begins.
    pub(crate) fn mark(&self, mark: Mark, next: &'static str) {
        let now = self.app.now();
        self.state.lock().timeline.mark(mark, now);
        self.row.phase(now, next);
    }

    /// A prompt's tokens are known.
    pub(crate) fn planned(&self, leg: &Leg) {
        let mut state = self.state.lock();
        state.prompt_tokens += leg.tokens().len() as u64;
        state.plan = leg.plan().name();
        self.row.planned(state.prompt_tokens, state.plan);
        self.app.metrics.planned(state.plan);
    }

    /// Where a prompt goes.
    pub(crate) fn assigned(&self, prefiller: Option<&str>, decoder: &str) {
        let mut state = self.state.lock();
        state.prefiller = prefiller.map(str::to_owned).or(state.prefiller.take());
        state.decoder = Some(decoder.to_owned());
        self.row.assigned(state.prefiller.as_deref(), Some(decoder));
    }

    /// A prefiller has answered.
    pub(crate) fn prefilled(&self, prefiller: &str) {
        let now = self.app.now();
        let took = now.since(self.came);
        self.app.stats.prefilled(now, prefiller, took);
        self.app.metrics.prefilled(prefiller, took);
        self.mark(Mark::Prefilled, "kv_wait");
    }

    /// A cache has arrived.
    pub(crate) fn kv_arrived(&self, bytes: u64) {
        self.state.lock().kv_bytes += bytes;
        self.app.metrics.kv_bytes(bytes);
    }

    /// A decoder computes a prompt itself. `kind` is for counting, `why` for people.
    pub(crate) fn alone(&self, kind: &'static str, why: &str) {
        self.app.metrics.fallback(kind);
        self.state.lock().alone.get_or_insert_with(|| why.to_owned());
    }

    /// An attempt is repeated elsewhere.
    pub(crate) fn retry(&self, kind: &'static str) {
        self.app.metrics.retry(kind);
        self.state.lock().retries += 1;
    }

    /// The first token goes to the client.
    pub(crate) fn first_token(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.first_token, true) {
            self.app.metrics.first_token(self.app.now().since(self.came));
        }
    }

    /// Tokens the client has got.
    pub(crate) fn output_tokens(&self, tokens: u64) {
        self.state.lock().output_tokens = tokens;
        self.row.output_tokens(tokens);
    }

    /// The client has got its answer, or an error of this status, also inside a stream.
    pub(crate) fn ended(&self, status: u16, error: Option<&str>) {
        let now = self.app.now();
        let mut state = self.state.lock();
        state.timeline.mark(Mark::Finished, now);
        state.status = status;
        state.error = error.map(str::to_owned);
    }

    /// What is known so far, for the header.
    pub(crate) fn header(&self) -> String {
        self.state.lock().timeline.header()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let now = self.app.now();
        let state = self.state.get_mut();
        let outcome = match state.status {
            499 => Outcome::Cancelled,
            status => Outcome::of_status(status),
        };
        state.timeline.mark(Mark::Finished, now);
        self.app.stats.finished(now, outcome, &state.timeline, state.output_tokens);
        self.app.metrics.finished(self.endpoint.path(), outcome, &state.timeline);
        self.app.metrics.tokens(state.prompt_tokens, state.output_tokens);
        if !self.app.settings().access_log.0 {
            return;
        }
        tracing::info!(
            target: "kvxfer_proxy::access",
            id = self.id,
            path = self.endpoint.path(),
            stream = self.stream,
            status = state.status,
            outcome = outcome.name(),
            plan = state.plan,
            prefiller = state.prefiller,
            decoder = state.decoder,
            prompt_tokens = state.prompt_tokens,
            output_tokens = state.output_tokens,
            kv_bytes = state.kv_bytes,
            retries = state.retries,
            alone = state.alone,
            timing = %state.timeline,
            error = state.error,
        );
    }
}
