//! Rate limits of new flows, and write budgets that protect the flow tables from floods.
//!
//! A limit is a bucket in the form of the generic cell rate algorithm (ITU-T I.371): one word, the time at which the
//! bucket would be full again. A bucket that has never been used is therefore full, and no timer refills buckets.
//!
//! A meter that is above its limit says no until five seconds after the rate has halved, so that a flow's SYN and its
//! repetition get the same answer. Flows that a transition has to record are instead admitted up to the limit in
//! every second: a live flow sends more than one packet, a forged one does not come again.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Takes one flow from a bucket: the bucket's new word, or none if the bucket is empty.
///
/// `interval_ns` is the time in which one flow is earned, `tolerance_ns` the time for all but one of the largest burst.
#[inline(always)]
pub const fn take(full_at_ns: u64, now_ns: u64, interval_ns: u64, tolerance_ns: u64) -> Option<u64> {
    if full_at_ns > now_ns.saturating_add(tolerance_ns) {
        return None;
    }
    let from_ns = if full_at_ns > now_ns { full_at_ns } else { now_ns };
    Some(from_ns.saturating_add(interval_ns))
}

/// Key of a source's bucket.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct SourceKey {
    /// Prefix that counts as one source.
    pub source: Address,
    /// Index in `SERVICES`.
    pub service: u32,
}

/// Rate meter of the writes to a flow table for one service, by one CPU, per second. Above its limit it refuses writes,
/// and keeps refusing until [`HOLD_S`] after the last second in which more than half of the limit was requested.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RateLimiter {
    /// Second that is being counted.
    pub second: u32,
    /// Number of requests in this second.
    pub count: u32,
    /// Requests are refused before this second.
    pub until_s: u32,
    /// Number of floods so far.
    pub floods: u32,
}

/// Seconds for which a [`RateLimiter`] refuses after the last second above half of its limit.
pub const HOLD_S: u32 = 5;

impl RateLimiter {
    /// Counts a request, and tells whether one more entry may be written.
    #[inline(always)]
    pub const fn allow(&mut self, now_s: u32, per_s: u32) -> bool {
        self.step(now_s);
        let is_flood = self.is_flood(now_s);
        if self.count > per_s || (is_flood && self.count > per_s / 2) {
            self.until_s = now_s.wrapping_add(HOLD_S);
            if !is_flood {
                self.floods = self.floods.wrapping_add(1);
            }
            return false;
        }
        !is_flood
    }

    /// Counts a request without holding: requests up to the limit are admitted in every second.
    #[inline(always)]
    pub const fn allow_each_second(&mut self, now_s: u32, per_s: u32) -> bool {
        self.step(now_s);
        if self.count <= per_s {
            return true;
        }
        if !self.is_flood(now_s) {
            self.floods = self.floods.wrapping_add(1);
        }
        self.until_s = now_s.wrapping_add(HOLD_S);
        false
    }

    /// Whether requests are being refused.
    #[inline(always)]
    pub const fn is_flood(&self, now_s: u32) -> bool {
        // The boot clock does not run long enough to wrap; zero is the meter that was never used.
        self.until_s > now_s
    }

    #[inline(always)]
    const fn step(&mut self, now_s: u32) {
        if self.second != now_s {
            self.second = now_s;
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
    }
}

/// Write budgets of one service on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WriteBudget {
    /// SYNs that are cached.
    pub syns: RateLimiter,
    /// TCP flows written because of a transition.
    pub flows: RateLimiter,
    /// UDP flows.
    pub udp: RateLimiter,
    /// When the table of TCP flows, and that of UDP flows, last had no room, in seconds.
    pub full_s: [u32; 2],
    /// Zero.
    pub pad: [u32; 2],
}

/// Seconds after a full table within which nothing is started that would need room in it.
pub const FULL_S: u32 = 30;

/// Limits of the entries that may be written for one service, by one CPU, per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// SYNs that are cached; as many may become entries of the table of TCP flows.
    pub syns: u32,
    /// TCP flows from before a transition.
    pub flows: u32,
    /// UDP flows.
    pub udp: u32,
}

/// Number of unconfirmed bindings of mode `nat` that one CPU keeps ([`crate::nat::is_assured`]): an eighth of the table,
/// and at most the number of ports of one address. With more than four CPUs each has four times its share, as in
/// [`Budgets::of`].
pub const fn nat_embryonic(nat_flows: u32, ports: u32, processors: u32) -> u32 {
    let shares = if processors > 4 { processors / 4 } else { 1 };
    let most = if nat_flows / 8 < ports { nat_flows / 8 } else { ports };
    if most / shares == 0 { 1 } else { most / shares }
}

/// Factor of [`Budgets::flows`] for a service with this drain time: a flow that is not written within it is lost. With four
/// CPUs a flood that lasts the whole time fills a quarter of the table at most, or as much as without a factor.
pub const fn record_factor(drain_s: u32) -> u32 {
    let factor = 64 / if drain_s == 0 { 1 } else { drain_s };
    if factor < 1 {
        1
    } else if factor > 16 {
        16
    } else {
        factor
    }
}

