//! Sixteen f32 values in the registers of each instruction set.
//!
//! In a function with many sums, the compiler does not keep arrays in registers, but it keeps values that implement
//! [`Lanes`] there. All implementations compute the same per lane, except for the rounding of fused operations. Called
//! by `attention`.

/// Sixteen values. Use the vector implementations only in functions that are compiled for their features.
pub trait Lanes: Copy {
    /// Returns sixteen times `v`.
    ///
    /// # Safety
    /// The processor has the implementation's features.
    unsafe fn splat(v: f32) -> Self;
    /// Reads the sixteen values at `from`.
    ///
    /// # Safety
    /// As for [`Lanes::splat`]; the sixteen values are readable.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes the sixteen values to `to`.
    ///
    /// # Safety
    /// As for [`Lanes::splat`]; the sixteen values are writable.
    unsafe fn store(self, to: *mut f32);
    /// Returns `self · by + plus`.
    ///
    /// # Safety
    /// As for [`Lanes::splat`].
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self;
    /// Returns `self · by`.
    ///
    /// # Safety
    /// As for [`Lanes::splat`].
    unsafe fn mul(self, by: Self) -> Self;
}

/// An array, for any processor.
#[derive(Clone, Copy)]
pub struct PortableLanes([f32; 16]);

impl Lanes for PortableLanes {
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Self([v; 16])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as promised by the caller.
        Self(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as promised by the caller.
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
pub use x86::{Avx2Lanes, Avx512Lanes};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub struct Avx512Lanes(__m512);

    // SAFETY of all blocks below: the caller keeps the conditions of the trait.
    impl Lanes for Avx512Lanes {
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_set1_ps(v) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_fmadd_ps(self.0, by.0, plus.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, by: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_mul_ps(self.0, by.0) })
        }
    }

    /// Two AVX registers.
    #[derive(Clone, Copy)]
    pub struct Avx2Lanes(__m256, __m256);

    // SAFETY of all blocks below: the caller keeps the conditions of the trait.
    impl Lanes for Avx2Lanes {
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            // SAFETY: as above.
            let v = unsafe { _mm256_set1_ps(v) };
            Self(v, v)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_fmadd_ps(self.0, by.0, plus.0), _mm256_fmadd_ps(self.1, by.1, plus.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, by: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_mul_ps(self.0, by.0), _mm256_mul_ps(self.1, by.1)) }
        }
    }
}
