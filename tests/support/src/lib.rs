//! A real network in one kernel: namespaces joined by veth pairs, real workers,
//! real clients, and the daemons under test.
//!
//! In: a layout. Out: a [`bed::Bed`] that is gone when it is dropped, and load
//! whose every request is accounted for. Used by `cargo xtask demo` and by the
//! suites that need root (`tests/*`). Nothing here sleeps for luck: whatever
//! takes time is waited for by its condition.

pub mod bed;
pub mod daemon;
pub mod hold;
pub mod http;
pub mod iperf;
pub mod netns;
pub mod nginx;
pub mod process;
pub mod udp;
pub mod wait;
pub mod xdp_pass;
