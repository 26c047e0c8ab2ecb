//! The AVX-512 and AVX2 kernels: one strip of four rows times a few tokens.
//!
//! Called by `kernels::strip_product`. A nibble becomes an f32 weight in two instructions on AVX-512: the
//! sixteen values that a row's block can take are one register (`q·d + m`), and `vpermps` looks sixteen
//! nibbles up at once, as it reads only the low four bits of each lane.

#![expect(clippy::needless_range_loop, reason = "small constant loops over several register arrays at once")]

use std::arch::x86_64::*;

use super::{
    Chunk, Format, Product, STRIP, Strip, Sums, TILE,
    ahead::{Dense, Totals},
};

const Q4F16: u8 = Format::Q4F16 as u8;
const Q4F32: u8 = Format::Q4F32 as u8;
const Q8F16: u8 = Format::Q8F16 as u8;
const Q8F32: u8 = Format::Q8F32 as u8;
const BF16: u8 = Format::BF16 as u8;
const F16: u8 = Format::F16 as u8;
const F32: u8 = Format::F32 as u8;

/// The sixteen weights of row `r` in one half of a tile.
macro_rules! weights512 {
    ($f:expr, $v:expr, $scale:expr, $table:expr, $nibbles:expr, $r:expr, $half:expr, $at:expr) => {
        match $f {
            Q4F16 | Q4F32 => {
                let shift = _mm_cvtsi32_si128((4 * (2 * $r + $half)) as i32);
                _mm512_permutexvar_ps(_mm512_srl_epi32($nibbles, shift), $table[$r])
            }
            Q8F16 | Q8F32 => {
                let q = _mm512_cvtepi8_epi32(_mm_loadu_si128($v.add($at).cast()));
                let scale = $scale[if $f == Q8F16 { $r } else { $r * 2 + $half }];
                _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale))
            }
            BF16 => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256($v.add($at * 2).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256($v.add($at * 2).cast())),
            _ => _mm512_loadu_ps($v.add($at * 4).cast()),
        }
    };
}

/// The eight weights of row `r` in one part of one half of a tile.
macro_rules! weights256 {
    ($f:expr, $v:expr, $scale:expr, $r:expr, $half:expr, $part:expr, $at:expr) => {
        match $f {
            Q4F16 | Q4F32 => {
                let nibbles = _mm256_loadu_si256($v.add($part * 32).cast());
                let shift = _mm_cvtsi32_si128((4 * (2 * $r + $half)) as i32);
                let q = _mm256_and_si256(_mm256_srl_epi32(nibbles, shift), _mm256_set1_epi32(15));
                let (d, m) = (_mm256_set1_ps($scale[$r]), _mm256_set1_ps($scale[4 + $r]));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), d, m)
            }
            Q8F16 | Q8F32 => {
                let q = _mm256_cvtepi8_epi32(_mm_loadl_epi64($v.add($at).cast()));
                let scale = $scale[if $f == Q8F16 { $r } else { $r * 2 + $half }];
                _mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(scale))
            }
            BF16 => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128($v.add($at * 2).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
            F16 => _mm256_cvtph_ps(_mm_loadu_si128($v.add($at * 2).cast())),
            _ => _mm256_loadu_ps($v.add($at * 4).cast()),
        }
    };
}

/// The scales of a tile, widened to f32.
macro_rules! scales {
    ($f:expr, $s:expr) => {{
        let mut scale = [0.0f32; 8];
        match $f {
            Q4F16 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128($s.cast()))),
            Q8F16 => _mm_storeu_ps(scale.as_mut_ptr(), _mm_cvtph_ps(_mm_loadl_epi64($s.cast()))),
            Q4F32 | Q8F32 => _mm256_storeu_ps(scale.as_mut_ptr(), _mm256_loadu_ps($s.cast())),
            _ => {}
        }
        scale
    }};
}

/// The sixteen values that the nibbles of each of some rows can stand for, and the nibbles themselves.
macro_rules! nibble_tables {
    ($f:expr, $v:expr, $scale:expr, $rows:expr) => {{
        let mut table = [_mm512_setzero_ps(); STRIP];
        let mut nibbles = _mm512_setzero_si512();
        if $f == Q4F16 || $f == Q4F32 {
            let iota = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            nibbles = _mm512_loadu_si512($v.cast());
            for r in $rows {
                table[r] = _mm512_fmadd_ps(iota, _mm512_set1_ps($scale[r]), _mm512_set1_ps($scale[4 + r]));
            }
        }
        (nibbles, table)
    }};
}

