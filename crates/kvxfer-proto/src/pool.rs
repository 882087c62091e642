//! The page pool of a receiver: who owns each page, which chunk is where, what may be thrown out.
//!
//! A page is free, held by a request (to be written, or spare), published, or in quarantine; its *generation* grows each time it
//! is handed out, so a late message about an earlier use can be told apart.
//!
//! *Claims.* A published chunk lives while somebody claims it. A request claims its chunks, written or found present, while
//! it is under way; when it succeeds the claim passes to the consumer it announced, and [`Pool::remove`] gives one such claim
//! back; when it fails its claims are void. The chunk leaves the index with its last claim, and its page is free once the
//! last pin is gone. So two requests that share a prefix can both be consumed and removed, in any order.
//!
//! *Room.* A chunk whose consumer has not come yet (nobody acquired it since a request announced it) is protected for the
//! retention time and dropped after it. A chunk that has been acquired, is not pinned and not claimed by a request under
//! way is a cached one: it stays for later requests with the same prefix until admission needs its page, least recently used
//! first.
//!
//! *Leftovers.* A consumer that has given one chunk of a request back is about to give back all it needed of it, or has done so
//! already. What nobody has acquired of that request [`LEFTOVER`] later is not waited for any longer.
//!
//! *Loans.* A chunk that is lent to a peer which reads it back is pinned like one that the engine has, but that peer is not the
//! consumer it waits for: no claim and no retention changes.
//!
//! *Spares.* A request that names a chunk another one is writing is given a page for it all the same and keeps it until that
//! write is decided. If the write fails the page is there, without waiting for anybody: so no request that holds pages ever
//! waits for pages (Contract lines 4 and 6). For the same reason a request that cannot name all its chunks yet is given pages
//! for those as well, and places each chunk on one of them once it is named.
//!
//! *Advance.* A sender may have pages before it names chunks for them; see `advance`.

mod advance;

pub use crate::Hold;
use crate::wire::{Check, ChunkSpec};
use crate::{ChunkKey, Generation, PageIndex, RequestId, Time};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// How long the rest of a request is kept whose consumer has given a part of it back.
pub const LEFTOVER: Duration = Duration::from_secs(5);

/// A reservation at this receiver; numbered by the receiver machine, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub u64);

/// What admission gave one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A page to write.
    Write(Hold),
    /// Published here already; claimed for the request.
    Present(Hold),
    /// Another request writes it; a spare page is held until that is decided.
    Pending(Hold),
}

/// What admission gave one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Per chunk, in order.
    pub placements: Vec<Placement>,
    /// Pages for the chunks not named yet.
    pub spares: Vec<Hold>,
}

/// Where admission takes a request's pages from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// What is free or cached: for its chunks, and this many for chunks that it has not named yet.
    Room(u32),
    /// What its sender has in advance: the channel's pages, one for each chunk.
    Advance(Owner, &'a [Hold]),
}

/// What is known of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Published, with this many valid bytes.
    Published(u64),
    /// Being written.
    Writing,
    /// Nothing.
    Absent,
}

/// Where a published chunk comes from: what whoever reads it back checks it against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The request that wrote it.
    pub request: RequestId,
    /// What its writer said of its bytes.
    pub check: Check,
}

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing.
    Free,
    /// To be written, or spare.
    Held,
    /// In a sender's hands, for a request to come.
    Advanced,
    /// A published chunk.
    Published,
    /// Nothing, until no write can land any more.
    Quarantined,
}

/// The same key with another length: equal keys must mean equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chunk {key} has {ours} bytes here and {theirs} in the request")]
pub struct LengthConflict {
    /// The key.
    pub key: ChunkKey,
    /// Length here.
    pub ours: u64,
    /// Length in the request.
    pub theirs: u64,
}

/// Pages by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Free.
    pub free: u32,
    /// Granted and being written, or held spare for a pending chunk.
    pub writing: u32,
    /// In the hands of senders, for requests to come.
    pub advanced: u32,
    /// Published (also those removed but still pinned).
    pub published: u32,
    /// Published and pinned.
    pub pinned: u32,
    /// Waiting until no write can land any more.
    pub quarantined: u32,
}

struct Page {
    generation: Generation,
    state: State,
}

