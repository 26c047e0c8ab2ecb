//! What computes a step of the model: the [`Backend`] trait and its two implementations.
//!
//! [`native`] runs on the CPU with kernels of its own over the file's own weights; [`torch`] runs on libtorch,
//! on CUDA (and on the CPU for comparison). Input: a batch of sequence parts with their KV blocks. Output:
//! logits, sampled ids or pooled hidden states. Called by the engine thread only.

pub mod native;
pub mod torch;

/// Tokens of a block of the paged KV cache.
pub const BLOCK: usize = native::BLOCK;

/// What a sequence's part of a step should give.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Want {
    /// Only the KV cache: a prompt's chunk that is not its last.
    Nothing,
    /// Logits after the last token.
    Last,
    /// Logits after every token of the part (log-probabilities of a prompt).
    All,
    /// The sum of the final hidden states of the part's tokens (embeddings).
    Hidden,
    /// The id chosen on the device; only for backends that say so.
    Sample(DeviceSample),
}

/// Sampling that a device can do by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceSample {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// A uniform number in [0, 1).
    pub uniform: f32,
}

/// A sequence's part of a step: some tokens that follow what its cache holds.
#[derive(Debug, Clone)]
pub struct SeqPart<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first of them (tokens already in the cache).
    pub start: usize,
    /// The sequence's blocks, enough for `start + tokens.len()` tokens.
    pub blocks: &'a [u32],
    /// What to give back.
    pub want: Want,
}

/// Results of a step, in the order of its parts.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// Vocabulary size.
    pub vocab: usize,
    /// Rows of `vocab` logits: one per `Last`, one per token of an `All`.
    pub logits: Vec<f32>,
    /// One row per `Hidden`.
    pub hidden: Vec<Vec<f32>>,
    /// One id per `Sample`.
    pub sampled: Vec<u32>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// libtorch raised an error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// Something else.
    #[error("{0}")]
    Other(String),
}

/// A model on some device, with its KV cache.
pub trait Backend: Send {
    /// Blocks in the KV cache.
    fn kv_blocks(&self) -> usize;
    /// Whether `Want::Sample` is understood.
    fn samples(&self) -> bool {
        false
    }
    /// Computes a step. The cache of other sequences is left alone, also on failure.
    fn step(&mut self, parts: &[SeqPart<'_>], out: &mut StepOutput) -> Result<(), BackendError>;
    /// Device, kernels and weight type, in words.
    fn describe(&self) -> String;
    /// Bytes of weights held.
    fn weight_bytes(&self) -> usize;
}
