//! One prompt on its way: in at the door, through tokens, prefill and transfer, up to the decoder's first bytes.
//!
//! Sequential code over the router's answers. Everything it waits for has a deadline, and a leg that is dropped anywhere
//! on its way leaves the router's books in order and its instances' connections closed.

use super::trace::Trace;
use super::{App, headers_for};
use crate::config::{Instance, KvPath, Role, Settings};
use crate::openai::{
    ApiError, DisaggSpec, Endpoint, FirstToken, Leg, Next, Plan, Request, TokenSource, Tokenized,
};
use crate::router::{
    AfterDecode, AfterPrefill, Assignment, Demand, Entry, Failure, InstanceId, Kv, LegId, Routed, Router,
    prefix_digest,
};
use crate::stats::Mark;
use crate::upstream::{Trouble, Upstream};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Response, StatusCode};
use kvxfer_proto::Time;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Tokens that an answer is taken to have when the client did not say.
const USUAL_ANSWER: u64 = 256;

/// What wakes a leg.
pub(crate) type Waker = Arc<Notify>;

/// A leg's place in the router; leaving it is dropping this.
#[derive(Debug)]
pub(crate) struct Place {
    app: Arc<App>,
    pub(crate) id: LegId,
    notify: Waker,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.app.with(|router, now| router.finish(now, self.id));
    }
}

impl Place {
    /// Waits until `ask` has an answer; `None` when `by` has passed.
    async fn until<T>(
        &self,
        by: Instant,
        mut ask: impl FnMut(&mut Router<Waker>, Time) -> Option<T>,
    ) -> Option<T> {
        loop {
            let notified = self.notify.notified();
            if let Some(answer) = self.app.with(&mut ask) {
                return Some(answer);
            }
            if timeout_at(by, notified).await.is_err() {
                // It may have come in this very moment.
                return self.app.with(&mut ask);
            }
        }
    }

    /// Ends when the instance this leg is at has gone down.
    async fn lost(&self) {
        loop {
            let notified = self.notify.notified();
            if self.app.with(|router, _| router.lost(self.id)) {
                return;
            }
            notified.await;
        }
    }

    /// What `work` gives, unless the instance goes down meanwhile.
    pub(crate) async fn unless_lost<T>(
        &self,
        who: &str,
        work: impl Future<Output = Result<T, Trouble>>,
    ) -> Result<T, Trouble> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.lost() => Err(Trouble::new(Failure::TimedOut, format!("{who} went down"))),
        }
    }
}

/// One prompt of a request.
pub(crate) struct LegRun {
    app: Arc<App>,
    settings: Arc<Settings>,
    trace: Arc<Trace>,
    pub(crate) place: Place,
    /// The leg without its tokens, for what has to know only which one it is.
    pub(crate) leg: Leg,
    /// Needed until nothing can be tried again; a long stream does without it.
    prompt: Option<Box<Prompt>>,
    /// A cache was promised and has not been given up.
    expects_cache: bool,
    unclaimed: Option<Box<Unclaimed>>,
}

/// What a leg needs to ask instances.
struct Prompt {
    request: Arc<Request>,
    leg: Leg,
    headers: Arc<HeaderMap>,
}

/// A cache that is at a decoder, or on its way there, for a request that may never come.
struct Unclaimed {
    first: FirstToken,
    decoder: Arc<Instance>,
}

/// What the prefill came to.
#[derive(Debug)]
pub(crate) enum Start {
    /// The first token is the last.
    Finished(FirstToken),
    /// The decoder continues behind it.
    Continue(FirstToken),
    /// The decoder answers the request as it is.
    Whole,
}

/// The decoder's answer, begun.
pub(crate) struct Decoding {
    pub(crate) response: Response<Incoming>,
    pub(crate) at: InstanceId,
    pub(crate) decoder: Arc<Instance>,
}

