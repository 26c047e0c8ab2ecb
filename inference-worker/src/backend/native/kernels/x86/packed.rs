//! Kernels that decode packed weights in registers, for few tokens. Called by `kernels::strip_product`.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use super::*;

/// Calls the instance of a kernel for a format and a number of tokens.
macro_rules! dispatch {
    ($kernel:ident, $p:expr, $strip:expr, $from:expr, $sums:expr, $n:expr, [$($t:literal $r:literal),*]) => {
        match ($strip.format, $n) {
            $(
                (Format::Q4F16, $t) => $kernel::<Q4F16, $t, $r>($p, $strip, $from, $sums),
                (Format::Q4F32, $t) => $kernel::<Q4F32, $t, $r>($p, $strip, $from, $sums),
                (Format::Q8F16, $t) => $kernel::<Q8F16, $t, $r>($p, $strip, $from, $sums),
                (Format::Q8F32, $t) => $kernel::<Q8F32, $t, $r>($p, $strip, $from, $sums),
                (Format::BF16, $t) => $kernel::<BF16, $t, $r>($p, $strip, $from, $sums),
                (Format::F16, $t) => $kernel::<F16, $t, $r>($p, $strip, $from, $sums),
                (Format::F32, $t) => $kernel::<F32, $t, $r>($p, $strip, $from, $sums),
            )*
            _ => unreachable!("the number of tokens is bounded by the caller"),
        }
    };
}

/// Computes up to twelve tokens from `from` on, and returns their number. Only the last column chunk writes `sums`.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and F16C, and `p.x` has `left` tokens from `from` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn strip_avx512(
    p: &MatMul<'_>,
    strip: Strip<'_>,
    from: usize,
    left: usize,
    chunk: ColumnChunk<'_>,
    sums: &mut Sums,
) -> usize {
    let n = match left {
        0..=12 => left,
        13..=24 => left.div_ceil(2),
        _ => 12,
    };
    // 24 of the 32 registers contain sums: four rows of up to six tokens, or two rows of up to twelve.
    // SAFETY: as promised by the caller.
    unsafe {
        dispatch!(
            avx512, p, strip, (from, chunk), sums, n,
            [1 4, 2 4, 3 4, 4 4, 5 4, 6 4, 7 2, 8 2, 9 2, 10 2, 11 2, 12 2]
        )
    };
    n
}

/// Computes T tokens, R rows at a time. A long function, because the sums must stay in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<const F: u8, const T: usize, const R: usize>(
    p: &MatMul<'_>,
    strip: Strip<'_>,
    (from, chunk): (usize, ColumnChunk<'_>),
    sums: &mut Sums,
) {
    let Strip { format, values, scales } = strip;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    let ColumnChunk { tiles, partial_sums } = chunk;
    let (is_first, is_last) = (tiles.start == 0, tiles.end == p.w.tiles());
    assert!((is_first && is_last) || partial_sums.len() >= STRIP * T * 16, "partial sums too short");
    for first in (0..STRIP).step_by(R) {
        let mut acc = [[_mm512_setzero_ps(); T]; R];
        // SAFETY: a strip has `tiles` tiles of vb and sb bytes; x has T tokens of ldx ≥ tiles·32 values; there are
        // STRIP·T vectors of partial sums, as asserted.
        unsafe {
            if !is_first {
                for i in 0..R {
                    for t in 0..T {
                        acc[i][t] = _mm512_loadu_ps(partial_sums.as_ptr().add(((first + i) * T + t) * 16));
                    }
                }
            }
            let x = p.x.as_ptr().add(from * p.ldx);
            for tile in tiles.clone() {
                let v = values.as_ptr().add(tile * vb);
                let s = scales.as_ptr().add(tile * sb);
                prefetch_weights::<F>(v, s);
                // Shared by all rows.
                let scale = scales!(F, s);
                let (nibbles, table) = nibble_tables!(F, v, scale, first..first + R);
                for half in 0..2 {
                    let mut w = [_mm512_setzero_ps(); R];
                    for i in 0..R {
                        let r = first + i;
                        let at = r * TILE + half * 16;
                        w[i] = weights512!(F, v, scale, table, nibbles, r, half, at);
                    }
                    for t in 0..T {
                        let x = _mm512_loadu_ps(x.add(t * p.ldx + tile * TILE + half * 16));
                        for i in 0..R {
                            acc[i][t] = _mm512_fmadd_ps(w[i], x, acc[i][t]);
                        }
                    }
                }
            }
        }
        if !is_last {
            for i in 0..R {
                for t in 0..T {
                    // SAFETY: in bounds, as asserted.
                    unsafe {
                        _mm512_storeu_ps(partial_sums.as_mut_ptr().add(((first + i) * T + t) * 16), acc[i][t])
                    };
                }
            }
            continue;
        }
        // Adds up four registers at once: four rows of one token, or two rows of two tokens.
        for t in (0..T).step_by(STRIP / R) {
            let sum = |i: usize| {
                let (t, i) = (t + i / R, i % R);
                if t < T { acc[i][t] } else { _mm512_setzero_ps() }
            };
            let mut total = [0.0; STRIP];
            // SAFETY: `total` has four f32.
            unsafe { _mm_storeu_ps(total.as_mut_ptr(), sum4_avx512(sum(0), sum(1), sum(2), sum(3))) };
            for (sums, total) in sums[t..T.min(t + STRIP / R)].iter_mut().zip(total.chunks_exact(R)) {
                sums[first..first + R].copy_from_slice(total);
            }
        }
    }
}

