//! Names of a Llama's tensors, and fetching them with their shape checked.
//!
//! Called by both backends.

use crate::weights::{RawTensor, WeightError, WeightSource};

/// The embedding, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head, `[vocab, hidden]`, absent when tied to the embedding.
pub const HEAD: &str = "lm_head.weight";
/// The last norm.
pub const NORM: &str = "model.norm.weight";
/// The query projection of a layer.
pub const Q: &str = "self_attn.q_proj.weight";
/// The key projection of a layer.
pub const K: &str = "self_attn.k_proj.weight";

/// Full name of a layer's tensor.
pub fn layer_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// The tensor `name`, which must have `shape`.
pub fn need<'a>(
    source: &'a dyn WeightSource,
    name: &str,
    shape: &[usize],
) -> Result<RawTensor<'a>, WeightError> {
    let tensor = source.tensor(name)?.ok_or_else(|| WeightError::MissingTensor(name.into()))?;
    if tensor.shape != shape {
        return Err(WeightError::Shape { tensor: name.into(), got: tensor.shape, want: shape.to_vec() });
    }
    Ok(tensor)
}
