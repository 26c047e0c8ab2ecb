//! Packs the weights of a model for the native kernels.
//!
//! Called by `NativeBackend::load`.

use super::{BLOCK_SIZE, Layer, aligned::AlignedF32, packed::PackedMatrix};
use crate::{
    model::{LlamaConfig, tensors},
    weights::{DType, RawTensor, RopeLayout, WeightError, WeightSource},
};

/// Packs tensors of one model.
pub struct WeightPacker<'a> {
    pub source: &'a dyn WeightSource,
    pub config: &'a LlamaConfig,
    /// Whether matrices are dequantised to f32.
    pub as_f32: bool,
}

impl WeightPacker<'_> {
    /// Packs the matrix `name` of `vocab` rows.
    pub fn vocab_matrix(&self, name: &str) -> Result<PackedMatrix, WeightError> {
        let c = self.config;
        let raw = tensors::require(self.source, name, &[c.vocab, c.hidden])?;
        Ok(pack(&[raw], vec![(0..c.vocab).collect()], self.as_f32))
    }

    /// Reads the vector `name` of `hidden` values.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, WeightError> {
        Ok(tensors::require(self.source, name, &[self.config.hidden])?.to_f32())
    }

    /// Returns the type in which the file stores most of the weights.
    pub fn weight_type(&self) -> Result<DType, WeightError> {
        let (c, name) = (self.config, tensors::layer_name(0, "mlp.down_proj.weight"));
        Ok(tensors::require(self.source, &name, &[c.hidden, c.ffn])?.dtype)
    }

    /// Packs a layer, with an empty KV cache of `kv_blocks` blocks.
    pub fn layer(&self, layer: usize, kv_blocks: usize) -> Result<Layer, WeightError> {
        let c = self.config;
        let kv_len = kv_blocks * BLOCK_SIZE * c.kv_dim();
        let vector = |name: &str| self.vector(&tensors::layer_name(layer, name));
        Ok(Layer {
            attn_norm: vector("input_layernorm.weight")?,
            qkv: self.rows_of(
                layer,
                &[
                    (tensors::Q_PROJ, c.q_dim(), c.hidden),
                    (tensors::K_PROJ, c.kv_dim(), c.hidden),
                    ("self_attn.v_proj.weight", c.kv_dim(), c.hidden),
                ],
            )?,
            out: self.rows_of(layer, &[("self_attn.o_proj.weight", c.hidden, c.q_dim())])?,
            ffn_norm: vector("post_attention_layernorm.weight")?,
            gate_up: self.rows_of(
                layer,
                &[("mlp.gate_proj.weight", c.ffn, c.hidden), ("mlp.up_proj.weight", c.ffn, c.hidden)],
            )?,
            down: self.rows_of(layer, &[("mlp.down_proj.weight", c.hidden, c.ffn)])?,
            // Zeroed pages: the kernel allocates memory only for blocks that are written.
            keys: AlignedF32::zeroed(kv_len),
            values: AlignedF32::zeroed(kv_len),
        })
    }

    /// Packs the rows of several tensors of a layer (name, rows, columns) into one matrix.
    fn rows_of(&self, layer: usize, names: &[(&str, usize, usize)]) -> Result<PackedMatrix, WeightError> {
        let tensors = names
            .iter()
            .map(|(name, rows, cols)| {
                tensors::require(self.source, &tensors::layer_name(layer, name), &[*rows, *cols])
            })
            .collect::<Result<Vec<_>, _>>()?;
        let orders = names.iter().map(|(name, rows, _)| row_order(self.source, self.config, name, *rows));
        Ok(pack(&tensors, orders.collect(), self.as_f32))
    }
}

/// Returns the row of the file for each row in Hugging Face's order.
fn row_order(source: &dyn WeightSource, c: &LlamaConfig, name: &str, rows: usize) -> Vec<usize> {
    let rotated = name == tensors::Q_PROJ || name == tensors::K_PROJ;
    if !rotated || source.rope_layout() == RopeLayout::Halves {
        return (0..rows).collect();
    }
    let (dim, half) = (c.head_dim, c.head_dim / 2);
    (0..rows)
        .map(|r| r / dim * dim + if r % dim < half { r % dim * 2 } else { (r % dim - half) * 2 + 1 })
        .collect()
}

fn pack(tensors: &[RawTensor<'_>], orders: Vec<Vec<usize>>, as_f32: bool) -> PackedMatrix {
    if as_f32 {
        let cols = tensors[0].shape[1];
        let mut dense = Vec::new();
        for (tensor, order) in tensors.iter().zip(&orders) {
            let values = tensor.to_f32();
            order.iter().for_each(|r| dense.extend_from_slice(&values[r * cols..][..cols]));
        }
        return PackedMatrix::from_f32(dense.len() / cols, cols, &dense);
    }
    let rows = tensors.iter().zip(&orders).flat_map(|(t, o)| o.iter().map(move |r| (t, *r)));
    PackedMatrix::new(&rows.collect::<Vec<_>>())
}
