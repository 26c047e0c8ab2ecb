//! Load of a backend: the last report of its replica, and the flows that the dataplane has placed since.
//!
//! Two words, each written by one side and read by both, so that no lock is needed: `lbd` stores a report with its
//! number; ingress programs add the cost of each flow that they place to a sum that names the report it counts from. A
//! sum that counts from an older report is ignored. Without reports the sum decays with the clock, so that it says how
//! much was placed recently.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Cost of a flow on a backend with the mean weight of its service; the unit of scores.
pub const FLOW: u32 = 1_024;

/// Seconds in which a sum decays to half. A flow counts for about as long as an answer of a language model
/// takes (a mean of 4 s is a half-life of 2.8 s); the clock of the packet path ticks in seconds.
pub const HALF_LIFE_S: u32 = 3;
/// Half-life in seconds while there are reports: the next report resets the sum, which decays only if no report comes for
/// minutes. Until then every flow counts in full, as it will in the report.
pub const REPORTED_HALF_LIFE_S: u32 = 60;

/// Sources of scores, as in [`Load::source`].
pub mod source {
    /// Reports of the replica.
    pub const REPORTS: u32 = 0;
    /// The daemon's count of live flows.
    pub const FLOWS: u32 = 1;
    /// Reports that also give the cost of a flow: shares of a replica's capacity.
    pub const CAPACITY: u32 = 2;
    /// As [`CAPACITY`]; while the replica reports nothing, the daemon's count of live flows.
    pub const CAPACITY_OR_FLOWS: u32 = 3;
}

/// Load of a backend.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Load {
    /// Written by `lbd` in one store: score in units of [`FLOW`] (low half), number of the report (high half).
    pub report: u64,
    /// Written by the dataplane in one store: cost added since the report (bits 0–31), number of the half-life in which it
    /// was counted (32–47), number of the report that it counts from (48–63).
    pub added: u64,
    /// Cost of a flow on this backend, in the unit of the score; written by `lbd`.
    pub cost: u32,
    /// Source of the score, see [`source`].
    pub source: u32,
    /// Factor of reported scores and costs, in units of [`FLOW`]: above it for a backend whose share is below the mean of
    /// its service. 0, which an earlier `lbd` leaves: [`FLOW`]. Read and written by `lbd` only.
    pub factor: u32,
    /// Whether the score is the replica's; written by `lbd` only.
    pub is_reported: u32,
}

impl Load {
    /// Multiplies a reported score or cost by the backend's factor; at least 1 for what is above 0.
    pub fn scaled(&self, reported: u32) -> u32 {
        let factor = if self.factor == 0 { FLOW } else { self.factor };
        let scaled = u64::from(reported) * u64::from(factor) / u64::from(FLOW);
        u32::try_from(scaled).unwrap_or(u32::MAX).max(reported.min(1))
    }
}

/// Number of the report after this one; 0 means "none so far".
pub const fn next(number: u32) -> u32 {
    match number.wrapping_add(1) & 0xffff {
        0 => 1,
        next => next,
    }
}

/// Packs a report into its word.
#[inline(always)]
pub const fn report(score: u32, number: u32) -> u64 {
    (number as u64) << 32 | score as u64
}

/// Tag that a sum must carry to count for this report now: number of the report, number of the half-life.
#[inline(always)]
const fn tag(report: u64, now_s: u32) -> u32 {
    let number = (report >> 32) as u32;
    let half_life_s = if number == 0 { HALF_LIFE_S } else { REPORTED_HALF_LIFE_S };
    number << 16 | (now_s / half_life_s) & 0xffff
}

/// Cost added since this report, decayed to now.
#[inline(always)]
pub const fn added(report: u64, added: u64, now_s: u32) -> u32 {
    let (tag, then) = (tag(report, now_s), (added >> 32) as u32);
    // Low halves: half-lives. Another CPU may have seen the clock tick already, so a slightly negative age counts as 0.
    let age = (tag as u16).wrapping_sub(then as u16);
    if tag >> 16 != then >> 16 {
        0
    } else if age == 0 || age > 0xff00 {
        added as u32
    } else if age > 31 {
        0
    } else {
        (added as u32) >> age
    }
}

/// Load from both words.
#[inline(always)]
pub const fn total(report: u64, sum: u64, now_s: u32) -> u32 {
    (report as u32).saturating_add(added(report, sum, now_s))
}

/// The sum with the cost of a flow added, counting from this report.
#[inline(always)]
pub const fn charged(report: u64, sum: u64, now_s: u32, cost: u32) -> u64 {
    (tag(report, now_s) as u64) << 32 | added(report, sum, now_s).saturating_add(cost) as u64
}

map_value!(Load);

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_S: u32 = 10_000 * REPORTED_HALF_LIFE_S;

    #[test]
    fn what_was_placed_counts_until_the_next_report() {
        let first = report(5 * FLOW, 7);
        let sum = charged(first, charged(first, 0, NOW_S, FLOW), NOW_S, FLOW);
        assert_eq!(total(first, sum, NOW_S), 7 * FLOW);
        let second = report(6 * FLOW, 8);
        assert_eq!(total(second, sum, NOW_S), 6 * FLOW);
        assert_eq!(total(second, charged(second, sum, NOW_S, FLOW), NOW_S), 7 * FLOW);
    }

    #[test]
    fn without_reports_it_fades() {
        let sum = charged(0, 0, NOW_S, 8 * FLOW);
        let after = |halves: u32| added(0, sum, NOW_S + halves * HALF_LIFE_S) / FLOW;
        assert_eq!(
            [after(0), after(1), after(2), after(3), after(4), after(32), after(60_000)],
            [8, 4, 2, 1, 0, 0, 0]
        );
        let later = charged(0, sum, NOW_S + HALF_LIFE_S, FLOW);
        assert_eq!(added(0, later, NOW_S + HALF_LIFE_S), 5 * FLOW);
        // A CPU whose coarse clock has not ticked yet reads the sum.
        assert_eq!(added(0, later, NOW_S), 5 * FLOW);
    }

    #[test]
    fn a_report_that_never_comes_is_not_waited_for() {
        let first = report(0, 7);
        let sum = charged(first, 0, NOW_S, 8 * FLOW);
        assert_eq!(added(first, sum, NOW_S + 10) / FLOW, 8);
        assert_eq!(added(first, sum, NOW_S + 2 * REPORTED_HALF_LIFE_S) / FLOW, 2);
    }

    #[test]
    fn a_share_below_the_mean_makes_reports_weigh_more() {
        let of = |factor| Load { factor, ..Load::default() };
        assert_eq!([of(0).scaled(700), of(FLOW).scaled(700), of(4 * FLOW).scaled(700)], [700, 700, 2_800]);
        assert_eq!([of(FLOW / 2).scaled(1), of(FLOW / 2).scaled(0)], [1, 0]);
        assert_eq!(of(u32::MAX).scaled(u32::MAX), u32::MAX);
    }

    #[test]
    fn nothing_overflows() {
        let sum = charged(0, charged(0, 0, NOW_S, u32::MAX), NOW_S, FLOW);
        assert_eq!(total(report(1, 0), sum, NOW_S), u32::MAX);
        assert_eq!(total(report(u32::MAX, 0), sum, NOW_S), u32::MAX);
        assert_eq!([next(0), next(1), next(0xffff)], [1, 2, 1]);
    }
}
