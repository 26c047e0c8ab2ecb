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

use super::{App, RequestId, drive, error::ApiError, extract::Body, params::Params, sse};
use crate::{
    engine::{Engine, Event, sampling::TokenLogprobs},
    unix_now,
};

/// Most alternatives per token.
const MAX_TOP_LOGPROBS: u32 = 20;

/// A chat request.
#[derive(Debug, Deserialize)]
pub struct ChatRequest {
    messages: Vec<Json>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Json>>,
    add_generation_prompt: Option<bool>,
    #[serde(flatten)]
    params: Params,
}

/// Checks messages and makes every content a text, as chat templates expect it.
pub fn plain_messages(messages: &[Json]) -> Result<Vec<Json>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty; send at least one message."));
    }
    let one = |(i, message): (usize, &Json)| {
        let wrong = |what: &str| ApiError::param("messages", format!("messages[{i}] {what}."));
        let mut message = message.as_object().cloned().ok_or_else(|| wrong("is no object"))?;
        if message.get("role").and_then(Json::as_str).is_none_or(str::is_empty) {
            return Err(wrong("has no `role`"));
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
                    .ok_or_else(|| wrong("has a content part that is not text; this model reads text only"))?
                    .join("\n")
            }
            _ => return Err(wrong("has no `content` (a text, or a list of text parts)")),
        };
        message.insert("content".into(), content.into());
        Ok(Json::Object(message))
    };
    messages.iter().enumerate().map(one).collect()
}

/// Handles a request.
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Body(request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let engine = app.engine(request.params.model.as_deref())?;
    let messages = plain_messages(&request.messages)?;
    let text = engine.template.render(
        &messages,
        request.tools.as_ref(),
        request.add_generation_prompt.unwrap_or(true),
    )?;
    // The template has put the special tokens where they belong.
    let prompt = app.tokenize(&engine, text, false).await?;
    let top = request.top_logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        return Err(ApiError::param(
            "top_logprobs",
            format!("`top_logprobs` is {top}, expected 0 to {MAX_TOP_LOGPROBS}."),
        ));
    }
    if top > 0 && request.logprobs != Some(true) {
        return Err(ApiError::param("top_logprobs", "`top_logprobs` needs `logprobs: true`."));
    }
    let logprobs = (request.logprobs == Some(true)).then_some(top as usize);
    let generate = request.params.generate(&engine, prompt.len(), None, logprobs)?;
    let n = request.params.choices()?;
    let prompt_tokens = prompt.len();
    let driven = drive::submit(&engine, &[(prompt, generate)], n)?;
    let reply = Reply {
        id: format!("chatcmpl-{}", id.0),
        model: request.params.model.clone().unwrap_or_else(|| engine.name.clone()),
        created: unix_now(),
        prompt_tokens,
        engine,
    };
    if request.params.stream == Some(true) {
        let usage = request.params.stream_options.as_ref().is_some_and(|o| o.include_usage);
        return Ok(sse::respond(stream(reply, driven, n, usage)));
    }
    let choices = driven.collect().await?;
    let (generated, cached) =
        (choices.iter().map(|c| c.pieces.len()).sum(), choices.first().map_or(0, |c| c.cached));
    let list: Vec<Json> = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| {
            let entries: Option<Vec<Json>> = logprobs.map(|_| {
                choice
                    .pieces
                    .iter()
                    .filter_map(|p| Some(entry(&reply.engine, p.id, p.logprobs.as_ref()?)))
                    .collect()
            });
            json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": null},
                "logprobs": entries.map(|e| json!({"content": e, "refusal": null})),
                "finish_reason": choice.finish.map(|f| f.name()),
            })
        })
        .collect();
    let body = json!({
        "id": reply.id, "object": "chat.completion", "created": reply.created, "model": reply.model,
        "system_fingerprint": null, "choices": list, "usage": usage(prompt_tokens, generated, cached),
    });
    Ok(axum::Json(body).into_response())
}

/// What every chunk of an answer says.
struct Reply {
    id: String,
    model: String,
    created: u64,
    prompt_tokens: usize,
    engine: Arc<Engine>,
}

impl Reply {
    fn chunk(&self, choices: Vec<Json>) -> Json {
        json!({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
               "system_fingerprint": null, "choices": choices})
    }
}

/// OpenAI's token counts.
pub fn usage(prompt: usize, generated: usize, cached: usize) -> Json {
    json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
           "prompt_tokens_details": {"cached_tokens": cached}})
}

fn entry(engine: &Engine, id: u32, logprobs: &TokenLogprobs) -> Json {
    let one = |id: u32, logprob: f32| {
        let token = engine.tokenizer.token_text(id);
        json!({"token": token, "logprob": logprob.max(-9999.0), "bytes": token.as_bytes()})
    };
    let mut entry = one(id, logprobs.chosen);
    entry["top_logprobs"] = logprobs.top.iter().map(|(id, l)| one(*id, *l)).collect();
    entry
}

fn stream(
    reply: Reply,
    driven: drive::Driven,
    n: usize,
    want_usage: bool,
) -> impl Stream<Item = Json> + Send {
    let role = (0..n).map(|index| {
        json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    });
    let first: Vec<Json> = role.map(|c| with_usage(reply.chunk(vec![c]), want_usage)).collect();
    let mut generated: HashMap<usize, usize> = HashMap::new();
    let (mut cached, mut open) = (0, n);
    let events = driven.stream().flat_map(move |(index, event)| {
        let mut out = Vec::new();
        let mut choice = |delta: Json, logprobs: Json, finish: Option<&str>| {
            let c = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
            out.push(with_usage(reply.chunk(vec![c]), want_usage));
        };
        match event {
            Event::Token { id, text, logprobs } => {
                *generated.entry(index).or_default() += 1;
                let entry =
                    logprobs.map(|l| json!({"content": [entry(&reply.engine, id, &l)], "refusal": null}));
                if !text.is_empty() || entry.is_some() {
                    choice(json!({"content": text}), entry.unwrap_or(Json::Null), None);
                }
            }
            Event::Done { finish, cached: found } => {
                choice(json!({}), Json::Null, Some(finish.name()));
                cached = if index == 0 { found } else { cached };
                open -= 1;
                if open == 0 && want_usage {
                    let mut last = reply.chunk(Vec::new());
                    last["usage"] = usage(reply.prompt_tokens, generated.values().sum(), cached);
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

/// With `include_usage`, every chunk but the last carries `usage: null`.
pub fn with_usage(mut chunk: Json, want: bool) -> Json {
    if want {
        chunk["usage"] = Json::Null;
    }
    chunk
}
