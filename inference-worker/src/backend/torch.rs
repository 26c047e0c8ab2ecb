//! The libtorch backend: for CUDA, and for the CPU in any float type.
//!
//! Input: a [`WeightSource`], a device and a float type. Output: a [`TorchBackend`]. On CUDA, only token ids and
//! indices are copied to the device and only sampled ids are copied back: all indices of a step go in one pinned
//! transfer, sampling runs on the device, and nothing else synchronises. The tests run this code on the CPU and
//! compare it with the native backend and with transformers; it has not been tested on CUDA.

use tch::{Device, Kind, TchError, Tensor};

use super::{BLOCK_SIZE, Backend, BackendError, DeviceSampling, OutputKind, SequenceChunk, StepOutput};
use crate::{
    model::{LlamaConfig, tensors},
    weights::{RopeLayout, WeightError, WeightSource},
};

struct TorchLayer {
    attn_norm: Tensor,
    /// `[hidden, q + 2·kv]`: a transposed view of the row-major weights.
    qkv: Tensor,
    out: Tensor,
    ffn_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    /// `[blocks · BLOCK_SIZE, kv_heads · dim]`.
    keys: Tensor,
    values: Tensor,
}

/// A Llama model on a libtorch device.
pub struct TorchBackend {
    config: LlamaConfig,
    device: Device,
    kind: Kind,
    embedding: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<TorchLayer>,
    frequencies: Tensor,
    rope_scale: f64,
    kv_blocks: usize,
    weight_bytes: usize,
}

/// What attention needs to know about a step, computed once for all layers.
struct AttentionMetadata {
    /// Cache slot of each token.
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    /// The chunks of one token, computed together.
    decodes: Option<DecodeBatch>,
    /// The longer chunks, computed one by one.
    prefills: Vec<Prefill>,
}

struct DecodeBatch {
    rows: Tensor,
    /// `[chunks · longest]` cache slots.
    context_slots: Tensor,
    longest: i64,
    /// `[chunks, 1, 1, longest]`, true where a key is visible.
    mask: Tensor,
}

struct Prefill {
    first: i64,
    len: i64,
    context_slots: Tensor,
    /// None for the first chunk of a sequence, which needs only the causal mask.
    mask: Option<Tensor>,
}

type Result<T> = std::result::Result<T, BackendError>;

/// Dequantises weights to a float type on a device.
struct WeightLoader<'a> {
    source: &'a dyn WeightSource,
    config: &'a LlamaConfig,
    device: Device,
    kind: Kind,
    kv_blocks: usize,
}

fn torch_error(error: TchError) -> WeightError {
    WeightError::Metadata(format!("libtorch: {error}"))
}

type WeightResult<T> = std::result::Result<T, WeightError>;

