//! Pages first, bytes then: chunks that are named at their receiver ahead of their batch, so that the engine produces them in place.

use super::{Bytes, ChunkSource, Outbox, Request};
use crate::channel::place::Place;
use crate::cuda::Fence;
use crate::{Error, Memory, Result};
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ErrorCode, RequestId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A batch of which the bytes do not exist yet; the fields are a [`super::Batch`]'s.
pub struct Announcement {
    /// The request.
    pub request: RequestId,
    /// Where its chunks go.
    pub receiver: String,
    /// It begins the request.
    pub first: bool,
    /// Chunks of the whole request.
    pub total: u32,
    /// No further batch follows.
    pub last: bool,
    /// The chunks.
    pub chunks: Vec<ChunkSpec>,
}

/// Where a chunk's bytes are to be produced.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The receiver's pool as it is mapped here, kept as long as this lives.
    pub memory: Arc<Memory>,
    /// Where the chunk begins in it.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
}

/// Chunks that have been named and whose batch is to come.
pub(super) struct Named {
    request: Arc<Request>,
    first: usize,
    chunks: Vec<(ChunkSpec, Option<Place>)>,
}

impl Outbox {
    /// Names a batch's chunks at their receiver and gives the pages that they got there, in this process's address space: host memory,
    /// or with `device` that GPU's. Fill those, then [`Outbox::put`] the same chunks: `None` instead of a source for each that has been
    /// filled. A chunk that has no place, or whose place was not used, is put from the engine's memory as ever.
    ///
    /// Waits for admission at most `patience`, and for nothing else. Whatever prevents places (a receiver that is not connected yet, is
    /// reached another way, has no pages free; a request that has failed) gives none and loses nothing. Until the batch is put or
    /// given up ([`Outbox::give_up`]) the pages are the engine's, also when the request fails meanwhile.
    pub fn place(
        &self,
        batch: Announcement,
        device: Option<i32>,
        patience: Duration,
    ) -> Result<Vec<Option<Placed>>> {
        let Announcement { request: id, receiver, first, total, last, chunks } = batch;
        let none = vec![None; chunks.len()];
        let shared = &self.shared;
        {
            let state = shared.state.lock();
            if state.named.contains_key(&id) {
                return Err(Error::failed(
                    ErrorCode::Busy,
                    format!("chunks of request {id} have their places already; put them, or give them up"),
                ));
            }
            let maps = |sender: &super::Sender| sender.is_open() && sender.maps(device);
            let reached =
                |route: &super::Route| route.sender.try_lock().is_some_and(|s| s.as_ref().is_some_and(maps));
            let under_way = state.requests.get(&id).is_some_and(|r| !r.end.lock().ended);
            if state.closed
                || chunks.is_empty()
                || !state.routes.get(&receiver).is_some_and(|r| reached(r))
                || !(first || under_way)
            {
                return Ok(none);
            }
        }
        let request = shared.request(&id, &receiver, first, last)?;
        let mut work = request.work.lock();
        if !work.waiting.is_empty() || (!first && work.reservation.is_none()) {
            // The batches before it come first.
            return Ok(none);
        }
        let index = match shared.name(&request, &mut work.reservation, chunks.clone(), total, last) {
            Ok(index) => index,
            Err(e) => {
                drop(work);
                // The batch that follows finds a request that has ended.
                shared.abort(&request, &e);
                self.remember(id, Named { request, first: 0, chunks: without_places(chunks) });
                return Ok(none);
            }
        };
        // One patience for all of them.
        let until = Instant::now() + patience;
        let place = |i: usize| {
            let left = until.saturating_duration_since(Instant::now());
            work.reservation.as_ref()?.place(index + i, device, left).ok().flatten()
        };
        let chunks: Vec<_> = chunks.into_iter().enumerate().map(|(i, spec)| (spec, place(i))).collect();
        drop(work);
        let placed = chunks
            .iter()
            .map(|(_, place)| {
                let p = place.as_ref()?;
                Some(Placed { memory: p.memory().clone(), offset: p.offset(), len: p.len() })
            })
            .collect();
        self.remember(id, Named { request, first: index, chunks });
        Ok(placed)
    }

    /// Gives up places and their request, once a CUDA stream that may still write to them has passed `after`. False when the request
    /// has none.
    pub fn give_up(&self, request: &RequestId, after: Option<&Fence>) -> bool {
        let Some(named) = self.shared.state.lock().named.remove(request) else { return false };
        let why = Error::failed(ErrorCode::Cancelled, "given up by the engine before its bytes were there");
        self.shared.abort(&named.request, &why);
        named.chunks.into_iter().filter_map(|c| c.1).for_each(|place| place.give_up(after.cloned()));
        true
    }

    fn remember(&self, id: RequestId, named: Named) {
        self.shared.state.lock().named.insert(id, named);
    }
}

impl Named {
    /// The chunks with their bytes: those of the batch must be those that were named.
    #[expect(clippy::type_complexity, reason = "a request beside either answer")]
    pub(super) fn join(
        self,
        receiver: &str,
        batch: Vec<(ChunkSpec, Option<ChunkSource>)>,
    ) -> Result<(Arc<Request>, usize, Vec<(ChunkSpec, Bytes)>), (Arc<Request>, Error)> {
        let Self { request, first, chunks } = self;
        let wrong = |problem: String| Error::InvalidArgument { argument: "batch.chunks", problem };
        let same = batch.len() == chunks.len() && batch.iter().zip(&chunks).all(|(b, n)| b.0 == n.0);
        if !same || request.route.address != receiver {
            let e = wrong(format!(
                "not the {} chunks of request {} that were given places, in that order",
                chunks.len(),
                request.id
            ));
            return Err((request, e));
        }
        let mut joined = Vec::with_capacity(chunks.len());
        for ((spec, source), (_, place)) in batch.into_iter().zip(chunks) {
            let bytes = match (source, place) {
                (Some(source), None) => Bytes::At(source),
                (None, Some(place)) => Bytes::Here(place),
                (Some(source), Some(place)) => Bytes::Instead(place, source),
                (None, None) => return Err((request, no_place(&spec))),
            };
            joined.push((spec, bytes));
        }
        Ok((request, first, joined))
    }
}

/// Chunks of a batch that was not announced: each has a source.
pub(super) fn unplaced(chunks: Vec<(ChunkSpec, Option<ChunkSource>)>) -> Result<Vec<(ChunkSpec, Bytes)>> {
    chunks
        .into_iter()
        .map(|(spec, source)| match source {
            Some(source) => Ok((spec, Bytes::At(source))),
            None => Err(no_place(&spec)),
        })
        .collect()
}

/// Lets go of the places of a batch whose request has ended.
pub(super) fn give_up(chunks: Vec<(ChunkSpec, Bytes)>, after: Option<&Fence>) {
    for (_, bytes) in chunks {
        if let Bytes::Here(place) | Bytes::Instead(place, _) = bytes {
            place.give_up(after.cloned());
        }
    }
}

fn no_place(spec: &ChunkSpec) -> Error {
    Error::InvalidArgument {
        argument: "batch.chunks",
        problem: format!("chunk {} has neither a source nor a place", spec.key),
    }
}

fn without_places(chunks: Vec<ChunkSpec>) -> Vec<(ChunkSpec, Option<Place>)> {
    chunks.into_iter().map(|spec| (spec, None)).collect()
}