/// Picks the instance for a format and a number of tokens.
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

/// Up to twelve tokens from `from`; returns how many were done. Of a chunk that is not the last
/// the sums rest.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and F16C; `p.x` holds token `from` and the `left - 1` after it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn strip_avx512(
    p: &Product<'_>,
    strip: Strip<'_>,
    from: usize,
    left: usize,
    chunk: Chunk<'_>,
    sums: &mut Sums,
) -> usize {
    let n = match left {
        0..=12 => left,
        13..=24 => left.div_ceil(2),
        _ => 12,
    };
    // 24 of the 32 registers hold sums: four rows of up to six tokens, or two rows of up to twelve.
    // SAFETY: the caller's promises.
    unsafe {
        dispatch!(
            avx512, p, strip, (from, chunk), sums, n,
            [1 4, 2 4, 3 4, 4 4, 5 4, 6 4, 7 2, 8 2, 9 2, 10 2, 11 2, 12 2]
        )
    };
    n
}

/// T tokens, R rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<const F: u8, const T: usize, const R: usize>(
    p: &Product<'_>,
    strip: Strip<'_>,
    (from, chunk): (usize, Chunk<'_>),
    sums: &mut Sums,
) {
    let Strip { format, values, scales } = strip;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    let Chunk { tiles, rest } = chunk;
    let (is_first, is_last) = (tiles.start == 0, tiles.end == p.w.tiles());
    assert!((is_first && is_last) || rest.len() >= STRIP * T * 16, "no room for sums");
    for first in (0..STRIP).step_by(R) {
        let mut acc = [[_mm512_setzero_ps(); T]; R];
        // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; x holds T tokens of ldx ≥ tiles·32 values;
        // sums rest in STRIP·T vectors, by the assertion.
        unsafe {
            if !is_first {
                for i in 0..R {
                    for t in 0..T {
                        acc[i][t] = _mm512_loadu_ps(rest.as_ptr().add(((first + i) * T + t) * 16));
                    }
                }
            }
            let x = p.x.as_ptr().add(from * p.ldx);
            for tile in tiles.clone() {
                let v = values.as_ptr().add(tile * vb);
                let s = scales.as_ptr().add(tile * sb);
                fetch_ahead::<F>(v, s);
                // What all rows share.
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
                    // SAFETY: by the assertion.
                    unsafe { _mm512_storeu_ps(rest.as_mut_ptr().add(((first + i) * T + t) * 16), acc[i][t]) };
                }
            }
            continue;
        }
        // Four sums at once: four rows of a token, or two of each of two.
        for t in (0..T).step_by(STRIP / R) {
            let sum = |i: usize| {
                let (t, i) = (t + i / R, i % R);
                if t < T { acc[i][t] } else { _mm512_setzero_ps() }
            };
            let mut total = [0.0; STRIP];
            // SAFETY: `total` holds four f32.
            unsafe { _mm_storeu_ps(total.as_mut_ptr(), sum4_avx512(sum(0), sum(1), sum(2), sum(3))) };
            for (sums, total) in sums[t..T.min(t + STRIP / R)].iter_mut().zip(total.chunks_exact(R)) {
                sums[first..first + R].copy_from_slice(total);
            }
        }
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
    // SAFETY: the caller's promises.
    unsafe { dispatch!(avx2, p, strip, from, sums, n, [1 2, 2 2, 3 2, 4 2]) };
    n
}