impl WeightLoader<'_> {
    /// Returns a tensor as f32 on the CPU.
    fn fetch(&self, name: &str, shape: &[usize]) -> WeightResult<Tensor> {
        let raw = tensors::require(self.source, name, shape)?;
        let dims: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
        Tensor::f_from_slice(&raw.to_f32()).and_then(|t| t.f_view(&dims[..])).map_err(torch_error)
    }

    fn to_device(&self, t: Tensor) -> WeightResult<Tensor> {
        t.f_to_device(self.device).and_then(|t| t.f_to_kind(self.kind)).map_err(torch_error)
    }

    /// Reorders the rows of a query or key projection to Hugging Face's order.
    fn to_halves(&self, t: Tensor, heads: usize) -> WeightResult<Tensor> {
        let c = self.config;
        match self.source.rope_layout() {
            RopeLayout::Halves => Ok(t),
            RopeLayout::Interleaved => t
                .f_view([heads as i64, c.head_dim as i64 / 2, 2, c.hidden as i64])
                .and_then(|t| t.f_transpose(1, 2))
                .and_then(|t| t.f_reshape([(heads * c.head_dim) as i64, c.hidden as i64]))
                .map_err(torch_error),
        }
    }

    /// Concatenates the rows of `parts` and transposes the result.
    fn transposed(&self, parts: &[Tensor]) -> WeightResult<Tensor> {
        let whole = self.to_device(Tensor::f_cat(parts, 0).map_err(torch_error)?)?;
        whole.f_transpose(0, 1).map_err(torch_error)
    }

    fn empty_cache(&self) -> WeightResult<Tensor> {
        let shape = [(self.kv_blocks * BLOCK_SIZE) as i64, self.config.kv_dim() as i64];
        Tensor::f_zeros(shape, (self.kind, self.device)).map_err(torch_error)
    }

    fn layer(&self, layer: usize) -> WeightResult<TorchLayer> {
        let c = self.config;
        let get = |name: &str, shape: &[usize]| self.fetch(&tensors::layer_name(layer, name), shape);
        Ok(TorchLayer {
            attn_norm: self.to_device(get("input_layernorm.weight", &[c.hidden])?)?,
            qkv: self.transposed(&[
                self.to_halves(get(tensors::Q_PROJ, &[c.q_dim(), c.hidden])?, c.heads)?,
                self.to_halves(get(tensors::K_PROJ, &[c.kv_dim(), c.hidden])?, c.kv_heads)?,
                get("self_attn.v_proj.weight", &[c.kv_dim(), c.hidden])?,
            ])?,
            out: self.transposed(&[get("self_attn.o_proj.weight", &[c.hidden, c.q_dim()])?])?,
            ffn_norm: self.to_device(get("post_attention_layernorm.weight", &[c.hidden])?)?,
            gate_up: self.transposed(&[
                get("mlp.gate_proj.weight", &[c.ffn, c.hidden])?,
                get("mlp.up_proj.weight", &[c.ffn, c.hidden])?,
            ])?,
            down: self.transposed(&[get("mlp.down_proj.weight", &[c.hidden, c.ffn])?])?,
            keys: self.empty_cache()?,
            values: self.empty_cache()?,
        })
    }
}

impl TorchBackend {
    /// Dequantises a model's weights to `kind` on `device`.
    pub fn load(
        source: &dyn WeightSource,
        config: &LlamaConfig,
        device: Device,
        kind: Kind,
        kv_blocks: usize,
    ) -> WeightResult<Self> {
        let c = config;
        let loader = WeightLoader { source, config, device, kind, kv_blocks };
        let layers = (0..c.layers).map(|l| loader.layer(l)).collect::<WeightResult<Vec<_>>>()?;
        let embedding = loader.to_device(loader.fetch(tensors::EMBEDDING, &[c.vocab, c.hidden])?)?;
        let head = if c.tied {
            embedding.shallow_clone()
        } else {
            loader.to_device(loader.fetch(tensors::HEAD, &[c.vocab, c.hidden])?)?
        };
        let (frequencies, rope_scale) = c.rope_frequencies();
        let parameters = c.vocab * c.hidden * if c.tied { 1 } else { 2 }
            + c.layers * (c.hidden * (2 * c.q_dim() + 2 * c.kv_dim()) + 3 * c.ffn * c.hidden);
        Ok(Self {
            device,
            kind,
            embedding,
            head: head.f_transpose(0, 1).map_err(torch_error)?,
            norm: loader.to_device(loader.fetch(tensors::NORM, &[c.hidden])?)?,
            layers,
            frequencies: Tensor::f_from_slice(&frequencies)
                .and_then(|t| t.f_to_device(device))
                .map_err(torch_error)?,
            rope_scale: rope_scale.into(),
            kv_blocks,
            weight_bytes: parameters * kind.elt_size_in_bytes(),
            config: config.clone(),
        })
    }

    /// Copies all index lists of a step to the device in one transfer.
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

