//! Products of many tokens: weights are decoded to f32 once per step rather than once per few tokens.
//!
//! A thread decodes as many strips as fit into half of its second-level cache, then takes a few tokens at a
//! time through all of them, while the next few are fetched. Long rows are cut into chunks of columns, so that
//! the activations of those tokens stay in the first-level cache; sums rest in memory between chunks. Many
//! tokens are shared out among threads, as the pool does for the steps between products: a thread then
//! reads what it has just written, not what is in another's cache. Each output is summed in the order of the
//! packed kernels, so the bits are the same. Called by [`super::product`].

use std::{cell::RefCell, ops::Range};

#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    super::{aligned::AlignedF32, packed::Format},
    Isa, Pool, Product, STRIP, SharedOut, Strip, TILE, packed_strip,
};

/// From so many tokens on decoding ahead pays.
pub const FROM: usize = 13;
/// Values that a thread decodes ahead: 1 MiB, half of a common second-level cache.
const DECODED: usize = 1 << 18;
/// Tiles of a chunk: the activations of six tokens take 18 KiB of the first-level cache, a strip 12.
const CHUNK: usize = 24;
/// Tokens taken at once at most.
const TOKENS: usize = 6;
/// Tokens for which decoding the weights once more costs little (3 %).
const TOKENS_PER_THREAD: usize = 96;
/// Parts per thread: enough to even out threads of unequal speed.
const PARTS: usize = 8;
/// Values of the sums of one strip: a vector of 16 per row and token.
const SUMS: usize = STRIP * TOKENS * 16;

thread_local! {
    /// Decoded weights, and unfinished sums, of the part that a thread works on.
    static SCRATCH: RefCell<(AlignedF32, AlignedF32)> = RefCell::default();
}

/// The operands of a dense kernel: one chunk of one strip, and a few tokens.
pub struct Dense<'a> {
    /// Tiles of the chunk, in the layout of `Format::F32`.
    pub w: &'a [f32],
    /// Activations from the first token and the chunk's first column on.
    pub x: &'a [f32],
    /// Distance between tokens in `x`.
    pub ldx: usize,
    /// Where sums rest between chunks.
    pub sums: &'a mut [f32],
    /// The first chunk starts from zero.
    pub is_first: bool,
    /// The last chunk adds lanes up.
    pub is_last: bool,
}

/// Totals of a strip's rows for each token.
pub type Totals = [[f32; STRIP]; TOKENS];

/// As [`super::product`], whose checks have passed.
pub fn product(isa: Isa, pool: &mut Pool, p: &Product<'_>, out: SharedOut) {
    let (strips, tiles) = (p.w.strips(), p.w.tiles());
    let strip_values = tiles * STRIP * TILE;
    let fitting = (DECODED / strip_values).max(1);
    let step = if isa == Isa::Avx512 { TOKENS } else { 4 };
    let groups = p.tokens.div_ceil(step);
    let shares = pool.threads().min(p.tokens / TOKENS_PER_THREAD).max(1);
    let parts = (pool.threads() * PARTS / shares).max(strips.div_ceil(fitting)).min(strips);
    // All parts of the first share of tokens, then those of the second, and so on.
    pool.run(shares * parts, &|item| {
        let (share, part) = (item / parts, item % parts);
        let range = strips * part / parts..strips * (part + 1) / parts;
        let tokens = groups * share / shares * step..(groups * (share + 1) / shares * step).min(p.tokens);
        SCRATCH.with_borrow_mut(|(decoded, sums)| {
            sums.need(range.len() * SUMS);
            if p.w.format != Format::F32 {
                decoded.need(range.len() * strip_values);
                let strips = range.clone().map(|strip| packed_strip(p.w, strip));
                strips.zip(decoded.chunks_exact_mut(strip_values)).for_each(|(s, to)| decode(isa, s, to));
            }
            for from in tokens.clone().step_by(step) {
                let few = from..(from + step).min(tokens.end);
                few_tokens(isa, p, range.clone(), few, decoded, sums, out);
            }
        });
    });
}

