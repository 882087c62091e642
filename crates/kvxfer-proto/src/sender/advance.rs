//! Pages in advance: what this side may write to before the receiver has answered.
//!
//! ```text
//! Advance ─► unused ─► chosen for a chunk ─┬─ the chunk's (Grant, or Resolved after Pending): a page like any other
//!               │                          └─ present, or the request has ended ─► not written to any more ─► Return
//!               └─ Recall, channel over ─► Return
//! ```
//!
//! A page is chosen once. What its chunk did not need goes back, and comes again under another generation: so an answer or a write
//! of an earlier request can never be taken for one of a later.

use super::{Chunk, Hold, Message, Output, Place, Sender, Slot, Write};
use crate::{ErrorCode, sender::Failure};
use std::collections::HashSet;

/// Most pages asked for in advance.
const MAX_ADVANCE: usize = 64;

/// What the channel has in advance.
#[derive(Default)]
pub(super) struct Advance {
    unused: Vec<Hold>,
    /// Number of the last message that brought some.
    number: u64,
    /// Writes to chosen pages that are nobody's any more, to be returned at their end.
    strays: HashSet<Write>,
}

impl Advance {
    /// Pages for a request of so many chunks, all or none, and how many to ask for so that one like it finds some.
    pub(super) fn choose(&mut self, chunks: usize) -> (Vec<Hold>, u32) {
        let left = self.unused.len().checked_sub(chunks);
        let chosen = left.map_or(Vec::new(), |left| self.unused.split_off(left));
        let wanted = if chunks > MAX_ADVANCE { 0 } else { chunks.saturating_sub(self.unused.len()) };
        (chosen, wanted as u32)
    }

    /// Whether a write to a page to be returned is under way.
    pub(super) fn has_strays(&self) -> bool {
        !self.strays.is_empty()
    }

    /// Whether that write, which has ended, was to a page to be returned.
    pub(super) fn is_stray(&mut self, write: &Write) -> bool {
        self.strays.remove(write)
    }
}

impl Chunk {
    /// A chunk with a page of this side's choice.
    pub(super) fn chosen(hold: Hold) -> Self {
        let Hold { page, generation } = hold;
        Self {
            place: Place::Page(page, generation),
            last: Some((page, generation)),
            chosen: Some(hold),
            ..Self::NEW
        }
    }
}

impl Sender {
    /// The receiver's pages for requests to come.
    pub(super) fn advanced(&mut self, number: u64, pages: &[Hold]) {
        let known = self.advance.unused.len() + pages.len();
        let inside = pages.iter().all(|h| h.page.0 < self.layout.pages());
        if number <= self.advance.number || !inside || known as u64 > u64::from(self.layout.pages()) {
            return;
        }
        self.advance.number = number;
        self.advance.unused.extend_from_slice(pages);
        if self.closed.is_some() {
            self.give_back_unused();
        }
    }

    /// Returns what is not chosen for anything.
    pub(super) fn give_back_unused(&mut self) {
        let unused = std::mem::take(&mut self.advance.unused);
        self.give_back(unused);
    }

    /// Returns pages to which nothing is written any more.
    pub(super) fn give_back(&mut self, pages: Vec<Hold>) {
        if !pages.is_empty() {
            let channel = self.channel;
            self.send(Message::Return { channel, pages });
        }
    }

    /// The receiver's word on a chunk whose page this side has chosen.
    pub(super) fn answered(&mut self, serial: u64, chunk: u32, slot: Slot) {
        let Some(r) = self.requests.get_mut(&serial) else { return };
        let c = &mut r.chunks[chunk as usize];
        let Some(hold) = c.chosen else { return };
        match slot {
            Slot::Pending => c.pending = true,
            Slot::Page { page, generation } if (Hold { page, generation }) == hold => {
                (c.chosen, c.pending) = (None, false);
            }
            Slot::Page { page, .. } => {
                let text = format!("the receiver granted page {page}, the chunk is on {}", hold.page);
                self.end(serial, Failure { code: ErrorCode::Protocol, text });
            }
            Slot::Present => {
                (c.chosen, c.pending) = (None, false);
                let was = std::mem::replace(&mut c.place, Place::Present);
                r.undone -= 1;
                let Hold { page, generation } = hold;
                if was == Place::Writing(page, generation) {
                    // Its bytes are still being read, and land where nobody looks.
                    r.in_flight -= 1;
                    self.advance.strays.insert(Write { serial, chunk, page, generation });
                } else {
                    if c.supplied {
                        self.outputs.push_back(Output::ChunkDone { serial, chunk });
                    }
                    self.give_back(vec![hold]);
                }
            }
        }
    }
}