    /// Copies the indices of a step to the device. Returns the token ids and what attention needs.
    fn prepare(&self, chunks: &[SequenceChunk<'_>]) -> Result<(Tensor, AttentionMetadata)> {
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut decode_rows, mut decodes, mut prefills) = (Vec::new(), Vec::new(), Vec::new());
        for c in chunks {
            let first = ids.len() as i64;
            if c.tokens.len() == 1 {
                decode_rows.push(first);
                decodes.push(c);
            } else {
                prefills.push((first, c));
            }
            ids.extend(c.tokens.iter().map(|id| i64::from(*id)));
            positions.extend((c.start..c.start + c.tokens.len()).map(|at| at as i64));
            slots.extend((c.start..c.start + c.tokens.len()).map(|at| cache_slot(c, at)));
        }
        let longest = decodes.iter().map(|c| c.start + 1).max().unwrap_or(0);
        let lens: Vec<i64> = decodes.iter().map(|c| c.start as i64 + 1).collect();
        let context: Vec<i64> = decodes
            .iter()
            .flat_map(|c| (0..longest).map(|at| if at <= c.start { cache_slot(c, at) } else { 0 }))
            .collect();
        let mut lists: Vec<&[i64]> = vec![&ids, &positions, &slots, &decode_rows, &lens, &context];
        let contexts: Vec<Vec<i64>> = prefills
            .iter()
            .map(|(_, c)| (0..c.start + c.tokens.len()).map(|at| cache_slot(c, at)).collect())
            .collect();
        lists.extend(contexts.iter().map(Vec::as_slice));
        let mut on_device = self.upload(&lists)?.into_iter();
        let mut next =
            || on_device.next().ok_or_else(|| BackendError::Other("an index list is missing".into()));
        let (ids, positions, slot_mapping, rows, lens, context_slots) =
            (next()?, next()?, next()?, next()?, next()?, next()?);
        let decodes = if decodes.is_empty() {
            None
        } else {
            let n = decodes.len() as i64;
            let keys = self.arange(longest as i64)?.f_view([1, 1, 1, -1])?;
            let mask = keys.f_less_tensor(&lens.f_view([n, 1, 1, 1])?)?;
            Some(DecodeBatch { rows, context_slots, longest: longest as i64, mask })
        };
        let prefills = prefills
            .into_iter()
            .map(|(first, c)| self.prefill(first, c, next()?))
            .collect::<Result<Vec<_>>>()?;
        let (cos, sin) = self.rotations(&positions)?;
        Ok((ids, AttentionMetadata { slot_mapping, cos, sin, decodes, prefills }))
    }

    fn prefill(&self, first: i64, chunk: &SequenceChunk<'_>, context_slots: Tensor) -> Result<Prefill> {
        let (len, start) = (chunk.tokens.len() as i64, chunk.start as i64);
        let mask = if start == 0 {
            None
        } else {
            let last_visible = (self.arange(len)? + start).f_view([len, 1])?;
            Some(self.arange(start + len)?.f_view([1, -1])?.f_less_equal_tensor(&last_visible)?)
        };
        Ok(Prefill { first, len, context_slots, mask })
    }

    /// Returns cosines and sines of the rotary embedding at `positions`.
    fn rotations(&self, positions: &Tensor) -> Result<(Tensor, Tensor)> {
        let angles = positions.f_to_kind(Kind::Float)?.f_outer(&self.frequencies)?;
        let both = Tensor::f_cat(&[&angles, &angles], 1)?.f_unsqueeze(1)?;
        let cos = (both.f_cos()? * self.rope_scale).f_to_kind(self.kind)?;
        let sin = (both.f_sin()? * self.rope_scale).f_to_kind(self.kind)?;
        Ok((cos, sin))
    }

