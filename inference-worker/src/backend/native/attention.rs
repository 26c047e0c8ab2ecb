//! Attention over the paged KV cache: scores, softmax, weighted sums of values.
//!
//! Input: rotated and scaled queries, the block table of a sequence, and keys and values of one layer. Output: the
//! weighted sum of values for each query row. The order of additions does not depend on the number of rows computed
//! together. Called by the native backend.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use super::{
    kernels::Isa,
    lanes::{self, Lanes},
    math::softmax,
};

/// Tokens per block of the paged KV cache: as many as an AVX-512 register has values.
pub const BLOCK_SIZE: usize = 16;

/// Layout of the keys and values of one layer.
///
/// Keys: `[block][kv_head][dim][16]`, with one dimension of sixteen tokens side by side, so that one register has
/// sixteen scores. Values: `[block][kv_head][16][dim]`.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    /// Number of key/value heads.
    pub heads: usize,
    /// Values per head.
    pub dim: usize,
}

impl KvLayout {
    /// Returns the number of values of one head in one block.
    pub fn head_block(&self) -> usize {
        self.dim * BLOCK_SIZE
    }

    /// Returns the index of the first value of `head` in `block`.
    pub fn at(&self, block: u32, head: usize) -> usize {
        (block as usize * self.heads + head) * self.head_block()
    }
}

/// Maximum number of query rows per call, limited by the number of AVX-512 registers for sums.
pub const MAX_ROWS: usize = 12;

/// Inputs of [`attention`].
pub struct AttentionInputs<'a> {
    /// Queries, `[rows][dim]`, rotated and scaled.
    pub q: &'a [f32],
    /// Number of leading tokens that each row attends to.
    pub visible: &'a [usize],
    /// Layout of keys and values.
    pub kv: KvLayout,
    /// The key/value head.
    pub head: usize,
    /// KV blocks of the sequence.
    pub block_table: &'a [u32],
    /// The layer's keys.
    pub keys: &'a [f32],
    /// The layer's values.
    pub values: &'a [f32],
}

