//! Notes of SYNs, and a filter in front of the table of TCP flows: one cache line for both.
//!
//! A flow's [`mark`], a hash under a key of this host's, names a [`Line`]. Its notes say where recent SYNs were placed
//! ([`WAYS`] of them, told apart by half of the mark; a new one pushes out the oldest). Its filter says whether the table
//! of TCP flows can hold such a flow, so that most packets that are in no table need not ask it: one line that stays in
//! the second-level cache instead of two hash maps that do not.
//!
//! The filter never says no for a flow that is in the table. The dataplane sets a bit of the current generation before
//! it writes an entry, and lbd alone takes bits away: it starts the other generation, waits until nobody writes to
//! the first, reads the whole table, writes what it found to `settled`, and clears the first. Two processors that set
//! bits of one word at once could lose one of them (the target has no atomic or), so the bit is looked at again once
//! the entry is written. Until lbd has gone round once ([`State::armed`]), nobody goes by the filter.

use crate::{FlowKey, flow::SYN_TIMEOUT_S, limits, map_value, slot::BACKEND_MASK};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Notes of a line.
pub const WAYS: usize = 4;
/// Lines with notes, a power of two.
pub const LINES: u32 = limits::SYNS / WAYS as u32;
/// Place of the [`State`], behind them.
pub const STATE: u32 = LINES;
/// Bits of a mark that name its line.
const LINE_BITS: u32 = LINES.trailing_zeros();
/// Ages, in seconds modulo 256, from here on are those of notes that another processor has written in our future.
const FUTURE: u8 = 250;

const _: () = assert!(LINES.is_power_of_two() && LINE_BITS + 11 <= 32 && SYN_TIMEOUT_S < FUTURE as u32);

/// A line. Zeros: no notes, no flows.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Line {
    /// Filter: flows that lbd has found in the table, by six bits of the mark.
    pub settled: u64,
    /// Filter: the same flows, by five other bits.
    pub settled_too: u32,
    /// Filter: flows written since, by generation.
    pub recent: [u16; 2],
    /// Notes: fingerprint of the mark (high half), second modulo 256 (bits 24–31), backend. Written in one piece.
    pub heads: [u64; WAYS],
    /// The SYNs' sequence numbers, host byte order. Written before the head.
    pub sequences: [u32; WAYS],
}

/// What the lines go by, in the place of one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct State {
    /// Key of the marks, drawn by lbd before the first service is written.
    pub key: [u64; 2],
    /// 0 or 1: which of [`Line::recent`] is written to.
    pub generation: u32,
    /// Not 0: the filter holds all that the table of flows does.
    pub armed: u32,
    /// Zero.
    pub reserved: [u64; 5],
}

const _: () = assert!(size_of::<Line>() == 64 && size_of::<State>() == size_of::<Line>());

map_value!(Line, State);

/// A flow as the mark takes it: its source's words, and ports with the service, all as loaded.
#[inline(always)]
pub const fn words(source: [u32; 4], source_port: u16, port: u16, service: u32) -> [u64; 3] {
    [
        source[0] as u64 | (source[1] as u64) << 32,
        source[2] as u64 | (source[3] as u64) << 32,
        (service as u64) << 32 | (source_port as u64) << 16 | port as u64,
    ]
}

/// The same of a flow's key.
pub fn words_of(key: &FlowKey) -> [u64; 3] {
    let [a, b, c, d]: [[u8; 4]; 4] = zerocopy::transmute!(key.source);
    let port = |be: crate::Be16| u16::from_ne_bytes(be.to_bytes());
    words([a, b, c, d].map(u32::from_ne_bytes), port(key.source_port), port(key.port), key.service)
}

/// A flow's mark.
#[inline(always)]
pub const fn mark(key: [u64; 2], words: [u64; 3]) -> u64 {
    // IPv4's first word is 0.
    let first = if words[0] == 0 { 0 } else { mixed(words[0] ^ key[1]) };
    mixed((mixed(words[1] ^ key[0] ^ first).wrapping_add(key[1])) ^ words[2])
}

/// Every bit of the input reaches every bit of the upper half, and most of the lower (Steele and others 2014, a variant
/// with one product less).
#[inline(always)]
const fn mixed(mut h: u64) -> u64 {
    h ^= h >> 32;
    h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^= h >> 29;
    h = h.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^ (h >> 32)
}

/// Its line.
#[inline(always)]
pub const fn line_of(mark: u64) -> u32 {
    mark as u32 & (LINES - 1)
}

/// What tells it from others of its line.
#[inline(always)]
const fn fingerprint(mark: u64) -> u32 {
    (mark >> 32) as u32
}

/// Its bit in [`Line::settled`].
#[inline(always)]
pub const fn settled_bit(mark: u64) -> u64 {
    1 << (mark >> LINE_BITS & 63)
}

/// Its bit in [`Line::settled_too`].
#[inline(always)]
pub const fn settled_too_bit(mark: u64) -> u32 {
    1 << (mark >> (LINE_BITS + 6) & 31)
}

