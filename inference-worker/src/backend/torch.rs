//! The libtorch backend: for CUDA, and for the CPU in any float type.
//!
//! Input: a [`WeightSource`], device and float type. Output: a [`TorchBackend`]. On CUDA everything between
//! the ids that go up and the ids that come down stays on the device: indices travel in one pinned transfer
//! per step, sampling runs there, and nothing else synchronises. The same code runs on the CPU, where the
//! tests compare it with the native backend and with transformers; on CUDA itself it is not tested here.

use tch::{Device, Kind, Tensor};

use super::{BLOCK, Backend, BackendError, DeviceSample, SeqPart, StepOutput, Want};
use crate::{
    model::{LlamaConfig, load},
    weights::{RopeLayout, WeightError, WeightSource},
};

struct Layer {
    attn_norm: Tensor,
    /// `[hidden, q + 2·kv]`: a view of the row-major weights, as the product wants it.
    qkv: Tensor,
    out: Tensor,
    ffn_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    /// `[blocks · BLOCK, kv_heads · dim]`.
    keys: Tensor,
    values: Tensor,
}

/// A Llama on a libtorch device.
pub struct TorchBackend {
    config: LlamaConfig,
    device: Device,
    kind: Kind,
    embedding: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    frequencies: Tensor,
    rope_scale: f64,
    kv_blocks: usize,
    weight_bytes: usize,
}

/// What attention needs of a step, made once and used by every layer.
struct Plan {
    /// Cache slot of each token.
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    /// Rows and cache slots of the parts of one token, attended together.
    single: Option<Single>,
    /// The longer parts, one by one.
    chunks: Vec<Chunk>,
}

struct Single {
    rows: Tensor,
    /// `[parts · longest]` cache slots.
    context: Tensor,
    longest: i64,
    /// `[parts, 1, 1, longest]`, true where a key is seen.
    mask: Tensor,
}

struct Chunk {
    first: i64,
    len: i64,
    context: Tensor,
    /// None where the chunk starts its sequence: plain causal attention.
    mask: Option<Tensor>,
}

type Result<T> = std::result::Result<T, BackendError>;

impl TorchBackend {
    /// Dequantises a model's weights to `kind` on `device`.
    pub fn load(
        source: &dyn WeightSource,
        config: &LlamaConfig,
        device: Device,
        kind: Kind,
        kv_blocks: usize,
    ) -> std::result::Result<Self, WeightError> {
        let c = config;
        let torch = |e: tch::TchError| WeightError::Metadata(format!("libtorch: {e}"));
        let fetch = |name: &str, shape: &[usize]| {
            let raw = load::need(source, name, shape)?;
            let dims: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
            let t = Tensor::f_from_slice(&raw.to_f32()).and_then(|t| t.f_view(&dims[..])).map_err(torch)?;
            Ok::<_, WeightError>(t)
        };
        let place = |t: Tensor| t.f_to_device(device).and_then(|t| t.f_to_kind(kind)).map_err(torch);
        let unpermute = |t: Tensor, heads: usize| match source.rope_layout() {
            RopeLayout::Halves => Ok(t),
            RopeLayout::Interleaved => t
                .f_view([heads as i64, c.head_dim as i64 / 2, 2, c.hidden as i64])
                .and_then(|t| t.f_transpose(1, 2))
                .and_then(|t| t.f_reshape([(heads * c.head_dim) as i64, c.hidden as i64]))
                .map_err(torch),
        };
        let transposed = |parts: &[Tensor]| {
            let whole = place(Tensor::f_cat(parts, 0).map_err(torch)?)?;
            whole.f_transpose(0, 1).map_err(torch)
        };
        let cache = || {
            Tensor::f_zeros([(kv_blocks * BLOCK) as i64, c.kv_dim() as i64], (kind, device)).map_err(torch)
        };
        let mut layers = Vec::with_capacity(c.layers);
        for l in 0..c.layers {
            let get = |name: &str, shape: &[usize]| fetch(&load::layer_name(l, name), shape);
            layers.push(Layer {
                attn_norm: place(get("input_layernorm.weight", &[c.hidden])?)?,
                qkv: transposed(&[
                    unpermute(get(load::Q, &[c.q_dim(), c.hidden])?, c.heads)?,
                    unpermute(get(load::K, &[c.kv_dim(), c.hidden])?, c.kv_heads)?,
                    get("self_attn.v_proj.weight", &[c.kv_dim(), c.hidden])?,
                ])?,
                out: transposed(&[get("self_attn.o_proj.weight", &[c.hidden, c.q_dim()])?])?,
                ffn_norm: place(get("post_attention_layernorm.weight", &[c.hidden])?)?,
                gate_up: transposed(&[
                    get("mlp.gate_proj.weight", &[c.ffn, c.hidden])?,
                    get("mlp.up_proj.weight", &[c.ffn, c.hidden])?,
                ])?,
                down: transposed(&[get("mlp.down_proj.weight", &[c.hidden, c.ffn])?])?,
                keys: cache()?,
                values: cache()?,
            });
        }
        let embedding = place(fetch(load::EMBEDDING, &[c.vocab, c.hidden])?)?;
        let head =
            if c.tied { embedding.shallow_clone() } else { place(fetch(load::HEAD, &[c.vocab, c.hidden])?)? };
        let (frequencies, rope_scale) = c.rope_frequencies();
        let parameters = c.vocab * c.hidden * if c.tied { 1 } else { 2 }
            + c.layers * (c.hidden * (2 * c.q_dim() + 2 * c.kv_dim()) + 3 * c.ffn * c.hidden);
        Ok(Self {
            device,
            kind,
            embedding,
            head: head.f_transpose(0, 1).map_err(torch)?,
            norm: place(fetch(load::NORM, &[c.hidden])?)?,
            layers,
            frequencies: Tensor::f_from_slice(&frequencies)
                .and_then(|t| t.f_to_device(device))
                .map_err(torch)?,
            rope_scale: rope_scale.into(),
            kv_blocks,
            weight_bytes: parameters * kind.elt_size_in_bytes(),
            config: config.clone(),
        })
    }

