//! What clients ask for, checked: afterwards nothing in a request can surprise the scheduler.

use super::Service;
use super::error::ApiError;
use crate::kv::send::Target;
use crate::sample::Sampling;
use crate::scheduler::{Params, Scheduler};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Longest list of likely tokens.
const MAX_LOGPROBS: usize = 20;
/// Most stop strings, and bytes of one.
const MAX_STOPS: (usize, usize) = (16, 1024);
/// Tokens of a completion that says nothing about it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The body of `/v1/completions` and `/v1/chat/completions`; what this engine does not know is ignored, as elsewhere.
#[derive(Deserialize)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    prompt: Option<Prompt>,
    messages: Option<Vec<Value>>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    add_special_tokens: Option<bool>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    min_tokens: Option<usize>,
    n: Option<usize>,
    best_of: Option<usize>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: Option<bool>,
    ignore_eos: Option<bool>,
    skip_special_tokens: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<i64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<Map<String, Value>>,
    logprobs: Option<Value>,
    top_logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    echo: Option<bool>,
    return_token_ids: Option<bool>,
    return_tokens_as_token_ids: Option<bool>,
    request_id: Option<String>,
    kv_transfer_params: Option<KvTransferParams>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// What a proxy adds for a prefiller; fields it adds for others are ignored.
#[derive(Deserialize)]
struct KvTransferParams {
    ret_first_tok: Option<bool>,
    disagg_spec: Option<DisaggSpec>,
}

/// `receiver_alloc_port` is part of the protocol too: allocation here goes over the one connection.
#[derive(Deserialize)]
struct DisaggSpec {
    req_id: String,
    receiver_host: String,
    receiver_init_port: Ports,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ports {
    One(u16),
    Many(Vec<u16>),
}

/// A request that can be served.
#[expect(clippy::struct_excessive_bools, reason = "each is a field of the request, named as there")]
pub(super) struct Ask {
    pub(super) chat: bool,
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) params: Params,
    pub(super) choices: usize,
    pub(super) target: Option<Target>,
    pub(super) first_tok: bool,
    pub(super) stream: bool,
    pub(super) usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) logprobs: Option<usize>,
    pub(super) echo: bool,
    pub(super) token_ids: bool,
    pub(super) tokens_as_ids: bool,
    pub(super) request_id: Option<String>,
}

