//! Requests to the engine and the events that it sends back.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::{
    output::FinishReason,
    sampling::{SamplingParams, TokenLogprobs},
};

/// One sequence to generate or to embed.
#[derive(Debug)]
pub struct Request {
    /// Prompt; not empty, and shorter than the context length.
    pub prompt: Vec<u32>,
    /// What to compute.
    pub task: Task,
    /// Channel for events. Dropping its receiver cancels the request.
    pub events: UnboundedSender<Event>,
    /// Time at which the request arrived.
    pub arrived: Instant,
    /// Number shared by the choices of one API request: the first one computes the prompt, the others wait and then
    /// share its KV blocks.
    pub group: u64,
}

/// What a request computes.
#[derive(Debug)]
pub enum Task {
    /// Tokens that continue the prompt.
    Generate(Box<GenerationParams>),
    /// An embedding: the mean of the prompt's last hidden states.
    Embed,
}

/// Parameters of a generation.
#[derive(Debug, Clone, Default)]
pub struct GenerationParams {
    /// Maximum number of generated tokens, at least 1.
    pub max_tokens: usize,
    /// Number of tokens before which end and stop tokens are not sampled.
    pub min_tokens: usize,
    /// How tokens are sampled.
    pub sampling: SamplingParams,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Stop tokens, in addition to the model's end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Whether the output includes the stop string.
    pub include_stop: bool,
    /// Whether generation continues after the model's end tokens.
    pub ignore_eos: bool,
    /// Whether the text leaves out special tokens.
    pub skip_special: bool,
    /// Number of alternatives per prompt token to report log-probabilities for; None reports nothing.
    pub prompt_logprobs: Option<usize>,
}

/// An event of a request.
#[derive(Debug)]
pub enum Event {
    /// Log-probabilities of the prompt's tokens, except the first, which has none.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// A generated token.
    Token {
        /// Its id.
        id: u32,
        /// Text to append. Empty while a character or a possible stop string is incomplete.
        text: String,
        /// Its log-probabilities, if requested.
        logprobs: Option<TokenLogprobs>,
    },
    /// The embedding, normalised to unit length.
    Embedding(Vec<f32>),
    /// The request has finished. This is the last event.
    Finished {
        /// Why it finished.
        reason: FinishReason,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// The engine failed. This is the last event.
    Failed(String),
}
