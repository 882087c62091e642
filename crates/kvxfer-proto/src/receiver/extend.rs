//! Chunks that are named while their request is under way: a prefill that is cut into steps learns them step by step.
//!
//! The pages for them were granted with the request's admission, so naming them never waits for anything.

use super::requests::{ChunkState, Phase};
use super::{ErrorCode, Message, Owner, Placement, Receiver, Time};
use crate::plan::check_chunks;
use crate::wire::{Check, ChunkSpec, Slot};

impl Receiver {
    /// Chunks number `first` and following of a request. A repetition is answered again, a gap is ignored: the message before
    /// was lost, and the request ends by its deadline.
    pub(super) fn extend(&mut self, now: Time, owner: Owner, first: u32, chunks: &[ChunkSpec], last: bool) {
        let Some(r) = self.requests.get_mut(&owner).filter(|r| r.phase != Phase::Ended) else { return };
        let named = r.specs.len();
        let count = chunks.len();
        if first as usize != named {
            let from = first as usize;
            if from + count <= named && r.phase == Phase::Active && count > 0 {
                self.extended(owner, from, count);
            }
            return;
        }
        let problem = if count > r.more as usize {
            Some((ErrorCode::Protocol, format!("{count} further chunks were named, {} announced", r.more)))
        } else if count == 0 {
            None
        } else if let Err(e) = check_chunks(&self.settings.layout, chunks) {
            Some((ErrorCode::InvalidArgument, e.to_string()))
        } else {
            let twice = chunks.iter().find(|c| r.specs.iter().any(|s| s.key == c.key));
            twice.map(|c| (ErrorCode::InvalidArgument, format!("chunk {} is named twice", c.key)))
        };
        if let Some((code, text)) = problem {
            self.end(now, owner, code, &text, false);
            return;
        }
        r.specs.extend_from_slice(chunks);
        r.chunks.resize(named + count, ChunkState::None);
        r.attempts.resize(named + count, 0);
        r.checks.resize(named + count, Check::None);
        r.undone += count as u32;
        r.more -= count as u32;
        if r.phase == Phase::Active && !self.place(now, owner, named) {
            return;
        }
        if last {
            self.no_more(owner);
        }
        self.renew(now, owner);
        self.finish_if_done(now, owner);
        // Present chunks and the end of the list leave pages over.
        self.run_queue(now);
    }

    /// Places the chunks from `from` on; false when that ended the request.
    fn place(&mut self, now: Time, owner: Owner, from: usize) -> bool {
        let Some(r) = self.requests.get_mut(&owner) else { return false };
        for i in from..r.specs.len() {
            // One page was granted for each announced chunk.
            let Some(spare) = r.spares.pop() else { return false };
            match self.pool.place(owner, &r.specs[i], i as u32, spare) {
                Ok(Placement::Write(hold)) => r.chunks[i] = ChunkState::Granted(hold),
                Ok(Placement::Pending(hold)) => r.chunks[i] = ChunkState::Pending(hold),
                Ok(Placement::Present(hold)) => {
                    r.chunks[i] = ChunkState::Present(hold);
                    r.undone -= 1;
                }
                Err(conflict) => {
                    self.pool.give_back(owner, spare);
                    self.end(now, owner, ErrorCode::Mismatch, &conflict.to_string(), false);
                    return false;
                }
            }
        }
        let count = r.specs.len() - from;
        if count > 0 {
            self.extended(owner, from, count);
        }
        true
    }

    /// Tells the sender where chunks `first..first + count` go.
    fn extended(&mut self, owner: Owner, first: usize, count: usize) {
        let Some(r) = self.requests.get(&owner) else { return };
        let slots: Vec<Slot> = r.chunks[first..first + count].iter().map(ChunkState::slot).collect();
        let (channel, serial) = (r.channel, r.serial);
        let message = Message::Extended { channel, serial, first: first as u32, slots };
        r.send(&mut self.outputs, message);
    }

    /// Nothing further will be named: what was kept for it is free.
    fn no_more(&mut self, owner: Owner) {
        let Some(r) = self.requests.get_mut(&owner) else { return };
        r.more = 0;
        for spare in std::mem::take(&mut r.spares) {
            self.pool.give_back(owner, spare);
        }
    }
}
