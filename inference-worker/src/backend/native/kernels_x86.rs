//! The AVX-512 and AVX2 kernels: one strip of four rows times a few tokens.
//!
//! Called by `kernels::strip_product`. A nibble becomes an f32 weight in two instructions on AVX-512: the
//! sixteen values that a row's block can take are one register (`q·d + m`), and `vpermps` looks sixteen
//! nibbles up at once, as it reads only the low four bits of each lane.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use std::arch::x86_64::*;

use super::{Format, Product, STRIP, TILE};

const Q4F16: u8 = Format::Q4F16 as u8;
const Q4F32: u8 = Format::Q4F32 as u8;
const Q8F16: u8 = Format::Q8F16 as u8;
const Q8F32: u8 = Format::Q8F32 as u8;
const BF16: u8 = Format::BF16 as u8;
const F16: u8 = Format::F16 as u8;
const F32: u8 = Format::F32 as u8;

/// Picks the instance for a format and a number of tokens.
macro_rules! dispatch {
    ($kernel:ident, $p:expr, $strip:expr, $from:expr, $sums:expr, $n:expr, [$($t:literal),*]) => {
        match ($p.w.format, $n) {
            $(
                (Format::Q4F16, $t) => $kernel::<Q4F16, $t>($p, $strip, $from, $sums),
                (Format::Q4F32, $t) => $kernel::<Q4F32, $t>($p, $strip, $from, $sums),
                (Format::Q8F16, $t) => $kernel::<Q8F16, $t>($p, $strip, $from, $sums),
                (Format::Q8F32, $t) => $kernel::<Q8F32, $t>($p, $strip, $from, $sums),
                (Format::BF16, $t) => $kernel::<BF16, $t>($p, $strip, $from, $sums),
                (Format::F16, $t) => $kernel::<F16, $t>($p, $strip, $from, $sums),
                (Format::F32, $t) => $kernel::<F32, $t>($p, $strip, $from, $sums),
            )*
            _ => unreachable!("the number of tokens is bounded by the caller"),
        }
    };
}

/// Up to six tokens from `from`; returns how many were done.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and F16C; `p.x` holds token `from` and the `left - 1` after it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn strip_avx512(
    p: &Product<'_>,
    strip: usize,
    from: usize,
    left: usize,
    sums: &mut [[f32; STRIP]; 8],
) -> usize {
    // 7 and 8 are better done as 4 + 3 and 4 + 4 than as 6 + 1 and 6 + 2.
    let n = match left {
        0..=6 => left,
        7 | 8 => 4,
        9..=11 => 5,
        _ => 6,
    };
    // SAFETY: the caller's promises.
    unsafe { dispatch!(avx512, p, strip, from, sums, n, [1, 2, 3, 4, 5, 6]) };
    n
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<const F: u8, const T: usize>(
    p: &Product<'_>,
    strip: usize,
    from: usize,
    sums: &mut [[f32; STRIP]; 8],
) {
    let (values, scales) = p.w.strip(strip);
    let format = p.w.format;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    let iota = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
    let mut acc = [[_mm512_setzero_ps(); T]; STRIP];
    // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; x holds T tokens of ldx ≥ tiles·32 values.
    unsafe {
        let x = p.x.as_ptr().add(from * p.ldx);
        for tile in 0..p.w.tiles() {
            let v = values.as_ptr().add(tile * vb);
            let s = scales.as_ptr().add(tile * sb);
            // What all four rows share: nibbles and scales.
            let nibbles =
                if F == Q4F16 || F == Q4F32 { _mm512_loadu_si512(v.cast()) } else { _mm512_setzero_si512() };
            let mut scale = [0.0f32; 8];
            match F {
                Q4F16 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(s.cast()))),
                Q8F16 => _mm_storeu_ps(scale.as_mut_ptr(), _mm_cvtph_ps(_mm_loadl_epi64(s.cast()))),
                Q4F32 | Q8F32 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_loadu_ps(s.cast())),
                _ => {}
            }
            let mut table = [_mm512_setzero_ps(); STRIP];
            if F == Q4F16 || F == Q4F32 {
                for r in 0..STRIP {
                    table[r] = _mm512_fmadd_ps(iota, _mm512_set1_ps(scale[r]), _mm512_set1_ps(scale[4 + r]));
                }
            }
            for half in 0..2 {
                let mut w = [_mm512_setzero_ps(); STRIP];
                for r in 0..STRIP {
                    let at = r * TILE + half * 16;
                    w[r] = match F {
                        Q4F16 | Q4F32 => {
                            let shift = _mm_cvtsi32_si128((4 * (2 * r + half)) as i32);
                            _mm512_permutexvar_ps(_mm512_srl_epi32(nibbles, shift), table[r])
                        }
                        Q8F16 | Q8F32 => {
                            let q = _mm512_cvtepi8_epi32(_mm_loadu_si128(v.add(at).cast()));
                            let scale = scale[if F == Q8F16 { r } else { r * 2 + half }];
                            _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale))
                        }
                        BF16 => {
                            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(v.add(at * 2).cast()));
                            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                        }
                        F16 => _mm512_cvtph_ps(_mm256_loadu_si256(v.add(at * 2).cast())),
                        _ => _mm512_loadu_ps(v.add(at * 4).cast()),
                    };
                }
                for t in 0..T {
                    let x = _mm512_loadu_ps(x.add(t * p.ldx + tile * TILE + half * 16));
                    for r in 0..STRIP {
                        acc[r][t] = _mm512_fmadd_ps(w[r], x, acc[r][t]);
                    }
                }
            }
        }
    }
    for t in 0..T {
        let total = sum4_avx512(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
        // SAFETY: `sums[t]` holds four f32.
        unsafe { _mm_storeu_ps(sums[t].as_mut_ptr(), total) };
    }
}

