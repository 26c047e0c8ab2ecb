//! The clock of the dataplane: `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns` reads too.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Time since boot, without suspension.
pub fn boot() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock").into()
}

/// The same in whole seconds, as flows carry it.
pub fn boot_s() -> u32 {
    boot().as_secs() as u32
}
