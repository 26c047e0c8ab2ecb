//! Computation of the model's steps: the [`Backend`] trait and its two implementations.
//!
//! [`native`] runs on the CPU, with this crate's kernels on the weights as their file stores them. [`torch`] runs on
//! libtorch, for CUDA (and on the CPU for comparison). Input: a batch of chunks of sequences with their block tables.
//! Output: logits, sampled ids or sums of hidden states. Called by the engine's thread only.

pub mod native;
pub mod torch;

/// Tokens per block of the paged KV cache.
pub const BLOCK_SIZE: usize = native::BLOCK_SIZE;

/// Which output a chunk needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OutputKind {
    /// None, only the KV cache is written: a chunk of a prompt that is not its last.
    None,
    /// Logits of the last token.
    LastLogits,
    /// Logits of every token, for the log-probabilities of a prompt.
    AllLogits,
    /// Sum of the final hidden states of the tokens, for embeddings.
    HiddenSum,
    /// Id of the next token, sampled on the device. Only for backends that support it.
    SampledId(DeviceSampling),
}

/// Parameters of sampling on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceSampling {
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Number of most likely tokens to sample from; 0 is off.
    pub top_k: u32,
    /// Sum of the probabilities of the tokens to sample from; 1 is off.
    pub top_p: f32,
    /// Minimum probability relative to the most likely token; 0 is off.
    pub min_p: f32,
    /// Random number, uniform in [0, 1).
    pub uniform: f32,
}

/// Consecutive tokens of one sequence to compute in a step.
#[derive(Debug, Clone)]
pub struct SequenceChunk<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first token, which is the number of tokens already in the KV cache.
    pub start: usize,
    /// KV blocks of the sequence, enough for `start + tokens.len()` tokens.
    pub block_table: &'a [u32],
    /// Which output the chunk needs.
    pub output: OutputKind,
}

/// Outputs of a step, in the order of its chunks.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// Vocabulary size.
    pub vocab: usize,
    /// Rows of `vocab` logits: one per `LastLogits`, and one per token of `AllLogits`.
    pub logits: Vec<f32>,
    /// One row per `HiddenSum`.
    pub hidden_sums: Vec<Vec<f32>>,
    /// One id per `SampledId`.
    pub sampled_ids: Vec<u32>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// libtorch reported an error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// Any other error.
    #[error("{0}")]
    Other(String),
}

/// A model on a device, with its KV cache.
pub trait Backend: Send {
    /// Returns the number of blocks of the KV cache.
    fn kv_blocks(&self) -> usize;
    /// Returns whether `OutputKind::SampledId` is supported.
    fn samples_on_device(&self) -> bool {
        false
    }
    /// Computes a step. Does not change the KV cache of other sequences, even if it fails.
    fn step(&mut self, chunks: &[SequenceChunk<'_>], out: &mut StepOutput) -> Result<(), BackendError>;
    /// Describes device, kernels and weight type.
    fn describe(&self) -> String;
    /// Returns the bytes of the weights.
    fn weight_bytes(&self) -> usize;
}
