//! One prompt on its way: what the prefiller is sent, what its answer means, what the decoder is sent.

use std::sync::Arc;

use serde::Serialize;

use super::answer::FirstToken;
use super::error::ApiError;
use super::object::write_patched;
use super::plan::Plan;
use super::request::{Endpoint, Request};

/// Where a prefiller sends the cache of one request, as `LMCache` reads it from `kv_transfer_params`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DisaggSpec {
    /// The id under which the notification of its arrival comes.
    pub req_id: String,
    /// The decoder's host.
    pub receiver_host: String,
    /// Its handshake ports, one per tensor-parallel rank.
    pub receiver_init_port: Vec<u16>,
    /// Its allocation ports, one per tensor-parallel rank.
    pub receiver_alloc_port: Vec<u16>,
}

impl DisaggSpec {
    /// The value of `kv_transfer_params`.
    pub fn kv_transfer_params(&self) -> String {
        serde_json::json!({"ret_first_tok": true, "disagg_spec": self}).to_string()
    }
}

/// One prompt of a request, with the plan for it.
#[derive(Debug, Clone)]
pub struct Leg {
    index: usize,
    tokens: Arc<[u32]>,
    plan: Plan,
    max_model_len: Option<u64>,
}

/// What follows a prefiller's answer.
#[derive(Debug, Clone)]
pub enum Next {
    /// The answer ends with the first token. Only [`Leg::consume_body`] is left to do, so that the decoder lets go
    /// of a cache nobody will use.
    Finished(FirstToken),
    /// The first token goes to the client, then the decoder continues with [`Leg::continue_body`].
    Continue(FirstToken),
    /// Nothing goes to the client; the decoder is sent [`Leg::whole_body`]. The reason is for the log.
    Whole(&'static str),
}

/// Fields of a chat request, or of many samples, which a completion of one token list does not have.
const NOT_OF_A_LEG: &[&str] = &[
    "messages",
    "max_completion_tokens",
    "n",
    "best_of",
    "echo",
    "request_id",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "top_logprobs",
];

/// Fields that decide which cache a prompt has, kept where nothing else of the request matters.
const OF_THE_CACHE: &[&str] = &["model", "cache_salt", "priority", "session_id", "user"];

impl Leg {
    pub(super) fn new(index: usize, tokens: Vec<u32>, plan: Plan, max_model_len: Option<u64>) -> Self {
        Self { index, tokens: tokens.into(), plan, max_model_len }
    }

    /// The prompt's place in the request.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The prompt's tokens; empty where they are not known.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How it is answered.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Tokens whose cache goes from the prefiller to the decoder.
    pub fn prefill_tokens(&self) -> &[u32] {
        match self.plan {
            Plan::FirstToken => &self.tokens,
            Plan::DecoderSamples(_) => &self.tokens[..self.tokens.len().saturating_sub(1)],
            Plan::DecoderOnly(_) => &[],
        }
    }

    /// What the prefiller is sent, to `/v1/completions`; `None` when the decoder works alone. `kv_transfer_params`
    /// is raw JSON, e.g. [`DisaggSpec::kv_transfer_params`].
    pub fn prefill_body(&self, request: &Request, kv_transfer_params: &str) -> Option<Vec<u8>> {
        match self.plan {
            Plan::FirstToken => {
                let prompt = list(&self.tokens, None);
                let least = request.view.min_tokens.min(1).to_string();
                Some(one_leg(
                    request,
                    &[
                        ("prompt", Some(&prompt)),
                        ("max_tokens", Some("1")),
                        ("min_tokens", request.raw("min_tokens").map(|_| least.as_str())),
                        ("stream", Some("false")),
                        ("stream_options", None),
                        ("kv_transfer_params", Some(kv_transfer_params)),
                    ],
                ))
            }
            Plan::DecoderSamples(_) => {
                Some(cache_only(request, &list(self.prefill_tokens(), None), kv_transfer_params))
            }
            Plan::DecoderOnly(_) => None,
        }
    }

    /// What a prefiller's answer of status 200 means. An error is the engine's, or says that it cannot be read.
    pub fn after_prefill(&self, request: &Request, who: &str, body: &[u8]) -> Result<Next, ApiError> {
        let first = FirstToken::parse(who, body)?;
        match (&self.plan, first.finish_reason.as_str()) {
            (_, "error" | "abort") => {
                return Err(ApiError::new(
                    502,
                    format!("{who} gave up on the prompt ({}).", first.finish_reason),
                ));
            }
            (Plan::FirstToken, "length") => {}
            (Plan::FirstToken, _) => return Ok(Next::Finished(first)),
            _ => return Ok(Next::Whole("the decoder samples")),
        }
        if first.token.is_none() {
            return Ok(Next::Whole("the prefiller did not say which token it sampled"));
        }
        // Half a character: an engine that starts behind it cannot tell where the text begins.
        if first.text.is_empty() || first.text.contains('\u{fffd}') {
            return Ok(Next::Whole("the first token is not a whole character"));
        }
        if request.view.stop.iter().any(|stop| may_begin(&first.text, stop)) {
            return Ok(Next::Whole("the first token may begin a stop string"));
        }
        Ok(Next::Continue(first))
    }

