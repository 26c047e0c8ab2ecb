//! Matrix products of packed weights and f32 activations, with the vector kernels of the processor at hand.
//!
//! Input: a [`Packed`] matrix, activations `[tokens][ldx]` (zero beyond `cols`). Output: `[tokens][ldy]`,
//! set or added to. Weights are decoded in registers to the very f32 values they stand for and multiplied
//! in f32, and each output is summed in the same order whatever the batch: a batched product equals the
//! unbatched one bit for bit. Called by the native backend through [`Isa`], chosen once at start-up.

use std::{cell::RefCell, ops::Range};

use super::aligned::AlignedF32;
use super::packed::{Format, Packed, STRIP, TILE, decode_row};
use super::pool::Pool;

mod ahead;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Instruction sets with kernels of their own.
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
    /// The best that this processor has; `LB_CPU_ISA` (avx512, avx2, portable) can lower it.
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

    /// Sets that this processor can run, best first; for tests.
    pub fn available() -> Vec<Self> {
        let all = [Self::Avx512, Self::Avx2, Self::Portable];
        let best = all.iter().position(|i| *i == Self::best()).unwrap_or(2);
        all[best..].to_vec()
    }
}

/// Tokens whose activations are kept in the first-level cache while the weights stream by.
const TOKEN_BLOCK: usize = 24;

/// Tiles of a strip, or of a part of it.
#[derive(Clone, Copy)]
pub struct Strip<'a> {
    /// Layout of its tiles.
    pub format: Format,
    /// Its values.
    pub values: &'a [u8],
    /// Its scales.
    pub scales: &'a [u8],
}

/// Tiles of a chunk where eight tokens or so, the whole of long rows, would not stay in the first-level cache.
const CHUNK: usize = 24;
/// Strips that take a chunk of columns in turn.
const TURN: usize = 4;
/// Values of the sums of one strip that rest between chunks: a vector of 16 per row and token.
const RESTING: usize = STRIP * 12 * 16;

/// Some columns of a strip, and where its sums rest between them.
pub struct Chunk<'a> {
    /// The tiles.
    pub tiles: Range<usize>,
    /// Room for the sums; none is needed where the tiles are all.
    pub rest: &'a mut [f32],
}

thread_local! {
    static REST: RefCell<AlignedF32> = RefCell::default();
}

/// What a packed kernel gives: totals of a strip's rows for up to twelve tokens.
type Sums = [[f32; STRIP]; 12];

fn packed_strip(w: &Packed, strip: usize) -> Strip<'_> {
    let (values, scales) = w.strip(strip);
    Strip { format: w.format, values, scales }
}

/// A mutable buffer that several threads write at disjoint places.
#[derive(Clone, Copy)]
pub struct SharedOut(pub *mut f32, pub usize);

// SAFETY: the threads of one job write disjoint elements: each caller states which.
unsafe impl Sync for SharedOut {}
// SAFETY: as above.
unsafe impl Send for SharedOut {}

