//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    Extension,
    extract::State,
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::{
    App, RequestId,
    chat::{usage, with_usage},
    drive::{self, Choice, Driven},
    error::ApiError,
    extract::Body,
    params::Params,
    sse,
};
use crate::{
    engine::{Engine, Event, sampling::TokenLogprobs},
    unix_now,
};

/// Most alternatives per token.
const MAX_LOGPROBS: u32 = 20;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 256;
/// Tokens generated when the request does not say, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;

/// A prompt, or several: as text or as token ids.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One list of ids.
    Ids(Vec<u32>),
    /// Several lists of ids.
    IdLists(Vec<Vec<u32>>),
}

/// A completion request.
#[derive(Debug, Deserialize)]
pub struct CompletionRequest {
    prompt: Json,
    echo: Option<bool>,
    logprobs: Option<u32>,
    suffix: Option<String>,
    best_of: Option<i64>,
    #[serde(flatten)]
    params: Params,
}

/// Prompts as ids, from any of the four shapes.
pub async fn prompt_ids(
    app: &App,
    engine: &Arc<Engine>,
    prompt: Json,
    field: &str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let shape = || {
        ApiError::param(
            field,
            format!(
                "`{field}` must be a text, a list of texts, a list of token ids or a list of such lists."
            ),
        )
    };
    let prompt: Prompt = serde_json::from_value(prompt).map_err(|_| shape())?;
    let lists = match prompt {
        Prompt::Text(text) => vec![app.tokenize(engine, text, true).await?],
        Prompt::Texts(texts) => {
            let mut lists = Vec::new();
            for text in texts {
                lists.push(app.tokenize(engine, text, true).await?);
            }
            lists
        }
        Prompt::Ids(ids) => vec![ids],
        Prompt::IdLists(lists) => lists,
    };
    if lists.is_empty() || lists.len() > MAX_PROMPTS || lists.iter().any(Vec::is_empty) {
        return Err(ApiError::param(
            field,
            format!("`{field}` must hold 1 to {MAX_PROMPTS} prompts, none of them empty."),
        ));
    }
    if let Some(id) = lists.iter().flatten().find(|id| **id as usize >= engine.vocab) {
        return Err(ApiError::param(
            field,
            format!("Token id {id} is outside the vocabulary of {} tokens.", engine.vocab),
        ));
    }
    Ok(lists)
}

/// Handles a request.
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let p = &request.params;
    let engine = app.engine(p.model.as_deref())?;
    if request.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::param("suffix", "`suffix` is not supported by this model."));
    }
    let n = p.choices()?;
    if request.best_of.is_some_and(|b| b != n as i64) {
        return Err(ApiError::param("best_of", "`best_of` other than `n` is not supported."));
    }
    let logprobs = request.logprobs.filter(|l| *l > 0 || request.logprobs == Some(0));
    if logprobs.is_some_and(|l| l > MAX_LOGPROBS) {
        return Err(ApiError::param("logprobs", format!("`logprobs` is at most {MAX_LOGPROBS}.")));
    }
    let logprobs = logprobs.map(|l| l as usize);
    let echo = request.echo == Some(true);
    let lists = prompt_ids(&app, &engine, request.prompt, "prompt").await?;
    let mut prompts = Vec::with_capacity(lists.len());
    for ids in lists {
        let mut generate = p.generate(&engine, ids.len(), Some(DEFAULT_TOKENS), logprobs)?;
        generate.prompt_logprobs = logprobs.filter(|_| echo);
        prompts.push((ids, generate));
    }
    let driven = drive::submit(&engine, &prompts, n)?;
    let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|p| p.0).collect();
    let reply = Reply {
        id: format!("cmpl-{}", id.0),
        model: p.model.clone().unwrap_or_else(|| engine.name.clone()),
        created: unix_now(),
        echo,
        n,
        prompts,
        engine,
    };
    if p.stream == Some(true) {
        let usage = p.stream_options.as_ref().is_some_and(|o| o.include_usage);
        return Ok(sse::respond(stream(reply, driven, usage, logprobs.is_some())));
    }
    let choices = driven.collect().await?;
    let generated = choices.iter().map(|c| c.pieces.len()).sum();
    let cached = choices.iter().step_by(n).map(|c| c.cached).sum();
    let list = choices
        .iter()
        .enumerate()
        .map(|(i, c)| reply.choice(i, c, logprobs.is_some()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut body = reply.chunk(list);
    body["usage"] = usage(reply.prompt_tokens(), generated, cached);
    Ok(axum::Json(body).into_response())
}

struct Reply {
    id: String,
    model: String,
    created: u64,
    echo: bool,
    n: usize,
    prompts: Vec<Vec<u32>>,
    engine: Arc<Engine>,
}

impl Reply {
    fn chunk(&self, choices: Vec<Json>) -> Json {
        json!({"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
               "system_fingerprint": null, "choices": choices})
    }

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    fn prompt_of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.n]
    }

    fn choice(&self, index: usize, choice: &Choice, logprobs: bool) -> Result<Json, ApiError> {
        let prompt = self.prompt_of(index);
        let mut list = LogprobList::default();
        let mut text = String::new();
        if self.echo {
            text = self.engine.tokenizer.decode(prompt, true)?;
            let known = choice.prompt_logprobs.iter().map(Some);
            for (id, entry) in prompt.iter().zip(std::iter::once(None).chain(known)) {
                list.add(&self.engine, *id, entry);
            }
        }
        for piece in &choice.pieces {
            list.add(&self.engine, piece.id, piece.logprobs.as_ref());
        }
        text += &choice.text;
        Ok(json!({"index": index, "text": text, "logprobs": logprobs.then(|| list.json()),
                  "finish_reason": choice.finish.map(|f| f.name())}))
    }
}

