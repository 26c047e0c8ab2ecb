//! Buffers aligned to cache lines, so that vector loads and stores never cross a line.
//!
//! The native backend uses [`AlignedF32`] for activations, decoded weights and the KV cache.

use std::ops::{Deref, DerefMut};

/// Values per cache line.
const LINE: usize = 16;

/// `f32` values that start at a multiple of 64 bytes.
#[derive(Default)]
pub struct AlignedF32 {
    /// Up to `LINE` - 1 unused values, then the values.
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl AlignedF32 {
    /// Creates `len` zeros. The kernel allocates memory only for pages that are written.
    pub fn zeroed(len: usize) -> Self {
        let values = vec![0.0f32; len + LINE - 1];
        let start = values.as_ptr().align_offset(LINE * size_of::<f32>());
        assert!(start < LINE, "f32 values are aligned to their size");
        Self { values, start, len }
    }

    /// Ensures space for at least `len` values. If the buffer grows, all values become zero.
    pub fn ensure_len(&mut self, len: usize) {
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
    fn buffers_are_aligned_and_become_zero_when_they_grow() {
        let mut buffer = AlignedF32::default();
        assert!(buffer.is_empty());
        for len in [1, 3, 16, 1000, 100_003] {
            buffer.ensure_len(len);
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % 64), (len, 0));
            assert!(buffer.iter().all(|v| *v == 0.0));
            buffer.fill(1.0);
            buffer.ensure_len(len - 1);
            assert!(buffer.len() == len && buffer.iter().all(|v| *v == 1.0));
        }
    }
}
