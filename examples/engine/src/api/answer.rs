//! Answers in `OpenAI`'s shapes, whole or as a stream of server-sent events.

use super::Service;
use super::error::ApiError;
use super::request::Ask;
use crate::sample::Scored;
use crate::scheduler::{Event, Step};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Sender, UnboundedReceiver};

/// A request being answered.
pub(super) struct Answer {
    pub(super) service: Service,
    pub(super) ask: Ask,
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created: u64,
    /// One for each prompt.
    pub(super) events: Vec<UnboundedReceiver<Event>>,
}

/// One text so far.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<(u32, Option<Vec<Scored>>)>,
    /// Characters of the tokens listed so far.
    offset: usize,
    last: Option<Step>,
}

/// What a stream sends per event.
type Out = Sender<String>;

impl Answer {
    /// Waits for the whole answer.
    pub(super) async fn whole(mut self) -> Result<Value, ApiError> {
        let n = self.ask.choices;
        let mut choices = Vec::new();
        let (mut cached, mut prompt_scores) = (0, None);
        for (p, mut events) in std::mem::take(&mut self.events).into_iter().enumerate() {
            let mut texts: Vec<Choice> = (0..n).map(|_| Choice::default()).collect();
            let mut scores = None;
            while texts.iter().any(|c| c.last.is_none()) {
                match events.recv().await {
                    Some(Event::Admitted(tokens)) => cached += tokens,
                    Some(Event::Prompt(given)) => scores = Some(given),
                    Some(Event::Token(step)) => texts[step.choice].push(step),
                    Some(Event::Failed(message)) => return Err(ApiError::internal(message)),
                    None => return Err(ended()),
                }
            }
            for mut choice in texts {
                if self.ask.echo {
                    choice.echo(&self, p, scores.as_deref());
                }
                choices.push(self.whole_choice(choices.len(), p, choice));
            }
            prompt_scores = scores;
        }
        let (kind, details) = (self.kind(false), self.service.usage_details);
        let completion: usize = choices.iter().map(|(n, _)| n).sum();
        let first_tok = choices.first().and_then(|(_, c)| c.get("first_tok").cloned());
        let choices: Vec<Value> = choices
            .into_iter()
            .map(|(_, mut c)| {
                c.remove("first_tok");
                c.into()
            })
            .collect();
        let mut answer = json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(self.prompt_tokens(), completion, details.then_some(cached)),
            "service_tier": null,
            "system_fingerprint": null,
            "kv_transfer_params": null,
        });
        if self.ask.first_tok {
            answer["kv_transfer_params"] = json!({ "first_tok": first_tok });
        }
        if self.ask.chat {
            answer["prompt_token_ids"] =
                if self.ask.token_ids { json!(self.ask.prompts[0]) } else { Value::Null };
            answer["prompt_logprobs"] = prompt_scores.map_or(Value::Null, |s| self.prompt_logprobs(0, &s));
        }
        Ok(answer)
    }

    /// Sends everything as events until the end or until nobody listens.
    pub(super) async fn stream(mut self, out: Out) {
        let result = self.stream_events(&out).await;
        if let Err(Some(e)) = result {
            let _ = out.send(event(&e.body())).await;
        }
        let _ = out.send("data: [DONE]\n\n".into()).await;
    }

    /// `Err(None)`: nobody listens any more.
    async fn stream_events(&mut self, out: &Out) -> Result<(), Option<ApiError>> {
        let n = self.ask.choices;
        let mut choices: Vec<Choice> = (0..n * self.ask.prompts.len()).map(|_| Choice::default()).collect();
        let (mut begun, mut cached) = (false, 0);
        let mut scores: Vec<Option<Vec<Vec<Scored>>>> = vec![None; self.ask.prompts.len()];
        let mut events = merge(std::mem::take(&mut self.events));
        while choices.iter().any(|c| c.last.is_none()) {
            let Some((p, what)) = events.recv().await else { return Err(Some(ended())) };
            match what {
                Event::Admitted(tokens) => cached += tokens,
                Event::Prompt(given) => scores[p] = Some(given),
                Event::Failed(message) => return Err(Some(ApiError::internal(message))),
                Event::Token(step) => {
                    if self.ask.chat && !std::mem::replace(&mut begun, true) {
                        self.begin_chat(out).await?;
                    }
                    let index = p * n + step.choice;
                    let chunk = self.chunk(index, p, &mut choices[index], step, scores[p].as_deref());
                    out.send(event(&chunk)).await.map_err(|_| None)?;
                }
            }
        }
        if self.ask.usage {
            let completion = choices.iter().map(|c| c.tokens.len()).sum();
            let cached = self.service.usage_details.then_some(cached);
            let mut last = self.head();
            last.insert("choices".into(), json!([]));
            let mut usage = self.usage(self.prompt_tokens(), completion, cached);
            if cached.is_none()
                && let Some(usage) = usage.as_object_mut()
            {
                usage.remove("prompt_tokens_details");
            }
            last.insert("usage".into(), usage);
            out.send(event(&last.into())).await.map_err(|_| None)?;
        }
        Ok(())
    }

    /// A chat's first events: who speaks.
    async fn begin_chat(&self, out: &Out) -> Result<(), Option<ApiError>> {
        for i in 0..self.ask.choices {
            let mut chunk = self.head();
            chunk.insert(
                "choices".into(),
                json!([{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}]),
            );
            let ids = if self.ask.token_ids { json!(self.ask.prompts[0]) } else { Value::Null };
            chunk.insert("prompt_token_ids".into(), ids);
            if self.ask.continuous_usage {
                chunk.insert("usage".into(), self.usage(self.ask.prompts[0].len(), 0, None));
            }
            out.send(event(&chunk.into())).await.map_err(|_| None)?;
        }
        Ok(())
    }

    /// One token as an event.
    fn chunk(
        &self,
        index: usize,
        prompt: usize,
        choice: &mut Choice,
        step: Step,
        scores: Option<&[Vec<Scored>]>,
    ) -> Value {
        let first = choice.tokens.is_empty();
        let mut delta = Choice { offset: choice.offset, ..Choice::default() };
        let token = step.token;
        let finish = step.finish.clone();
        delta.push(step);
        if first && self.ask.echo {
            delta.echo(self, prompt, scores);
        }
        let logprobs = self.logprobs(&mut delta);
        choice.offset = delta.offset;
        choice.tokens.push(token);
        let (reason, cause) =
            finish.clone().map_or((Value::Null, Value::Null), |f| (f.reason.into(), f.stop));
        choice.last = delta.last.take();
        let mut body = json!({"index": index, "logprobs": logprobs, "finish_reason": reason});
        body["token_ids"] = if self.ask.token_ids { json!([token]) } else { Value::Null };
        if self.ask.chat {
            body["delta"] = json!({"content": delta.text});
            if finish.is_some() {
                body["stop_reason"] = cause;
            }
        } else {
            body["text"] = delta.text.into();
            body["stop_reason"] = cause;
            body["prompt_token_ids"] =
                if first && self.ask.token_ids { json!(self.ask.prompts[prompt]) } else { Value::Null };
        }
        let mut chunk = self.head();
        chunk.insert("choices".into(), json!([body]));
        if self.ask.continuous_usage {
            let usage = self.usage(self.ask.prompts[prompt].len(), choice.tokens.len(), None);
            chunk.insert("usage".into(), usage);
        }
        chunk.into()
    }

    fn whole_choice(&self, index: usize, prompt: usize, mut choice: Choice) -> (usize, Map<String, Value>) {
        let logprobs = self.logprobs(&mut choice);
        let finish = choice.last.take().and_then(|s| s.finish);
        let (reason, stop) = finish.map_or((Value::Null, Value::Null), |f| (f.reason.into(), f.stop));
        let mut body = Map::new();
        body.insert("index".into(), index.into());
        body.insert("logprobs".into(), logprobs);
        body.insert("finish_reason".into(), reason);
        body.insert("stop_reason".into(), stop);
        body.insert("first_tok".into(), json!(choice.tokens.first()));
        body.insert("token_ids".into(), if self.ask.token_ids { json!(choice.tokens) } else { Value::Null });
        if self.ask.chat {
            body.insert("message".into(), json!({"role": "assistant", "content": choice.text}));
        } else {
            body.insert("text".into(), choice.text.into());
            let ids = if self.ask.token_ids { json!(self.ask.prompts[prompt]) } else { Value::Null };
            body.insert("prompt_token_ids".into(), ids);
        }
        (choice.tokens.len(), body)
    }

    /// Log probabilities of a text's new tokens in the endpoint's shape.
    fn logprobs(&self, choice: &mut Choice) -> Value {
        let Some(top) = self.ask.logprobs else { return Value::Null };
        let listed = std::mem::take(&mut choice.logprobs);
        if self.ask.chat {
            let entry = |(token, score): Scored| {
                let name = self.token(token);
                json!({"token": name, "logprob": score.max(-9999.0), "bytes": name.as_bytes()})
            };
            let content: Vec<Value> = listed
                .into_iter()
                .map(|(token, scores)| {
                    let scores = scores.unwrap_or_default();
                    let own = scores.first().copied().unwrap_or((token, -9999.0));
                    let mut body = entry(own);
                    body["top_logprobs"] = scores.into_iter().take(top).map(entry).collect();
                    body
                })
                .collect();
            return json!({ "content": content });
        }
        let (mut tokens, mut offsets, mut own, mut tops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, scores) in listed {
            let name = self.token(token);
            offsets.push(choice.offset);
            choice.offset += name.chars().count();
            own.push(scores.as_ref().and_then(|s| s.first()).map(|s| s.1.max(-9999.0)));
            tops.push(scores.map(|s| {
                s.into_iter()
                    .take(top + 1)
                    .map(|(t, v)| (self.token(t), json!(v.max(-9999.0))))
                    .collect::<Map<_, _>>()
            }));
            tokens.push(name);
        }
        json!({"text_offset": offsets, "token_logprobs": own, "tokens": tokens, "top_logprobs": tops})
    }

    fn prompt_logprobs(&self, prompt: usize, scores: &[Vec<Scored>]) -> Value {
        let rest = self.ask.prompts[prompt].iter().skip(1).zip(scores).map(|(_, scores)| {
            let entries = scores.iter().map(|(token, score)| {
                let body = json!({"logprob": score.max(-9999.0), "decoded_token": self.token(*token)});
                (token.to_string(), body)
            });
            Value::from(entries.collect::<Map<_, _>>())
        });
        std::iter::once(Value::Null).chain(rest).collect()
    }

    /// A token as clients see it in lists.
    fn token(&self, token: u32) -> String {
        if self.ask.tokens_as_ids {
            return format!("token_id:{token}");
        }
        self.service.text.decode(&[token], false)
    }

    fn head(&self) -> Map<String, Value> {
        let mut head = Map::new();
        head.insert("id".into(), self.id.clone().into());
        head.insert("object".into(), self.kind(true).into());
        head.insert("created".into(), self.created.into());
        head.insert("model".into(), self.model.clone().into());
        head
    }

    fn kind(&self, stream: bool) -> &'static str {
        match (self.ask.chat, stream) {
            (false, _) => "text_completion",
            (true, false) => "chat.completion",
            (true, true) => "chat.completion.chunk",
        }
    }

    fn prompt_tokens(&self) -> usize {
        self.ask.prompts.iter().map(Vec::len).sum()
    }

    #[expect(clippy::unused_self, reason = "reads as part of the answer beside the other shapes")]
    fn usage(&self, prompt: usize, completion: usize, cached: Option<usize>) -> Value {
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": cached.map(|n| json!({ "cached_tokens": n })),
        })
    }
}

