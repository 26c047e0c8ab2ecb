//! The only place where packet memory is read or written.
//!
//! [`Packet`] is a window on a frame's linear part; each access is checked against its end, which is
//! also what the kernel's verifier wants to see. [`Frame`] owns the window and can move its ends.

pub mod csum;
pub mod fib;
pub mod ip;
pub mod network;
pub mod parse;
pub mod verdict;
pub mod wire;

/// Longest offset that an access may have. The verifier needs a bound on variable offsets.
pub const MAX_OFFSET: usize = 0x3ff;

/// Bytes that [`Frame::sum_of`] takes at a time.
pub const SUM_CHUNK: usize = 512;
/// Pieces that it takes at most: more than a jumbo frame has.
pub const SUM_CHUNKS: usize = 32;

/// Memory that [`Frame::sum_of`] works in.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Sum {
    /// Bytes still to be added.
    pub left: u32,
    /// Where they begin.
    pub offset: u32,
    /// Sum so far.
    pub sum: u32,
    /// A piece, and room to fill up its last word with zeros.
    pub bytes: [u8; SUM_CHUNK + 8],
}

impl Sum {
    /// Nothing added yet.
    pub const EMPTY: Self = Self { left: 0, offset: 0, sum: 0, bytes: [0; SUM_CHUNK + 8] };
}

/// A type that any bytes make a valid value of, and that has no padding.
///
/// # Safety
/// Implement it only for integers, arrays of them, and `repr(C)` structs of them without padding.
pub unsafe trait Bytes: Copy {}

// SAFETY: plain integers and arrays of them.
unsafe impl Bytes for u8 {}
// SAFETY: as above.
unsafe impl Bytes for u16 {}
// SAFETY: as above.
unsafe impl Bytes for u32 {}
// SAFETY: as above.
unsafe impl Bytes for u64 {}
// SAFETY: as above.
unsafe impl<const N: usize> Bytes for [u8; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Bytes for [u16; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Bytes for [u32; N] {}

/// A window on packet memory.
#[derive(Clone, Copy)]
pub struct Packet {
    start: usize,
    end: usize,
}

impl Packet {
    /// A window from `start` up to `end`.
    ///
    /// # Safety
    /// Both are the bounds of one allocation (or of an XDP buffer) that outlives the window's use and
    /// is not otherwise accessed meanwhile.
    #[inline(always)]
    pub const unsafe fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// Hides earlier bounds checks of the window from LLVM, which would conclude from an access farther on that a nearer one
    /// lies inside, and leave out the check that the verifier wants to see.
    #[inline(always)]
    #[must_use]
    pub fn forget_checks(self) -> Self {
        Self { start: core::hint::black_box(self.start), ..self }
    }

    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        // The barrier keeps LLVM from turning this into 32-bit pointer arithmetic, which the
        // verifier refuses (seen on 6.18).
        core::hint::black_box(self.end - self.start)
    }

    /// Whether the window is empty.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Address of `size` bytes at `offset`, if they lie inside.
    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> Option<usize> {
        if offset > MAX_OFFSET {
            return None;
        }
        let place = self.start + offset;
        if place + size > self.end { None } else { Some(place) }
    }

    /// The `T` at `offset` (any alignment), in the packet's byte order.
    #[inline(always)]
    pub fn read<T: Bytes>(&self, offset: usize) -> Option<T> {
        let place = self.at(offset, size_of::<T>())? as *const T;
        // SAFETY: `at` checked the bounds, `new` promises that the memory is ours, and any bytes are
        // a valid T. On BPF a plain read is one load where read_unaligned would become one per byte;
        // the kernels that offer XDP take unaligned packet access.
        #[cfg(target_arch = "bpf")]
        let value = unsafe { place.read() };
        // SAFETY: as above.
        #[cfg(not(target_arch = "bpf"))]
        let value = unsafe { place.read_unaligned() };
        Some(value)
    }

    /// Writes `value` at `offset` (any alignment); false if it does not fit.
    #[inline(always)]
    #[must_use]
    pub fn write<T: Bytes>(&mut self, offset: usize, value: T) -> bool {
        let Some(place) = self.at(offset, size_of::<T>()) else { return false };
        let place = place as *mut T;
        // SAFETY: as in `read`.
        #[cfg(target_arch = "bpf")]
        unsafe {
            place.write(value);
        }
        // SAFETY: as in `read`.
        #[cfg(not(target_arch = "bpf"))]
        unsafe {
            place.write_unaligned(value);
        }
        true
    }

    /// The first `N` bytes, if there are so many.
    #[inline(always)]
    pub fn window<const N: usize>(&self) -> Option<Window<N>> {
        if self.start + N > self.end { None } else { Some(Window { start: self.start }) }
    }

    /// Address of `N` bytes at `offset` for a kernel helper, if they lie inside.
    #[inline(always)]
    pub fn pointer<const N: usize>(&self, offset: usize) -> Option<*mut u8> {
        self.at(offset, N).map(|place| place as *mut u8)
    }
}

/// Bytes of a packet that were checked together, for headers whose place is known at compile time.
#[derive(Clone, Copy)]
pub struct Window<const N: usize> {
    start: usize,
}

impl<const N: usize> Window<N> {
    /// The `T` at offset `AT` (any alignment), in the packet's byte order.
    #[inline(always)]
    pub fn read<T: Bytes, const AT: usize>(&self) -> T {
        const { assert!(AT + size_of::<T>() <= N) };
        let place = (self.start + AT) as *const T;
        // SAFETY: the window's bytes were checked when it was made; otherwise as in `Packet::read`.
        #[cfg(target_arch = "bpf")]
        let value = unsafe { place.read() };
        // SAFETY: as above.
        #[cfg(not(target_arch = "bpf"))]
        let value = unsafe { place.read_unaligned() };
        value
    }

    /// Writes `value` at offset `AT` (any alignment).
    #[inline(always)]
    pub fn write<T: Bytes, const AT: usize>(&mut self, value: T) {
        const { assert!(AT + size_of::<T>() <= N) };
        let place = (self.start + AT) as *mut T;
        // SAFETY: as in `read`.
        #[cfg(target_arch = "bpf")]
        unsafe {
            place.write(value);
        }
        // SAFETY: as in `read`.
        #[cfg(not(target_arch = "bpf"))]
        unsafe {
            place.write_unaligned(value);
        }
    }
}

/// A frame whose ends can be moved, and that knows what is around it.
pub trait Frame {
    /// The linear part. Moving an end makes older windows invalid.
    fn packet(&self) -> Packet;

    /// Whole length, parts outside the linear one included.
    fn total_len(&self) -> usize;

    /// Moves the start by `delta` bytes: negative makes room in front. False if there is no room.
    fn adjust_head(&mut self, delta: i32) -> bool;

    /// Moves the end by `delta` bytes: negative cuts off. False if it cannot.
    fn adjust_tail(&mut self, delta: i32) -> bool;

    /// One's complement sum (RFC 1071, not folded) of `N` bytes at `offset`; N a multiple of 4, at most 512.
    fn sum<const N: usize>(&self, offset: usize) -> Option<u32>;

    /// The same sum of any `len` bytes at `offset`, parts outside the linear one included, by way of `memory`.
    /// None if there are more than [`SUM_CHUNKS`] pieces of them.
    fn sum_of(&self, offset: usize, len: usize, memory: &mut Sum) -> Option<u32>;

    /// Interface that it came in by.
    fn ifindex(&self) -> u32;

    /// The kernel's context of this run, for functions of their own; null where there is none.
    #[inline(always)]
    fn context(&self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }
}
