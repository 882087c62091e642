//! Chunks lent to a peer that reads them back: found for a query, pinned under a lease, given back.
//!
//! ```text
//! Query ─► Found, pages pinned ─► Release ─► Released{ok}
//!                   └─ lease over, channel or connection gone: pins back ─► Release ─► Released{stale}
//! ```
//!
//! The peer reads the pages by itself, at a time this side does not know. So a page is not used for another chunk while it is
//! lent (Contract line 2 seen from the reader), no peer keeps it for longer than a lease (line 5), and the answer to its release
//! tells it whether what it has read was still the chunk: the pins are a fact of this side, not of the reader's clock.

use super::{ErrorCode, Message, Output, PeerId, Receiver, Time};
use crate::ChunkKey;
use crate::pool::Hold;
use crate::wire::FoundChunk;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Most queries of one channel whose pages are lent.
pub(super) const MAX_LOANS: usize = 64;

/// Whose: peer, channel and query.
type LoanId = (PeerId, u64, u64);

struct Loan {
    chunks: Vec<FoundChunk>,
    until: Time,
}

/// What is lent.
#[derive(Default)]
pub(super) struct Loans {
    open: BTreeMap<LoanId, Loan>,
    ends: BTreeSet<(Time, LoanId)>,
}

impl Loans {
    /// When the next lease ends.
    pub(super) fn next_end(&self) -> Option<Time> {
        self.ends.first().map(|e| e.0)
    }

    /// Loans of a peer: of one channel, or of all.
    fn of(&self, peer: &PeerId, channel: Option<u64>) -> Vec<LoanId> {
        let from = (peer.clone(), channel.unwrap_or(0), 0);
        let to = (peer.clone(), channel.unwrap_or(u64::MAX), u64::MAX);
        self.open.range(from..=to).map(|(id, _)| id.clone()).collect()
    }

    fn add(&mut self, id: LoanId, loan: Loan) {
        self.ends.insert((loan.until, id.clone()));
        self.open.insert(id, loan);
    }

    fn take(&mut self, id: &LoanId) -> Option<Loan> {
        let loan = self.open.remove(id)?;
        self.ends.remove(&(loan.until, id.clone()));
        Some(loan)
    }

    /// For tests.
    pub(super) fn check(&self) -> Result<(), String> {
        let ends: BTreeSet<_> = self.open.iter().map(|(id, l)| (l.until, id.clone())).collect();
        if ends != self.ends {
            return Err(format!("{} loans and {} ends of leases differ", ends.len(), self.ends.len()));
        }
        Ok(())
    }
}

impl Receiver {
    pub(super) fn query(
        &mut self,
        now: Time,
        (peer, channel, query): (&PeerId, u64, u64),
        keys: &[ChunkKey],
        lease: Duration,
    ) {
        let id = (peer.clone(), channel, query);
        let open = self.loans.of(peer, Some(channel)).len();
        let Some(c) = self.channel(peer, channel) else { return };
        let stale = query <= c.last_query;
        c.last_query = c.last_query.max(query);
        // Asked again: the same answer, and what is left of the lease.
        if let Some(loan) = self.loans.open.get(&id) {
            let (chunks, left) = (loan.chunks.clone(), loan.until.since(now));
            self.found(id, chunks, left, ErrorCode::Ok, String::new());
            return;
        }
        let refusal = if stale {
            Some((ErrorCode::Stale, format!("query {query} has been asked before")))
        } else if let Some((code, text)) = &self.closed {
            Some((*code, text.clone()))
        } else if !lease.is_zero() && open >= MAX_LOANS {
            Some((
                ErrorCode::NoCapacity,
                format!("{open} queries of this channel hold pages already; release some"),
            ))
        } else {
            None
        };
        if let Some((code, text)) = refusal {
            self.found(id, Vec::new(), Duration::ZERO, code, super::clip(&text));
            return;
        }
        let chunks: Vec<FoundChunk> = keys
            .iter()
            .zip(0..)
            .filter_map(|(key, index)| {
                let (hold, len, origin) = self.pool.lend(key, !lease.is_zero())?;
                let Hold { page, generation } = hold;
                Some(FoundChunk {
                    index,
                    page,
                    generation,
                    len,
                    request: origin.request,
                    check: origin.check,
                })
            })
            .collect();
        let lease = if chunks.is_empty() { Duration::ZERO } else { lease.min(self.settings.lease) };
        if !lease.is_zero() {
            self.loans.add(id.clone(), Loan { chunks: chunks.clone(), until: now + lease });
        }
        self.found(id, chunks, lease, ErrorCode::Ok, String::new());
    }

    pub(super) fn release(&mut self, now: Time, (peer, channel, query): (&PeerId, u64, u64)) {
        let held = self.end_loan(&(peer.clone(), channel, query));
        let code = if held { ErrorCode::Ok } else { ErrorCode::Stale };
        self.outputs.push_back(Output::Send(peer.clone(), Message::Released { channel, query, code }));
        self.run_queue(now);
    }

    /// Takes the pins back whose lease has ended.
    pub(super) fn end_leases(&mut self, now: Time) {
        while let Some((_, id)) = self.loans.ends.first().filter(|e| e.0 <= now).cloned() {
            self.end_loan(&id);
        }
    }

    pub(super) fn end_loans(&mut self, peer: &PeerId, channel: Option<u64>) {
        for id in self.loans.of(peer, channel) {
            self.end_loan(&id);
        }
    }

    pub(super) fn end_all_loans(&mut self) {
        while let Some((id, _)) = self.loans.open.first_key_value() {
            let id = id.clone();
            self.end_loan(&id);
        }
    }

    fn end_loan(&mut self, id: &LoanId) -> bool {
        let Some(loan) = self.loans.take(id) else { return false };
        for c in loan.chunks {
            self.pool.unpin(Hold { page: c.page, generation: c.generation });
        }
        true
    }

    fn found(&mut self, id: LoanId, chunks: Vec<FoundChunk>, lease: Duration, code: ErrorCode, text: String) {
        let (peer, channel, query) = id;
        let lease_ms = lease.as_millis() as u64;
        let answer = Message::Found { channel, query, chunks, lease_ms, code, text };
        self.outputs.push_back(Output::Send(peer, answer));
    }
}
