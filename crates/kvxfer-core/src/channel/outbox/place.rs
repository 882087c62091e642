//! Pages first, bytes then: chunks that are named at their receiver ahead of their batch, so that the engine produces them in place.

use super::{Batch, Bytes, ChunkSource, Outbox, Part, Request, Shared};
use crate::channel::place::{Place, Placed};
use crate::cuda::Fence;
use crate::{Error, Result};
use kvxfer_proto::wire::ChunkSpec;
use kvxfer_proto::{ErrorCode, RequestId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Chunks that have been named and whose batch is to come.
pub(super) struct Named {
    pub(super) request: Arc<Request>,
    /// Index of the first of them in the request.
    pub(super) first: usize,
    /// Their batch is the request's last.
    last: bool,
    chunks: Vec<(ChunkSpec, Option<Place>)>,
}

impl Outbox {
    /// Names a batch's chunks at their receiver and gives the pages that they got there, in this process's address space: host memory,
    /// or with `device` that GPU's. Fill those, then [`Outbox::put`] the same batch, with `None` as the source of each that has been
    /// filled. A chunk that has no place, or whose place was not used, is put from the engine's memory as ever. Sources and `after` are
    /// not looked at here.
    ///
    /// Waits for admission at most `patience`, and for nothing else. Whatever prevents places (a receiver that is not connected yet, is
    /// reached another way, has no pages free; a request that has failed) gives none and loses nothing. Until the batch is put or
    /// given up ([`Outbox::give_up`]) the pages are the engine's, also when the request fails meanwhile. Calls for one request come one
    /// after the other.
    pub fn place(
        &self,
        batch: &Batch,
        device: Option<i32>,
        patience: Duration,
    ) -> Result<Vec<Option<Placed>>> {
        let Batch { request: id, receiver, first, total, last, chunks, .. } = batch;
        let none = vec![None; chunks.len()];
        let shared = &self.shared;
        {
            let state = shared.state.lock();
            if state.named.contains_key(id) {
                return Err(Error::failed(
                    ErrorCode::Busy,
                    format!("chunks of request {id} have their places already; put them, or give them up"),
                ));
            }
            let maps = |sender: &super::Sender| sender.is_open() && sender.maps(device);
            let reached =
                |route: &super::Route| route.sender.try_lock().is_some_and(|s| s.as_ref().is_some_and(maps));
            let under_way = state.requests.get(id).is_some_and(|r| !r.end.lock().ended);
            if state.closed
                || chunks.is_empty()
                || !state.routes.get(receiver).is_some_and(|r| reached(r))
                || !(*first || under_way)
            {
                return Ok(none);
            }
        }
        let request = shared.request(id, receiver, *first, *last)?;
        let mut work = request.work.lock();
        if !work.waiting.is_empty() || (!first && work.reservation.is_none()) {
            // The batches before it come first.
            return Ok(none);
        }
        let specs: Vec<_> = chunks.iter().map(|c| c.0.clone()).collect();
        let named = shared.name(&request, &mut work.reservation, specs.clone(), *total, *last);
        // One patience for all of them.
        let until = Instant::now() + patience;
        let place = |i: usize| {
            let left = until.saturating_duration_since(Instant::now());
            work.reservation.as_ref()?.place(named.as_ref().ok()? + i, device, left).ok().flatten()
        };
        let chunks: Vec<_> = specs.into_iter().enumerate().map(|(i, spec)| (spec, place(i))).collect();
        drop(work);
        if let Err(e) = &named {
            // The batch that follows finds a request that has ended.
            shared.abort(&request, e);
        }
        let placed = chunks.iter().map(|(_, place)| place.as_ref().map(Place::at)).collect();
        let named = Named { request, first: named.unwrap_or(0), last: *last, chunks };
        shared.state.lock().named.insert(id.clone(), named);
        Ok(placed)
    }

    /// Puts the batch that [`Outbox::place`] has named, all of whose chunks have a place and lie in it, or will at that point of a CUDA
    /// stream. Never waits. No release follows. An error when the request has no places, or a chunk has none; in the latter case the request
    /// is given up.
    pub fn put_placed(&self, request: &RequestId, after: Option<Fence>) -> Result<()> {
        let named = self.shared.state.lock().named.remove(request);
        let named = named
            .ok_or_else(|| Error::NotFound { what: "request with places", name: request.to_string() })?;
        if let Some((spec, _)) = named.chunks.iter().find(|(_, place)| place.is_none()) {
            let e = no_bytes(spec);
            named.fail(&self.shared, &e, after.as_ref());
            return Err(e);
        }
        let Named { request, first, last, chunks } = named;
        let chunks =
            chunks.into_iter().filter_map(|(spec, place)| Some((spec, Bytes::Here(place?)))).collect();
        self.shared.take(request, Part { total: 0, last, chunks, named: Some(first), after });
        Ok(())
    }

    /// Gives up places and their request, once a CUDA stream that may still write to them has passed `after`. False when the request
    /// has none.
    pub fn give_up(&self, request: &RequestId, after: Option<&Fence>) -> bool {
        let Some(named) = self.shared.state.lock().named.remove(request) else { return false };
        let why = Error::failed(ErrorCode::Cancelled, "given up by the engine before its bytes were there");
        named.fail(&self.shared, &why, after);
        true
    }
}

impl Named {
    /// Whether a batch has just the chunks that were named, each with bytes from somewhere.
    pub(super) fn check(&self, receiver: &str, batch: &[(ChunkSpec, Option<ChunkSource>)]) -> Result<()> {
        let same =
            batch.len() == self.chunks.len() && batch.iter().zip(&self.chunks).all(|(b, n)| b.0 == n.0);
        if !same || self.request.route.address != receiver {
            return Err(Error::InvalidArgument {
                argument: "batch.chunks",
                problem: format!(
                    "not the {} chunks of request {} that were given places, in that order",
                    self.chunks.len(),
                    self.request.id
                ),
            });
        }
        let sourced = |i: usize| batch.get(i).is_some_and(|b| b.1.is_some());
        let nowhere = self.chunks.iter().enumerate().find(|(i, n)| n.1.is_none() && !sourced(*i));
        nowhere.map_or(Ok(()), |(_, n)| Err(no_bytes(&n.0)))
    }

    /// The chunks with their bytes, after [`Named::check`].
    pub(super) fn join(self, batch: Vec<(ChunkSpec, Option<ChunkSource>)>) -> Vec<(ChunkSpec, Bytes)> {
        let mut sources = batch.into_iter().map(|b| b.1);
        let with_bytes = |(spec, place)| Some((spec, Bytes::of(sources.next().flatten(), place)?));
        self.chunks.into_iter().filter_map(with_bytes).collect()
    }

    /// Gives up the request and its places.
    pub(super) fn fail(self, shared: &Shared, why: &Error, after: Option<&Fence>) {
        shared.abort(&self.request, why);
        self.chunks.into_iter().filter_map(|c| c.1).for_each(|place| place.give_up(after.cloned()));
    }
}

impl Bytes {
    /// What is read of it.
    pub(super) fn source(&mut self) -> Option<&mut ChunkSource> {
        match self {
            Self::At(source) | Self::Instead(_, source) => Some(source),
            Self::Here(_) => None,
        }
    }

    fn of(source: Option<ChunkSource>, place: Option<Place>) -> Option<Self> {
        match (source, place) {
            (Some(source), None) => Some(Self::At(source)),
            (None, Some(place)) => Some(Self::Here(place)),
            (Some(source), Some(place)) => Some(Self::Instead(place, source)),
            (None, None) => None,
        }
    }
}

/// Chunks of a batch that was not named ahead: each has a source.
pub(super) fn sourced(chunks: Vec<(ChunkSpec, Option<ChunkSource>)>) -> Result<Vec<(ChunkSpec, Bytes)>> {
    let with_bytes = |(spec, source)| {
        let bytes = Bytes::of(source, None).ok_or_else(|| no_bytes(&spec))?;
        Ok((spec, bytes))
    };
    chunks.into_iter().map(with_bytes).collect()
}

/// Lets go of the places of a batch whose request has ended.
pub(super) fn give_up(chunks: Vec<(ChunkSpec, Bytes)>, after: Option<&Fence>) {
    for (_, bytes) in chunks {
        if let Bytes::Here(place) | Bytes::Instead(place, _) = bytes {
            place.give_up(after.cloned());
        }
    }
}

fn no_bytes(spec: &ChunkSpec) -> Error {
    Error::InvalidArgument {
        argument: "batch.chunks",
        problem: format!("chunk {} has neither a source nor a place", spec.key),
    }
}
