//! Signs that a worker may be dead, which packets that come back give away: counted by the programs, read by lbd, which
//! takes them for hints and asks the worker itself. Anybody can forge one, so a sign is never a verdict.
//!
//! A counter belongs to a hash of the worker's address: programs need not know who is a backend, whatever outer
//! source a packet carried, and no number of forged messages needs room. Two addresses that share one are both asked.
//!
//! The counters are memory-mapped, so reading them for a thousand backends ten times a second takes no system call.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Counters of one hash. They wrap; of two processors that count at once one may be lost.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Signs {
    /// ICMP errors that say that a packet did not reach this address.
    pub unreachable: u32,
    /// Resets in answer to a SYN, in mode `nat`, where answers pass this host.
    pub refused: u32,
}

/// Which counter a sign adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// [`Signs::unreachable`].
    Unreachable,
    /// [`Signs::refused`].
    Refused,
}

/// Counters there are.
pub const COUNT: u32 = 1 << 16;

/// The counter of an address.
#[inline(always)]
pub const fn place(address: &Address) -> u32 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    let high = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let low = u64::from_le_bytes([i, j, k, l, m, n, o, p]);
    // Fibonacci hashing (Knuth, TAOCP 6.4), once for each half: neighbours in one subnet go far apart.
    let x = (high.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ low).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 48) as u32
}

map_value!(Signs);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_spread() {
        let mut seen = [0u8; COUNT as usize];
        for i in 0..10_000u32 {
            let [_, b, c, d] = i.to_be_bytes();
            for address in [
                crate::mapped([10, b, c, d]),
                [0xfd, 0, 0, 0, 0, 0, c, d, 0, 0, 0, 0, 0, 0, 0, 1],
                [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, c, d],
            ] {
                seen[place(&address) as usize] += 1;
            }
        }
        // 30,000 in 65,536 places: at random some seven in one place at most.
        assert!(*seen.iter().max().unwrap() <= 9, "{}", seen.iter().max().unwrap());
    }
}
