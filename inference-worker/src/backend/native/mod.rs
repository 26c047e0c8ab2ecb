//! The CPU backend: a Llama step on packed weights with kernels of this crate.
//!
//! Input: a [`WeightSource`] and a KV budget in blocks. Output: a [`NativeBackend`]. Weights stay in the
//! file's own type and are decoded in registers; activations, cache and sums are f32, so results are those
//! of the dequantised model in f32.

mod aligned;
mod attention;
pub mod kernels;
mod lanes;
mod math;
mod packed;
mod pool;

use std::{cell::RefCell, sync::Arc};

pub use attention::BLOCK;

use self::{
    aligned::AlignedF32,
    attention::{Attend, KvLayout, MAX_ROWS, attend},
    kernels::{Isa, Product, SharedOut, product},
    packed::{Packed, TILE},
    pool::Pool,
};
use super::{Backend, BackendError, SeqPart, StepOutput, Want};
use crate::{
    model::{LlamaConfig, load},
    weights::{RawTensor, RopeLayout, WeightError, WeightSource},
};

/// One transformer layer.
struct Layer {
    attn_norm: Vec<f32>,
    qkv: Packed,
    out: Packed,
    ffn_norm: Vec<f32>,
    gate_up: Packed,
    down: Packed,
    keys: AlignedF32,
    values: AlignedF32,
}

/// Buffers of a step, kept between steps.
#[derive(Default)]
struct Buffers {
    x: AlignedF32,
    normed: AlignedF32,
    qkv: AlignedF32,
    attended: AlignedF32,
    gate_up: AlignedF32,
    active: AlignedF32,
    angles: AlignedF32,
}

/// A Llama on the CPU.
pub struct NativeBackend {
    config: LlamaConfig,
    isa: Isa,
    pool: Pool,
    embedding: Arc<Packed>,
    head: Arc<Packed>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    frequencies: Vec<f32>,
    rope_scale: f32,
    kv_blocks: usize,
    buffers: Buffers,
    weight_type: String,
}

/// A token of the step: where it goes.
#[derive(Clone, Copy)]
struct Token {
    block: u32,
    slot: usize,
}

/// Tokens of a part that are computed: its last `len`, in the buffers from row `row` on.
#[derive(Clone, Copy)]
struct Span {
    part: usize,
    row: usize,
    len: usize,
}

/// Up to `MAX_ROWS` query rows of one span and one key/value head.
struct AttendItem {
    span: Span,
    head: usize,
    first: usize,
    rows: usize,
}

/// What a thread needs of its own for attention: queries and outputs of some rows side by side, and scores.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    out: Vec<f32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn padded(width: usize) -> usize {
    width.next_multiple_of(TILE)
}

