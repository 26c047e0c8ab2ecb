//! Buffers that start at a cache line, so that no vector load or store straddles two.
//!
//! Input: lengths. Output: [`AlignedF32`], which the native backend keeps activations, decoded weights and
//! the KV cache in.

use std::ops::{Deref, DerefMut};

/// Values of a cache line.
const LINE: usize = 16;

/// `f32` values whose first lies at a multiple of 64 bytes.
#[derive(Default)]
pub struct AlignedF32 {
    /// The values, after fewer than [`LINE`] that are not used.
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl AlignedF32 {
    /// `len` zeros. The system gives memory only to pages that are written.
    pub fn zeroed(len: usize) -> Self {
        let values = vec![0.0f32; len + LINE - 1];
        let start = values.as_ptr().align_offset(LINE * size_of::<f32>());
        assert!(start < LINE, "f32 values lie at multiples of their size");
        Self { values, start, len }
    }

    /// Room for at least `len` values: as it is, or new and all zero.
    pub fn need(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }
}

impl Deref for AlignedF32 {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedF32 {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_at_a_cache_line_and_grows_to_zeros() {
        let mut buffer = AlignedF32::default();
        assert!(buffer.is_empty());
        for len in [1, 3, 16, 1000, 100_003] {
            buffer.need(len);
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % 64), (len, 0));
            assert!(buffer.iter().all(|v| *v == 0.0));
            buffer.fill(1.0);
            buffer.need(len - 1);
            assert!(buffer.len() == len && buffer.iter().all(|v| *v == 1.0));
        }
    }
}