impl LegRun {
    /// Comes in, finds out the tokens, and gets the prefill done.
    pub(crate) async fn start(
        app: &Arc<App>,
        trace: &Arc<Trace>,
        request: Arc<Request>,
        headers: Arc<HeaderMap>,
        index: usize,
    ) -> Result<(Self, Start, Leg), ApiError> {
        let settings = app.settings();
        let place = enter(app, &settings).await?;
        trace.mark(Mark::Admitted, "route");
        let leg = tokens(app, trace, &settings, &request, &headers, index).await?;
        trace.planned(&leg);
        let mut run = Self {
            app: Arc::clone(app),
            settings,
            trace: Arc::clone(trace),
            place,
            leg: request.decoder_leg(index, ""),
            prompt: Some(Box::new(Prompt { request, leg: leg.clone(), headers })),
            expects_cache: false,
            unclaimed: None,
        };
        let assignment = run.route(&leg).await?;
        let prefiller = assignment.prefiller.as_ref().map(|(_, instance)| instance.name.as_str());
        trace.assigned(prefiller, &assignment.decoder.1.name);
        let start = if prefiller.is_some() {
            trace.mark(Mark::Routed, "prefill");
            run.prefill(&leg, assignment).await?
        } else {
            trace.mark(Mark::Routed, "first_decode");
            match leg.plan() {
                Plan::DecoderOnly(why) => tracing::debug!(why, "the decoder answers alone"),
                _ => trace.alone("no_prefiller", "no prefiller can be used"),
            }
            Start::Whole
        };
        Ok((run, start, leg))
    }

    async fn route(&mut self, leg: &Leg) -> Result<Assignment, ApiError> {
        let came = Instant::now();
        let prompt = self.prompt()?;
        let most = prompt.request.max_tokens().unwrap_or(USUAL_ANSWER).min(1 << 20);
        let demand = Demand {
            prompt: leg.tokens().len() as u64,
            answer: most.saturating_mul(prompt.request.n() as u64),
            prefix: self
                .settings
                .policy
                .looks_at_prefixes()
                .map_or(0, |policies| prefix_digest(leg.prefill_tokens(), policies)),
        };
        let wants_prefill = !matches!(leg.plan(), Plan::DecoderOnly(_));
        let id = self.place.id;
        let mut routed = self.app.with(|router, now| router.route(now, id, demand, wants_prefill));
        if let Routed::Wait(_) = routed {
            let by = came + self.settings.limits.queue_wait;
            routed = self
                .place
                .until(by, |router, _| router.take_routed(id))
                .await
                .ok_or_else(|| unavailable("every instance has as many requests as it may have", 1))?;
        }
        match routed {
            Routed::Go(assignment) => Ok(assignment),
            Routed::NoDecoder(why, retry) => Err(unavailable(&why, retry)),
            Routed::Wait(_) => Err(unavailable("every instance has as many requests as it may have", 1)),
        }
    }

    async fn prefill(&mut self, leg: &Leg, mut assignment: Assignment) -> Result<Start, ApiError> {
        loop {
            let Some((id, prefiller)) = assignment.prefiller.clone() else { return Ok(Start::Whole) };
            let (trouble, error) = match self.ask_prefiller(leg, &prefiller, &assignment).await {
                Ok(next) => {
                    let place = self.place.id;
                    self.app.with(|router, now| router.prefilled(now, place));
                    self.trace.prefilled(&prefiller.name);
                    self.expects_cache = true;
                    return Ok(self.prefilled(next, assignment.decoder.1));
                }
                Err(failed) => failed,
            };
            self.app.probes.look_now(id);
            let place = self.place.id;
            match self
                .app
                .with(|router, now| router.prefill_failed(now, place, trouble.failure, &trouble.text))
            {
                AfterPrefill::Retry(next) => {
                    tracing::warn!(
                        prefiller = prefiller.name,
                        problem = trouble.text,
                        "a prefill failed; trying another prefiller"
                    );
                    self.trace.retry("prefill");
                    self.trace.assigned(
                        next.prefiller.as_ref().map(|(_, p)| p.name.as_str()),
                        &next.decoder.1.name,
                    );
                    assignment = next;
                }
                AfterPrefill::Alone => {
                    tracing::warn!(
                        prefiller = prefiller.name,
                        problem = trouble.text,
                        "a prefill failed; the decoder computes the prompt itself"
                    );
                    self.trace.alone("prefill_failed", &trouble.text);
                    return Ok(Start::Whole);
                }
                AfterPrefill::GiveUp => return Err(error),
            }
        }
    }

