//! Sixteen f32 values side by side, in the registers of each instruction set.
//!
//! Loops over arrays are not kept in registers by the compiler when a function has many sums; code generic
//! over [`Lanes`] is. Every operation is the same per lane in each implementation, up to fused rounding.
//! Called by `attention`.

/// Sixteen values. The vector implementations may be used in functions compiled for their features only.
pub trait Lanes: Copy {
    /// Sixteen times `v`.
    ///
    /// # Safety
    /// The processor has the implementation's features.
    unsafe fn splat(v: f32) -> Self;
    /// The sixteen values at `from`.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; they can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes the sixteen values to `to`.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; they can be written.
    unsafe fn store(self, to: *mut f32);
    /// `self · by + plus`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self;
    /// `self · by`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn mul(self, by: Self) -> Self;
}

/// For any processor.
#[derive(Clone, Copy)]
pub struct Plain([f32; 16]);

impl Lanes for Plain {
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Self([v; 16])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * by.0[i] + plus.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, by: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * by.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// One register.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY of all blocks below: what the trait asks of the caller.
    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_set1_ps(v) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_fmadd_ps(self.0, by.0, plus.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, by: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_mul_ps(self.0, by.0) })
        }
    }

    /// Two registers.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY of all blocks below: what the trait asks of the caller.
    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            // SAFETY: see above.
            let v = unsafe { _mm256_set1_ps(v) };
            Self(v, v)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm256_fmadd_ps(self.0, by.0, plus.0), _mm256_fmadd_ps(self.1, by.1, plus.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, by: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm256_mul_ps(self.0, by.0), _mm256_mul_ps(self.1, by.1)) }
        }
    }
}
