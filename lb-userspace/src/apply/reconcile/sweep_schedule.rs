//! Decides which tables a sweep can skip, and how long to wait until the next sweep, from values that are cheap to read.
//!
//! A walk of a table costs its size, full or empty. A table that was found empty is skipped while nothing can have been
//! written to it: the programs ask a meter before each write ([`WriteBudget`]), and the kernel reports the number of
//! bindings ([`crate::apply::dataplane::Reader::bindings_memory`]). Input: these signals, and the results of the walks.
//! Used by the sweeper only.
//!
//! A walk of 2.7 million empty places every second costs a hundredth of a processor.

use lb_common::rate_limit::{RateLimiter, WriteBudget};
use lb_ebpf::FlowTable;
use std::time::Duration;

/// Shortest time between the starts of two sweeps.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Longest time between two walks of everything, whatever the signals say.
const WALK_ALL: Duration = Duration::from_secs(10);
/// Sweeping takes at most one part in this many of a CPU.
const REST: u32 = 100;
/// Divisor instead of [`REST`] where something waits for the result of the sweep, or room is short.
const REST_URGENT: u32 = 20;
/// Longest wait for a sweep, unless the urgent pace is slower.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Reading of a meter: second, and number of requests in it. It differs after every request.
type Reading = (u32, u32);

/// Readings of the meters of all services, by service and CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeterSignals {
    services: Vec<u32>,
    syns: Vec<Reading>,
    flows: Vec<Reading>,
    udp: Vec<Reading>,
}

impl MeterSignals {
    /// Adds the meters of a service.
    pub fn add(&mut self, service: u32, pressure: &[WriteBudget]) {
        let reading = |meter: &RateLimiter| (meter.second, meter.count);
        self.services.push(service);
        self.syns.extend(pressure.iter().map(|p| reading(&p.syns)));
        self.flows.extend(pressure.iter().map(|p| reading(&p.flows)));
        self.udp.extend(pressure.iter().map(|p| reading(&p.udp)));
    }

    /// Whether no program has requested a write to a table between these two readings. A cached SYN becomes a flow
    /// without a request of its own, so the readings for SYNs apply to flows too.
    fn is_still(&self, before: &Self, table: FlowTable) -> bool {
        let syns = self.services == before.services && self.syns == before.syns;
        match table {
            FlowTable::Syns => syns,
            FlowTable::Flows => syns && self.flows == before.flows,
            FlowTable::UdpFlows => self.services == before.services && self.udp == before.udp,
        }
    }
}

/// Tables that a sweep has to walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Flow tables, by number.
    pub tables: [bool; 3],
    /// Both tables of bindings.
    pub bindings: bool,
}

/// Knowledge about empty tables.
#[derive(Debug, Default)]
pub struct EmptyTables {
    /// The last reading.
    signals: Option<MeterSignals>,
    /// Tables to which nothing was written for a period, and which a walk after that found empty.
    empty: [bool; 3],
    /// Tables to which nothing was written between the last two readings.
    still: [bool; 3],
    /// Memory of the bindings' tables in bytes when they are empty.
    bare: Option<[u64; 2]>,
    walked_all: Option<Duration>,
}

impl EmptyTables {
    /// Decides what to walk now. Readings are at least [`PERIOD`] apart, so a request seen in one has been written by the next.
    pub fn next(&mut self, signals: MeterSignals, memory: Option<[u64; 2]>, now: Duration) -> Walk {
        let before = self.signals.replace(signals);
        let signals = self.signals.as_ref().expect("it has just been stored");
        let still = |table| before.as_ref().is_some_and(|before| signals.is_still(before, table));
        let all = self.walked_all.is_none_or(|at| now.saturating_sub(at) >= WALK_ALL);
        if all {
            self.walked_all = Some(now);
        }
        use FlowTable::{Flows, Syns, UdpFlows};
        let mut tables = [true; 3];
        for table in [Syns, Flows, UdpFlows] {
            let i = table as usize;
            self.still[i] = still(table);
            // A cached SYN that the last walk found may have become a flow since, which this walk of the SYNs does not find.
            let from_syns = table == Flows && tables[Syns as usize];
            tables[i] = all || from_syns || !(self.empty[i] && self.still[i]);
            // Not known to be empty until the walk has succeeded.
            self.empty[i] &= !tables[i];
        }
        Walk { tables, bindings: all || memory.is_none() || memory != self.bare }
    }

