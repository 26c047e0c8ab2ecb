//! Deny and allow lists: what the packet path looks a source address up in.
//!
//! One table for both lists, in which the longest prefix that holds an address decides. Most packets come from nobody
//! who is listed, so two bitmaps (memory-mapped, like this module's [`GuardState`]) stand in front of the entries:
//!
//! - IPv4: two bits for each of the 2^24 blocks of 256 addresses say what becomes of all of it ([`block`]), or that
//!   longer prefixes in it have to be asked for. Prefixes up to /24 are in these bits only.
//! - IPv6: a bit for the hash of an address's first 64, 48, 32 or 16 bits ([`level`]); set if some prefix
//!   of that length or more, but less than the next, begins so.
//!
//! The entries are a hash map by address and length, asked once for each length that is in use there.
//! Written by `lbd`, read by `lb-ebpf`'s `guard`.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A prefix: IPv4 ones are mapped, their lengths 96 more.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct GuardKey {
    /// Its first address.
    pub address: Address,
    /// Its length in bits.
    pub bits: u32,
}

/// Values of the entries.
pub mod verdict {
    /// Packets are dropped.
    pub const DENY: u32 = 1;
    /// Packets are let through, whatever shorter prefixes say.
    pub const ALLOW: u32 = 2;
}

/// The two bits of a block of 256 IPv4 addresses.
pub mod block {
    /// Dropped, unless a longer prefix says otherwise.
    pub const DENY: u32 = 1;
    /// Longer prefixes have to be asked for.
    pub const ASK: u32 = 2;
    /// Blocks in a word.
    pub const IN_WORD: u32 = 16;
    /// Words of all blocks.
    pub const WORDS: u32 = (1 << 24) / IN_WORD;
    /// Length of a block's prefix.
    pub const BITS: u32 = 24;
}

/// The bitmap of IPv6 prefixes.
pub mod level {
    /// Bits of the bitmap, as a power of two.
    pub const SIZE_BITS: u32 = 24;
    /// Its words.
    pub const WORDS: u32 = (1 << SIZE_BITS) / 32;
    /// Levels: none, 16, 32, 48 and 64 bits.
    pub const COUNT: u32 = 5;

    /// How many leading bits of a prefix of this length are hashed; of those that are shorter than 16 none, so that
    /// they are always asked for.
    pub const fn of(bits: u32) -> u32 {
        match bits {
            0..16 => 0,
            16..32 => 16,
            32..48 => 32,
            48..64 => 48,
            _ => 64,
        }
    }

    /// Bit of the bitmap for an address whose first eight bytes are `high`.
    #[inline(always)]
    pub const fn bit(high: u64, level: u32) -> u32 {
        // As in `lb_ebpf::hash`: every bit of the input reaches every bit of the hash.
        let mut h = (high & super::mask64(level)) ^ level as u64;
        h ^= h >> 33;
        h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^= h >> 33;
        h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        (h >> (64 - SIZE_BITS)) as u32
    }
}

/// The first `bits` (at most 64) of a word.
#[inline(always)]
pub const fn mask64(bits: u32) -> u64 {
    if bits == 0 { 0 } else { u64::MAX << ((64 - bits) & 63) }
}

/// Lengths that an IPv6 prefix can have.
pub const LENGTHS: usize = 129;

/// Lengths of IPv6 prefixes that are in use, longest first, each with its [`level`]'s number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Lengths {
    /// How many.
    pub count: u32,
    /// Which levels they are of: bit 0 for none hashed, bit 1 for 16 bits and so on.
    pub levels: u32,
    /// Length, number of its level.
    pub bits: [[u8; 2]; 132],
}

impl Lengths {
    /// None in use.
    pub const NONE: Self = Self { count: 0, levels: 0, bits: [[0; 2]; 132] };
}

/// What there is to be asked for. `active` picks the live list of IPv6 lengths, so that it changes at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GuardState {
    /// 0 or 1: the live one of `v6`.
    pub active: u32,
    /// Lengths of IPv4 prefixes beyond /24 that are in use: bit 0 for /25.
    pub v4: u32,
    /// Those of IPv6 prefixes.
    pub v6: [Lengths; 2],
}

impl Default for GuardState {
    fn default() -> Self {
        Self { active: 0, v4: 0, v6: [Lengths::NONE; 2] }
    }
}

map_value!(GuardKey, Lengths, GuardState);
