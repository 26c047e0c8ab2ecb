//! The clock of the dataplane: `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns` reads too; and that of the wall, for what
//! operators say.

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time since boot, without suspension.
pub fn boot() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock").into()
}

/// The same in whole seconds, as flows carry it.
pub fn boot_s() -> u32 {
    boot().as_secs() as u32
}

/// Processor time that the calling thread has used.
pub fn thread() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock").into()
}

/// Time since 1970 UTC.
pub fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Milliseconds since 1970 UTC.
pub fn unix_ms() -> u64 {
    unix().as_millis() as u64
}
