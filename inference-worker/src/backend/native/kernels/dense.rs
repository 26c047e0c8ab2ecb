//! Products of many tokens. Weights are decoded to f32 once per step instead of once per few tokens.
//!
//! A thread decodes as many strips as fit into half of its L2 cache. Then it multiplies them with a few tokens at a
//! time, while it prefetches the next tokens. Long rows are processed in column chunks, so that the activations of
//! these tokens stay in the L1 cache; partial sums are kept in memory between chunks. Many tokens are distributed to
//! the threads as the pool distributes them in the other operations, so that a thread reads activations that it has
//! written itself and that are still in its cache. Each output is added in the order of the packed kernels, so that
//! the results are equal bit by bit. Called by [`super::matmul`].

use std::{cell::RefCell, ops::Range};

#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    super::{aligned::AlignedF32, packed::Format},
    Isa, MatMul, Pool, STRIP, SharedOutput, Strip, TILE, packed_strip,
};

/// Minimum number of tokens for which these kernels are faster.
pub const MIN_TOKENS: usize = 13;
/// Values that a thread decodes at once: 1 MiB, half of a common L2 cache.
const MAX_DECODED: usize = 1 << 18;
/// Tiles per column chunk: the activations of six tokens take 18 KiB of the L1 cache, a strip 12 KiB.
const CHUNK_TILES: usize = 24;
/// Maximum number of tokens per kernel call.
const MAX_TOKENS: usize = 6;
/// Minimum number of tokens per group of threads: with fewer, decoding the weights in each group takes more than 3 %
/// of the time.
const MIN_TOKENS_PER_GROUP: usize = 96;
/// Parts per thread, to balance threads of different speed.
const PARTS: usize = 8;
/// Values of the partial sums of a strip: a vector of 16 per row and token.
const PARTIAL_SUMS_LEN: usize = STRIP * MAX_TOKENS * 16;

thread_local! {
    /// Decoded weights and partial sums of the part that a thread computes.
    static SCRATCH: RefCell<(AlignedF32, AlignedF32)> = RefCell::default();
}

/// Inputs of a dense kernel: one column chunk of one strip, and a few tokens.
pub struct DenseChunk<'a> {
    /// Tiles of the chunk, in the layout of `Format::F32`.
    pub w: &'a [f32],
    /// Activations, from the chunk's first column of the first token on.
    pub x: &'a [f32],
    /// Distance between the rows of `x`.
    pub ldx: usize,
    /// Sums of the chunks before this one.
    pub partial_sums: &'a mut [f32],
    /// Whether this is the first chunk, which starts from zero.
    pub is_first: bool,
    /// Whether this is the last chunk, which writes the totals.
    pub is_last: bool,
}

/// Sums of a strip's rows for each token.
pub type Totals = [[f32; STRIP]; MAX_TOKENS];

/// Computes a product that [`super::matmul`] has checked.
pub fn matmul(isa: Isa, pool: &mut Pool, p: &MatMul<'_>, out: SharedOutput) {
    let (strips, tiles) = (p.w.strips(), p.w.tiles());
    let strip_values = tiles * STRIP * TILE;
    let fitting = (MAX_DECODED / strip_values).max(1);
    let step = if isa == Isa::Avx512 { MAX_TOKENS } else { 4 };
    let steps = p.tokens.div_ceil(step);
    let groups = pool.threads().min(p.tokens / MIN_TOKENS_PER_GROUP).max(1);
    let parts = (pool.threads() * PARTS / groups).max(strips.div_ceil(fitting)).min(strips);
    // All parts of the first group of tokens, then those of the second, and so on.
    pool.run(groups * parts, &|item| {
        let (group, part) = (item / parts, item % parts);
        let range = strips * part / parts..strips * (part + 1) / parts;
        let tokens = steps * group / groups * step..(steps * (group + 1) / groups * step).min(p.tokens);
        SCRATCH.with_borrow_mut(|(decoded, partial_sums)| {
            partial_sums.ensure_len(range.len() * PARTIAL_SUMS_LEN);
            if p.w.format != Format::F32 {
                decoded.ensure_len(range.len() * strip_values);
                let strips = range.clone().map(|strip| packed_strip(p.w, strip));
                strips.zip(decoded.chunks_exact_mut(strip_values)).for_each(|(s, to)| decode(isa, s, to));
            }
            for from in tokens.clone().step_by(step) {
                let tokens = from..(from + step).min(tokens.end);
                multiply(isa, p, range.clone(), tokens, decoded, partial_sums, out);
            }
        });
    });
}