    /// What the prefiller's answer means for the rest of the way.
    fn prefilled(&mut self, next: Next, decoder: Arc<Instance>) -> Start {
        match next {
            Next::Finished(first) => {
                self.unclaimed = Some(Box::new(Unclaimed { first: first.clone(), decoder }));
                Start::Finished(first)
            }
            Next::Continue(first) => {
                self.unclaimed = Some(Box::new(Unclaimed { first: first.clone(), decoder }));
                Start::Continue(first)
            }
            Next::Whole(why) => {
                tracing::debug!(why, "the decoder answers from the first token on");
                Start::Whole
            }
        }
    }

    async fn ask_prefiller(
        &self,
        leg: &Leg,
        to: &Arc<Instance>,
        assignment: &Assignment,
    ) -> Result<Next, (Trouble, ApiError)> {
        let prompt =
            self.prompt().map_err(|error| (Trouble::new(Failure::Request, error.message.clone()), error))?;
        let params = match self.settings.kv {
            KvPath::Pd => DisaggSpec {
                req_id: assignment.transfer.clone(),
                receiver_host: assignment.decoder.1.receiver.host.clone(),
                receiver_init_port: assignment.decoder.1.receiver.init_ports.clone(),
                receiver_alloc_port: assignment.decoder.1.receiver.alloc_ports.clone(),
            }
            .kv_transfer_params(),
            KvPath::Mp => "{\"ret_first_tok\":true}".to_owned(),
        };
        let Some(body) = leg.prefill_body(&prompt.request, &params) else {
            return Ok(Next::Whole("there is nothing to prefill"));
        };
        let headers = headers_for(&prompt.headers, &assignment.transfer);
        let by = Instant::now() + self.settings.deadlines.prefill;
        let limit = self.settings.limits.answer;
        let work = async {
            let response = self
                .app
                .upstream
                .send(to, Method::POST, "/v1/completions", &headers, body.into(), by)
                .await?;
            let status = response.status();
            Ok((status, Upstream::whole(to, response.into_body(), limit, by).await?))
        };
        let (status, body) = self.place.unless_lost(&to.name, work).await.map_err(with_error)?;
        if status != StatusCode::OK {
            return Err(refused(to, status, &body));
        }
        leg.after_prefill(&prompt.request, &to.name, &body)
            .map_err(|error| (Trouble::new(Failure::Broken, error.message.clone()), error))
    }

    /// Waits for the cache, as long as there is hope. Afterwards the decoder can be asked in any case.
    pub(crate) async fn wait_for_cache(&mut self) {
        if !std::mem::take(&mut self.expects_cache) {
            return;
        }
        let id = self.place.id;
        let by = Instant::now() + self.settings.deadlines.kv;
        let arrived = self
            .place
            .until(by, |router, _| match router.kv(id) {
                Kv::Waiting(_) => None,
                other => Some(other),
            })
            .await;
        match arrived {
            Some(Kv::Ready { bytes, .. }) => self.trace.kv_arrived(bytes),
            Some(Kv::Failed { code, message }) => {
                tracing::warn!(
                    code,
                    message,
                    "a cache will not arrive; the decoder computes the prompt itself"
                );
                self.trace.alone("kv_failed", &format!("{code}: {message}"));
            }
            Some(Kv::Waiting(_)) | None => {
                self.app.with(|router, now| router.kv_timed_out(now, id));
                let why = format!("the cache did not arrive within {:?}", self.settings.deadlines.kv);
                tracing::warn!("{why}; the decoder computes the prompt itself");
                self.trace.alone("kv_timeout", &why);
            }
        }
        self.trace.mark(Mark::KvReady, "first_decode");
    }

