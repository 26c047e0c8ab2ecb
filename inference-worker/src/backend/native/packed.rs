//! Weight matrices in the layout of the native kernels.
//!
//! A matrix consists of strips of 4 rows, and a strip of tiles of 4 rows × 32 columns. A tile is decoded to eight
//! vectors of 16 f32 (row 0 columns 0–15, row 0 columns 16–31, row 1 …), and its bytes are ordered for decoding with
//! few instructions. Quantised values stay as they are in the file, without rounding or quantising again, so that
//! products equal those of the dequantised f32 matrix.
//!
//! Input: tensors of the file. Output: [`PackedMatrix`], which `kernels` reads.

use half::f16;

use crate::weights::{
    DType, RawTensor,
    dtype::{f16_at, k_scale_min, q6_k_values},
};

/// Rows per strip.
pub const STRIP: usize = 4;
/// Columns per tile.
pub const TILE: usize = 32;

/// Storage format of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Format {
    /// 4-bit values q, where weight = q·d + m. d and m are f16: 4 d, then 4 m, one per row.
    /// Dword i of the 64 bytes contains lane i of all eight vectors, vector j in bits 4j..4j+4.
    Q4F16 = 0,
    /// As `Q4F16`, with d and m as f32.
    Q4F32 = 1,
    /// Signed 8-bit values in row-major order; one f16 scale per row.
    Q8F16 = 2,
    /// Signed 8-bit values; one f32 scale per row and half row (16 columns).
    Q8F32 = 3,
    /// bf16 in row-major order.
    BF16 = 4,
    /// f16 in row-major order.
    F16 = 5,
    /// f32 in row-major order.
    F32 = 6,
}

impl Format {
    /// Returns the bytes of a tile's values.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Self::Q4F16 | Self::Q4F32 => 64,
            Self::Q8F16 | Self::Q8F32 => 128,
            Self::BF16 | Self::F16 => 256,
            Self::F32 => 512,
        }
    }

    /// Returns the bytes of a tile's scales.
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::Q4F16 => 16,
            Self::Q4F32 | Self::Q8F32 => 32,
            Self::Q8F16 => 8,
            Self::BF16 | Self::F16 | Self::F32 => 0,
        }
    }

    fn for_dtype(dtype: DType) -> Self {
        match dtype {
            DType::Q4_0 | DType::Q4_1 => Self::Q4F16,
            DType::Q4_K => Self::Q4F32,
            DType::Q8_0 => Self::Q8F16,
            DType::Q6_K => Self::Q8F32,
            DType::BF16 => Self::BF16,
            DType::F16 => Self::F16,
            // 5-bit types are rare, so they have no packed format and take the memory of f32.
            DType::F32 | DType::Q5_0 | DType::Q5_1 | DType::Q5_K => Self::F32,
        }
    }
}

/// Bytes aligned to a cache line.
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl AlignedBytes {
    /// Creates `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `lines` is initialised, contiguous, and at least `len` bytes long.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A packed matrix.
pub struct PackedMatrix {
    /// Rows: output features.
    pub rows: usize,
    /// Columns: input features.
    pub cols: usize,
    /// Format of its tiles.
    pub format: Format,
    values: AlignedBytes,
    scales: AlignedBytes,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({} x {}, {:?})", self.rows, self.cols, self.format)
    }
}

/// A row to pack: its tensor, and its index there.
type Source<'a> = (&'a RawTensor<'a>, usize);

impl PackedMatrix {
    /// Packs rows of one or more tensors of equal width. If their types differ, all become f32.
    pub fn new(rows: &[Source<'_>]) -> Self {
        let first = rows[0].0;
        let same = rows.iter().all(|(t, _)| t.dtype == first.dtype);
        let cols = first.shape.last().copied().unwrap_or(0);
        let format = if same { Format::for_dtype(first.dtype) } else { Format::F32 };
        let aligned_cols = cols.is_multiple_of(TILE);
        let format =
            if aligned_cols || matches!(format, Format::BF16 | Format::F16) { format } else { Format::F32 };
        let tiles = rows.len().div_ceil(STRIP) * cols.div_ceil(TILE);
        let mut packed = Self {
            rows: rows.len(),
            cols,
            format,
            values: AlignedBytes::zeroed(tiles * format.tile_bytes()),
            scales: AlignedBytes::zeroed(tiles * format.scale_bytes()),
        };
        for (row, (tensor, source)) in rows.iter().enumerate() {
            packed.put_row(row, tensor, *source);
        }
        packed
    }

    /// Packs a row-major f32 matrix.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensor = RawTensor { dtype: DType::F32, shape: vec![rows, cols], bytes: &bytes };
        Self::new(&(0..rows).map(|r| (&tensor, r)).collect::<Vec<_>>())
    }