/// A few tokens through the strips of a part.
fn few_tokens(
    isa: Isa,
    p: &Product<'_>,
    strips: Range<usize>,
    tokens: Range<usize>,
    decoded: &[f32],
    sums: &mut [f32],
    out: SharedOut,
) {
    let tiles = p.w.tiles();
    let mut ahead = Fetch::new(p, &strips, &tokens);
    for first in (0..tiles).step_by(CHUNK) {
        let chunk = first * STRIP * TILE..(first + CHUNK).min(tiles) * STRIP * TILE;
        for (i, (strip, sums)) in strips.clone().zip(sums.chunks_exact_mut(SUMS)).enumerate() {
            ahead.some();
            let w = match p.w.format {
                Format::F32 => p.w.strip_f32(strip),
                _ => &decoded[i * tiles * STRIP * TILE..],
            };
            let x = &p.x[tokens.start * p.ldx + first * TILE..];
            let (is_first, is_last) = (first == 0, first + CHUNK >= tiles);
            let dense = Dense { w: &w[chunk.clone()], x, ldx: p.ldx, sums, is_first, is_last };
            let mut totals = Totals::default();
            if is_last {
                own(p, strip, &tokens, out);
            }
            run(isa, dense, tokens.len(), &mut totals);
            if is_last {
                write(p, strip, tokens.clone(), &totals, out);
            }
        }
    }
}

/// Asks for the cache lines that a strip's totals go to, while they are computed.
fn own(p: &Product<'_>, strip: usize, tokens: &Range<usize>, out: SharedOut) {
    #[cfg(target_arch = "x86_64")]
    for t in tokens.clone() {
        x86::fetch_to_write(out.at(t * p.ldy + strip * STRIP));
    }
}

fn write(p: &Product<'_>, strip: usize, tokens: Range<usize>, totals: &Totals, out: SharedOut) {
    let rows = STRIP.min(p.w.rows - strip * STRIP);
    for (t, totals) in tokens.zip(totals) {
        // SAFETY: these rows of this token belong to this strip, which one thread works on.
        let y = unsafe { out.part(t * p.ldy + strip * STRIP, rows) };
        match <&mut [f32; STRIP]>::try_from(&mut *y) {
            Ok(y) if p.add => *y = std::array::from_fn(|i| y[i] + totals[i]),
            Ok(y) => *y = *totals,
            Err(_) => y.iter_mut().zip(totals).for_each(|(y, sum)| *y = if p.add { *y + sum } else { *sum }),
        }
    }
}

/// Brings the activations of the tokens after these into the second-level cache, some lines with each strip:
/// they come from the third-level cache or from another core's.
struct Fetch<'a> {
    lines: &'a [f32],
    at_once: usize,
}

impl<'a> Fetch<'a> {
    fn new(p: &Product<'a>, strips: &Range<usize>, tokens: &Range<usize>) -> Self {
        let end = (tokens.end + tokens.len()).min(p.tokens);
        let lines = &p.x[tokens.end * p.ldx..end * p.ldx];
        let calls = strips.len() * p.w.tiles().div_ceil(CHUNK);
        Self { lines, at_once: lines.len().div_ceil(calls).next_multiple_of(16) }
    }

    fn some(&mut self) {
        let (now, later) = self.lines.split_at(self.at_once.min(self.lines.len()));
        self.lines = later;
        #[cfg(target_arch = "x86_64")]
        for line in now.chunks(16) {
            x86::fetch(line);
        }
    }
}

/// Decodes a strip into the layout of `Format::F32`.
fn decode(isa: Isa, strip: Strip<'_>, to: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::best` saw the features; the lengths are those of the strip's tiles.
        Isa::Avx512 => unsafe { x86::decode_avx512(strip, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::decode_avx2(strip, to) },
        _ => unreachable!("portable kernels decode as they go"),
    }
}

fn run(isa: Isa, dense: Dense<'_>, tokens: usize, totals: &mut Totals) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::best` saw the features; `super::product` checked that x holds these tokens.
        Isa::Avx512 => unsafe { x86::dense_avx512(dense, tokens, totals) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::dense_avx2(dense, tokens, totals) },
        _ => unreachable!("portable kernels decode as they go"),
    }
}