/// Computes up to four tokens from `from` on, and returns their number.
///
/// # Safety
/// The processor has AVX2, FMA and F16C, and `p.x` has `left` tokens from `from` on.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn strip_avx2(
    p: &MatMul<'_>,
    strip: Strip<'_>,
    from: usize,
    left: usize,
    sums: &mut Sums,
) -> usize {
    let n = match left {
        5 => 3,
        0..=3 => left,
        _ => 4,
    };
    // SAFETY: as promised by the caller.
    unsafe { dispatch!(avx2, p, strip, from, sums, n, [1 2, 2 2, 3 2, 4 2]) };
    n
}

/// Computes T tokens, R rows at a time.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const F: u8, const T: usize, const R: usize>(
    p: &MatMul<'_>,
    strip: Strip<'_>,
    from: usize,
    sums: &mut Sums,
) {
    let Strip { format, values, scales } = strip;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    // Sixteen registers are enough for two rows of up to four tokens. The tile is still in the cache for the other
    // two.
    for first in (0..STRIP).step_by(R) {
        let mut acc = [[_mm256_setzero_ps(); T]; R];
        // SAFETY: a strip has `tiles` tiles of vb and sb bytes; x has T tokens of ldx ≥ tiles·32 values.
        unsafe {
            let x = p.x.as_ptr().add(from * p.ldx);
            for tile in 0..p.w.tiles() {
                let v = values.as_ptr().add(tile * vb);
                let s = scales.as_ptr().add(tile * sb);
                let scale = scales!(F, s);
                for quarter in 0..4 {
                    let (half, part) = (quarter / 2, quarter % 2);
                    let mut w = [_mm256_setzero_ps(); R];
                    for i in 0..R {
                        let r = first + i;
                        let at = r * TILE + quarter * 8;
                        w[i] = weights256!(F, v, scale, r, half, part, at);
                    }
                    for t in 0..T {
                        let x = _mm256_loadu_ps(x.add(t * p.ldx + tile * TILE + quarter * 8));
                        for i in 0..R {
                            acc[i][t] = _mm256_fmadd_ps(w[i], x, acc[i][t]);
                        }
                    }
                }
            }
        }
        for t in 0..T {
            for i in 0..R {
                sums[t][first + i] = sum_avx2(acc[i][t]);
            }
        }
    }
}

/// Prefetches a later tile of quantised weights. Strips are contiguous in memory, but the hardware prefetcher does not
/// keep up with two streams of so few bytes per product.
#[inline]
fn prefetch_weights<const F: u8>(values: *const u8, scales: *const u8) {
    const BYTES: usize = 2048;
    // SAFETY: a prefetch never faults, at any address.
    unsafe {
        if matches!(F, Q4F16 | Q4F32) {
            _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(BYTES).cast());
            _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(BYTES / 4).cast());
        }
        if matches!(F, Q8F16 | Q8F32) {
            _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(BYTES).cast());
            _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(BYTES + 64).cast());
            _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(BYTES / 8).cast());
        }
    }
}
