//! Matrix products of packed weights and f32 activations, with kernels for several instruction sets.
//!
//! Input: a [`PackedMatrix`] and activations `[tokens][ldx]` (zero beyond `cols`). Output: `[tokens][ldy]`,
//! overwritten or added to. Weights are decoded in registers to exact f32 values and multiplied in f32. The order of
//! additions of an output does not depend on the batch, so that batched and unbatched products are equal bit by bit.
//! Called by the native backend with an [`Isa`] that is detected once at start-up.

use std::{cell::RefCell, ops::Range};

use super::aligned::AlignedF32;
use super::packed::{Format, PackedMatrix, STRIP, TILE, decode_row};
use super::pool::Pool;

mod dense;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Instruction sets that have their own kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW and VL.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Any processor.
    Portable,
}

impl Isa {
    /// Returns the best one that this processor supports. The environment variable `LB_CPU_ISA` (avx512, avx2,
    /// portable) can select a lower one.
    pub fn detect() -> Self {
        let best = Self::best();
        match std::env::var("LB_CPU_ISA").as_deref() {
            Ok("portable") => Self::Portable,
            Ok("avx2") if best == Self::Avx512 => Self::Avx2,
            _ => best,
        }
    }

    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Returns all that this processor supports, best first; for tests.
    pub fn available() -> Vec<Self> {
        let all = [Self::Avx512, Self::Avx2, Self::Portable];
        let best = all.iter().position(|i| *i == Self::best()).unwrap_or(2);
        all[best..].to_vec()
    }
}

/// Tokens per pass over the weights, so that their activations stay in the L1 cache.
const TOKEN_BLOCK: usize = 24;

/// The tiles of a strip, or of a part of it.
#[derive(Clone, Copy)]
pub struct Strip<'a> {
    /// Format of its tiles.
    pub format: Format,
    /// Its values.
    pub values: &'a [u8],
    /// Its scales.
    pub scales: &'a [u8],
}

/// Tiles per column chunk. With long rows, whole rows of about eight tokens do not fit into the L1 cache.
const CHUNK_TILES: usize = 24;
/// Strips that process one column chunk before the next chunk.
const STRIPS_PER_CHUNK: usize = 4;
/// Values of the partial sums of a strip between chunks: a vector of 16 per row and token.
const PARTIAL_SUMS_LEN: usize = STRIP * 12 * 16;

/// A range of columns of a strip, and its partial sums.
pub struct ColumnChunk<'a> {
    /// The tiles.
    pub tiles: Range<usize>,
    /// Sums of the columns before this chunk; empty if the chunk has all columns.
    pub partial_sums: &'a mut [f32],
}

thread_local! {
    static PARTIAL_SUMS: RefCell<AlignedF32> = RefCell::default();
}

/// Results of a packed kernel: sums of a strip's rows for up to twelve tokens.
type Sums = [[f32; STRIP]; 12];

fn packed_strip(w: &PackedMatrix, strip: usize) -> Strip<'_> {
    let (values, scales) = w.strip(strip);
    Strip { format: w.format, values, scales }
}

/// A mutable buffer to which several threads write disjoint parts.
#[derive(Clone, Copy)]
pub struct SharedOutput(pub *mut f32, pub usize);

// SAFETY: the threads of a job write disjoint elements; each caller of `slice` states which.
unsafe impl Sync for SharedOutput {}
// SAFETY: as above.
unsafe impl Send for SharedOutput {}

