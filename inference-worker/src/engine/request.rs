//! What goes into the engine and what comes out.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::{
    output::Finish,
    sampling::{Sampling, TokenLogprobs},
};

/// A sequence to generate, or to embed.
#[derive(Debug)]
pub struct Request {
    /// Prompt; never empty, shorter than the context.
    pub prompt: Vec<u32>,
    /// What to do with it.
    pub work: Work,
    /// Where events go. When its receiver is dropped the request is cancelled.
    pub events: UnboundedSender<Event>,
    /// When the request came in.
    pub arrived: Instant,
    /// Shared by the choices of one request: they wait for the first one's prompt, then share its blocks.
    pub group: u64,
}

/// What is asked for.
#[derive(Debug)]
pub enum Work {
    /// Tokens after the prompt.
    Generate(Box<Generate>),
    /// The mean of the prompt's last hidden states.
    Embed,
}

/// Settings of a generation.
#[derive(Debug, Clone, Default)]
pub struct Generate {
    /// At most so many tokens, at least 1.
    pub max_tokens: usize,
    /// At least so many before an end token is chosen.
    pub min_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end it.
    pub stop: Vec<String>,
    /// Ids that end it, besides the model's own.
    pub stop_ids: Vec<u32>,
    /// Show the stop string.
    pub include_stop: bool,
    /// Do not end at the model's end tokens.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// Report log-probabilities of the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
}

/// News of a request.
#[derive(Debug)]
pub enum Event {
    /// The prompt's log-probabilities (the first token has none).
    Prompt(Vec<TokenLogprobs>),
    /// A token, with the text that became certain by it (perhaps none).
    Token {
        /// Its id.
        id: u32,
        /// Text to append.
        text: String,
        /// Its log-probability, when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The embedding (unit length).
    Embedding(Vec<f32>),
    /// The end; nothing follows.
    Done {
        /// Why.
        finish: Finish,
        /// Prompt tokens that the prefix cache held.
        cached: usize,
    },
    /// The engine failed; nothing follows.
    Failed(String),
}
