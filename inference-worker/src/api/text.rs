//! The endpoints `/v1/models`, `/v1/embeddings`, `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::{
    Json as JsonBody,
    extract::{Path, State},
};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::{
    App, chat::normalize_messages, completions::tokenize_prompts, error::ApiError, extract::Body, generation,
};
use crate::engine::Engine;

/// Returns the description of a model.
fn model_card(name: &str, engine: &Engine) -> Json {
    json!({"id": name, "object": "model", "created": engine.created, "owned_by": "lb", "root": engine.path.display().to_string(),
           "parent": null, "max_model_len": engine.info.max_context, "version": engine.version})
}

/// Handles `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> JsonBody<Json> {
    let models = app.registry.models();
    let list: Vec<Json> =
        models.iter().filter(|(name, _)| !name.contains('@')).map(|(n, e)| model_card(n, e)).collect();
    JsonBody(json!({"object": "list", "data": list}))
}

/// Handles `GET /v1/models/{name}`.
pub async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<JsonBody<Json>, ApiError> {
    let engine = app.engine(Some(&name))?;
    Ok(JsonBody(model_card(&name, &engine)))
}

/// Body of an embedding request.
#[derive(Debug, Deserialize)]
pub struct EmbeddingRequest {
    model: Option<String>,
    input: Json,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

/// Handles `POST /v1/embeddings`: the mean of the last hidden states of the tokens, normalised to unit length.
pub async fn embeddings(
    State(app): State<Arc<App>>,
    Body(request): Body<EmbeddingRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    let engine = app.engine(request.model.as_deref())?;
    if request.dimensions.is_some_and(|d| d != engine.info.hidden) {
        return Err(ApiError::param(
            "dimensions",
            format!(
                "This model's embeddings have {} dimensions; send this number or leave out `dimensions`.",
                engine.info.hidden
            ),
        ));
    }
    let base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(ApiError::param(
                "encoding_format",
                format!("`encoding_format` is `{other}`, expected float or base64."),
            ));
        }
    };
    let prompts = tokenize_prompts(&app, &engine, request.input, "input").await?;
    if let Some(long) = prompts.iter().find(|p| p.len() > engine.info.max_context) {
        return Err(ApiError::context_length(
            format!(
                "This model's maximum context length is {} tokens, but an input has {}; shorten it.",
                engine.info.max_context,
                long.len()
            ),
            "input",
        ));
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let vectors = generation::embed(&engine, prompts).await?;
    let data: Vec<Json> = vectors
        .into_iter()
        .enumerate()
        .map(|(index, v)| {
            let embedding = if base64 {
                json!(to_base64(&v.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<_>>()))
            } else {
                json!(v)
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    Ok(JsonBody(json!({
        "object": "list", "data": data, "model": request.model.unwrap_or_else(|| engine.name.clone()),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// Encodes base64 (RFC 4648), which OpenAI's Python client requests by default.
fn to_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let n = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = ALPHABET[(n >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// Body of a tokenize request: a text, or messages.
#[derive(Debug, Deserialize)]
pub struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Json>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
}

/// Handles `POST /tokenize`, in vLLM's format.
pub async fn tokenize(
    State(app): State<Arc<App>>,
    Body(r): Body<TokenizeRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    let engine = app.engine(r.model.as_deref())?;
    let (text, special) = match (r.prompt, r.messages) {
        (Some(text), None) => (text, r.add_special_tokens.unwrap_or(true)),
        (None, Some(messages)) => {
            let messages = normalize_messages(&messages)?;
            let text = engine.info.template.render(
                &messages,
                None::<&Json>,
                r.add_generation_prompt.unwrap_or(true),
            )?;
            (text, r.add_special_tokens.unwrap_or(false))
        }
        _ => return Err(ApiError::bad_request("Send either `prompt` or `messages`.")),
    };
    let tokens = app.tokenize(&engine, text, special).await?;
    Ok(JsonBody(json!({"count": tokens.len(), "max_model_len": engine.info.max_context, "tokens": tokens})))
}

/// Body of a detokenize request.
#[derive(Debug, Deserialize)]
pub struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Handles `POST /detokenize`, in vLLM's format.
pub async fn detokenize(
    State(app): State<Arc<App>>,
    Body(r): Body<DetokenizeRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    let engine = app.engine(r.model.as_deref())?;
    if let Some(id) = r.tokens.iter().find(|id| **id as usize >= engine.info.vocab) {
        return Err(ApiError::param(
            "tokens",
            format!("Token id {id} is outside the vocabulary of {} tokens.", engine.info.vocab),
        ));
    }
    Ok(JsonBody(json!({"prompt": engine.info.tokenizer.decode(&r.tokens, false)?})))
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_equals_the_test_vectors_of_rfc_4648() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(super::to_base64(plain.as_bytes()), coded);
        }
    }
}