impl NativeBackend {
    /// Packs a model's weights. `as_f32` dequantises them first (for comparison; four to seven times the memory).
    pub fn load(
        source: &dyn WeightSource,
        config: &LlamaConfig,
        threads: usize,
        kv_blocks: usize,
        as_f32: bool,
    ) -> Result<Self, WeightError> {
        let other = |e: std::io::Error| WeightError::Metadata(format!("cannot start compute threads: {e}"));
        let c = config;
        let matrix = |names: &[(&str, usize, usize)], layer: usize| {
            let tensors = names
                .iter()
                .map(|(name, rows, cols)| load::need(source, &load::layer_name(layer, name), &[*rows, *cols]))
                .collect::<Result<Vec<_>, _>>()?;
            let orders = names.iter().map(|(name, rows, _)| row_order(source, c, name, *rows));
            Ok::<_, WeightError>(pack(&tensors, orders.collect(), as_f32))
        };
        let kv_len = kv_blocks * BLOCK * c.kv_dim();
        let embedding_raw = load::need(source, load::EMBEDDING, &[c.vocab, c.hidden])?;
        let weight_type =
            load::need(source, &load::layer_name(0, "mlp.down_proj.weight"), &[c.hidden, c.ffn])?.dtype;
        let embedding = Arc::new(pack(&[embedding_raw], vec![(0..c.vocab).collect()], as_f32));
        let head = if c.tied {
            embedding.clone()
        } else {
            let raw = load::need(source, load::HEAD, &[c.vocab, c.hidden])?;
            Arc::new(pack(&[raw], vec![(0..c.vocab).collect()], as_f32))
        };
        let mut layers = Vec::with_capacity(c.layers);
        for l in 0..c.layers {
            let vector = |name: &str| {
                Ok::<_, WeightError>(load::need(source, &load::layer_name(l, name), &[c.hidden])?.to_f32())
            };
            layers.push(Layer {
                attn_norm: vector("input_layernorm.weight")?,
                qkv: matrix(
                    &[
                        (load::Q, c.q_dim(), c.hidden),
                        (load::K, c.kv_dim(), c.hidden),
                        ("self_attn.v_proj.weight", c.kv_dim(), c.hidden),
                    ],
                    l,
                )?,
                out: matrix(&[("self_attn.o_proj.weight", c.hidden, c.q_dim())], l)?,
                ffn_norm: vector("post_attention_layernorm.weight")?,
                gate_up: matrix(
                    &[("mlp.gate_proj.weight", c.ffn, c.hidden), ("mlp.up_proj.weight", c.ffn, c.hidden)],
                    l,
                )?,
                down: matrix(&[("mlp.down_proj.weight", c.hidden, c.ffn)], l)?,
                // Zero pages: the system gives memory only to blocks that are used.
                keys: AlignedF32::zeroed(kv_len),
                values: AlignedF32::zeroed(kv_len),
            });
        }
        let (frequencies, rope_scale) = c.rope_frequencies();
        Ok(Self {
            isa: Isa::detect(),
            pool: Pool::new(threads).map_err(other)?,
            embedding,
            head,
            norm: load::need(source, load::NORM, &[c.hidden])?.to_f32(),
            layers,
            frequencies,
            rope_scale,
            kv_blocks,
            buffers: Buffers::default(),
            weight_type: if as_f32 { "F32 (dequantised)".into() } else { format!("{weight_type:?}") },
            config: config.clone(),
        })
    }

    fn product(&mut self, which: Which, tokens: usize) {
        let c = &self.config;
        let b = &mut self.buffers;
        let (w, x, ldx, y, ldy, add) = match which {
            Which::Qkv(l) => (
                &self.layers[l].qkv,
                &b.normed,
                padded(c.hidden),
                &mut b.qkv,
                c.q_dim() + 2 * c.kv_dim(),
                false,
            ),
            Which::Out(l) => (&self.layers[l].out, &b.attended, padded(c.q_dim()), &mut b.x, c.hidden, true),
            Which::GateUp(l) => {
                (&self.layers[l].gate_up, &b.normed, padded(c.hidden), &mut b.gate_up, 2 * c.ffn, false)
            }
            Which::Down(l) => (&self.layers[l].down, &b.active, padded(c.ffn), &mut b.x, c.hidden, true),
        };
        product(self.isa, &mut self.pool, &Product { w, x, ldx, tokens, ldy, add }, y);
    }

    fn norm_all(&mut self, weight: Norm, tokens: usize) {
        let (h, ld) = (self.config.hidden, padded(self.config.hidden));
        let weight = match weight {
            Norm::Attention(l) => &self.layers[l].attn_norm,
            Norm::Ffn(l) => &self.layers[l].ffn_norm,
            Norm::Final => &self.norm,
        };
        let (isa, eps, x) = (self.isa, self.config.eps, &self.buffers.x);
        let out = SharedOut::new(&mut self.buffers.normed);
        each_token(&mut self.pool, tokens, &|t| {
            // SAFETY: row t of the output belongs to this item alone.
            let out = unsafe { out.part(t * ld, ld) };
            math::rms_norm(isa, &x[t * h..][..h], h, weight, eps, out, ld);
        });
    }