enum State {
    Free,
    Held(Owner),
    Advanced(Owner),
    Published(Published),
    Quarantined(Owner),
}

/// A published chunk.
#[derive(Clone, Debug)]
struct Published {
    /// `None` once it has left the index and only pins keep its page.
    key: Option<ChunkKey>,
    len: u64,
    origin: Origin,
    pins: u32,
    /// Claims of requests under way.
    active: i64,
    /// Claims of announced consumers; negative while consumers were faster than the requests that announce them.
    claims: i64,
    /// Announced consumers that have not acquired it yet; negative as above.
    awaited: i64,
    expires: Time,
    last_use: u64,
    /// The requests that announced it, oldest first, of which nothing has been given back yet.
    groups: VecDeque<Owner>,
}

enum Entry {
    Writing { owner: Owner, len: u64, waiters: VecDeque<(Owner, u32)> },
    Published(PageIndex),
}

/// The pool.
pub struct Pool {
    pages: Vec<Page>,
    free: Vec<PageIndex>,
    index: HashMap<ChunkKey, Entry>,
    /// Cached chunks by last use.
    cached: BTreeSet<(u64, PageIndex)>,
    /// Chunks whose consumer has not come, by the end of their retention.
    awaited: BTreeSet<(Time, PageIndex)>,
    /// Chunks of the requests of which nothing has been given back yet.
    groups: HashMap<Owner, Vec<Hold>>,
    uses: u64,
    counts: Counts,
    retention: Duration,
}

impl Pool {
    /// A pool of `pages` free pages.
    pub fn new(pages: u32, retention: Duration) -> Self {
        Self {
            pages: (0..pages).map(|_| Page { generation: Generation(0), state: State::Free }).collect(),
            // Low numbers first: a pool that is never full touches the front of its memory only.
            free: (0..pages).rev().map(PageIndex).collect(),
            index: HashMap::new(),
            cached: BTreeSet::new(),
            awaited: BTreeSet::new(),
            groups: HashMap::new(),
            uses: 0,
            counts: Counts { free: pages, ..Counts::default() },
            retention,
        }
    }

    /// Pages in all.
    pub fn pages(&self) -> u32 {
        self.pages.len() as u32
    }
    /// Pages by state.
    pub fn counts(&self) -> Counts {
        self.counts
    }
    /// Pages admission could have now: free ones and cached ones.
    pub fn available(&self) -> u32 {
        self.counts.free + self.cached.len() as u32
    }
    /// What is known of a key.
    pub fn known(&self, key: &ChunkKey) -> Known {
        match self.index.get(key) {
            None => Known::Absent,
            Some(Entry::Writing { .. }) => Known::Writing,
            Some(Entry::Published(page)) => {
                self.published(*page).map_or(Known::Absent, |p| Known::Published(p.len))
            }
        }
    }

    /// What a page is used for, and its generation; for tests and reports.
    pub fn page(&self, page: PageIndex) -> Option<(Use, Generation)> {
        let p = self.pages.get(page.0 as usize)?;
        let usage = match p.state {
            State::Free => Use::Free,
            State::Held(_) => Use::Held,
            State::Advanced(_) => Use::Advanced,
            State::Published(_) => Use::Published,
            State::Quarantined(_) => Use::Quarantined,
        };
        Some((usage, p.generation))
    }

    // ---- requests ----

    /// Pages a request for `chunks` would need now.
    pub fn need(&self, chunks: &[ChunkSpec]) -> u32 {
        chunks.iter().filter(|c| !matches!(self.index.get(&c.key), Some(Entry::Published(_)))).count() as u32
    }

