//! Deny and allow lists: the tables in which the packet path looks up source addresses.
//!
//! One table holds both lists; the longest prefix that contains an address decides. Most sources are not listed, so two
//! bitmaps (memory-mapped, like this module's [`GuardState`]) are read before the entries:
//!
//! - IPv4: two bits for each of the 2^24 blocks of 256 addresses give the verdict for the whole block ([`block`]), or
//!   say that longer prefixes in it must be looked up. Prefixes up to /24 are in these bits only.
//! - IPv6: one bit per hash of an address's first 64, 48, 32 or 16 bits ([`level`]), set if a prefix of at least that
//!   length, and shorter than the next level, begins with these bits.
//!
//! The entries are a hash map by address and length, looked up once for each length that is in use in the block or level.
//! `lbd` writes the tables, `guard` of `lb-ebpf` reads them.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A prefix. IPv4 prefixes are stored IPv4-mapped, with 96 added to their length.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct GuardKey {
    /// First address of the prefix.
    pub address: Address,
    /// Length of the prefix in bits.
    pub bits: u32,
}

/// Values of the entries.
pub mod verdict {
    /// Packets are dropped.
    pub const DENY: u32 = 1;
    /// Packets are allowed, whatever shorter prefixes say.
    pub const ALLOW: u32 = 2;
}

/// The two bits of a block of 256 IPv4 addresses.
pub mod block {
    /// Dropped, unless a longer prefix says otherwise.
    pub const DENY: u32 = 1;
    /// Longer prefixes must be looked up.
    pub const ASK: u32 = 2;
    /// Blocks per word.
    pub const IN_WORD: u32 = 16;
    /// Number of words for all blocks.
    pub const WORDS: u32 = (1 << 24) / IN_WORD;
    /// Length of a block's prefix.
    pub const BITS: u32 = 24;
}

/// The bitmap of IPv6 prefixes.
pub mod level {
    /// Bits of the bitmap, as a power of two.
    pub const SIZE_BITS: u32 = 24;
    /// Number of words of the bitmap.
    pub const WORDS: u32 = (1 << SIZE_BITS) / 32;
    /// Number of levels: 0, 16, 32, 48 and 64 bits.
    pub const COUNT: u32 = 5;

    /// Number of leading bits that are hashed for a prefix of this length; 0 for prefixes shorter than 16, which are
    /// therefore always looked up.
    pub const fn of(bits: u32) -> u32 {
        match bits {
            0..16 => 0,
            16..32 => 16,
            32..48 => 32,
            48..64 => 48,
            _ => 64,
        }
    }

    /// Number of the bitmap bit for an address whose first eight bytes are `high`.
    #[inline(always)]
    pub const fn bit(high: u64, level: u32) -> u32 {
        // The same mixing as in `lb_ebpf::select::hash`: every bit of the input affects every bit of the hash.
        let mut h = (high & super::mask64(level)) ^ level as u64;
        h ^= h >> 33;
        h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^= h >> 33;
        h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        (h >> (64 - SIZE_BITS)) as u32
    }
}

/// Mask of the first `bits` (at most 64) bits of a word.
#[inline(always)]
pub const fn mask64(bits: u32) -> u64 {
    if bits == 0 { 0 } else { u64::MAX << ((64 - bits) & 63) }
}

/// Number of lengths that an IPv6 prefix can have.
pub const LENGTHS: usize = 129;

/// Lengths of IPv6 prefixes that are in use, longest first, each with the number of its [`level`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Lengths {
    /// Number of used entries.
    pub count: u32,
    /// Levels in use: bit 0 for the level of 0 bits, bit 1 for 16 bits and so on.
    pub levels: u32,
    /// Length, and number of its level.
    pub bits: [[u8; 2]; 132],
}

impl Lengths {
    /// No length in use.
    pub const NONE: Self = Self { count: 0, levels: 0, bits: [[0; 2]; 132] };
}

/// Prefix lengths in use. `active` selects the live list of IPv6 lengths, so that it changes at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GuardState {
    /// 0 or 1: the live entry of `v6`.
    pub active: u32,
    /// Lengths of IPv4 prefixes beyond /24 that are in use: bit 0 for /25.
    pub v4: u32,
    /// Lengths of IPv6 prefixes that are in use: the live list and the next one.
    pub v6: [Lengths; 2],
}

impl Default for GuardState {
    fn default() -> Self {
        Self { active: 0, v4: 0, v6: [Lengths::NONE; 2] }
    }
}

map_value!(GuardKey, Lengths, GuardState);
