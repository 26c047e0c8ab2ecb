//! How loaded a backend is: what its replica reported, and what the dataplane has placed since.
//!
//! Two words, each written by one side and read by both, so that nobody waits: `lbd` stores a report with its number,
//! ingress programs add the cost of each flow that they place to a sum that names the report it counts from. A sum
//! that counts from an older report is as good as none. Without reports the sum fades by the clock, so that it says how
//! much was placed lately.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A flow's cost where a backend has the mean weight of its service: scores are in this unit.
pub const FLOW: u32 = 1_024;

/// Seconds in which a sum fades to its half. A flow counts for about as long as an answer of a language model
/// takes (a mean of 4 s is a half-life of 2.8 s); the clock of the packet path ticks in seconds.
pub const HALF_LIFE_S: u32 = 3;
/// The same where there are reports: the next one ends the sum, and only should none come, for minutes, it fades. Before
/// that every flow counts whole, as it will in the report.
pub const REPORTED_HALF_LIFE_S: u32 = 60;

/// Where scores come from, as [`Load::source`] holds it.
pub mod source {
    /// From the replica's reports.
    pub const REPORTS: u32 = 0;
    /// From the daemon's count of live flows.
    pub const FLOWS: u32 = 1;
    /// From reports that say what a flow costs, too: shares of a replica's capacity.
    pub const CAPACITY: u32 = 2;
}

/// Load of a backend.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Load {
    /// Written by `lbd` in one piece: score in units of [`FLOW`] (low half), number of the report (high half).
    pub report: u64,
    /// Written by the dataplane in one piece: cost added since (bits 0–31), half-life that it was counted in
    /// (32–47), number of the report that it counts from (48–63).
    pub added: u64,
    /// Cost of a flow here, in the unit of the score; written by `lbd`.
    pub cost: u32,
    /// Who writes the score, see [`source`].
    pub source: u32,
    /// Zero.
    pub reserved: u64,
}

/// The number after this one; 0 is for "none so far".
pub const fn next(number: u32) -> u32 {
    match number.wrapping_add(1) & 0xffff {
        0 => 1,
        next => next,
    }
}

/// A report as its word.
#[inline(always)]
pub const fn report(score: u32, number: u32) -> u64 {
    (number as u64) << 32 | score as u64
}

/// What a sum must name to count for this report now: report's number, half-life.
#[inline(always)]
const fn tag(report: u64, now_s: u32) -> u32 {
    let number = (report >> 32) as u32;
    let half_life_s = if number == 0 { HALF_LIFE_S } else { REPORTED_HALF_LIFE_S };
    number << 16 | (now_s / half_life_s) & 0xffff
}

/// What has been added for this report, faded to now.
#[inline(always)]
pub const fn added(report: u64, added: u64, now_s: u32) -> u32 {
    let (tag, then) = (tag(report, now_s), (added >> 32) as u32);
    // Low halves: half-lives. A clock that another processor has seen tick already is not long ago.
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

/// Load by both words.
#[inline(always)]
pub const fn total(report: u64, sum: u64, now_s: u32) -> u32 {
    (report as u32).saturating_add(added(report, sum, now_s))
}

/// The sum with a flow's cost added, counting for this report.
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
        // Read by a processor whose coarse clock has not ticked yet.
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
    fn nothing_overflows() {
        let sum = charged(0, charged(0, 0, NOW_S, u32::MAX), NOW_S, FLOW);
        assert_eq!(total(report(1, 0), sum, NOW_S), u32::MAX);
        assert_eq!(total(report(u32::MAX, 0), sum, NOW_S), u32::MAX);
        assert_eq!([next(0), next(1), next(0xffff)], [1, 2, 1]);
    }
}
