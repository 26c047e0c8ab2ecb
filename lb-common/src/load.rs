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
    /// Zero.
    pub pad: u32,
    /// Zero.
    pub reserved: u64,
}

/// A report as its word.
#[inline(always)]
pub const fn report(score: u32, number: u32) -> u64 {
    (number as u64) << 32 | score as u64
}

/// What a sum must name to count for this report now: report's number, half-life.
#[inline(always)]
const fn tag(report: u64, now_s: u32) -> u32 {
    ((report >> 32) as u32) << 16 | (now_s / HALF_LIFE_S) & 0xffff
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

/// Whether cost can simply be added to a sum; otherwise [`restarted`] replaces it.
#[inline(always)]
pub const fn counts(report: u64, sum: u64, now_s: u32) -> bool {
    tag(report, now_s) == (sum >> 32) as u32
}

/// A sum that counts for this report from now on, with `cost` added. Two processors that restart it at once lose
/// one flow's cost.
#[inline(always)]
pub const fn restarted(report: u64, sum: u64, now_s: u32, cost: u32) -> u64 {
    (tag(report, now_s) as u64) << 32 | added(report, sum, now_s).saturating_add(cost) as u64
}

map_value!(Load);