/// OpenAI's parallel lists of tokens.
#[derive(Default)]
struct LogprobList {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Json>,
    offsets: Vec<usize>,
    length: usize,
}

impl LogprobList {
    fn add(&mut self, engine: &Engine, id: u32, entry: Option<&TokenLogprobs>) {
        let token = engine.tokenizer.token_text(id);
        self.offsets.push(self.length);
        self.length += token.chars().count();
        self.logprobs.push(entry.map(|e| e.chosen));
        self.top.push(entry.map_or(Json::Null, |e| {
            let mut map = Map::new();
            for (id, l) in &e.top {
                map.insert(engine.tokenizer.token_text(*id), json!(l));
            }
            map.entry(token.clone()).or_insert(json!(e.chosen));
            Json::Object(map)
        }));
        self.tokens.push(token);
    }

    fn json(&self) -> Json {
        json!({"tokens": self.tokens, "token_logprobs": self.logprobs, "top_logprobs": self.top, "text_offset": self.offsets})
    }
}

fn stream(reply: Reply, driven: Driven, want_usage: bool, logprobs: bool) -> impl Stream<Item = Json> + Send {
    let total = reply.prompts.len() * reply.n;
    let mut first = Vec::new();
    if reply.echo {
        for index in 0..total {
            let text = reply.engine.tokenizer.decode(reply.prompt_of(index), true).unwrap_or_default();
            let choice = json!({"index": index, "text": text, "logprobs": null, "finish_reason": null});
            first.push(with_usage(reply.chunk(vec![choice]), want_usage));
        }
    }
    let (mut generated, mut cached, mut open) = (0, 0, total);
    let events = driven.stream().flat_map(move |(index, event)| {
        let mut out = Vec::new();
        let mut choice = |text: &str, logprobs: Json, finish: Option<&str>| {
            let c = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish});
            out.push(with_usage(reply.chunk(vec![c]), want_usage));
        };
        match event {
            Event::Token { id, text, logprobs: entry } => {
                generated += 1;
                if logprobs {
                    let mut list = LogprobList::default();
                    list.add(&reply.engine, id, entry.as_ref());
                    choice(&text, list.json(), None);
                } else if !text.is_empty() {
                    choice(&text, Json::Null, None);
                }
            }
            Event::Done { finish, cached: found } => {
                choice("", Json::Null, Some(finish.name()));
                cached += if index % reply.n == 0 { found } else { 0 };
                open -= 1;
                if open == 0 && want_usage {
                    let mut last = reply.chunk(Vec::new());
                    last["usage"] = usage(reply.prompt_tokens(), generated, cached);
                    out.push(last);
                }
            }
            Event::Failed(why) => out.push(ApiError::internal(why).body()),
            Event::Prompt(_) | Event::Embedding(_) => {}
        }
        futures_util::stream::iter(out)
    });
    futures_util::stream::iter(first).chain(events)
}
