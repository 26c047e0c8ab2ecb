//! Names of the tensors of a Llama model, and access to them with a check of their shapes.
//!
//! Called by both backends.

use crate::weights::{RawTensor, WeightError, WeightSource};

/// The embedding, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head, `[vocab, hidden]`; absent if tied to the embedding.
pub const HEAD: &str = "lm_head.weight";
/// The final norm.
pub const NORM: &str = "model.norm.weight";
/// Query projection of a layer.
pub const Q_PROJ: &str = "self_attn.q_proj.weight";
/// Key projection of a layer.
pub const K_PROJ: &str = "self_attn.k_proj.weight";

/// Returns the full name of a layer's tensor.
pub fn layer_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// Returns the tensor `name`, or an error if it is missing or does not have `shape`.
pub fn require<'a>(
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
