//! `POST /v1/chat/completions`.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Extension,
    extract::State,
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::{
    App, RequestId,
    error::ApiError,
    extract::Body,
    generation::{self, Choice, PendingChoices},
    params::CommonParams,
    sse,
};
use crate::{
    engine::{Engine, Event, sampling::TokenLogprobs},
    unix_now,
};

/// Maximum number of alternatives per token.
const MAX_TOP_LOGPROBS: u32 = 20;

/// Body of a chat request.
#[derive(Debug, Deserialize)]
pub struct ChatRequest {
    messages: Vec<Json>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Json>>,
    add_generation_prompt: Option<bool>,
    #[serde(flatten)]
    params: CommonParams,
}

/// Checks messages and converts their contents to strings, as chat templates expect.
pub fn normalize_messages(messages: &[Json]) -> Result<Vec<Json>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty; send at least one message."));
    }
    let one = |(i, message): (usize, &Json)| {
        let invalid = |what: &str| ApiError::param("messages", format!("messages[{i}] {what}."));
        let mut message = message.as_object().cloned().ok_or_else(|| invalid("is not an object"))?;
        if message.get("role").and_then(Json::as_str).is_none_or(str::is_empty) {
            return Err(invalid("has no `role`; send a string"));
        }
        let content = match message.get("content") {
            None | Some(Json::Null) if message.contains_key("tool_calls") => String::new(),
            Some(Json::String(text)) => text.clone(),
            Some(Json::Array(parts)) => {
                let text = |p: &Json| {
                    p["text"]
                        .as_str()
                        .map(str::to_owned)
                        .filter(|_| p["type"].as_str().is_none_or(|t| t == "text"))
                };
                let texts = parts.iter().map(text).collect::<Option<Vec<_>>>();
                texts
                    .ok_or_else(|| {
                        invalid("has a content part that is not text; this model supports only text")
                    })?
                    .join("\n")
            }
            _ => return Err(invalid("has no `content`; send a string or a list of text parts")),
        };
        message.insert("content".into(), content.into());
        Ok(Json::Object(message))
    };
    messages.iter().enumerate().map(one).collect()
}

/// Handles `POST /v1/chat/completions`.
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Body(request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let engine = app.engine(request.params.model.as_deref())?;
    let messages = normalize_messages(&request.messages)?;
    let text = engine.info.template.render(
        &messages,
        request.tools.as_ref(),
        request.add_generation_prompt.unwrap_or(true),
    )?;
    // The template has already added the special tokens.
    let prompt = app.tokenize(&engine, text, false).await?;
    let logprobs = request.logprobs()?;
    let params = request.params.generation_params(&engine, prompt.len(), None, logprobs)?;
    let n = request.params.choice_count()?;
    let prompt_tokens = prompt.len();
    let pending = generation::submit(&engine, &[(prompt, params)], n)?;
    let response = ChatResponse {
        id: format!("chatcmpl-{}", id.0),
        model: request.params.model.clone().unwrap_or_else(|| engine.name.clone()),
        created: unix_now(),
        prompt_tokens,
        engine,
    };
    if request.params.stream == Some(true) {
        let include_usage = request.params.includes_usage();
        return Ok(sse::respond(stream(response, pending, n, include_usage)));
    }
    let choices = pending.collect().await?;
    Ok(axum::Json(response.body(&choices, logprobs.is_some())).into_response())
}

impl ChatRequest {
    /// Returns the number of alternatives per token; None if log-probabilities are not requested.
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        if top > MAX_TOP_LOGPROBS {
            return Err(ApiError::param(
                "top_logprobs",
                format!("`top_logprobs` is {top}, expected 0 to {MAX_TOP_LOGPROBS}."),
            ));
        }
        if top > 0 && self.logprobs != Some(true) {
            return Err(ApiError::param("top_logprobs", "`top_logprobs` needs `logprobs: true`."));
        }
        Ok((self.logprobs == Some(true)).then_some(top as usize))
    }
}

/// The fields that all chunks of a response have.
struct ChatResponse {
    id: String,
    model: String,
    created: u64,
    prompt_tokens: usize,
    engine: Arc<Engine>,
}