/// Multiplies the strips of a part with a few tokens.
fn multiply(
    isa: Isa,
    p: &MatMul<'_>,
    strips: Range<usize>,
    tokens: Range<usize>,
    decoded: &[f32],
    partial_sums: &mut [f32],
    out: SharedOutput,
) {
    let tiles = p.w.tiles();
    let mut prefetch = Prefetch::new(p, &strips, &tokens);
    for first in (0..tiles).step_by(CHUNK_TILES) {
        let chunk = first * STRIP * TILE..(first + CHUNK_TILES).min(tiles) * STRIP * TILE;
        for (i, (strip, partial_sums)) in
            strips.clone().zip(partial_sums.chunks_exact_mut(PARTIAL_SUMS_LEN)).enumerate()
        {
            prefetch.advance();
            let w = match p.w.format {
                Format::F32 => p.w.strip_f32(strip),
                _ => &decoded[i * tiles * STRIP * TILE..],
            };
            let x = &p.x[tokens.start * p.ldx + first * TILE..];
            let (is_first, is_last) = (first == 0, first + CHUNK_TILES >= tiles);
            let chunk = DenseChunk { w: &w[chunk.clone()], x, ldx: p.ldx, partial_sums, is_first, is_last };
            let mut totals = Totals::default();
            if is_last {
                prefetch_output(p, strip, &tokens, out);
            }
            run_kernel(isa, chunk, tokens.len(), &mut totals);
            if is_last {
                write(p, strip, tokens.clone(), &totals, out);
            }
        }
    }
}

/// Prefetches the output of a strip for writing, while its totals are computed.
fn prefetch_output(p: &MatMul<'_>, strip: usize, tokens: &Range<usize>, out: SharedOutput) {
    #[cfg(target_arch = "x86_64")]
    for t in tokens.clone() {
        x86::prefetch_for_write(out.ptr(t * p.ldy + strip * STRIP));
    }
}

/// Writes the totals of a strip to the output.
fn write(p: &MatMul<'_>, strip: usize, tokens: Range<usize>, totals: &Totals, out: SharedOutput) {
    let rows = STRIP.min(p.w.rows - strip * STRIP);
    for (t, totals) in tokens.zip(totals) {
        // SAFETY: these rows of this token belong to this strip, which only this thread computes.
        let y = unsafe { out.slice(t * p.ldy + strip * STRIP, rows) };
        match <&mut [f32; STRIP]>::try_from(&mut *y) {
            Ok(y) if p.add => *y = std::array::from_fn(|i| y[i] + totals[i]),
            Ok(y) => *y = *totals,
            Err(_) => y.iter_mut().zip(totals).for_each(|(y, sum)| *y = if p.add { *y + sum } else { *sum }),
        }
    }
}

/// Prefetches the activations of the next tokens into the L2 cache, some lines with each strip. They come from the L3
/// cache or from the cache of another core.
struct Prefetch<'a> {
    lines: &'a [f32],
    per_call: usize,
}

impl<'a> Prefetch<'a> {
    fn new(p: &MatMul<'a>, strips: &Range<usize>, tokens: &Range<usize>) -> Self {
        let end = (tokens.end + tokens.len()).min(p.tokens);
        let lines = &p.x[tokens.end * p.ldx..end * p.ldx];
        let calls = strips.len() * p.w.tiles().div_ceil(CHUNK_TILES);
        Self { lines, per_call: lines.len().div_ceil(calls).next_multiple_of(16) }
    }

    /// Prefetches the next lines.
    fn advance(&mut self) {
        let (now, later) = self.lines.split_at(self.per_call.min(self.lines.len()));
        self.lines = later;
        #[cfg(target_arch = "x86_64")]
        for line in now.chunks(16) {
            x86::prefetch_l2(line);
        }
    }
}

/// Decodes a strip into the layout of `Format::F32`.
fn decode(isa: Isa, strip: Strip<'_>, to: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::best` detected the features; the lengths are those of the strip's tiles.
        Isa::Avx512 => unsafe { x86::decode_avx512(strip, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::decode_avx2(strip, to) },
        _ => unreachable!("the portable kernel has no dense variant"),
    }
}

fn run_kernel(isa: Isa, chunk: DenseChunk<'_>, tokens: usize, totals: &mut Totals) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::best` detected the features; `super::matmul` checked that x has these tokens.
        Isa::Avx512 => unsafe { x86::dense_avx512(chunk, tokens, totals) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::dense_avx2(chunk, tokens, totals) },
        _ => unreachable!("the portable kernel has no dense variant"),
    }
}
