//! The asking side's machine: which chunks a receiver has, for how long they may be read, and whether they still were when they
//! had been.
//!
//! ```text
//! ask ─► Query ─► Found ─► found: what may be read ─► (reads) ─► release ─► Released ─► released: what was read is good, or not
//! ```
//!
//! Reading is one-sided: the receiver does not see it. What was read counts only when the answer to the release says that the pages
//! were held until it came; a reader that was stopped for longer than the lease learns so, whatever its clock says.
//! Each query ends by [`Asker::found`] with a failure, by [`Asker::released`], or by [`Asker::give_up`].

use crate::layout::Layout;
use crate::sender::Failure;
use crate::wire::{FoundChunk, MAX_QUERY, Message};
use crate::{ChunkKey, ErrorCode};
use std::collections::HashMap;
use std::time::Duration;

/// What a receiver has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The chunks, in the order of the query; what is not here is absent.
    pub chunks: Vec<FoundChunk>,
    /// How long their pages are held; zero when nothing is.
    pub lease: Duration,
}

/// Why nothing was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// No key, or more than a query may have.
    #[error("{keys} keys; a query has 1 to {MAX_QUERY}, ask in parts")]
    Keys {
        /// How many.
        keys: usize,
    },
    /// The channel has ended.
    #[error("the channel has ended: {}", .0.text)]
    Closed(Failure),
}

impl AskError {
    /// The code for the caller.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Keys { .. } => ErrorCode::InvalidArgument,
            Self::Closed(failure) => failure.code,
        }
    }
}

enum State {
    /// Waits for the answer to a query of that many keys.
    Asked(usize),
    Answered(Result<Found, Failure>),
    /// Being read.
    Lent,
    /// Waits for the answer to its release.
    Releasing,
    Released(Result<(), Failure>),
}

/// The queries of one channel.
pub struct Asker {
    channel: u64,
    layout: Layout,
    next: u64,
    open: HashMap<u64, State>,
    closed: Option<Failure>,
}

impl Asker {
    /// The machine of a channel to a pool of that layout.
    pub fn new(channel: u64, layout: Layout) -> Self {
        Self { channel, layout, next: 1, open: HashMap::new(), closed: None }
    }

    /// A query and its number; `lease` of zero only asks, and what is found is not held.
    pub fn ask(&mut self, keys: Vec<ChunkKey>, lease: Duration) -> Result<(u64, Message), AskError> {
        if let Some(failure) = &self.closed {
            return Err(AskError::Closed(failure.clone()));
        }
        if keys.is_empty() || keys.len() > MAX_QUERY {
            return Err(AskError::Keys { keys: keys.len() });
        }
        let (channel, query) = (self.channel, self.next);
        self.next += 1;
        self.open.insert(query, State::Asked(keys.len()));
        // Less than a millisecond is not nothing.
        let lease_ms = lease.as_nanos().div_ceil(1_000_000).min(u128::from(u64::MAX)) as u64;
        Ok((query, Message::Query { channel, query, keys, lease_ms }))
    }

    /// The answer, once it has come. A failure, or one that holds nothing, ends the query.
    pub fn found(&mut self, query: u64) -> Option<Result<Found, Failure>> {
        let state = self.open.get_mut(&query)?;
        if !matches!(state, State::Answered(_)) {
            return None;
        }
        let State::Answered(answer) = std::mem::replace(state, State::Lent) else { return None };
        if answer.as_ref().map_or(true, |f| f.lease.is_zero()) {
            self.open.remove(&query);
        }
        Some(answer)
    }

    /// Nothing of it is read any more; [`Asker::released`] tells whether what was read is good.
    pub fn release(&mut self, query: u64) -> Option<Message> {
        let state = self.open.get_mut(&query).filter(|s| matches!(s, State::Lent))?;
        if let Some(failure) = &self.closed {
            *state = State::Released(Err(failure.clone()));
            return None;
        }
        *state = State::Releasing;
        Some(Message::Release { channel: self.channel, query })
    }

    /// The answer to a release, once it has come.
    pub fn released(&mut self, query: u64) -> Option<Result<(), Failure>> {
        match self.open.get(&query) {
            Some(State::Released(_)) => {}
            _ => return None,
        }
        match self.open.remove(&query) {
            Some(State::Released(result)) => Some(result),
            _ => None,
        }
    }

    /// Nobody waits for it or reads it any more: what is to be told to the receiver, if anything.
    pub fn give_up(&mut self, query: u64) -> Option<Message> {
        let state = self.open.remove(&query)?;
        let holds = !matches!(state, State::Releasing | State::Released(_));
        (holds && self.closed.is_none()).then_some(Message::Release { channel: self.channel, query })
    }

    /// A message came. False: it is not an answer to this channel's queries.
    pub fn message(&mut self, message: &Message) -> bool {
        if message.channel() != Some(self.channel) {
            return false;
        }
        match message {
            Message::Found { query, chunks, lease_ms, code, text, .. } => {
                if let Some(state) = self.open.get_mut(query)
                    && let State::Asked(keys) = *state
                {
                    *state = State::Answered(if *code == ErrorCode::Ok {
                        answer(&self.layout, keys, chunks, Duration::from_millis(*lease_ms))
                    } else {
                        Err(Failure { code: *code, text: text.clone() })
                    });
                }
                true
            }
            Message::Released { query, code, .. } => {
                if let Some(state) = self.open.get_mut(query)
                    && matches!(state, State::Releasing)
                {
                    *state = State::Released(match code {
                        ErrorCode::Ok => Ok(()),
                        code => {
                            let text = "the lease ended before the chunks had been read: their pages may have been reused";
                            Err(Failure { code: *code, text: text.into() })
                        }
                    });
                }
                true
            }
            _ => false,
        }
    }

    /// The channel has ended: everything that waits for an answer has failed, and what is being read will not be confirmed.
    pub fn close(&mut self, failure: &Failure) {
        self.closed.get_or_insert_with(|| failure.clone());
        for state in self.open.values_mut() {
            match state {
                State::Asked(_) => *state = State::Answered(Err(failure.clone())),
                State::Lent | State::Releasing => *state = State::Released(Err(failure.clone())),
                State::Answered(_) | State::Released(_) => {}
            }
        }
    }

    /// Queries that have not ended.
    pub fn open(&self) -> usize {
        self.open.len()
    }
}

/// Checks what a receiver says it has: nothing from the wire is trusted.
fn answer(layout: &Layout, keys: usize, chunks: &[FoundChunk], lease: Duration) -> Result<Found, Failure> {
    let mut next = 0;
    for c in chunks {
        if c.index < next || c.index as usize >= keys {
            let text = format!("the receiver found chunk {} of a query of {keys}, out of order", c.index);
            return Err(Failure { code: ErrorCode::Protocol, text });
        }
        next = c.index + 1;
        if c.page.0 >= layout.pages() || c.len == 0 || c.len > layout.page_bytes() {
            let text = format!(
                "the receiver found {} bytes on page {}; its pool has {} pages of {}",
                c.len,
                c.page,
                layout.pages(),
                layout.page_bytes()
            );
            return Err(Failure { code: ErrorCode::Protocol, text });
        }
    }
    Ok(Found { chunks: chunks.to_vec(), lease })
}