/// The sums of four registers, as one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn sum4_avx512(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
    // Pairs of lanes, then pairs of pairs, within each 128-bit part; then the four parts.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let lo = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    let hi = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    let abcd = _mm512_add_ps(lo, hi);
    let low = _mm512_castps512_ps256(abcd);
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(abcd)));
    let half = _mm256_add_ps(low, high);
    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
}

/// Up to four tokens from `from`; returns how many were done.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `p.x` holds token `from` and the `left - 1` after it.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn strip_avx2(
    p: &Product<'_>,
    strip: usize,
    from: usize,
    left: usize,
    sums: &mut [[f32; STRIP]; 8],
) -> usize {
    let n = match left {
        5 => 3,
        0..=3 => left,
        _ => 4,
    };
    // SAFETY: the caller's promises.
    unsafe { dispatch!(avx2, p, strip, from, sums, n, [1, 2, 3, 4]) };
    n
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const F: u8, const T: usize>(
    p: &Product<'_>,
    strip: usize,
    from: usize,
    sums: &mut [[f32; STRIP]; 8],
) {
    let (values, scales) = p.w.strip(strip);
    let format = p.w.format;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    // Sixteen registers hold two rows of up to four tokens; the tile is still in cache for the other two.
    for pair in 0..2 {
        let mut acc = [[_mm256_setzero_ps(); T]; 2];
        // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; x holds T tokens of ldx ≥ tiles·32 values.
        unsafe {
            let x = p.x.as_ptr().add(from * p.ldx);
            for tile in 0..p.w.tiles() {
                let v = values.as_ptr().add(tile * vb);
                let s = scales.as_ptr().add(tile * sb);
                let mut scale = [0.0f32; 8];
                match F {
                    Q4F16 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(s.cast()))),
                    Q8F16 => _mm_storeu_ps(scale.as_mut_ptr(), _mm_cvtph_ps(_mm_loadl_epi64(s.cast()))),
                    Q4F32 | Q8F32 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_loadu_ps(s.cast())),
                    _ => {}
                }
                for quarter in 0..4 {
                    let (half, part) = (quarter / 2, quarter % 2);
                    let mut w = [_mm256_setzero_ps(); 2];
                    for i in 0..2 {
                        let r = pair * 2 + i;
                        let at = r * TILE + quarter * 8;
                        w[i] = match F {
                            Q4F16 | Q4F32 => {
                                let nibbles = _mm256_loadu_si256(v.add(part * 32).cast());
                                let shift = _mm_cvtsi32_si128((4 * (2 * r + half)) as i32);
                                let q =
                                    _mm256_and_si256(_mm256_srl_epi32(nibbles, shift), _mm256_set1_epi32(15));
                                let (d, m) = (_mm256_set1_ps(scale[r]), _mm256_set1_ps(scale[4 + r]));
                                _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), d, m)
                            }
                            Q8F16 | Q8F32 => {
                                let q = _mm256_cvtepi8_epi32(_mm_loadl_epi64(v.add(at).cast()));
                                let scale = scale[if F == Q8F16 { r } else { r * 2 + half }];
                                _mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(scale))
                            }
                            BF16 => {
                                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(v.add(at * 2).cast()));
                                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                            }
                            F16 => _mm256_cvtph_ps(_mm_loadu_si128(v.add(at * 2).cast())),
                            _ => _mm256_loadu_ps(v.add(at * 4).cast()),
                        };
                    }
                    for t in 0..T {
                        let x = _mm256_loadu_ps(x.add(t * p.ldx + tile * TILE + quarter * 8));
                        for i in 0..2 {
                            acc[i][t] = _mm256_fmadd_ps(w[i], x, acc[i][t]);
                        }
                    }
                }
            }
        }
        for t in 0..T {
            for i in 0..2 {
                sums[t][pair * 2 + i] = sum_avx2(acc[i][t]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_avx2(a: __m256) -> f32 {
    let quad = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}