    fn arange(&self, n: i64) -> Result<Tensor> {
        Ok(Tensor::f_arange(n, (Kind::Int64, self.device))?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(x.f_rms_norm([self.config.hidden as i64], Some(weight), f64::from(self.config.eps))?)
    }

    fn rotate(x: &Tensor, metadata: &AttentionMetadata) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let rotated = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&metadata.cos)?.f_add(&rotated.f_mul(&metadata.sin)?)?)
    }

    /// Computes attention of all chunks: `[tokens, heads, dim]` in, `[tokens, heads · dim]` out.
    fn attention(&self, layer: &TorchLayer, q: &Tensor, metadata: &AttentionMetadata) -> Result<Tensor> {
        let c = &self.config;
        let (heads, kv_heads, dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let gqa = heads != kv_heads;
        let mut out = q.f_empty_like()?;
        let gather = |cache: &Tensor, context: &Tensor, n: i64| {
            cache.f_index_select(0, context)?.f_view([n, -1, kv_heads, dim])?.f_transpose(1, 2)
        };
        if let Some(batch) = &metadata.decodes {
            let n = batch.rows.size()[0];
            let (k, v) = (
                gather(&layer.keys, &batch.context_slots, n)?,
                gather(&layer.values, &batch.context_slots, n)?,
            );
            let queries = q.f_index_select(0, &batch.rows)?.f_unsqueeze(2)?;
            let mask = batch.mask.f_expand([n, 1, 1, batch.longest], false)?;
            let a =
                Tensor::f_scaled_dot_product_attention(&queries, &k, &v, Some(&mask), 0.0, false, None, gqa)?;
            let _ = out.f_index_copy_(0, &batch.rows, &a.f_squeeze_dim(2)?)?;
        }
        for prefill in &metadata.prefills {
            let (k, v) = (
                gather(&layer.keys, &prefill.context_slots, 1)?,
                gather(&layer.values, &prefill.context_slots, 1)?,
            );
            let queries = q.f_narrow(0, prefill.first, prefill.len)?.f_unsqueeze(0)?.f_transpose(1, 2)?;
            let causal = prefill.mask.is_none();
            let a = Tensor::f_scaled_dot_product_attention(
                &queries,
                &k,
                &v,
                prefill.mask.as_ref(),
                0.0,
                causal,
                None,
                gqa,
            )?;
            out.f_narrow(0, prefill.first, prefill.len)?.f_copy_(&a.f_transpose(1, 2)?.f_squeeze_dim(0)?)?;
        }
        Ok(out.f_view([-1, heads * dim])?)
    }

    fn forward(&mut self, chunks: &[SequenceChunk<'_>]) -> Result<Tensor> {
        let c = self.config.clone();
        let (q_dim, kv_dim, dim) = (c.q_dim() as i64, c.kv_dim() as i64, c.head_dim as i64);
        let (ids, metadata) = self.prepare(chunks)?;
        let mut x = self.embedding.f_index_select(0, &ids)?;
        for l in 0..c.layers {
            let h = self.rms_norm(&x, &self.layers[l].attn_norm)?;
            let qkv = h.f_matmul(&self.layers[l].qkv)?;
            let q = Self::rotate(&qkv.f_narrow(1, 0, q_dim)?.f_reshape([-1, q_dim / dim, dim])?, &metadata)?;
            let k = Self::rotate(
                &qkv.f_narrow(1, q_dim, kv_dim)?.f_reshape([-1, kv_dim / dim, dim])?,
                &metadata,
            )?;
            let v = qkv.f_narrow(1, q_dim + kv_dim, kv_dim)?;
            let layer = &mut self.layers[l];
            let _ = layer.keys.f_index_copy_(0, &metadata.slot_mapping, &k.f_reshape([-1, kv_dim])?)?;
            let _ = layer.values.f_index_copy_(0, &metadata.slot_mapping, &v.f_contiguous()?)?;
            let layer = &self.layers[l];
            let a = self.attention(layer, &q, &metadata)?;
            x = x.f_add(&a.f_matmul(&layer.out)?)?;
            let h = self.rms_norm(&x, &layer.ffn_norm)?;
            let gu = h.f_matmul(&layer.gate_up)?.f_chunk(2, -1)?;
            x = x.f_add(&gu[0].f_silu()?.f_mul(&gu[1])?.f_matmul(&layer.down)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// Samples from rows of logits on the device. Only the ids are copied back.
    fn sample(&self, logits: &Tensor, params: &[DeviceSampling]) -> Result<Vec<u32>> {
        let ids = if params.iter().all(|p| p.temperature == 0.0) {
            logits.f_argmax(-1, false)?
        } else {
            let column = |f: &dyn Fn(&DeviceSampling) -> f32| {
                let values: Vec<f32> = params.iter().map(f).collect();
                Tensor::f_from_slice(&values)?.f_to_device(self.device)?.f_view([-1, 1])
            };
            let is_greedy = |p: &DeviceSampling| p.temperature == 0.0;
            let (sorted, order) = logits
                .f_div(&column(&|p| if is_greedy(p) { 1.0 } else { p.temperature })?)?
                .f_sort(-1, true)?;
            let probabilities = sorted.f_softmax(-1, Kind::Float)?;
            let rank =
                Tensor::f_arange(probabilities.size()[1], (Kind::Float, self.device))?.f_view([1, -1])?;
            let k = column(&|p| match (is_greedy(p), p.top_k) {
                (true, _) => 1.0,
                (false, 0) => f32::MAX,
                (false, k) => k as f32,
            })?;
            let before = probabilities.f_cumsum(-1, Kind::Float)?.f_sub(&probabilities)?;
            let keep = rank
                .f_less_tensor(&k)?
                .f_logical_and(&before.f_less_tensor(&column(&|p| p.top_p)?)?)?
                .f_logical_and(&probabilities.f_greater_equal_tensor(
                    &probabilities.f_narrow(1, 0, 1)?.f_mul(&column(&|p| p.min_p)?)?,
                )?)?
                .f_logical_or(&rank.f_less(1.0)?)?;
            let cumulative = probabilities.f_mul(&keep.f_to_kind(Kind::Float)?)?.f_cumsum(-1, Kind::Float)?;
            let goal = cumulative.f_narrow(1, -1, 1)?.f_mul(&column(&|p| p.uniform)?)?;
            let chosen = cumulative.f_less_equal_tensor(&goal)?.f_sum_dim_intlist(
                [-1i64].as_slice(),
                true,
                Kind::Int64,
            )?;
            order.f_gather(1, &chosen.f_clamp_max(probabilities.size()[1] - 1)?, false)?.f_view([-1])?
        };
        let ids: Vec<i64> = Vec::try_from(&ids.f_to_device(Device::Cpu)?)?;
        Ok(ids.into_iter().map(|id| id as u32).collect())
    }

    fn write_outputs(
        &self,
        hidden: &Tensor,
        chunks: &[SequenceChunk<'_>],
        out: &mut StepOutput,
    ) -> Result<()> {
        let (mut rows, mut sample_rows, mut sampling) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0i64;
        for c in chunks {
            let len = c.tokens.len() as i64;
            match c.output {
                OutputKind::None => {}
                OutputKind::LastLogits => rows.push(at + len - 1),
                OutputKind::AllLogits => rows.extend(at..at + len),
                OutputKind::SampledId(params) => {
                    sample_rows.push(at + len - 1);
                    sampling.push(params);
                }
                OutputKind::HiddenSum => {
                    let sum = hidden.f_narrow(0, at, len)?.f_sum_dim_intlist(
                        [0i64].as_slice(),
                        false,
                        Kind::Float,
                    )?;
                    out.hidden_sums.push(Vec::try_from(&sum.f_to_device(Device::Cpu)?)?);
                }
            }
            at += len;
        }
        let uploaded = self.upload(&[&rows, &sample_rows])?;
        let logits =
            |rows: &Tensor| hidden.f_index_select(0, rows)?.f_matmul(&self.head)?.f_to_kind(Kind::Float);
        if !sampling.is_empty() {
            out.sampled_ids = self.sample(&logits(&uploaded[1])?, &sampling)?;
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

    fn samples_on_device(&self) -> bool {
        self.device.is_cuda()
    }

    fn step(&mut self, chunks: &[SequenceChunk<'_>], out: &mut StepOutput) -> Result<()> {
        out.vocab = self.config.vocab;
        out.logits.clear();
        out.hidden_sums.clear();
        out.sampled_ids.clear();
        let _no_grad = tch::no_grad_guard();
        let hidden = self.forward(chunks)?;
        self.write_outputs(&hidden, chunks, out)
    }

    fn describe(&self) -> String {
        format!("libtorch on {:?}, {:?} weights", self.device, self.kind)
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }
}

/// Returns the cache slot of the token at position `at`.
fn cache_slot(chunk: &SequenceChunk<'_>, at: usize) -> i64 {
    i64::from(chunk.block_table[at / BLOCK_SIZE]) * BLOCK_SIZE as i64 + (at % BLOCK_SIZE) as i64
}