    /// Asks the decoder, and another one if that fails, until one has begun to answer with 200.
    pub(crate) async fn decode(&mut self, first: Option<&FirstToken>) -> Result<Decoding, ApiError> {
        let prompt = self.prompt()?;
        let (path, body) = match first {
            Some(first) => {
                (Endpoint::Completions.path(), prompt.leg.continue_body(&prompt.request, first, None))
            }
            None => (prompt.request.endpoint().path(), prompt.leg.whole_body(&prompt.request, None)),
        };
        let (body, id) = (Bytes::from(body), self.place.id);
        loop {
            let decoding = self.app.with(|router, now| router.decoding(now, id));
            let Some((at, decoder, kept)) = decoding else {
                return Err(unavailable("no decoder can be used", 2));
            };
            if !kept {
                self.trace.retry("decode");
                self.trace.alone("decoder_gone", "the decoder with the cache has gone down");
            }
            self.trace.assigned(None, &decoder.name);
            let by = Instant::now() + self.settings.deadlines.decode;
            let headers = headers_for(&self.prompt()?.headers, &self.app.new_id());
            // From here on the decoder's own request uses the cache.
            self.unclaimed = None;
            let work = self.app.upstream.send(&decoder, Method::POST, path, &headers, body.clone(), by);
            let (trouble, error) = match self.place.unless_lost(&decoder.name, work).await {
                Ok(response) if response.status() == StatusCode::OK => {
                    return Ok(Decoding { response, at, decoder });
                }
                Ok(response) => {
                    let status = response.status();
                    match Upstream::whole(&decoder, response.into_body(), 1 << 20, by).await {
                        Ok(body) => refused(&decoder, status, &body),
                        Err(trouble) => with_error(trouble),
                    }
                }
                Err(trouble) => with_error(trouble),
            };
            if !self.decode_broke(at, &trouble, false) {
                return Err(error);
            }
        }
    }

    /// The decoder has failed. True when another one is to be tried, which is possible as long as the client has had
    /// nothing of the answer.
    pub(crate) fn decode_broke(&mut self, at: InstanceId, trouble: &Trouble, passed_on: bool) -> bool {
        let id = self.place.id;
        if trouble.failure.counts() {
            self.app.probes.look_now(at);
        }
        let after = self
            .app
            .with(|router, now| router.decode_failed(now, id, trouble.failure, &trouble.text, passed_on));
        match after {
            AfterDecode::Retry(next) => {
                tracing::warn!(
                    problem = trouble.text,
                    next = next.name,
                    "a decode failed; trying another decoder"
                );
                self.trace.retry("decode");
                self.trace.alone("decode_failed", &trouble.text);
                true
            }
            AfterDecode::GiveUp => false,
        }
    }

    /// Nothing will be tried again: what that would need is let go.
    pub(crate) fn lighten(&mut self) {
        self.prompt = None;
    }

    fn prompt(&self) -> Result<&Prompt, ApiError> {
        self.prompt.as_deref().ok_or_else(|| ApiError::new(500, "The request has already been answered."))
    }

    /// The decoder's first token is there.
    pub(crate) fn decoded(&self) {
        let id = self.place.id;
        self.trace.mark(Mark::FirstDecoded, "decode");
        self.app.with(|router, _| router.decoded(id));
    }

    /// How long between two pieces.
    pub(crate) fn stall(&self) -> Duration {
        self.settings.deadlines.stall
    }

    /// Most bytes of an answer or an event.
    pub(crate) fn answer_limit(&self) -> usize {
        self.settings.limits.answer
    }
}

impl Drop for LegRun {
    fn drop(&mut self) {
        // A cache that nobody will ask for stays in the decoder's memory until something uses it up.
        let Some(unclaimed) = self.unclaimed.take() else { return };
        let Some(prompt) = &self.prompt else { return };
        let body = prompt.leg.consume_body(&prompt.request, &unclaimed.first);
        self.app.consume(unclaimed.decoder, body, &prompt.headers);
    }
}

/// Comes in, or waits at the door.
async fn enter(app: &Arc<App>, settings: &Settings) -> Result<Place, ApiError> {
    let notify = Arc::new(Notify::new());
    let entry = app.with(|router, now| router.enter(now, Arc::clone(&notify)));
    let place = |id| Place { app: Arc::clone(app), id, notify: Arc::clone(&notify) };
    match entry {
        Entry::Admitted(id) => Ok(place(id)),
        Entry::Queued(id, _) => {
            let place = place(id);
            let by = Instant::now() + settings.limits.queue_wait;
            match place.until(by, |router, _| router.admitted(id).then_some(())).await {
                Some(()) => Ok(place),
                None => Err(unavailable(
                    &format!("the request waited {:?} for its turn", settings.limits.queue_wait),
                    app.with(|router, _| router.retry_after()),
                )),
            }
        }
        Entry::Full(retry) => Err(unavailable("too many requests are waiting", retry)),
        Entry::Ending => Err(unavailable("the proxy is ending", 2)),
    }
}

