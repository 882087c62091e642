//! Pages in advance: a sender that has some need not wait for an answer before it writes.
//!
//! ```text
//! Reserve{advance: n} ─► Advance ─┬─► Reserve{places} ─► Grant: the chunk's page from now on, or present
//!                                 └─► Recall, if others wait ─► Return        └─► Return, once it is not written to
//! ```
//!
//! A request with places takes nothing from anybody, so it never waits, and no request that waits holds pages (Contract line 4). What
//! is out in advance is bounded, is recalled as soon as a request waits, and is not given while one does. A page that a sender has
//! in advance is a page it may be writing to: only the sender returns it, or its fence (line 2). So every page is named in one
//! [`Message::Reserve`] at most: what a request did not need comes back and goes out under a new generation.

use super::{ErrorCode, Hold, Message, Output, Owner, PeerId, Receiver};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What one channel has in advance.
pub(super) struct Advance {
    /// Holds the pages.
    pub(super) owner: Owner,
    /// Its last number.
    number: u64,
    out: BTreeMap<u32, Hold>,
    recalled: bool,
}

/// Pages that a request names, and their holder.
type Places = (Owner, Vec<Hold>);

/// Channels that have something in advance; also those that are over, until it is back.
pub(super) type Advances = BTreeMap<(PeerId, u64), Advance>;

impl Receiver {
    /// The pages of a request that names some, with their holder, if all are the channel's, each once.
    pub(super) fn places(
        &self,
        peer: &PeerId,
        channel: u64,
        places: &[Hold],
    ) -> Result<Option<Places>, (ErrorCode, String)> {
        if places.is_empty() {
            return Ok(None);
        }
        let advance = self.advances.get(&(peer.clone(), channel));
        let mut seen = BTreeSet::new();
        for p in places {
            let known = advance.and_then(|a| a.out.get(&p.page.0));
            if known != Some(p) || !seen.insert(p.page.0) {
                let text = format!("page {} of generation {} is not this channel's", p.page, p.generation);
                return Err((ErrorCode::Stale, text));
            }
        }
        Ok(advance.map(|a| (a.owner, places.to_vec())))
    }

    /// Gives a channel as many pages in advance as it asks for, or none.
    pub(super) fn advance(&mut self, peer: &PeerId, channel: u64, wanted: u32) {
        if wanted == 0 || !self.queue.is_empty() || self.closed.is_some() {
            return;
        }
        let channels = self.channels.values().map(HashMap::len).sum::<usize>().max(1) as u32;
        let limit = self.settings.advance;
        let out = self.pool.counts().advanced;
        let id = (peer.clone(), channel);
        let mine = self.advances.get(&id).map_or(0, |a| a.out.len() as u32);
        let fair = (limit / channels).max(1);
        if out.saturating_add(wanted) > limit || mine.saturating_add(wanted) > fair {
            return;
        }
        let known = self.advances.get(&id).map(|a| a.owner);
        let owner = known.unwrap_or_else(|| self.new_owner());
        let given = self.pool.advance(owner, wanted);
        if given.is_empty() {
            return;
        }
        let new = || Advance { owner, number: 0, out: BTreeMap::new(), recalled: false };
        let a = self.advances.entry(id).or_insert_with(new);
        a.number += 1;
        a.recalled = false;
        a.out.extend(given.iter().map(|h| (h.page.0, *h)));
        let message = Message::Advance { channel, number: a.number, pages: given };
        self.outputs.push_back(Output::Send(peer.clone(), message));
    }

    /// Pages that a request has got for good are not in advance any more.
    pub(super) fn taken_from(&mut self, peer: &PeerId, channel: u64, taken: impl Iterator<Item = Hold>) {
        if let Some(a) = self.advances.get_mut(&(peer.clone(), channel)) {
            taken.for_each(|h| {
                a.out.remove(&h.page.0);
            });
        }
    }

    /// A page that a request does not need after all, and that the sender may be writing to, is in advance again.
    pub(super) fn back_to(&mut self, peer: &PeerId, channel: u64, owner: Owner, hold: Hold) {
        let closing = self.channel(peer, channel).is_none_or(|c| c.closing) || self.closed.is_some();
        if let Some(a) = self.advances.get_mut(&(peer.clone(), channel))
            && self.pool.disown(owner, a.owner, hold)
        {
            a.out.insert(hold.page.0, hold);
            if closing {
                self.pool.quarantine_advanced(a.owner, hold);
            }
        }
    }

    /// Asks for everything that is out in advance, because a request waits.
    pub(super) fn recall(&mut self) {
        if self.queue.is_empty() || self.pool.counts().advanced == 0 {
            return;
        }
        for ((peer, channel), a) in &mut self.advances {
            if !a.out.is_empty() && !std::mem::replace(&mut a.recalled, true) {
                let recall = Message::Recall { channel: *channel };
                self.outputs.push_back(Output::Send(peer.clone(), recall));
            }
        }
    }

    /// Pages come back.
    pub(super) fn returned(&mut self, peer: &PeerId, channel: u64, pages: &[Hold]) {
        let Some(a) = self.advances.get_mut(&(peer.clone(), channel)) else { return };
        for hold in pages {
            if a.out.get(&hold.page.0) == Some(hold) {
                a.out.remove(&hold.page.0);
                self.pool.take_back(a.owner, *hold);
            }
        }
    }

    /// The channels of a peer are over, or one of them: their pages wait until nothing can be written there any more.
    pub(super) fn quarantine_advances(&mut self, which: impl Fn(&PeerId, u64) -> bool) {
        for (_, a) in self.advances.iter().filter(|((peer, channel), _)| which(peer, *channel)) {
            a.out.values().for_each(|h| self.pool.quarantine_advanced(a.owner, *h));
        }
    }

    /// No write of that peer can land any more.
    pub(super) fn end_advances(&mut self, peer: &PeerId) {
        let pool = &mut self.pool;
        self.advances.retain(|(p, _), a| {
            let over = p == peer;
            if over {
                a.out.values().for_each(|h| pool.take_back(a.owner, *h));
            }
            !over
        });
    }

    /// Whether a channel has nothing in advance.
    pub(super) fn nothing_in_advance(&self, peer: &PeerId, channel: u64) -> bool {
        self.advances.get(&(peer.clone(), channel)).is_none_or(|a| a.out.is_empty())
    }

    /// For tests: pages out in advance, and how many of them wait in quarantine.
    pub(super) fn check_advances(&self) -> Result<(u32, u32), String> {
        let (mut advanced, mut quarantined) = (0, 0);
        for ((peer, channel), a) in &self.advances {
            for h in a.out.values() {
                if self.pool.is_advanced(a.owner, *h) {
                    advanced += 1;
                } else if self.pool.page(h.page) == Some((crate::pool::Use::Quarantined, h.generation)) {
                    quarantined += 1;
                } else {
                    return Err(format!("{h:?} is not {}'s on channel {channel}", peer.name));
                }
            }
        }
        Ok((advanced, quarantined))
    }
}