impl Body {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(bytes).map_err(|e| {
            // Which field it was: the one that is wrong by itself.
            let given: Map<String, Value> = serde_json::from_slice(bytes).unwrap_or_default();
            let wrong = given.into_iter().find(|(key, value)| {
                let alone = Map::from_iter([(key.clone(), value.clone())]);
                serde_json::from_value::<Self>(alone.into()).is_err()
            });
            let field = wrong.map_or_else(String::new, |(key, _)| format!("{key}: "));
            ApiError::bad(None, format!("the body is not a valid request: {field}{e}"))
        })
    }

    /// Checks everything and turns text into tokens.
    pub(super) fn check(self, service: &Service, chat: bool) -> Result<Ask, ApiError> {
        service.check_model(self.model.as_deref())?;
        let choices = self.n.unwrap_or(1);
        if choices == 0 || choices > service.scheduler.limits.sequences {
            return Err(ApiError::bad(
                "n",
                format!("n is {choices}; 1 to {} are possible", service.scheduler.limits.sequences),
            ));
        }
        if self.best_of.is_some_and(|n| n != choices) {
            return Err(ApiError::bad("best_of", "best_of is not supported; leave it out"));
        }
        let prompts = self.prompts(service, chat)?;
        let logprobs = self.logprobs(chat)?;
        let echo = self.echo.unwrap_or(false) && !chat;
        let max_tokens = self.max_tokens(service, chat, &prompts)?;
        let chunk = service.model.shape().tokens;
        for prompt in &prompts {
            let demand = Scheduler::demand(chunk, prompt.len(), max_tokens, choices);
            let room = service.scheduler.limits.cache_tokens;
            if demand > room {
                return Err(ApiError::bad(
                    "max_tokens",
                    format!(
                        "{choices} texts of up to {max_tokens} tokens behind a prompt of {} need {demand} tokens of cache; there are {room}: ask for less, or start the engine with a larger --kv-cache-tokens",
                        prompt.len()
                    ),
                ));
            }
        }
        let params = Params {
            max_tokens,
            min_tokens: self.min_tokens.unwrap_or(0),
            sampling: self.sampling(logprobs)?,
            stops: self.stops()?,
            stop_tokens: self.stop_token_ids.clone().unwrap_or_default(),
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special: self.skip_special_tokens.unwrap_or(true),
            prompt_logprobs: self.prompt_logprobs.or(logprobs.filter(|_| echo)),
        };
        let (target, first_tok) = self.target(service)?;
        let options = self.stream_options.unwrap_or_default();
        Ok(Ask {
            chat,
            prompts,
            params,
            choices,
            target,
            first_tok,
            stream: self.stream.unwrap_or(false),
            usage: options.include_usage.unwrap_or(false),
            continuous_usage: options.include_usage.unwrap_or(false)
                && options.continuous_usage_stats.unwrap_or(false),
            logprobs,
            echo,
            token_ids: self.return_token_ids.unwrap_or(false),
            tokens_as_ids: self.return_tokens_as_token_ids.unwrap_or(false),
            request_id: self.request_id,
        })
    }

    fn prompts(&self, service: &Service, chat: bool) -> Result<Vec<Vec<u32>>, ApiError> {
        let text = |param, text: &str, special| {
            service.text.encode(text, special).map_err(|e| ApiError::bad(param, e))
        };
        let prompts = if chat {
            let messages = self.messages.as_deref().ok_or_else(|| {
                ApiError::bad("messages", "messages is missing; it is a list of {role, content}")
            })?;
            let prompt = service
                .text
                .chat(
                    messages,
                    self.add_generation_prompt.unwrap_or(true),
                    self.tools.as_ref(),
                    self.chat_template_kwargs.as_ref(),
                )
                .map_err(|e| ApiError::bad("messages", e))?;
            vec![text("messages", &prompt, self.add_special_tokens.unwrap_or(false))?]
        } else {
            let special = self.add_special_tokens.unwrap_or(true);
            match &self.prompt {
                None => {
                    return Err(ApiError::bad(
                        "prompt",
                        "prompt is missing; it is a text, token ids, or a list of either",
                    ));
                }
                Some(Prompt::Text(one)) => vec![text("prompt", one, special)?],
                Some(Prompt::Tokens(one)) => vec![one.clone()],
                Some(Prompt::Texts(many)) => {
                    many.iter().map(|one| text("prompt", one, special)).collect::<Result<_, _>>()?
                }
                Some(Prompt::TokenLists(many)) => many.clone(),
            }
        };
        let param = if chat { "messages" } else { "prompt" };
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(ApiError::bad(param, "the prompt is empty; at least one token is needed"));
        }
        let vocab = service.model.config.vocab as u32;
        if let Some(token) = prompts.iter().flatten().find(|t| **t >= vocab) {
            return Err(ApiError::bad(
                param,
                format!("token id {token} is not within the vocabulary of {vocab}"),
            ));
        }
        let limit = service.scheduler.limits.positions;
        if let Some(long) = prompts.iter().find(|p| p.len() >= limit) {
            return Err(ApiError::bad(
                param,
                format!(
                    "This model's maximum context length is {limit} tokens. However, your request has {} input tokens. Please reduce the length of the input.",
                    long.len()
                ),
            ));
        }
        Ok(prompts)
    }

    fn max_tokens(&self, service: &Service, chat: bool, prompts: &[Vec<u32>]) -> Result<usize, ApiError> {
        let limit = service.scheduler.limits.positions;
        let room = limit - prompts.iter().map(Vec::len).max().unwrap_or(0);
        let asked = self.max_completion_tokens.filter(|_| chat).or(self.max_tokens);
        match asked {
            None if chat => Ok(room),
            None => Ok(DEFAULT_MAX_TOKENS.min(room)),
            Some(n) if n < 1 => {
                Err(ApiError::bad("max_tokens", format!("max_tokens must be at least 1, got {n}.")))
            }
            Some(n) if n as u64 > room as u64 => Err(ApiError::bad(
                "max_tokens",
                format!(
                    "This model's maximum context length is {limit} tokens. However, you requested {n} output tokens and your prompt contains {} input tokens. Please reduce either.",
                    limit - room
                ),
            )),
            Some(n) => Ok(n as usize),
        }
    }

    /// How many likely tokens to list.
    fn logprobs(&self, chat: bool) -> Result<Option<usize>, ApiError> {
        let n = match (&self.logprobs, chat) {
            (None | Some(Value::Null), _) | (Some(Value::Bool(false)), true) => return Ok(None),
            (Some(Value::Bool(true)), true) => self.top_logprobs.unwrap_or(0),
            (Some(Value::Number(n)), false) if n.is_u64() => n.as_u64().unwrap_or_default() as usize,
            (Some(other), _) => {
                let wanted = if chat { "true or false" } else { "a number" };
                return Err(ApiError::bad("logprobs", format!("logprobs is {other}; it must be {wanted}")));
            }
        };
        if n > MAX_LOGPROBS {
            return Err(ApiError::bad(
                "logprobs",
                format!("{n} log probabilities; at most {MAX_LOGPROBS} are given"),
            ));
        }
        Ok(Some(n))
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one.clone()],
            Some(Stop::Many(many)) => many.clone(),
        };
        if stops.len() > MAX_STOPS.0 || stops.iter().any(|s| s.is_empty() || s.len() > MAX_STOPS.1) {
            return Err(ApiError::bad(
                "stop",
                format!("at most {} stop strings of 1 to {} bytes are possible", MAX_STOPS.0, MAX_STOPS.1),
            ));
        }
        Ok(stops)
    }

    fn sampling(&self, logprobs: Option<usize>) -> Result<Sampling, ApiError> {
        let within = |name: &'static str, value: Option<f32>, default: f32, low: f32, high: f32| {
            let value = value.unwrap_or(default);
            if (low..=high).contains(&value) {
                return Ok(value);
            }
            Err(ApiError::bad(name, format!("{name} is {value}; it must be {low} to {high}")))
        };
        let top_p = within("top_p", self.top_p, 1.0, 0.0, 1.0)?;
        if top_p == 0.0 {
            return Err(ApiError::bad("top_p", "top_p is 0; it must be above 0"));
        }
        let repetition = within("repetition_penalty", self.repetition_penalty, 1.0, 0.0, 100.0)?;
        if repetition == 0.0 {
            return Err(ApiError::bad("repetition_penalty", "repetition_penalty is 0; it must be above 0"));
        }
        let top_k = match self.top_k {
            None | Some(-1 | 0) => 0,
            Some(k) if k > 0 => k as usize,
            Some(k) => {
                return Err(ApiError::bad("top_k", format!("top_k is {k}; it must be -1 (all) or above 0")));
            }
        };
        let bias = self.logit_bias.iter().flatten().map(|(token, bias)| {
            let parsed = token.parse().ok().zip(bias.as_f64());
            parsed.map(|(t, b)| (t, b as f32)).ok_or_else(|| {
                ApiError::bad(
                    "logit_bias",
                    format!("logit_bias: {token:?}: {bias} is not a token id with a number"),
                )
            })
        });
        Ok(Sampling {
            temperature: within("temperature", self.temperature, 1.0, 0.0, 100.0)?,
            top_p,
            top_k,
            min_p: within("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            seed: self.seed.map_or_else(random, |seed| seed as u64),
            presence: within("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency: within("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            repetition,
            bias: bias.collect::<Result<_, _>>()?,
            logprobs,
        })
    }

    /// Where the cache is wanted, and whether the first token is to be named.
    fn target(&self, service: &Service) -> Result<(Option<Target>, bool), ApiError> {
        const PARAM: &str = "kv_transfer_params";
        let Some(params) = &self.kv_transfer_params else { return Ok((None, false)) };
        let first_tok = params.ret_first_tok.unwrap_or(false);
        let Some(spec) = &params.disagg_spec else { return Ok((None, first_tok)) };
        if !service.sends {
            return Err(ApiError::bad(PARAM, "this instance is a decoder; it sends no cache (see --role)"));
        }
        let port = match &spec.receiver_init_port {
            Ports::One(port) => Some(*port),
            Ports::Many(ports) => ports.first().copied(),
        };
        let port = port.ok_or_else(|| {
            ApiError::bad(PARAM, "receiver_init_port is empty; one port per rank is needed")
        })?;
        kvxfer::RequestId::new(&spec.req_id).map_err(|e| ApiError::bad(PARAM, format!("req_id: {e}")))?;
        if self.n.unwrap_or(1) != 1
            || matches!(&self.prompt, Some(Prompt::Texts(p)) if p.len() != 1)
            || matches!(&self.prompt, Some(Prompt::TokenLists(p)) if p.len() != 1)
        {
            return Err(ApiError::bad(PARAM, "a disagg_spec is for one prompt with one text (n = 1)"));
        }
        let target = Target { request: spec.req_id.clone(), host: spec.receiver_host.clone(), port };
        Ok((Some(target), first_tok))
    }
}

/// A seed for those who name none.
fn random() -> u64 {
    getrandom::u64().unwrap_or_else(|_| {
        // No randomness from the system: the clock will do for choosing words.
        std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64)
    })
}
