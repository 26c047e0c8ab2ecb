//! The dataplane: what happens to a packet on an ingress host and on a worker.
//!
//! Everything here is pure code over two traits, [`Frame`] (the packet) and [`Tables`] (the maps),
//! and runs unchanged in the kernel (feature `bpf`, entry points under `src/bin`), in native tests,
//! in fuzzers, and inside `lbd`, whose `explain` asks the very code that places packets.
//!
//! A packet's way: [`parse`] → [`service`] → [`guard`] → [`choose`] (new flows: [`place`]) → [`forward`]; [`ingress::process`] strings
//! them together, [`decap::process`] is the worker's side. Callers: `src/bin`, tests, `lb-userspace`.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod forward;
pub mod guard;
pub mod icmp;
pub mod ingress;
#[cfg(feature = "bpf")]
pub mod kernel;
pub mod nat;
#[cfg(not(target_arch = "bpf"))]
pub mod native;
pub mod packet;
pub mod quic;

pub mod second_chance;
pub mod select;
pub mod worker;

pub use packet::verdict::Verdict;
pub use packet::{Frame, Packet};
pub use select::tables::{FlowTable, ReadOnly, Tables};