    /// Gives `owner` everything it needs for `chunks` (keys distinct), or nothing: `None` when there is not enough room now. With pages of an
    /// advance (distinct, each the channel's: [`Pool::is_advanced`]) there always is; those of chunks that are here already stay the
    /// channel's.
    pub fn admit(
        &mut self,
        owner: Owner,
        chunks: &[ChunkSpec],
        source: Source<'_>,
    ) -> Result<Option<Admitted>, LengthConflict> {
        let more = if let Source::Room(more) = source { more } else { 0 };
        let (mut need, mut cached_own) = (more, 0);
        for c in chunks {
            let ours = match self.index.get(&c.key) {
                None => {
                    need += 1;
                    continue;
                }
                Some(Entry::Writing { len, .. }) => {
                    need += 1;
                    *len
                }
                Some(Entry::Published(page)) => {
                    let Some(p) = self.published(*page) else { continue };
                    cached_own += u32::from(self.cached.contains(&(p.last_use, *page)));
                    p.len
                }
            };
            if ours != c.len {
                return Err(LengthConflict { key: c.key.clone(), ours, theirs: c.len });
            }
        }
        if let Source::Advance(channel, pages) = source {
            if pages.len() != chunks.len() || !pages.iter().all(|h| self.is_advanced(channel, *h)) {
                return Ok(None);
            }
            need = 0;
        }
        if need > self.available() - cached_own {
            return Ok(None);
        }
        // Present chunks are claimed first: making room must not throw them out.
        let mut placements: Vec<Option<Placement>> = chunks
            .iter()
            .map(|c| match self.index.get(&c.key) {
                Some(Entry::Published(page)) => Some(Placement::Present(self.claim(*page))),
                _ => None,
            })
            .collect();
        self.make_room(need);
        for (i, c) in chunks.iter().enumerate() {
            if placements[i].is_none() {
                let taken = match source {
                    Source::Room(_) => self.take(owner),
                    Source::Advance(channel, pages) => self.adopt(channel, owner, pages[i]),
                };
                let Some(hold) = taken else { break };
                placements[i] =
                    Some(if let Some(Entry::Writing { waiters, .. }) = self.index.get_mut(&c.key) {
                        waiters.push_back((owner, i as u32));
                        Placement::Pending(hold)
                    } else {
                        let entry = Entry::Writing { owner, len: c.len, waiters: VecDeque::new() };
                        self.index.insert(c.key.clone(), entry);
                        Placement::Write(hold)
                    });
            }
        }
        let spares: Vec<Hold> = (0..more).map_while(|_| self.take(owner)).collect();
        // The check above guarantees that every chunk has its page.
        let placements = placements.into_iter().collect::<Option<Vec<_>>>();
        Ok(placements.map(|placements| Admitted { placements, spares }))
    }

    /// Places chunk number `chunk` of an admitted request, named only now, on a page that was kept for it. A chunk that is here
    /// already gives the page back.
    pub fn place(
        &mut self,
        owner: Owner,
        spec: &ChunkSpec,
        chunk: u32,
        spare: Hold,
    ) -> Result<Placement, LengthConflict> {
        let conflict = |ours| LengthConflict { key: spec.key.clone(), ours, theirs: spec.len };
        match self.index.get_mut(&spec.key) {
            None => {
                let entry = Entry::Writing { owner, len: spec.len, waiters: VecDeque::new() };
                self.index.insert(spec.key.clone(), entry);
                Ok(Placement::Write(spare))
            }
            Some(Entry::Writing { len, .. }) if *len != spec.len => Err(conflict(*len)),
            Some(Entry::Writing { waiters, .. }) => {
                waiters.push_back((owner, chunk));
                Ok(Placement::Pending(spare))
            }
            Some(Entry::Published(page)) => {
                let page = *page;
                match self.published(page).map(|p| p.len) {
                    Some(len) if len != spec.len => Err(conflict(len)),
                    _ => {
                        self.give_back(owner, spare);
                        Ok(Placement::Present(self.claim(page)))
                    }
                }
            }
        }
    }

    /// The write of `key` by `owner` has been checked: visible from now on, claimed by its request and all who waited, who are
    /// returned. `None` if `owner` does not hold that page for that key.
    pub fn publish(
        &mut self,
        owner: Owner,
        key: &ChunkKey,
        hold: Hold,
        origin: Origin,
    ) -> Option<Vec<(Owner, u32)>> {
        if !self.is_held(owner, hold) {
            return None;
        }
        let Some(Entry::Writing { owner: writer, len, waiters }) = self.index.get_mut(key) else {
            return None;
        };
        if *writer != owner {
            return None;
        }
        let (len, waiters) = (*len, Vec::from(std::mem::take(waiters)));
        self.index.insert(key.clone(), Entry::Published(hold.page));
        self.uses += 1;
        let published = Published {
            key: Some(key.clone()),
            len,
            origin,
            pins: 0,
            active: 1 + waiters.len() as i64,
            claims: 0,
            awaited: 0,
            expires: Time::NEVER,
            last_use: self.uses,
            groups: VecDeque::new(),
        };
        self.set(hold.page, State::Published(published));
        Some(waiters)
    }