impl SharedOutput {
    /// Wraps a slice that nothing else uses while the job runs.
    pub fn new(slice: &mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// Returns the address of an element.
    pub fn ptr(&self, index: usize) -> *const f32 {
        assert!(index < self.1, "index {index} in a buffer of {}", self.1);
        // SAFETY: in bounds, as asserted.
        unsafe { self.0.add(index) }
    }

    /// Returns a part of the buffer.
    ///
    /// # Safety
    /// No other thread uses an overlapping part during the lifetime of the slice.
    #[expect(clippy::mut_from_ref, reason = "threads get disjoint parts")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1, "{len} values at {start} in a buffer of {}", self.1);
        // SAFETY: in bounds, as asserted, and disjoint, as promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// A matrix product: `y[t][row] (+)= Σ_c w[row][c] · x[t][c]`.
pub struct MatMul<'a> {
    /// Weights.
    pub w: &'a PackedMatrix,
    /// Activations: rows of `ldx` values, which are zero from `w.cols` up to the next multiple of 32.
    pub x: &'a [f32],
    /// Distance between the rows of `x`.
    pub ldx: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Distance between the rows of the output.
    pub ldy: usize,
    /// Whether to add to the output instead of overwriting it.
    pub add: bool,
}

/// Computes a product on the pool's threads.
pub fn matmul(isa: Isa, pool: &mut Pool, p: &MatMul<'_>, y: &mut [f32]) {
    assert!(p.ldx >= p.w.tiles() * TILE && p.x.len() >= p.tokens * p.ldx, "activations too short");
    assert!(p.ldy >= p.w.rows && y.len() >= (p.tokens.max(1) - 1) * p.ldy + p.w.rows, "output too short");
    if p.tokens == 0 {
        return;
    }
    let out = SharedOutput::new(y);
    if p.tokens >= dense::MIN_TOKENS && isa != Isa::Portable {
        return dense::matmul(isa, pool, p, out);
    }
    let strips = p.w.strips();
    // Several parts per thread balance threads of different speed; more parts would add overhead.
    let parts = (pool.threads() * 8).min(strips);
    let in_column_chunks = isa == Isa::Avx512 && p.tokens > 6 && p.w.tiles() > CHUNK_TILES;
    pool.run(parts, &|part| {
        let strips = strips * part / parts..strips * (part + 1) / parts;
        if in_column_chunks {
            return PARTIAL_SUMS.with_borrow_mut(|sums| strips_in_chunks(isa, p, strips, sums, out));
        }
        let mut from = 0;
        while from < p.tokens {
            let n = TOKEN_BLOCK.min(p.tokens - from);
            for strip in strips.clone() {
                let whole = ColumnChunk { tiles: 0..p.w.tiles(), partial_sums: &mut [] };
                strip_product(isa, p, strip, from..from + n, whole, out);
            }
            from += n;
        }
    });
}

/// Computes some strips for all tokens, at most twelve. A few strips process the first column chunk, then the next
/// one, and so on, so that all but the first of them find the activations in the L1 cache.
fn strips_in_chunks(
    isa: Isa,
    p: &MatMul<'_>,
    strips: Range<usize>,
    partial_sums: &mut AlignedF32,
    out: SharedOutput,
) {
    partial_sums.ensure_len(STRIPS_PER_CHUNK * PARTIAL_SUMS_LEN);
    let tiles = p.w.tiles();
    for first_strip in strips.clone().step_by(STRIPS_PER_CHUNK) {
        for first in (0..tiles).step_by(CHUNK_TILES) {
            let chunk = first..(first + CHUNK_TILES).min(tiles);
            let group = first_strip..strips.end.min(first_strip + STRIPS_PER_CHUNK);
            for (strip, sums) in group.zip(partial_sums.chunks_exact_mut(PARTIAL_SUMS_LEN)) {
                let chunk = ColumnChunk { tiles: chunk.clone(), partial_sums: sums };
                strip_product(isa, p, strip, 0..p.tokens, chunk, out);
            }
        }
    }
}

/// Computes one column chunk of one strip for some tokens. Writes the strip's rows of these tokens after the last
/// chunk.
fn strip_product(
    isa: Isa,
    p: &MatMul<'_>,
    strip: usize,
    tokens: Range<usize>,
    chunk: ColumnChunk<'_>,
    out: SharedOutput,
) {
    let weights = packed_strip(p.w, strip);
    let rows = STRIP.min(p.w.rows - strip * STRIP);
    let is_last = chunk.tiles.end == p.w.tiles();
    let mut t = tokens.start;
    while t < tokens.end {
        let mut sums = Sums::default();
        let left = tokens.end - t;
        let step = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                let chunk =
                    ColumnChunk { tiles: chunk.tiles.clone(), partial_sums: &mut *chunk.partial_sums };
                // SAFETY: `Isa::best` detected the features; `matmul` checked that x has these tokens.
                unsafe { x86::strip_avx512(p, weights, t, left, chunk, &mut sums) }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::strip_avx2(p, weights, t, left, &mut sums) },
            _ => strip_portable(p, weights, t, left, &mut sums),
        };
        for (i, sums) in sums.iter().enumerate().take(if is_last { step } else { 0 }) {
            // SAFETY: these rows of token t + i belong to this strip, which only this thread computes.
            let y = unsafe { out.slice((t + i) * p.ldy + strip * STRIP, rows) };
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = if p.add { *y + sum } else { *sum };
            }
        }
        t += step;
    }
}

fn strip_portable(p: &MatMul<'_>, strip: Strip<'_>, from: usize, left: usize, sums: &mut Sums) -> usize {
    let n = left.min(4);
    let Strip { format, values, scales } = strip;
    let (vb, sb) = (format.tile_bytes(), format.scale_bytes());
    let mut acc = [[[0.0f32; 16]; STRIP]; 4];
    for tile in 0..p.w.tiles() {
        for r in 0..STRIP {
            let w = decode_row(format, &values[tile * vb..][..vb], &scales[tile * sb..][..sb], r);
            for (t, acc) in acc.iter_mut().enumerate().take(n) {
                let x = &p.x[(from + t) * p.ldx + tile * TILE..][..TILE];
                for half in 0..2 {
                    for lane in 0..16 {
                        acc[r][lane] += w[half * 16 + lane] * x[half * 16 + lane];
                    }
                }
            }
        }
    }
    for t in 0..n {
        for r in 0..STRIP {
            sums[t][r] = acc[t][r].iter().sum();
        }
    }
    n
}

