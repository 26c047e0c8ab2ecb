//! The control plane of the balancer: everything behind `lbd` and `lbctl`.
//!
//! Inside, pure (no clock, no random source, no I/O; time and seeds are arguments):
//! [`model`] ← `policy`, `maglev` ← `compile`. Around it, the edges: `dataplane` (aya maps and
//! programs), `store`, `health`, `replica`, `regions`, `neighbour`, `api`, `cli`. `reconcile` ties them together.

pub mod announce;
pub mod api;
pub mod cli;
pub mod client;
pub mod clock;
pub mod compile;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod doctor;
pub mod ethtool;
pub mod explain;
pub mod health;
pub mod maglev;
pub mod metrics;
pub mod model;
pub mod neighbour;
pub mod objects;
pub mod offloads;
pub mod policy;
pub mod reconcile;
pub mod regions;
pub mod render;
pub mod replica;
pub mod store;
pub mod worker;
mod worker_route;

/// Where `lbd` listens, and `lbctl` looks for it, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/lb/lbd.sock";