    /// What the decoder is sent to continue behind the first token, to `/v1/completions`.
    pub fn continue_body(
        &self,
        request: &Request,
        first: &FirstToken,
        kv_transfer_params: Option<&str>,
    ) -> Vec<u8> {
        let prompt = list(&self.tokens, first.token);
        let most = self.most_tokens(request).saturating_sub(1).max(1).to_string();
        let least = request.view.min_tokens.saturating_sub(1).to_string();
        one_leg(
            request,
            &[
                ("prompt", Some(&prompt)),
                ("max_tokens", Some(&most)),
                ("min_tokens", request.raw("min_tokens").map(|_| least.as_str())),
                ("kv_transfer_params", kv_transfer_params),
            ],
        )
    }

    /// What the decoder is sent when it answers the request as it is, to the request's own path.
    pub fn whole_body(&self, request: &Request, kv_transfer_params: Option<&str>) -> Vec<u8> {
        let single = request.single_prompt(self.index);
        let mut patches = vec![("request_id", None), ("kv_transfer_params", kv_transfer_params)];
        if let Some(prompt) = &single {
            patches.push(("prompt", Some(prompt)));
        }
        let mut out = Vec::with_capacity(request.len() + 64);
        request.write(&mut out, &patches);
        out
    }

    /// A request whose answer nobody needs, to the decoder's `/v1/completions`: it takes the cache of a prompt whose
    /// answer ended with its first token, and thereby frees the memory that waits for it.
    pub fn consume_body(&self, request: &Request, first: &FirstToken) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.tokens.len() * 6 + 128);
        let prompt = list(&self.tokens, first.token);
        let fields = request.fields().filter(|(key, _)| OF_THE_CACHE.contains(key));
        write_patched(
            &mut out,
            fields,
            &[
                ("prompt", Some(&prompt)),
                ("max_tokens", Some("1")),
                ("temperature", Some("0")),
                ("stream", Some("false")),
            ],
        );
        out
    }

    /// The tokens the client may get at most.
    fn most_tokens(&self, request: &Request) -> u64 {
        match (request.view.max_tokens, request.endpoint()) {
            (Some(most), _) => most,
            (None, Endpoint::Completions) => 16,
            // A chat goes on to the end of the context; the plan asks for its length to be known.
            (None, Endpoint::Chat) => {
                self.max_model_len.unwrap_or(u64::from(u32::MAX)).saturating_sub(self.tokens.len() as u64)
            }
        }
    }
}

/// The request as a completion of one token list.
fn one_leg(request: &Request, patches: &[(&str, Option<&str>)]) -> Vec<u8> {
    let chat = request.endpoint() == Endpoint::Chat;
    let fields = request.fields().filter(|(key, _)| {
        !(NOT_OF_A_LEG.contains(key) || chat && matches!(*key, "logprobs" | "add_special_tokens"))
    });
    let mut out = Vec::with_capacity(request.len() + 256);
    write_patched(&mut out, fields, patches);
    out
}

/// A prefill whose token nobody needs.
fn cache_only(request: &Request, prompt: &str, kv_transfer_params: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(prompt.len() + 256);
    let fields = request.fields().filter(|(key, _)| OF_THE_CACHE.contains(key));
    write_patched(
        &mut out,
        fields,
        &[
            ("prompt", Some(prompt)),
            ("max_tokens", Some("1")),
            ("temperature", Some("0")),
            ("stream", Some("false")),
            ("kv_transfer_params", Some(kv_transfer_params)),
        ],
    );
    out
}

/// Whether text that ends so may go on to complete `stop`.
fn may_begin(text: &str, stop: &str) -> bool {
    (1..stop.len()).any(|k| stop.is_char_boundary(k) && text.ends_with(&stop[..k]))
}

/// Tokens as a JSON list, with one more at the end.
fn list(tokens: &[u32], more: Option<u32>) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(tokens.len() * 6 + 8);
    out.push('[');
    for (i, token) in tokens.iter().chain(more.iter()).enumerate() {
        if i > 0 {
            out.push(',');
        }
        // Writing to a string cannot fail.
        let _ = write!(out, "{token}");
    }
    out.push(']');
    out
}