    /// Returns the number of tiles per strip.
    pub fn tiles(&self) -> usize {
        self.cols.div_ceil(TILE)
    }

    /// Returns the number of strips.
    pub fn strips(&self) -> usize {
        self.rows.div_ceil(STRIP)
    }

    /// Returns values and scales of a strip.
    pub fn strip(&self, strip: usize) -> (&[u8], &[u8]) {
        let (v, s) = (self.tiles() * self.format.tile_bytes(), self.tiles() * self.format.scale_bytes());
        (&self.values.bytes()[strip * v..][..v], &self.scales.bytes()[strip * s..][..s])
    }

    /// Returns the values of a strip in `Format::F32`.
    pub fn strip_f32(&self, strip: usize) -> &[f32] {
        assert_eq!(self.format, Format::F32, "only f32 can be read without decoding");
        let values = self.strip(strip).0;
        // SAFETY: the bytes are those of f32 values, and strips start at multiples of 512 bytes of an
        // aligned buffer.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len() / size_of::<f32>()) }
    }

    /// Returns the number of bytes.
    pub fn bytes(&self) -> usize {
        self.values.len + self.scales.len
    }

    /// Dequantises one row, for embeddings.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (values, scales) = self.strip(row / STRIP);
        let (vb, sb) = (self.format.tile_bytes(), self.format.scale_bytes());
        for (tile, chunk) in out[..self.cols].chunks_mut(TILE).enumerate() {
            let decoded =
                decode_row(self.format, &values[tile * vb..][..vb], &scales[tile * sb..][..sb], row % STRIP);
            chunk.copy_from_slice(&decoded[..chunk.len()]);
        }
    }

    /// Writes one row.
    fn put_row(&mut self, row: usize, tensor: &RawTensor<'_>, source: usize) {
        let bytes_per_row =
            tensor.dtype.bytes_for(self.cols).expect("loaders reject rows that are not whole blocks");
        let bytes = &tensor.bytes[source * bytes_per_row..][..bytes_per_row];
        let (strip, r) = (row / STRIP, row % STRIP);
        let (vb, sb, tiles) = (self.format.tile_bytes(), self.format.scale_bytes(), self.tiles());
        let values = &mut self.values.bytes_mut()[strip * tiles * vb..][..tiles * vb];
        let scales = &mut self.scales.bytes_mut()[strip * tiles * sb..][..tiles * sb];
        let mut dense = vec![0.0f32; tiles * TILE];
        if self.format == Format::F32 {
            tensor.dtype.dequantise(bytes, &mut dense[..self.cols]);
        }
        for tile in 0..tiles {
            let v = &mut values[tile * vb..][..vb];
            let s = &mut scales[tile * sb..][..sb];
            match tensor.dtype {
                _ if self.format == Format::F32 => {
                    for c in 0..TILE {
                        v[(r * TILE + c) * 4..][..4].copy_from_slice(&dense[tile * TILE + c].to_le_bytes());
                    }
                }
                DType::BF16 | DType::F16 => {
                    let part = &bytes[tile * TILE * 2..(tile * TILE * 2 + TILE * 2).min(bytes.len())];
                    v[r * TILE * 2..][..part.len()].copy_from_slice(part);
                }
                DType::Q8_0 => {
                    let block = &bytes[tile * 34..][..34];
                    v[r * TILE..][..TILE].copy_from_slice(&block[2..]);
                    s[r * 2..][..2].copy_from_slice(&block[..2]);
                }
                DType::Q4_0 | DType::Q4_1 => put_q4(v, s, r, tensor.dtype, bytes, tile),
                DType::Q4_K => put_q4_k(v, s, r, bytes, tile),
                DType::Q6_K => put_q6_k(v, s, r, bytes, tile),
                DType::F32 | DType::Q5_0 | DType::Q5_1 | DType::Q5_K => unreachable!("packed as f32"),
            }
        }
    }
}