/// The leg, once its tokens are known; the decoder alone when nobody can tell them.
async fn tokens(
    app: &Arc<App>,
    trace: &Trace,
    settings: &Settings,
    request: &Request,
    headers: &HeaderMap,
    index: usize,
) -> Result<Leg, ApiError> {
    let body: Bytes = match request.tokens(index) {
        TokenSource::Known(tokens) => return request.leg(index, tokens, None),
        TokenSource::NotNeeded(why) => return Ok(request.decoder_leg(index, why)),
        TokenSource::Tokenize(body) => body.into(),
    };
    let by = Instant::now() + settings.deadlines.tokenize;
    let mut why = "no instance can tokenize".to_owned();
    // One that is gone is known to be so after the attempt; the next is another.
    for _ in 0..3 {
        let Some((id, instance)) = app.with(|router, now| router.anyone(now, Role::Prefiller)) else { break };
        let headers = headers_for(headers, &app.new_id());
        let asked = app.upstream.send(&instance, Method::POST, "/tokenize", &headers, body.clone(), by).await;
        let answer = match asked {
            Ok(response) => {
                let status = response.status();
                Upstream::whole(&instance, response.into_body(), settings.limits.answer, by)
                    .await
                    .map(|b| (status, b))
            }
            Err(trouble) => Err(trouble),
        };
        match answer {
            Ok((StatusCode::OK, body)) => match Tokenized::parse(&instance.name, &body) {
                Ok(told) => return request.leg(index, told.tokens, told.max_model_len),
                Err(error) => {
                    tracing::warn!(instance = instance.name, problem = error.message, "cannot read tokens");
                    why = error.message;
                }
            },
            // What is wrong with the request, the decoder says in the words of its own endpoint.
            Ok((status, _)) if !status.is_server_error() => {
                return Ok(request.decoder_leg(index, format!("/tokenize answered {}", status.as_u16())));
            }
            Ok((status, body)) => {
                why = format!("{} answered {} to /tokenize", instance.name, status.as_u16());
                let body = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
                tracing::warn!(instance = instance.name, status = status.as_u16(), body, "cannot tokenize");
            }
            Err(trouble) => {
                why = trouble.text;
                if trouble.failure == Failure::Unreachable {
                    app.with(|router, now| router.probe_failed(now, id, true, &why));
                }
                app.probes.look_now(id);
            }
        }
        if Instant::now() >= by {
            break;
        }
        trace.retry("tokenize");
    }
    trace.alone("not_tokenized", &why);
    Ok(request.decoder_leg(index, why))
}

/// 503, with the time after which trying again makes sense.
pub(crate) fn unavailable(why: &str, retry_after: u64) -> ApiError {
    let mut error = ApiError::new(503, format!("{why}; try again in {retry_after} s"));
    error.retry_after = u32::try_from(retry_after).ok();
    error
}

/// What a client is told about an instance's trouble.
pub(crate) fn error_of(trouble: &Trouble) -> ApiError {
    let status = match trouble.failure {
        Failure::TimedOut => 504,
        Failure::Busy => 503,
        _ => 502,
    };
    ApiError::new(status, trouble.text.clone())
}

fn with_error(trouble: Trouble) -> (Trouble, ApiError) {
    let error = error_of(&trouble);
    (trouble, error)
}

/// An instance's answer that is not 200.
fn refused(who: &Instance, status: StatusCode, body: &[u8]) -> (Trouble, ApiError) {
    let failure = match status.as_u16() {
        429 | 503 => Failure::Busy,
        408 | 504 => Failure::TimedOut,
        400..=499 => Failure::Request,
        _ => Failure::Broken,
    };
    let error = ApiError::upstream(&who.name, status.as_u16(), body);
    (Trouble::new(failure, format!("{} answered {}: {}", who.name, status.as_u16(), error.message)), error)
}