/// T tokens, R rows at a time.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const F: u8, const T: usize, const R: usize>(
    p: &Product<'_>,
    strip: Strip<'_>,
    from: usize,
    sums: &mut Sums,
) {
    let Strip { format, values, scales } = strip;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    // Sixteen registers hold two rows of up to four tokens; the tile is still in cache for the other two.
    for first in (0..STRIP).step_by(R) {
        let mut acc = [[_mm256_setzero_ps(); T]; R];
        // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; x holds T tokens of ldx ≥ tiles·32 values.
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

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_avx2(a: __m256) -> f32 {
    let quad = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}

/// Asks for a tile of quantised weights that comes later: strips follow one another in memory, and reading
/// two streams of few bytes per product is more than the processor's own prefetching keeps up with.
#[inline]
fn fetch_ahead<const F: u8>(values: *const u8, scales: *const u8) {
    const BYTES: usize = 2048;
    // SAFETY: a prefetch reads nothing and never faults, whatever the address.
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

/// Asks for the cache line where a slice begins, into the second-level cache.
pub fn fetch(line: &[f32]) {
    // SAFETY: a prefetch reads nothing and never faults; every x86-64 processor has it.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
}

/// Asks for a cache line, into the first-level cache and for writing.
pub fn fetch_to_write(line: *const f32) {
    // The compiler's own prefetch for writing is one for reading unless the whole program is built for it.
    // SAFETY: as in `fetch`; processors of before 2014 take the instruction for nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
}

/// Picks the instance for a format.
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
/// The processor has AVX-512 F, BW, VL and F16C; `out` holds 128 values per tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn decode_avx512(strip: Strip<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promises.
    unsafe { dispatch_format!(decode512, strip, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn decode512<const F: u8>(strip: Strip<'_>, out: &mut [f32]) {
    let (vb, sb) = (strip.format.tile_bytes(), strip.format.scale_bytes());
    for (tile, out) in out.chunks_exact_mut(STRIP * TILE).enumerate() {
        // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; `out` is one tile.
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
/// The processor has AVX2, FMA and F16C; `out` holds 128 values per tile.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn decode_avx2(strip: Strip<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promises.
    unsafe { dispatch_format!(decode256, strip, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode256<const F: u8>(strip: Strip<'_>, out: &mut [f32]) {
    let (vb, sb) = (strip.format.tile_bytes(), strip.format.scale_bytes());
    for (tile, out) in out.chunks_exact_mut(STRIP * TILE).enumerate() {
        // SAFETY: a strip holds `tiles` tiles of vb and sb bytes; `out` is one tile.
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

/// Picks the instance for a number of tokens.
macro_rules! dispatch_tokens {
    ($kernel:ident, $dense:expr, $n:expr, $totals:expr, [$($t:literal),*]) => {
        match $n {
            $($t => $kernel::<$t>($dense, $totals),)*
            _ => unreachable!("the number of tokens is bounded by the caller"),
        }
    };
}

/// A chunk of a strip for 1 to 6 tokens.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; `x` holds the chunk's columns of each token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn dense_avx512(dense: Dense<'_>, tokens: usize, totals: &mut Totals) {
    // SAFETY: the caller's promises.
    unsafe { dispatch_tokens!(dense512, dense, tokens, totals, [1, 2, 3, 4, 5, 6]) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn dense512<const T: usize>(dense: Dense<'_>, totals: &mut Totals) {
    let Dense { w, x, ldx, sums, is_first, is_last } = dense;
    assert!(sums.len() >= STRIP * T * 16 && x.len() >= (T - 1) * ldx + w.len() / STRIP, "operands too short");
    let mut acc = [[_mm512_setzero_ps(); T]; STRIP];
    // SAFETY: in bounds by the assertion; a tile is 4 rows of 32 values.
    unsafe {
        if !is_first {
            for r in 0..STRIP {
                for t in 0..T {
                    acc[r][t] = _mm512_loadu_ps(sums.as_ptr().add((r * T + t) * 16));
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
                    _mm512_storeu_ps(sums.as_mut_ptr().add((r * T + t) * 16), acc[r][t]);
                }
            }
        }
    }
}

/// A chunk of a strip for 1 to 4 tokens.
///
/// # Safety
/// The processor has AVX2 and FMA; `x` holds the chunk's columns of each token.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dense_avx2(dense: Dense<'_>, tokens: usize, totals: &mut Totals) {
    // SAFETY: the caller's promises.
    unsafe { dispatch_tokens!(dense256, dense, tokens, totals, [1, 2, 3, 4]) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense256<const T: usize>(dense: Dense<'_>, totals: &mut Totals) {
    let Dense { w, x, ldx, sums, is_first, is_last } = dense;
    assert!(sums.len() >= STRIP * T * 8 && x.len() >= (T - 1) * ldx + w.len() / STRIP, "operands too short");
    // Sixteen registers hold two rows of four tokens.
    for pair in 0..2 {
        let mut acc = [[_mm256_setzero_ps(); T]; 2];
        // SAFETY: in bounds by the assertion; a tile is 4 rows of 32 values.
        unsafe {
            if !is_first {
                for i in 0..2 {
                    for t in 0..T {
                        acc[i][t] = _mm256_loadu_ps(sums.as_ptr().add(((pair * 2 + i) * T + t) * 8));
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
                        _mm256_storeu_ps(sums.as_mut_ptr().add(((pair * 2 + i) * T + t) * 8), acc[i][t]);
                    }
                }
            }
        }
    }
}
