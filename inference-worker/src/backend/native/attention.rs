//! Attention over the paged KV cache: scores, softmax, weighted values.
//!
//! In: rotated and scaled queries, the blocks of a sequence, one layer's keys and values. Out: what each
//! query row attends to. Sums are in the same order however many rows are computed together. Called by the
//! native backend.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use super::{
    kernels::Isa,
    lanes::{self, Lanes},
    math::softmax,
};

/// Tokens of a block of the paged KV cache: one AVX-512 register of keys.
pub const BLOCK: usize = 16;

/// Where the keys and values of one layer lie.
///
/// Keys: `[block][kv_head][dim][16]` (sixteen tokens' values of a dimension side by side, so that sixteen
/// scores are one register); values: `[block][kv_head][16][dim]`.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    /// Key/value heads.
    pub heads: usize,
    /// Values per head.
    pub dim: usize,
}

impl KvLayout {
    /// Values of one head in one block.
    pub fn head_block(&self) -> usize {
        self.dim * BLOCK
    }

    /// First value of `head` in `block`.
    pub fn at(&self, block: u32, head: usize) -> usize {
        (block as usize * self.heads + head) * self.head_block()
    }
}

/// Query rows that share one pass over the keys at most: as many sums as AVX-512 has registers.
pub const MAX_ROWS: usize = 12;

/// The operands of [`attend`].
pub struct Attend<'a> {
    /// Queries, `[rows][dim]`, rotated and scaled.
    pub q: &'a [f32],
    /// How many of the sequence's first tokens each row sees.
    pub seen: &'a [usize],
    /// Where keys and values lie.
    pub kv: KvLayout,
    /// The key/value head.
    pub head: usize,
    /// The sequence's blocks.
    pub blocks: &'a [u32],
    /// The layer's keys.
    pub keys: &'a [f32],
    /// The layer's values.
    pub values: &'a [f32],
}

