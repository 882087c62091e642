//! The requests under way, one row each, for `/stats` and the dashboard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvxfer_proto::Time;
use parking_lot::Mutex;
use serde::Serialize;

/// Most rows told; the rest is counted only.
const MOST_ROWS: usize = 200;

/// All rows.
#[derive(Debug, Clone, Default)]
pub struct Board {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    next: AtomicU64,
    rows: Mutex<BTreeMap<u64, Arc<Entry>>>,
}

/// One request's row. It leaves the board when it is dropped, so a request that ends in any way is gone from it.
#[derive(Debug)]
pub struct Row {
    key: u64,
    entry: Arc<Entry>,
    board: Board,
}

#[derive(Debug)]
struct Entry {
    id: String,
    endpoint: &'static str,
    stream: bool,
    started: Time,
    output_tokens: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: &'static str,
    since: Time,
    prompt_tokens: u64,
    prefiller: Option<Arc<str>>,
    decoder: Option<Arc<str>>,
    plan: &'static str,
}

/// A row as `/stats` tells it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RowView {
    id: String,
    endpoint: &'static str,
    stream: bool,
    /// Milliseconds since it came in.
    age_ms: u64,
    phase: &'static str,
    /// Milliseconds in this phase.
    phase_ms: u64,
    plan: &'static str,
    prompt_tokens: u64,
    output_tokens: u64,
    prefiller: Option<String>,
    decoder: Option<String>,
}

impl Board {
    /// A row for a request that came in at `now`. `endpoint` is its path.
    pub fn add(&self, now: Time, id: impl Into<String>, endpoint: &'static str, stream: bool) -> Row {
        let key = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let state =
            State { phase: "queue", since: now, prompt_tokens: 0, prefiller: None, decoder: None, plan: "" };
        let entry = Arc::new(Entry {
            id: id.into(),
            endpoint,
            stream,
            started: now,
            output_tokens: AtomicU64::new(0),
            state: Mutex::new(state),
        });
        self.shared.rows.lock().insert(key, entry.clone());
        Row { key, entry, board: self.clone() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shared.rows.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The oldest rows.
    pub(super) fn rows(&self, now: Time) -> Vec<RowView> {
        let entries: Vec<Arc<Entry>> = self.shared.rows.lock().values().take(MOST_ROWS).cloned().collect();
        entries.iter().map(|entry| entry.view(now)).collect()
    }
}

impl Row {
    /// It is in another phase now; see [`PHASES`](super::PHASES) for the usual names.
    pub fn phase(&self, now: Time, phase: &'static str) {
        let mut state = self.entry.state.lock();
        state.phase = phase;
        state.since = now;
    }

    /// What is known once its tokens are: their number and [`Plan::name`](crate::openai::Plan::name).
    pub fn planned(&self, prompt_tokens: u64, plan: &'static str) {
        let mut state = self.entry.state.lock();
        state.prompt_tokens = prompt_tokens;
        state.plan = plan;
    }

    /// Where it goes.
    pub fn assigned(&self, prefiller: Option<&str>, decoder: Option<&str>) {
        let mut state = self.entry.state.lock();
        state.prefiller = prefiller.map(Into::into);
        state.decoder = decoder.map(Into::into);
    }

    /// Tokens sent to the client so far.
    pub fn output_tokens(&self, tokens: u64) {
        self.entry.output_tokens.store(tokens, Ordering::Relaxed);
    }
}

impl Drop for Row {
    fn drop(&mut self) {
        self.board.shared.rows.lock().remove(&self.key);
    }
}

impl Entry {
    fn view(&self, now: Time) -> RowView {
        let state = self.state.lock();
        RowView {
            id: self.id.clone(),
            endpoint: self.endpoint,
            stream: self.stream,
            age_ms: now.since(self.started).as_millis() as u64,
            phase: state.phase,
            phase_ms: now.since(state.since).as_millis() as u64,
            plan: state.plan,
            prompt_tokens: state.prompt_tokens,
            output_tokens: self.output_tokens.load(Ordering::Relaxed),
            prefiller: state.prefiller.as_deref().map(str::to_owned),
            decoder: state.decoder.as_deref().map(str::to_owned),
        }
    }
}
