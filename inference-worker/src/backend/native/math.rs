//! Everything of a Llama step that is not a matrix product: norms, rotation, activation, attention.
//!
//! Plain loops over arrays, compiled once per instruction set ([`Isa`]) so that the compiler vectorises them
//! for it. Called by the native backend; all slices are row-major f32.

use super::kernels::Isa;

/// Tokens of a block of the paged KV cache: one AVX-512 register of keys.
pub const BLOCK: usize = 16;

/// Defines a function that is compiled for each instruction set and picks at run time.
macro_rules! per_isa {
    ($(#[$doc:meta])* pub fn $name:ident / $body:ident ($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) { $body::<true>($($arg),*) }
                match isa {
                    // SAFETY: `Isa::best` saw these features (avx512dq comes with bw and vl).
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body::<false>($($arg),*)
        }
    };
}

/// a·b + c, fused where the instruction set has it.
#[inline(always)]
fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about 2 ulp, without branches, so that loops over it vectorise (Cephes' expf).
#[inline(always)]
fn exp<const FUSED: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to a whole number
    let x = x.clamp(-87.3, 88.3);
    let n = fma::<FUSED>(x, std::f32::consts::LOG2_E, MAGIC);
    let whole = n - MAGIC;
    let r = fma::<FUSED>(whole, -0.693_359_4, x);
    let r = fma::<FUSED>(whole, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = fma::<FUSED>(p, r, c);
    }
    let y = fma::<FUSED>(p, r * r, r) + 1.0;
    y * f32::from_bits(
        ((n.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32).wrapping_add(127) << 23) as u32,
    )
}

/// Sum of f(i) over lanes of 16, so that the order does not depend on the instruction set's width.
#[inline(always)]
fn lanes_sum(acc: [f32; 16]) -> f32 {
    let mut acc = acc;
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
    }
    acc[0]
}

per_isa! {
    /// RMSNorm of each row of `x` (`[rows][width]`) into `out` (`[rows][ldo]`).
    pub fn rms_norm / rms_norm_body(x: &[f32], width: usize, weight: &[f32], eps: f32, out: &mut [f32], ldo: usize)
}

#[inline(always)]
fn rms_norm_body<const FUSED: bool>(
    x: &[f32],
    width: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
    ldo: usize,
) {
    for (x, out) in x.chunks_exact(width).zip(out.chunks_mut(ldo)) {
        let mut acc = [0.0f32; 16];
        let (whole, rest) = x.as_chunks::<16>();
        for c in whole {
            for i in 0..16 {
                acc[i] = fma::<FUSED>(c[i], c[i], acc[i]);
            }
        }
        for (i, v) in rest.iter().enumerate() {
            acc[i] += v * v;
        }
        let scale = 1.0 / (lanes_sum(acc) / width as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

per_isa! {
    /// SwiGLU: `out = silu(gate) · up`, where a row of `gu` holds `width` gates, then `width` ups.
    pub fn swiglu / swiglu_body(gu: &[f32], width: usize, out: &mut [f32], ldo: usize)
}

#[inline(always)]
fn swiglu_body<const FUSED: bool>(gu: &[f32], width: usize, out: &mut [f32], ldo: usize) {
    for (gu, out) in gu.chunks_exact(2 * width).zip(out.chunks_mut(ldo)) {
        let (gate, up) = gu.split_at(width);
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp::<FUSED>(-g)) * u;
        }
    }
}

/// Rotates the heads of `x` (`[heads][dim]`, Hugging Face's half-and-half order) by one position's angles.
pub fn rotate(x: &mut [f32], dim: usize, cos: &[f32], sin: &[f32]) {
    let half = dim / 2;
    for head in x.chunks_exact_mut(dim) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (p, q) = (a[i], b[i]);
            a[i] = p * cos[i] - q * sin[i];
            b[i] = q * cos[i] + p * sin[i];
        }
    }
}

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

