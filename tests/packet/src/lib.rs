//! Runs the loaded XDP programs on single packets (`BPF_PROG_TEST_RUN`): packet in, packet out,
//! verdict, counters. Needs root; each [`Ingress`] or [`Decap`] has maps of its own.

mod build;
mod decap;
mod ingress;

pub use build::{Packet, Vlan, checksum_is_right};
pub use decap::Decap;
pub use ingress::{Ingress, Pair, Run};

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