impl SharedOut {
    /// Over a slice that nobody else touches while the job runs.
    pub fn new(slice: &mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// An address within the buffer.
    pub fn at(&self, index: usize) -> *const f32 {
        assert!(index < self.1, "value {index} of a buffer of {}", self.1);
        // SAFETY: in bounds by the assertion.
        unsafe { self.0.add(index) }
    }

    /// Part of the buffer.
    ///
    /// # Safety
    /// No other thread may use an overlapping part while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the point of the type: disjoint parts, one per thread")]
    pub unsafe fn part(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1, "part {start}+{len} of a buffer of {}", self.1);
        // SAFETY: in bounds by the assertion, disjoint by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// Operands of a product: `y[t][row] (+)= Σ_c w[row][c] · x[t][c]`.
pub struct Product<'a> {
    /// Weights.
    pub w: &'a Packed,
    /// Activations, rows of `ldx` values of which those beyond `w.cols` are zero up to a multiple of 32.
    pub x: &'a [f32],
    /// Distance between tokens in `x`.
    pub ldx: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Distance between tokens in the output.
    pub ldy: usize,
    /// Add to the output rather than set it.
    pub add: bool,
}

/// Runs a product on the pool's threads.
pub fn product(isa: Isa, pool: &mut Pool, p: &Product<'_>, y: &mut [f32]) {
    assert!(p.ldx >= p.w.tiles() * TILE && p.x.len() >= p.tokens * p.ldx, "activations too short");
    assert!(p.ldy >= p.w.rows && y.len() >= (p.tokens.max(1) - 1) * p.ldy + p.w.rows, "output too short");
    if p.tokens == 0 {
        return;
    }
    let out = SharedOut::new(y);
    if p.tokens >= ahead::FROM && isa != Isa::Portable {
        return ahead::product(isa, pool, p, out);
    }
    let strips = p.w.strips();
    // Enough parts to even out threads of unequal speed, few enough that taking one costs nothing.
    let parts = (pool.threads() * 8).min(strips);
    let in_chunks = isa == Isa::Avx512 && p.tokens > 6 && p.w.tiles() > CHUNK;
    pool.run(parts, &|part| {
        let strips = strips * part / parts..strips * (part + 1) / parts;
        if in_chunks {
            return REST.with_borrow_mut(|rest| strips_in_chunks(isa, p, strips, rest, out));
        }
        let mut from = 0;
        while from < p.tokens {
            let n = TOKEN_BLOCK.min(p.tokens - from);
            for strip in strips.clone() {
                let whole = Chunk { tiles: 0..p.w.tiles(), rest: &mut [] };
                strip_product(isa, p, strip, from..from + n, whole, out);
            }
            from += n;
        }
    });
}

/// All tokens, at most twelve, through some strips: a few strips take the first chunk of columns, then the
/// same the next, so that the activations are in the first-level cache for all but one of them.
fn strips_in_chunks(isa: Isa, p: &Product<'_>, strips: Range<usize>, rest: &mut AlignedF32, out: SharedOut) {
    rest.need(TURN * RESTING);
    let tiles = p.w.tiles();
    for turn in strips.clone().step_by(TURN) {
        for first in (0..tiles).step_by(CHUNK) {
            let chunk = first..(first + CHUNK).min(tiles);
            for (strip, rest) in (turn..strips.end.min(turn + TURN)).zip(rest.chunks_exact_mut(RESTING)) {
                strip_product(isa, p, strip, 0..p.tokens, Chunk { tiles: chunk.clone(), rest }, out);
            }
        }
    }
}

/// One strip for some tokens. Writes rows `strip·4..` of those tokens only, and those with the last chunk.
fn strip_product(
    isa: Isa,
    p: &Product<'_>,
    strip: usize,
    tokens: Range<usize>,
    chunk: Chunk<'_>,
    out: SharedOut,
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
                let chunk = Chunk { tiles: chunk.tiles.clone(), rest: &mut *chunk.rest };
                // SAFETY: `Isa::best` saw the features; `product` checked that x holds these tokens.
                unsafe { x86::strip_avx512(p, weights, t, left, chunk, &mut sums) }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::strip_avx2(p, weights, t, left, &mut sums) },
            _ => strip_portable(p, weights, t, left, &mut sums),
        };
        for (i, sums) in sums.iter().enumerate().take(if is_last { step } else { 0 }) {
            // SAFETY: these rows of token t + i belong to this strip, which one thread works on.
            let y = unsafe { out.part((t + i) * p.ldy + strip * STRIP, rows) };
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = if p.add { *y + sum } else { *sum };
            }
        }
        t += step;
    }
}

fn strip_portable(p: &Product<'_>, strip: Strip<'_>, from: usize, left: usize, sums: &mut Sums) -> usize {
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

/// Name of the kernel path, for logs and docs.
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

    /// Random but finite blocks of a type.
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
            // Columns beyond a chunk of the kernels that decode ahead.
            let (rows, cols) = (13, 1024);
            let bytes = random_tensor(dtype, rows, cols, &mut rng);
            let tensor = RawTensor { dtype, shape: vec![rows, cols], bytes: &bytes };
            let packed = Packed::new(&(0..rows).map(|r| (&tensor, r)).collect::<Vec<_>>());
            let dense = tensor.to_f32();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                packed.row(r, &mut row);
                for (a, b) in row.iter().zip(&dense[r * cols..]) {
                    assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-3), "{dtype:?} row {r}: {a} is not {b}");
                }
            }
            // The last: enough to be shared out among threads.
            for tokens in (1..=16).chain([23, 24, 25, 31, 211]) {
                let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
                for isa in Isa::available() {
                    let p = Product { w: &packed, x: &x, ldx: cols, tokens, ldy: rows + 2, add: true };
                    let mut y = vec![1.0; tokens * (rows + 2)];
                    product(isa, &mut pool, &p, &mut y);
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
                                "{dtype:?} {isa:?} tokens {tokens} t {t} r {r}: {got} is not {want}"
                            );
                        }
                        assert_eq!(y[t * (rows + 2) + rows], 1.0, "wrote beyond its rows");
                    }
                }
            }
        }
    }

    #[test]
    fn a_batch_gives_the_same_bits_as_its_members() {
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
            let packed = Packed::new(&(0..rows).map(|r| (&tensor, r)).collect::<Vec<_>>());
            for tokens in [29, 211] {
                let ldx = packed.tiles() * TILE;
                let mut x = vec![0.0; tokens * ldx];
                for t in 0..tokens {
                    x[t * ldx..][..cols].fill_with(|| rng.random_range(-1.0..1.0));
                }
                for isa in Isa::available() {
                    let run = |pool: &mut Pool, x: &[f32], tokens: usize| {
                        let mut y = vec![0.0; tokens * rows];
                        product(
                            isa,
                            pool,
                            &Product { w: &packed, x, ldx, tokens, ldy: rows, add: false },
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
