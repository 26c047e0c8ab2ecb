//! Counters. All are per CPU; a reader adds them up.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What went to one backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BackendStats {
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded: IP length as received, before encapsulation.
    pub bytes: u64,
    /// New flows placed: TCP SYNs (a repeated one counts again), first packets of tracked UDP flows.
    pub flows: u64,
}

/// Rate limit of generated ICMP on one CPU: a bucket refilled by the clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IcmpBudget {
    /// Boot clock at the last refill, in nanoseconds.
    pub refilled_ns: u64,
    /// Messages that may still be sent.
    pub tokens: u64,
}

map_value!(BackendStats, IcmpBudget);