impl ChatResponse {
    /// Returns the body of a response that is not streamed.
    fn body(&self, choices: &[Choice], logprobs: bool) -> Json {
        let generated = choices.iter().map(|c| c.tokens.len()).sum();
        let cached = choices.first().map_or(0, |c| c.cached_tokens);
        let list: Vec<Json> =
            choices.iter().enumerate().map(|(index, c)| self.choice(index, c, logprobs)).collect();
        json!({
            "id": self.id, "object": "chat.completion", "created": self.created, "model": self.model,
            "system_fingerprint": null, "choices": list, "usage": usage(self.prompt_tokens, generated, cached),
        })
    }

    fn choice(&self, index: usize, choice: &Choice, logprobs: bool) -> Json {
        let entries: Option<Vec<Json>> = logprobs.then(|| {
            choice
                .tokens
                .iter()
                .filter_map(|t| Some(logprob_entry(&self.engine, t.id, t.logprobs.as_ref()?)))
                .collect()
        });
        json!({
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": null},
            "logprobs": entries.map(|e| json!({"content": e, "refusal": null})),
            "finish_reason": choice.finish_reason.map(|f| f.name()),
        })
    }

    /// Returns a chunk of a stream.
    fn chunk(&self, choices: Vec<Json>) -> Json {
        json!({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
               "system_fingerprint": null, "choices": choices})
    }
}

/// Returns the `usage` object of a response.
pub fn usage(prompt: usize, generated: usize, cached: usize) -> Json {
    json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
           "prompt_tokens_details": {"cached_tokens": cached}})
}

/// Returns the log-probabilities of a token in the format of chat completions.
fn logprob_entry(engine: &Engine, id: u32, logprobs: &TokenLogprobs) -> Json {
    let one = |id: u32, logprob: f32| {
        let token = engine.info.tokenizer.token_text(id);
        json!({"token": token, "logprob": logprob.max(-9999.0), "bytes": token.as_bytes()})
    };
    let mut entry = one(id, logprobs.chosen);
    entry["top_logprobs"] = logprobs.top.iter().map(|(id, l)| one(*id, *l)).collect();
    entry
}

/// Streams the chunks of a response.
fn stream(
    response: ChatResponse,
    pending: PendingChoices,
    n: usize,
    include_usage: bool,
) -> impl Stream<Item = Json> + Send {
    let role = (0..n).map(|index| {
        json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    });
    let first: Vec<Json> = role.map(|c| with_null_usage(response.chunk(vec![c]), include_usage)).collect();
    let mut generated: HashMap<usize, usize> = HashMap::new();
    let (mut cached, mut unfinished) = (0, n);
    let events = pending.stream().flat_map(move |(index, event)| {
        let mut out = Vec::new();
        let mut choice = |delta: Json, logprobs: Json, finish: Option<&str>| {
            let c = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
            out.push(with_null_usage(response.chunk(vec![c]), include_usage));
        };
        match event {
            Event::Token { id, text, logprobs } => {
                *generated.entry(index).or_default() += 1;
                let entry = logprobs
                    .map(|l| json!({"content": [logprob_entry(&response.engine, id, &l)], "refusal": null}));
                if !text.is_empty() || entry.is_some() {
                    choice(json!({"content": text}), entry.unwrap_or(Json::Null), None);
                }
            }
            Event::Finished { reason, cached_tokens } => {
                choice(json!({}), Json::Null, Some(reason.name()));
                cached = if index == 0 { cached_tokens } else { cached };
                unfinished -= 1;
                if unfinished == 0 && include_usage {
                    let mut last = response.chunk(Vec::new());
                    last["usage"] = usage(response.prompt_tokens, generated.values().sum(), cached);
                    out.push(last);
                }
            }
            Event::Failed(failure) => out.push(ApiError::internal(failure).body()),
            Event::PromptLogprobs(_) | Event::Embedding(_) => {}
        }
        futures_util::stream::iter(out)
    });
    futures_util::stream::iter(first).chain(events)
}

/// Adds `usage: null` to a chunk that is not the last, as OpenAI does with `include_usage`.
pub fn with_null_usage(mut chunk: Json, include_usage: bool) -> Json {
    if include_usage {
        chunk["usage"] = Json::Null;
    }
    chunk
}
