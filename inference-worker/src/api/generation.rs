//! Submits the sequences of an API request to an engine, and receives their events: collected into choices, or merged
//! into one stream.

use std::time::Instant;

use futures_util::{Stream, StreamExt, stream::select_all};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use crate::engine::{
    Engine, Event, GenerationParams, Request, Task, output::FinishReason, sampling::TokenLogprobs,
};

/// The sequences of one API request, in the order of its choices. Dropping it cancels them.
pub struct PendingChoices {
    receivers: Vec<UnboundedReceiver<Event>>,
}

/// A generated token.
#[derive(Debug, Clone)]
pub struct OutputToken {
    /// Id.
    pub id: u32,
    /// Log-probabilities, if requested.
    pub logprobs: Option<TokenLogprobs>,
}

/// A finished choice.
#[derive(Debug, Default)]
pub struct Choice {
    /// Generated text.
    pub text: String,
    /// Generated tokens.
    pub tokens: Vec<OutputToken>,
    /// Log-probabilities of the prompt, if requested.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Why it finished.
    pub finish_reason: Option<FinishReason>,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
}

/// Rejects a request with more sequences than the engine can ever accept: trying again would not help.
fn check_count(engine: &Engine, count: usize) -> Result<(), ApiError> {
    let limit = engine.capacity();
    if count > limit {
        return Err(ApiError::bad_request(format!(
            "The request has {count} sequences (prompts times `n`), at most {limit} are possible; split it."
        )));
    }
    Ok(())
}

/// Submits `n` choices of each prompt.
pub fn submit(
    engine: &Engine,
    prompts: &[(Vec<u32>, GenerationParams)],
    n: usize,
) -> Result<PendingChoices, ApiError> {
    check_count(engine, prompts.len() * n)?;
    let (mut receivers, mut requests) = (Vec::new(), Vec::new());
    let arrived = Instant::now();
    for (prompt, params) in prompts {
        let group = engine.new_group();
        for i in 0..n {
            let (events, receiver) = unbounded_channel();
            let mut params = params.clone();
            // Each choice gets its own seed, so that choices differ but are repeatable.
            params.sampling.seed = params.sampling.seed.map(|s| s.wrapping_add(i as u64));
            let task = Task::Generate(Box::new(params));
            requests.push(Request { prompt: prompt.clone(), task, events, arrived, group });
            receivers.push(receiver);
        }
    }
    engine.submit(requests)?;
    Ok(PendingChoices { receivers })
}

/// Computes the embeddings of `prompts`.
pub async fn embed(engine: &Engine, prompts: Vec<Vec<u32>>) -> Result<Vec<Vec<f32>>, ApiError> {
    check_count(engine, prompts.len())?;
    let (mut receivers, mut requests) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (events, receiver) = unbounded_channel();
        requests.push(Request {
            prompt,
            task: Task::Embed,
            events,
            arrived: Instant::now(),
            group: engine.new_group(),
        });
        receivers.push(receiver);
    }
    engine.submit(requests)?;
    let mut out = Vec::new();
    for mut receiver in receivers {
        match receiver.recv().await {
            Some(Event::Embedding(vector)) => out.push(vector),
            Some(Event::Failed(failure)) => return Err(ApiError::internal(failure)),
            _ => return Err(engine_stopped()),
        }
    }
    Ok(out)
}

fn engine_stopped() -> ApiError {
    ApiError::internal("the engine has stopped; see the log of the worker")
}

impl PendingChoices {
    /// Waits until all choices have finished.
    pub async fn collect(self) -> Result<Vec<Choice>, ApiError> {
        let mut out = Vec::with_capacity(self.receivers.len());
        for mut receiver in self.receivers {
            let mut choice = Choice::default();
            while choice.finish_reason.is_none() {
                match receiver.recv().await {
                    Some(Event::Token { id, text, logprobs }) => {
                        choice.text += &text;
                        choice.tokens.push(OutputToken { id, logprobs });
                    }
                    Some(Event::PromptLogprobs(logprobs)) => choice.prompt_logprobs = logprobs,
                    Some(Event::Finished { reason, cached_tokens }) => {
                        choice.finish_reason = Some(reason);
                        choice.cached_tokens = cached_tokens;
                    }
                    Some(Event::Failed(failure)) => return Err(ApiError::internal(failure)),
                    Some(Event::Embedding(_)) | None => return Err(engine_stopped()),
                }
            }
            out.push(choice);
        }
        Ok(out)
    }

    /// Streams the events of all choices as they arrive, each with the index of its choice.
    pub fn stream(self) -> impl Stream<Item = (usize, Event)> + Send + 'static {
        select_all(self.receivers.into_iter().enumerate().map(|(index, receiver)| {
            futures_util::stream::unfold(receiver, move |mut receiver| async move {
                receiver.recv().await.map(|event| ((index, event), receiver))
            })
            .boxed()
        }))
    }
}