    /// Rotates queries and keys, scales queries, and stores keys and values in the cache.
    fn rotate_and_store(&mut self, layer: usize, tokens: &[Token]) {
        let c = &self.config;
        let (width, half) = (c.q_dim() + 2 * c.kv_dim(), c.head_dim / 2);
        let layout = KvLayout { heads: c.kv_heads, dim: c.head_dim };
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let layer = &mut self.layers[layer];
        let (keys, values) = (SharedOut::new(&mut layer.keys), SharedOut::new(&mut layer.values));
        let (qkv, angles) = (SharedOut::new(&mut self.buffers.qkv), &self.buffers.angles);
        each_token(&mut self.pool, tokens.len(), &|t| {
            // SAFETY: row t belongs to this item alone.
            let row = unsafe { qkv.part(t * width, width) };
            let (cos, sin) = angles[t * 2 * half..][..2 * half].split_at(half);
            let (q, kv) = row.split_at_mut(c.q_dim());
            let (k, v) = kv.split_at_mut(c.kv_dim());
            math::rotate(q, c.head_dim, cos, sin);
            math::rotate(k, c.head_dim, cos, sin);
            q.iter_mut().for_each(|q| *q *= scale);
            let Token { block, slot } = tokens[t];
            for head in 0..c.kv_heads {
                let base = layout.at(block, head);
                for d in 0..c.head_dim {
                    // SAFETY: column `slot` of this block is written by this token's item alone.
                    let key = unsafe { keys.part(base + d * BLOCK + slot, 1) };
                    key[0] = k[head * c.head_dim + d];
                }
                // SAFETY: line `slot` of this block is written by this token's item alone.
                unsafe { values.part(base + slot * c.head_dim, c.head_dim) }
                    .copy_from_slice(&v[head * c.head_dim..][..c.head_dim]);
            }
        });
    }