/// Returns the name of the kernels.
pub fn describe(isa: Isa) -> &'static str {
    match isa {
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2",
        Isa::Portable => "portable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{DType, RawTensor};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// Returns random, finite blocks of a type.
    fn random_tensor(dtype: DType, rows: usize, cols: usize, rng: &mut StdRng) -> Vec<u8> {
        let blocks = rows * cols / dtype.block_elements();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| rng.random()).collect();
            let half = |rng: &mut StdRng| half::f16::from_f32(rng.random_range(-0.1..0.1)).to_le_bytes();
            match dtype {
                DType::F32 => block = rng.random_range(-1.0f32..1.0).to_le_bytes().to_vec(),
                DType::F16 => block = half(rng).to_vec(),
                DType::BF16 => {
                    block = half::bf16::from_f32(rng.random_range(-1.0..1.0)).to_le_bytes().to_vec()
                }
                DType::Q6_K => block[208..210].copy_from_slice(&half(rng)),
                _ => {
                    block[..2].copy_from_slice(&half(rng));
                    if !matches!(dtype, DType::Q4_0 | DType::Q5_0 | DType::Q8_0) {
                        block[2..4].copy_from_slice(&half(rng));
                    }
                }
            }
            bytes.extend(block);
        }
        bytes
    }

    #[test]
    fn every_type_and_kernel_agrees_with_the_dequantised_matrix() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut pool = Pool::new(2).unwrap();
        use DType::*;
        for dtype in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K] {
            // More columns than a chunk of the dense kernels.
            let (rows, cols) = (13, 1024);
            let bytes = random_tensor(dtype, rows, cols, &mut rng);
            let tensor = RawTensor { dtype, shape: vec![rows, cols], bytes: &bytes };
            let packed = PackedMatrix::new(&(0..rows).map(|r| (&tensor, r)).collect::<Vec<_>>());
            let dense = tensor.to_f32();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                packed.row(r, &mut row);
                for (a, b) in row.iter().zip(&dense[r * cols..]) {
                    assert!(
                        (a - b).abs() <= 1e-6 * b.abs().max(1e-3),
                        "{dtype:?} row {r}: got {a}, expected {b}"
                    );
                }
            }
            // 211 tokens are enough to be distributed to several threads.
            for tokens in (1..=16).chain([23, 24, 25, 31, 211]) {
                let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
                for isa in Isa::available() {
                    let p = MatMul { w: &packed, x: &x, ldx: cols, tokens, ldy: rows + 2, add: true };
                    let mut y = vec![1.0; tokens * (rows + 2)];
                    matmul(isa, &mut pool, &p, &mut y);
                    for t in 0..tokens {
                        for r in 0..rows {
                            let terms = || {
                                (0..cols).map(|c| f64::from(dense[r * cols + c]) * f64::from(x[t * cols + c]))
                            };
                            let want: f64 = 1.0 + terms().sum::<f64>();
                            let scale: f64 = 1.0 + terms().map(f64::abs).sum::<f64>();
                            let got = f64::from(y[t * (rows + 2) + r]);
                            assert!(
                                (got - want).abs() < 1e-6 * scale,
                                "{dtype:?} {isa:?} tokens {tokens} t {t} r {r}: got {got}, expected {want}"
                            );
                        }
                        assert_eq!(y[t * (rows + 2) + rows], 1.0, "wrote beyond its rows");
                    }
                }
            }
        }
    }

    #[test]
    fn batched_and_unbatched_products_are_equal_bit_by_bit() {
        let mut rng = StdRng::seed_from_u64(8);
        let mut pool = Pool::new(2).unwrap();
        for (dtype, cols) in [
            (DType::Q4_1, 576),
            (DType::Q4_K, 2048),
            (DType::Q8_0, 1536),
            (DType::F32, 100),
            (DType::F32, 900),
            (DType::BF16, 70),
        ] {
            let rows = 62;
            let bytes = random_tensor(dtype, rows, cols, &mut rng);
            let tensor = RawTensor { dtype, shape: vec![rows, cols], bytes: &bytes };
            let packed = PackedMatrix::new(&(0..rows).map(|r| (&tensor, r)).collect::<Vec<_>>());
            for tokens in [29, 211] {
                let ldx = packed.tiles() * TILE;
                let mut x = vec![0.0; tokens * ldx];
                for t in 0..tokens {
                    x[t * ldx..][..cols].fill_with(|| rng.random_range(-1.0..1.0));
                }
                for isa in Isa::available() {
                    let run = |pool: &mut Pool, x: &[f32], tokens: usize| {
                        let mut y = vec![0.0; tokens * rows];
                        matmul(
                            isa,
                            pool,
                            &MatMul { w: &packed, x, ldx, tokens, ldy: rows, add: false },
                            &mut y,
                        );
                        y
                    };
                    let together = run(&mut pool, &x, tokens);
                    for t in 0..tokens {
                        let alone = run(&mut pool, &x[t * ldx..][..ldx], 1);
                        assert_eq!(alone, together[t * rows..][..rows], "{dtype:?} {isa:?} token {t}");
                    }
                }
            }
        }
    }
}
