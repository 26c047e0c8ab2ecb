//! An LLM server: Llama-family models from GGUF files and Hugging Face directories, continuous batching with a paged
//! KV cache, and an OpenAI-compatible HTTP API that reports its load to the load balancer.
//!
//! Input: models and the flags of `main`. Output: the HTTP API. The library is used by `main`, the tests and the
//! benchmark.

pub mod api;
pub mod backend;
pub mod chat_template;
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

/// Returns the seconds since 1970.
pub fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