/// Query rows that share one pass over the keys.
pub const MAX_ROWS: usize = 4;

per_isa! {
    /// Attention of up to `MAX_ROWS` query rows of one key/value head over a sequence's blocks.
    ///
    /// `q` is `[rows][dim]`, already rotated and scaled; row i sees the first `seen[i]` tokens. Writes
    /// `out[rows][dim]`. `scores` is scratch, grown as needed.
    pub fn attend / attend_body(
        q: &[f32], seen: &[usize], kv: KvLayout, head: usize, blocks: &[u32], keys: &[f32], values: &[f32],
        scores: &mut Vec<f32>, out: &mut [f32],
    )
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
fn attend_body<const FUSED: bool>(
    q: &[f32],
    seen: &[usize],
    kv: KvLayout,
    head: usize,
    blocks: &[u32],
    keys: &[f32],
    values: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    match seen.len() {
        1 => rows::<FUSED, 1>(q, seen, kv, head, blocks, keys, values, scores, out),
        2 => rows::<FUSED, 2>(q, seen, kv, head, blocks, keys, values, scores, out),
        3 => rows::<FUSED, 3>(q, seen, kv, head, blocks, keys, values, scores, out),
        _ => rows::<FUSED, 4>(q, seen, kv, head, blocks, keys, values, scores, out),
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
fn rows<const FUSED: bool, const R: usize>(
    q: &[f32],
    seen: &[usize],
    kv: KvLayout,
    head: usize,
    blocks: &[u32],
    keys: &[f32],
    values: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let dim = kv.dim;
    let longest = seen.iter().copied().max().unwrap_or(0);
    let used = longest.div_ceil(BLOCK);
    let stride = used * BLOCK;
    if scores.len() < R * stride {
        scores.resize(R * stride, 0.0);
    }
    // Scores, sixteen keys at a time. Two partial sums per row hide the latency of the addition.
    for (b, block) in blocks[..used].iter().enumerate() {
        let k = &keys[kv.at(*block, head)..][..kv.head_block()];
        let mut acc = [[[0.0f32; BLOCK]; 2]; R];
        let (lines, _) = k.as_chunks::<BLOCK>();
        for (d, pair) in lines.chunks_exact(2).enumerate() {
            for r in 0..R {
                let (q0, q1) = (q[r * dim + 2 * d], q[r * dim + 2 * d + 1]);
                for i in 0..BLOCK {
                    acc[r][0][i] = fma::<FUSED>(q0, pair[0][i], acc[r][0][i]);
                    acc[r][1][i] = fma::<FUSED>(q1, pair[1][i], acc[r][1][i]);
                }
            }
        }
        for r in 0..R {
            for i in 0..BLOCK {
                scores[r * stride + b * BLOCK + i] = acc[r][0][i] + acc[r][1][i];
            }
        }
    }
    let mut inverse = [0.0f32; R];
    for r in 0..R {
        inverse[r] = softmax::<FUSED>(&mut scores[r * stride..][..stride], seen[r]);
    }
    // Weighted sum of the values, sixteen dimensions at a time... the weights of unseen tokens are zero.
    let (mut d, step) = (0, 64);
    while d < dim {
        let width = step.min(dim - d);
        if width == step {
            weighted::<FUSED, R, 4>(
                d,
                kv,
                head,
                &blocks[..used],
                values,
                scores,
                stride,
                longest,
                &inverse,
                out,
            );
            d += step;
        } else if width >= 16 {
            weighted::<FUSED, R, 1>(
                d,
                kv,
                head,
                &blocks[..used],
                values,
                scores,
                stride,
                longest,
                &inverse,
                out,
            );
            d += 16;
        } else {
            for r in 0..R {
                for c in d..dim {
                    let mut sum = 0.0;
                    for t in 0..longest {
                        let v = &values[kv.at(blocks[t / BLOCK], head)..];
                        sum = fma::<FUSED>(scores[r * stride + t], v[t % BLOCK * dim + c], sum);
                    }
                    out[r * dim + c] = sum * inverse[r];
                }
            }
            d = dim;
        }
    }
}

/// Dimensions `d..d + 16·C` of the weighted sum of values, for R rows.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
fn weighted<const FUSED: bool, const R: usize, const C: usize>(
    d: usize,
    kv: KvLayout,
    head: usize,
    blocks: &[u32],
    values: &[f32],
    scores: &[f32],
    stride: usize,
    longest: usize,
    inverse: &[f32; R],
    out: &mut [f32],
) {
    let mut acc = [[[0.0f32; 16]; C]; R];
    for (b, block) in blocks.iter().enumerate() {
        let v = &values[kv.at(*block, head)..][..kv.head_block()];
        let tokens = BLOCK.min(longest - b * BLOCK);
        for t in 0..tokens {
            let line = &v[t * kv.dim + d..][..16 * C];
            for r in 0..R {
                let p = scores[r * stride + b * BLOCK + t];
                for c in 0..C {
                    for i in 0..16 {
                        acc[r][c][i] = fma::<FUSED>(p, line[c * 16 + i], acc[r][c][i]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            for i in 0..16 {
                out[r * kv.dim + d + c * 16 + i] = acc[r][c][i] * inverse[r];
            }
        }
    }
}

/// Turns scores into weights (not yet normalised); returns one over their sum. Those past `seen` become 0.
#[inline(always)]
fn softmax<const FUSED: bool>(scores: &mut [f32], seen: usize) -> f32 {
    let (live, dead) = scores.split_at_mut(seen);
    dead.fill(0.0);
    let mut top = [f32::NEG_INFINITY; 16];
    for chunk in live.chunks(16) {
        for (t, s) in top.iter_mut().zip(chunk) {
            *t = if *s > *t { *s } else { *t };
        }
    }
    let max = top.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut acc = [0.0f32; 16];
    let (whole, rest) = live.as_chunks_mut::<16>();
    for c in whole {
        for i in 0..16 {
            c[i] = exp::<FUSED>(c[i] - max);
            acc[i] += c[i];
        }
    }
    for (i, s) in rest.iter_mut().enumerate() {
        *s = exp::<FUSED>(*s - max);
        acc[i] += *s;
    }
    1.0 / lanes_sum(acc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            for got in [exp::<false>(x), exp::<true>(x)] {
                let want = f64::from(x).exp();
                assert!(((f64::from(got) - want) / want).abs() < 3e-7, "exp({x}) = {got}, not {want}");
            }
        }
        assert_eq!(exp::<false>(0.0), 1.0);
        assert!(exp::<false>(f32::NEG_INFINITY) < 1e-37);
    }

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
                    attend(isa, &q, &seen, kv, 1, &blocks, &keys, &values, &mut Vec::new(), &mut out);
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

    #[test]
    fn norm_and_activation_agree_with_their_definitions() {
        let x: Vec<f32> = (0..2 * 37).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let w: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 0.01).collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; 2 * 64];
            rms_norm(isa, &x, 37, &w, 1e-5, &mut out, 64);
            let mut act = vec![0.0; 37];
            swiglu(isa, &x, 37, &mut act, 37);
            for r in 0..2 {
                let mean: f64 = x[r * 37..][..37].iter().map(|v| f64::from(v * v)).sum::<f64>() / 37.0;
                for c in 0..37 {
                    let want = f64::from(x[r * 37 + c]) / (mean + 1e-5).sqrt() * f64::from(w[c]);
                    assert!((f64::from(out[r * 64 + c]) - want).abs() < 1e-5);
                }
            }
            for c in 0..37 {
                let g = f64::from(x[c]);
                let want = g / (1.0 + (-g).exp()) * f64::from(x[37 + c]);
                assert!((f64::from(act[c]) - want).abs() < 1e-5);
            }
        }
    }
}
