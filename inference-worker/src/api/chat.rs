//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value as Json, json};

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
        n,
        engine,
    };
    if request.params.stream == Some(true) {
        let chunks = stream_chunks(response, pending, request.params.includes_usage());
        return Ok(sse::respond(chunks));
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
    n: usize,
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

impl Chunks for ChatResponse {
    fn chunk(&self, choices: Vec<Json>) -> Json {
        json!({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
               "system_fingerprint": null, "choices": choices})
    }

    fn opening(&self) -> Vec<Json> {
        let role = json!({"role": "assistant", "content": ""});
        (0..self.n).map(|index| delta(index, role.clone(), Json::Null, None)).collect()
    }

    fn token(&self, index: usize, id: u32, text: &str, logprobs: Option<&TokenLogprobs>) -> Option<Json> {
        let entry =
            logprobs.map(|l| json!({"content": [logprob_entry(&self.engine, id, l)], "refusal": null}));
        (!text.is_empty() || entry.is_some())
            .then(|| delta(index, json!({"content": text}), entry.unwrap_or(Json::Null), None))
    }

    fn ending(&self, index: usize, reason: FinishReason) -> Json {
        delta(index, json!({}), Json::Null, Some(reason))
    }

    fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    fn counts(&self) -> (usize, usize) {
        (1, self.n)
    }
}

/// A choice of a chunk.
fn delta(index: usize, delta: Json, logprobs: Json, finish: Option<FinishReason>) -> Json {
    json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish.map(|f| f.name())})
}
