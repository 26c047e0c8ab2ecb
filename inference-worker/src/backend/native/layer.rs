//! The parts of a transformer layer: matrix products, norms, rotary embedding, attention and activation.
//!
//! Called by `NativeBackend::step` for each layer. Work is distributed to the pool's threads by token, or by query
//! rows for attention.

use std::cell::RefCell;

use super::{
    BLOCK_SIZE, NativeBackend,
    attention::{AttentionInputs, KvLayout, MAX_ROWS, attention},
    kernels::{MatMul, SharedOutput, matmul},
    math, padded,
    pool::Pool,
};
use crate::backend::SequenceChunk;

/// Where the key and value of a token are stored.
#[derive(Clone, Copy)]
pub struct CacheSlot {
    pub block: u32,
    pub offset: usize,
}

/// The computed tokens of a chunk: its last `len`, in the buffers from row `row` on.
#[derive(Clone, Copy)]
pub struct QueryRows {
    pub chunk: usize,
    pub row: usize,
    pub len: usize,
}

/// Up to `MAX_ROWS` query rows of one chunk and one key/value head.
pub struct AttentionTask {
    queries: QueryRows,
    head: usize,
    first: usize,
    rows: usize,
}

/// A matrix product of a layer.
#[derive(Clone, Copy)]
pub enum Projection {
    Qkv(usize),
    AttentionOutput(usize),
    GateUp(usize),
    Down(usize),
}

/// An RMSNorm of the model.
#[derive(Clone, Copy)]
pub enum Norm {
    Attention(usize),
    Ffn(usize),
    Final,
}

/// Buffers of a thread for attention: queries and outputs of some rows side by side, and scores.
#[derive(Default)]
struct AttentionScratch {
    q: Vec<f32>,
    out: Vec<f32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<AttentionScratch> = RefCell::default();
}

impl NativeBackend {
    /// Computes a matrix product of `tokens` rows.
    pub(super) fn project(&mut self, projection: Projection, tokens: usize) {
        let c = &self.config;
        let b = &mut self.buffers;
        let (w, x, ldx, y, ldy, add) = match projection {
            Projection::Qkv(l) => (
                &self.layers[l].qkv,
                &b.normed,
                padded(c.hidden),
                &mut b.qkv,
                c.q_dim() + 2 * c.kv_dim(),
                false,
            ),
            Projection::AttentionOutput(l) => {
                (&self.layers[l].out, &b.attention, padded(c.q_dim()), &mut b.x, c.hidden, true)
            }
            Projection::GateUp(l) => {
                (&self.layers[l].gate_up, &b.normed, padded(c.hidden), &mut b.gate_up, 2 * c.ffn, false)
            }
            Projection::Down(l) => {
                (&self.layers[l].down, &b.activated, padded(c.ffn), &mut b.x, c.hidden, true)
            }
        };
        matmul(self.isa, &mut self.pool, &MatMul { w, x, ldx, tokens, ldy, add }, y);
    }

    /// Normalises `tokens` rows of the residual stream.
    pub(super) fn rms_norm(&mut self, norm: Norm, tokens: usize) {
        let (h, ld) = (self.config.hidden, padded(self.config.hidden));
        let weight = match norm {
            Norm::Attention(l) => &self.layers[l].attn_norm,
            Norm::Ffn(l) => &self.layers[l].ffn_norm,
            Norm::Final => &self.norm,
        };
        let (isa, eps, x) = (self.isa, self.config.eps, &self.buffers.x);
        let out = SharedOutput::new(&mut self.buffers.normed);
        for_each_token(&mut self.pool, tokens, &|t| {
            // SAFETY: row t of the output is written by this task only.
            let out = unsafe { out.slice(t * ld, ld) };
            math::rms_norm(isa, &x[t * h..][..h], h, weight, eps, out, ld);
        });
    }

