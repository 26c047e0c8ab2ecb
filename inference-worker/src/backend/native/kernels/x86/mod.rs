//! The AVX-512 and AVX2 kernels: one strip of four rows times a few tokens.
//!
//! [`packed`] decodes weights in registers, [`dense`] multiplies weights that are decoded before. On AVX-512, a nibble
//! becomes an f32 weight in two instructions: one register has the sixteen values that a row's block can take
//! (`q·d + m`), and `vpermps` selects sixteen of them at once, because it reads only the low four bits of each lane.

use std::arch::x86_64::*;

use super::{ColumnChunk, Format, MatMul, STRIP, Strip, Sums, TILE};

const Q4F16: u8 = Format::Q4F16 as u8;
const Q4F32: u8 = Format::Q4F32 as u8;
const Q8F16: u8 = Format::Q8F16 as u8;
const Q8F32: u8 = Format::Q8F32 as u8;
const BF16: u8 = Format::BF16 as u8;
const F16: u8 = Format::F16 as u8;
const F32: u8 = Format::F32 as u8;

/// Returns the sixteen weights of row `r` in one half of a tile.
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

/// Returns the eight weights of row `r` in one part of one half of a tile.
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

/// Returns the scales of a tile as f32.
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

/// Returns the nibbles of a tile, and for each row the sixteen weights that a nibble can stand for.
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

// After the macros, which these modules use.
mod dense;
mod packed;

pub use dense::{decode_avx2, decode_avx512, dense_avx2, dense_avx512};
pub use packed::{strip_avx2, strip_avx512};

/// Returns the sums of four registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn sum4_avx512(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
    // Adds pairs of lanes, then pairs of pairs, within each 128-bit part; then the four parts.
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

/// Returns the sum of a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_avx2(a: __m256) -> f32 {
    let quad = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}

/// Prefetches the first cache line of a slice into the L2 cache.
pub fn prefetch_l2(line: &[f32]) {
    // SAFETY: a prefetch never faults, and every x86-64 processor has it.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
}

/// Prefetches a cache line into the L1 cache for writing.
pub fn prefetch_for_write(line: *const f32) {
    // The compiler emits this instruction only if the whole program is built for processors that have it.
    // SAFETY: as in `prefetch_l2`; processors before 2014 execute it as a no-op.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
}