    /// `owner` will not finish its write of `key`: the first who waits for it takes over and is returned.
    pub fn fail_write(&mut self, owner: Owner, key: &ChunkKey) -> Option<(Owner, u32)> {
        let Some(Entry::Writing { owner: writer, waiters, .. }) = self.index.get_mut(key) else {
            return None;
        };
        if *writer != owner {
            return None;
        }
        if let Some((next, chunk)) = waiters.pop_front() {
            *writer = next;
            return Some((next, chunk));
        }
        self.index.remove(key);
        None
    }

    /// `owner` no longer waits for the write of `key`.
    pub fn stop_waiting(&mut self, owner: Owner, key: &ChunkKey) {
        if let Some(Entry::Writing { waiters, .. }) = self.index.get_mut(key) {
            waiters.retain(|(o, _)| *o != owner);
        }
    }

    /// Hands a held page to its owner once more, under a new generation: the write before has ended.
    pub fn renew(&mut self, owner: Owner, hold: Hold) -> Option<Hold> {
        if !self.is_held(owner, hold) {
            return None;
        }
        let page = &mut self.pages[hold.page.0 as usize];
        page.generation.0 += 1;
        Some(Hold { generation: page.generation, ..hold })
    }

    /// A held page goes back: no write to it is under way.
    pub fn give_back(&mut self, owner: Owner, hold: Hold) {
        if self.is_held(owner, hold) {
            self.set_free(hold.page);
        }
    }

    /// A held page whose owner's writes may still land: nobody gets it before [`Pool::end_quarantine`].
    pub fn quarantine(&mut self, owner: Owner, hold: Hold) {
        if self.is_held(owner, hold) {
            self.set(hold.page, State::Quarantined(owner));
        }
    }

    /// No write of `owner` can land any more.
    pub fn end_quarantine(&mut self, owner: Owner, page: PageIndex) {
        if matches!(self.pages.get(page.0 as usize), Some(Page { state: State::Quarantined(o), .. }) if *o == owner)
        {
            self.set_free(page);
        }
    }

    /// A request under way that claimed this chunk has ended: with success its consumer is announced, else the claim is void.
    pub fn settle(&mut self, hold: Hold, success: bool, now: Time) {
        let expires = now + self.retention;
        self.change(hold, |p| {
            p.active -= 1;
            if success {
                p.claims += 1;
                p.awaited += 1;
                p.expires = expires;
            }
        });
    }

    /// The chunks of a request that has succeeded, each settled: one consumer will come for them.
    pub fn announce(&mut self, request: Owner, chunks: Vec<Hold>) {
        // A consumer may have been faster than its announcement: what has gone already is nobody's any more.
        let here = |h: &Hold| {
            let page = &self.pages[h.page.0 as usize];
            page.generation == h.generation && matches!(&page.state, State::Published(p) if p.key.is_some())
        };
        let chunks: Vec<Hold> = chunks.into_iter().filter(here).collect();
        for &hold in &chunks {
            self.change(hold, |p| p.groups.push_back(request));
        }
        if !chunks.is_empty() {
            self.groups.insert(request, chunks);
        }
    }

    // ---- consumers ----

    /// Pins a published chunk: its page keeps its bytes until as many [`Pool::unpin`]s.
    pub fn pin(&mut self, key: &ChunkKey) -> Option<(Hold, u64)> {
        let Some(Entry::Published(page)) = self.index.get(key) else { return None };
        let hold = Hold { page: *page, generation: self.pages[page.0 as usize].generation };
        self.uses += 1;
        let (uses, mut len) = (self.uses, 0);
        self.change(hold, |p| {
            p.pins += 1;
            p.awaited -= 1;
            p.last_use = uses;
            len = p.len;
        });
        Some((hold, len))
    }

