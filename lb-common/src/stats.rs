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
        let earned =
            now_ns.wrapping_sub(self.refilled_ns) / if ns_per_message == 0 { 1 } else { ns_per_message };
        if earned != 0 {
            self.refilled_ns = now_ns;
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
