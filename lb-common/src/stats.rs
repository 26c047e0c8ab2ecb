//! Counters. All are per CPU; a reader adds them up.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Traffic to one backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BackendStats {
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded: IP length as received, before encapsulation.
    pub bytes: u64,
    /// New flows placed: TCP SYNs (retransmissions count too), first packets of tracked UDP flows.
    pub flows: u64,
}

/// Rate limit of generated ICMP on one CPU: a token bucket refilled by the clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IcmpBudget {
    /// Boot clock at the last refill, in nanoseconds.
    pub refilled_ns: u64,
    /// Messages that may still be sent.
    pub tokens: u64,
}

impl IcmpBudget {
    /// Takes a token; false when none is left. At most `per_s` messages per second, `burst` at once.
    #[inline(always)]
    pub fn take(&mut self, now_ns: u64, per_s: u32, burst: u32) -> bool {
        let ns_per_message = 1_000_000_000 / if per_s == 0 { 1 } else { per_s as u64 };
        let ns_per_message = if ns_per_message == 0 { 1 } else { ns_per_message };
        let earned = now_ns.wrapping_sub(self.refilled_ns) / ns_per_message;
        if earned != 0 {
            // What remains is earned with the next message.
            self.refilled_ns = self.refilled_ns.wrapping_add(earned.wrapping_mul(ns_per_message));
            let tokens = self.tokens.saturating_add(earned);
            self.tokens = if tokens > burst as u64 { burst as u64 } else { tokens };
        }
        if self.tokens == 0 {
            return false;
        }
        self.tokens -= 1;
        true
    }
}

map_value!(BackendStats, IcmpBudget);

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages that a steady demand gets in ten seconds.
    fn granted(per_s: u32, burst: u32, asked_per_s: u64) -> u64 {
        let mut budget = IcmpBudget::default();
        let start_ns = 77_777_777_777;
        while budget.take(start_ns, per_s, burst) {}
        let take = |i: &u64| budget.take(start_ns + i * 1_000_000_000 / asked_per_s, per_s, burst);
        (1..=10 * asked_per_s).filter(take).count() as u64
    }

    #[test]
    fn the_rate_is_what_it_says_whatever_is_asked() {
        for asked in [1_001, 1_100, 1_500, 1_999, 5_000, 1_000_000] {
            assert!((9_999..=10_000).contains(&granted(1_000, 100, asked)), "{asked}/s");
        }
        assert_eq!(granted(1_000, 100, 500), 5_000, "less than the rate");
    }

    #[test]
    fn a_pause_earns_a_burst_and_no_more() {
        let mut budget = IcmpBudget::default();
        let now_ns = 5_000_000_000;
        assert_eq!((0..1_000).filter(|_| budget.take(now_ns, 1_000, 100)).count(), 100);
        assert_eq!((0..1_000).filter(|_| budget.take(now_ns + 500_000, 1_000, 100)).count(), 0);
        assert_eq!((0..1_000).filter(|_| budget.take(now_ns + 1_000_000, 1_000, 100)).count(), 1);
    }
}
