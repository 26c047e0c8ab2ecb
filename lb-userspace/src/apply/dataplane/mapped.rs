//! Arrays shared with the kernel by memory map (`BPF_F_MMAPABLE`): no system call per entry.

use super::DataplaneError;
use aya::maps::MapData;
use std::{
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd},
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A memory-mapped array of `T`, whose size is a multiple of 8 bytes.
///
/// Each 64-bit word is loaded and stored atomically; an entry of several words is not.
pub struct MappedArray<T> {
    words: NonNull<AtomicU64>,
    len: u32,
    writable: bool,
    value: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway; all access is atomic, word by word.
unsafe impl<T> Send for MappedArray<T> {}
// SAFETY: the memory is shared with the kernel anyway; all access is atomic, word by word.
unsafe impl<T> Sync for MappedArray<T> {}

impl<T: FromBytes + IntoBytes + Immutable + Copy + Default> MappedArray<T> {
    const WORDS: usize = size_of::<T>() / 8;

    /// Maps all entries of `map`.
    pub fn new(map: &MapData, name: &'static str, writable: bool) -> Result<Self, DataplaneError> {
        const { assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() > 0) };
        let info = map.info().map_err(|source| DataplaneError::Map { map: name, source })?;
        let len = info.max_entries();
        if info.value_size() as usize != size_of::<T>() {
            return Err(DataplaneError::Layout {
                map: name,
                got: info.value_size(),
                want: size_of::<T>() as u32,
            });
        }
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping of the whole map at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize * size_of::<T>(),
                protection,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(DataplaneError::Mmap { map: name, source: std::io::Error::last_os_error() });
        }
        let words = NonNull::new(address.cast()).expect("mmap answers an address or MAP_FAILED");
        Ok(Self { words, len, writable, value: PhantomData })
    }

    /// An array in memory of this process alone, all zeros.
    #[cfg(test)]
    pub fn private(len: u32) -> Self {
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED, "no memory");
        let words = NonNull::new(address.cast()).expect("mmap answers an address or MAP_FAILED");
        Self { words, len, writable: true, value: PhantomData }
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Words of an entry; none past the end.
    fn entry(&self, index: u32) -> Option<&[AtomicU64]> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the entry lies inside the mapping, which lives as long as self, is page-aligned,
        // and is only ever accessed through atomics.
        Some(unsafe {
            std::slice::from_raw_parts(self.words.as_ptr().add(index as usize * Self::WORDS), Self::WORDS)
        })
    }

    /// Value of an entry; none past the end.
    pub fn load(&self, index: u32) -> Option<T> {
        let mut value = T::default();
        let words = self.entry(index)?;
        for (bytes, word) in value.as_mut_bytes().chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        Some(value)
    }

    /// Writes an entry, its words in order; false past the end or if the mapping is read-only.
    #[must_use]
    pub fn store(&self, index: u32, value: &T) -> bool {
        let Some(words) = self.entry(index).filter(|_| self.writable) else { return false };
        for (bytes, word) in value.as_bytes().chunks_exact(8).zip(words) {
            let new = u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"));
            if word.load(Ordering::Relaxed) != new {
                word.store(new, Ordering::Release);
            }
        }
        true
    }

    /// The 32-bit word at byte `offset` of an entry; none past the end.
    pub fn load_u32(&self, index: u32, offset: usize) -> Option<u32> {
        Some(self.word(index, offset)?.load(Ordering::Acquire))
    }

    fn word(&self, index: u32, offset: usize) -> Option<&AtomicU32> {
        let words = self.entry(index)?;
        if !offset.is_multiple_of(4) || offset + 4 > size_of::<T>() {
            return None;
        }
        // SAFETY: inside the entry by the check above, aligned, and accessed atomically only.
        Some(unsafe { &*words.as_ptr().cast::<AtomicU32>().add(offset / 4) })
    }

    /// The 64-bit word at byte `offset` of an entry; none past the end.
    pub fn load_u64(&self, index: u32, offset: usize) -> Option<u64> {
        let words = self.entry(index).filter(|_| offset.is_multiple_of(8))?;
        Some(words.get(offset / 8)?.load(Ordering::Acquire))
    }

    /// Clears the 64-bit word at byte `offset` of an entry if it still is `known`.
    pub fn clear_u64(&self, index: u32, offset: usize, known: u64) {
        let words = self.entry(index).filter(|_| self.writable && offset.is_multiple_of(8));
        if let Some(word) = words.and_then(|words| words.get(offset / 8)) {
            // If another writer was faster, its value is wanted.
            let _ = word.compare_exchange(known, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// The 16-bit word at byte `offset` of an entry; none past the end.
    fn half_word(&self, index: u32, offset: usize) -> Option<&AtomicU16> {
        let words = self.entry(index)?;
        if !offset.is_multiple_of(2) || offset + 2 > size_of::<T>() {
            return None;
        }
        // SAFETY: inside the entry by the check above, aligned, and accessed atomically only.
        Some(unsafe { &*words.as_ptr().cast::<AtomicU16>().add(offset / 2) })
    }

    /// Loads the 16-bit word at byte `offset` of an entry; none past the end.
    pub fn load_u16(&self, index: u32, offset: usize) -> Option<u16> {
        Some(self.half_word(index, offset)?.load(Ordering::Acquire))
    }

    /// Stores the 16-bit word at byte `offset` of an entry atomically, after all earlier writes, unless it has this value:
    /// programs on other CPUs read the line.
    #[must_use]
    pub fn store_u16(&self, index: u32, offset: usize, value: u16) -> bool {
        let Some(word) = self.half_word(index, offset).filter(|_| self.writable) else { return false };
        if word.load(Ordering::Relaxed) != value {
            word.store(value, Ordering::Release);
        }
        true
    }

    /// Stores the 64-bit word at byte `offset` of an entry atomically, after all earlier writes.
    #[must_use]
    pub fn store_u64(&self, index: u32, offset: usize, value: u64) -> bool {
        let words = self.entry(index).filter(|_| self.writable && offset.is_multiple_of(8));
        let Some(word) = words.and_then(|words| words.get(offset / 8)) else { return false };
        word.store(value, Ordering::Release);
        true
    }

    /// Stores the 32-bit word at byte `offset` of an entry atomically, after all earlier writes.
    #[must_use]
    pub fn store_u32(&self, index: u32, offset: usize, value: u32) -> bool {
        let Some(word) = self.word(index, offset).filter(|_| self.writable) else { return false };
        word.store(value, Ordering::Release);
        true
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; nothing borrows from it any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.len as usize * size_of::<T>()) };
    }
}