    /// A published chunk as whoever reads it back needs to know it: its hold, valid bytes and origin. `lend` pins it.
    pub fn lend(&mut self, key: &ChunkKey, lend: bool) -> Option<(Hold, u64, Origin)> {
        let Some(Entry::Published(page)) = self.index.get(key) else { return None };
        let hold = Hold { page: *page, generation: self.pages[page.0 as usize].generation };
        let (len, origin) = self.published(hold.page).map(|p| (p.len, p.origin.clone()))?;
        if lend {
            self.uses += 1;
            let uses = self.uses;
            self.change(hold, |p| {
                p.pins += 1;
                p.last_use = uses;
            });
        }
        Some((hold, len, origin))
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, hold: Hold) {
        self.change(hold, |p| p.pins = p.pins.saturating_sub(1));
    }

    /// Gives one consumer's claim back. False when no such chunk is published.
    pub fn remove(&mut self, now: Time, key: &ChunkKey) -> bool {
        let Some(Entry::Published(page)) = self.index.get(key) else { return false };
        let hold = Hold { page: *page, generation: self.pages[page.0 as usize].generation };
        let mut group = None;
        self.change(hold, |p| {
            p.claims -= 1;
            p.awaited = p.awaited.min(p.claims.max(0));
            group = p.groups.pop_front();
        });
        let rest = group.and_then(|g| self.groups.remove(&g)).unwrap_or_default();
        for hold in rest {
            self.change(hold, |p| {
                p.groups.retain(|g| Some(*g) != group);
                // Another request may have announced it to a consumer of its own.
                if p.awaited <= 1 {
                    p.expires = p.expires.min(now + LEFTOVER);
                }
            });
        }
        true
    }

    /// Drops the chunks whose consumer has not come within the retention time.
    pub fn expire(&mut self, now: Time) {
        while let Some(&(at, page)) = self.awaited.first() {
            if at > now {
                break;
            }
            self.drop_chunk(page);
        }
    }

    /// A chunk has left: it is no longer part of what these requests announced.
    fn ungroup(&mut self, groups: VecDeque<Owner>, page: PageIndex) {
        for group in groups {
            if let Some(chunks) = self.groups.get_mut(&group) {
                chunks.retain(|c| c.page != page);
                if chunks.is_empty() {
                    self.groups.remove(&group);
                }
            }
        }
    }

    /// When [`Pool::expire`] has something to do next.
    pub fn next_expiry(&self) -> Option<Time> {
        self.awaited.first().map(|&(at, _)| at)
    }

    // ---- inside ----

    fn published(&self, page: PageIndex) -> Option<&Published> {
        match &self.pages[page.0 as usize].state {
            State::Published(p) => Some(p),
            _ => None,
        }
    }

    fn is_held(&self, owner: Owner, hold: Hold) -> bool {
        self.is(hold, |s| matches!(s, State::Held(o) if *o == owner))
    }

    fn is(&self, hold: Hold, f: impl FnOnce(&State) -> bool) -> bool {
        self.pages.get(hold.page.0 as usize).is_some_and(|p| p.generation == hold.generation && f(&p.state))
    }

    /// One more request under way counts on this published chunk.
    fn claim(&mut self, page: PageIndex) -> Hold {
        let hold = Hold { page, generation: self.pages[page.0 as usize].generation };
        self.uses += 1;
        let uses = self.uses;
        self.change(hold, |p| {
            p.active += 1;
            p.last_use = uses;
        });
        hold
    }

    /// Throws out cached chunks until as many pages are free, as far as there are any.
    fn make_room(&mut self, pages: u32) {
        while self.counts.free < pages {
            let Some(&(_, page)) = self.cached.first() else { break };
            self.drop_chunk(page);
        }
    }

    fn take(&mut self, owner: Owner) -> Option<Hold> {
        let page = self.free.pop()?;
        self.set(page, State::Held(owner));
        let p = &mut self.pages[page.0 as usize];
        p.generation.0 += 1;
        Some(Hold { page, generation: p.generation })
    }

