//! Kernels for many tokens: they decode strips to f32, and multiply decoded strips. Called by `kernels::dense`.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use super::{
    super::dense::{DenseChunk, Totals},
    *,
};

/// Calls the instance of a kernel for a format.
macro_rules! dispatch_format {
    ($kernel:ident, $strip:expr, $out:expr) => {
        match $strip.format {
            Format::Q4F16 => $kernel::<Q4F16>($strip, $out),
            Format::Q4F32 => $kernel::<Q4F32>($strip, $out),
            Format::Q8F16 => $kernel::<Q8F16>($strip, $out),
            Format::Q8F32 => $kernel::<Q8F32>($strip, $out),
            Format::BF16 => $kernel::<BF16>($strip, $out),
            Format::F16 => $kernel::<F16>($strip, $out),
            Format::F32 => $kernel::<F32>($strip, $out),
        }
    };
}

/// Decodes a strip into the layout of `Format::F32`.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and F16C; `out` has 128 values per tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn decode_avx512(strip: Strip<'_>, out: &mut [f32]) {
    // SAFETY: as promised by the caller.
    unsafe { dispatch_format!(decode512, strip, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn decode512<const F: u8>(strip: Strip<'_>, out: &mut [f32]) {
    let (vb, sb) = (strip.format.tile_bytes(), strip.format.scale_bytes());
    for (tile, out) in out.chunks_exact_mut(STRIP * TILE).enumerate() {
        // SAFETY: a strip has `tiles` tiles of vb and sb bytes; `out` is one tile.
        unsafe {
            let (v, s) = (strip.values.as_ptr().add(tile * vb), strip.scales.as_ptr().add(tile * sb));
            let scale = scales!(F, s);
            let (nibbles, table) = nibble_tables!(F, v, scale, 0..STRIP);
            for half in 0..2 {
                for r in 0..STRIP {
                    let at = r * TILE + half * 16;
                    let w = weights512!(F, v, scale, table, nibbles, r, half, at);
                    _mm512_storeu_ps(out.as_mut_ptr().add(at), w);
                }
            }
        }
    }
}

/// Decodes a strip into the layout of `Format::F32`.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `out` has 128 values per tile.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn decode_avx2(strip: Strip<'_>, out: &mut [f32]) {
    // SAFETY: as promised by the caller.
    unsafe { dispatch_format!(decode256, strip, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode256<const F: u8>(strip: Strip<'_>, out: &mut [f32]) {
    let (vb, sb) = (strip.format.tile_bytes(), strip.format.scale_bytes());
    for (tile, out) in out.chunks_exact_mut(STRIP * TILE).enumerate() {
        // SAFETY: a strip has `tiles` tiles of vb and sb bytes; `out` is one tile.
        unsafe {
            let (v, s) = (strip.values.as_ptr().add(tile * vb), strip.scales.as_ptr().add(tile * sb));
            let scale = scales!(F, s);
            for quarter in 0..4 {
                let (half, part) = (quarter / 2, quarter % 2);
                for r in 0..STRIP {
                    let at = r * TILE + quarter * 8;
                    let w = weights256!(F, v, scale, r, half, part, at);
                    _mm256_storeu_ps(out.as_mut_ptr().add(at), w);
                }
            }
        }
    }
}

/// Calls the instance of a kernel for a number of tokens.
macro_rules! dispatch_tokens {
    ($kernel:ident, $chunk:expr, $n:expr, $totals:expr, [$($t:literal),*]) => {
        match $n {
            $($t => $kernel::<$t>($chunk, $totals),)*
            _ => unreachable!("the number of tokens is bounded by the caller"),
        }
    };
}

/// Computes a column chunk of a strip for 1 to 6 tokens.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; `x` has the chunk's columns of each token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn dense_avx512(chunk: DenseChunk<'_>, tokens: usize, totals: &mut Totals) {
    // SAFETY: as promised by the caller.
    unsafe { dispatch_tokens!(dense512, chunk, tokens, totals, [1, 2, 3, 4, 5, 6]) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn dense512<const T: usize>(chunk: DenseChunk<'_>, totals: &mut Totals) {
    let DenseChunk { w, x, ldx, partial_sums, is_first, is_last } = chunk;
    assert!(
        partial_sums.len() >= STRIP * T * 16 && x.len() >= (T - 1) * ldx + w.len() / STRIP,
        "operands too short"
    );
    let mut acc = [[_mm512_setzero_ps(); T]; STRIP];
    // SAFETY: in bounds, as asserted; a tile is 4 rows of 32 values.
    unsafe {
        if !is_first {
            for r in 0..STRIP {
                for t in 0..T {
                    acc[r][t] = _mm512_loadu_ps(partial_sums.as_ptr().add((r * T + t) * 16));
                }
            }
        }
        for (tile, w) in w.chunks_exact(STRIP * TILE).enumerate() {
            let x = x.as_ptr().add(tile * TILE);
            for half in 0..2 {
                let w: [__m512; STRIP] =
                    std::array::from_fn(|r| _mm512_loadu_ps(w.as_ptr().add(r * TILE + half * 16)));
                for t in 0..T {
                    let x = _mm512_loadu_ps(x.add(t * ldx + half * 16));
                    for r in 0..STRIP {
                        acc[r][t] = _mm512_fmadd_ps(w[r], x, acc[r][t]);
                    }
                }
            }
        }
        for t in 0..T {
            if is_last {
                let total = sum4_avx512(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
                _mm_storeu_ps(totals[t].as_mut_ptr(), total);
            } else {
                for r in 0..STRIP {
                    _mm512_storeu_ps(partial_sums.as_mut_ptr().add((r * T + t) * 16), acc[r][t]);
                }
            }
        }
    }
}

/// Computes a column chunk of a strip for 1 to 4 tokens.
///
/// # Safety
/// The processor has AVX2 and FMA; `x` has the chunk's columns of each token.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dense_avx2(chunk: DenseChunk<'_>, tokens: usize, totals: &mut Totals) {
    // SAFETY: as promised by the caller.
    unsafe { dispatch_tokens!(dense256, chunk, tokens, totals, [1, 2, 3, 4]) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense256<const T: usize>(chunk: DenseChunk<'_>, totals: &mut Totals) {
    let DenseChunk { w, x, ldx, partial_sums, is_first, is_last } = chunk;
    assert!(
        partial_sums.len() >= STRIP * T * 8 && x.len() >= (T - 1) * ldx + w.len() / STRIP,
        "operands too short"
    );
    // Sixteen registers are enough for two rows of four tokens.
    for pair in 0..2 {
        let mut acc = [[_mm256_setzero_ps(); T]; 2];
        // SAFETY: in bounds, as asserted; a tile is 4 rows of 32 values.
        unsafe {
            if !is_first {
                for i in 0..2 {
                    for t in 0..T {
                        acc[i][t] = _mm256_loadu_ps(partial_sums.as_ptr().add(((pair * 2 + i) * T + t) * 8));
                    }
                }
            }
            for (tile, w) in w.chunks_exact(STRIP * TILE).enumerate() {
                let x = x.as_ptr().add(tile * TILE);
                for quarter in 0..4 {
                    let row = |i: usize| w.as_ptr().add((pair * 2 + i) * TILE + quarter * 8);
                    let w = [_mm256_loadu_ps(row(0)), _mm256_loadu_ps(row(1))];
                    for t in 0..T {
                        let x = _mm256_loadu_ps(x.add(t * ldx + quarter * 8));
                        for i in 0..2 {
                            acc[i][t] = _mm256_fmadd_ps(w[i], x, acc[i][t]);
                        }
                    }
                }
            }
            for i in 0..2 {
                for t in 0..T {
                    if is_last {
                        totals[t][pair * 2 + i] = sum_avx2(acc[i][t]);
                    } else {
                        _mm256_storeu_ps(
                            partial_sums.as_mut_ptr().add(((pair * 2 + i) * T + t) * 8),
                            acc[i][t],
                        );
                    }
                }
            }
        }
    }
}