/// Computes attention of 1 to `MAX_ROWS` query rows of one key/value head. Writes `out[rows][dim]`. `scores` is a
/// scratch buffer that grows as needed.
pub fn attention(isa: Isa, a: &AttentionInputs<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
    let (rows, dim) = (a.visible.len(), a.kv.dim);
    assert!((1..=MAX_ROWS).contains(&rows) && a.q.len() >= rows * dim && out.len() >= rows * dim);
    let longest = a.visible.iter().copied().max().unwrap_or(0);
    let used = longest.div_ceil(BLOCK_SIZE);
    scores.resize(scores.len().max(rows * used * BLOCK_SIZE), 0.0);
    match isa {
        // SAFETY: `Isa::best` detected the features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(a, scores, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(a, scores, out) },
        // SAFETY: the portable lanes need no features.
        _ => unsafe { attend_all::<lanes::PortableLanes, false, 1, 1, 1>(a, scores, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn avx512(a: &AttentionInputs<'_>, scores: &mut [f32], out: &mut [f32]) {
    // SAFETY: compiled for the features.
    unsafe { attend_all::<lanes::Avx512Lanes, true, 2, 4, 2>(a, scores, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(a: &AttentionInputs<'_>, scores: &mut [f32], out: &mut [f32]) {
    // SAFETY: compiled for the features.
    unsafe { attend_all::<lanes::Avx2Lanes, true, 1, 1, 1>(a, scores, out) }
}

/// Computes all rows, a few at a time. C is the parameter of [`attend_rows`] for up to four rows, W for more.
///
/// # Safety
/// The processor has the features of `L`; the lengths are as [`attention`] checks them.
#[inline(always)]
unsafe fn attend_all<L: Lanes, const FUSED: bool, const K: usize, const C: usize, const W: usize>(
    a: &AttentionInputs<'_>,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = a.kv.dim;
    let mut from = 0;
    while from < a.visible.len() {
        let n = match a.visible.len() - from {
            12.. if W > 1 => 12,
            6.. => 6,
            left => left.min(4),
        };
        let inputs = AttentionInputs { q: &a.q[from * dim..], visible: &a.visible[from..from + n], ..*a };
        let longest = inputs.visible.iter().copied().max().unwrap_or(0);
        let out = &mut out[from * dim..];
        // SAFETY: as promised by the caller.
        unsafe {
            match n {
                1 => attend_rows::<L, FUSED, 1, K, C>(&inputs, longest, scores, out),
                2 => attend_rows::<L, FUSED, 2, K, C>(&inputs, longest, scores, out),
                3 => attend_rows::<L, FUSED, 3, K, C>(&inputs, longest, scores, out),
                4 => attend_rows::<L, FUSED, 4, K, C>(&inputs, longest, scores, out),
                6 => attend_rows::<L, FUSED, 6, K, W>(&inputs, longest, scores, out),
                _ => attend_rows::<L, FUSED, 12, K, W>(&inputs, longest, scores, out),
            }
        }
        from += n;
    }
}

/// Computes R rows, with K blocks of keys and C·16 dimensions of values at a time, so that all sums fit into
/// registers.
///
/// # Safety
/// As for [`attend_all`].
#[inline(always)]
unsafe fn attend_rows<L: Lanes, const FUSED: bool, const R: usize, const K: usize, const C: usize>(
    a: &AttentionInputs<'_>,
    longest: usize,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let blocks = &a.block_table[..longest.div_ceil(BLOCK_SIZE)];
    let stride = blocks.len() * BLOCK_SIZE;
    let scores = &mut scores[..R * stride];
    let mut b = 0;
    while b < blocks.len() {
        // SAFETY: as promised by the caller; `scores` holds R rows of `stride`.
        unsafe {
            if b + K <= blocks.len() {
                score::<L, R, K>(a, &blocks[b..b + K], &mut scores[b * BLOCK_SIZE..], stride);
                b += K;
            } else {
                score::<L, R, 1>(a, &blocks[b..b + 1], &mut scores[b * BLOCK_SIZE..], stride);
                b += 1;
            }
        }
    }
    let mut inverse = [0.0f32; R];
    for r in 0..R {
        inverse[r] = softmax::<FUSED>(&mut scores[r * stride..][..stride], a.visible[r]);
    }
    let dim = a.kv.dim;
    let mut d = 0;
    while d + 16 <= dim {
        // SAFETY: as promised by the caller; these dimensions exist.
        unsafe {
            if d + 16 * C <= dim {
                weighted_sums::<L, R, C>(a, d, blocks, scores, longest, &inverse, out);
                d += 16 * C;
            } else {
                weighted_sums::<L, R, 1>(a, d, blocks, scores, longest, &inverse, out);
                d += 16;
            }
        }
    }
    for r in 0..R {
        for c in d..dim {
            let value =
                |t: usize| a.values[a.kv.at(blocks[t / BLOCK_SIZE], a.head) + t % BLOCK_SIZE * dim + c];
            let sum: f32 = (0..longest).map(|t| scores[r * stride + t] * value(t)).sum();
            out[r * dim + c] = sum * inverse[r];
        }
    }
}

/// Writes the scores of R rows for the keys of K blocks to `scores[r · stride..]`.
///
/// # Safety
/// As for [`attend_all`].
#[inline(always)]
unsafe fn score<L: Lanes, const R: usize, const K: usize>(
    a: &AttentionInputs<'_>,
    blocks: &[u32],
    scores: &mut [f32],
    stride: usize,
) {
    let dim = a.kv.dim;
    let keys: [&[f32]; K] =
        std::array::from_fn(|k| &a.keys[a.kv.at(blocks[k], a.head)..][..a.kv.head_block()]);
    assert!(scores.len() >= (R - 1) * stride + K * BLOCK_SIZE && a.q.len() >= R * dim, "operands too short");
    // SAFETY: as promised by the caller; each block has `dim` rows of sixteen keys; lengths are asserted above.
    unsafe {
        let mut acc = [[L::splat(0.0); K]; R];
        for d in 0..dim {
            let mut lines = [L::splat(0.0); K];
            for k in 0..K {
                lines[k] = L::load(keys[k].as_ptr().add(d * BLOCK_SIZE));
            }
            for r in 0..R {
                let q = L::splat(*a.q.as_ptr().add(r * dim + d));
                for k in 0..K {
                    acc[r][k] = q.mul_add(lines[k], acc[r][k]);
                }
            }
        }
        for r in 0..R {
            for k in 0..K {
                acc[r][k].store(scores.as_mut_ptr().add(r * stride + k * BLOCK_SIZE));
            }
        }
    }
}

/// Writes dimensions `d..d + 16·C` of the weighted sums of values.
///
/// # Safety
/// As for [`attend_all`]; the dimensions exist.
#[inline(always)]
unsafe fn weighted_sums<L: Lanes, const R: usize, const C: usize>(
    a: &AttentionInputs<'_>,
    d: usize,
    blocks: &[u32],
    scores: &[f32],
    longest: usize,
    inverse: &[f32; R],
    out: &mut [f32],
) {
    let (dim, stride) = (a.kv.dim, blocks.len() * BLOCK_SIZE);
    assert!(scores.len() >= R * stride && out.len() >= R * dim && d + 16 * C <= dim, "operands too short");
    // SAFETY: as promised by the caller; a block has sixteen rows of `dim` values; lengths are asserted above.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        for (b, block) in blocks.iter().enumerate() {
            let v = a.values[a.kv.at(*block, a.head)..][..a.kv.head_block()].as_ptr();
            // The weights of tokens that a row does not attend to are zero.
            for t in 0..BLOCK_SIZE.min(longest - b * BLOCK_SIZE) {
                let mut line = [L::splat(0.0); C];
                for c in 0..C {
                    line[c] = L::load(v.add(t * dim + d + c * 16));
                }
                for r in 0..R {
                    let p = L::splat(*scores.as_ptr().add(r * stride + b * BLOCK_SIZE + t));
                    for c in 0..C {
                        acc[r][c] = p.mul_add(line[c], acc[r][c]);
                    }
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let sum = acc[r][c].mul(L::splat(inverse[r]));
                sum.store(out.as_mut_ptr().add(r * dim + d + c * 16));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn every_kernel_agrees_with_softmax_attention_in_f64() {
        let mut rng = StdRng::seed_from_u64(3);
        for (dim, context) in [(64usize, 1usize), (64, 16), (64, 37), (128, 50), (24, 33), (80, 20), (8, 5)] {
            let kv = KvLayout { heads: 2, dim };
            let blocks: Vec<u32> =
                (0..context.div_ceil(BLOCK_SIZE) as u32).map(|b| (b * 5 + 3) % 7).collect();
            let mut keys = vec![f32::NAN; 7 * 2 * kv.head_block()];
            let mut values = vec![0.0; keys.len()];
            keys.fill_with(|| rng.random_range(-1.0..1.0));
            values.fill_with(|| rng.random_range(-1.0..1.0));
            let key =
                |t: usize, d: usize| keys[kv.at(blocks[t / BLOCK_SIZE], 1) + d * BLOCK_SIZE + t % BLOCK_SIZE];
            let value =
                |t: usize, d: usize| values[kv.at(blocks[t / BLOCK_SIZE], 1) + t % BLOCK_SIZE * dim + d];
            for rows in 1..=MAX_ROWS {
                let q: Vec<f32> = (0..rows * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
                let visible: Vec<usize> = (0..rows).map(|r| context.saturating_sub(r).max(1)).collect();
                for isa in Isa::available() {
                    let mut out = vec![0.0; rows * dim];
                    let a = AttentionInputs {
                        q: &q,
                        visible: &visible,
                        kv,
                        head: 1,
                        block_table: &blocks,
                        keys: &keys,
                        values: &values,
                    };
                    attention(isa, &a, &mut Vec::new(), &mut out);
                    for r in 0..rows {
                        let scores: Vec<f64> = (0..visible[r])
                            .map(|t| {
                                (0..dim).map(|d| f64::from(q[r * dim + d] * key(t, d))).sum::<f64>().exp()
                            })
                            .collect();
                        let total: f64 = scores.iter().sum();
                        for d in 0..dim {
                            let want: f64 =
                                (0..visible[r]).map(|t| scores[t] / total * f64::from(value(t, d))).sum();
                            let got = f64::from(out[r * dim + d]);
                            assert!(
                                (got - want).abs() < 1e-5,
                                "{isa:?} dim {dim} row {r}: got {got}, expected {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
