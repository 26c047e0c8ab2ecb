//! The chunks of a streamed response, in the order that both APIs of OpenAI share: what precedes the tokens, a chunk
//! per token with text or log-probabilities, one with the reason for each choice that ends, then the usage.

use futures_util::{Stream, StreamExt};
use serde_json::{Value as Json, json};

use super::{error::ApiError, generation::PendingChoices};
use crate::engine::{Event, output::FinishReason, sampling::TokenLogprobs};

/// What differs between the APIs: the form of their choices.
pub trait Chunks: Send + 'static {
    /// A chunk with these choices.
    fn chunk(&self, choices: Vec<Json>) -> Json;
    /// Choices that precede the tokens, each in a chunk of its own.
    fn opening(&self) -> Vec<Json>;
    /// The choice of a token; None if it has nothing to show.
    fn token(&self, index: usize, id: u32, text: &str, logprobs: Option<&TokenLogprobs>) -> Option<Json>;
    /// The choice that says why it ends.
    fn ending(&self, index: usize, reason: FinishReason) -> Json;
    /// Number of tokens of all prompts.
    fn prompt_tokens(&self) -> usize;
    /// Number of prompts, and of choices for each.
    fn counts(&self) -> (usize, usize);
}

/// Streams the chunks of a response.
pub fn stream_chunks(
    response: impl Chunks,
    pending: PendingChoices,
    include_usage: bool,
) -> impl Stream<Item = Json> + Send {
    let opening = response.opening().into_iter();
    let opening: Vec<Json> =
        opening.map(|c| with_null_usage(response.chunk(vec![c]), include_usage)).collect();
    let (prompts, n) = response.counts();
    let (mut generated, mut cached, mut unfinished) = (0, 0, prompts * n);
    let events = pending.stream().flat_map(move |(index, event)| {
        let with = |choice| with_null_usage(response.chunk(vec![choice]), include_usage);
        let mut out = Vec::new();
        match event {
            Event::Token { id, text, logprobs } => {
                generated += 1;
                out.extend(response.token(index, id, &text, logprobs.as_ref()).map(with));
            }
            Event::Finished { reason, cached_tokens } => {
                out.push(with(response.ending(index, reason)));
                // The choices of a prompt share what is cached of it.
                cached += if index % n == 0 { cached_tokens } else { 0 };
                unfinished -= 1;
                if unfinished == 0 && include_usage {
                    let mut last = response.chunk(Vec::new());
                    last["usage"] = usage(response.prompt_tokens(), generated, cached);
                    out.push(last);
                }
            }
            Event::Failed(failure) => out.push(ApiError::internal(failure).body()),
            Event::PromptLogprobs(_) | Event::Embedding(_) => {}
        }
        futures_util::stream::iter(out)
    });
    futures_util::stream::iter(opening).chain(events)
}

/// Returns the `usage` object of a response.
pub fn usage(prompt: usize, generated: usize, cached: usize) -> Json {
    json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
           "prompt_tokens_details": {"cached_tokens": cached}})
}

/// Adds `usage: null` to a chunk that is not the last, as OpenAI does with `include_usage`.
fn with_null_usage(mut chunk: Json, include_usage: bool) -> Json {
    if include_usage {
        chunk["usage"] = Json::Null;
    }
    chunk
}
