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

pub mod aes;
pub mod chain;
pub mod chance;
pub mod choose;
pub mod cookie;
pub mod csum;
pub mod decap;
pub mod echo;
pub mod forward;
pub mod fragment;
pub mod guard;
pub mod hash;
pub mod icmp;
pub mod icmp_error;
pub mod icmp_stage;
pub mod ingress;
#[cfg(feature = "bpf")]
pub mod kernel;
pub mod limit;
pub mod martian;
pub mod nat;
#[cfg(not(target_arch = "bpf"))]
pub mod native;
pub mod network;
pub mod packet;
pub mod parse;
pub mod place;
pub mod quic;
pub mod quick;
pub mod service;
pub mod tables;
pub mod verdict;
pub mod wire;

pub use packet::{Frame, Packet};
pub use tables::{FlowTable, ReadOnly, Tables};
pub use verdict::Verdict;