impl Choice {
    fn push(&mut self, step: Step) {
        self.text.push_str(&step.text);
        self.tokens.push(step.token);
        self.logprobs.push((step.token, step.logprobs.clone()));
        if step.finish.is_some() {
            self.last = Some(step);
        }
    }

    /// Puts the prompt in front.
    fn echo(&mut self, answer: &Answer, prompt: usize, scores: Option<&[Vec<Scored>]>) {
        let tokens = &answer.ask.prompts[prompt];
        self.text.insert_str(0, &answer.service.text.decode(tokens, true));
        let scores = std::iter::once(None).chain(scores.unwrap_or_default().iter().cloned().map(Some));
        let own = std::mem::take(&mut self.logprobs);
        self.logprobs = tokens.iter().copied().zip(scores).chain(own).collect();
    }
}

/// One server-sent event.
fn event(body: &Value) -> String {
    format!("data: {body}\n\n")
}

fn ended() -> ApiError {
    ApiError::internal("the engine has stopped working on this request")
}

/// Events of several prompts in one queue; the common case of one prompt costs a task, too, for the sake of one path.
fn merge(many: Vec<UnboundedReceiver<Event>>) -> tokio::sync::mpsc::Receiver<(usize, Event)> {
    let (out, merged) = tokio::sync::mpsc::channel(64);
    for (i, mut events) in many.into_iter().enumerate() {
        let out = out.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if out.send((i, event)).await.is_err() {
                    return;
                }
            }
        });
    }
    merged
}
