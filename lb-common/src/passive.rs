//! Passive health signals: returning packets that suggest that a worker may be dead. Programs count them; lbd takes them
//! as hints and probes the worker. Anybody can forge such a packet, so a signal is never a verdict.
//!
//! A counter belongs to a hash of the worker's address: programs need not know the backends, whatever outer source a
//! packet carried, and forged messages need no additional memory. Two addresses that share a counter are both probed.
//!
//! The counters are memory-mapped, so reading them for a thousand backends ten times a second takes no system call.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Counters of one hash. They wrap; when two CPUs count at once, one count may be lost.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PassiveFailures {
    /// ICMP errors saying that a packet did not reach this address.
    pub unreachable: u32,
    /// Resets in answer to a SYN, in mode `nat`, whose answers pass this host.
    pub refused: u32,
}

/// Kind of a signal, which selects its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassiveFailure {
    /// [`PassiveFailures::unreachable`].
    Unreachable,
    /// [`PassiveFailures::refused`].
    Refused,
}

/// Number of counters.
pub const COUNT: u32 = 1 << 16;

/// Index of the counter of an address.
#[inline(always)]
pub const fn index_of(address: &Address) -> u32 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    let high = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let low = u64::from_le_bytes([i, j, k, l, m, n, o, p]);
    // Fibonacci hashing (Knuth, TAOCP 6.4), once for each half: neighbours in one subnet get distant counters.
    let x = (high.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ low).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 48) as u32
}

map_value!(PassiveFailures);

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
                seen[index_of(&address) as usize] += 1;
            }
        }
        // 30,000 in 65,536 places: about seven in one place at most when placed at random.
        assert!(*seen.iter().max().unwrap() <= 9, "{}", seen.iter().max().unwrap());
    }
}
