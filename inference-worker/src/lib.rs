//! An LLM server on libtorch: Llama-family models from GGUF files and Hugging Face folders, continuous
//! batching over a paged KV cache, and an OpenAI-compatible HTTP API that reports its load to the balancer.
//!
//! Inputs: a model path and the flags of `main`. Outputs: the HTTP API. The library exists for `main`, the
//! tests and the benchmark.

pub mod api;
pub mod backend;
pub mod chat;
pub mod cuda;
pub mod engine;
pub mod metrics;
pub mod model;
pub mod registry;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;
pub mod torchscript;
pub mod weights;

/// Seconds since 1970.
pub fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
