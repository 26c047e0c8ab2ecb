//! Inputs and outputs of a step: checks, embeddings and rotation angles, logits and sums of hidden states.
//!
//! Called by `NativeBackend::step` before and after the layers.

use super::{
    BLOCK_SIZE, NativeBackend,
    kernels::{MatMul, matmul},
    layer::{Norm, QueryRows},
    padded,
};
use crate::backend::{BackendError, OutputKind, SequenceChunk, StepOutput};

impl NativeBackend {
    /// Checks block tables, token ids and output kinds of a step.
    pub(super) fn check(&self, chunks: &[SequenceChunk<'_>]) -> Result<(), BackendError> {
        for c in chunks {
            let end = c.start + c.tokens.len();
            if c.block_table.len() * BLOCK_SIZE < end
                || c.block_table.iter().any(|b| *b as usize >= self.kv_blocks)
            {
                return Err(BackendError::Other(format!(
                    "a sequence of {end} tokens has the block table {:?}, the KV cache has {} blocks",
                    c.block_table, self.kv_blocks
                )));
            }
            if let Some(id) = c.tokens.iter().find(|id| **id as usize >= self.config.vocab) {
                return Err(BackendError::Other(format!("token id {id} is outside the vocabulary")));
            }
            if matches!(c.output, OutputKind::SampledId(_)) {
                return Err(BackendError::Other("the native backend does not sample".into()));
            }
        }
        Ok(())
    }

    /// Resizes the buffers, and writes embeddings and rotation angles.
    pub(super) fn prepare(&mut self, chunks: &[SequenceChunk<'_>], total: usize) {
        let config = &self.config;
        let b = &mut self.buffers;
        for (buffer, width) in [
            (&mut b.x, config.hidden),
            (&mut b.normed, padded(config.hidden)),
            (&mut b.qkv, config.q_dim() + 2 * config.kv_dim()),
            (&mut b.attention, padded(config.q_dim())),
            (&mut b.gate_up, 2 * config.ffn),
            (&mut b.activated, padded(config.ffn)),
            (&mut b.angles, config.head_dim),
        ] {
            // The padding beyond the width of a row is zero and is never written.
            buffer.ensure_len(total * width);
        }
        let half = config.head_dim / 2;
        let tokens =
            chunks.iter().flat_map(|c| c.tokens.iter().enumerate().map(|(i, id)| (c.start + i, *id)));
        for (t, (position, id)) in tokens.enumerate() {
            self.embedding.row(id as usize, &mut b.x[t * config.hidden..][..config.hidden]);
            let angles = &mut b.angles[t * 2 * half..][..2 * half];
            for (i, f) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (position as f32 * f).sin_cos();
                (angles[i], angles[half + i]) = (cos * self.rope_scale, sin * self.rope_scale);
            }
        }
    }

    /// Moves the tokens whose hidden state is needed to the front, in order. The last layer computes only these.
    pub(super) fn keep_output_tokens(
        &mut self,
        chunks: &[SequenceChunk<'_>],
        queries: &[QueryRows],
    ) -> Vec<QueryRows> {
        let (h, width) = (self.config.hidden, self.config.q_dim() + 2 * self.config.kv_dim());
        let (mut kept, mut row) = (Vec::new(), 0);
        for rows in queries {
            let len = match chunks[rows.chunk].output {
                OutputKind::None | OutputKind::SampledId(_) => continue,
                OutputKind::LastLogits => 1,
                OutputKind::AllLogits | OutputKind::HiddenSum => rows.len,
            };
            let from = rows.row + rows.len - len..rows.row + rows.len;
            self.buffers.x.copy_within(from.start * h..from.end * h, row * h);
            self.buffers.qkv.copy_within(from.start * width..from.end * width, row * width);
            kept.push(QueryRows { chunk: rows.chunk, row, len });
            row += len;
        }
        kept
    }

    /// Writes the outputs of the kept tokens: logits, or sums of hidden states.
    pub(super) fn write_outputs(
        &mut self,
        chunks: &[SequenceChunk<'_>],
        tokens: usize,
        out: &mut StepOutput,
    ) {
        let (h, vocab) = (self.config.hidden, self.config.vocab);
        self.rms_norm(Norm::Final, tokens);
        let ld = padded(h);
        out.vocab = vocab;
        out.logits.clear();
        out.hidden_sums.clear();
        let mut row = 0;
        // Rows of embeddings are summed here; all others go through the output head together.
        let mut logit_rows = Vec::new();
        for c in chunks {
            match c.output {
                OutputKind::HiddenSum => {
                    let mut sum = vec![0.0f32; h];
                    for _ in c.tokens {
                        let normed = &self.buffers.normed[row * ld..][..h];
                        sum.iter_mut().zip(normed).for_each(|(s, v)| *s += v);
                        row += 1;
                    }
                    out.hidden_sums.push(sum);
                }
                OutputKind::LastLogits | OutputKind::AllLogits => {
                    let n = if c.output == OutputKind::LastLogits { 1 } else { c.tokens.len() };
                    logit_rows.extend(row..row + n);
                    row += n;
                }
                OutputKind::None | OutputKind::SampledId(_) => {}
            }
        }
        for (to, from) in logit_rows.iter().enumerate() {
            if to != *from {
                self.buffers.normed.copy_within(from * ld..(from + 1) * ld, to * ld);
            }
        }
        out.logits.resize(logit_rows.len() * vocab, 0.0);
        if !logit_rows.is_empty() {
            let product = MatMul {
                w: &self.head,
                x: &self.buffers.normed,
                ldx: ld,
                tokens: logit_rows.len(),
                ldy: vocab,
                add: false,
            };
            matmul(self.isa, &mut self.pool, &product, &mut out.logits);
        }
    }
}
