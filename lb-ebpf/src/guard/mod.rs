//! Deny and allow lists: the longest listed prefix that holds a packet's source decides.
//!
//! Most sources are listed nowhere, which one look at a bitmap tells (see [`lb_common::guard`]); for IPv4 prefixes up to
//! /24 that look is the whole answer. Only what is left asks the entries, once for each length in use.
//!
//! Input: [`GuardTables`], a source address. Output: whether its packets are dropped. Called for packets to a VIP by
//! `ingress` and its stages, where the feature is on; by the daemon's `explain`, and by tests.

pub mod limit;
pub mod martian;

use lb_common::{
    Reason,
    guard::{GuardKey, GuardState, LENGTHS, block, level, mask64, verdict},
    settings::{IngressSettings, features},
};

use crate::{Tables, packet::parse::address};

/// The maps of the lists.
pub trait GuardTables {
    /// A word of `GUARD_BLOCKS`.
    fn guard_block(&self, word: u32) -> u32;
    /// A word of `GUARD_FILTER`.
    fn guard_filter(&self, word: u32) -> u32;
    /// What there is to be asked for.
    fn guard_state(&self) -> Option<&GuardState>;
    /// A prefix's verdict.
    fn guard_entry(&self, key: &GuardKey) -> Option<u32>;
}

/// Drops what comes from a denied source, if this program has lists at all.
#[inline(always)]
pub fn check<T: Tables>(tables: &T, settings: &IngressSettings, source: [u32; 4]) -> Result<(), Reason> {
    if settings.features & features::GUARD != 0 && tables.is_denied(source) {
        return Err(Reason::GuardDenied);
    }
    Ok(())
}

/// Whether packets of this source (network order, IPv4 mapped) are dropped.
#[inline(always)]
pub fn is_denied<T: GuardTables>(tables: &T, source: [u32; 4]) -> bool {
    if is_v4(source) {
        match v4_block(tables, u32::from_be(source[3])) {
            0 => false,
            block::DENY => true,
            bits => v4_entry(tables, source[3], bits & block::DENY != 0),
        }
    } else {
        let word = |high: u32, low: u32| (u32::from_be(high) as u64) << 32 | u32::from_be(low) as u64;
        v6_entry(tables, word(source[0], source[1]), word(source[2], source[3]))
    }
}

/// Whether an address in network order is an IPv4-mapped one.
#[inline(always)]
pub const fn is_v4(source: [u32; 4]) -> bool {
    source[0] == 0 && source[1] == 0 && source[2] == 0xffff_u32.to_be()
}

/// The two bits of an address's block.
#[inline(always)]
pub fn v4_block<T: GuardTables>(tables: &T, source: u32) -> u32 {
    let number = source >> (32 - block::BITS);
    let word = tables.guard_block(number / block::IN_WORD);
    word >> (number % block::IN_WORD * 2) & (block::DENY | block::ASK)
}

/// Asks for prefixes beyond /24; `denied` is what the block says.
#[inline(always)]
pub fn v4_entry<T: GuardTables>(tables: &T, source: u32, denied: bool) -> bool {
    let Some(state) = tables.guard_state() else { return denied };
    let lengths = state.v4;
    let source = u32::from_be(source);
    for i in 0..8 {
        // Longest first: /32 is bit 7.
        if lengths >> (7 - i) & 1 == 0 {
            continue;
        }
        let masked = source & (u32::MAX << i);
        let key =
            GuardKey { address: address([0, 0, 0xffff_u32.to_be(), masked.to_be()]), bits: 96 + 32 - i };
        if let Some(found) = tables.guard_entry(&key) {
            return found == verdict::DENY;
        }
    }
    denied
}

/// Asks for prefixes of an IPv6 address, given in host order.
#[inline(always)]
pub fn v6_entry<T: GuardTables>(tables: &T, high: u64, low: u64) -> bool {
    let Some(state) = tables.guard_state() else { return false };
    let lengths = if state.active == 0 { &state.v6[0] } else { &state.v6[1] };
    if lengths.levels == 0 {
        return false;
    }
    // All levels at once, and without a branch: nothing that the verifier knows differs from round to round below.
    let mut may_be = 1;
    for n in 1..level::COUNT {
        let bit = level::bit(high, n * 16);
        may_be |= (tables.guard_filter(bit / 32) >> (bit % 32) & 1) << n;
    }
    may_be &= lengths.levels;
    if may_be == 0 {
        return false;
    }
    for i in 0..LENGTHS {
        if i as u32 >= lengths.count {
            break;
        }
        let [bits, level] = lengths.bits[i];
        if may_be >> (level & 7) & 1 == 0 {
            continue;
        }
        let bits = bits as u32;
        let rest = bits.saturating_sub(64);
        let (high, low) = (high & mask64(if bits > 64 { 64 } else { bits }), low & mask64(rest));
        let key = GuardKey { address: address(words(high, low)), bits };
        if let Some(found) = tables.guard_entry(&key) {
            return found == verdict::DENY;
        }
    }
    false
}

/// An address in network order from its halves.
#[inline(always)]
const fn words(high: u64, low: u64) -> [u32; 4] {
    [((high >> 32) as u32).to_be(), (high as u32).to_be(), ((low >> 32) as u32).to_be(), (low as u32).to_be()]
}