    fn attend(&mut self, layer: usize, parts: &[SeqPart<'_>], items: &[AttendItem]) {
        let c = &self.config;
        let (dim, group) = (c.head_dim, c.heads / c.kv_heads);
        let (width, ld) = (c.q_dim() + 2 * c.kv_dim(), padded(c.q_dim()));
        let layout = KvLayout { heads: c.kv_heads, dim };
        let (isa, layer, qkv) = (self.isa, &self.layers[layer], &self.buffers.qkv);
        let out = SharedOut::new(&mut self.buffers.attended);
        self.pool.run(items.len(), &|i| {
            let AttendItem { span, head, first, rows } = items[i];
            let p = &parts[span.part];
            let start = p.start + p.tokens.len() - span.len;
            // Row n of a span and head is query head n % group of token n / group.
            let place = |row: usize| {
                let n = first + row;
                (n / group, (head * group + n % group) * dim)
            };
            SCRATCH.with_borrow_mut(|Scratch { q, out: o, scores }| {
                let mut seen = [0; MAX_ROWS];
                q.resize(q.len().max(MAX_ROWS * dim), 0.0);
                o.resize(o.len().max(MAX_ROWS * dim), 0.0);
                for row in 0..rows {
                    let (t, at) = place(row);
                    q[row * dim..][..dim].copy_from_slice(&qkv[(span.row + t) * width + at..][..dim]);
                    seen[row] = start + t + 1;
                }
                let operands = Attend {
                    q,
                    seen: &seen[..rows],
                    kv: layout,
                    head,
                    blocks: p.blocks,
                    keys: &layer.keys,
                    values: &layer.values,
                };
                attend(isa, &operands, scores, o);
                for row in 0..rows {
                    let (t, at) = place(row);
                    // SAFETY: this head of this token belongs to this item alone.
                    unsafe { out.part((span.row + t) * ld + at, dim) }
                        .copy_from_slice(&o[row * dim..][..dim]);
                }
            });
        });
    }

    fn attend_items(&self, spans: &[Span]) -> Vec<AttendItem> {
        let group = self.config.heads / self.config.kv_heads;
        let mut items = Vec::new();
        for span in spans {
            let rows = span.len * group;
            // In the order of tokens, as the pool shares items out: see `Pool`.
            for first in (0..rows).step_by(MAX_ROWS) {
                let rows = MAX_ROWS.min(rows - first);
                items.extend((0..self.config.kv_heads).map(|head| AttendItem {
                    span: *span,
                    head,
                    first,
                    rows,
                }));
            }
        }
        items
    }

    fn activate(&mut self, tokens: usize) {
        let (f, ld, isa) = (self.config.ffn, padded(self.config.ffn), self.isa);
        let gate_up = &self.buffers.gate_up;
        let out = SharedOut::new(&mut self.buffers.active);
        each_token(&mut self.pool, tokens, &|t| {
            // SAFETY: row t of the output belongs to this item alone.
            let out = unsafe { out.part(t * ld, ld) };
            math::swiglu(isa, &gate_up[t * 2 * f..][..2 * f], f, out, ld);
        });
    }

    /// Sizes the buffers and fills in embeddings and rotation angles.
    fn prepare(&mut self, parts: &[SeqPart<'_>], total: usize) {
        let c = &self.config;
        let b = &mut self.buffers;
        for (buffer, width) in [
            (&mut b.x, c.hidden),
            (&mut b.normed, padded(c.hidden)),
            (&mut b.qkv, c.q_dim() + 2 * c.kv_dim()),
            (&mut b.attended, padded(c.q_dim())),
            (&mut b.gate_up, 2 * c.ffn),
            (&mut b.active, padded(c.ffn)),
            (&mut b.angles, c.head_dim),
        ] {
            // The padding beyond a row's width is zero from here on and never written.
            buffer.need(total * width);
        }
        let half = c.head_dim / 2;
        let tokens = parts.iter().flat_map(|p| p.tokens.iter().enumerate().map(|(i, id)| (p.start + i, *id)));
        for (t, (position, id)) in tokens.enumerate() {
            self.embedding.row(id as usize, &mut b.x[t * c.hidden..][..c.hidden]);
            let angles = &mut b.angles[t * 2 * half..][..2 * half];
            for (i, f) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (position as f32 * f).sin_cos();
                (angles[i], angles[half + i]) = (cos * self.rope_scale, sin * self.rope_scale);
            }
        }
    }

    fn check(&self, parts: &[SeqPart<'_>]) -> Result<(), BackendError> {
        for p in parts {
            let end = p.start + p.tokens.len();
            if p.blocks.len() * BLOCK < end || p.blocks.iter().any(|b| *b as usize >= self.kv_blocks) {
                return Err(BackendError::Other(format!(
                    "a part of {end} tokens has {} blocks",
                    p.blocks.len()
                )));
            }
            if let Some(id) = p.tokens.iter().find(|id| **id as usize >= self.config.vocab) {
                return Err(BackendError::Other(format!("token id {id} is outside the vocabulary")));
            }
            if matches!(p.want, Want::Sample(_)) {
                return Err(BackendError::Other("this backend gives logits, not samples".into()));
            }
        }
        Ok(())
    }

    /// Brings the tokens whose hidden state is wanted to the front, in order; the last layer computes no others.
    fn keep_wanted(&mut self, parts: &[SeqPart<'_>], spans: &[Span]) -> Vec<Span> {
        let (h, width) = (self.config.hidden, self.config.q_dim() + 2 * self.config.kv_dim());
        let (mut kept, mut row) = (Vec::new(), 0);
        for span in spans {
            let len = match parts[span.part].want {
                Want::Nothing | Want::Sample(_) => continue,
                Want::Last => 1,
                Want::All | Want::Hidden => span.len,
            };
            let from = span.row + span.len - len..span.row + span.len;
            self.buffers.x.copy_within(from.start * h..from.end * h, row * h);
            self.buffers.qkv.copy_within(from.start * width..from.end * width, row * width);
            kept.push(Span { part: span.part, row, len });
            row += len;
        }
        kept
    }

    /// What the kept tokens give: logits, or sums of hidden states.
    fn finish(&mut self, parts: &[SeqPart<'_>], tokens: usize, out: &mut StepOutput) {
        let (h, vocab) = (self.config.hidden, self.config.vocab);
        self.norm_all(Norm::Final, tokens);
        let ld = padded(h);
        out.vocab = vocab;
        out.logits.clear();
        out.hidden.clear();
        let mut row = 0;
        // Embedding parts are summed here; the rows between them go through the head together.
        let mut run = Vec::new();
        for p in parts {
            match p.want {
                Want::Hidden => {
                    let mut sum = vec![0.0f32; h];
                    for _ in p.tokens {
                        let normed = &self.buffers.normed[row * ld..][..h];
                        sum.iter_mut().zip(normed).for_each(|(s, v)| *s += v);
                        row += 1;
                    }
                    out.hidden.push(sum);
                }
                Want::Last | Want::All => {
                    let n = if p.want == Want::Last { 1 } else { p.tokens.len() };
                    run.extend(row..row + n);
                    row += n;
                }
                Want::Nothing | Want::Sample(_) => {}
            }
        }
        for (to, from) in run.iter().enumerate() {
            if to != *from {
                self.buffers.normed.copy_within(from * ld..(from + 1) * ld, to * ld);
            }
        }
        out.logits.resize(run.len() * vocab, 0.0);
        if !run.is_empty() {
            let p = Product {
                w: &self.head,
                x: &self.buffers.normed,
                ldx: ld,
                tokens: run.len(),
                ldy: vocab,
                add: false,
            };
            product(self.isa, &mut self.pool, &p, &mut out.logits);
        }
    }
}

#[derive(Clone, Copy)]
enum Which {
    Qkv(usize),
    Out(usize),
    GateUp(usize),
    Down(usize),
}

#[derive(Clone, Copy)]
enum Norm {
    Attention(usize),
    Ffn(usize),
    Final,
}

/// Runs `job` per token: on this thread when they are few, as waking others would cost more.
fn each_token(pool: &mut Pool, tokens: usize, job: &(dyn Fn(usize) + Sync)) {
    if tokens <= 4 {
        (0..tokens).for_each(job);
    } else {
        pool.run(tokens, job);
    }
}

/// The file's row for each row in Hugging Face's order.
fn row_order(source: &dyn WeightSource, c: &LlamaConfig, name: &str, rows: usize) -> Vec<usize> {
    let rotated = name == load::Q || name == load::K;
    if !rotated || source.rope_layout() == RopeLayout::Halves {
        return (0..rows).collect();
    }
    let (dim, half) = (c.head_dim, c.head_dim / 2);
    (0..rows)
        .map(|r| r / dim * dim + if r % dim < half { r % dim * 2 } else { (r % dim - half) * 2 + 1 })
        .collect()
}

fn pack(tensors: &[RawTensor<'_>], orders: Vec<Vec<usize>>, as_f32: bool) -> Packed {
    if as_f32 {
        let cols = tensors[0].shape[1];
        let mut dense = Vec::new();
        for (tensor, order) in tensors.iter().zip(&orders) {
            let values = tensor.to_f32();
            order.iter().for_each(|r| dense.extend_from_slice(&values[r * cols..][..cols]));
        }
        return Packed::from_f32(dense.len() / cols, cols, &dense);
    }
    let rows = tensors.iter().zip(&orders).flat_map(|(t, o)| o.iter().map(move |r| (t, *r)));
    Packed::new(&rows.collect::<Vec<_>>())
}

impl Backend for NativeBackend {
    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn step(&mut self, parts: &[SeqPart<'_>], out: &mut StepOutput) -> Result<(), BackendError> {
        self.check(parts)?;
        let (mut spans, mut tokens) = (Vec::new(), Vec::new());
        for (part, p) in parts.iter().enumerate() {
            spans.push(Span { part, row: tokens.len(), len: p.tokens.len() });
            tokens.extend(
                (p.start..p.start + p.tokens.len())
                    .map(|at| Token { block: p.blocks[at / BLOCK], slot: at % BLOCK }),
            );
        }
        let mut total = tokens.len();
        self.prepare(parts, total);
        let mut items = self.attend_items(&spans);
        for l in 0..self.config.layers {
            self.norm_all(Norm::Attention(l), total);
            self.product(Which::Qkv(l), total);
            self.rotate_and_store(l, &tokens);
            if l + 1 == self.config.layers {
                spans = self.keep_wanted(parts, &spans);
                items = self.attend_items(&spans);
                total = spans.iter().map(|span| span.len).sum();
            }
            self.attend(l, parts, &items);
            self.product(Which::Out(l), total);
            self.norm_all(Norm::Ffn(l), total);
            self.product(Which::GateUp(l), total);
            self.activate(total);
            self.product(Which::Down(l), total);
        }
        self.finish(parts, total, out);
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
