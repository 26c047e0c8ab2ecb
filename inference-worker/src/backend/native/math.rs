//! The operations of a Llama step other than matrix products: RMSNorm, rotary embedding, SwiGLU and softmax.
//!
//! Loops over arrays that are compiled once per instruction set ([`Isa`]), so that the compiler vectorises them.
//! Called by the native backend. All slices are row-major f32.

use super::kernels::Isa;

/// Defines a function that is compiled for each instruction set and selects one at run time.
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
                    // SAFETY: `Isa::best` detected these features (avx512dq comes with bw and vl).
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

/// Returns a·b + c, as a fused operation if FUSED.
#[inline(always)]
fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Returns e^x to about 2 ulp, without branches, so that loops can be vectorised (Cephes' expf).
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

/// Adds sixteen lanes, in an order that does not depend on the instruction set.
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
    /// Writes the RMSNorm of each row of `x` (`[rows][width]`) to `out` (`[rows][ldo]`).
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
    /// Writes SwiGLU, `out = silu(gate) · up`. A row of `gu` has `width` gate values, then `width` up values.
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

/// Applies the rotary embedding to the heads of `x` (`[heads][dim]`, in Hugging Face's order of halves).
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

/// Replaces scores by their exponentials, and those from `visible` on by 0. Returns the reciprocal of the sum.
#[inline(always)]
pub fn softmax<const FUSED: bool>(scores: &mut [f32], visible: usize) -> f32 {
    let (scores, masked) = scores.split_at_mut(visible);
    masked.fill(0.0);
    let mut top = [f32::NEG_INFINITY; 16];
    for chunk in scores.chunks(16) {
        for (t, s) in top.iter_mut().zip(chunk) {
            *t = if *s > *t { *s } else { *t };
        }
    }
    let max = top.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut acc = [0.0f32; 16];
    let (whole, rest) = scores.as_chunks_mut::<16>();
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

    #[test]
    fn exp_is_accurate_to_3e_7() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            for got in [exp::<false>(x), exp::<true>(x)] {
                let want = f64::from(x).exp();
                assert!(((f64::from(got) - want) / want).abs() < 3e-7, "exp({x}) = {got}, expected {want}");
            }
        }
        assert_eq!(exp::<false>(0.0), 1.0);
        assert!(exp::<false>(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn rms_norm_and_swiglu_agree_with_their_definitions_in_f64() {
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