impl Budgets {
    /// Budgets for tables with room for these numbers of entries, on this number of CPUs: a flood of one service takes a
    /// minute to fill a table, and leaves a SYN in the cache for about four seconds.
    ///
    /// With up to four CPUs each gets the whole budget, because a flood (or a rush) may arrive on one queue; with more, each
    /// gets four times its share.
    pub const fn of(flows: u32, syns: u32, udp_flows: u32, processors: u32) -> Self {
        let shares = if processors > 4 { processors / 4 } else { 1 };
        const fn part(of: u32, parts: u32) -> u32 {
            if of / parts == 0 { 1 } else { of / parts }
        }
        let (by_flows, by_syns) = (part(flows, 64 * shares), part(syns, 4 * shares));
        Self {
            syns: if by_flows < by_syns { by_flows } else { by_syns },
            flows: part(flows, 1_024 * shares),
            udp: part(udp_flows, 64 * shares),
        }
    }
}

map_value!(SourceKey, RateLimiter, WriteBudget);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_transition_writes_faster_and_not_more() {
        assert_eq!([0, 2, 4, 16, 30, 64, 300].map(record_factor), [16, 16, 16, 4, 2, 1, 1]);
        let flows = 1 << 20;
        let budget = Budgets::of(flows, 1, 1, 4);
        for drain_s in 1..=64 {
            let most = 4 * budget.flows * record_factor(drain_s) * drain_s;
            assert!(most <= flows / 4, "{drain_s} s: {most}");
        }
    }

    /// Number of flows admitted by requests at these times.
    fn taken(times: impl IntoIterator<Item = u64>, interval: u64, burst: u64) -> usize {
        let mut word = 0;
        let step = |now: u64| {
            let next = take(word, now, interval, (burst - 1) * interval);
            word = next.unwrap_or(word);
            next.is_some()
        };
        times.into_iter().map(step).filter(|taken| *taken).count()
    }

    #[test]
    fn a_burst_then_the_rate() {
        let start = 1_000_000;
        assert_eq!(taken([start; 100], 10, 7), 7);
        assert_eq!(taken((0..1_000).map(|i| start + i), 10, 7), 7 + 99);
        // At exactly the rate no request is refused.
        assert_eq!(taken((0..1_000).map(|i| start + i * 10), 10, 1), 1_000);
        // Credit does not accumulate beyond the burst.
        assert_eq!(taken([start].into_iter().chain([start + 1_000_000; 100]), 10, 7), 8);
    }

    #[test]
    fn buckets_do_not_overflow() {
        assert_eq!(take(u64::MAX, 5, u64::MAX, u64::MAX), Some(u64::MAX));
        assert_eq!(take(u64::MAX, 5, 1, 1), None);
    }

    #[test]
    fn a_meter_holds_until_the_flood_is_over() {
        let mut meter = RateLimiter::default();
        let second =
            |meter: &mut RateLimiter, now, calls: u32| (0..calls).filter(|_| meter.allow(now, 100)).count();
        assert_eq!(second(&mut meter, 1_000, 100), 100);
        assert_eq!(second(&mut meter, 1_001, 1_000), 100);
        assert!(meter.is_flood(1_001) && meter.floods == 1);
        // Below the limit, but above half of it: the hold continues.
        for now in 1_002..1_020 {
            assert_eq!(second(&mut meter, now, 80), 0, "{now}");
        }
        for now in 1_020..1_024 {
            assert_eq!(second(&mut meter, now, 40), 0, "{now}");
        }
        assert_eq!(second(&mut meter, 1_024, 40), 40);
        assert_eq!(meter.floods, 1);
    }

    #[test]
    fn a_trickle_goes_on() {
        let mut meter = RateLimiter::default();
        for now in 50..60 {
            assert_eq!((0..1_000).filter(|_| meter.allow_each_second(now, 7)).count(), 7);
        }
        assert_eq!(meter.floods, 1);
    }

    #[test]
    fn budgets_fit_their_tables() {
        let usual = Budgets::of(1 << 20, 1 << 17, 1 << 20, 2);
        assert_eq!(usual, Budgets { syns: 16_384, flows: 1_024, udp: 16_384 });
        assert_eq!(
            Budgets::of(1 << 20, 1 << 17, 1 << 20, 64),
            Budgets { syns: 1_024, flows: 64, udp: 1_024 }
        );
        assert_eq!(
            [
                nat_embryonic(1 << 18, 22_528, 2),
                nat_embryonic(1 << 15, 22_528, 4),
                nat_embryonic(1 << 18, 22_528, 64),
                nat_embryonic(1, 1, 500)
            ],
            [22_528, 4_096, 1_408, 1]
        );
        assert_eq!(Budgets::of(1, 1, 1, 500), Budgets { syns: 1, flows: 1, udp: 1 });
    }
}
