//! Two tables that spare the common packet a hash map's cost: where exact ports lead, and which addresses are VIPs.
//!
//! Both repeat what `SERVICE_INDEX` and `VIPS` say, and never more. [`Line`]s hold two exact ports each, at the place
//! that a hash gives; one that finds no room is in `SERVICE_INDEX` only. The filter has a bit for each hash of an
//! address: where it is clear, the address is no VIP; set, it may be one. A program that is newly loaded begins with
//! both empty, and takes the filter's word for nothing before lbd has [armed](FILTER_ARMED) it.
//!
//! Hashes are not keyed: only the operator chooses VIPs.

use crate::{Address, ServiceKey, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Lines of exact ports, a power of two.
pub const LINES: u32 = 1 << LINES_BITS;
const LINES_BITS: u32 = 14;
/// Entries of a line.
pub const ENTRIES: usize = 2;

/// Bits of the filter.
pub const FILTER_BITS: u32 = 1 << FILTER_SHIFT;
const FILTER_SHIFT: u32 = 16;
/// Word of the filter that is not 0 once its bits hold all VIPs.
pub const FILTER_ARMED: u32 = FILTER_BITS / 32;
/// Words of the filter.
pub const FILTER_WORDS: u32 = FILTER_ARMED + crate::slot::LINE;

/// An exact port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Entry {
    /// The VIP, as two words in memory's order.
    pub vip: [u64; 2],
    /// [`port_word`] in the low half, index in `SERVICES` in the high; 0: unused. Stored last, and cleared first.
    pub port_and_service: u64,
    /// Zero.
    pub pad: u64,
}

/// A cache line of exact ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Line {
    /// They.
    pub entries: [Entry; ENTRIES],
}

/// Port (network order, as loaded) and protocol as one word, never 0.
#[inline(always)]
pub const fn port_word(port: u16, protocol: u8) -> u32 {
    port as u32 | (protocol as u32) << 16 | 1 << 24
}

/// Odd numbers whose bits look random (the fractions of the golden ratio and of pi).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const PI: u64 = 0x243f_6a88_85a3_08d3;

#[inline(always)]
const fn base(vip: [u64; 2]) -> u64 {
    // IPv4's first word is 0: this is one product for it.
    vip[0].wrapping_mul(PI) ^ vip[1]
}

/// Line of an exact port.
#[inline(always)]
pub const fn line_of(vip: [u64; 2], port_word: u32) -> u32 {
    ((base(vip) ^ port_word as u64).wrapping_mul(GOLDEN) >> (64 - LINES_BITS)) as u32
}

/// Bit of the filter for an address.
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

/// A key's line, and its entry there for this service.
pub fn entry(key: &ServiceKey, service: u32) -> (u32, Entry) {
    let (vip, port) = (words(&key.vip), port_word(u16::from_ne_bytes(key.port.to_bytes()), key.protocol));
    let port_and_service = (service as u64) << 32 | port as u64;
    (line_of(vip, port), Entry { vip, port_and_service, pad: 0 })
}

impl Entry {
    /// Whether this is the entry of the same key, whatever its service.
    pub fn is_of(&self, other: &Self) -> bool {
        self.vip == other.vip && self.port_and_service as u32 == other.port_and_service as u32
    }
}

map_value!(Entry, Line);