    /// Records the result of a walk of a table.
    pub fn walked(&mut self, table: FlowTable, entries: u64) {
        self.empty[table as usize] = entries == 0 && self.still[table as usize];
    }

    /// Records the result of a walk of the bindings, and their tables' memory before and after it.
    pub fn walked_bindings(&mut self, entries: u64, before: Option<[u64; 2]>, after: Option<[u64; 2]>) {
        if entries == 0 && before == after {
            self.bare = after;
        }
    }
}

/// Time from the end of a sweep to the start of the next. `took`: elapsed time; `cost`: CPU time.
pub fn pause(took: Duration, cost: Duration, is_urgent: bool) -> Duration {
    let urgent = cost * REST_URGENT;
    let rest = if is_urgent { urgent } else { (cost * REST).min(MAX_PAUSE.max(urgent)) };
    PERIOD.saturating_sub(took).max(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use FlowTable::{Flows, Syns, UdpFlows};

    /// One service on two CPUs; the second CPU's meters have these counts.
    fn signals(syns: u32, flows: u32, udp: u32) -> MeterSignals {
        let meter = |count| RateLimiter { second: 7, count, ..RateLimiter::default() };
        let mut signals = MeterSignals::default();
        let idle = WriteBudget::default();
        let busy = WriteBudget { syns: meter(syns), flows: meter(flows), udp: meter(udp), ..idle };
        signals.add(3, &[idle, busy]);
        signals
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Runs a sweep that finds these numbers of entries in the tables, and returns what it walked.
    fn sweep(
        empty_tables: &mut EmptyTables,
        signals: MeterSignals,
        entries: [u64; 3],
        now: Duration,
    ) -> [bool; 3] {
        let walk = empty_tables.next(signals, None, now);
        for table in [Syns, Flows, UdpFlows] {
            if walk.tables[table as usize] {
                empty_tables.walked(table, entries[table as usize]);
            }
        }
        walk.tables
    }

    /// [`Flows`], [`Syns`], [`UdpFlows`]: in the order of their numbers.
    const ALL: [bool; 3] = [true; 3];
    const NONE: [bool; 3] = [false; 3];

    #[test]
    fn empty_tables_are_left_out_until_something_is_written() {
        let mut empty_tables = EmptyTables::default();
        let mut sweep = |s, entries, ms| sweep(&mut empty_tables, s, entries, at(ms));
        assert_eq!(sweep(signals(0, 0, 0), [0; 3], 0), ALL, "the first sweep of a process");
        assert_eq!(sweep(signals(0, 0, 0), [0; 3], 1_000), ALL, "something may have been on its way");
        assert_eq!(sweep(signals(0, 0, 0), [0; 3], 2_000), NONE);
        assert_eq!(sweep(signals(0, 0, 1), [0; 3], 3_000), [false, false, true]);
        assert_eq!(sweep(signals(0, 0, 1), [0; 3], 4_000), [false, false, true], "not written when walked");
        assert_eq!(sweep(signals(0, 0, 1), [0; 3], 5_000), NONE);
        assert_eq!(sweep(signals(0, 1, 1), [0; 3], 6_000), [true, false, false]);
        assert_eq!(sweep(signals(0, 1, 1), [5, 0, 0], 7_000), [true, false, false]);
        assert_eq!(sweep(signals(0, 1, 1), [5, 0, 0], 8_000), [true, false, false], "it has flows");
        assert_eq!(sweep(signals(0, 1, 1), [0; 3], 9_000), [true, false, false]);
        assert_eq!(sweep(signals(0, 1, 1), [0; 3], 9_999), NONE);
        assert_eq!(sweep(signals(0, 1, 1), [0; 3], 10_000), ALL, "all of them now and then");
        assert_eq!(sweep(signals(0, 1, 1), [0; 3], 11_000), NONE);
    }

    #[test]
    fn flows_are_looked_for_while_there_are_syns() {
        let mut empty_tables = EmptyTables::default();
        let mut sweep = |s, entries, ms| sweep(&mut empty_tables, s, entries, at(ms))[..2].to_vec();
        for ms in [0, 1_000] {
            sweep(signals(0, 0, 0), [0; 3], ms);
        }
        assert_eq!(sweep(signals(0, 0, 0), [0; 3], 2_000), [false; 2]);
        // A SYN is cached: while it is in the cache it may become a flow.
        for ms in 3..7 {
            assert_eq!(sweep(signals(1, 0, 0), [0, 1, 0], ms * 1_000), [true; 2], "{ms}");
        }
        // It became one after the last walk, or between the two walks of this sweep.
        assert_eq!(sweep(signals(1, 0, 0), [1, 0, 0], 7_000), [true; 2]);
        assert_eq!(sweep(signals(1, 0, 0), [1, 0, 0], 8_000), [true, false]);
        assert_eq!(sweep(signals(1, 0, 0), [0, 0, 0], 9_000), [true, false]);
        assert_eq!(sweep(signals(1, 0, 0), [0, 0, 0], 9_500), [false; 2]);
    }

    #[test]
    fn other_meters_mean_that_something_may_be_there() {
        for other in [MeterSignals::default(), signals(1, 1, 0), {
            let mut two = signals(1, 1, 1);
            two.add(4, &[WriteBudget::default()]);
            two
        }] {
            let mut empty_tables = EmptyTables::default();
            for ms in [0, 1_000] {
                sweep(&mut empty_tables, signals(1, 1, 1), [0; 3], at(ms));
            }
            assert_eq!(sweep(&mut empty_tables, signals(1, 1, 1), [0; 3], at(2_000)), NONE);
            let walked = sweep(&mut empty_tables, other, [0; 3], at(3_000));
            assert!(walked[UdpFlows as usize], "{walked:?}");
        }
    }

    #[test]
    fn a_walk_that_fails_is_repeated() {
        let mut empty_tables = EmptyTables::default();
        for ms in [0, 1_000] {
            sweep(&mut empty_tables, signals(0, 0, 0), [0; 3], at(ms));
        }
        assert_eq!(empty_tables.next(signals(0, 0, 1), None, at(2_000)).tables, [false, false, true]);
        // The walk reported no result, and the meters are unchanged.
        assert_eq!(empty_tables.next(signals(0, 0, 1), None, at(3_000)).tables, [false, false, true]);
    }

    #[test]
    fn bindings_are_counted_by_the_kernel() {
        let mut empty_tables = EmptyTables::default();
        let mut next = |memory, found, after| {
            let walk = empty_tables.next(MeterSignals::default(), memory, at(0));
            if walk.bindings {
                empty_tables.walked_bindings(found, memory, after);
            }
            walk.bindings
        };
        let (bare, one) = (Some([100, 200]), Some([150, 260]));
        assert!(next(one, 1, one));
        assert!(next(one, 0, bare), "they have gone meanwhile");
        assert!(next(bare, 0, bare));
        assert!(!next(bare, 0, bare));
        assert!(next(Some([150, 200]), 0, one), "one entry without the other");
        assert!(!next(bare, 0, bare));
        assert!(next(None, 0, None), "nothing is known");
        assert!(next(None, 0, None));
    }

    #[test]
    fn the_pace_follows_the_cost() {
        let pause = |took_ms, cost_ms, is_urgent| pause(at(took_ms), at(cost_ms), is_urgent);
        for is_urgent in [false, true] {
            assert_eq!(pause(8, 8, is_urgent), at(992), "tables of ordinary size: each second");
        }
        assert_eq!(pause(50, 50, true), at(1_000));
        assert_eq!(pause(50, 50, false), at(5_000));
        assert_eq!(pause(400, 50, true), at(1_000), "not when others had the processor");
        assert_eq!(pause(600, 600, false), at(30_000));
        assert_eq!(pause(5_000, 5_000, false), at(100_000), "never more than a twentieth");
    }
}
