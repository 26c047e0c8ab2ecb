//! Runs the loaded XDP programs on single packets (`BPF_PROG_TEST_RUN`): packet in, packet out,
//! verdict, counters. Needs root; each [`Ingress`] or [`Decap`] has maps of its own.

pub mod bed;
mod build;
mod decap;
mod guard;
mod ingress;
mod natively;
pub mod outer;
pub mod seeds;

pub use build::{ACKNOWLEDGED, HOST_MAC, PEER_MAC, Packet, SEQUENCE, Vlan, checksum, checksum_is_right};
pub use decap::Decap;
pub use ingress::{Ingress, Pair, Run, USED};
pub use natively::{action, hex};

/// XDP verdicts.
pub mod xdp {
    /// Dropped.
    pub const DROP: u32 = 1;
    /// To the host's stack.
    pub const PASS: u32 = 2;
    /// Out of the interface it came in by.
    pub const TX: u32 = 3;
    /// Out of another interface.
    pub const REDIRECT: u32 = 4;
}

/// Seconds of the clock by which flows are dated.
pub fn now_s() -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    assert_eq!(result, 0, "Linux has this clock");
    now.tv_sec as u32
}