/// Its bit in [`Line::recent`].
#[inline(always)]
pub const fn recent_bit(mark: u64) -> u16 {
    1 << (mark >> LINE_BITS & 15)
}

/// What the filter says of it.
#[inline(always)]
pub const fn may_have(settled: u64, settled_too: u32, recent: [u16; 2], mark: u64) -> bool {
    settled & settled_bit(mark) != 0 && settled_too & settled_too_bit(mark) != 0
        || (recent[0] | recent[1]) & recent_bit(mark) != 0
}

/// A note's head.
#[inline(always)]
pub const fn head(mark: u64, backend: u32, now_s: u32) -> u64 {
    (fingerprint(mark) as u64) << 32 | ((now_s & 0xff) << 24 | backend & BACKEND_MASK) as u64
}

/// Whether a head is a note of this mark's.
#[inline(always)]
pub const fn is_of(head: u64, mark: u64) -> bool {
    head != 0 && (head >> 32) as u32 == fingerprint(mark)
}

/// The backend that it names.
#[inline(always)]
pub const fn backend(head: u64) -> u32 {
    head as u32 & BACKEND_MASK
}

/// Its age in seconds. It is modulo 256: lbd removes it before that is over.
#[inline(always)]
pub const fn age_s(head: u64, now_s: u32) -> u32 {
    let age = (now_s as u8).wrapping_sub((head >> 24) as u8);
    if age >= FUTURE { 0 } else { age as u32 }
}

/// How much better than others it is that a new note takes this one's place: its age, most if there is none.
#[inline(always)]
pub const fn yields(head: u64, mark: u64, now_s: u32) -> u32 {
    match head {
        0 => 256,
        _ if is_of(head, mark) => 257,
        _ => age_s(head, now_s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Be16, mapped};

    fn key(client: u32, port: u16) -> FlowKey {
        let [a, b, c, d] = client.to_be_bytes();
        FlowKey {
            source: mapped([a, b, c, d]),
            source_port: Be16::new(port),
            port: Be16::new(443),
            service: 3,
        }
    }

    #[test]
    fn a_head_says_what_was_noted() {
        let mark = mark([1, 2], words_of(&key(0x0a00_0001, 1_024)));
        let noted = head(mark, 77, 100_000);
        assert!(is_of(noted, mark) && !is_of(noted, mark ^ 1 << 40) && !is_of(0, 0));
        assert_eq!((backend(noted), age_s(noted, 100_000), age_s(noted, 100_130)), (77, 0, 130));
        // Read by a processor whose coarse clock has not ticked yet.
        assert_eq!(age_s(noted, 99_999), 0);
        assert!(yields(noted, mark, 100_005) > yields(0, mark, 100_005));
        assert!(yields(0, mark, 100_005) > yields(head(!mark, 1, 99_900), mark, 100_005));
        assert!(
            yields(head(!mark, 1, 100_000), mark, 100_005) > yields(head(!mark, 1, 100_001), mark, 100_005)
        );
    }

    #[test]
    fn marks_spread_over_lines_and_bits() {
        let (mut lines, mut bits) = ([0u32; LINES as usize], [0u32; 64]);
        for client in 0..LINES / 4 {
            for port in 0..16 {
                let mark = mark([5, 6], words_of(&key(0x0a00_0000 + client, 40_000 + port)));
                lines[line_of(mark) as usize] += 1;
                bits[settled_bit(mark).trailing_zeros() as usize] += 1;
                assert_eq!(recent_bit(mark).trailing_zeros(), settled_bit(mark).trailing_zeros() % 16);
            }
        }
        // 4 expected in each: Poisson, as random ones would be.
        assert!(lines.iter().all(|n| *n < 24), "{:?}", lines.iter().max());
        let empty = lines.iter().filter(|n| **n == 0).count() as f64 / f64::from(LINES);
        assert!((0.015..0.022).contains(&empty), "{empty}: e^-4 is 0.0183");
        let expected = LINES / 16;
        assert!(bits.iter().all(|n| n.abs_diff(expected) < expected / 5), "{bits:?}");
    }

    #[test]
    fn every_part_of_a_flow_and_the_key_matter() {
        let of = |key: &FlowKey| mark([5, 6], words_of(key));
        let base = key(0x0a00_0001, 1_024);
        let others = [
            FlowKey { source: mapped([10, 0, 0, 2]), ..base },
            FlowKey { source: [0x20; 16], ..base },
            FlowKey { source_port: Be16::new(1_025), ..base },
            FlowKey { port: Be16::new(444), ..base },
            FlowKey { service: 4, ..base },
        ];
        assert!(others.iter().all(|other| of(other) != of(&base)));
        assert_ne!(mark([5, 7], words_of(&base)), of(&base));
        assert_ne!(mark([4, 6], words_of(&base)), of(&base));
    }
}