/// Attention of 1 to `MAX_ROWS` query rows of one key/value head over a sequence's blocks. Writes
/// `out[rows][dim]`. `scores` is scratch, grown as needed.
pub fn attend(isa: Isa, a: &Attend<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
    let (rows, dim) = (a.seen.len(), a.kv.dim);
    assert!((1..=MAX_ROWS).contains(&rows) && a.q.len() >= rows * dim && out.len() >= rows * dim);
    let longest = a.seen.iter().copied().max().unwrap_or(0);
    let used = longest.div_ceil(BLOCK);
    scores.resize(scores.len().max(rows * used * BLOCK), 0.0);
    match isa {
        // SAFETY: `Isa::best` saw the features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(a, scores, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(a, scores, out) },
        // SAFETY: it needs no features.
        _ => unsafe { rows_of::<lanes::Plain, false, 1, 1, 1>(a, scores, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn avx512(a: &Attend<'_>, scores: &mut [f32], out: &mut [f32]) {
    // SAFETY: compiled for the features.
    unsafe { rows_of::<lanes::Avx512, true, 2, 4, 2>(a, scores, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(a: &Attend<'_>, scores: &mut [f32], out: &mut [f32]) {
    // SAFETY: compiled for the features.
    unsafe { rows_of::<lanes::Avx2, true, 1, 1, 1>(a, scores, out) }
}

/// All rows, a few at a time. C is what [`attend_rows`] takes for up to four rows, W for more.
///
/// # Safety
/// The processor has the features of `L`; the lengths are those that [`attend`] checks.
#[inline(always)]
unsafe fn rows_of<L: Lanes, const FUSED: bool, const K: usize, const C: usize, const W: usize>(
    a: &Attend<'_>,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = a.kv.dim;
    let mut from = 0;
    while from < a.seen.len() {
        let n = match a.seen.len() - from {
            12.. if W > 1 => 12,
            6.. => 6,
            left => left.min(4),
        };
        let some = Attend { q: &a.q[from * dim..], seen: &a.seen[from..from + n], ..*a };
        let longest = some.seen.iter().copied().max().unwrap_or(0);
        let out = &mut out[from * dim..];
        // SAFETY: the caller's promises.
        unsafe {
            match n {
                1 => attend_rows::<L, FUSED, 1, K, C>(&some, longest, scores, out),
                2 => attend_rows::<L, FUSED, 2, K, C>(&some, longest, scores, out),
                3 => attend_rows::<L, FUSED, 3, K, C>(&some, longest, scores, out),
                4 => attend_rows::<L, FUSED, 4, K, C>(&some, longest, scores, out),
                6 => attend_rows::<L, FUSED, 6, K, W>(&some, longest, scores, out),
                _ => attend_rows::<L, FUSED, 12, K, W>(&some, longest, scores, out),
            }
        }
        from += n;
    }
}

/// R rows, K blocks of keys and C·16 dimensions of values at a time: as many sums as there are registers.
///
/// # Safety
/// As [`rows_of`].
#[inline(always)]
unsafe fn attend_rows<L: Lanes, const FUSED: bool, const R: usize, const K: usize, const C: usize>(
    a: &Attend<'_>,
    longest: usize,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let blocks = &a.blocks[..longest.div_ceil(BLOCK)];
    let stride = blocks.len() * BLOCK;
    let scores = &mut scores[..R * stride];
    let mut b = 0;
    while b < blocks.len() {
        // SAFETY: the caller's promises; `scores` holds R rows of `stride`.
        unsafe {
            if b + K <= blocks.len() {
                score::<L, R, K>(a, &blocks[b..b + K], &mut scores[b * BLOCK..], stride);
                b += K;
            } else {
                score::<L, R, 1>(a, &blocks[b..b + 1], &mut scores[b * BLOCK..], stride);
                b += 1;
            }
        }
    }
    let mut inverse = [0.0f32; R];
    for r in 0..R {
        inverse[r] = softmax::<FUSED>(&mut scores[r * stride..][..stride], a.seen[r]);
    }
    let dim = a.kv.dim;
    let mut d = 0;
    while d + 16 <= dim {
        // SAFETY: the caller's promises; these dimensions exist.
        unsafe {
            if d + 16 * C <= dim {
                weigh::<L, R, C>(a, d, blocks, scores, longest, &inverse, out);
                d += 16 * C;
            } else {
                weigh::<L, R, 1>(a, d, blocks, scores, longest, &inverse, out);
                d += 16;
            }
        }
    }
    for r in 0..R {
        for c in d..dim {
            let value = |t: usize| a.values[a.kv.at(blocks[t / BLOCK], a.head) + t % BLOCK * dim + c];
            let sum: f32 = (0..longest).map(|t| scores[r * stride + t] * value(t)).sum();
            out[r * dim + c] = sum * inverse[r];
        }
    }
}

/// Scores of R rows against the keys of K blocks, into `scores[r · stride..]`.
///
/// # Safety
/// As [`rows_of`].
#[inline(always)]
unsafe fn score<L: Lanes, const R: usize, const K: usize>(
    a: &Attend<'_>,
    blocks: &[u32],
    scores: &mut [f32],
    stride: usize,
) {
    let dim = a.kv.dim;
    let keys: [&[f32]; K] =
        std::array::from_fn(|k| &a.keys[a.kv.at(blocks[k], a.head)..][..a.kv.head_block()]);
    assert!(scores.len() >= (R - 1) * stride + K * BLOCK && a.q.len() >= R * dim, "operands too short");
    // SAFETY: the caller's promises; each block has `dim` lines of sixteen keys, and the assertion.
    unsafe {
        let mut acc = [[L::splat(0.0); K]; R];
        for d in 0..dim {
            let mut lines = [L::splat(0.0); K];
            for k in 0..K {
                lines[k] = L::load(keys[k].as_ptr().add(d * BLOCK));
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
                acc[r][k].store(scores.as_mut_ptr().add(r * stride + k * BLOCK));
            }
        }
    }
}

/// Dimensions `d..d + 16·C` of the weighted sums of values.
///
/// # Safety
/// As [`rows_of`]; the dimensions exist.
#[inline(always)]
unsafe fn weigh<L: Lanes, const R: usize, const C: usize>(
    a: &Attend<'_>,
    d: usize,
    blocks: &[u32],
    scores: &[f32],
    longest: usize,
    inverse: &[f32; R],
    out: &mut [f32],
) {
    let (dim, stride) = (a.kv.dim, blocks.len() * BLOCK);
    assert!(scores.len() >= R * stride && out.len() >= R * dim && d + 16 * C <= dim, "operands too short");
    // SAFETY: the caller's promises; a block has sixteen lines of `dim` values, and the assertion.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        for (b, block) in blocks.iter().enumerate() {
            let v = a.values[a.kv.at(*block, a.head)..][..a.kv.head_block()].as_ptr();
            // The weights of tokens that a row does not see are zero.
            for t in 0..BLOCK.min(longest - b * BLOCK) {
                let mut line = [L::splat(0.0); C];
                for c in 0..C {
                    line[c] = L::load(v.add(t * dim + d + c * 16));
                }
                for r in 0..R {
                    let p = L::splat(*scores.as_ptr().add(r * stride + b * BLOCK + t));
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
    fn attention_agrees_with_its_definition() {
        let mut rng = StdRng::seed_from_u64(3);
        for (dim, context) in [(64usize, 1usize), (64, 16), (64, 37), (128, 50), (24, 33), (80, 20), (8, 5)] {
            let kv = KvLayout { heads: 2, dim };
            let blocks: Vec<u32> = (0..context.div_ceil(BLOCK) as u32).map(|b| (b * 5 + 3) % 7).collect();
            let mut keys = vec![f32::NAN; 7 * 2 * kv.head_block()];
            let mut values = vec![0.0; keys.len()];
            keys.fill_with(|| rng.random_range(-1.0..1.0));
            values.fill_with(|| rng.random_range(-1.0..1.0));
            let key = |t: usize, d: usize| keys[kv.at(blocks[t / BLOCK], 1) + d * BLOCK + t % BLOCK];
            let value = |t: usize, d: usize| values[kv.at(blocks[t / BLOCK], 1) + t % BLOCK * dim + d];
            for rows in 1..=MAX_ROWS {
                let q: Vec<f32> = (0..rows * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
                let seen: Vec<usize> = (0..rows).map(|r| context.saturating_sub(r).max(1)).collect();
                for isa in Isa::available() {
                    let mut out = vec![0.0; rows * dim];
                    let a = Attend {
                        q: &q,
                        seen: &seen,
                        kv,
                        head: 1,
                        blocks: &blocks,
                        keys: &keys,
                        values: &values,
                    };
                    attend(isa, &a, &mut Vec::new(), &mut out);
                    for r in 0..rows {
                        let scores: Vec<f64> = (0..seen[r])
                            .map(|t| {
                                (0..dim).map(|d| f64::from(q[r * dim + d] * key(t, d))).sum::<f64>().exp()
                            })
                            .collect();
                        let total: f64 = scores.iter().sum();
                        for d in 0..dim {
                            let want: f64 =
                                (0..seen[r]).map(|t| scores[t] / total * f64::from(value(t, d))).sum();
                            let got = f64::from(out[r * dim + d]);
                            assert!(
                                (got - want).abs() < 1e-5,
                                "{isa:?} dim {dim} row {r}: {got} is not {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