    /// Applies the rotary embedding to queries and keys, scales queries, and stores keys and values in the KV cache.
    pub(super) fn rotate_and_store(&mut self, layer: usize, slots: &[CacheSlot]) {
        let c = &self.config;
        let (width, half) = (c.q_dim() + 2 * c.kv_dim(), c.head_dim / 2);
        let layout = KvLayout { heads: c.kv_heads, dim: c.head_dim };
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let layer = &mut self.layers[layer];
        let (keys, values) = (SharedOutput::new(&mut layer.keys), SharedOutput::new(&mut layer.values));
        let (qkv, angles) = (SharedOutput::new(&mut self.buffers.qkv), &self.buffers.angles);
        for_each_token(&mut self.pool, slots.len(), &|t| {
            // SAFETY: row t is written by this task only.
            let row = unsafe { qkv.slice(t * width, width) };
            let (cos, sin) = angles[t * 2 * half..][..2 * half].split_at(half);
            let (q, kv) = row.split_at_mut(c.q_dim());
            let (k, v) = kv.split_at_mut(c.kv_dim());
            math::rotate(q, c.head_dim, cos, sin);
            math::rotate(k, c.head_dim, cos, sin);
            q.iter_mut().for_each(|q| *q *= scale);
            let CacheSlot { block, offset } = slots[t];
            for head in 0..c.kv_heads {
                let base = layout.at(block, head);
                for d in 0..c.head_dim {
                    // SAFETY: column `offset` of this block is written by this token's task only.
                    let key = unsafe { keys.slice(base + d * BLOCK_SIZE + offset, 1) };
                    key[0] = k[head * c.head_dim + d];
                }
                // SAFETY: row `offset` of this block is written by this token's task only.
                unsafe { values.slice(base + offset * c.head_dim, c.head_dim) }
                    .copy_from_slice(&v[head * c.head_dim..][..c.head_dim]);
            }
        });
    }

    /// Computes attention for `tasks`.
    pub(super) fn attention(&mut self, layer: usize, chunks: &[SequenceChunk<'_>], tasks: &[AttentionTask]) {
        let c = &self.config;
        let (dim, group) = (c.head_dim, c.heads / c.kv_heads);
        let (width, ld) = (c.q_dim() + 2 * c.kv_dim(), padded(c.q_dim()));
        let layout = KvLayout { heads: c.kv_heads, dim };
        let (isa, layer, qkv) = (self.isa, &self.layers[layer], &self.buffers.qkv);
        let out = SharedOutput::new(&mut self.buffers.attention);
        self.pool.run(tasks.len(), &|i| {
            let AttentionTask { queries, head, first, rows } = tasks[i];
            let c = &chunks[queries.chunk];
            let start = c.start + c.tokens.len() - queries.len;
            // Row n of a key/value head is query head n % group of token n / group.
            let position = |row: usize| {
                let n = first + row;
                (n / group, (head * group + n % group) * dim)
            };
            SCRATCH.with_borrow_mut(|AttentionScratch { q, out: o, scores }| {
                let mut visible = [0; MAX_ROWS];
                q.resize(q.len().max(MAX_ROWS * dim), 0.0);
                o.resize(o.len().max(MAX_ROWS * dim), 0.0);
                for row in 0..rows {
                    let (t, at) = position(row);
                    q[row * dim..][..dim].copy_from_slice(&qkv[(queries.row + t) * width + at..][..dim]);
                    visible[row] = start + t + 1;
                }
                let inputs = AttentionInputs {
                    q,
                    visible: &visible[..rows],
                    kv: layout,
                    head,
                    block_table: c.block_table,
                    keys: &layer.keys,
                    values: &layer.values,
                };
                attention(isa, &inputs, scores, o);
                for row in 0..rows {
                    let (t, at) = position(row);
                    // SAFETY: this head of this token is written by this task only.
                    unsafe { out.slice((queries.row + t) * ld + at, dim) }
                        .copy_from_slice(&o[row * dim..][..dim]);
                }
            });
        });
    }

    /// Splits the attention of a step into tasks.
    pub(super) fn attention_tasks(&self, queries: &[QueryRows]) -> Vec<AttentionTask> {
        let group = self.config.heads / self.config.kv_heads;
        let mut tasks = Vec::new();
        for rows_of_chunk in queries {
            let rows = rows_of_chunk.len * group;
            // In the order of tokens, so that the pool gives a thread the tokens that it wrote before: see `Pool`.
            for first in (0..rows).step_by(MAX_ROWS) {
                let rows = MAX_ROWS.min(rows - first);
                tasks.extend((0..self.config.kv_heads).map(|head| AttentionTask {
                    queries: *rows_of_chunk,
                    head,
                    first,
                    rows,
                }));
            }
        }
        tasks
    }

    /// Applies SwiGLU to `tokens` rows.
    pub(super) fn activate(&mut self, tokens: usize) {
        let (f, ld, isa) = (self.config.ffn, padded(self.config.ffn), self.isa);
        let gate_up = &self.buffers.gate_up;
        let out = SharedOutput::new(&mut self.buffers.activated);
        for_each_token(&mut self.pool, tokens, &|t| {
            // SAFETY: row t of the output is written by this task only.
            let out = unsafe { out.slice(t * ld, ld) };
            math::swiglu(isa, &gate_up[t * 2 * f..][..2 * f], f, out, ld);
        });
    }
}

/// Calls `job` for each token: on this thread alone if they are few, because waking the others would take longer.
fn for_each_token(pool: &mut Pool, tokens: usize, job: &(dyn Fn(usize) + Sync)) {
    if tokens <= 4 {
        (0..tokens).for_each(job);
    } else {
        pool.run(tokens, job);
    }
}
