//! Two tables that spare most packets a hash map lookup: services of exact ports, and a filter of VIP addresses.
//!
//! Both repeat entries of `SERVICE_INDEX` and `VIPS`, and never hold more. An [`ExactLine`] holds two exact ports, and a hash
//! of VIP and port selects the line; a port that finds no free entry is in `SERVICE_INDEX` only. The filter has one bit
//! per hash of an address: a clear bit means that the address is not a VIP, a set bit that it may be one. A newly loaded
//! program begins with both tables empty, and ignores the filter until lbd has [armed](FILTER_ARMED) it.
//!
//! Hashes are not keyed, because only the operator chooses VIPs.

use crate::{Address, ServiceKey, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Number of lines of exact ports, a power of two.
pub const LINES: u32 = 1 << LINES_BITS;
const LINES_BITS: u32 = 14;
/// Entries per line.
pub const ENTRIES: usize = 2;

/// Number of bits of the filter.
pub const FILTER_BITS: u32 = 1 << FILTER_SHIFT;
const FILTER_SHIFT: u32 = 16;
/// Index of the word that is not 0 once the filter's bits hold all VIPs.
pub const FILTER_ARMED: u32 = FILTER_BITS / 32;
/// Number of words of the filter.
pub const FILTER_WORDS: u32 = FILTER_ARMED + crate::slot::LINE;

/// Service of an exact port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Entry {
    /// The VIP, as two words in memory order.
    pub vip: [u64; 2],
    /// [`port_word`] in the low half, index in `SERVICES` in the high half; 0: unused. Stored last; alone when an entry is removed.
    pub port_and_service: u64,
    /// Zero.
    pub pad: u64,
}

/// A cache line of exact ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ExactLine {
    /// Entries of the line.
    pub entries: [Entry; ENTRIES],
}

/// Port (network order, as loaded) and protocol as one word, never 0.
#[inline(always)]
pub const fn port_word(port: u16, protocol: u8) -> u32 {
    port as u32 | (protocol as u32) << 16 | 1 << 24
}

/// Odd multipliers with random-looking bits (fractions of the golden ratio and of pi).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const PI: u64 = 0x243f_6a88_85a3_08d3;

#[inline(always)]
const fn base(vip: [u64; 2]) -> u64 {
    // The first word of an IPv4 address is 0, so this costs one product.
    vip[0].wrapping_mul(PI) ^ vip[1]
}

/// Index of the line of an exact port.
#[inline(always)]
pub const fn line_of(vip: [u64; 2], port_word: u32) -> u32 {
    ((base(vip) ^ port_word as u64).wrapping_mul(GOLDEN) >> (64 - LINES_BITS)) as u32
}

/// Number of the filter bit of an address.
#[inline(always)]
pub const fn filter_bit(vip: [u64; 2]) -> u32 {
    (base(vip).wrapping_mul(GOLDEN) >> (64 - FILTER_SHIFT)) as u32
}

/// An address as two words.
#[inline(always)]
pub const fn words(vip: &Address) -> [u64; 2] {
    let mut words = [[0; 8]; 2];
    let mut i = 0;
    while i < 16 {
        words[i / 8][i % 8] = vip[i];
        i += 1;
    }
    [u64::from_ne_bytes(words[0]), u64::from_ne_bytes(words[1])]
}

/// Line of a key, and the entry that maps the key to `service`.
pub fn entry(key: &ServiceKey, service: u32) -> (u32, Entry) {
    let (vip, port) = (words(&key.vip), port_word(u16::from_ne_bytes(key.port.to_bytes()), key.protocol));
    let port_and_service = (service as u64) << 32 | port as u64;
    (line_of(vip, port), Entry { vip, port_and_service, pad: 0 })
}

impl Entry {
    /// Whether both entries have the same key; the services may differ.
    pub fn is_of(&self, other: &Self) -> bool {
        self.vip == other.vip && self.port_and_service as u32 == other.port_and_service as u32
    }
}

map_value!(Entry, ExactLine);
