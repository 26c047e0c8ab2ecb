//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    Extension,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::{
    App, RequestId,
    chunks::{Chunks, stream_chunks, usage},
    error::ApiError,
    extract::Body,
    generation::{self, Choice},
    params::CommonParams,
    sse,
};
use crate::{
    engine::{Engine, output::FinishReason, sampling::TokenLogprobs},
    unix_now,
};

/// Maximum number of alternatives per token.
const MAX_LOGPROBS: u32 = 20;
/// Maximum number of prompts per request.
const MAX_PROMPTS: usize = 256;
/// Default of `max_tokens`, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// One or more prompts, as text or as token ids.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One list of token ids.
    Ids(Vec<u32>),
    /// Several lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// Body of a completion request.
#[derive(Debug, Deserialize)]
pub struct CompletionRequest {
    prompt: Json,
    echo: Option<bool>,
    logprobs: Option<u32>,
    suffix: Option<String>,
    best_of: Option<i64>,
    #[serde(flatten)]
    params: CommonParams,
}

/// Returns the token ids of prompts in any of the four formats.
pub async fn tokenize_prompts(
    app: &App,
    engine: &Arc<Engine>,
    prompt: Json,
    field: &str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let invalid = || {
        ApiError::param(
            field,
            format!(
                "`{field}` must be a string, a list of strings, a list of token ids, or a list of lists of token ids."
            ),
        )
    };
    let prompt: Prompt = serde_json::from_value(prompt).map_err(|_| invalid())?;
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
            format!("`{field}` must have 1 to {MAX_PROMPTS} prompts, and no prompt may be empty."),
        ));
    }
    if let Some(id) = lists.iter().flatten().find(|id| **id as usize >= engine.info.vocab) {
        return Err(ApiError::param(
            field,
            format!("Token id {id} is outside the vocabulary of {} tokens.", engine.info.vocab),
        ));
    }
    Ok(lists)
}

/// Handles `POST /v1/completions`.
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let p = &request.params;
    let engine = app.engine(p.model.as_deref())?;
    if request.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::param("suffix", "`suffix` is not supported; leave it out."));
    }
    let n = p.choice_count()?;
    if request.best_of.is_some_and(|b| b != n as i64) {
        return Err(ApiError::param(
            "best_of",
            "`best_of` is not supported unless it equals `n`; leave it out.",
        ));
    }
    let logprobs = request.logprobs;
    if logprobs.is_some_and(|l| l > MAX_LOGPROBS) {
        return Err(ApiError::param("logprobs", format!("`logprobs` must be at most {MAX_LOGPROBS}.")));
    }
    let logprobs = logprobs.map(|l| l as usize);
    let echo = request.echo == Some(true);
    let lists = tokenize_prompts(&app, &engine, request.prompt, "prompt").await?;
    let mut prompts = Vec::with_capacity(lists.len());
    for ids in lists {
        let mut params = p.generation_params(&engine, ids.len(), Some(DEFAULT_MAX_TOKENS), logprobs)?;
        params.prompt_logprobs = logprobs.filter(|_| echo);
        prompts.push((ids, params));
    }
    let pending = generation::submit(&engine, &prompts, n)?;
    let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|p| p.0).collect();
    let response = CompletionResponse {
        id: format!("cmpl-{}", id.0),
        model: p.model.clone().unwrap_or_else(|| engine.name.clone()),
        created: unix_now(),
        echo,
        logprobs: logprobs.is_some(),
        n,
        prompts,
        engine,
    };
    if p.stream == Some(true) {
        return Ok(sse::respond(stream_chunks(response, pending, p.includes_usage())));
    }
    let choices = pending.collect().await?;
    let generated = choices.iter().map(|c| c.tokens.len()).sum();
    let cached = choices.iter().step_by(n).map(|c| c.cached_tokens).sum();
    let list =
        choices.iter().enumerate().map(|(i, c)| response.choice(i, c)).collect::<Result<Vec<_>, _>>()?;
    let mut body = response.chunk(list);
    body["usage"] = usage(response.prompt_tokens(), generated, cached);
    Ok(axum::Json(body).into_response())
}

/// The fields that all chunks of a response have.
struct CompletionResponse {
    id: String,
    model: String,
    created: u64,
    echo: bool,
    logprobs: bool,
    n: usize,
    prompts: Vec<Vec<u32>>,
    engine: Arc<Engine>,
}

impl CompletionResponse {
    /// Returns the prompt of a choice.
    fn prompt_of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.n]
    }

    fn choice(&self, index: usize, choice: &Choice) -> Result<Json, ApiError> {
        let prompt = self.prompt_of(index);
        let mut list = LogprobLists::default();
        let mut text = String::new();
        if self.echo {
            text = self.engine.info.tokenizer.decode(prompt, true)?;
            let entries = choice.prompt_logprobs.iter().map(Some);
            for (id, entry) in prompt.iter().zip(std::iter::once(None).chain(entries)) {
                list.add(&self.engine, *id, entry);
            }
        }
        for token in &choice.tokens {
            list.add(&self.engine, token.id, token.logprobs.as_ref());
        }
        text += &choice.text;
        Ok(json!({"index": index, "text": text, "logprobs": self.logprobs.then(|| list.to_json()),
                  "finish_reason": choice.finish_reason.map(|f| f.name())}))
    }
}

/// Log-probabilities in the format of completions: parallel lists.
#[derive(Default)]
struct LogprobLists {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Json>,
    offsets: Vec<usize>,
    length: usize,
}

impl LogprobLists {
    fn add(&mut self, engine: &Engine, id: u32, entry: Option<&TokenLogprobs>) {
        let token = engine.info.tokenizer.token_text(id);
        self.offsets.push(self.length);
        self.length += token.chars().count();
        self.logprobs.push(entry.map(|e| e.chosen));
        self.top.push(entry.map_or(Json::Null, |e| {
            let mut map = Map::new();
            for (id, l) in &e.top {
                map.insert(engine.info.tokenizer.token_text(*id), json!(l));
            }
            map.entry(token.clone()).or_insert(json!(e.chosen));
            Json::Object(map)
        }));
        self.tokens.push(token);
    }

    fn to_json(&self) -> Json {
        json!({"tokens": self.tokens, "token_logprobs": self.logprobs, "top_logprobs": self.top, "text_offset": self.offsets})
    }
}

impl Chunks for CompletionResponse {
    fn chunk(&self, choices: Vec<Json>) -> Json {
        json!({"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
               "system_fingerprint": null, "choices": choices})
    }

    fn opening(&self) -> Vec<Json> {
        let echoed = if self.echo { self.prompts.len() * self.n } else { 0 };
        let text = |index| self.engine.info.tokenizer.decode(self.prompt_of(index), true).unwrap_or_default();
        (0..echoed).map(|index| piece(index, &text(index), Json::Null, None)).collect()
    }

    fn token(&self, index: usize, id: u32, text: &str, logprobs: Option<&TokenLogprobs>) -> Option<Json> {
        if self.logprobs {
            let mut list = LogprobLists::default();
            list.add(&self.engine, id, logprobs);
            return Some(piece(index, text, list.to_json(), None));
        }
        (!text.is_empty()).then(|| piece(index, text, Json::Null, None))
    }

    fn ending(&self, index: usize, reason: FinishReason) -> Json {
        piece(index, "", Json::Null, Some(reason))
    }

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    fn counts(&self) -> (usize, usize) {
        (self.prompts.len(), self.n)
    }
}

/// A choice of a chunk.
fn piece(index: usize, text: &str, logprobs: Json, finish: Option<FinishReason>) -> Json {
    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.map(|f| f.name())})
}
