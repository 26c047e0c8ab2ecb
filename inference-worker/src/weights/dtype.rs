//! Tensor element types of GGUF and safetensors files, and their dequantisation to f32.
//!
//! Input: little-endian bytes of whole blocks. Output: f32 values. Called by the backends when they load weights.
//! Block layouts follow the `block_*` structs of ggml-common.h.

use half::{bf16, f16};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
#[expect(missing_docs, reason = "the names are those of the GGML specification")]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl DType {
    /// Returns the type with GGML's number `id`, or None if it is not supported.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Returns GGML's name of a type number, for error messages.
    pub fn ggml_name(id: u32) -> &'static str {
        match id {
            0 => "F32",
            1 => "F16",
            2 => "Q4_0",
            3 => "Q4_1",
            6 => "Q5_0",
            7 => "Q5_1",
            8 => "Q8_0",
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            12 => "Q4_K",
            13 => "Q5_K",
            14 => "Q6_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            30 => "BF16",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => "unknown",
        }
    }

    /// Returns the number of elements per block.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Returns the number of bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Returns the bytes of `elements` values, or None if they are not a whole number of blocks.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        (elements.is_multiple_of(self.block_elements()))
            .then(|| (elements / self.block_elements()).checked_mul(self.block_bytes()))
            .flatten()
    }

    /// Dequantises whole blocks.
    ///
    /// # Panics
    /// If `src` does not have exactly `dst.len()` elements of this type.
    pub fn dequantise(self, src: &[u8], dst: &mut [f32]) {
        assert_eq!(
            Some(src.len()),
            self.bytes_for(dst.len()),
            "{self:?}: source and destination differ in length"
        );
        match self {
            Self::F32 => convert_each(src, dst, 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => convert_each(src, dst, 2, |b| f16_at(b, 0)),
            Self::BF16 => convert_each(src, dst, 2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            _ => {
                let blocks = src.chunks_exact(self.block_bytes());
                for (block, out) in blocks.zip(dst.chunks_exact_mut(self.block_elements())) {
                    match self {
                        Self::Q4_0 => q4_0(block, out),
                        Self::Q4_1 => q4_1(block, out),
                        Self::Q5_0 => q5_0(block, out),
                        Self::Q5_1 => q5_1(block, out),
                        Self::Q8_0 => q8_0(block, out),
                        Self::Q4_K => q4_k(block, out),
                        Self::Q5_K => q5_k(block, out),
                        Self::Q6_K => q6_k(block, out),
                        Self::F32 | Self::F16 | Self::BF16 => unreachable!("handled above"),
                    }
                }
            }
        }
    }
}

fn convert_each(src: &[u8], dst: &mut [f32], size: usize, read: impl Fn(&[u8]) -> f32) {
    for (bytes, out) in src.chunks_exact(size).zip(dst) {
        *out = read(bytes);
    }
}

/// Returns the f16 at byte `at` as f32.
pub(crate) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 0);
    for j in 0..16 {
        out[j] = (f32::from(b[2 + j] & 15) - 8.0) * d;
        out[j + 16] = (f32::from(b[2 + j] >> 4) - 8.0) * d;
    }
}

fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for j in 0..16 {
        out[j] = f32::from(b[4 + j] & 15) * d + m;
        out[j + 16] = f32::from(b[4 + j] >> 4) * d + m;
    }
}

/// Returns elements j and j + 16 of a Q5 block. Bit j of `qh` is the fifth bit of element j.
fn q5_values(qh: u32, qs: &[u8], j: usize) -> (f32, f32) {
    let lo = (qs[j] & 15) | ((((qh >> j) & 1) << 4) as u8);
    let hi = (qs[j] >> 4) | ((((qh >> (j + 16)) & 1) << 4) as u8);
    (f32::from(lo), f32::from(hi))
}

fn q5_0(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 0);
    let qh = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let (lo, hi) = q5_values(qh, &b[6..], j);
        out[j] = (lo - 16.0) * d;
        out[j + 16] = (hi - 16.0) * d;
    }
}

fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let qh = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let (lo, hi) = q5_values(qh, &b[8..], j);
        out[j] = lo * d + m;
        out[j + 16] = hi * d + m;
    }
}

fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 0);
    for (o, q) in out.iter_mut().zip(&b[2..]) {
        *o = f32::from(*q as i8) * d;
    }
}

/// Returns the 6-bit scale and minimum number `j` from the 12 packed bytes of a K block.
pub(crate) fn k_scale_min(j: usize, s: &[u8]) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    }
}

fn q4_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scales, qs) = (&b[4..16], &b[16..144]);
    for sub in 0..8 {
        let (sc, m) = k_scale_min(sub, scales);
        let (scale, min) = (d * f32::from(sc), dmin * f32::from(m));
        for l in 0..32 {
            let byte = qs[(sub / 2) * 32 + l];
            let q = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
            out[sub * 32 + l] = scale * f32::from(q) - min;
        }
    }
}

fn q5_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scales, qh, qs) = (&b[4..16], &b[16..48], &b[48..176]);
    for sub in 0..8 {
        let (sc, m) = k_scale_min(sub, scales);
        let (scale, min) = (d * f32::from(sc), dmin * f32::from(m));
        for l in 0..32 {
            let byte = qs[(sub / 2) * 32 + l];
            let low = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
            let q = low + (((qh[l] >> sub) & 1) << 4);
            out[sub * 32 + l] = scale * f32::from(q) - min;
        }
    }
}

/// Returns the 256 values (−32..=31) of a Q6_K block before scaling.
pub(crate) fn q6_k_values(b: &[u8]) -> [i8; 256] {
    let (ql, qh) = (&b[0..128], &b[128..192]);
    let mut q = [0i8; 256];
    for half in 0..2 {
        let (ql, qh, at) = (&ql[half * 64..], &qh[half * 32..], half * 128);
        for l in 0..32 {
            q[at + l] = ((ql[l] & 15) | ((qh[l] & 3) << 4)) as i8 - 32;
            q[at + l + 32] = ((ql[l + 32] & 15) | (((qh[l] >> 2) & 3) << 4)) as i8 - 32;
            q[at + l + 64] = ((ql[l] >> 4) | (((qh[l] >> 4) & 3) << 4)) as i8 - 32;
            q[at + l + 96] = ((ql[l + 32] >> 4) | ((qh[l] >> 6) << 4)) as i8 - 32;
        }
    }
    q
}

fn q6_k(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 208);
    for (i, q) in q6_k_values(b).iter().enumerate() {
        out[i] = d * f32::from(b[192 + i / 16] as i8) * f32::from(*q);
    }
}
