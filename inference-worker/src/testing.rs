//! Support for tests: where the real model lies, and tiny random models made on the spot.

use std::path::PathBuf;

/// The default model's file name.
pub const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where the set-up keeps what it fetches: `$LB_CACHE_DIR`, else `$XDG_CACHE_HOME/lb-inference`, else
/// `~/.cache/lb-inference`.
pub fn cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("LB_CACHE_DIR")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("lb-inference")))
        .or_else(|| Some(var("HOME")?.join(".cache/lb-inference")))
        .unwrap_or_else(|| PathBuf::from(".cache/lb-inference"))
}

/// The default model (`LB_MODEL` overrides).
///
/// # Panics
/// When it has not been fetched: a test that needs it must fail, not skip.
pub fn model_file() -> PathBuf {
    let path = std::env::var_os("LB_MODEL")
        .map_or_else(|| cache_dir().join("models").join(MODEL_FILE), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `cargo xtask setup model`", path.display());
    path
}
