//! Pages in advance: given to a channel before its sender names the chunks that they are for.
//!
//! ```text
//! free ─► advanced ─► held (a request's) ─► published …
//!            │  ▲        └── its chunk comes from somebody else ──► advanced
//!            │  └──────────────────────────────────────────────────────┘
//!            └─► quarantined (its channel is over) ─► free
//! ```
//!
//! The sender may write to such a page whenever it likes, so what the pool knows of its use changes nothing of that: the page is
//! nobody else's until the sender returns it, or cannot write any more.

use super::{Hold, Owner, Pool, State};

impl Pool {
    /// Up to `most` pages for a channel, if as many are to be had; cached chunks give way like at an admission.
    pub fn advance(&mut self, channel: Owner, most: u32) -> Vec<Hold> {
        if most > self.available() {
            return Vec::new();
        }
        self.make_room(most);
        let taken: Vec<Hold> = (0..most).map_while(|_| self.take(channel)).collect();
        for hold in &taken {
            self.set(hold.page, State::Advanced(channel));
        }
        taken
    }

    /// Whether that page is in the channel's hands, and no request's.
    pub fn is_advanced(&self, channel: Owner, hold: Hold) -> bool {
        self.is(hold, |s| matches!(s, State::Advanced(o) if *o == channel))
    }

    /// A page of the channel's becomes the request's.
    pub(super) fn adopt(&mut self, channel: Owner, owner: Owner, hold: Hold) -> Option<Hold> {
        self.is_advanced(channel, hold).then(|| {
            self.set(hold.page, State::Held(owner));
            hold
        })
    }

    /// A page that a request has adopted and does not need: it is the channel's again. False if the request does not hold it.
    pub fn disown(&mut self, owner: Owner, channel: Owner, hold: Hold) -> bool {
        let its = self.is_held(owner, hold);
        if its {
            self.set(hold.page, State::Advanced(channel));
        }
        its
    }

    /// The channel is over, and its sender may still write there.
    pub fn quarantine_advanced(&mut self, channel: Owner, hold: Hold) {
        if self.is_advanced(channel, hold) {
            self.set(hold.page, State::Quarantined(channel));
        }
    }

    /// The sender has returned the page, or cannot write any more.
    pub fn take_back(&mut self, channel: Owner, hold: Hold) {
        if self.is(hold, |s| matches!(s, State::Advanced(o) | State::Quarantined(o) if *o == channel)) {
            self.set_free(hold.page);
        }
    }
}