    /// One transfer for all the indices of a step, cut up on the device.
    fn upload(&self, lists: &[&[i64]]) -> Result<Vec<Tensor>> {
        let all: Vec<i64> = lists.iter().flat_map(|l| l.iter().copied()).collect();
        let host = Tensor::f_from_slice(&all)?;
        let device = if self.device.is_cuda() {
            host.f_pin_memory(self.device)?.f_to_device_(self.device, Kind::Int64, true, false)?
        } else {
            host
        };
        let mut at = 0;
        lists
            .iter()
            .map(|l| {
                let t = device.f_narrow(0, at, l.len() as i64)?;
                at += l.len() as i64;
                Ok(t)
            })
            .collect()
    }

    fn plan(&self, parts: &[SeqPart<'_>]) -> Result<(Tensor, Plan)> {
        let slot =
            |p: &SeqPart<'_>, at: usize| i64::from(p.blocks[at / BLOCK]) * BLOCK as i64 + (at % BLOCK) as i64;
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut single_rows, mut single_parts, mut long) = (Vec::new(), Vec::new(), Vec::new());
        for p in parts {
            let first = ids.len() as i64;
            if p.tokens.len() == 1 {
                single_rows.push(first);
                single_parts.push(p);
            } else {
                long.push((first, p));
            }
            ids.extend(p.tokens.iter().map(|id| i64::from(*id)));
            positions.extend((p.start..p.start + p.tokens.len()).map(|at| at as i64));
            slots.extend((p.start..p.start + p.tokens.len()).map(|at| slot(p, at)));
        }
        let longest = single_parts.iter().map(|p| p.start + 1).max().unwrap_or(0);
        let lens: Vec<i64> = single_parts.iter().map(|p| p.start as i64 + 1).collect();
        let context: Vec<i64> = single_parts
            .iter()
            .flat_map(|p| (0..longest).map(|at| if at <= p.start { slot(p, at) } else { 0 }))
            .collect();
        let mut lists: Vec<&[i64]> = vec![&ids, &positions, &slots, &single_rows, &lens, &context];
        let contexts: Vec<Vec<i64>> =
            long.iter().map(|(_, p)| (0..p.start + p.tokens.len()).map(|at| slot(p, at)).collect()).collect();
        lists.extend(contexts.iter().map(Vec::as_slice));
        let mut on_device = self.upload(&lists)?.into_iter();
        let mut next =
            || on_device.next().ok_or_else(|| BackendError::Other("an index list is missing".into()));
        let (ids, positions, slots, rows, lens, context) =
            (next()?, next()?, next()?, next()?, next()?, next()?);
        let arange = |n: i64| Tensor::f_arange(n, (Kind::Int64, self.device));
        let single = if single_parts.is_empty() {
            None
        } else {
            let n = single_parts.len() as i64;
            let seen = arange(longest as i64)?.f_view([1, 1, 1, -1])?;
            let mask = seen.f_less_tensor(&lens.f_view([n, 1, 1, 1])?)?;
            Some(Single { rows, context, longest: longest as i64, mask })
        };
        let mut chunks = Vec::with_capacity(long.len());
        for (first, p) in long {
            let (len, start) = (p.tokens.len() as i64, p.start as i64);
            let mask = if start == 0 {
                None
            } else {
                let last_seen = (arange(len)? + start).f_view([len, 1])?;
                Some(arange(start + len)?.f_view([1, -1])?.f_less_equal_tensor(&last_seen)?)
            };
            chunks.push(Chunk { first, len, context: next()?, mask });
        }
        let angles = positions.f_to_kind(Kind::Float)?.f_outer(&self.frequencies)?;
        let both = Tensor::f_cat(&[&angles, &angles], 1)?.f_unsqueeze(1)?;
        let cos = (both.f_cos()? * self.rope_scale).f_to_kind(self.kind)?;
        let sin = (both.f_sin()? * self.rope_scale).f_to_kind(self.kind)?;
        Ok((ids, Plan { slots, cos, sin, single, chunks }))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(x.f_rms_norm([self.config.hidden as i64], Some(weight), f64::from(self.config.eps))?)
    }