/// Stores the 32 nibbles of row `r`: column c goes to lane c % 16 of vector 2r + c / 16.
fn put_nibbles(v: &mut [u8], r: usize, nibble: impl Fn(usize) -> u8) {
    for c in 0..TILE {
        let vector = 2 * r + c / 16;
        v[(c % 16) * 4 + vector / 2] |= nibble(c) << (4 * (vector % 2));
    }
}

fn put_q4(v: &mut [u8], s: &mut [u8], r: usize, dtype: DType, bytes: &[u8], tile: usize) {
    let size = dtype.block_bytes();
    let block = &bytes[tile * size..][..size];
    let (head, qs) = block.split_at(size - 16);
    put_nibbles(v, r, |c| if c < 16 { qs[c] & 15 } else { qs[c - 16] >> 4 });
    s[r * 2..][..2].copy_from_slice(&head[..2]);
    // Q4_0 is (q - 8)·d: its minimum −8·d is exact in f16 (a shift of the exponent).
    let min = if dtype == DType::Q4_1 {
        [head[2], head[3]]
    } else {
        f16::from_f32(-8.0 * f16_at(head, 0)).to_le_bytes()
    };
    s[8 + r * 2..][..2].copy_from_slice(&min);
}

fn put_q4_k(v: &mut [u8], s: &mut [u8], r: usize, bytes: &[u8], tile: usize) {
    let (block, sub) = (&bytes[tile / 8 * 144..][..144], tile % 8);
    let (sc, m) = k_scale_min(sub, &block[4..16]);
    let qs = &block[16 + sub / 2 * 32..][..32];
    put_nibbles(v, r, |c| if sub % 2 == 0 { qs[c] & 15 } else { qs[c] >> 4 });
    s[r * 4..][..4].copy_from_slice(&(f16_at(block, 0) * f32::from(sc)).to_le_bytes());
    s[16 + r * 4..][..4].copy_from_slice(&(-f16_at(block, 2) * f32::from(m)).to_le_bytes());
}

fn put_q6_k(v: &mut [u8], s: &mut [u8], r: usize, bytes: &[u8], tile: usize) {
    let (block, sub) = (&bytes[tile / 8 * 210..][..210], tile % 8);
    let q = q6_k_values(block);
    for c in 0..TILE {
        v[r * TILE + c] = q[sub * 32 + c] as u8;
    }
    for half in 0..2 {
        let scale = f16_at(block, 208) * f32::from(block[192 + sub * 2 + half] as i8);
        s[(r * 2 + half) * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    }
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Decodes the 32 values of row `r` of a tile. The vector kernels must return the same values.
#[inline]
pub fn decode_row(format: Format, v: &[u8], s: &[u8], r: usize) -> [f32; TILE] {
    let mut out = [0.0; TILE];
    match format {
        Format::Q4F16 | Format::Q4F32 => {
            let (d, m) = if format == Format::Q4F16 {
                (f16_at(s, r * 2), f16_at(s, 8 + r * 2))
            } else {
                (f32_at(s, r * 4), f32_at(s, 16 + r * 4))
            };
            for (c, out) in out.iter_mut().enumerate() {
                let vector = 2 * r + c / 16;
                let q = (v[(c % 16) * 4 + vector / 2] >> (4 * (vector % 2))) & 15;
                *out = f32::from(q) * d + m;
            }
        }
        Format::Q8F16 | Format::Q8F32 => {
            for (c, out) in out.iter_mut().enumerate() {
                let scale =
                    if format == Format::Q8F16 { f16_at(s, r * 2) } else { f32_at(s, (r * 2 + c / 16) * 4) };
                *out = f32::from(v[r * TILE + c] as i8) * scale;
            }
        }
        Format::BF16 => DType::BF16.dequantise(&v[r * TILE * 2..][..TILE * 2], &mut out),
        Format::F16 => DType::F16.dequantise(&v[r * TILE * 2..][..TILE * 2], &mut out),
        Format::F32 => DType::F32.dequantise(&v[r * TILE * 4..][..TILE * 4], &mut out),
    }
    out
}
