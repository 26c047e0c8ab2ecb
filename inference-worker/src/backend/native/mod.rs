//! The CPU backend: computes a Llama model on packed weights with this crate's kernels.
//!
//! Input: a [`WeightSource`] and the number of KV blocks. Output: a [`NativeBackend`]. Weights keep the type of their
//! file and are decoded in registers; activations, KV cache and sums are f32. The results are therefore those of the
//! dequantised model in f32.

mod aligned;
mod attention;
pub mod kernels;
mod lanes;
mod layer;
mod load;
mod math;
mod packed;
mod pool;
mod step_io;

use std::sync::Arc;

pub use attention::BLOCK_SIZE;

use self::{
    aligned::AlignedF32,
    kernels::Isa,
    layer::{CacheSlot, Norm, Projection, QueryRows},
    load::WeightPacker,
    packed::{PackedMatrix, TILE},
    pool::Pool,
};
use super::{Backend, BackendError, SequenceChunk, StepOutput};
use crate::{
    model::{LlamaConfig, tensors},
    weights::{WeightError, WeightSource},
};

/// One transformer layer and its KV cache.
struct Layer {
    attn_norm: Vec<f32>,
    qkv: PackedMatrix,
    out: PackedMatrix,
    ffn_norm: Vec<f32>,
    gate_up: PackedMatrix,
    down: PackedMatrix,
    keys: AlignedF32,
    values: AlignedF32,
}

/// Buffers of a step, kept between steps.
#[derive(Default)]
struct Buffers {
    x: AlignedF32,
    normed: AlignedF32,
    qkv: AlignedF32,
    attention: AlignedF32,
    gate_up: AlignedF32,
    activated: AlignedF32,
    angles: AlignedF32,
}

/// A Llama model on the CPU.
pub struct NativeBackend {
    config: LlamaConfig,
    isa: Isa,
    pool: Pool,
    embedding: Arc<PackedMatrix>,
    head: Arc<PackedMatrix>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    frequencies: Vec<f32>,
    rope_scale: f32,
    kv_blocks: usize,
    buffers: Buffers,
    weight_type: String,
}

/// Returns the width of a buffer's row, with padding up to whole tiles.
fn padded(width: usize) -> usize {
    width.next_multiple_of(TILE)
}

impl NativeBackend {
    /// Packs a model's weights. `as_f32` dequantises them first, for comparison; this takes four to seven times the
    /// memory.
    pub fn load(
        source: &dyn WeightSource,
        config: &LlamaConfig,
        threads: usize,
        kv_blocks: usize,
        as_f32: bool,
    ) -> Result<Self, WeightError> {
        let other = |e: std::io::Error| WeightError::Metadata(format!("cannot start compute threads: {e}"));
        let packer = WeightPacker { source, config, as_f32 };
        let weight_type =
            if as_f32 { "F32 (dequantised)".into() } else { format!("{:?}", packer.weight_type()?) };
        let embedding = Arc::new(packer.vocab_matrix(tensors::EMBEDDING)?);
        let head =
            if config.tied { embedding.clone() } else { Arc::new(packer.vocab_matrix(tensors::HEAD)?) };
        let layers = (0..config.layers).map(|l| packer.layer(l, kv_blocks)).collect::<Result<Vec<_>, _>>()?;
        let (frequencies, rope_scale) = config.rope_frequencies();
        Ok(Self {
            isa: Isa::detect(),
            pool: Pool::new(threads).map_err(other)?,
            embedding,
            head,
            norm: packer.vector(tensors::NORM)?,
            layers,
            frequencies,
            rope_scale,
            kv_blocks,
            buffers: Buffers::default(),
            weight_type,
            config: config.clone(),
        })
    }
}

impl Backend for NativeBackend {
    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn step(&mut self, chunks: &[SequenceChunk<'_>], out: &mut StepOutput) -> Result<(), BackendError> {
        self.check(chunks)?;
        let (mut queries, mut slots) = (Vec::new(), Vec::new());
        for (chunk, c) in chunks.iter().enumerate() {
            queries.push(QueryRows { chunk, row: slots.len(), len: c.tokens.len() });
            slots.extend(
                (c.start..c.start + c.tokens.len())
                    .map(|at| CacheSlot { block: c.block_table[at / BLOCK_SIZE], offset: at % BLOCK_SIZE }),
            );
        }
        let mut total = slots.len();
        self.prepare(chunks, total);
        let mut tasks = self.attention_tasks(&queries);
        for l in 0..self.config.layers {
            self.rms_norm(Norm::Attention(l), total);
            self.project(Projection::Qkv(l), total);
            self.rotate_and_store(l, &slots);
            if l + 1 == self.config.layers {
                queries = self.keep_output_tokens(chunks, &queries);
                tasks = self.attention_tasks(&queries);
                total = queries.iter().map(|rows| rows.len).sum();
            }
            self.attention(l, chunks, &tasks);
            self.project(Projection::AttentionOutput(l), total);
            self.rms_norm(Norm::Ffn(l), total);
            self.project(Projection::GateUp(l), total);
            self.activate(total);
            self.project(Projection::Down(l), total);
        }
        self.write_outputs(chunks, total, out);
        Ok(())
    }

    fn describe(&self) -> String {
        format!(
            "CPU, {} threads, native {} kernels, {} weights",
            self.pool.threads(),
            kernels::describe(self.isa),
            self.weight_type
        )
    }

    fn weight_bytes(&self) -> usize {
        let layers =
            self.layers.iter().map(|l| l.qkv.bytes() + l.out.bytes() + l.gate_up.bytes() + l.down.bytes());
        let head = if self.config.tied { 0 } else { self.head.bytes() };
        layers.sum::<usize>() + self.embedding.bytes() + head
    }
}