    fn rotate(x: &Tensor, plan: &Plan) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&plan.cos)?.f_add(&turned.f_mul(&plan.sin)?)?)
    }

    /// Attention of all parts: `[tokens, heads, dim]` in, `[tokens, heads · dim]` out.
    fn attend(&self, layer: &Layer, q: &Tensor, plan: &Plan) -> Result<Tensor> {
        let c = &self.config;
        let (heads, kv_heads, dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let gqa = heads != kv_heads;
        let mut out = q.f_empty_like()?;
        let gather = |cache: &Tensor, context: &Tensor, n: i64| {
            cache.f_index_select(0, context)?.f_view([n, -1, kv_heads, dim])?.f_transpose(1, 2)
        };
        if let Some(s) = &plan.single {
            let n = s.rows.size()[0];
            let (k, v) = (gather(&layer.keys, &s.context, n)?, gather(&layer.values, &s.context, n)?);
            let queries = q.f_index_select(0, &s.rows)?.f_unsqueeze(2)?;
            let mask = s.mask.f_expand([n, 1, 1, s.longest], false)?;
            let a =
                Tensor::f_scaled_dot_product_attention(&queries, &k, &v, Some(&mask), 0.0, false, None, gqa)?;
            let _ = out.f_index_copy_(0, &s.rows, &a.f_squeeze_dim(2)?)?;
        }
        for chunk in &plan.chunks {
            let (k, v) = (gather(&layer.keys, &chunk.context, 1)?, gather(&layer.values, &chunk.context, 1)?);
            let queries = q.f_narrow(0, chunk.first, chunk.len)?.f_unsqueeze(0)?.f_transpose(1, 2)?;
            let causal = chunk.mask.is_none();
            let a = Tensor::f_scaled_dot_product_attention(
                &queries,
                &k,
                &v,
                chunk.mask.as_ref(),
                0.0,
                causal,
                None,
                gqa,
            )?;
            out.f_narrow(0, chunk.first, chunk.len)?.f_copy_(&a.f_transpose(1, 2)?.f_squeeze_dim(0)?)?;
        }
        Ok(out.f_view([-1, heads * dim])?)
    }

    fn forward(&mut self, parts: &[SeqPart<'_>]) -> Result<Tensor> {
        let c = self.config.clone();
        let (q_dim, kv_dim, dim) = (c.q_dim() as i64, c.kv_dim() as i64, c.head_dim as i64);
        let (ids, plan) = self.plan(parts)?;
        let mut x = self.embedding.f_index_select(0, &ids)?;
        for l in 0..c.layers {
            let h = self.rms_norm(&x, &self.layers[l].attn_norm)?;
            let qkv = h.f_matmul(&self.layers[l].qkv)?;
            let q = Self::rotate(&qkv.f_narrow(1, 0, q_dim)?.f_reshape([-1, q_dim / dim, dim])?, &plan)?;
            let k =
                Self::rotate(&qkv.f_narrow(1, q_dim, kv_dim)?.f_reshape([-1, kv_dim / dim, dim])?, &plan)?;
            let v = qkv.f_narrow(1, q_dim + kv_dim, kv_dim)?;
            let layer = &mut self.layers[l];
            let _ = layer.keys.f_index_copy_(0, &plan.slots, &k.f_reshape([-1, kv_dim])?)?;
            let _ = layer.values.f_index_copy_(0, &plan.slots, &v.f_contiguous()?)?;
            let layer = &self.layers[l];
            let a = self.attend(layer, &q, &plan)?;
            x = x.f_add(&a.f_matmul(&layer.out)?)?;
            let h = self.rms_norm(&x, &layer.ffn_norm)?;
            let gu = h.f_matmul(&layer.gate_up)?.f_chunk(2, -1)?;
            x = x.f_add(&gu[0].f_silu()?.f_mul(&gu[1])?.f_matmul(&layer.down)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// Samples rows of logits on the device; only the ids come back.
    fn sample(&self, logits: &Tensor, wants: &[DeviceSample]) -> Result<Vec<u32>> {
        let ids = if wants.iter().all(|w| w.temperature == 0.0) {
            logits.f_argmax(-1, false)?
        } else {
            let column = |f: &dyn Fn(&DeviceSample) -> f32| {
                let values: Vec<f32> = wants.iter().map(f).collect();
                Tensor::f_from_slice(&values)?.f_to_device(self.device)?.f_view([-1, 1])
            };
            let greedy = |w: &DeviceSample| w.temperature == 0.0;
            let (sorted, order) =
                logits.f_div(&column(&|w| if greedy(w) { 1.0 } else { w.temperature })?)?.f_sort(-1, true)?;
            let p = sorted.f_softmax(-1, Kind::Float)?;
            let rank = Tensor::f_arange(p.size()[1], (Kind::Float, self.device))?.f_view([1, -1])?;
            let k = column(&|w| match (greedy(w), w.top_k) {
                (true, _) => 1.0,
                (false, 0) => f32::MAX,
                (false, k) => k as f32,
            })?;
            let before = p.f_cumsum(-1, Kind::Float)?.f_sub(&p)?;
            let keep = rank
                .f_less_tensor(&k)?
                .f_logical_and(&before.f_less_tensor(&column(&|w| w.top_p)?)?)?
                .f_logical_and(
                    &p.f_greater_equal_tensor(&p.f_narrow(1, 0, 1)?.f_mul(&column(&|w| w.min_p)?)?)?,
                )?
                .f_logical_or(&rank.f_less(1.0)?)?;
            let cumulative = p.f_mul(&keep.f_to_kind(Kind::Float)?)?.f_cumsum(-1, Kind::Float)?;
            let goal = cumulative.f_narrow(1, -1, 1)?.f_mul(&column(&|w| w.uniform)?)?;
            let chosen = cumulative.f_less_equal_tensor(&goal)?.f_sum_dim_intlist(
                [-1i64].as_slice(),
                true,
                Kind::Int64,
            )?;
            order.f_gather(1, &chosen.f_clamp_max(p.size()[1] - 1)?, false)?.f_view([-1])?
        };
        let ids: Vec<i64> = Vec::try_from(&ids.f_to_device(Device::Cpu)?)?;
        Ok(ids.into_iter().map(|id| id as u32).collect())
    }

    fn finish(&self, hidden: &Tensor, parts: &[SeqPart<'_>], out: &mut StepOutput) -> Result<()> {
        let (mut rows, mut sample_rows, mut wants) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0i64;
        for p in parts {
            let len = p.tokens.len() as i64;
            match p.want {
                Want::Nothing => {}
                Want::Last => rows.push(at + len - 1),
                Want::All => rows.extend(at..at + len),
                Want::Sample(want) => {
                    sample_rows.push(at + len - 1);
                    wants.push(want);
                }
                Want::Hidden => {
                    let sum = hidden.f_narrow(0, at, len)?.f_sum_dim_intlist(
                        [0i64].as_slice(),
                        false,
                        Kind::Float,
                    )?;
                    out.hidden.push(Vec::try_from(&sum.f_to_device(Device::Cpu)?)?);
                }
            }
            at += len;
        }
        let uploaded = self.upload(&[&rows, &sample_rows])?;
        let logits =
            |rows: &Tensor| hidden.f_index_select(0, rows)?.f_matmul(&self.head)?.f_to_kind(Kind::Float);
        if !wants.is_empty() {
            out.sampled = self.sample(&logits(&uploaded[1])?, &wants)?;
        }
        if !rows.is_empty() {
            let values = logits(&uploaded[0])?.f_to_device(Device::Cpu)?.f_contiguous()?;
            out.logits.resize(rows.len() * self.config.vocab, 0.0);
            let n = out.logits.len();
            values.f_copy_data(&mut out.logits, n)?;
        }
        Ok(())
    }
}

impl Backend for TorchBackend {
    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn samples(&self) -> bool {
        self.device.is_cuda()
    }

    fn step(&mut self, parts: &[SeqPart<'_>], out: &mut StepOutput) -> Result<()> {
        out.vocab = self.config.vocab;
        out.logits.clear();
        out.hidden.clear();
        out.sampled.clear();
        let _no_grad = tch::no_grad_guard();
        let hidden = self.forward(parts)?;
        self.finish(&hidden, parts, out)
    }

    fn describe(&self) -> String {
        format!("libtorch on {:?}, {:?} weights", self.device, self.kind)
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }
}
