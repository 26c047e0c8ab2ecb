//! Sending sequences to an engine and following them: collected into choices, or merged into one stream.

use std::time::Instant;

use futures_util::{Stream, StreamExt, stream::select_all};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use crate::engine::{Engine, Event, Generate, Request, Work, output::Finish, sampling::TokenLogprobs};

/// Sequences of one API request, in the order of their choices.
pub struct Driven {
    receivers: Vec<UnboundedReceiver<Event>>,
}

/// A generated token as the API shows it.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Id.
    pub id: u32,
    /// Log-probabilities, when asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// A finished choice.
#[derive(Debug, Default)]
pub struct Choice {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub pieces: Vec<Piece>,
    /// Log-probabilities of the prompt, when asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish: Option<Finish>,
    /// Prompt tokens that came from the prefix cache.
    pub cached: usize,
}

/// More than the engine could ever take is the client's mistake, not a matter of trying later.
fn check_count(engine: &Engine, count: usize) -> Result<(), ApiError> {
    let most = engine.capacity();
    if count > most {
        return Err(ApiError::bad_request(format!(
            "{count} sequences in one request (prompts times `n`), at most {most}; split it."
        )));
    }
    Ok(())
}

/// Submits `n` choices of each prompt.
pub fn submit(engine: &Engine, prompts: &[(Vec<u32>, Generate)], n: usize) -> Result<Driven, ApiError> {
    check_count(engine, prompts.len() * n)?;
    let (mut receivers, mut requests) = (Vec::new(), Vec::new());
    let arrived = Instant::now();
    for (prompt, generate) in prompts {
        let group = engine.new_group();
        for i in 0..n {
            let (events, receiver) = unbounded_channel();
            let mut generate = generate.clone();
            // Choices of one seeded request must differ, and repeat.
            generate.sampling.seed = generate.sampling.seed.map(|s| s.wrapping_add(i as u64));
            let work = Work::Generate(Box::new(generate));
            requests.push(Request { prompt: prompt.clone(), work, events, arrived, group });
            receivers.push(receiver);
        }
    }
    engine.submit(requests)?;
    Ok(Driven { receivers })
}

/// Submits one embedding; gives its vector.
pub async fn embed(engine: &Engine, prompts: Vec<Vec<u32>>) -> Result<Vec<Vec<f32>>, ApiError> {
    check_count(engine, prompts.len())?;
    let (mut receivers, mut requests) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (events, receiver) = unbounded_channel();
        requests.push(Request {
            prompt,
            work: Work::Embed,
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
            Some(Event::Failed(why)) => return Err(ApiError::internal(why)),
            _ => return Err(ApiError::internal("the engine stopped")),
        }
    }
    Ok(out)
}

impl Driven {
    /// Waits for every choice.
    pub async fn collect(self) -> Result<Vec<Choice>, ApiError> {
        let mut out = Vec::with_capacity(self.receivers.len());
        for mut receiver in self.receivers {
            let mut choice = Choice::default();
            while choice.finish.is_none() {
                match receiver.recv().await {
                    Some(Event::Token { id, text, logprobs }) => {
                        choice.text += &text;
                        choice.pieces.push(Piece { id, logprobs });
                    }
                    Some(Event::Prompt(logprobs)) => choice.prompt_logprobs = logprobs,
                    Some(Event::Done { finish, cached }) => {
                        choice.finish = Some(finish);
                        choice.cached = cached;
                    }
                    Some(Event::Failed(why)) => return Err(ApiError::internal(why)),
                    Some(Event::Embedding(_)) | None => return Err(ApiError::internal("the engine stopped")),
                }
            }
            out.push(choice);
        }
        Ok(out)
    }

    /// Events of all choices as they come, each with its choice's index.
    pub fn stream(self) -> impl Stream<Item = (usize, Event)> + Send + 'static {
        select_all(self.receivers.into_iter().enumerate().map(|(index, receiver)| {
            futures_util::stream::unfold(receiver, move |mut receiver| async move {
                receiver.recv().await.map(|event| ((index, event), receiver))
            })
            .boxed()
        }))
    }
}