    /// Changes a published chunk and draws the consequences: which set it is in, whether it leaves the index or its page.
    fn change(&mut self, hold: Hold, f: impl FnOnce(&mut Published)) {
        let Some(page) = self.pages.get_mut(hold.page.0 as usize) else { return };
        if page.generation != hold.generation {
            return;
        }
        let State::Published(p) = &mut page.state else { return };
        self.cached.remove(&(p.last_use, hold.page));
        self.awaited.remove(&(p.expires, hold.page));
        let pinned = p.pins > 0;
        f(p);
        // A consumer can be ahead of the requests under way only.
        p.claims = p.claims.max(-p.active);
        p.awaited = p.awaited.max(-p.active);
        self.counts.pinned = self.counts.pinned + u32::from(p.pins > 0) - u32::from(pinned);
        let mut left = VecDeque::new();
        if p.active + p.claims <= 0
            && let Some(key) = p.key.take()
        {
            left = std::mem::take(&mut p.groups);
            self.index.remove(&key);
        }
        if p.key.is_none() {
            if p.pins == 0 {
                self.set_free(hold.page);
            }
            self.ungroup(left, hold.page);
        } else if p.pins == 0 && p.active == 0 {
            if p.awaited > 0 {
                self.awaited.insert((p.expires, hold.page));
            } else {
                self.cached.insert((p.last_use, hold.page));
            }
        }
    }

    /// Takes a chunk that nobody pins or claims under way out of the index and frees its page.
    fn drop_chunk(&mut self, page: PageIndex) {
        let hold = Hold { page, generation: self.pages[page.0 as usize].generation };
        self.change(hold, |p| p.claims = -p.active);
    }

    fn set_free(&mut self, page: PageIndex) {
        self.set(page, State::Free);
        self.free.push(page);
    }

    fn set(&mut self, page: PageIndex, state: State) {
        let old = std::mem::replace(&mut self.pages[page.0 as usize].state, state);
        *self.counts.of(&old) -= 1;
        let counts = &mut self.counts;
        *counts.of(&self.pages[page.0 as usize].state) += 1;
    }

    /// Compares all bookkeeping with the pages themselves; the text says what differs. For tests: it looks at every page.
    pub fn check(&self) -> Result<(), String> {
        let mut counts = Counts::default();
        for (i, page) in self.pages.iter().enumerate() {
            let at = PageIndex(i as u32);
            *counts.of(&page.state) += 1;
            if matches!(page.state, State::Free) != self.free.contains(&at) {
                return Err(format!("page {at} and the free list differ"));
            }
            let (mut cached, mut awaited) = (false, false);
            if let State::Published(p) = &page.state {
                counts.pinned += u32::from(p.pins > 0);
                let indexed = p.key.as_ref().is_some_and(
                    |k| matches!(self.index.get(k), Some(Entry::Published(there)) if *there == at),
                );
                if indexed != (p.active + p.claims > 0) || (!indexed && p.pins == 0) {
                    return Err(format!("page {at} is published, indexed: {indexed}, {p:?}"));
                }
                let idle = indexed && p.pins == 0 && p.active == 0;
                cached = idle && p.awaited <= 0;
                awaited = idle && p.awaited > 0;
                if cached != self.cached.contains(&(p.last_use, at))
                    || awaited != self.awaited.contains(&(p.expires, at))
                {
                    return Err(format!("page {at} is in the wrong set: {p:?}"));
                }
            }
            if !cached && self.cached.iter().any(|c| c.1 == at)
                || !awaited && self.awaited.iter().any(|c| c.1 == at)
            {
                return Err(format!("page {at} is left in a set"));
            }
        }
        let listed = self.index.values().filter(|e| matches!(e, Entry::Published(_))).count();
        let indexed =
            self.pages.iter().filter(|p| matches!(&p.state, State::Published(p) if p.key.is_some())).count();
        for (group, chunks) in &self.groups {
            let member = |h: &Hold| self.published(h.page).is_some_and(|p| p.groups.contains(group));
            if chunks.is_empty() || !chunks.iter().all(member) {
                return Err(format!("{group:?} is remembered for chunks that have gone: {chunks:?}"));
            }
        }
        if listed != indexed || counts != self.counts {
            return Err(format!(
                "{listed} keys for {indexed} chunks; counted {counts:?}, kept {:?}",
                self.counts
            ));
        }
        Ok(())
    }
}

impl Counts {
    fn of(&mut self, state: &State) -> &mut u32 {
        match state {
            State::Free => &mut self.free,
            State::Held(_) => &mut self.writing,
            State::Advanced(_) => &mut self.advanced,
            State::Published(_) => &mut self.published,
            State::Quarantined(_) => &mut self.quarantined,
        }
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
